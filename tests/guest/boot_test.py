"""Stock Debian kernels in a VM: to user space, interactively, and to each kind of end.

usage: boot_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
The engine is soft, or what RING3_TEST_ENGINE says; RING3_TEST_ENGINE_OPTION is given to it.
"""
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402
from support import Terminal  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")
ENGINE_OPTIONS = ["--engine-option=" + word for word in os.environ.get("RING3_TEST_ENGINE_OPTION", "").split()]
PATIENCE = 300  # seconds for a boot: sanitizer builds and busy machines are slow


def arguments(kind, append, *options):
    return ["run", "--engine", ENGINE, *ENGINE_OPTIONS, "--kernel", os.path.join(FILES, "vmlinuz-" + kind),
            "--initrd", os.path.join(FILES, "initramfs.gz"), "--append", "console=ttyS0 " + append,
            *([] if "-m" in options else ["-m", "512M"]), *options]


class Guest(unittest.TestCase):
    def boot(self, kind, append, *options):
        """Runs a guest to its end, without a terminal."""
        began = time.monotonic()
        result = subprocess.run([support.RING3, *arguments(kind, append, *options)], stdin=subprocess.DEVNULL,
                                capture_output=True, timeout=PATIENCE)
        result.stdout = result.stdout.decode(errors="replace").replace("\r", "")
        result.stderr = result.stderr.decode(errors="replace")
        print("%s: status %d after %.1f s" % (self.id(), result.returncode, time.monotonic() - began))
        return result

    def assert_ready(self, result):
        self.assertRegex(result.stdout, r"(?m)^ring3-guest: ready 6\.", self.tail(result))

    def tail(self, result):
        return "status %d\n%s\n%s" % (result.returncode, result.stdout[-3000:], result.stderr[-1000:])

    def to_user_space(self, kind):
        # Arithmetic, files, processes and pipes: the answers show that user space computes.
        command = ("echo $((6 * 7)) $(seq 1 100 | sort -rn | head -n 1) $(echo ring3 | sha256sum | cut -c 1-16); "
                   "grep -c processor /proc/cpuinfo; sed -n 's/MemTotal: *//p' /proc/meminfo; dd if=/dev/zero bs=64k count=64 2>/dev/null | md5sum")
        result = self.boot(kind, 'ring3.test="%s"' % command.replace('"', ""))
        self.assertEqual(result.returncode, 0, self.tail(result))
        self.assert_ready(result)
        self.assertIn("42 100 ", result.stdout)
        self.assertIn(hashlib.sha256(b"ring3\n").hexdigest()[:16], result.stdout, self.tail(result))
        self.assertIn(hashlib.md5(bytes(4 << 20)).hexdigest(), result.stdout, self.tail(result))
        memory = int(re.search(r"(?m)^(\d+) kB$", result.stdout).group(1))
        self.assertTrue(420_000 < memory < 512 * 1024, memory)
        self.assertRegex(result.stdout, r"(?m)^ring3-test: status 0$")
        for trouble in ("BUG:", "Oops", "soft lockup", "rcu_sched self-detected", "Call Trace", "unstable"):
            self.assertNotIn(trouble, result.stdout, self.tail(result))
        return result


class CloudBoots(Guest):
    def test_to_user_space(self):
        result = self.to_user_space("cloud")
        self.assertIn("cloud-amd64", result.stdout)


class GenericBoots(Guest):
    def test_to_user_space(self):
        self.to_user_space("generic")


class Smp(Guest):
    def test_two_cpus(self):
        result = self.boot("cloud", 'quiet ring3.test="nproc; taskset 1 true; taskset 2 true"', "-c", "2")
        self.assertEqual(result.returncode, 0, self.tail(result))
        self.assertRegex(result.stdout, r"(?m)^2$", self.tail(result))
        self.assertRegex(result.stdout, r"(?m)^ring3-test: status 0$", self.tail(result))


