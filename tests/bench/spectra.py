"""A sweep of surgery against the obvious way, and what a decomposition costs in time and memory.

The obvious way, which is the reference implementation's: at every point of a sweep, for every matrix that the point
edits,
two full decompositions, and the spliced matrix from them. Ours: each matrix decomposed once per checkpoint and kept on
disk,
and the ranks of a sweep one from the other. Both make every edited matrix of the sweep; they are compared at the last
rank.

The points: 12 ranks on all matrices, and 8 blocks of layers with all their directions. (A block's matrices are then
those of
the last rank: ours makes them once, the obvious way makes them again, as a program that goes from point to point does.)

Random weights of SmolLM2-135M's shapes: an SVD does not care whose numbers it gets. A third of the layers, spread over
the
8 blocks, unless `--layers 30`; every layer is like any other, so the ratio is that of the whole. One thread; times are
processor seconds, system included, so that others on the machine do not decide; the sweeps' wall time is printed
beside.

    python tests/bench/spectra.py [--layers 30] [--no-embeddings]
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path

LAYERS, HIDDEN, MLP, KV, VOCAB = 30, 576, 1536, 192, 49152
SHAPES = {
    'self_attn.q_proj': (HIDDEN, HIDDEN),
    'self_attn.k_proj': (KV, HIDDEN),
    'self_attn.v_proj': (KV, HIDDEN),
    'self_attn.o_proj': (HIDDEN, HIDDEN),
    'mlp.gate_proj': (MLP, HIDDEN),
    'mlp.up_proj': (MLP, HIDDEN),
    'mlp.down_proj': (HIDDEN, MLP),
}
RANKS = [(i + 1) / 12 for i in range(12)]
BLOCKS = 8


def write(home, layers, embeddings):
    "Two checkpoints: random weights, and the same a little changed."
    import torch
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(0)
    names = {f'model.layers.{i}.{k}.weight': s for i in layers for k, s in SHAPES.items()} | (
        {'model.embed_tokens.weight': (VOCAB, HIDDEN)} if embeddings else {}
    )
    base = {n: torch.randn(s, generator=g) * .03 for n, s in names.items()}
    for label, change in (('target', 0), ('donor', .003)):
        (home/label).mkdir()
        save_file(
            {n: W + change * torch.randn(W.shape, generator=g) for n, W in base.items()},
            home / label / 'model.safetensors',
        )
    return 4 * max(m * n for m, n in names.values())


def ours(home):
    "The sweep, streamed; its time, that of the decompositions in it, a checksum and the peak memory of this process."
    import torch
    from rlheals.analysis.decomposition import decompose, rank_of_share
    from rlheals.analysis.edits import splices
    from rlheals.analysis.weights import matrices, read
    torch.set_num_threads(1)
    wall, start, decomposing, points, check = time.perf_counter(), time.process_time(), 0., 0, {}
    donor, target = (matrices(home/k, None) for k in ('donor', 'target'))
    for name in target:
        at = time.process_time()
        D, T = (decompose(m[name], cache=home/'svd') for m in (donor, target))
        decomposing += time.process_time() - at
        for W in splices(D, T, [rank_of_share(s, len(T[1])) for s in RANKS], W=read(target[name]).clone()): points += 1
        check[name] = W.norm().item()  # the last rank: also the matrix of its block of layers
    return dict(
        seconds=time.process_time() - start,
        wall=time.perf_counter() - wall,
        decomposing=decomposing,
        points=points,
        check=check,
        peak=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def obvious(home):
    "The sweep as the reference does it: load, decompose twice, splice, at every point."
    import torch
    from safetensors import safe_open
    torch.set_num_threads(1)
    files = {k: safe_open(home/k/'model.safetensors', 'pt') for k in ('donor', 'target')}
    names = list(files['target'].keys())
    block = lambda n: int(n.split('.')[2]) * BLOCKS // LAYERS if '.layers.' in n else None
    points = [(s, None) for s in RANKS] + [(1., b) for b in range(BLOCKS)]
    wall, start, once, calls, check = time.perf_counter(), time.process_time(), 0., 0, {}
    for share, b in points:
        for n in names:
            if b is not None and block(n) != b: continue
            both = [files[k].get_tensor(n) for k in ('donor', 'target')]
            at = time.process_time()
            (Ud, _, Vd), (Ut, St, Vt) = (torch.linalg.svd(W, full_matrices=False) for W in both)
            calls += 2
            # each matrix of both checkpoints once: mean over the ranks
            if b is None: once += (time.process_time() - at) / len(RANKS)
            k = round(share * len(St))
            W = (torch.cat([Ud[:, :k], Ut[:, k:]], 1) * St) @ torch.cat([Vd[:k], Vt[k:]])
            if share == 1: check[n] = W.norm().item()
    return dict(
        seconds=time.process_time() - start, wall=time.perf_counter() - wall, once=once, calls=calls, check=check
    )


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--layers', type=int, default=10)
    p.add_argument('--no-embeddings', dest='embeddings', action='store_false')
    p.add_argument('--ours', type=Path)  # the sweep in a process of its own, for its memory
    a = p.parse_args()
    if a.ours: print(json.dumps(ours(a.ours))); sys.exit()
    layers = sorted({round(i * (LAYERS - 1) / max(a.layers - 1, 1)) for i in range(a.layers)})
    with tempfile.TemporaryDirectory() as d:
        home = Path(d)
        largest = write(home, layers, a.embeddings)
        print(
            f'{len(layers)} of {LAYERS} layers{" and the embeddings" if a.embeddings else ""}; {len(RANKS)} ranks, '
            f'{BLOCKS} blocks of layers',
            flush=True,
        )
        mine = json.loads(
            subprocess.run([sys.executable, __file__, '--ours', d], check=True, capture_output=True, text=True).stdout
        )
        again = json.loads(
            subprocess.run([sys.executable, __file__, '--ours', d], check=True, capture_output=True, text=True).stdout
        )
        theirs = obvious(home)
    apart = max(abs(mine['check'][n] / w - 1) for n, w in theirs['check'].items())
    assert mine['check'].keys() == theirs['check'].keys() and apart < 1e-4, 'the two sweeps made different matrices'
    print(f"obvious sweep    {theirs['seconds']:8.1f} s  ({theirs['calls']} decompositions; wall {theirs['wall']:.1f})")
    print(
        f"our sweep        {mine['seconds']:8.1f} s  ({2 * len(mine['check'])} decompositions; wall "
        f"{mine['wall']:.1f}): {theirs['seconds'] / mine['seconds']:.1f} times as fast (at least 10)"
    )
    print(
        f"  repeated       {again['seconds']:8.1f} s  (decompositions from the cache): "
        f"{theirs['seconds'] / again['seconds']:.1f} times as fast"
    )
    print(
        f"decomposing once {mine['decomposing']:8.1f} s  (with reading, hashing and keeping on disk), torch.linalg.svd "
        f"alone {theirs['once']:.1f} s: {mine['decomposing'] / theirs['once']:.2f} times (at most 1.3)"
    )
    print(
        f"peak memory      {mine['peak'] / 1e6:8.0f} MB (at most {(8 * largest + 500e6) / 1e6:.0f}: the largest "
        f"matrix, {largest / 1e6:.1f} MB, times 8, and 500 MB)"
    )
