"""Folders of the host in a guest: virtio-fs.

usage: share_test.py RING3 FILES [unittest arguments]     FILES: what tests/guest/prepare made
"""
import os
import resource
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

    def boot(self, script, *options, descriptors=None):
        """Runs a script, which is itself in the share, in the guest; returns what it wrote. ring3 may have that many descriptors."""
        self.put("script", script.encode())
        command = "mkdir -p /mnt; mount -t virtiofs share /mnt && cd /mnt && sh ./script"
        result = subprocess.run([support.RING3, "run", "--engine", ENGINE, "--kernel", os.path.join(FILES, "vmlinuz-cloud"),
                                 "--initrd", os.path.join(FILES, "initramfs.gz"), "-m", "512M", "--append",
                                 'console=ttyS0 quiet ring3.test="%s"' % command, *options],
                                stdin=subprocess.DEVNULL, capture_output=True, timeout=300, preexec_fn=descriptors and (
                                    lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))))
        text = result.stdout.decode(errors="replace").replace("\r", "")
        self.assertEqual(result.returncode, 0, (text[-2000:], result.stderr))
        return text

    def shared(self, script, *options, **more):
        return self.boot(script, "--share", self.root, *options, **more)

    def test_more_files_than_descriptors(self):
        for d in range(8):
            os.makedirs(os.path.join(self.root, "host/%d/deep" % d))
            for f in range(60):
                self.put("host/%d/deep/%d" % (d, f), b"%d %d" % (d, f))
        out = self.shared("""set -e
            ls -lR host | grep -c '^-'; cp -a host copy; mv copy/3/deep copy/moved; mv copy/4 copy/four
            cat copy/*/deep/* copy/moved/* | md5sum | cut -c 1-32; cat host/*/deep/* | wc -c
            exec 3< copy/5/deep/7; rm -r copy/5; ls -lR host > /dev/null; cat <&3; echo; rm -r copy; ls""", descriptors=200)
        self.assertIn("\n480\n", out)
        order = [4 if d == "four" else d for d in (0, 1, 2, 5, 6, 7, "four")] + [3]
        names = sorted(str(f) for f in range(60))
        import hashlib
        text = b"".join(b"%d %s" % (d, f.encode()) for d in order for f in names)
        self.assertIn("\n%s\n%d\n5 7\nhost    script\n" % (hashlib.md5(text).hexdigest(), len(text)), out, out[-2000:])

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

    def test_what_the_host_changes_is_seen_when_the_cache_says(self):
        second = os.path.join(self.base, "second")
        long = os.path.join(self.base, "long")
        for d in (second, long):
            os.mkdir(d)
            with open(os.path.join(d, "file"), "w") as f:
                f.write("old")
            with open(os.path.join(d, "gone"), "w") as f:
                f.write("x")
            os.utime(d, (1e9, 1e9))  # so that its listing is kept

        def change():
            # When the guest has looked at all of it.
            deadline = time.monotonic() + 250
            while not os.path.exists(os.path.join(self.root, "looked")) and time.monotonic() < deadline:
                time.sleep(0.05)
            for d in (second, long):
                with open(os.path.join(d, "file"), "w") as f:
                    f.write("newer")
                with open(os.path.join(d, "made"), "w") as f:
                    f.write("x")
                os.unlink(os.path.join(d, "gone"))
            self.put("changed", b"")

        thread = threading.Thread(target=change)
        thread.start()
        out = self.shared("""
            mkdir /second /long; mount -t virtiofs second /second; mount -t virtiofs long /long
            for d in /second /long; do cat $d/file; stat $d/made 2> /dev/null; ls $d; ls $d; done > /dev/null
            touch looked; while ! ls | grep -q changed; do sleep 0.1; done; sleep 1.5
            for d in /second /long; do echo $d: $(cat $d/file) $(stat -c %s $d/made 2> /dev/null || echo none); done; echo $(ls /second)
            echo mine > /long/made; echo own: $(cat /long/made) $(ls /long)
            """, "--share", second + ":second", "--share", long + ":long,cache=86400")
        thread.join()
        self.assertIn("\n/second: newer 1\n/long: old none\nfile made\nown: mine file made\n", out, out[-2000:])

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
    FILES = support.guest_arguments(__doc__)
    unittest.main()
