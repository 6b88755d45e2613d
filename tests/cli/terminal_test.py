"""The terminal: raw while the guest runs, as it was before on every way out."""
import os
import signal
import subprocess
import time
import unittest

from support import Case, Terminal, main, out_long, say, ECHO, UART_ON, HALT, SPIN, TRIPLE_FAULT
import support

RUN = ("run", "--engine", support.ENGINE, "-m", "16M")


class Restored(Case):
    def on_terminal(self, code, *options):
        terminal = Terminal(*RUN, "--kernel", self.guest(code), *options)
        self.addCleanup(terminal.close)
        return terminal

    def assert_restored(self, terminal):
        self.assertEqual(terminal.mode(), terminal.before)

    def running(self, *options):
        """A guest that says it is up and spins, the terminal raw."""
        terminal = self.on_terminal(say("up\n") + SPIN, *options)
        self.assertIsNotNone(terminal.expect(rb"up\r*\n"), terminal.output)
        self.assertTrue(terminal.wait_raw(), "the terminal is not raw")
        return terminal

    def test_guest_ends(self):
        for code, options, status in [(out_long(0xF4, 5), ("--test-device",), 11), (TRIPLE_FAULT, (), 3)]:
            with self.subTest(status=status):
                terminal = self.on_terminal(say("up\n") + code + HALT, *options)
                self.assertEqual(terminal.wait(), status, terminal.output)
                self.assert_restored(terminal)

    def test_errors_before_the_guest(self):
        terminal = Terminal("run", "--kernel", self.path("none"))
        self.addCleanup(terminal.close)
        self.assertEqual(terminal.wait(), 2)
        self.assert_restored(terminal)

    def test_ctrl_a_x(self):
        terminal = self.running()
        terminal.type(b"\x01x")
        self.assertEqual(terminal.wait(), 130)
        self.assert_restored(terminal)

    def test_ctrl_a_h_lists_the_keys(self):
        terminal = self.running()
        terminal.type(b"\x01h")
        self.assertIsNotNone(terminal.expect(rb"Ctrl-A x +end the VM"), terminal.output)
        terminal.type(b"\x01x")
        self.assertEqual(terminal.wait(), 130)
        self.assert_restored(terminal)

    def test_ending_signals(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            with self.subTest(signal=number):
                terminal = self.running()
                terminal.process.send_signal(number)
                self.assertEqual(terminal.wait(), 128 + number)
                self.assert_restored(terminal)

    def test_crash_signals(self):
        for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE):
            with self.subTest(signal=number):
                terminal = self.running()
                terminal.process.send_signal(number)
                # Killed by the signal; a sanitizer's report makes it an exit status of its own.
                self.assertNotEqual(terminal.wait(), 0)
                self.assert_restored(terminal)

    def test_stop_and_go_on(self):
        terminal = self.running()
        os.kill(terminal.process.pid, signal.SIGTSTP)
        self.assertTrue(terminal.wait_raw(False, 10), "not restored when stopped")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with open("/proc/%d/stat" % terminal.process.pid) as f:
                if f.read().rsplit(")", 1)[1].split()[0] == "T":
                    break
            time.sleep(0.05)
        else:
            self.fail("not stopped")
        self.assert_restored(terminal)
        os.kill(terminal.process.pid, signal.SIGCONT)
        self.assertTrue(terminal.wait_raw(True, 10), "not raw again after SIGCONT")
        terminal.type(b"\x01x")
        self.assertEqual(terminal.wait(), 130)
        self.assert_restored(terminal)

    def test_hang_up(self):
        terminal = self.running()
        os.close(terminal.master)
        terminal.master = os.open("/dev/null", os.O_RDONLY)
        self.assertNotEqual(terminal.process.wait(30), 0)


class Keys(Case):
    def test_every_byte_reaches_the_guest(self):
        terminal = Terminal(*RUN, "--kernel", self.guest(UART_ON + say("ready\n") + ECHO))
        self.addCleanup(terminal.close)
        at = terminal.expect(rb"ready\r*\n")
        self.assertIsNotNone(at, terminal.output)
        self.assertTrue(terminal.wait_raw())
        # Ctrl-C, Ctrl-Z, Ctrl-\, Ctrl-D, Ctrl-S, Ctrl-Q, Ctrl-V, return, delete, escape: the guest's, not the terminal's.
        keys = b"a\x03\x1a\x1c\x04\x13\x11\x16\r\x7f\x1b[A\xc3\xa9z"
        terminal.type(keys)
        self.assertIsNotNone(terminal.expect(rb"z", since=at), terminal.output)
        self.assertEqual(terminal.output[at:], keys)
        at = len(terminal.output)
        terminal.type(b"\x01\x01|\x01q|")
        self.assertIsNotNone(terminal.expect(rb"\|.*\|", since=at), terminal.output)
        self.assertEqual(terminal.output[at:], b"\x01||")
        self.assertIsNone(terminal.process.poll())
        terminal.type(b"\x01x")
        self.assertEqual(terminal.wait(), 130)

    def test_paste(self):
        terminal = Terminal(*RUN, "--kernel", self.guest(UART_ON + say("ready\n") + ECHO))
        self.addCleanup(terminal.close)
        at = terminal.expect(rb"ready\r*\n")
        self.assertIsNotNone(at, terminal.output)
        self.assertTrue(terminal.wait_raw())
        paste = b"".join(b"%05d lorem ipsum dolor sit amet;" % i for i in range(1000)) + b"END"
        self.assertTrue(terminal.type(paste))
        self.assertIsNotNone(terminal.expect(rb"END", since=at), terminal.output[-200:])
        self.assertEqual(terminal.output[at:], paste)
        terminal.type(b"\x01x")
        self.assertEqual(terminal.wait(), 130)


class NotOnATerminal(Case):
    def test_background_job_leaves_the_terminal_alone(self):
        # A shell with job control starts ring3 in the background of its terminal.
        k = self.guest(say("up\n") + SPIN)
        script = ('set -m; "%s" %s --kernel "%s" > "%s" & job=$!; sleep 2; stty -a | tr ";" "\\n" | grep -c -- "-icanon"; '
                  'kill -TERM $job; kill -CONT $job; wait $job; echo "status $?"') % (support.RING3, " ".join(RUN), k, self.path("out"))
        terminal = Terminal("-c", script, program="/bin/bash")
        self.addCleanup(terminal.close)
        terminal.wait(60)
        self.assertIn(b"0\r\n", terminal.output)
        self.assertEqual(terminal.mode(), terminal.before)


if __name__ == "__main__":
    main()
