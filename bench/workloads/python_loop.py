"""The python workload: dicts, integers, strings, calls and a sort, in the interpreter's own loop."""


class Counter:
    def __init__(self):
        self.seen = {}

    def add(self, key, by):
        self.seen[key] = self.seen.get(key, 0) + by


def main():
    counter = Counter()
    x, total = 12345, 0
    for i in range(220000):
        x = (x * 1103515245 + 12345) & 0x7FFFFFFF
        counter.add(x % 5003, i & 7)
        if x & 1:
            total += x >> 3
        else:
            total ^= x
    words = ["w%d" % (v * 7919 % 1009) for v in range(40000)]
    table = {}
    for w in words:
        table.setdefault(w, []).append(len(w))
    ranked = sorted(table.items(), key=lambda kv: (-sum(kv[1]), kv[0]))
    print(total, sorted(counter.seen.items())[:5], ranked[:3], ",".join(w for w, _ in ranked)[:60])


main()
