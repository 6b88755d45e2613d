"""VMs in the background, and the power button: small guests, a state directory of the test's own."""
import json
import os
import re
import select
import signal
import subprocess
import time
import unittest

from support import Case, Terminal, main, out_byte, out_long, run, say, ECHO, HALT, SPIN, UART_ON
import support

RUN = ("run", "--engine", support.ENGINE, "-m", "16M")
# Enables the power button's event: mov ax,100h; mov dx,602h; out dx,ax.
LISTEN = b"\x66\xb8\x00\x01\x66\xba\x02\x06\x66\xef"
# Waits for its status bit, then powers off: mov dx,600h; in ax,dx; test ah,1; jz; mov ax,3400h; mov dx,604h; out dx,ax.
OBEY = b"\x66\xba\x00\x06\x66\xed\xf6\xc4\x01\x74\xf5\x66\xb8\x00\x34\x66\xba\x04\x06\x66\xef"


class State(Case):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("run"), 0o700)
        former = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = self.path("run")
        self.addCleanup(lambda: os.environ.pop("XDG_RUNTIME_DIR") if former is None
                        else os.environ.__setitem__("XDG_RUNTIME_DIR", former))
        self.addCleanup(self.kill_all)

    def kill_all(self):
        for vm in self.ps():
            os.kill(vm["pid"], signal.SIGKILL)

    def ps(self, *options):
        result = run("ps", "--json", *options)
        self.assertEqual(result.returncode, 0, result)
        return json.loads(result.stdout)

    def start(self, code, *options, name="a"):
        result = run(*RUN, "--kernel", self.guest(code), "--detach", "--name", name, *options)
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, name + "\n", ""))

    def wait_log(self, pattern, name="a"):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            text = run("logs", name).stdout
            if re.search(pattern, text):
                return text
            time.sleep(0.05)
        self.fail("no %r in %r" % (pattern, text))