class ChangingCode(Guest):
    """Code that changes while it runs (changing_code.c): self-modifying, cross-modifying, remapped, socket filters, static keys."""

    def test_it_changes(self):
        for cpus in ("1", "2"):
            result = self.boot("cloud", 'quiet ring3.test="changing_code 2000"', "-c", cpus)
            self.assertEqual(result.returncode, 0, self.tail(result))
            for part in ("own", *(["other"] if cpus == "2" else []), "written", "aliased", "remapped", "kernel"):
                self.assertIn("changing-code: %s ok" % part, result.stdout, self.tail(result))


class X87State(Guest):
    """x87 and MMX state (x87_state.c): over system calls, context switches, signals and traps."""

    def test_it_stays(self):
        for cpus in ("1", "2"):
            result = self.boot("cloud", "quiet ring3.test=x87_state", "-c", cpus)
            self.assertEqual(result.returncode, 0, self.tail(result))
            for part in ("calls", "processes", "signals", "exceptions", "libm"):
                self.assertIn("x87-state: %s ok" % part, result.stdout, self.tail(result))


class Avx512State(Guest):
    """AVX-512: what the host has is in the guest's /proc/cpuinfo, and its state (avx512_state.c) stays over system calls, signals
    and other processes."""

    def test_it_stays(self):
        with open("/proc/cpuinfo") as info:
            flags = next(line for line in info if line.startswith("flags")).split()
        if not {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
            self.skipTest("the host has no AVX-512")
        for cpus in ("1", "2"):
            result = self.boot("cloud", 'quiet ring3.test="grep -m1 ^flags /proc/cpuinfo; avx512_state"', "-c", cpus, "--cpu", "host")
            self.assertEqual(result.returncode, 0, self.tail(result))
            for flag in ("avx512f", "avx512bw", "avx512dq", "avx512vl"):
                self.assertIn(" %s" % flag, result.stdout, self.tail(result))
            for part in ("calls", "signals", "processes", "threads"):
                self.assertIn("avx512-state: %s ok" % part, result.stdout, self.tail(result))

    def test_default_model_has_none(self):
        result = self.boot("cloud", "quiet ring3.test=avx512_state", "-c", "1")
        self.assertEqual(result.returncode, 0, self.tail(result))
        self.assertIn("avx512-state: none", result.stdout, self.tail(result))


class KeptCode(Guest):
    """Translations kept between runs: what the guest computes is the same, and a file that is no good is no harm."""

    def test_boots_again(self):
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "code")
            option = "--engine-option=code-cache=" + path
            command = "echo $(seq 1 100 | sort -rn | head -n 1) $(echo ring3 | sha256sum | cut -c 1-16)"
            sizes = []
            for round in range(4):
                if round == 3:  # damaged: said in one line, and made anew
                    with open(path, "r+b") as file:
                        file.seek(100_000)
                        file.write(b"damaged")
                result = self.boot("cloud", 'ring3.test="%s"' % command, option, *(["-c", "2"] if round == 2 else []))
                self.assertEqual(result.returncode, 0, self.tail(result))
                self.assertIn("100 " + hashlib.sha256(b"ring3\n").hexdigest()[:16], result.stdout, self.tail(result))
                self.assertEqual("begun anew" in result.stderr, round == 3, self.tail(result))
                sizes.append(os.path.getsize(path))
            self.assertTrue(all(1_000_000 < size <= 128 << 20 for size in sizes), sizes)
            self.assertEqual(os.listdir(directory), ["code"])


