"""Stock QEMU on ring3's KVM: SeaBIOS or the machine's own entry, a Debian kernel, user space, power-off.

usage: qemu_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import os
import shutil
import subprocess
import sys
import unittest

RING3 = FILES = None
QEMU = "qemu-system-x86_64"
SKIPPED = 77


class Boots(unittest.TestCase):
    def boot(self, cpus, *options):
        result = subprocess.run(
            [RING3, "with", "--", QEMU, "-accel", "kvm", "-m", "512", "-display", "none", "-serial", "stdio", "-monitor", "none",
             "-no-reboot", "-smp", str(cpus), "-kernel", os.path.join(FILES, "vmlinuz-cloud"),
             "-initrd", os.path.join(FILES, "initramfs.gz"),
             "-append", 'console=ttyS0 quiet ring3.test="nproc; echo $((6 * 7))"', *options],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        text = result.stdout.decode(errors="replace").replace("\r", "")
        self.assertEqual(result.returncode, 0, text[-3000:])
        self.assertRegex(text, r"(?m)^%d$" % cpus, text[-3000:])
        self.assertRegex(text, r"(?m)^42$", text[-3000:])
        self.assertRegex(text, r"(?m)^ring3-test: status 0$", text[-3000:])
        for trouble in ("BUG:", "Oops", "soft lockup", "Call Trace"):
            self.assertNotIn(trouble, text, text[-3000:])


class Pc(Boots):
    def test_host_cpu(self):
        self.boot(1, "-M", "pc", "-cpu", "host")

    def test_default_cpu_four_vcpus(self):
        self.boot(4, "-M", "pc")


class Q35(Boots):
    def test_two_vcpus(self):
        self.boot(2, "-M", "q35", "-cpu", "host")


class Microvm(Boots):
    def test_boots(self):
        self.boot(1, "-M", "microvm,pit=on,pic=on,rtc=on", "-cpu", "host")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    RING3 = os.path.abspath(sys.argv.pop(1))
    FILES = os.path.abspath(sys.argv.pop(1))
    if shutil.which(QEMU) is None:
        print(QEMU + " is not installed: not run")
        sys.exit(SKIPPED)
    unittest.main()
