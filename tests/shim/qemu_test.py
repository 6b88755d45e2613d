"""Stock QEMU on ring3's KVM: SeaBIOS, OVMF or the machine's own entry, a Debian kernel, user space, power-off; snapshots,
migration, and the debugger.

usage: qemu_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made

RING3_TEST_ENGINE_OPTION is given to the engine.
"""
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

RING3 = FILES = None
QEMU = "qemu-system-x86_64"
HERE = os.path.dirname(os.path.abspath(__file__))
SKIPPED = 77
ENGINE_OPTIONS = ["--engine-option=" + word for word in os.environ.get("RING3_TEST_ENGINE_OPTION", "").split()]
# The generic kernel's drivers of emulated devices, each after what it needs.
DRIVERS = ("crct10dif_common crct10dif_generic crc-t10dif crc64 crc64_rocksoft_generic crc64-rocksoft t10-pi scsi_common scsi_mod "
           "sd_mod libata ata_piix libahci ahci e1000 e1000e").split()
COUNT = 'i=0; while [ $i -lt 2000 ]; do echo tick $i; i=$((i+1)); usleep 100000; done'


class Machine:
    """One QEMU under `ring3 with`; its serial port is read into text."""

    def __init__(self, *options):
        self.work = tempfile.TemporaryDirectory(prefix="ring3-qemu-")
        self.monitor_path = os.path.join(self.work.name, "qmp")
        self.process = subprocess.Popen(
            [RING3, "with", *ENGINE_OPTIONS, "--", QEMU, "-accel", "kvm", "-m", "512", "-display", "none",
             "-serial", "stdio", "-monitor", "none", "-no-reboot", "-qmp", f"unix:{self.monitor_path},server=on,wait=off", *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.data = bytearray()
        self.changed = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        self.qmp = None

    def _read(self):
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            with self.changed:
                self.data += chunk
                self.changed.notify_all()
        with self.changed:
            self.data += b"\n(end of output)\n"
            self.changed.notify_all()

    @property
    def text(self):
        with self.changed:
            return self.data.decode(errors="replace").replace("\r", "")

    def wait_for(self, pattern, start=0, limit=240):
        """The match of pattern in the output from character start on."""
        end = time.monotonic() + limit
        while True:
            text = self.text
            if found := re.compile(pattern, re.M).search(text, start):
                return found
            left = end - time.monotonic()
            if left <= 0 or "(end of output)" in text:
                raise AssertionError(f"no {pattern!r} in:\n{text[-3000:]}")
            with self.changed:
                self.changed.wait(min(left, 0.2))

    def wait_end(self, limit=240):
        try:
            status = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end in {limit} s; {self.where()}\non the console:\n{self.text[-3000:]}") from None
        self.reader.join(10)
        return status

    def where(self):
        """What the vCPUs and the interrupt controllers are at, for a machine that hangs."""
        lines = []
        try:
            for question in ("info status", "info cpus", "info registers -a", "info pic", "info lapic", "info irq", "info registers -a"):
                lines.append(question + ":\n" + self.command("human-monitor-command", command_line=question, limit=20))
        except (OSError, AssertionError, ValueError) as e:
            lines.append(f"the monitor does not answer: {e}")
        for task in sorted(os.listdir(f"/proc/{self.process.pid}/task")):
            try:
                with open(f"/proc/{self.process.pid}/task/{task}/stat", encoding="utf-8") as f:
                    fields = f.read().rsplit(")", 1)
                with open(f"/proc/{self.process.pid}/task/{task}/wchan", encoding="utf-8") as f:
                    lines.append(f"thread {fields[0]}): {' '.join(fields[1].split()[:1])}, ticks {fields[1].split()[11:13]}, in {f.read()}")
            except OSError:
                pass
        return "\n".join(lines)

    def command(self, name, limit=240, **arguments):
        if self.qmp is None:
            for _ in range(600):
                self.qmp = socket.socket(socket.AF_UNIX)
                try:
                    self.qmp.connect(self.monitor_path)
                    break
                except OSError:
                    self.qmp.close()
                    self.qmp = None
                    time.sleep(0.1)
            self.stream = self.qmp.makefile("r", encoding="utf-8")
            self.stream.readline()
            self.command("qmp_capabilities")
        self.qmp.settimeout(limit)
        message = {"execute": name}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.qmp.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = json.loads(self.stream.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise AssertionError(f"{name}: {answer['error']}")

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.reader.join(10)
        self.process.stdout.close()
        if self.qmp is not None:
            self.stream.close()
            self.qmp.close()
        self.work.cleanup()


class QemuTest(unittest.TestCase):
    def machine(self, *options):
        machine = Machine(*options)
        self.addCleanup(machine.close)
        return machine

    def linux(self, test, *options):
        return self.machine("-kernel", os.path.join(FILES, "vmlinuz-cloud"), "-initrd", os.path.join(FILES, "initramfs.gz"),
                            "-append", f'console=ttyS0 quiet ring3.test="{test}"', *options)

    def expect_end(self, machine, limit=240):
        self.assertEqual(machine.wait_end(limit), 0, machine.text[-3000:])
        text = machine.text
        self.assertRegex(text, r"(?m)^ring3-test: status 0$", text[-3000:])
        for trouble in ("BUG:", "Oops", "soft lockup", "Call Trace"):
            self.assertNotIn(trouble, text, text[-3000:])
        return text

    def ovmf(self):
        code, variables = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
        if not os.path.exists(code):
            self.skipTest("ovmf is not installed")
        # With 48 bits of physical addresses its page tables do not fit in 512 MiB, and it stops in a loop, on any accelerator.
        return ("-M", "q35", "-m", "1024", "-cpu", "host", "-net", "none", "-drive", f"if=pflash,format=raw,readonly=on,file={code}",
                "-drive", f"if=pflash,format=raw,snapshot=on,file={variables}")

    def boot(self, cpus, *options):
        text = self.expect_end(self.linux("nproc; echo $((6 * 7))", "-smp", str(cpus), *options))
        self.assertRegex(text, r"(?m)^%d$" % cpus, text[-3000:])
        self.assertRegex(text, r"(?m)^42$", text[-3000:])


class Pc(QemuTest):
    def test_host_cpu(self):
        self.boot(1, "-M", "pc", "-cpu", "host")

    def test_default_cpu_four_vcpus(self):
        self.boot(4, "-M", "pc")


class Q35(QemuTest):
    def test_two_vcpus(self):
        self.boot(2, "-M", "q35", "-cpu", "host")


    def test_hyperv(self):
        """With KVM's own leaves hidden the guest's clock, IPIs and TLB flushes are Hyper-V's."""
        text = self.expect_end(self.linux(
            "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; nproc; dmesg | grep -i hyper-v:", "-M", "q35", "-smp", "2", "-cpu",
            "host,kvm=off,hv_relaxed,hv_vapic,hv_time,hv_spinlocks=0x1fff,hv_vpindex,hv_synic,hv_stimer,hv_reset,hv_runtime,"
            "hv_frequencies,hv_tlbflush,hv_ipi,hv_crash"))
        for line in ("hyperv_clocksource_tsc_page", "2"):
            self.assertRegex(text, f"(?m)^{line}$", text[-3000:])
        self.assertIn("Hyper-V: Using hypercall for remote TLB flush", text, text[-3000:])


class Microvm(QemuTest):
    def test_boots(self):
        self.boot(1, "-M", "microvm,pit=on,pic=on,rtc=on", "-cpu", "host")


class Firmware(QemuTest):
    """OVMF loads the kernel itself: read-only memslots, flash that is read and programmed, EFI's services."""

    def test_ovmf_with_a_kernel(self):
        text = self.expect_end(self.linux("ls /sys/firmware/efi | grep systab; echo $((6 * 7))", *self.ovmf()), 900)
        self.assertRegex(text, r"(?m)^systab$", text[-3000:])
        self.assertRegex(text, r"(?m)^42$", text[-3000:])


class Devices(QemuTest):
    """Emulated and virtio devices, found by the kernel's drivers."""

    def test_virtio_block_and_net(self):
        with tempfile.NamedTemporaryFile(prefix="ring3-blk-") as disk:
            disk.truncate(8 << 20)
            text = self.expect_end(self.linux(
                "load virtio_blk failover net_failover virtio_net; cat /sys/block/vda/size; dd if=/dev/zero of=/dev/vda bs=64k count=100 conv=fsync 2>&1 | tail -1; ls /sys/class/net",
                "-M", "q35", "-cpu", "host", "-drive", f"file={disk.name},format=raw,if=virtio", "-nic", "user,model=virtio-net-pci"))
            self.assertRegex(text, r"(?m)^16384$", text[-3000:])
            self.assertRegex(text, r"(?m)\beth0\b|\benp\w+|\bens\w+", text[-3000:])


    @unittest.skipIf(shutil.which("qemu-storage-daemon") is None, "qemu-storage-daemon is not installed")
    def test_vhost_user_block(self):
        """The device is another process: guest memory is shared, kicks are ioeventfds, interrupts irqfds."""
        with tempfile.TemporaryDirectory(prefix="ring3-vhost-") as work:
            disk, path = os.path.join(work, "disk"), os.path.join(work, "socket")
            with open(disk, "wb") as f:
                f.truncate(16 << 20)
            daemon = subprocess.Popen(
                ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={disk}",
                 "--export", f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path},writable=on"])
            self.addCleanup(daemon.wait)
            self.addCleanup(daemon.kill)
            while not os.path.exists(path):
                self.assertIsNone(daemon.poll())
                time.sleep(0.05)
            text = self.expect_end(self.linux(
                "load virtio_blk; cat /sys/block/vda/size; dd if=/dev/urandom of=/tmp/x bs=64k count=32; "
                "dd if=/tmp/x of=/dev/vda bs=64k conv=fsync; echo 3 > /proc/sys/vm/drop_caches; "
                "dd if=/dev/vda bs=64k count=32 | cmp - /tmp/x && echo disk the same",
                "-M", "q35,memory-backend=ram", "-object", "memory-backend-memfd,id=ram,size=512M,share=on", "-cpu", "host", "-nic", "none",
                "-chardev", f"socket,id=backend,path={path}", "-device", "vhost-user-blk-pci,chardev=backend"))
            for line in ("32768", "disk the same"):
                self.assertRegex(text, f"(?m)^{line}$", text[-3000:])


class Emulated(QemuTest):
    """What PCs have had for long, and the generic kernel's drivers of it."""

    def emulated(self, card, *options):
        """A disk is written and read back, an address asked for and the gateway pinged, by what PCs of their time have."""
        modules = os.path.join(FILES, "modules-generic")
        if not os.path.exists(os.path.join(modules, "e1000.ko")):
            self.skipTest("the generic kernel's drivers are not there: scripts/fetch-kernels --update generic")
        with tempfile.TemporaryDirectory(prefix="ring3-emulated-") as work:
            initramfs, disk = os.path.join(work, "initramfs.gz"), os.path.join(work, "disk")
            where = "lib/modules/" + os.path.basename(os.path.realpath(modules))
            command = [os.path.join(HERE, "../../scripts/make-initramfs"), "-o", initramfs]
            for driver in DRIVERS:
                command += ["--add", f"{modules}/{driver}.ko:{where}/{driver}.ko"]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            with open(disk, "wb") as f:
                f.truncate(8 << 20)
            test = (f"load {' '.join(DRIVERS)}; n=0; until [ -b /dev/sda ] || [ $n -ge 300 ]; do sleep 0.1; n=$((n+1)); done; "
                    "cat /sys/block/sda/size; dd if=/dev/urandom of=/tmp/x bs=64k count=32; dd if=/tmp/x of=/dev/sda bs=64k conv=fsync; "
                    "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/sda bs=64k count=32 | cmp - /tmp/x && echo disk the same; "
                    "basename $(readlink /sys/class/net/eth0/device/driver); udhcpc -i eth0 -n -q -t 60 && ping -c 1 -W 60 10.0.2.2")
            text = self.expect_end(self.machine(
                "-kernel", os.path.join(FILES, "vmlinuz-generic"), "-initrd", initramfs, "-append", f'console=ttyS0 quiet ring3.test="{test}"',
                "-drive", f"file={disk},format=raw,if=ide", "-nic", f"user,model={card}", *options), 500)
            for line in ("16384", "disk the same", card, "1 packets transmitted, 1 packets received, 0% packet loss"):
                self.assertRegex(text, f"(?m)^{line}$", text[-3000:])

    def test_ide_and_e1000(self):
        self.emulated("e1000", "-M", "pc", "-cpu", "host")

    def test_ahci_and_e1000e(self):
        self.emulated("e1000e", "-M", "q35", "-smp", "2")


class Disks(QemuTest):
    """From the disk's boot sector on."""

    @classmethod
    def setUpClass(cls):
        cls.work = tempfile.TemporaryDirectory(prefix="ring3-disk-")
        cls.addClassCleanup(cls.work.cleanup)
        cls.disk = os.path.join(cls.work.name, "disk")
        made = subprocess.run([os.path.join(HERE, "make_disk.sh"), FILES, cls.disk], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False)
        if made.returncode == SKIPPED:
            raise unittest.SkipTest(made.stdout.decode())
        if made.returncode != 0:
            raise AssertionError(made.stdout.decode())

    def test_seabios_ide(self):
        machine = self.machine("-M", "pc", "-cpu", "host", "-drive", f"file={self.disk},format=raw,if=ide,snapshot=on")
        self.assertIn("from the disk\n", self.expect_end(machine))

    def test_seabios_virtio(self):
        machine = self.machine("-M", "q35", "-drive", f"file={self.disk},format=raw,if=virtio,snapshot=on", "-smp", "2")
        self.assertIn("from the disk\n", self.expect_end(machine))

    def test_ovmf(self):
        machine = self.machine(*self.ovmf(), "-drive", f"file={self.disk},format=raw,if=virtio,snapshot=on")
        self.expect_end(machine, 1500)


class Snapshots(QemuTest):
    def ticks(self, text):
        return [int(n) for n in re.findall(r"(?m)^tick (\d+)$", text)]

    def test_savevm_and_loadvm(self):
        with tempfile.TemporaryDirectory(prefix="ring3-savevm-") as work:
            image = os.path.join(work, "state.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1G"], check=True)
            machine = self.linux(COUNT, "-M", "pc", "-cpu", "host", "-smp", "2", "-drive", f"file={image},if=virtio")
            machine.wait_for(r"^tick 5$")
            self.assertEqual(machine.command("human-monitor-command", command_line="savevm here"), "")
            machine.wait_for(r"^tick 25$")
            before = len(machine.text)
            self.assertEqual(machine.command("human-monitor-command", command_line="loadvm here"), "")
            again = int(machine.wait_for(r"^tick (\d+)$", before + 8)[1])
            self.assertLess(again, 25)
            machine.wait_for(r"^tick 30$", before)
            seen = self.ticks(machine.text[before + 8:])
            self.assertEqual(seen, list(range(seen[0], seen[0] + len(seen))))

    def test_migration(self):
        with tempfile.TemporaryDirectory(prefix="ring3-migrate-") as work:
            path = os.path.join(work, "channel")
            options = ("-M", "q35", "-cpu", "host", "-smp", "2")
            source = self.linux(COUNT, *options)
            target = self.linux(COUNT, *options, "-incoming", f"unix:{path}")
            source.wait_for(r"^tick 5$")
            target.command("query-status")
            source.command("migrate-set-parameters", max_bandwidth=1 << 30)
            source.command("migrate", uri=f"unix:{path}")
            end = time.monotonic() + 120
            while (state := source.command("query-migrate"))["status"] != "completed":
                self.assertNotIn(state["status"], ("failed", "cancelled"), state)
                self.assertLess(time.monotonic(), end, state)
                time.sleep(0.1)
            last = self.ticks(source.text)[-1]
            target.wait_for(r"^tick %d$" % (last + 20))
            seen = self.ticks(source.text) + self.ticks(target.text)
            self.assertEqual(seen, list(range(len(seen))))
            self.assertEqual(target.command("query-status")["status"], "running")


class Userfaults(QemuTest):
    """Migration that QEMU watches guest memory for by userfaultfd, whose faults are the engine's own accesses here."""
    OPTIONS = ("-M", "q35", "-cpu", "host", "-smp", "2", "-m", "256", "-nic", "none")
    WORK = ("for n in 0 1; do dd if=/dev/urandom of=/tmp/$n bs=1M count=4; done; i=0; while [ $i -lt 5000 ]; do n=$((i % 2)); cp /tmp/$n /tmp/copy; "
            "cmp /tmp/$n /tmp/copy || echo damaged; echo tick $i; i=$((i+1)); usleep 20000; done")

    def setUp(self):
        library = ctypes.CDLL(None, use_errno=True)
        descriptor = library.syscall(323, os.O_CLOEXEC)  # userfaultfd(2)
        if descriptor < 0:
            self.skipTest("userfaultfd: " + os.strerror(ctypes.get_errno()))
        os.close(descriptor)

    def enable(self, machine, capability):
        machine.command("migrate-set-capabilities", capabilities=[{"capability": capability, "state": True}])

    def migrated(self, machine):
        end = time.monotonic() + 120
        while (state := machine.command("query-migrate"))["status"] != "completed":
            self.assertNotIn(state["status"], ("failed", "cancelled"), state)
            self.assertLess(time.monotonic(), end, state)
            time.sleep(0.05)
        return state

    def last(self, machine):
        return int(re.findall(r"(?m)^tick (\d+)$", machine.text)[-1])

    def expect_ticks(self, *machines):
        text = "".join(machine.text for machine in machines)
        self.assertNotIn("damaged", text)
        seen = [int(n) for n in re.findall(r"(?m)^tick (\d+)$", text)]
        self.assertEqual(seen, list(range(seen[0], seen[0] + len(seen))))

    def test_postcopy(self):
        with tempfile.TemporaryDirectory(prefix="ring3-postcopy-") as work:
            source = self.linux(self.WORK, *self.OPTIONS)
            target = self.linux(self.WORK, *self.OPTIONS, "-incoming", "defer")
            for machine in (source, target):
                self.enable(machine, "postcopy-ram")
            target.command("migrate-incoming", uri=f"unix:{work}/channel")
            source.wait_for(r"^tick 5$")
            source.command("migrate-set-parameters", max_bandwidth=1 << 20)  # before the rest goes over as it is asked for
            source.command("migrate", uri=f"unix:{work}/channel")
            while source.command("query-migrate")["status"] in ("none", "setup"):
                time.sleep(0.02)
            source.command("migrate-start-postcopy")
            self.assertGreater(self.migrated(source)["ram"]["postcopy-requests"], 0)
            target.wait_for(r"^tick %d$" % (self.last(source) + 5))
            self.expect_ticks(source, target)
            self.assertEqual(target.command("query-status")["status"], "running")

    def test_background_snapshot(self):
        """Memory as it was when the snapshot began, though the guest went on to write."""
        with tempfile.TemporaryDirectory(prefix="ring3-background-") as work:
            machine = self.linux(self.WORK, *self.OPTIONS)
            self.enable(machine, "background-snapshot")
            machine.wait_for(r"^tick 5$")
            machine.command("migrate", uri=f"exec:cat > {work}/image")
            self.migrated(machine)
            last = self.last(machine)
            machine.wait_for(r"^tick %d$" % (last + 5))
            self.expect_ticks(machine)
            machine.close()
            again = self.linux(self.WORK, *self.OPTIONS, "-incoming", f"exec:cat {work}/image")
            first = int(again.wait_for(r"^tick (\d+)$")[1])
            self.assertLessEqual(first, last + 1)
            again.wait_for(r"^tick %d$" % (first + 5))
            self.expect_ticks(again)


class Gdb(QemuTest):
    """The remote protocol of QEMU's gdbstub, which is KVM_SET_GUEST_DEBUG underneath."""
    ENTRY = 0x100000  # of the kernel's 32-bit code

    def packet(self, body):
        data = body.encode()
        self.link.sendall(b"$" + data + b"#%02x" % (sum(data) & 0xff))
        while True:
            c = self.link.recv(1)
            if c == b"$":
                break
            self.assertNotEqual(c, b"", "gdbstub closed the connection")
        answer = b""
        while (c := self.link.recv(1)) != b"#":
            answer += c
        self.link.recv(2)
        self.link.sendall(b"+")
        return answer.decode()

    def rip(self):
        registers = bytes.fromhex(self.packet("g"))
        return int.from_bytes(registers[16 * 8:17 * 8], "little")

    def test_breakpoints_and_single_step(self):
        with tempfile.TemporaryDirectory(prefix="ring3-gdb-") as work:
            path = os.path.join(work, "gdb")
            machine = self.linux("echo debugged", "-M", "pc", "-cpu", "host", "-S", "-gdb", f"unix:{path},server=on,wait=off")
            self.link = socket.socket(socket.AF_UNIX)
            self.addCleanup(self.link.close)
            for _ in range(300):
                try:
                    self.link.connect(path)
                    break
                except OSError:
                    time.sleep(0.1)
            self.link.settimeout(240)
            self.packet("qXfer:features:read:target.xml:0,ffb")  # without it, no register is written alone
            self.packet("?")
            self.assertEqual(self.rip(), 0xfff0)
            # A hardware breakpoint where the kernel will be, single steps from there.
            self.assertEqual(self.packet(f"Z1,{self.ENTRY:x},1"), "OK")
            self.assertRegex(self.packet("c"), "^[ST]05")
            self.assertEqual(self.rip(), self.ENTRY)
            self.assertEqual(self.packet(f"z1,{self.ENTRY:x},1"), "OK")
            steps = []
            for _ in range(4):
                self.assertRegex(self.packet("s"), "^[ST]05")
                steps.append(self.rip())
            self.assertEqual(len(set(steps)), 4, steps)
            self.assertTrue(all(self.ENTRY < at < self.ENTRY + 0x1000 for at in steps), steps)
            # Back, and to the third of them by a software breakpoint.
            self.assertEqual(self.packet("P10=" + self.ENTRY.to_bytes(8, "little").hex()), "OK")
            self.assertEqual(self.packet(f"Z0,{steps[2]:x},1"), "OK")
            self.assertRegex(self.packet("c"), "^[ST]05")
            self.assertEqual(self.rip(), steps[2])
            self.assertEqual(self.packet(f"z0,{steps[2]:x},1"), "OK")
            self.packet("D")
            self.assertIn("debugged\n", self.expect_end(machine))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    RING3 = os.path.abspath(sys.argv.pop(1))
    FILES = os.path.abspath(sys.argv.pop(1))
    if shutil.which(QEMU) is None:
        print(QEMU + " is not installed: not run")
        sys.exit(SKIPPED)
    unittest.main()
