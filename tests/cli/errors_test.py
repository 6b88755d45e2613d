"""Bad input: one clear line on standard error, status 2, nothing on standard output."""
import os
import random
import struct
import unittest

import support
from support import Case, main, multiboot, run, HALT


class Usage(Case):
    def test_command_lines(self):
        k = self.guest(HALT)
        for arguments, part in [
            ([], "ring3 run"), ([""], "verb"), (["frob"], "frob"), (["--frob"], "--frob"),
            (["run"], "--kernel"), (["run", "--kernel"], "--kernel"), (["run", "--kernel", ""], "--kernel"),
            (["run", "--kernel", k, "extra"], "extra"), (["run", "--kernel", k, "--disk", "d.raw,x=1"], "x=1"),
            (["run", "--kernel", k, "--net", "bridge"], "bridge"), (["run", "--kernel", k, "--firmware", "ovmf"], "--firmware"),
            (["doctor", "--frob"], "--frob"), (["version", "extra"], "extra"),
            (["run", "--kernel", k, "--engine", "tcg"], "tcg"), (["run", "--kernel", k, "--cpu", "pentium-9"], "pentium-9"),
            (["run", "--kernel", k, "--cpu", ""], "--cpu"),
            (["run", "--kernel", k, "--console", "vga"], "vga"), (["run", "--kernel", k, "--log", "loud"], "loud"),
            (["run", "--kernel", k, "--name", "a b"], "--name"), (["run", "--kernel", k, "--name", "x" * 65], "--name"),
            (["run", "--kernel", k, "--engine-option", "novalue"], "KEY=VALUE"),
            (["run", "--kernel", k, "--engine-option", "no-such=1"], "no-such"),
        ]:
            with self.subTest(arguments=arguments):
                self.assert_one_error_line(run(*arguments), contains=part)

    def test_sizes(self):
        k = self.guest(HALT)
        for size in ["", "0", "-1", "-512M", "G", "banana", "1e9", "0x1000", "512 M", "512X", "1.2.3G", "99999999T",
                     "99999999999999999999999G", "4097", "100K", "1000T", "１G"]:
            with self.subTest(size=size):
                self.assert_one_error_line(run("run", "--kernel", k, "--memory=" + size), contains="--memory")
                self.assert_one_error_line(run("run", "--kernel", k, "-m", size), contains="--memory")

    def test_memory_that_is_not_to_be_had(self):
        self.assert_one_error_line(run("run", "--kernel", self.guest(HALT), "-m", "1T"), contains="memory")

    def test_counts(self):
        k = self.guest(HALT)
        for count in ["", "0", "-1", "1e9", "1000000000", "100000", "99999999999999999999", "two", "1.5", "0x2", " 1"]:
            with self.subTest(count=count):
                self.assert_one_error_line(run("run", "--kernel", k, "--cpus", count), contains="--cpus")


class Files(Case):
    def refused(self, *arguments, contains=None):
        self.assert_one_error_line(run("run", "--engine", support.ENGINE, *arguments), contains=contains)

    def test_missing_and_unreadable(self):
        k = self.guest(HALT)
        self.refused("--kernel", self.path("none"), contains="No such file")
        self.refused("--kernel", self.path(""), contains="directory")
        self.refused("--kernel", k, "--initrd", self.path("none"), contains="--initrd")
        self.refused("--kernel", k, "--initrd", self.path(""), contains="directory")
        self.refused("--kernel", k + "/x", contains="--kernel")
        self.refused("--kernel", "x" * 5000, contains="--kernel")
        if os.geteuid() != 0:
            os.chmod(k, 0)
            self.refused("--kernel", k, contains="Permission denied")

    def test_not_a_kernel(self):
        elf = multiboot(HALT)
        setup = bytearray(4096)
        setup[0x1F1] = 4
        setup[0x1FE:0x200] = b"\x55\xaa"
        setup[0x202:0x206] = b"HdrS"
        setup[0x206:0x208] = struct.pack("<H", 0x20F)
        wrong_machine = bytearray(elf)
        wrong_machine[18:20] = struct.pack("<H", 183)  # AArch64
        huge = bytearray(elf)
        huge[52 + 20:52 + 24] = struct.pack("<I", 0xFFFFFFFF)  # p_memsz
        for name, content in {
            "empty": b"", "one-byte": b"\x7f", "text": b"#!/bin/sh\necho hello\n", "zeros": bytes(100000),
            "magic-only": b"\x7fELF", "half-an-elf-header": elf[:30], "no-program-header": elf[:60],
            "header-only-bzimage": bytes(setup), "cut-bzimage": bytes(setup[:0x210]),
            "wrong-machine": bytes(wrong_machine), "oversized-segment": bytes(huge),
            "gzip": b"\x1f\x8b\x08" + bytes(1000), "random": random.Random(2006).randbytes(65536),
        }.items():
            with self.subTest(name=name):
                self.refused("--kernel", self.file(name, content), contains="")

    def test_special_files(self):
        self.refused("--kernel", "/dev/null")
        self.refused("--kernel", "/proc/self/environ")

    def test_initrd_larger_than_memory(self):
        big = self.path("big.initrd")
        with open(big, "wb") as f:
            f.truncate(64 << 20)
        self.refused("--kernel", self.guest(HALT), "--initrd", big, "-m", "32M")

    def test_console_that_cannot_be_written(self):
        k = self.guest(HALT)
        self.refused("--kernel", k, "--console", "file:", contains="file:")
        self.refused("--kernel", k, "--console", "file:" + self.path(""), contains="directory")
        self.refused("--kernel", k, "--console", "file:" + self.path("no/such/place"), contains="No such file")


if __name__ == "__main__":
    main()
