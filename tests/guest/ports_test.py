"""Named channels of a virtio console: a file, a socket whose clients come, go and dawdle, a pseudo-terminal.

usage: ports_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")
PATIENCE = 400
# What udev would do.
LINKS = "load virtio_console; mkdir /p; for p in /sys/class/virtio-ports/*; do ln -s /dev/${p##*/} /p/$(cat $p/name); done; cd /p; "


class Ports(unittest.TestCase):
    def boot(self, command, *options):
        vm = subprocess.Popen([support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "--initrd",
                               os.path.join(FILES, "initramfs.gz"), "-m", "512M", "--net", "none", *options, "--append",
                               'console=ttyS0 quiet ring3.test="%s"' % (LINKS + command)],
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
                return line
        self.fail("the guest ended: %r" % seen[-1000:])

    def test_all_kinds(self):
        with tempfile.TemporaryDirectory(prefix="ring3-ports-") as directory:
            path, log = os.path.join(directory, "s"), os.path.join(directory, "log")
            vm = self.boot("ls; echo to the file > log; echo early > org.ring3.agent; echo taken; exec 3<>org.ring3.agent; read line <&3; "
                           "echo got $line >&3; head -c 300000 /dev/zero >&3; echo sent; echo sum $(md5sum <&3); exec 3<&-; "
                           "echo on the terminal > term; read word < term; echo word $word",
                           "--console-port", "log=file:" + log, "--console-port", "org.ring3.agent=unix:" + path, "--console-port", "term=pty")
            terminal = re.search(rb"the port term is on (\S+)", vm.stderr.readline()).group(1).decode()
            self.wait_for(vm, b"org.ring3.agent")
            # What the guest writes before there is anybody waits for the first client.
            s = socket.socket(socket.AF_UNIX)
            s.settimeout(PATIENCE)
            s.connect(path)
            stream = s.makefile("rwb")
            self.assertEqual(stream.readline(), b"early\n")
            self.wait_for(vm, b"taken")
            stream.write(b"a line\n")
            stream.flush()
            # One that dawdles holds the guest back; nothing is lost.
            time.sleep(1)
            self.assertEqual(stream.readline(), b"got a line\n")
            self.assertEqual(stream.read(300000), bytes(300000))
            self.wait_for(vm, b"sent")
            data = os.urandom(200000)
            stream.write(data)
            stream.flush()
            # The guest is told that the client has gone, behind all that it wrote: its md5sum comes to an end.
            stream.close()
            s.close()
            self.assertIn(hashlib.md5(data).hexdigest().encode(), self.wait_for(vm, b"sum "))
            fd = os.open(terminal, os.O_RDWR | os.O_NOCTTY)
            with os.fdopen(fd, "rb+", buffering=0) as t:
                # What was written before that may be gone: only the answer is certain.
                t.write(b"there\n")
                self.wait_for(vm, b"word there")
            self.assertEqual(vm.wait(PATIENCE), 0)
            with open(log, "rb") as f:
                self.assertEqual(f.read(), b"to the file\n")
            self.assertFalse(os.path.exists(path))

    def test_a_client_without_a_reader_does_not_hold_the_end_up(self):
        with tempfile.TemporaryDirectory(prefix="ring3-ports-") as directory:
            path = os.path.join(directory, "s")
            vm = self.boot("echo ready; (head -c 3000000 /dev/zero > a &); sleep 3; echo over", "--console-port", "a=unix:" + path)
            self.wait_for(vm, b"ready")
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(path)
                self.wait_for(vm, b"over")
                self.assertEqual(vm.wait(PATIENCE), 0)


class Refused(unittest.TestCase):
    """One line each, and status 2."""

    def refused(self, contains, *ports):
        words = [w for p in ports for w in ("--console-port", p)]
        result = subprocess.run([support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "--net", "none", *words],
                                stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        text = result.stderr.decode()
        self.assertEqual((result.returncode, text.count("\n")), (2, 1), text)
        self.assertIn(contains, text)

    def test_bad_words(self):
        self.refused("lacks its place", "name")
        self.refused("no name", "=pty")
        self.refused("no name", "a/b=pty")
        self.refused("no name", "..=pty")
        self.refused("no name", "x" * 61 + "=pty")
        self.refused("there are pty", "a=tcp:1234")
        self.refused("wants a path", "a=file:")
        self.refused("wants a path", "a=unix:")
        self.refused("longer than", "a=unix:/" + "x" * 200)
        self.refused("twice", "a=pty", "a=pty")
        self.refused("at most 16", *["p%d=pty" % i for i in range(17)])

    def test_bad_places(self):
        with tempfile.TemporaryDirectory(prefix="ring3-ports-") as directory:
            self.refused("No such file", "a=file:" + directory + "/no/such")
            self.refused("directory", "a=file:" + directory)
            self.refused("No such file", "a=unix:" + directory + "/no/such")
            taken = os.path.join(directory, "taken")
            with open(taken, "w"):
                pass
            self.refused("in use", "a=unix:" + taken)
            self.assertTrue(os.path.exists(taken))


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
