"""Folders of the host in a guest: virtio-fs.

usage: share_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import os
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "cli"))
import support  # noqa: E402

FILES = None
ENGINE = os.environ.get("RING3_TEST_ENGINE", "soft")


class Share(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="ring3-share-")
        self.addCleanup(directory.cleanup)
        self.base = directory.name
        self.root = os.path.join(self.base, "root")
        os.mkdir(self.root)

    def put(self, name, content):
        with open(os.path.join(self.root, name), "wb") as f:
            f.write(content)

    def get(self, name):
        with open(os.path.join(self.root, name), "rb") as f:
            return f.read()

    def boot(self, script, *options):
        """Runs a script, which is itself in the share, in the guest; returns what it wrote."""
        self.put("script", script.encode())
        command = "mkdir -p /mnt; mount -t virtiofs share /mnt && cd /mnt && sh ./script"
        result = subprocess.run([support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"),
                                 "--initrd", os.path.join(FILES, "initramfs.gz"), "-m", "512M", "--append",
                                 'console=ttyS0 quiet ring3.test="%s"' % command, *options],
                                stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
        text = result.stdout.decode(errors="replace").replace("\r", "")
        self.assertEqual(result.returncode, 0, (text[-2000:], result.stderr))
        return text

    def shared(self, script, *options):
        return self.boot(script, "--share", self.root, *options)

    def test_both_sides_see_what_the_other_does(self):
        data = os.urandom(3 << 20)
        self.put("from-host", data)
        os.symlink("from-host", os.path.join(self.root, "link"))
        os.mkdir(os.path.join(self.root, "many"))
        for i in range(300):
            self.put("many/%d" % i, b"x")
        out = self.shared("""set -e
            md5sum from-host | cut -c 1-32; cat link | wc -c; ls many | wc -l; rm -r many
            mkdir -p a/b; echo one > a/b/file; echo two >> a/b/file; ln a/b/file a/hard; mv a/b/file a/moved; ln -s moved a/soft
            chmod 640 a/moved; touch -d '2001-02-03 04:05:06' a/moved
            dd if=from-host of=copy bs=64k 2> /dev/null; cmp from-host copy; truncate -s 100 copy; sync
            mkfifo a/pipe; (echo through > a/pipe &); cat a/pipe
            rmdir a/b; stat -c '%s %h' a/hard; cat a/soft
            """)
        import hashlib
        self.assertIn(hashlib.md5(data).hexdigest(), out)
        for line in (str(len(data)), "300", "through", "8 2", "one\ntwo", "ring3-test: status 0"):
            self.assertIn("\n%s\n" % line, out, out[-2000:])
        self.assertEqual(self.get("a/moved"), b"one\ntwo\n")
        self.assertEqual(self.get("copy"), data[:100])
        info = os.stat(os.path.join(self.root, "a/moved"))
        self.assertEqual(info.st_mode & 0o7777, 0o640)
        self.assertEqual(info.st_mtime, 981173106)
        self.assertEqual(os.readlink(os.path.join(self.root, "a/soft")), "moved")
        self.assertFalse(os.path.exists(os.path.join(self.root, "many")))

    def test_set_user_id_bits_go_when_another_writes(self):
        # What was looked at just before is not believed afterwards.
        self.put("tool", b"tool")
        os.chmod(os.path.join(self.root, "tool"), 0o4777)
        out = self.shared("""
            adduser -D -H someone 2> /dev/null || echo 'someone:x:1000:1000::/:/bin/sh' >> /etc/passwd
            stat -c '%a' tool; echo more >> tool; stat -c 'root %a' tool
            su someone -c 'echo more >> tool'; stat -c 'someone %a' tool
            chmod 4777 tool; su someone -c ': > tool'; stat -c 'cut %a' tool
            chmod 6777 tool; chown 1000 tool; stat -c 'given %a' tool
            """)
        self.assertIn("\n4777\n", out)
        for line in ("root 4777", "someone 777", "cut 777", "given 777"):
            self.assertIn("\n%s\n" % line, out, out[-2000:])

    def test_nothing_leaves_the_directory(self):
        with open(os.path.join(self.base, "secret"), "w") as f:
            f.write("the host's secret")
        os.symlink("../secret", os.path.join(self.root, "relative"))
        os.symlink(os.path.join(self.base, "secret"), os.path.join(self.root, "absolute"))
        out = self.shared("""
            cat relative absolute ../secret /mnt/../secret; ls ..
            echo overwritten > relative; echo overwritten > absolute
            mknod device c 1 3 && echo MADE; mknod block b 8 0 && echo MADE
            ln -s /etc/hostname mine; true
            """)
        self.assertNotIn("the host's secret", out)
        self.assertNotIn("MADE", out)
        with open(os.path.join(self.base, "secret")) as f:
            self.assertEqual(f.read(), "the host's secret")
        self.assertEqual(sorted(os.listdir(self.base)), ["root", "secret"])

    def test_read_only(self):
        self.put("file", b"before")
        self.boot("""
            echo after > file; rm file; mkdir d; touch new; mv file other; chmod 777 file; cat file; true
            """, "--share", self.root + ":share,ro")
        self.assertEqual(self.get("file"), b"before")
        self.assertEqual(sorted(os.listdir(self.root)), ["file", "script"])

    def test_two_vcpus_at_once(self):
        out = self.shared("""
            for j in 1 2 3; do
              (mkdir d$j; for i in $(seq 25); do echo $i > d$j/$i; cat d$j/$i > /dev/null; mv d$j/$i d$j/x$i; done
               dd if=script of=d$j/big bs=256k conv=sync 2> /dev/null) &
            done
            wait; cat d1/x* d2/x* d3/x* | wc -l; stat -c %s d1/big d2/big d3/big; rm -r d1 d2 d3; ls""", "-c", "2")
        self.assertIn("\n75\n262144\n262144\n262144\nscript\n", out)
        self.assertEqual(os.listdir(self.root), ["script"])

    def test_two_shares_and_a_reset(self):
        other = os.path.join(self.base, "other")
        os.mkdir(other)
        # After a reset the guest begins a new FUSE session with the same processes.
        out = self.shared("""
            mkdir /two; mount -t virtiofs second /two; echo $((1 + $(cat /two/count || echo 0))) > /two/count; cat /two/count
            [ $(cat /two/count) = 3 ] && poweroff -f
            reboot -f""", "--share", other + ":second")
        self.assertIn("\n3\n", out)
        with open(os.path.join(other, "count")) as f:
            self.assertEqual(f.read(), "3\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    support.RING3 = os.path.abspath(sys.argv.pop(1))
    FILES = os.path.abspath(sys.argv.pop(1))
    unittest.main()
