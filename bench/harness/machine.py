"""Runs the suite somewhere and collects its lines, with the clocks of the host beside them."""
import os
import re
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field

LINE = re.compile(r"ring3-bench: (begin|end|sum|failed|done)\b ?(.*)")
READY = re.compile(r"ring3-guest: ready ")


@dataclass
class Sample:
    """One run of a workload. Times in ms; the host's are None where nothing ran in a VM."""
    wall: float = 0.0       # by the clock of where it ran
    cpu: float = 0.0        # likewise: of the workload's processes
    host_wall: float = None
    host_cpu: float = None  # of the whole VM, all threads
    checksum: str = ""
    info: dict = field(default_factory=dict)


class Collector:
    """Makes samples of console lines."""

    def __init__(self):
        self.samples = {}   # workload -> [Sample]
        self.failed = {}    # workload -> why
        self.done = False
        self.ready = None   # (wall, cpu) when user space was there
        self._open = {}     # workload -> (wall, cpu) at its begin
        self._ended = {}    # workload -> Sample without its checksum

    def line(self, text, wall, cpu):
        """A line of the console; wall and cpu: the host's clocks in ms when it came, cpu None if not to be had."""
        if self.ready is None and READY.search(text):
            self.ready = (wall, cpu)
        m = LINE.search(text)
        if not m:
            return
        kind, words = m.group(1), m.group(2).split()
        if kind == "done":
            self.done = True
            return
        if not words:
            return
        name = words[0]
        try:
            if kind == "begin":
                self._open[name] = (wall, cpu)
            elif kind == "end" and name in self._open:
                began = self._open.pop(name)
                sample = Sample(float(words[1]), float(words[2]), wall - began[0])
                if cpu is not None and began[1] is not None:
                    sample.host_cpu = cpu - began[1]
                self._ended[name] = sample
            elif kind == "sum" and name in self._ended:
                sample = self._ended.pop(name)
                sample.checksum = words[1]
                sample.info = dict(w.split("=", 1) for w in words[2:] if "=" in w)
                self.samples.setdefault(name, []).append(sample)
            elif kind == "failed":
                self.failed[name] = "status " + " ".join(words[1:])
        except (IndexError, ValueError):
            self.failed[name] = "not understood: " + text.strip()

    def unfinished(self):
        return sorted(set(self._open) | set(self._ended))


def cpu_ms(pid):
    """CPU time of a process, all threads, at nanoseconds' resolution; None when it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2) * 1e3
    except OSError:
        return None


def run(command, cpu=None, environment=None, patience=300, until_ready=False, log=None):
    """Runs a command to its end and collects. cpu: the only host CPU it may use. patience: seconds without a line
    after which it is ended. until_ready: end it when user space is there. Returns (Collector, began in ms, tail)."""
    collector = Collector()
    began = time.monotonic() * 1e3
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=environment, start_new_session=True,
                               preexec_fn=(lambda: os.sched_setaffinity(0, {cpu})) if cpu is not None else None)
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    pending, everything = b"", b""
    last = time.monotonic()
    try:
        while True:
            if not selector.select(1.0):
                if time.monotonic() - last > patience:
                    for name in collector.unfinished():
                        collector.failed[name] = "no end after %d s" % patience
                    break
                continue
            data = os.read(process.stdout.fileno(), 65536)
            wall, used = time.monotonic() * 1e3, cpu_ms(process.pid)
            if not data:
                break
            last = time.monotonic()
            everything = (everything + data)[-20000:]
            if log:
                log.write(data)
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                collector.line(line.decode(errors="replace"), wall, used)
            if until_ready and collector.ready:
                break
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        process.stdout.close()
    for name in collector.unfinished():
        collector.failed.setdefault(name, "the machine ended during it")
    return collector, began, everything.decode(errors="replace").replace("\r", "")


def ring3_command(ring3, kernel, initrd, memory, append, options):
    command = [ring3, "run", "--engine", "soft", "--kernel", kernel, "--initrd", initrd, "-m", "%dM" % memory, "-c", "1",
               "--append", append]
    for o in options:
        command += ["--cpu", o[4:].replace("/", ",")] if o.startswith("cpu=") else ["--engine-option", o]
    return command


def qemu_command(ring3, qemu, kernel, initrd, memory, append, options):
    """QEMU on ring3's KVM; else as tcg_command()."""
    command = [ring3, "with"]
    for o in options:
        command += ["--engine-option", o]
    tcg = tcg_command(qemu, kernel, initrd, memory, append)
    return command + ["--", qemu, "-accel", "kvm", "-cpu", "host", *tcg[tcg.index("-m"):]]


def tcg_command(qemu, kernel, initrd, memory, append):
    return [qemu, "-accel", "tcg", "-cpu", "max", "-m", str(memory), "-smp", "1", "-nodefaults", "-display", "none",
            "-serial", "stdio", "-no-reboot", "-kernel", kernel, "-initrd", initrd, "-append", append]
