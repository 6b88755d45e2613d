"""The parts of bench/run that make figures of lines."""
import math
import os
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from harness import generate, machine, report  # noqa: E402
from harness.machine import Sample  # noqa: E402


class Lines(unittest.TestCase):
    def collect(self, *lines):
        c = machine.Collector()
        for i, text in enumerate(lines):
            c.line(text, 1000.0 * i, 100.0 * i)
        return c

    def test_a_sample(self):
        c = self.collect("[    1.0] ring3-guest: ready 6.1", "ring3-bench: begin xz", "xz: noise",
                         "ring3-bench: end xz 12.5 11.25", "ring3-bench: sum xz 00ff with=avx2 bytes=7", "ring3-bench: done")
        self.assertEqual(c.ready, (0.0, 0.0))
        self.assertTrue(c.done)
        self.assertEqual(c.samples, {"xz": [Sample(12.5, 11.25, 2000.0, 200.0, "00ff", {"with": "avx2", "bytes": "7"})]})
        self.assertEqual(c.failed, {})
        self.assertEqual(c.unfinished(), [])

    def test_kernel_noise_before_the_line(self):
        c = self.collect("[ 2.1] clocksource: ring3-bench: begin a\r", "ring3-bench: end a 1 1\r", "ring3-bench: sum a 1\r")
        self.assertEqual(len(c.samples["a"]), 1)

    def test_what_does_not_end(self):
        c = self.collect("ring3-bench: begin a", "ring3-bench: failed b 127", "ring3-bench: begin c", "ring3-bench: end c 1 1")
        self.assertEqual(c.unfinished(), ["a", "c"])
        self.assertEqual(c.failed, {"b": "status 127"})
        self.assertFalse(c.done)

    def test_cut_lines_are_failures_not_figures(self):
        c = self.collect("ring3-bench: begin a", "ring3-bench: end a 12.x 1", "ring3-bench: end q 1 1", "ring3-bench:")
        self.assertEqual(c.samples, {})
        self.assertIn("not understood", c.failed["a"])

    def test_a_command_is_run_and_read(self):
        script = "echo ring3-bench: begin a; echo ring3-bench: end a 3 2; echo ring3-bench: sum a 5; echo ring3-bench: done"
        c, _, tail = machine.run(["/bin/sh", "-c", script])
        self.assertTrue(c.done, tail)
        self.assertEqual(c.samples["a"][0].wall, 3)

    def test_silence_ends_a_machine(self):
        c, _, _ = machine.run(["/bin/sh", "-c", "echo ring3-bench: begin a; sleep 60"], patience=1)
        self.assertEqual(c.failed, {"a": "no end after 1 s"})


class Tables(unittest.TestCase):
    def test_ratios_and_means(self):
        samples = {"native": {"xz": [Sample(100), Sample(300), Sample(110)], "sha256": [Sample(10)]},
                   "ring3": {"xz": [Sample(220)], "sha256": [Sample(11)]}, "tcg": {"xz": [Sample(880)], "sha256": [Sample(440)]}}
        rows = report.table(samples, ["native", "ring3", "tcg"], ["xz", "sha256"], "wall")
        self.assertEqual(rows[0][1:], ["native ms", "ring3 ms", "tcg ms", "ring3/native", "tcg/native", "tcg/ring3"])
        self.assertEqual(rows[1][1:], ["110", "220", "880", "2.00", "8.00", "4.00"])
        self.assertEqual(rows[3][4:], ["2.00", "8.00", "4.00"])
        self.assertEqual(rows[4][4:], ["%.2f" % math.sqrt(2 * 1.1), "%.1f" % math.sqrt(8 * 44), "%.1f" % math.sqrt(4 * 40)])

    def test_cpu_is_the_whole_machines(self):
        s = Sample(100, 40, 120, 90)
        self.assertEqual(report.milliseconds([s], "cpu", native=False), 90)
        self.assertEqual(report.milliseconds([s], "cpu", native=True), 40)
        self.assertEqual(report.milliseconds([s], "wall", native=False), 100)

    def test_what_is_missing_is_a_dash(self):
        rows = report.table({"native": {"xz": [Sample(1)]}, "ring3": {}}, ["native", "ring3"], ["xz"], "wall")
        self.assertEqual(rows[1][2:], ["–", "–"])
        self.assertEqual(report.geometric_mean([None]), None)

    def test_different_results_and_clocks_are_troubles(self):
        a, b = Sample(100, 0, None, None, "1"), Sample(100, 0, 900, 0, "2")
        found = report.troubles({"native": {"xz": [a]}, "ring3": {"xz": [b]}}, {"native": {}, "ring3": {}}, ["native", "ring3"])
        self.assertEqual(len(found), 2, found)
        self.assertEqual(report.troubles({"native": {"xz": [a]}}, {"native": {}}, ["native"]), [])

    def test_the_same_inputs_every_time(self):
        self.assertEqual(generate.text(20000), generate.text(20000))
        self.assertEqual(len(generate.text(20000)), 20000)
        self.assertEqual(generate.c_source(5), generate.c_source(5))


if __name__ == "__main__":
    unittest.main()
