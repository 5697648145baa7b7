"""`rlheals compare --weights-only --leading` on the shapes of a model of 1.5 billion parameters.

First one matrix of each kind: its leading twentieth by `leading_svd` against the full decomposition, in turns, for
random weights and for weights whose singular values decay. Then the command itself on two checkpoints with random
weights, bfloat16, the second with a small noise: killed at its first progress, and the rest, with its time and largest
memory.

    python tests/bench/leading.py [--layers 28] [--dir DIR]
"""
import argparse, json, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

HIDDEN, MLP, KV, VOCAB = 1536, 8960, 256, 151936  # of Qwen2.5-1.5B
SHAPES = {'self_attn.q_proj': (HIDDEN, HIDDEN), 'self_attn.k_proj': (KV, HIDDEN), 'self_attn.v_proj': (KV, HIDDEN),
          'self_attn.o_proj': (HIDDEN, HIDDEN), 'mlp.gate_proj': (MLP, HIDDEN), 'mlp.up_proj': (MLP, HIDDEN),
          'mlp.down_proj': (HIDDEN, MLP)}
KINDS = ('q_proj', 'k_proj', 'v_proj', 'down_proj')


def best(f, runs=2):  # processor seconds, so that others on the machine do not decide, and the result
    out = []
    for _ in range(runs):
        start = time.process_time(); value = f(); out.append(time.process_time() - start)
    return min(out), value


def decompositions():
    import torch
    from rlheals.analysis.decomposition import leading_svd, svd
    torch.set_num_threads(1)
    g, plainly, whole, part = torch.Generator().manual_seed(0), 0., 0., 0.
    for name, shape in SHAPES.items():
        if not name.endswith(KINDS): continue
        for decay in (0, .5):
            W = torch.randn(shape, generator=g)
            if decay: W = W * torch.arange(1, shape[1] + 1)**-decay
            k = round(.05 * min(shape))
            (plain, _), (full, S), (leading, Sk) = (best(f) for f in (
                lambda: torch.linalg.svd(W, full_matrices=False), lambda: svd(W)[1], lambda: leading_svd(W, k)[1]))
            plainly, whole, part = plainly + plain, whole + full, part + leading
            off = ((Sk - S[:k]).abs().max() / S[0]).item()
            print(f'{name:18} {shape}, values {"that decay" if decay else "alike"}: torch.linalg.svd {plain:.2f} s, '
                  f'full {full:.2f} s, leading {k} {leading:.2f} s; values off by {off:.0e} of the largest', flush=True)
    print(f'all of them: {plainly / part:.1f} times as fast as torch.linalg.svd (at least 5), {whole / part:.1f} times '
          'as fast as our full decomposition, which turns wide matrices', flush=True)


def write(home, layers):
    import torch
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(0)
    for label in ('base', 'tuned'): (home/label).mkdir(parents=True, exist_ok=True)
    files = [('embeddings', {'model.embed_tokens.weight': (VOCAB, HIDDEN)})]
    files += [(f'layer{i:02}', {f'model.layers.{i}.{n}.weight': s for n, s in SHAPES.items()}) for i in range(layers)]
    total = 0
    for label, change in (('base', 0), ('tuned', .001)):
        g.manual_seed(0); noise = torch.Generator().manual_seed(1)
        for file, shapes in files:
            out = {}
            for n, s in shapes.items():
                W = torch.randn(s, generator=g) * .02
                if change: W += change * torch.randn(s, generator=noise)
                out[n] = W.bfloat16()
                total += W.numel() if not change else 0
            save_file(out, home/label/f'model-{file}.safetensors')
        where = {n: f'model-{file}.safetensors' for file, shapes in files for n in shapes}
        (home/label/'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return total


PEAK = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print('largest memory of a process:', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, 'MB')
sys.exit(code)"""


def compare(home, kill=False):  # seconds; or until its first progress
    command = [str(Path(sys.executable).parent/'rlheals'), 'compare', 'base', 'tuned', '--out', 'out', '--weights-only',
               '--leading', '--share', '.05', '--kinds', ','.join(KINDS)]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, '-c', PEAK, *command], cwd=home, stdout=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1'))
    for line in process.stdout:
        print(f'    {time.perf_counter() - start:4.0f} s  {line.rstrip()}', flush=True)
        if kill and ' of ' in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait()
    return time.perf_counter() - start


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--layers', type=int, default=28)
    p.add_argument('--dir', type=Path)
    a = p.parse_args()
    decompositions()
    with tempfile.TemporaryDirectory(dir=a.dir) as d:
        home = Path(d)
        n = write(home, a.layers)
        print(f'{n / 1e9:.2f} billion parameters; the largest analysed matrix has {4 * HIDDEN * MLP / 1e6:.0f} MB in '
              f'float32, the model {4 * n / 1e6:.0f} MB', flush=True)
        print(f'killed after {compare(home, kill=True):.0f} s; the rest took {compare(home):.0f} s')