class Background(State):
    def test_life(self):
        self.start(say("up\n") + SPIN)
        vm, = self.ps()
        self.assertEqual((vm["name"], vm["state"], vm["memory_bytes"], vm["cpus"]), ("a", "running", 16 << 20, 1))
        self.assertIn(" running ", run("ps").stdout)
        self.wait_log("up\n")
        again = run(*RUN, "--kernel", self.guest(HALT), "--detach", "--name", "a")
        self.assert_one_error_line(again, contains="runs already")
        self.assert_one_error_line(run("rm", "a"), contains="is running")
        began = time.monotonic()
        self.assertEqual(run("stop", "a").returncode, 0)  # it never listened to the button, so there is nothing to wait for
        self.assertLess(time.monotonic() - began, 10)
        self.assertEqual(self.ps(), [])
        vm, = self.ps("--all")
        self.assertEqual((vm["state"], vm["status"]), ("ended", 143))
        self.assertEqual(run("logs", "-f", "a").stdout, "up\n")
        self.assert_one_error_line(run("stop", "a"), contains="not running")
        self.assertEqual(run("rm", "a").returncode, 0)
        self.assertEqual(os.listdir(self.path("run/ring3")), [])

    def test_a_killed_vm_is_told_from_a_running_one(self):
        self.start(say("up\n") + SPIN)
        vm, = self.ps()
        os.kill(vm["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while self.ps() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(self.ps(), [])
        self.assertEqual(self.ps("--all")[0]["state"], "killed")
        self.start(HALT)  # its name is free

    def test_what_never_ran_leaves_nothing(self):
        result = run("run", "--detach", "--name", "a", "--kernel", self.path("none"))
        self.assert_one_error_line(result, contains="No such file")
        self.assertEqual(self.ps("--all"), [])

    def test_the_end_is_told(self):
        self.start(out_long(0xF4, 5) + HALT, "--test-device")
        deadline = time.monotonic() + 20
        while self.ps() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(self.ps("--all")[0]["status"], 11)

    def test_names_choose_themselves(self):
        for expected in ("vm-1\n", "vm-2\n"):
            self.assertEqual(run(*RUN, "--kernel", self.guest(SPIN), "-d").stdout, expected)
        self.assertEqual(run("stop", "--force", "vm-1").returncode, 0)
        self.assertEqual([vm["name"] for vm in self.ps()], ["vm-2"])

    def test_unknown_names_and_words(self):
        self.assert_one_error_line(run("stop", "nobody"), contains="no VM named nobody")
        self.assert_one_error_line(run("console", "../x"), contains="no VM named")
        self.assert_one_error_line(run("logs"), contains="ring3 logs --help")
        self.assert_one_error_line(run("stop", "a", "--timeout", "x"), contains="--timeout")
        for verb in ("ps", "stop", "console", "logs", "rm"):
            self.assertIn("Examples:", run(verb, "--help").stdout)

    def test_a_state_directory_that_others_may_enter_is_refused(self):
        os.mkdir(self.path("run/ring3"))
        os.chmod(self.path("run/ring3"), 0o755)
        self.assert_one_error_line(run("ps"), contains="only this user")
        os.chmod(self.path("run/ring3"), 0o700)


class Console(State):
    def test_attach_type_detach(self):
        self.start(UART_ON + say("ready\n$ ") + ECHO)
        self.wait_log(r"\$ ")
        with Terminal("console", "a") as terminal:
            at = terminal.expect(rb"\$ ")  # the line that was being written
            self.assertIsNotNone(at, terminal.output)
            self.assertTrue(terminal.wait_raw())
            keys = b"a\x03\x1a\x1c\x04\r\x7f\xc3\xa9\x01\x01z"
            terminal.type(keys)
            self.assertIsNotNone(terminal.expect(rb"z", since=at), terminal.output)
            self.assertEqual(terminal.output[at:], keys.replace(b"\x01\x01", b"\x01"))
            terminal.type(b"\x01h")
            self.assertIsNotNone(terminal.expect(rb"leave the console"), terminal.output)
            terminal.type(b"\x01d")
            self.assertEqual(terminal.wait(), 0)
            self.assertEqual(terminal.mode(), terminal.before)
        self.assertEqual(len(self.ps()), 1)  # it goes on

    def test_the_vm_ends_while_attached(self):
        self.start(say("$ ") + SPIN)
        with Terminal("console", "a") as terminal:
            self.assertTrue(terminal.wait_raw())
            self.assertEqual(run("stop", "a").returncode, 0)
            self.assertEqual(terminal.wait(), 0, terminal.output)
            self.assertIn(b"a has ended", terminal.output)
            self.assertEqual(terminal.mode(), terminal.before)

    def test_consoles_elsewhere(self):
        self.start(say("hello\n") + SPIN, "--console", "file:" + self.path("log"))
        self.assertEqual(self.wait_log("hello"), "hello\n")
        self.assert_one_error_line(run("console", "a"), contains="no console to attach to")
        self.start(SPIN, "--console", "none", name="b")
        self.assert_one_error_line(run("logs", "b"), contains="no log")


class PowerButton(State):
    def start_here(self, code, *options):
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", self.guest(say("up\n") + LISTEN + say("listens\n") + code), *options],
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline() + process.stdout.readline(), b"up\nlistens\n")
        return process

    def test_a_guest_that_listens_powers_off(self):
        process = self.start_here(OBEY)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)

    def test_the_grace_period_ends(self):
        process = self.start_here(SPIN, "--stop-timeout", "2")
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 143)
        self.assertGreater(time.monotonic() - began, 1.9)

    def test_the_second_signal_ends_it_at_once(self):
        process = self.start_here(SPIN)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        self.assertIsNone(process.poll())
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 143)
        self.assertLess(time.monotonic() - began, 4)

    def test_stop(self):
        self.start(say("up\n") + LISTEN + say("listens\n") + OBEY)
        self.wait_log("listens")
        result = run("stop", "a")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(self.ps("--all")[0]["status"], 0)
        self.start(LISTEN + say("listens\n") + SPIN, name="b")
        self.wait_log("listens", "b")
        began = time.monotonic()
        result = run("stop", "--timeout", "2", "b")
        self.assertEqual(result.returncode, 0)
        self.assertIn("did not power off", result.stderr)
        self.assertGreater(time.monotonic() - began, 1.9)
        self.assertLess(time.monotonic() - began, 15)


class Progress(Case):
    def test_a_silent_guest_is_not_silence(self):
        with Terminal(*RUN, "--kernel", self.guest(SPIN)) as terminal:
            self.assertIsNotNone(terminal.expect(rb"ring3: starting \(\d+ s\)", 20), terminal.output)
            terminal.type(b"\x01x")
            self.assertEqual(terminal.wait(), 130)

    def test_a_guest_that_talks_is_not_interrupted(self):
        with Terminal(*RUN, "--kernel", self.guest(say("debian login: ") + SPIN)) as terminal:
            self.assertIsNotNone(terminal.expect(rb"login: "), terminal.output)
            time.sleep(3)
            terminal.pump(0)
            self.assertNotIn(b"ring3:", terminal.output)
            terminal.type(b"\x01x")
            self.assertEqual(terminal.wait(), 130)

    def test_no_noise_without_a_terminal(self):
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", self.guest(SPIN)], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.communicate(timeout=20), (b"", b""))


if __name__ == "__main__":
    main()
