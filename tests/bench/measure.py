"""How the benchmarks beside this file take time."""
import statistics, time


def seconds(f, runs=3):
    "Median of some runs, after one that does not count."
    f()
    out = []
    for _ in range(runs):
        start = time.perf_counter(); f(); out.append(time.perf_counter() - start)
    return statistics.median(out)
