"""A guest on the network: through the NAT, through a tap interface, and over vsock. Everything stays on the host's loopback.

usage: net_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
The engine is soft, or what RING3_TEST_ENGINE says.
"""
import ctypes
import fcntl
import functools
import hashlib
import http.server
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

FILES = None
RING3 = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")
PATIENCE = 300  # seconds for a boot: sanitizer builds and busy machines are slow
UP = "ip link set lo up; ip link set eth0 up; udhcpc -i eth0 -n -q > /dev/null 2>&1 || echo no lease; "


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.requests = getattr(self.server, "requests", 0) + 1


class Server6(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 128


class Server4(http.server.ThreadingHTTPServer):
    request_queue_size = 128


class Guest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="ring3-net-")
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.data = random.Random(5).randbytes(4 << 20)
        self.digest = hashlib.md5(self.data).hexdigest()
        with open(os.path.join(self.directory, "data"), "wb") as f:
            f.write(self.data)
        with open(os.path.join(self.directory, "small"), "w") as f:
            f.write("small\n")

    def serve(self, kind, address):
        server = kind((address, 0), functools.partial(Quiet, directory=self.directory))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return server

    def start(self, script, *options):
        append = 'console=ttyS0 quiet ring3.test="%s"' % script
        return subprocess.Popen([RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"),
                                 "--initrd", os.path.join(FILES, "initramfs.gz"), "-m", "512M", "--append", append, *options],
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def finish(self, process, began):
        out, _ = process.communicate(timeout=PATIENCE)
        out = out.decode(errors="replace").replace("\r", "")
        print("%s: status %d after %.1f s" % (self.id(), process.returncode, time.monotonic() - began))
        self.assertEqual(process.returncode, 0, out[-3000:])
        self.assertRegex(out, r"(?m)^ring3-test: status 0$", out[-3000:])
        self.assertNotIn("no lease", out)
        return out

    def run_guest(self, script, *options):
        began = time.monotonic()
        return self.finish(self.start(script, *options), began)


class Nat(Guest):
    def test_out(self):
        """DHCP, ping, files over IPv4 and IPv6, many connections at once, a refused port, names over UDP, a capture."""
        four = self.serve(Server4, "127.0.0.1")
        six = self.serve(Server6, "::1")
        refused = free_port()
        names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind(("127.0.0.1", 0))
        self.addCleanup(names.close)

        def resolve():
            try:
                while True:
                    query, peer = names.recvfrom(4096)
                    kind = query[12:].split(b"\0", 1)[1][:2]
                    answer = b"\xc0\x0c" + kind + b"\0\1\0\0\0\x3c\0\4" + bytes([192, 0, 2, 99]) if kind == b"\0\1" else b""
                    head = query[:2] + b"\x81\x80\0\1\0" + bytes([1 if answer else 0]) + b"\0\0\0\0"
                    names.sendto(head + query[12:] + answer, peer)
            except OSError:
                pass
        threading.Thread(target=resolve, daemon=True).start()

        capture = os.path.join(self.directory, "net.pcap")
        p4, p6 = four.server_port, six.server_port
        script = UP + (
            "ip -4 addr show eth0 | grep inet; "
            "ping -c 1 -W 20 10.0.2.2 > /dev/null && echo ping good; "
            "wget -q -O - http://10.0.2.2:%d/data | md5sum; "
            "for i in $(seq 1 60); do ip -6 addr show eth0 | grep fec0 | grep -qv tentative && break; sleep 1; done; "
            "wget -q -O - http://[fec0::2]:%d/data | md5sum | sed s/^/six:/; "
            "for i in $(seq 1 60); do wget -q -O - http://10.0.2.2:%d/small & done > /tmp/many; wait; grep -c small /tmp/many; "
            "wget -q -O - http://10.0.2.2:%d/ 2>&1; "
            "nslookup -port=%d -type=a name.example 10.0.2.2; "
            "true" % (p4, p6, p4, refused, names.getsockname()[1]))
        out = self.run_guest(script, "--net", "user,pcap=" + capture)
        self.assertRegex(out, r"inet 10\.0\.2\.15/24")
        self.assertIn("ping good", out)
        self.assertRegex(out, r"(?m)^%s  -" % self.digest, out[-2000:])
        self.assertRegex(out, r"(?m)^six:%s  -" % self.digest, out[-2000:])
        self.assertRegex(out, r"(?m)^60$", out[-2000:])
        self.assertIn("Connection refused", out)
        self.assertIn("192.0.2.99", out)
        with open(capture, "rb") as f:
            frames = f.read()
        self.assertEqual(frames[:4], b"\x4d\x3c\xb2\xa1")
        self.assertGreater(len(frames), 2 * len(self.data))

    def test_in(self):
        """A forwarded port leads to the guest's web server; the file it serves is the one it got."""
        port, end = free_port(), free_port()
        four = self.serve(Server4, "127.0.0.1")
        script = UP + (
            "mkdir /www; wget -q -O /www/back http://10.0.2.2:%d/data; httpd -p 80 -h /www; "
            "echo listening; nc -l -p 99" % four.server_port)
        began = time.monotonic()
        process = self.start(script, "--net", "user,hostfwd=tcp:127.0.0.1:%d-:80,hostfwd=tcp::%d-:99" % (port, end))
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if b"listening" in line:
                    break
            else:
                self.fail(b"".join(lines)[-3000:])
            got = b""
            with socket.create_connection(("127.0.0.1", port), timeout=60) as s:
                s.sendall(b"GET /back HTTP/1.0\r\n\r\n")
                while block := s.recv(65536):
                    got += block
            self.assertEqual(hashlib.md5(got.split(b"\r\n\r\n", 1)[1]).hexdigest(), self.digest)
            with socket.create_connection(("127.0.0.1", end), timeout=60) as s:
                s.sendall(b"done\n")
            out = self.finish(process, began)
            self.assertIn("done", out)
        finally:
            process.kill()
            process.stdout.close()

    def test_restrict_and_queues(self):
        """restrict=on lets nothing out; two cards, one with two queues, of which the guest takes both."""
        four = self.serve(Server4, "127.0.0.1")
        script = UP + (
            "wget -q -O - http://10.0.2.2:%d/small 2>&1; ip link set eth1 up; "
            "ip link set eth0 down; udhcpc -i eth1 -n -q > /dev/null 2>&1 || echo no lease; "
            "wget -q -O - http://10.0.2.2:%d/small; ls -d /sys/class/net/eth1/queues/rx-* | wc -l; cat /sys/class/net/eth1/address"
            % (four.server_port, four.server_port))
        out = self.run_guest(script, "-c", "2", "--net", "user,restrict=on", "--net", "user,queues=2,mac=52:54:00:01:02:03")
        self.assertIn("Connection refused", out)
        self.assertRegex(out, r"(?m)^small$")
        self.assertRegex(out, r"(?m)^2$")
        self.assertIn("52:54:00:01:02:03", out)

    def test_ports_in_use_are_said(self):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            s.listen()
            port = s.getsockname()[1]
            r = subprocess.run([RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"),
                                "--net", "user,hostfwd=tcp::%d-:22" % port], capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
        self.assertEqual(r.returncode, 2)
        self.assertIn(str(port), r.stderr.decode())
        self.assertEqual(r.stderr.count(b"\n"), 1)


def configure(name, address):
    """Gives an interface of this namespace an address and brings it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        packed = struct.pack("16sH2s4s8x", name.encode(), socket.AF_INET, b"", socket.inet_aton(address))
        fcntl.ioctl(s, 0x8916, packed)  # SIOCSIFADDR
        flags = struct.unpack("16sh", fcntl.ioctl(s, 0x8913, struct.pack("16sh14x", name.encode(), 0))[:18])[1]
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", name.encode(), flags | 1))


def make_tap(name, address):
    """A persistent tap interface in this namespace, up and with an address."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x5002))  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(tun, 0x400454CB, 1)                                              # persistent
    os.close(tun)
    configure(name, address)


class Tap(Guest):
    def test_a_tap_interface(self):
        """In a network namespace of this test's own."""
        if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            self.skipTest("a tap interface takes root and /dev/net/tun")
        before = os.open("/proc/self/ns/net", os.O_RDONLY)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x40000000) != 0:
            os.close(before)
            self.skipTest("no network namespace can be made here")
        try:
            make_tap("r3tap", "10.77.0.1")
            server = self.serve(Server4, "10.77.0.1")
            script = ("ip link set eth0 up; ip addr add 10.77.0.2/8 dev eth0; wget -q -O - http://10.77.0.1:%d/data | md5sum"
                      % server.server_port)
            out = self.run_guest(script, "--net", "tap,ifname=r3tap")
            self.assertRegex(out, r"(?m)^%s  -" % self.digest, out[-2000:])
        finally:
            libc.setns(before, 0)
            os.close(before)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    RING3 = os.path.abspath(sys.argv.pop(1))
    FILES = os.path.abspath(sys.argv.pop(1))
    unittest.main()
