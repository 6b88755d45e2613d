"""Virtual disks under a stock Debian kernel: written, read back, refused, and left behind by a VMM that is killed.

usage: disk_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
The engine is soft, or what RING3_TEST_ENGINE says. RING3_TEST_KILLS: how often the VMM is killed (20).
"""
import hashlib
import os
import random
import re
import shutil
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
KILLS = int(os.environ.get("RING3_TEST_KILLS", "20"))
PATIENCE = 300
MIB = 1 << 20


class Disk(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="ring3-disk-", dir="/var/tmp")
        self.addCleanup(shutil.rmtree, self.dir)

    def path(self, name):
        return os.path.join(self.dir, name)

    def image(self, *arguments):
        return subprocess.run([support.RING3, "image", *arguments], capture_output=True, text=True, timeout=PATIENCE)

    def create(self, name, size, *options):
        result = self.image("create", *options, self.path(name), size)
        self.assertEqual(result.returncode, 0, result.stderr)
        return self.path(name)

    def contents(self, path):
        """The bytes of the virtual disk."""
        if not path.endswith(".qcow2"):
            with open(path, "rb") as f:
                return f.read()
        raw = self.path("contents.raw")
        result = self.image("convert", path, raw)
        self.assertEqual(result.returncode, 0, result.stderr)
        with open(raw, "rb") as f:
            data = f.read()
        os.unlink(raw)
        return data

    def command(self, test, *options):
        return [support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "--initrd",
                os.path.join(FILES, "initramfs.gz"), "-m", "256M", "--append",
                'console=ttyS0 quiet ring3.test="%s"' % test, *options]

    def boot(self, test, *options):
        result = subprocess.run(self.command(test, *options), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        out = result.stdout.decode(errors="replace").replace("\r", "")
        self.assertEqual(result.returncode, 0, out[-2000:] + result.stderr.decode())
        self.assertRegex(out, r"(?m)^ring3-test: status 0$")
        return out

    def check(self, path):
        if path.endswith(".qcow2"):
            result = self.image("check", path)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)


