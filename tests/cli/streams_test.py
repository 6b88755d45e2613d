"""Standard input and output that are no terminal: pipes, files, closed, broken, full."""
import os
import pty
import re
import select
import subprocess
import time
import unittest

from support import Case, main, out_long, run, say, ECHO, UART_ON, HALT, SPIN
import support

RUN = ("run", "--engine", support.ENGINE, "-m", "16M")
DONE = out_long(0xF4, 0) + HALT


def jump_back(code):
    """code, for ever"""
    return code + b"\xe9" + (-(len(code) + 5) & 0xFFFFFFFF).to_bytes(4, "little")


class Output(Case):
    def test_closed(self):
        # Through a shell: Python's own subprocess always gives a child some standard output.
        for k in [self.guest(say("x") + DONE)]:
            result = subprocess.run(["/bin/sh", "-c", '"$0" "$@" >&-', support.RING3, *RUN, "--kernel", k, "--test-device"],
                                    stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60)
            self.assertEqual(result.returncode, 2, result)
            self.assertEqual(len(result.stderr.splitlines()), 1, result)
        result = subprocess.run(["/bin/sh", "-c", '"$0" version >&-', support.RING3], stderr=subprocess.PIPE, text=True)
        self.assertEqual(result.returncode, 2)
        self.assertEqual(len(result.stderr.splitlines()), 1)

    def test_broken_pipe(self):
        k = self.guest(jump_back(say("all work and no play\n")))
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", k], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertTrue(process.stdout.read(100))
        process.stdout.close()
        self.assertEqual(process.wait(30), 2)
        lines = process.stderr.read().decode().splitlines()
        process.stderr.close()
        self.assertEqual(len(lines), 1, lines)
        self.assertIn("Broken pipe", lines[0])

    def test_full_device(self):
        k = self.guest(say("x") + SPIN)
        with open("/dev/full", "wb") as full:
            result = subprocess.run([support.RING3, *RUN, "--kernel", k], stdin=subprocess.DEVNULL, stdout=full,
                                    stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(result.returncode, 2, result)
        self.assertIn("No space left", result.stderr)

    def test_slow_reader_holds_the_guest_back_and_loses_nothing(self):
        line = "0123456789abcdef" * 16 + "\n"
        k = self.guest(say(line) * 40 + DONE)
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", k, "--test-device"], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        got = b""
        while len(got) < 40 * len(line):
            piece = os.read(process.stdout.fileno(), 700)
            if not piece:
                break
            got += piece
            time.sleep(0.01)
        self.assertEqual(process.wait(30), 1)
        process.stdout.close()
        self.assertEqual(got.decode(), line * 40)

    def test_reader_that_does_not_read_does_not_keep_the_vm_alive(self):
        k = self.guest(jump_back(say("all work and no play\n")))
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", k], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(1)
        process.terminate()
        self.assertEqual(process.wait(30), 143)
        process.stdout.close()
        process.stderr.close()

    def test_console_file(self):
        k = self.guest(say("to the file\n") + DONE)
        result = run(*RUN, "--kernel", k, "--test-device", "--console", "file:" + self.path("log"))
        self.assertEqual((result.returncode, result.stdout, result.stderr), (1, "", ""))
        with open(self.path("log")) as f:
            self.assertEqual(f.read(), "to the file\n")

    def test_console_none(self):
        result = run(*RUN, "--kernel", self.guest(say("nobody\n") + DONE), "--test-device", "--console", "none")
        self.assertEqual((result.returncode, result.stdout, result.stderr), (1, "", ""))


class Input(Case):
    def start(self, code, **keywords):
        k = self.guest(code)
        return subprocess.Popen([support.RING3, *RUN, "--kernel", k], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)

    def finish(self, process):
        process.terminate()
        process.communicate(timeout=30)

    def read_until(self, process, count, timeout=60):
        got = b""
        deadline = time.monotonic() + timeout
        while len(got) < count and time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 0.5)[0]:
                piece = os.read(process.stdout.fileno(), 65536)
                if not piece:
                    break
                got += piece
        return got

    def test_closed_null_and_ended(self):
        k = self.guest(say("fine\n") + DONE)
        command = [support.RING3, *RUN, "--kernel", k, "--test-device"]
        closed = subprocess.run(["/bin/sh", "-c", '"$0" "$@" <&-', *command], capture_output=True, text=True, timeout=60)
        self.assertEqual((closed.returncode, closed.stdout, closed.stderr), (1, "fine\n", ""))
        null = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        self.assertEqual((null.returncode, null.stdout, null.stderr), (1, "fine\n", ""))
        ended = subprocess.run(command, input="", capture_output=True, text=True, timeout=60)
        self.assertEqual((ended.returncode, ended.stdout, ended.stderr), (1, "fine\n", ""))

    def test_a_large_paste_arrives_whole(self):
        process = self.start(UART_ON + say("ready\n") + ECHO, stdin=subprocess.PIPE)
        self.assertEqual(self.read_until(process, 6), b"ready\n")
        paste = b"".join(b"%06d the quick brown fox jumps over the lazy dog\n" % i for i in range(1500))
        os.set_blocking(process.stdin.fileno(), False)
        sent, got = 0, b""
        deadline = time.monotonic() + 120
        while len(got) < len(paste) and time.monotonic() < deadline:
            readable, writable, _ = select.select([process.stdout], [process.stdin] if sent < len(paste) else [], [], 0.5)
            if writable:
                sent += os.write(process.stdin.fileno(), paste[sent:sent + 4096])
            if readable:
                got += os.read(process.stdout.fileno(), 65536)
        self.finish(process)
        self.assertEqual(len(got), len(paste))
        self.assertEqual(got, paste)

    def test_ctrl_a_x_through_a_pipe(self):
        process = self.start(say("up\n") + SPIN, stdin=subprocess.PIPE)
        self.assertEqual(self.read_until(process, 3), b"up\n")
        out, err = process.communicate(b"ignored by this guest" * 1000 + b"\x01x", timeout=30)
        self.assertEqual(process.returncode, 130, err)

    def test_pty_console(self):
        k = self.guest(UART_ON + ECHO)
        process = subprocess.Popen([support.RING3, *RUN, "--kernel", k, "--console", "pty"], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        name = re.search(rb"console is on (/dev/pts/\d+)", process.stderr.readline()).group(1)
        terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, b"a\x01x\x03\r")
        got = b""
        while len(got) < 5 and select.select([terminal], [], [], 30)[0]:
            got += os.read(terminal, 100)
        os.close(terminal)
        self.assertEqual(got, b"a\x01x\x03\r")
        self.assertIsNone(process.poll())
        self.finish(process)


if __name__ == "__main__":
    main()
