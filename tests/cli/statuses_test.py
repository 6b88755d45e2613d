"""Exit statuses and outputs of the verbs, with guests of a few instructions."""
import json
import signal
import subprocess
import time
import unittest

from support import Case, main, out_byte, out_long, run, say, HALT, SPIN, TRIPLE_FAULT
import support

RUN = ("run", "--engine", support.ENGINE, "-m", "16M")


class Verbs(Case):
    def test_version(self):
        result = run("version")
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout, r"^ring3 \d+\.\d+\.\d+\n$")
        self.assertEqual(run("--version").stdout, result.stdout)
        data = json.loads(run("version", "--json").stdout)
        self.assertEqual("ring3 %s\n" % data["version"], result.stdout)

    def test_help(self):
        for verb in [(), ("run",), ("doctor",), ("version",)]:
            result = run(*verb, "--help")
            self.assertEqual(result.returncode, 0, result)
            self.assertIn("Examples:", result.stdout)
            self.assertEqual(result.stderr, "")

    def test_doctor(self):
        result = run("doctor", "--json")
        self.assertEqual(result.returncode, 0, result)
        data = json.loads(result.stdout)
        self.assertIn(data["choice"]["engine"], ["kvm", "soft"])
        self.assertTrue(data["choice"]["reason"])
        soft = data["engines"]["soft"]
        self.assertTrue(soft["usable"], soft)
        self.assertGreater(soft["million_instructions_per_second"], 1)
        chosen = data["engines"][data["choice"]["engine"]]
        self.assertTrue(chosen["usable"])
        for engine in data["engines"].values():
            if engine["usable"]:
                self.assertGreaterEqual(chosen["million_instructions_per_second"], engine["million_instructions_per_second"])
            else:
                self.assertTrue(engine["problem"])
        self.assertGreater(data["host"]["memory_total_bytes"], 0)
        self.assertEqual(run("doctor").returncode, 0)


class Guests(Case):
    def test_output_and_exit_status_of_a_test_guest(self):
        for value in (0, 1, 42):
            k = self.guest(say("hello\n") + out_long(0xF4, value) + HALT)
            result = run(*RUN, "--kernel", k, "--test-device")
            self.assertEqual(result.stdout, "hello\n", result)
            self.assertEqual(result.returncode, (value * 2 + 1) & 0xFF, result)

    def test_reset_ends_under_no_reboot(self):
        for name, code in {"i8042": out_byte(0x64, 0xFE), "0xcf9": out_byte(0xCF9, 0x06)}.items():
            with self.subTest(name=name):
                result = run(*RUN, "--no-reboot", "--kernel", self.guest(code + HALT))
                self.assertEqual(result.returncode, 0, result)
                self.assertEqual(result.stderr, "")

    def test_triple_fault(self):
        result = run(*RUN, "--kernel", self.guest(TRIPLE_FAULT))
        self.assertEqual(result.returncode, 3, result)
        # A paravirtual /dev/kvm reports what it cannot emulate in place of the shutdown.
        self.assertRegex(result.stderr, "triple|cannot emulate")

    def test_pvpanic(self):
        result = run(*RUN, "--kernel", self.guest(say("x") + out_byte(0x505, 1) + HALT))
        self.assertEqual(result.returncode, 3, result)
        self.assertIn("panic", result.stderr)

    def test_garbage_ends_or_runs_on_but_never_crashes(self):
        import random
        generator = random.Random(20061)
        for _ in range(12):
            k = self.guest(generator.randbytes(4000))
            process = subprocess.Popen([support.RING3, *RUN, "--no-reboot", "--console", "none", "--kernel", k],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                process.wait(0.7)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
            self.assertIn(process.returncode, (0, 3, 130), (process.returncode, out, err))

    def test_signals(self):
        for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)]:
            with self.subTest(signal=number):
                process = subprocess.Popen([support.RING3, *RUN, "--kernel", self.guest(say("up\n") + SPIN)],
                                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                self.assertEqual(process.stdout.readline(), b"up\n")
                began = time.monotonic()
                process.send_signal(number)
                out, err = process.communicate(timeout=30)
                self.assertEqual(process.returncode, status, err)
                self.assertLess(time.monotonic() - began, 4)

    def test_auto_says_what_it_chose(self):
        k = self.guest(out_long(0xF4, 0) + HALT)
        result = run("run", "-m", "16M", "--kernel", k, "--test-device", "--log", "info")
        self.assertEqual(result.returncode, 1, result)
        self.assertRegex(result.stderr, r"(?m)^ring3: engine (kvm|soft): ")
        self.assertEqual(run("run", "-m", "16M", "--kernel", k, "--test-device").stderr, "")


if __name__ == "__main__":
    main()
