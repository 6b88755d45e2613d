"""What the tests of the command share: running it, a terminal for it, guests that fit in a page."""
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest

RING3 = None  # the program under test: the first argument
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")
SKIPPED = 77  # to ctest: not run, and why is on the output


def main():
    global RING3
    if len(sys.argv) < 2 or not os.access(sys.argv[1], os.X_OK):
        sys.exit("usage: %s RING3 [unittest arguments]" % sys.argv[0])
    # Tests import this module by name, so set it there and not only in __main__.
    sys.modules["support"].RING3 = os.path.abspath(sys.argv.pop(1))
    if ENGINE == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("/dev/kvm is not there or may not be opened: not run")
        sys.exit(SKIPPED)
    unittest.main()


def guest_arguments(usage):
    """Takes RING3 and FILES, what tests/guest/prepare made, off the command line; returns the second."""
    global RING3
    if len(sys.argv) < 3:
        sys.exit(usage)
    RING3 = os.path.abspath(sys.argv.pop(1))
    return os.path.abspath(sys.argv.pop(1))


def run(*arguments, timeout=60, stdin=subprocess.DEVNULL, **keywords):
    """Runs ring3 to its end; text in stdout and stderr."""
    return subprocess.run([sys.modules["support"].RING3, *arguments], stdin=stdin, capture_output=True, text=True,
                          errors="replace", timeout=timeout, **keywords)


def multiboot(code, bits=32):
    """A multiboot-1 kernel (32-bit ELF) that holds just this code, entered at its first byte."""
    base = 0x100000
    header_size = 52 + 32
    mb = struct.pack("<III", 0x1BADB002, 0, (-0x1BADB002) & 0xFFFFFFFF)
    body = mb + code
    entry = base + header_size + len(mb)
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    ehdr = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    size = header_size + len(body)
    phdr = struct.pack("<IIIIIIII", 1, 0, base, base, size, size, 7, 0x1000)
    return ehdr + phdr + body


def out_byte(port, value):
    """mov al, value; mov dx, port; out dx, al"""
    return b"\xb0" + bytes([value]) + b"\x66\xba" + struct.pack("<H", port) + b"\xee"


def out_long(port, value):
    """mov eax, value; mov dx, port; out dx, eax"""
    return b"\xb8" + struct.pack("<I", value) + b"\x66\xba" + struct.pack("<H", port) + b"\xef"


def say(text):
    """Writes text to COM1."""
    return b"".join(out_byte(0x3F8, c) for c in text.encode())


HALT = b"\xfa\xf4\xeb\xfd"  # cli; hlt; and again, should an NMI come
SPIN = b"\xeb\xfe"
# lidt [zero]; int3: an exception with an empty IDT is a triple fault. The six zero bytes are pushed.
TRIPLE_FAULT = b"\x6a\x00\x6a\x00\x0f\x01\x1c\x24\xcc"
# Echo COM1: wait for data ready (LSR bit 0), read, wait until the transmitter is empty (bit 5), write.
ECHO = (b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xf7"  # mov dx,3fd; in al,dx; test al,1; jz to the mov
        b"\x66\xba\xf8\x03\xec\x88\xc3"          # mov dx,3f8; in al,dx; mov bl,al
        b"\x66\xba\xfd\x03\xec\xa8\x20\x74\xf7"  # mov dx,3fd; in al,dx; test al,20h; jz
        b"\x66\xba\xf8\x03\x88\xd8\xee"          # mov dx,3f8; mov al,bl; out dx,al
        b"\xeb\xde")                             # again
# Turns the UART on as a driver would: the FIFOs, then DTR and RTS, without which it holds input back.
UART_ON = out_byte(0x3FA, 0x01) + out_byte(0x3FC, 0x03)


class Case(unittest.TestCase):
    """A test case with a scratch directory."""

    def setUp(self):
        self._directory = tempfile.TemporaryDirectory(prefix="ring3-test-")
        self.addCleanup(self._directory.cleanup)

    def path(self, name):
        return os.path.join(self._directory.name, name)

    def file(self, name, content):
        with open(self.path(name), "wb") as f:
            f.write(content)
        return self.path(name)

    def guest(self, code):
        return self.file("guest.elf", multiboot(code))

    def assert_one_error_line(self, result, status=2, contains=None):
        self.assertEqual(result.returncode, status, result)
        lines = result.stderr.splitlines()
        self.assertEqual(len(lines), 1, result)
        self.assertTrue(lines[0].startswith("ring3: "), result)
        self.assertEqual(result.stdout, "", result)
        if contains is not None:
            self.assertIn(contains, lines[0])


class Terminal:
    """ring3 on a pseudo-terminal that is its controlling terminal, as in a terminal window."""

    def __init__(self, *arguments, program=None):
        self.output = b""
        self.master, slave = pty.openpty()
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.slave_name = os.ttyname(slave)
        self.before = termios.tcgetattr(slave)
        command = [program or sys.modules["support"].RING3, *arguments]

        def own_session():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, close_fds=True,
                                        preexec_fn=own_session)
        self.slave = slave  # kept open: the modes are looked at after the end

    def mode(self):
        return termios.tcgetattr(self.slave)

    def is_raw(self):
        return not self.mode()[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def wait_raw(self, raw=True, timeout=30):
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.is_raw() == raw:
                return True
            self.pump(0.05)
            if self.process.poll() is not None:
                return self.is_raw() == raw
        return False

    def pump(self, seconds):
        """Takes what is there to read, waiting up to so long for the first of it."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        if not ready:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:
            return False
        self.output += data
        return bool(data)

    def expect(self, pattern, timeout=60, since=0):
        """Waits until the output since that offset matches; returns the offset after the match, or None."""
        regex = re.compile(pattern)
        deadline = time.monotonic() + timeout
        while True:
            found = regex.search(self.output, since)
            if found:
                return found.end()
            if time.monotonic() > deadline:
                return None
            if not self.pump(0.2) and self.process.poll() is not None:
                while self.pump(0):
                    pass
                found = regex.search(self.output, since)
                return found.end() if found else None

    def type(self, data, timeout=60):
        """Types it, reading the output meanwhile, as a terminal does. False when it could not all be typed."""
        view = memoryview(data)
        deadline = time.monotonic() + timeout
        os.set_blocking(self.master, False)
        try:
            while view and time.monotonic() < deadline:
                readable, writable, _ = select.select([self.master], [self.master], [], 0.2)
                if readable:
                    self.pump(0)
                if writable:
                    try:
                        view = view[os.write(self.master, view[:512]):]
                    except BlockingIOError:
                        pass
        finally:
            os.set_blocking(self.master, True)
        return not view

    def wait(self, timeout=60):
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.pump(0.1)
            if time.monotonic() > deadline:
                raise TimeoutError("ring3 did not end; output so far: %r" % self.output[-2000:])
        while self.pump(0):
            pass
        return self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        for fd in (self.master, self.slave):
            os.close(fd)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
