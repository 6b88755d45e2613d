"""A cloud-init seed as a kernel reads it, and the power button as one hears it.

usage: seed_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")


def arguments(command, *options):
    return [support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"),
            "--initrd", os.path.join(FILES, "initramfs.gz"), "-m", "512M",
            "--append", 'console=ttyS0 quiet ring3.test="%s"' % command, *options]


class Seed(unittest.TestCase):
    def test_the_kernel_mounts_it_and_finds_every_file(self):
        with tempfile.TemporaryDirectory() as directory:
            def put(name, text):
                with open(os.path.join(directory, name), "w") as f:
                    f.write(text)
                return os.path.join(directory, name)

            user = put("user", "#cloud-config\nhostname: seeded\n" + "# filler\n" * 1000)
            key = put("key.pub", "ssh-ed25519 AAAAC3Nza me@here\n")
            # Rock Ridge, Joliet, and neither: three ways to the same files.
            command = ("load cdrom isofs; mkdir /m; for how in ro ro,norock ro,norock,nojoliet; do mount -t iso9660 -o $how /dev/vda /m; "
                       "echo $how $(ls /m) $(cat /m/user* | md5sum); cat /m/meta*; umount /m; done; "
                       "echo label $(dd if=/dev/vda bs=1 skip=32808 count=6 2>/dev/null); dd if=/dev/zero of=/dev/vda count=1; true")
            result = subprocess.run(arguments(command, "--name", "web", "--cloud-init", user, "--ssh-key", key), stdin=subprocess.DEVNULL,
                                    capture_output=True, timeout=300)
            out = result.stdout.decode(errors="replace").replace("\r", "")
            self.assertEqual(result.returncode, 0, out[-3000:])
            import hashlib
            with open(user, "rb") as f:
                digest = hashlib.md5(f.read()).hexdigest()
            for how, names in (("ro", "meta-data user-data"), ("ro,norock", "meta-data user-data"), ("ro,norock,nojoliet", "meta_dat user_dat")):
                self.assertRegex(out, r"(?m)^%s %s\.? %s" % (how, names.replace(" ", r"\.? "), digest), out[-2000:])
            self.assertIn("local-hostname: web\n", out)
            self.assertIn('  - "ssh-ed25519 AAAAC3Nza me@here"\n', out)
            self.assertIn("label cidata\n", out)
            self.assertIn("Operation not permitted", out)


class PowerButton(unittest.TestCase):
    def test_a_guest_that_hears_it_powers_off(self):
        # The ACPI event arrives by the SCI, through the IOAPIC, and is counted; the test's user space acts on it as logind would.
        command = ("load button; echo listens; f=/sys/firmware/acpi/interrupts/ff_pwr_btn; "
                   "until grep -q '^ *[1-9]' $f; do sleep 0.1; done; cat $f; echo pressed")
        process = subprocess.Popen(arguments(command, "--stop-timeout", "120"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        for line in process.stdout:
            if line.strip() == b"listens":
                break
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
        self.assertEqual(process.returncode, 0, (out, err))
        self.assertIn(b"pressed", out)

    def test_a_guest_without_the_driver_is_not_waited_for(self):
        process = subprocess.Popen(arguments("echo deaf; sleep 1000"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        for line in process.stdout:
            if line.strip() == b"deaf":
                break
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        self.assertEqual(process.returncode, 143)
        self.assertLess(time.monotonic() - began, 20)


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
