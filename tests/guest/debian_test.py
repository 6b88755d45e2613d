"""A whole Debian on a virtual disk: to its login, on the network, off again, its disk sound, and the same disk under QEMU.

usage: debian_test.py RING3 [unittest arguments]
The system is what scripts/make-debian-image makes (RING3_DEBIAN: its directory). The engine is soft, or what RING3_TEST_ENGINE
says; RING3_TEST_QEMU=0 leaves QEMU out. Peers are on the host's loopback; as root names are resolved by a server of the test's own.
"""
import ctypes
import functools
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402
from support import Terminal, run  # noqa: E402

CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "ring3", "debian")
DEBIAN = os.environ.get("RING3_DEBIAN", CACHE)
PATIENCE = 600  # seconds: busy machines are slow
MANY = 200
NAME, RESOLVER = "files.ring3.test", "127.53.53.53"
APPEND = "console=ttyS0 root=/dev/vda rw quiet"
TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid):
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512


def answer_names(s):
    """Every name that is asked for is the NAT's router, where the host's loopback is."""
    try:
        while True:
            query, peer = s.recvfrom(4096)
            kind = query[12:].split(b"\0", 1)[1][:2]
            end = query.index(b"\0", 12) + 5
            answer = b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([10, 0, 2, 2]) if kind == b"\0\1" else b""
            s.sendto(query[:2] + b"\x81\x80\0\1\0" + bytes([1 if answer else 0]) + b"\0\0\0\0" + query[12:end] + answer, peer)
    except OSError:
        pass


