"""Tables of the samples."""
import math
import statistics

# Workload -> what it is called in the table. In this order.
WORKLOADS = {
    "integer": "integer/branch mix (hash, strings, qsort)",
    "nbody": "n-body (scalar double)",
    "matmul": "matrix product (vector float)",
    "chase-l1": "pointer chase in L1",
    "chase-dram": "pointer chase in DRAM",
    "xz": "xz -3, 3 MB",
    "zstd": "zstd -9, 3 MB",
    "python": "python dict/int loop",
    "gcc": "gcc -O2, one file",
    "gcc-large": "gcc -O2, a file ten times as large",
    "sqlite": "sqlite in memory",
    "syscall": "null syscall ×500k",
    "fault": "page fault ×40k",
    "fork": "fork+wait ×500",
    "exec": "fork+exec+wait ×200",
    "pipe": "pipe ping-pong ×20k",
    "long-double": "n-body and a polynomial (x87)",
    "mmx": "sums and products of samples (MMX)",
    "shell": "shell loop, 200 pipelines",
    "sha256": "sha256, 256 MiB",
    "aes-128-gcm": "aes-128-gcm, 512 MiB",
}
OPTIONAL = ["gcc-large", "long-double", "mmx"]
THROUGHPUT = ["sha256", "aes-128-gcm"]


def milliseconds(samples, basis, native):
    """The median of the samples' times. basis cpu: what the host's CPUs spent, of the VM when it ran in one."""
    if not samples:
        return None
    if basis == "wall":
        return statistics.median(s.wall for s in samples)
    if native:
        return statistics.median(s.cpu for s in samples)
    known = [s.host_cpu for s in samples if s.host_cpu is not None]
    return statistics.median(known) if known else None


def ratio(a, b):
    return a / b if a is not None and b else None


def geometric_mean(values):
    values = [v for v in values if v]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def number(v, form="%.0f"):
    return "–" if v is None else form % v


def _ratio_text(v):
    return number(v, "%.2f" if v is not None and v < 9.95 else "%.1f")


def table(samples, configs, chosen, basis):
    """Rows of words. samples: config -> workload -> [Sample]; configs: labels, native first when it is there."""
    others = [c for c in configs if c != "native"]
    pairs = [(c, "native") for c in others if "native" in configs]
    if "tcg" in others:
        pairs += [("tcg", c) for c in others if c != "tcg"]
    if "against" in others and "ring3" in others:
        pairs.append(("against", "ring3"))
    rows = [["workload", *["%s ms" % c for c in configs], *["%s/%s" % p for p in pairs]]]
    times = {}
    for w in chosen:
        times[w] = {c: milliseconds(samples[c].get(w), basis, c == "native") for c in configs}
        rows.append([WORKLOADS[w], *[number(times[w][c]) for c in configs],
                     *[_ratio_text(ratio(times[w][a], times[w][b])) for a, b in pairs]])
    for title, over in (("geometric mean, without crypto", [w for w in chosen if w not in THROUGHPUT]),
                        ("geometric mean, all", chosen)):
        rows.append([title, *["" for _ in configs],
                     *[_ratio_text(geometric_mean([ratio(times[w][a], times[w][b]) for w in over])) for a, b in pairs]])
    return rows


def rates(samples, configs, chosen, basis):
    """Throughputs and the null system call."""
    rows = [["rate", *configs]]
    for w in THROUGHPUT:
        if w not in chosen:
            continue
        row = []
        for c in configs:
            ms = milliseconds(samples[c].get(w), basis, c == "native")
            row.append(number(int(samples[c][w][0].info["bytes"]) / 1e6 / (ms / 1e3) if ms else None))
        rows.append([w + ", MB/s", *row])
    if "syscall" in chosen:
        row = []
        for c in configs:
            ms = milliseconds(samples[c].get("syscall"), basis, c == "native")
            row.append(number(ms * 1e3 / int(samples[c]["syscall"][0].info["calls"]) if ms else None, "%.3f"))
        rows.append(["null syscall, µs", *row])
    return rows if len(rows) > 1 else []


def boots(times, configs, basis):
    """times: config -> row title -> [(wall ms, cpu ms)]."""
    titles = list(dict.fromkeys(t for c in times.values() for t in c))
    rows = [["boot, s", *[c for c in configs if c != "native"]]]
    for t in titles:
        rows.append([t, *[number(statistics.median(v[0 if basis == "wall" else 1] for v in times[c][t]) / 1e3
                                 if times.get(c, {}).get(t) else None, "%.2f") for c in configs if c != "native"]])
    return rows if titles else []


def show(rows, markdown=False):
    if not rows:
        return ""
    if markdown:
        lines = ["| %s |" % " | ".join(r) for r in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        return "\n".join(lines) + "\n"
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(r, widths))).rstrip()
                     for r in rows) + "\n"


def troubles(samples, failed, configs):
    """What makes a table doubtful: failures, results that differ, a guest's clock that does."""
    out = []
    for c in configs:
        out += ["%s: %s: %s" % (c, w, why) for w, why in failed[c].items()]
    for w in dict.fromkeys(w for c in configs for w in samples[c]):
        sums = {c: {s.checksum for s in samples[c].get(w, [])} for c in configs}
        if len(set().union(*sums.values())) > 1:
            out.append("%s: the results differ: %s" % (w, ", ".join("%s %s" % (c, "/".join(sorted(v))) for c, v in sums.items() if v)))
        for c in configs:
            for s in samples[c].get(w, []):
                # 150 ms: what a busy host may be late in reading a line.
                if c != "native" and s.host_wall is not None and abs(s.host_wall - 50 - s.wall) > 150 + 0.05 * s.wall:
                    out.append("%s: %s: %.0f ms by the guest's clock, %.0f by the host's" % (c, w, s.wall, s.host_wall - 50))
    return out
