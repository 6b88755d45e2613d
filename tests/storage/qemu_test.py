"""ring3 image beside qemu-img: qemu_test.py RING3 [unittest arguments]. Skipped where qemu-img is absent."""
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

RING3 = None
KINDS = ["cluster_size=64K", "cluster_size=512", "cluster_size=2M", "compat=0.10", "extended_l2=on", "refcount_bits=1",
         "refcount_bits=64", "lazy_refcounts=on", "preallocation=metadata", "preallocation=falloc"]


def run(*words, status=0):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if status is not None and done.returncode != status:
        raise AssertionError("%r gave %d: %s%s" % (words, done.returncode, done.stdout, done.stderr))
    return done


def image(*words, status=0):
    return run(RING3, "image", *words, status=status)


class Qemu(unittest.TestCase):
    def setUp(self):
        self.old = os.getcwd()
        self.directory = tempfile.mkdtemp(prefix="ring3-storage-")
        os.chdir(self.directory)
        with open("a.raw", "wb") as f:
            f.write(random.Random(1).randbytes(3 << 20))
            f.seek(20 << 20)
            f.write(b"text and more text\n" * 50000)
            f.truncate(24 << 20)

    def tearDown(self):
        os.chdir(self.old)
        shutil.rmtree(self.directory)

    def same(self, a, b):
        run("cmp", a, b)

    def test_both_ways(self):
        for kind in KINDS:
            with self.subTest(kind):
                image("convert", "-o", kind, "a.raw", "b.qcow2")
                run("qemu-img", "check", "-q", "b.qcow2")
                run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "a.raw", "b.qcow2")
                run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", kind, "a.raw", "c.qcow2")
                image("check", "c.qcow2")
                image("convert", "c.qcow2", "d.raw")
                self.same("a.raw", "d.raw")

    def test_compressed_both_ways(self):
        for kind in ["compression_type=zlib", "compression_type=zstd", "cluster_size=4K"]:
            with self.subTest(kind):
                image("convert", "-c", "-o", kind, "a.raw", "b.qcow2")
                run("qemu-img", "check", "-q", "b.qcow2")
                run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "a.raw", "b.qcow2")
                run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", kind, "a.raw", "c.qcow2")
                image("check", "c.qcow2")
                image("convert", "c.qcow2", "d.raw")
                self.same("a.raw", "d.raw")

    def test_snapshots_both_ways(self):
        for kind in ["cluster_size=64K", "compat=0.10", "extended_l2=on"]:
            with self.subTest(kind):
                image("convert", "-o", kind, "a.raw", "b.qcow2")
                image("snapshot", "--create", "one", "b.qcow2")
                run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", "b.qcow2")
                run("qemu-img", "snapshot", "-c", "two", "b.qcow2")
                image("check", "b.qcow2")
                image("convert", "-l", "one", "b.qcow2", "e.raw")
                self.same("a.raw", "e.raw")
                image("snapshot", "--apply", "one", "b.qcow2")
                run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "a.raw", "b.qcow2")
                image("snapshot", "--delete", "one", "b.qcow2")
                image("snapshot", "--delete", "two", "b.qcow2")
                run("qemu-img", "check", "-q", "b.qcow2")

    def test_resize_and_backing(self):
        image("create", "-b", "a.raw", "-F", "raw", "o.qcow2")
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "a.raw", "o.qcow2")
        image("resize", "o.qcow2", "+10G")
        image("resize", "o.qcow2", "1M", status=2)
        image("resize", "--shrink", "o.qcow2", "5M")
        run("qemu-img", "check", "-q", "o.qcow2")
        self.assertEqual(json.loads(image("info", "--json", "o.qcow2").stdout)["virtual-size"], 5 << 20)

    def test_resize_in_pieces_with_a_bar(self):
        def on_a_terminal(*words):
            outer, inner = pty.openpty()
            done = subprocess.Popen([RING3, "image", *words], stderr=inner, stdout=subprocess.DEVNULL)
            os.close(inner)
            seen = b""
            try:
                while data := os.read(outer, 4096):
                    seen += data
            except OSError:
                pass  # EIO: the other end is closed
            os.close(outer)
            self.assertEqual(done.wait(), 0, seen)
            return seen
        with open("large.raw", "wb") as f:  # what must not appear
            for gib in (0, 1, 2):
                f.seek((gib << 30) + (300 << 20))
                f.write(b"old" * 30000)
            f.truncate((3 << 30) + 512)
        image("create", "-b", "large.raw", "-F", "raw", "o.qcow2")
        for at in ("100M", "1G", "2500M"):
            run("qemu-io", "-f", "qcow2", "-c", "write -P 7 %s 1M" % at, "o.qcow2")
        self.assertRegex(on_a_terminal("resize", "--shrink", "o.qcow2", "150M"), rb"resizing \[#.* [0-9]+% of 2\.85 GiB")
        bar = on_a_terminal("resize", "o.qcow2", "4G")
        self.assertRegex(bar, rb"resizing \[#{40}\] 100% of 2\.85 GiB")
        self.assertTrue(bar.endswith(b"\x1b[K"), bar[-100:])
        run("qemu-img", "check", "-q", "o.qcow2")
        with open("want.raw", "wb") as f:
            f.seek(100 << 20)
            f.write(b"\7" * (1 << 20))
            f.truncate(4 << 30)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", "want.raw", "o.qcow2")
        self.assertEqual(image("resize", "--shrink", "o.qcow2", "1M").stderr, "")  # no terminal, no bar

    def test_what_was_made_is_told_to_programs(self):
        def told(*words):
            image_now = json.loads(image(*words, "--json").stdout)
            theirs = json.loads(run("qemu-img", "info", "-f", image_now["format"], "--output=json", image_now["filename"]).stdout)
            for key in ("filename", "format", "virtual-size", "cluster-size", "backing-filename"):
                self.assertEqual(image_now.get(key), theirs.get(key), key)
            return image_now
        self.assertEqual(told("create", "-o", "cluster_size=4K", "j.qcow2", "16M")["cluster-size"], 4096)
        self.assertEqual(told("create", "-b", "a.raw", "-F", "raw", "o.qcow2")["backing-filename"], "a.raw")
        self.assertEqual(told("create", "j.raw", "3M")["virtual-size"], 3 << 20)
        self.assertEqual(told("convert", "a.raw", "c.qcow2")["format"], "qcow2")
        self.assertEqual(told("convert", "o.qcow2", "d.raw")["virtual-size"], os.stat("a.raw").st_size)
        self.assertEqual(told("resize", "j.qcow2", "+1M")["virtual-size"], 17 << 20)
        self.assertEqual(image("resize", "--json", "j.qcow2", "1M", status=2).stdout, "")

    def test_locks_are_qemus(self):
        image("create", "b.qcow2", "16M")
        # qemu-io holds the image while its input is open.
        holder = subprocess.Popen(["qemu-io", "-f", "qcow2", "b.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            holder.stdin.write(b"write 0 64k\n")
            holder.stdin.flush()
            holder.stdout.readline()
            refused = image("resize", "b.qcow2", "32M", status=2)
            self.assertIn("in use", refused.stderr)
        finally:
            holder.communicate()
        image("resize", "b.qcow2", "32M")

    def test_killed_writers_leave_no_corruption(self):
        for n in range(20):
            if os.path.exists("k.qcow2"):
                os.unlink("k.qcow2")
            writer = subprocess.Popen([RING3, "image", "convert", "-o", "cluster_size=512", "a.raw", "k.qcow2"])
            time.sleep(0.005 + 0.01 * n)
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            if os.path.getsize("k.qcow2" if os.path.exists("k.qcow2") else "a.raw") >= 512 and os.path.exists("k.qcow2"):
                with open("k.qcow2", "rb") as f:
                    made = f.read(4) == b"QFI\xfb"
                if made:
                    self.assertIn(run("qemu-img", "check", "k.qcow2", status=None).returncode, (0, 3), n)
                    image("check", "--repair=leaks", "k.qcow2")
                    run("qemu-img", "check", "-q", "k.qcow2")


if __name__ == "__main__":
    RING3 = os.path.abspath(sys.argv.pop(1))
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        print("qemu-img and qemu-io are not here (package qemu-utils): not run")
        sys.exit(77)
    unittest.main()
