"""Sockets between host and guest: CONNECT to a guest that listens, and a guest that connects.

usage: vsock_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")
PATIENCE = 300


class Vsock(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="ring3-vsock-")
        self.addCleanup(directory.cleanup)
        self.socket = os.path.join(directory.name, "s")

    def boot(self, command):
        vm = subprocess.Popen([support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "--initrd",
                               os.path.join(FILES, "initramfs.gz"), "-m", "512M", "--vsock", "cid=42,socket=" + self.socket, "--append",
                               'console=ttyS0 quiet ring3.test="%s"' % command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        watchdog = threading.Timer(PATIENCE, vm.kill)
        watchdog.daemon = True
        watchdog.start()
        self.addCleanup(lambda: (watchdog.cancel(), vm.kill(), vm.wait(), vm.stdout.close(), vm.stderr.close()))
        return vm

    def wait_for(self, vm, text):
        seen = b""
        for line in vm.stdout:
            seen += line
            if text in line:
                return
        self.fail("the guest ended: %r" % seen[-1000:])

    def connect(self, port):
        """The stream, and the line that answers CONNECT: b"" when it is closed instead."""
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        s.settimeout(PATIENCE)
        s.connect(self.socket)
        s.sendall(b"CONNECT %d\n" % port)
        stream = s.makefile("rwb")
        try:
            return s, stream, stream.readline()
        except ConnectionResetError:
            return s, stream, b""

    def exchange(self, data, problems):
        s, stream, answer = self.connect(1234)
        try:
            if not answer.startswith(b"OK "):
                problems.append(answer)
                return
            int(answer[3:])
            writer = threading.Thread(target=lambda: (stream.write(data), stream.flush(), s.shutdown(socket.SHUT_WR)))
            writer.start()
            got = stream.read()
            writer.join()
            if got != data.upper():
                problems.append("%d of %d bytes" % (len(got), len(data)))
        finally:
            stream.close()
            s.close()

    def test_connect_to_a_guest_that_listens(self):
        vm = self.boot("vsock_peer listen 1234 & sleep 1000")
        self.wait_for(vm, b"listening 1234")
        problems = []
        self.exchange(b"hello, guest\n", problems)
        self.exchange(b"", problems)
        self.exchange(random.Random(3).randbytes(3 << 20), problems)
        threads = [threading.Thread(target=self.exchange, args=(random.Random(i).randbytes(50_000 + 1000 * i), problems)) for i in range(20)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(problems, [])
        # Where nobody listens, and what is no request: closed without OK, and the next is served.
        for port in (77, 0, 4294967295):
            s, stream, answer = self.connect(port)
            self.assertEqual(answer, b"", port)
            stream.close()
            s.close()
        for words in (b"HELLO\n", b"CONNECT\n", b"CONNECT 12x\n", b"CONNECT 99999999999\n", b"\n", b"C" * 100_000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
                s.settimeout(PATIENCE)
                s.connect(self.socket)
                try:
                    s.sendall(words)
                    self.assertEqual(s.recv(100), b"", words[:20])
                except (ConnectionResetError, BrokenPipeError):
                    pass
        self.exchange(b"still there", problems)
        self.assertEqual(problems, [])

    def test_a_guest_that_connects(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(self.socket + "_7")
            server.listen()
            server.settimeout(PATIENCE)
            vm = self.boot("echo from the guest | vsock_peer connect 7; echo refused | vsock_peer connect 8 || echo nobody at 8")
            connection, _ = server.accept()
            with connection, connection.makefile("rwb") as stream:
                connection.settimeout(PATIENCE)
                self.assertEqual(stream.read(), b"from the guest\n")
                stream.write(b"from the host\n")
            out, errors = vm.communicate(timeout=PATIENCE)
        text = out.decode(errors="replace").replace("\r", "")
        self.assertEqual(vm.returncode, 0, (text[-1000:], errors))
        self.assertIn("\nfrom the host\n", text)
        self.assertIn("\nnobody at 8\n", text)


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
