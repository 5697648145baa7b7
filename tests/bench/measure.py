"""How the benchmarks beside this file take time."""
import statistics, time
import torch


def seconds(f, runs=3):
    "Median of some runs, after one that does not count."
    f()
    out = []
    for _ in range(runs):
        start = time.perf_counter(); f(); out.append(time.perf_counter() - start)
    return statistics.median(out)


class LinearLayers(torch.overrides.TorchFunctionMode):
    "Notes the shapes of all linear layers' products, and whether gradients pass through them."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is torch.nn.functional.linear:
            x, W = args[:2]
            self.seen.append((x.numel() // x.shape[-1], *W.shape[::-1], torch.is_grad_enabled()))
        return f(*args, **(kwargs or {}))


def products_alone(shapes, dtype=torch.float32):
    "Seconds of the matrix products of these layers, forward and, where gradients pass, backward, and of nothing else."
    made = {}
    for m, k, n, _ in shapes:
        if (m, k, n) not in made: made[m, k, n] = [torch.randn(*s, dtype=dtype) for s in ((m, k), (k, n), (m, n))]
    started = time.perf_counter()
    for m, k, n, trained in shapes:
        x, W, y = made[m, k, n]
        torch.mm(x, W)
        if trained: torch.mm(y, W.T); torch.mm(x.T, y)
    return time.perf_counter() - started
