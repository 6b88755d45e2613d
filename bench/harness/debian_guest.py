"""A Debian guest (scripts/make-debian-image) at its first shell, with a folder of the host's: what bench/share and bench/kernel-build run in."""
import os
import re
import subprocess
import sys
import threading


def default_image():
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "ring3", "debian")
    return os.environ.get("RING3_DEBIAN", cache)


def cpu_ms(vm):
    """CPU time of that process and its children, in milliseconds."""
    total = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/stat" % process) as f:
                parent = int(f.read().rpartition(")")[2].split()[1])
            if vm not in (int(process), parent):
                continue
            for task in os.listdir("/proc/%s/task" % process):
                with open("/proc/%s/task/%s/schedstat" % (process, task)) as f:
                    total += int(f.read().split()[0])
        except OSError:
            pass  # it has ended
    return total / 1e6


def run_jobs(name, ring3, debian, work, share, arguments, script, timeout, memory="1G", options=()):
    """Boots the image with changes going to an overlay in `work`, mounts `share` (a word for --share whose tag is "share") at /run/share, runs
    "sh /run/share/SCRIPT ARGUMENTS" there, and ends this program with a line when that does not write "over" and power off.

    The script writes "begin" before a job, and "JOB PLACE NANOSECONDS" after it, PLACE being disk or share. Returned are two
    dictionaries {job: {place: [milliseconds]}}: by the clock, and CPU time of ring3's processes.
    """
    disk = os.path.join(work, "disk.qcow2")
    subprocess.run([ring3, "image", "create", "-b", os.path.join(os.path.abspath(debian), "debian.raw"), "-F", "raw", disk], check=True)
    vm = subprocess.Popen([ring3, "run", "--engine", "soft", *options, "-m", memory, "--kernel", os.path.join(debian, "vmlinuz"),
                           "--initrd", os.path.join(debian, "initrd.img"), "--net", "none", "--disk", disk, "--share", share,
                           "--append", "console=ttyS0 root=/dev/vda rw quiet init=/bin/sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    watchdog = threading.Timer(timeout, vm.kill)
    watchdog.daemon = True
    watchdog.start()
    seen = b""
    while not seen.endswith(b"# "):  # the shell's prompt
        byte = vm.stdout.read(1)
        if not byte:
            sys.exit("%s: the guest came to no shell: %r" % (name, seen[-300:]))
        seen += byte
    vm.stdin.write(("mkdir -p /run/share && mount -t virtiofs share /run/share && sh /run/share/%s %s\n" % (script, arguments)).encode())
    vm.stdin.flush()
    times, cpu, began, over = {}, {}, 0, False
    for line in vm.stdout:
        text = line.decode(errors="replace").strip()
        m = re.fullmatch(r"(\S+) (disk|share) (\d+)", text)
        if text == "begin":
            began = cpu_ms(vm.pid)
        elif m:
            cpu.setdefault(m.group(1), {"disk": [], "share": []})[m.group(2)].append(cpu_ms(vm.pid) - began)
            times.setdefault(m.group(1), {"disk": [], "share": []})[m.group(2)].append(int(m.group(3)) / 1e6)
        elif text.startswith("failed:"):
            print(name + ": " + text, file=sys.stderr)
        over = over or text == "over"
    status = vm.wait()
    watchdog.cancel()
    if not over or status != 0:
        sys.exit("%s: the guest did not do its work (status %d)" % (name, status))
    return times, cpu
