"""`ring3 run --rootfs`: commands in a guest whose root is a directory of the host.

usage: rootfs_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402
from support import Terminal  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")


class Rootfs(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="ring3-rootfs-")
        self.addCleanup(directory.cleanup)
        self.root = os.path.join(directory.name, "root")
        self.temporary = os.path.join(directory.name, "tmp")
        os.mkdir(self.temporary)
        for name in ("bin", "proc", "sys", "dev", "tmp", "run", "root", "area/below"):
            os.makedirs(os.path.join(self.root, name))
        shutil.copy(shutil.which("busybox"), os.path.join(self.root, "bin/busybox"))
        for applet in ("sh", "cat", "dd", "md5sum", "id", "uname", "stty", "tty", "ls", "sleep", "seq", "kill", "wget", "ip", "mount", "yes", "touch"):
            os.symlink("busybox", os.path.join(self.root, "bin", applet))

    def arguments(self, *words):
        return ["run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "-m", "512M", *words]

    def command(self, *words, options=(), cwd="/", root=None, stdin=subprocess.DEVNULL, **keywords):
        environment = dict(os.environ, TMPDIR=self.temporary)
        result = subprocess.run([support.RING3, *self.arguments(*options, "--rootfs", root or self.root, "--", *words)], cwd=cwd, env=environment,
                                capture_output=True, timeout=300, **({} if "input" in keywords else {"stdin": stdin}), **keywords)
        self.assertEqual(os.listdir(self.temporary), [])  # nothing is left over
        return result

    def test_output_status_and_directory(self):
        script = 'echo out; echo err >&2; pwd; uname -s; id -u; echo "$1" | cat -; exit 42'
        result = self.command("sh", "-c", script, "sh", "two  words\t\\ 'and' \"quotes\"", cwd=os.path.join(self.root, "area/below"))
        self.assertEqual(result.returncode, 42, result)
        self.assertEqual(result.stdout.decode(), "out\n/area/below\nLinux\n0\ntwo  words\t\\ 'and' \"quotes\"\n")
        self.assertEqual(result.stderr, b"err\n")

    def test_bytes_pass_both_ways_unchanged(self):
        data = os.urandom(5 << 20)
        result = self.command("cat", input=data)
        self.assertEqual((result.returncode, hashlib.md5(result.stdout).hexdigest()), (0, hashlib.md5(data).hexdigest()))

    def test_ways_for_a_command_to_end(self):
        self.assertEqual(self.command("sh", "-c", "kill -9 $$").returncode, 137)
        result = self.command("no-such-program")
        self.assertEqual(result.returncode, 127)
        self.assertIn(b"no-such-program", result.stderr)

    def test_what_it_writes_is_on_the_host(self):
        result = self.command("sh", "-c", "echo made > /area/file")
        self.assertEqual(result.returncode, 0, result)
        with open(os.path.join(self.root, "area/file")) as f:
            self.assertEqual(f.read(), "made\n")
        result = self.command("sh", "-c", "echo again > /area/file", root=self.root + ",ro")
        self.assertNotEqual(result.returncode, 0)
        with open(os.path.join(self.root, "area/file")) as f:
            self.assertEqual(f.read(), "made\n")

    def test_the_hosts_own_root_is_only_read(self):
        result = self.command("/bin/sh", "-c", "cat /etc/os-release; pwd; echo x > /ring3-was-here; true", root="/", cwd="/usr")
        self.assertEqual(result.returncode, 0, result)
        with open("/etc/os-release", "rb") as f:
            self.assertEqual(result.stdout, f.read() + b"/usr\n")
        self.assertFalse(os.path.exists("/ring3-was-here"))

    def running(self, script, *options):
        """A command in a guest that has said "ready"."""
        environment = dict(os.environ, TMPDIR=self.temporary)
        process = subprocess.Popen([support.RING3, *self.arguments(*options, "--rootfs", self.root, "--", "sh", "-c", script)], cwd="/", env=environment,
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for clean_up in (process.stderr.close, process.stdout.close, process.wait, process.kill):
            self.addCleanup(clean_up)
        self.assertEqual(process.stdout.readline(), b"ready\n")
        return process

    def test_signals_reach_the_command(self):
        # Without a child: the signal would end that too, and the shell say so, or not.
        process = self.running("trap 'echo told; exit 7' TERM; echo ready; while :; do :; done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err), (7, b"told\n", b""))
        process = self.running("echo ready; sleep 1000; echo not reached")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        self.assertEqual((process.returncode, out, err), (130, b"", b""))

    def test_a_command_that_ignores_signals_is_ended(self):
        script = "trap '' TERM INT; echo ready; while :; do sleep 1000; done"
        process = self.running(script, "--stop-timeout", "1")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(60), 143)
        process = self.running(script)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        self.assertEqual(process.wait(60), 130)

    def test_a_reader_that_has_enough(self):
        process = self.running("echo ready; yes")
        process.stdout.close()
        self.assertEqual(process.wait(60), 141)
        self.assertEqual(process.stderr.read(), b"")

    def test_a_network(self):
        class Page(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"from the host")

            def log_message(self, *_):
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            # What stands in the root's file stays; a command sees its own.
            os.mkdir(os.path.join(self.root, "etc"))
            names = os.path.join(self.root, "etc/resolv.conf")
            with open(names, "w") as f:
                f.write("nameserver 192.0.2.1\n")
            result = self.command("sh", "-c", "wget -q -O - http://10.0.2.2:%d/; cat /etc/resolv.conf; ip -4 -o addr" % server.server_port)
            server.shutdown()
        self.assertEqual(result.returncode, 0, result)
        self.assertTrue(result.stdout.startswith(b"from the hostnameserver 10.0.2.3\n"), result)
        self.assertIn(b"127.0.0.1/8", result.stdout)
        with open(names) as f:
            self.assertEqual(f.read(), "nameserver 192.0.2.1\n")
        # A dangling link, as systemd-resolved's.
        os.unlink(names)
        os.symlink("../run/systemd/resolve/stub-resolv.conf", names)
        result = self.command("cat", "/etc/resolv.conf")
        self.assertEqual((result.returncode, result.stdout), (0, b"nameserver 10.0.2.3\n"), result)
        result = self.command("ip", "-4", "-o", "addr", options=("--net", "none"))
        self.assertNotIn(b"10.0.2.15", result.stdout)
        self.assertIn(b"127.0.0.1/8", result.stdout)

    def test_a_directory_below_tmp(self):
        # /tmp is the guest's own, but where one stands is where one was.
        here = os.path.join(self.root, "tmp/a/b")
        os.makedirs(here)
        with open(os.path.join(here, "file"), "w") as f:
            f.write("content")
        open(os.path.join(self.root, "tmp/beside"), "w").close()
        result = self.command("sh", "-c", "pwd; cat file; echo made > new; ls /tmp; touch /tmp/guests", cwd=here)
        self.assertEqual((result.returncode, result.stdout), (0, b"/tmp/a/b\ncontenta\n"), result)
        self.assertTrue(os.path.exists(os.path.join(here, "new")))
        self.assertEqual(sorted(os.listdir(os.path.join(self.root, "tmp"))), ["a", "beside"])

    def test_what_tools_look_for_is_mounted(self):
        result = self.command("mount")
        for place in ("/sys/kernel/debug", "/sys/kernel/tracing", "/sys/fs/cgroup", "/proc", "/sys", "/dev/pts"):
            self.assertIn(" %s " % place, result.stdout.decode(), result)

    def test_a_terminal(self):
        with Terminal(*self.arguments("--rootfs", self.root, "--", "sh", "-c", "tty; stty size; read line; echo \"got $line\"; exit 5")) as terminal:
            at = terminal.expect(rb"/dev/ttyS0\r*\n24 80\r*\n", 120)
            self.assertIsNotNone(at, terminal.output)
            terminal.type(b"hello\r")
            self.assertIsNotNone(terminal.expect(rb"got hello", since=at), terminal.output)
            self.assertEqual(terminal.wait(60), 5, terminal.output)
            self.assertEqual(terminal.mode(), terminal.before)

    def test_a_guest_that_dies_before_its_command(self):
        result = self.command("cat", options=("--append", "rdinit=/nothing init=/nothing"))
        self.assertIn(result.returncode, (2, 3), result)
        self.assertIn(b"ended before its command did", result.stderr)

    def test_a_guest_that_panics(self):
        result = self.command("sh", "-c", "echo c > /proc/sysrq-trigger")
        self.assertEqual(result.returncode, 3)
        self.assertTrue(result.stderr.splitlines()[-1].endswith(b"before its command did: the guest kernel panicked"), result)

    def test_mistakes_are_named(self):
        for words, part in [((), b"nothing to run after --"), (("x",), None)]:
            if part is not None:
                result = subprocess.run([support.RING3, *self.arguments("--rootfs", self.root, "--", *words)], capture_output=True, timeout=60)
                self.assertEqual(result.returncode, 2)
                self.assertIn(part, result.stderr)
        for arguments, part in [(["--rootfs", "/nowhere", "--", "x"], b"No such file"), (["--", "x"], b"--rootfs DIR"),
                                (["--rootfs", os.path.join(self.root, "bin/busybox"), "--", "x"], b"not a directory"),
                                (["--rootfs", self.root, "--detach", "--", "x"], b"--detach does not go with --rootfs")]:
            result = subprocess.run([support.RING3, *self.arguments(*arguments)], capture_output=True, timeout=60)
            self.assertEqual(result.returncode, 2, result)
            self.assertEqual(len(result.stderr.splitlines()), 1, result)
            self.assertIn(part, result.stderr)


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