class Debian(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.dir = tempfile.mkdtemp(prefix="ring3-debian-", dir="/var/tmp")
        cls.addClassCleanup(shutil.rmtree, cls.dir)
        cls.base = os.path.join(DEBIAN, "debian.raw")
        cls.data = random.Random(12).randbytes(16 << 20)
        cls.www = os.path.join(cls.dir, "www")
        os.mkdir(cls.www)
        with open(os.path.join(cls.www, "data"), "wb") as f:
            f.write(cls.data)
        for i in range(1, MANY + 1):
            with open(os.path.join(cls.www, "f%d" % i), "wb") as f:
                f.write(b"%d\n" % i * 300)
        cls.server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=cls.www))
        threading.Thread(target=cls.server.serve_forever, daemon=True).start()
        cls.addClassCleanup(cls.server.server_close)
        cls.addClassCleanup(cls.server.shutdown)
        cls.names = False
        if os.geteuid() == 0:
            cls.names = cls.own_resolver()

    @classmethod
    def own_resolver(cls):
        """In a mount namespace of this thread's, /etc/resolv.conf names a server of ours; ring3 reads it there."""
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            s.bind((RESOLVER, 53))
        except OSError:
            s.close()
            return False
        cls.addClassCleanup(s.close)
        mine = os.path.join(cls.dir, "resolv.conf")
        with open(mine, "w") as f:
            f.write("nameserver %s\n" % RESOLVER)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x20000) != 0:  # CLONE_NEWNS
            return False
        libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None)  # MS_REC | MS_PRIVATE
        if libc.mount(mine.encode(), os.path.realpath("/etc/resolv.conf").encode(), None, ctypes.c_ulong(0x1000), None) != 0:
            return False
        threading.Thread(target=answer_names, args=(s,), daemon=True).start()
        return True

    def setUp(self):
        self.run_dir = tempfile.mkdtemp(prefix="run-", dir=self.dir)
        os.chmod(self.run_dir, 0o700)
        former = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = self.run_dir
        self.addCleanup(lambda: os.environ.pop("XDG_RUNTIME_DIR") if former is None
                        else os.environ.__setitem__("XDG_RUNTIME_DIR", former))
        self.addCleanup(self.end_all)

    def end_all(self):
        for vm in json.loads(run("ps", "--json").stdout or "[]"):
            os.kill(vm["pid"], signal.SIGKILL)

    def say(self, text):
        print("%s: %s" % (self.id().rsplit(".", 1)[1], text), flush=True)

    def log_in(self, terminal):
        """Types the password at the prompt that is there."""
        at = len(terminal.output)
        self.assertTrue(terminal.type(b"root\r"))
        self.assertIsNotNone(terminal.expect(rb"Password: ", PATIENCE, at), terminal.output[-2000:])
        at = len(terminal.output)
        time.sleep(0.5)  # login flushes what was typed before its prompt
        self.assertTrue(terminal.type(b"ring3\r"))
        self.assertIsNotNone(terminal.expect(rb"root@ring3:~# ", PATIENCE, at), terminal.output[-2000:])
        self.command(terminal, "stty -echo; PS1=; bind 'set enable-bracketed-paste off' 2>/dev/null; export PAGER=cat")

    def command(self, terminal, line, timeout=PATIENCE):
        """Runs a line in the guest's shell: its output."""
        at = len(terminal.output)
        self.assertTrue(terminal.type(line.encode() + b"; echo :DO''NE:$?:\r"))
        end = terminal.expect(rb":DONE:\d+:", timeout, at)
        self.assertIsNotNone(end, "%s\n%s" % (line, terminal.output[at:][-3000:]))
        # Colours, and what a newer systemd's shells say of themselves (OSC 3008).
        said = re.sub(rb"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x1b\a]*(\x1b\\|\a))", b"", terminal.output[at:end])
        return said.decode(errors="replace").replace("\r", "")

    def in_the_guest(self, terminal, network):
        """What a user would look at first."""
        state = self.command(terminal, "systemctl is-system-running --wait; systemctl --failed --no-legend --plain")
        self.assertRegex(state, r"(?m)^running\n:DONE:0:$|^running\n\n*:DONE:0:$", state)
        self.say(re.search(r"Startup finished.*", self.command(terminal, "systemd-analyze")).group(0))
        if not network:
            return
        address = self.command(terminal, "for i in $(seq 100); do ip -4 -br addr | grep -q 10.0.2 && break; sleep 0.2; done; ip -4 -br addr")
        self.assertIn("10.0.2.15/24", address)
        host = "10.0.2.2"
        if self.names:
            host = NAME
            self.assertRegex(self.command(terminal, "getent hosts %s" % NAME), r"10\.0\.2\.2 +%s" % NAME)
        url = "http://%s:%d/" % (host, self.server.server_port)
        began = time.monotonic()
        self.assertIn(hashlib.sha256(self.data).hexdigest(), self.command(terminal, "curl -sS %sdata | tee ~/data | sha256sum" % url))
        took = time.monotonic() - began
        began = time.monotonic()
        self.assertIn(":DONE:0:", self.command(terminal, "mkdir -p ~/many && cd && curl -sS --no-progress-meter --fail -Z --parallel-immediate --parallel-max %d "
                                               "-o many/#1 '%sf[1-%d]'" % (MANY, url, MANY)))
        wanted = hashlib.sha256(b"".join(b"%d\n" % i * 300 for i in range(1, MANY + 1))).hexdigest()
        self.assertIn(wanted, self.command(terminal, "for i in $(seq %d); do cat ~/many/$i; done | sha256sum" % MANY))
        self.say("%d MiB in %.1f s, %d connections at once in %.1f s%s" % (len(self.data) >> 20, took, MANY, time.monotonic() - began,
                 ", by name" if self.names else "; names not looked up (needs root)"))

    def boot(self, disk, network=True):
        """One life: start, log in, look, ring3 stop."""
        busy = os.getloadavg()[0]
        began = time.monotonic()
        result = run("run", "--engine", support.ENGINE, "-m", "1G", "--kernel", os.path.join(DEBIAN, "vmlinuz"), "--initrd", os.path.join(DEBIAN, "initrd.img"),
                     "--disk", disk, "--append", APPEND, "--detach", "--name", "debian")
        self.assertEqual(result.returncode, 0, result.stderr)
        vm, = json.loads(run("ps", "--json").stdout)
        with Terminal("console", "debian") as terminal:
            self.assertIsNotNone(terminal.expect(rb"login: ", PATIENCE), terminal.output[-3000:].decode(errors="replace"))
            self.say("login after %.1f s (%.1f s of CPU; load %.1f before)" % (time.monotonic() - began, cpu_seconds(vm["pid"]), busy))
            self.log_in(terminal)
            self.in_the_guest(terminal, network)
            began = time.monotonic()
            stopped = run("stop", "--timeout", str(PATIENCE), "debian", timeout=2 * PATIENCE)
            self.assertEqual((stopped.returncode, stopped.stderr), (0, ""))
            terminal.wait()
        ended, = json.loads(run("ps", "--all", "--json").stdout)
        self.assertEqual((ended["state"], ended["status"]), ("ended", 0), ended)
        self.say("powered off %.1f s after ring3 stop" % (time.monotonic() - began))

    def clean(self, disk):
        """The file system, and the image around it."""
        raw = disk
        if disk.endswith(".qcow2"):
            for command in ([support.RING3, "image", "check", disk], ["qemu-img", "check", "-q", disk]):
                result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
                self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
            raw = os.path.join(self.dir, "flat.raw")
            self.assertEqual(run("image", "convert", disk, raw, timeout=PATIENCE).returncode, 0)
        path = os.environ.get("PATH", "") + ":/sbin:/usr/sbin"
        result = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PATH": path})
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        if raw != disk:
            os.unlink(raw)

    def under_qemu(self, disk):
        """The same disk on stock QEMU: a login, nothing failed, what was written is there."""
        if os.environ.get("RING3_TEST_QEMU") == "0" or shutil.which("qemu-system-x86_64") is None:
            self.say("QEMU is left out")
            return
        began = time.monotonic()
        form = "qcow2" if disk.endswith(".qcow2") else "raw"
        with Terminal("-accel", "tcg", "-cpu", "max", "-m", "1G", "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot",
                      "-kernel", os.path.join(DEBIAN, "vmlinuz"), "-initrd", os.path.join(DEBIAN, "initrd.img"), "-append", APPEND,
                      "-drive", "file=%s,if=virtio,format=%s" % (disk, form), "-nic", "user,model=virtio",
                      program="qemu-system-x86_64") as terminal:
            self.assertIsNotNone(terminal.expect(rb"login: ", PATIENCE), terminal.output[-3000:].decode(errors="replace"))
            self.say("QEMU (TCG): login after %.1f s (%.1f s of CPU)" % (time.monotonic() - began, cpu_seconds(terminal.process.pid)))
            self.log_in(terminal)
            self.in_the_guest(terminal, network=False)
            self.assertIn(hashlib.sha256(self.data).hexdigest(), self.command(terminal, "sha256sum ~/data"))
            terminal.type(b"poweroff\r")
            self.assertEqual(terminal.wait(PATIENCE), 0)

    def whole(self, disk):
        self.boot(disk)
        self.clean(disk)
        self.under_qemu(disk)
        self.clean(disk)
        self.boot(disk, network=False)  # the second boot of a system is another one than its first
        self.clean(disk)

    def test_raw(self):
        disk = os.path.join(self.dir, "debian.raw")
        subprocess.run(["cp", "--sparse=always", self.base, disk], check=True)
        self.whole(disk)
        os.unlink(disk)

    def test_qcow2_over_raw(self):
        disk = os.path.join(self.dir, "over.qcow2")
        before = os.stat(self.base)
        result = run("image", "create", "--backing", self.base, "--backing-format", "raw", disk)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.whole(disk)
        after = os.stat(self.base)
        self.assertEqual((before.st_mtime_ns, before.st_size), (after.st_mtime_ns, after.st_size))


if __name__ == "__main__":
    if not all(os.path.exists(os.path.join(DEBIAN, name)) for name in ("debian.raw", "vmlinuz", "initrd.img")):
        print("no Debian in %s: scripts/make-debian-image makes one; not run" % DEBIAN)
        sys.exit(support.SKIPPED)
    support.main()