class Interactive(Guest):
    def test_a_shell_on_the_terminal(self):
        with Terminal(*arguments("cloud", "quiet")) as terminal:
            prompt = rb"ring3:~# "
            at = terminal.expect(prompt, PATIENCE)
            self.assertIsNotNone(at, terminal.output[-3000:])
            self.assertTrue(terminal.is_raw())

            # Line editing: a deleted letter, the cursor moved left to put one in, and the line called back.
            terminal.type(b"echo one tXwo\x1b[D\x1b[D\x7f\r")
            at = terminal.expect(rb"\none two\r*\n", since=at)
            self.assertIsNotNone(at, terminal.output[-1000:])
            at = terminal.expect(prompt, since=at)
            terminal.type(b"\x1b[A three\r")
            at = terminal.expect(rb"\none two three\r*\n", since=at)
            self.assertIsNotNone(at, terminal.output[-1000:])
            at = terminal.expect(prompt, since=at)

            # Ctrl-C reaches the guest, and only the guest.
            terminal.type(b"sleep 1000\r")
            time.sleep(2)
            terminal.type(b"\x03")
            at = terminal.expect(prompt, since=at, timeout=60)
            self.assertIsNotNone(at, terminal.output[-1000:])
            terminal.type(b"echo status $?\r")
            at = terminal.expect(rb"\nstatus 130\r*\n", since=at)
            self.assertIsNotNone(at, terminal.output[-1000:])
            self.assertIsNone(terminal.process.poll())
            at = terminal.expect(prompt, since=at)

            # Job control: Ctrl-Z, and Ctrl-D as the end of input.
            terminal.type(b"sleep 1000\r")
            time.sleep(2)
            terminal.type(b"\x1a")
            at = terminal.expect(rb"Stopped", since=at, timeout=60)
            self.assertIsNotNone(at, terminal.output[-1000:])
            at = terminal.expect(prompt, since=at)
            terminal.type(b"kill -9 %1; cat | wc -c\r")
            time.sleep(2)
            terminal.type(b"12345\r\x04")
            at = terminal.expect(rb"\n6\r*\n", since=at, timeout=60)
            self.assertIsNotNone(at, terminal.output[-1000:])
            at = terminal.expect(prompt, since=at)

            # A paste much larger than any queue on the way, every byte counted by the guest. The guest's tty
            # holds 4095 bytes of a line, so the lines are short.
            paste = b"".join(b"%04d abcdefghijklmnopqrstuvwxyz\n" % i for i in range(600))
            terminal.type(b"stty -echo; cat > /tmp/paste; stty echo; md5sum < /tmp/paste\r")
            time.sleep(2)
            self.assertTrue(terminal.type(paste + b"\x04", 240))
            at = terminal.expect(hashlib.md5(paste).hexdigest().encode(), since=at, timeout=240)
            self.assertIsNotNone(at, terminal.output[-1000:])
            at = terminal.expect(prompt, since=at)

            terminal.type(b"exit\r")
            self.assertEqual(terminal.wait(120), 0, terminal.output[-1000:])
            self.assertEqual(terminal.mode(), terminal.before)

    def test_ctrl_a_x_during_the_boot(self):
        with Terminal(*arguments("cloud", "")) as terminal:
            self.assertIsNotNone(terminal.expect(rb"Linux version", PATIENCE), terminal.output[-3000:])
            terminal.type(b"\x01x")
            self.assertEqual(terminal.wait(60), 130)
            self.assertEqual(terminal.mode(), terminal.before)


class Endings(Guest):
    def test_power_off(self):
        result = self.boot("cloud", "quiet ring3.test=true")
        self.assertEqual(result.returncode, 0, self.tail(result))
        self.assert_ready(result)

    def test_reboot_under_no_reboot(self):
        result = self.boot("cloud", "quiet ring3.test=true ring3.end=reboot", "--no-reboot")
        self.assertEqual(result.returncode, 0, self.tail(result))
        self.assert_ready(result)

    def test_reboot_boots_again(self):
        with Terminal(*arguments("cloud", "quiet ring3.test=true ring3.end=reboot")) as terminal:
            at = terminal.expect(rb"ring3-guest: ready", PATIENCE)
            self.assertIsNotNone(at, terminal.output[-3000:])
            self.assertIsNotNone(terminal.expect(rb"ring3-guest: ready", PATIENCE, since=at), terminal.output[-3000:])
            terminal.type(b"\x01x")
            self.assertEqual(terminal.wait(60), 130)

    def test_panic(self):
        result = self.boot("cloud", "quiet ring3.test=true ring3.end=panic")
        self.assertEqual(result.returncode, 3, self.tail(result))
        self.assertIn("panic", result.stderr)

    def test_triple_fault(self):
        result = self.boot("cloud", "quiet reboot=t ring3.test=true ring3.end=reboot", "--no-reboot")
        self.assertEqual(result.returncode, 3, self.tail(result))
        self.assertIn("triple", result.stderr)


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