class WrittenAndRead(Disk):
    def both_ways(self, path, *options):
        test = ("dd if=/dev/urandom of=/tmp/a bs=64k count=96 2>/dev/null; "
                "dd if=/tmp/a of=/dev/vda bs=64k seek=3 conv=notrunc,fsync 2>/dev/null; "
                "echo 3 > /proc/sys/vm/drop_caches; sha256sum < /tmp/a; "
                "dd if=/dev/vda bs=64k skip=3 count=96 2>/dev/null | sha256sum; cat /sys/block/vda/serial; echo; "
                "cat /sys/block/vda/size; ls -d /sys/block/vda/mq/* | wc -l; "
                "dd if=/dev/zero of=/dev/vda bs=64k count=2 conv=notrunc,fsync 2>/dev/null")
        out = self.boot(test, "--disk", path + ",serial=S123" + "".join("," + o for o in options), "-c", "2")
        sums = re.findall(r"(?m)^([0-9a-f]{64})  -$", out)
        self.assertEqual(len(sums), 2, out[-1000:])
        self.assertEqual(sums[0], sums[1])
        self.assertRegex(out, r"(?m)^S123\n65536\n2$")
        data = self.contents(path)
        self.assertEqual(len(data), 32 * MIB)
        self.assertEqual(hashlib.sha256(data[3 * 65536:99 * 65536]).hexdigest(), sums[0])
        self.check(path)

    def test_raw(self):
        self.both_ways(self.create("d.raw", "32M"))

    def test_raw_past_the_page_cache(self):
        self.both_ways(self.create("d.raw", "32M"), "cache=none")

    def test_qcow2(self):
        self.both_ways(self.create("d.qcow2", "32M"))

    def test_qcow2_with_a_backing_file(self):
        base = self.create("base.raw", "32M")
        with open(base, "r+b") as f:
            f.write(b"below" * 1000)
        before = open(base, "rb").read()
        over = self.path("over.qcow2")
        result = self.image("create", "--backing", base, "--backing-format", "raw", over)
        self.assertEqual(result.returncode, 0, result.stderr)
        out = self.boot("head -c 10 /dev/vda; echo; echo above | dd of=/dev/vda bs=512 seek=9 conv=notrunc,fsync 2>/dev/null", "--disk", over)
        self.assertIn("\nbelowbelow\n", out)
        self.assertEqual(open(base, "rb").read(), before)
        data = self.contents(over)
        self.assertEqual(data[9 * 512:9 * 512 + 6], b"above\n")
        self.assertEqual(data[:4608], before[:4608])
        self.check(over)

    def test_discard_gives_space_back(self):
        path = self.create("d.raw", "32M")
        self.boot("dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=notrunc,fsync 2>/dev/null; blkdiscard -o 0 -l 8388608 /dev/vda", "--disk", path)
        self.assertLess(os.stat(path).st_blocks * 512, 10 * MIB)
        self.assertEqual(self.contents(path)[:8 * MIB], bytes(8 * MIB))

    def test_read_only(self):
        path = self.create("d.raw", "32M")
        out = self.boot("cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync || echo refused", "--disk", path + ",ro")
        self.assertRegex(out, r"(?m)^1$")
        self.assertIn("refused", out)

    def test_after_a_reset_of_the_guest(self):
        path = self.create("d.qcow2", "32M")
        test = "if [ x$(head -c 5 /dev/vda) = xagain ]; then poweroff -f; fi; echo again | dd of=/dev/vda bs=512 conv=notrunc,fsync 2>/dev/null; reboot -f"
        result = subprocess.run(self.command(test, "--disk", path), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        self.assertEqual(result.returncode, 0, result.stdout[-1000:] + result.stderr)
        self.assertEqual(len(re.findall(rb"ring3-guest: ready", result.stdout)), 2)
        self.check(path)

    def test_randomness_balloon_and_the_other_console(self):
        out = self.boot("cat /sys/class/misc/hw_random/rng_current; head -c 16 /dev/hwrng | wc -c; cat /sys/bus/virtio/devices/*/device | sort | tr '\\n' ' '; echo",
                        "--rng", "--balloon", "--disk", self.create("d.raw", "1M"))
        self.assertIn("virtio_rng.0\n16\n", out)
        self.assertIn("0x0002 0x0004 0x0005", out)
        command = self.command("echo through $(cat /sys/class/tty/console/active)", "--console", "virtio")
        command[command.index("--append") + 1] = command[command.index("--append") + 1].replace("ttyS0", "hvc0")
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        self.assertEqual(result.returncode, 0, result.stdout[-1000:] + result.stderr)
        self.assertIn(b"through hvc0", result.stdout)


    def test_a_guest_without_the_consoles_driver_is_not_waited_for_without_a_word(self):
        # Its driver would be a module, and there is no initrd: it panics, and nobody sees it.
        command = [support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"), "-m", "512M", "--console", "virtio",
                   "--append", "console=hvc0"]
        vm = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watchdog = threading.Timer(PATIENCE, vm.kill)
        watchdog.start()
        line = vm.stderr.readline()
        vm.terminate()
        vm.terminate()
        out, rest = vm.communicate()
        watchdog.cancel()
        self.assertRegex(line, "nothing on the console yet: .*virtio_console")
        self.assertEqual(out, "")
        self.assertNotIn("nothing on the console", rest)


class Refused(Disk):
    def refuse(self, wanted, disk):
        result = subprocess.run(self.command("true", "--disk", disk), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 2, result.stdout)
        lines = result.stderr.strip().split("\n")
        self.assertEqual(len(lines), 1, result.stderr)
        self.assertRegex(lines[0], wanted)

    def test_one_clear_line(self):
        self.refuse(r"^ring3: --disk: .*nothing-there.raw.*No such file", self.path("nothing-there.raw"))
        raw = self.create("d.raw", "1M")
        self.refuse("vmdk", raw + ",format=vmdk")
        qcow2 = self.create("d.qcow2", "1M")
        misnamed = self.path("misnamed.img")
        os.rename(qcow2, misnamed)
        self.refuse("format=qcow2", misnamed)
        self.refuse("qcow2", raw + ",format=qcow2")
        with open(self.path("other.vmdk"), "wb") as f:
            f.write(b"KDMV" + bytes(1020))
        self.refuse("vmdk image, which ring3 does not read; convert it", self.path("other.vmdk"))
        with open(self.path("empty.raw"), "wb"):
            pass
        self.refuse("image create", self.path("empty.raw"))
        self.refuse("regular file|directory", self.dir)
        base = self.create("base.raw", "1M")
        over = self.path("over.qcow2")
        self.image("create", "--backing", base, "--backing-format", "raw", over)
        os.unlink(base)
        self.refuse("over.qcow2.*base.raw.*No such file", over)

    def test_a_second_writer(self):
        path = self.create("d.raw", "1M")
        first = subprocess.Popen(self.command("sleep 1000", "--disk", path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            for line in first.stdout:
                if b"ring3-guest: ready" in line:
                    break
            self.refuse(r"d\.raw.*(lock|in use|another)", path)
        finally:
            first.kill()
            first.wait()
            first.stdout.close()
        self.boot("true", "--disk", path)


class Failing(Disk):
    """Every N-th access of the host fails: the guest is told, what it was told is on the disk is there, the image is sound."""

    ROUNDS = 60

    def failing_writes(self, path, fault):
        """Blocks written with an fsync each, some twice; what dd said of each; then read again."""
        # The address of a block, and its bytes, follow from the number of its write.
        test = ("for i in $(seq %d); do yes w$i | head -c 65536 > /tmp/b; "
                "dd if=/tmp/b of=/dev/vda bs=64k seek=$((i*29%%40)) conv=notrunc,fsync 2>/dev/null && echo wrote $i || echo failed $i; done; "
                "echo 3 > /proc/sys/vm/drop_caches; for i in $(seq 0 40); do dd if=/dev/vda bs=64k skip=$i count=1 of=/dev/null 2>/dev/null || "
                "echo unread $i; done; true" % self.ROUNDS)
        command = self.command(test, "--disk", "%s,fail=%s" % (path, fault))
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
        out = result.stdout.decode(errors="replace").replace("\r", "")
        self.assertRegex(out, r"(?m)^ring3-test: status 0$", out[-2000:] + result.stderr.decode())
        wrote = [int(i) for i in re.findall(r"(?m)^wrote (\d+)$", out)]
        failed = [int(i) for i in re.findall(r"(?m)^failed (\d+)$", out)]
        self.assertEqual(sorted(wrote + failed), list(range(1, self.ROUNDS + 1)))
        self.assertNotEqual(failed, [], "the guest was told of nothing")
        self.assertRegex(result.stderr.decode(), r"(?m)^ring3: --disk .*the guest gets I/O errors")
        self.assertLessEqual(result.stderr.count(b"\n"), 3, result.stderr)
        self.assert_sound(path)
        data = self.contents(path)
        last = {i * 29 % 40: i for i in range(1, self.ROUNDS + 1)}
        for at, i in last.items():
            if i in wrote:  # nothing is promised of a block whose last write failed
                self.assertEqual(data[at * 65536:(at + 1) * 65536], (b"w%d\n" % i * 65536)[:65536], "block %d of write %d" % (at, i))
        print("%s: %d writes told as done, %d as failed, %d reads failed" % (fault, len(wrote), len(failed), len(re.findall("unread", out))))
        return wrote

    def assert_sound(self, path):
        """Nothing but clusters that nobody refers to."""
        if path.endswith(".qcow2"):
            self.assertIn(self.image("check", path).returncode, (0, 3))
            if shutil.which("qemu-img"):
                result = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, timeout=PATIENCE)
                self.assertIn(result.returncode, (0, 3), result.stdout + result.stderr)

    def test_raw(self):
        for fault in ("7:enospc", "23:eio"):
            self.failing_writes(self.create("d%s.raw" % fault[0], "16M"), fault)

    def test_qcow2(self):
        for fault in ("7:enospc", "11:enospc", "61:eio"):
            self.failing_writes(self.create("d%s.qcow2" % fault.replace(":", ""), "16M"), fault)

    def test_a_backing_file(self):
        base = self.create("base.raw", "16M")
        over = self.path("over.qcow2")
        self.assertEqual(self.image("create", "--backing", base, "--backing-format", "raw", over).returncode, 0)
        self.failing_writes(over, "13:enospc")

    def test_a_read_that_fails_is_told(self):
        """A third of the host's reads fail: what the guest reads is right, or is an error, and never other bytes."""
        blocks = 40
        content = b"".join((b"r%d\n" % i * 4096)[:4096] for i in range(blocks))
        raw = self.create("r.raw", "%dK" % (4 * blocks))
        with open(raw, "r+b") as f:
            f.write(content)
        qcow2 = self.path("r.qcow2")
        self.assertEqual(self.image("convert", raw, qcow2).returncode, 0)
        # Past the guest's page cache, which would ask again by itself.
        test = ("for i in $(seq 0 %d); do while ! dd if=/dev/vda iflag=direct bs=4k skip=$i count=1 of=/tmp/b 2>/dev/null; do echo unread $i; done; "
                "echo block $i $(sha256sum < /tmp/b); done" % (blocks - 1))
        for path in (raw, qcow2):
            result = subprocess.run(self.command(test, "--disk", path + ",ro,fail=3:eio"), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
            out = result.stdout.decode(errors="replace").replace("\r", "")
            self.assertRegex(out, r"(?m)^ring3-test: status 0$", out[-2000:] + result.stderr.decode())
            sums = re.findall(r"(?m)^block (\d+) ([0-9a-f]{64}) -$", out)
            self.assertEqual(sums, [(str(i), hashlib.sha256(content[i * 4096:(i + 1) * 4096]).hexdigest()) for i in range(blocks)])
            self.assertGreater(len(re.findall(r"(?m)^unread \d+$", out)), 0, "the guest was told of nothing")
            self.assertRegex(result.stderr.decode(), r"(?m)^ring3: --disk .*the guest gets I/O errors")

    def test_a_full_host(self):
        """A real one: the file system under the image has no room."""
        if os.geteuid() != 0:
            self.skipTest("a small file system takes root")
        place = self.path("small")
        os.mkdir(place)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", place], capture_output=True).returncode != 0:
            self.skipTest("no tmpfs can be mounted here")
        self.addCleanup(subprocess.run, ["umount", "-l", place])
        for name in ("small/d.raw", "small/d.qcow2"):
            path = self.create(name, "16M")
            test = ("dd if=/dev/urandom of=/dev/vda bs=64k count=16 conv=notrunc,fsync 2>/dev/null && echo first good; "
                    "dd if=/dev/urandom of=/dev/vda bs=64k seek=16 conv=notrunc,fsync 2>/dev/null || echo then full")
            result = subprocess.run(self.command(test, "--disk", path), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)
            self.assertIn("first good", result.stdout, result.stderr)
            self.assertIn("then full", result.stdout)
            self.assertRegex(result.stderr, r"no room left.*No space left on device.*free some")
            self.assert_sound(path)
            os.unlink(path)


class Killed(Disk):
    """kill -9 of the VMM at any moment: what the guest was told is on the disk is there."""

    def test_flushed_blocks_survive(self):
        loop = ("i=0; while true; do i=$((i+1)); yes $i-%d | head -c 65536 > /tmp/b; at=$((i*37%%1000)); "
                "for d in vda vdb; do dd if=/tmp/b of=/dev/$d bs=64k seek=$at conv=notrunc,fsync 2>/dev/null; done; echo flushed $i; done")
        raw, qcow2 = self.create("d.raw", "64M"), self.create("d.qcow2", "64M")
        expected = {}
        chance = random.Random(5)
        rounds = 0
        for n in range(KILLS):
            process = subprocess.Popen(self.command(loop % n, "--disk", raw, "--disk", qcow2), stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            wanted, last = chance.randrange(1, 40), 0
            while True:
                line = process.stdout.readline()
                if not line:
                    break
                found = re.match(rb"flushed (\d+)", line)
                if found:
                    last = int(found.group(1))
                    if last >= wanted:
                        break
            self.assertGreaterEqual(last, wanted, process.stderr.read().decode() if not line else "")
            time.sleep(chance.random() * 0.05)
            process.kill()
            # What was printed before the end counts too.
            for line in process.stdout.read().split(b"\n"):
                found = re.match(rb"flushed (\d+)\r", line + b"\r")
                if found and line.endswith(b"\r"):
                    last = int(found.group(1))
            process.wait()
            process.stdout.close()
            process.stderr.close()
            rounds += last
            for i in range(1, last + 1):
                expected[i * 37 % 1000] = ((b"%d-%d\n" % (i, n)) * 65536)[:65536]
            # One more may have been under way, and some whose lines ended with the VMM: nothing is said of their blocks.
            for i in range(last + 1, last + 5):
                expected.pop(i * 37 % 1000, None)
            if n % 5 == 4 or n == KILLS - 1:
                # Clusters that nobody refers to may be left, and nothing else: before anything is repaired.
                self.assertIn(self.image("check", qcow2).returncode, (0, 3))
                if shutil.which("qemu-img"):
                    theirs = subprocess.run(["qemu-img", "check", qcow2], capture_output=True, text=True, timeout=PATIENCE)
                    self.assertIn(theirs.returncode, (0, 3), theirs.stdout + theirs.stderr)
                self.image("check", "--repair", "leaks", qcow2)
                self.check(qcow2)
                for path in (raw, qcow2):
                    data = self.contents(path)
                    for at, block in expected.items():
                        self.assertEqual(data[at * 65536:(at + 1) * 65536], block, "%s: kill %d, block %d" % (path, n, at))
        print("%d kills, %d flushed writes on each disk" % (KILLS, rounds))


if __name__ == "__main__":
    FILES = support.guest_arguments(__doc__)
    unittest.main()
