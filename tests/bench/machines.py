"""What another machine would change: SFT, its evaluation and RL with the kernels of other processors and other numbers
of threads, compared with those of this one.

    python tests/bench/machines.py [--write]    (--write: figures/machines.csv)
"""
import argparse, json, os, subprocess, sys, tempfile
from pathlib import Path
import pandas as pd
import torch
from safetensors.torch import load_file
from rlheals.training.runs import Run

ROOT = Path(__file__).parents[2]
CHANGES = ('sft.max_steps=128', 'rl.starts=128', 'rl.updates=10')
STAGE = (
    "import sys; from pathlib import Path; from rlheals.training.runs import Run; "
    "from rlheals.training.sft import sft_stage; from rlheals.training.rl import rl_stage; "
    "from rlheals.analysis.evaluation import evaluate_stage, evaluation_parts; "
    "run = Run('tiny', %r, root=Path(sys.argv[1])); sft_stage(run); rl_stage(run, 128); "
    "[evaluate_stage(run, n) for s in ('sft', 'rl') for n in evaluation_parts(run, s)]"
)
KINDS = {  # name -> environment, further settings
    'the same again': ({}, ()),
    'one thread instead of two in SFT': ({}, ('sft.threads=1',)),
    'a processor with AVX2': (
        dict(ATEN_CPU_CAPABILITY='avx2', MKL_ENABLE_INSTRUCTIONS='AVX2', ONEDNN_MAX_CPU_ISA='AVX2'),
        (),
    ),
    'a processor without AVX': (
        dict(ATEN_CPU_CAPABILITY='default', MKL_ENABLE_INSTRUCTIONS='SSE4_2', ONEDNN_MAX_CPU_ISA='SSE41'),
        (),
    ),
}


def made(home, environment=(), more=()):
    "A run of its own: accuracy by episode, and the weights."
    run = Run('tiny', (*CHANGES, *more), root=home)
    subprocess.run(
        [sys.executable, '-c', STAGE % (run.changes,), str(home)],
        env=os.environ | dict(environment, HF_HUB_OFFLINE='1'),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    from rlheals.analysis.evaluation import evaluation_parts
    table = pd.concat(run.load(n) for s in ('sft', 'rl') for n in evaluation_parts(run, s))
    return table[table.metric == 'success'].set_index(['stage', 'checkpoint', 'split', 'episode']).value, {
        p.name: load_file(p / 'model.safetensors')
        for p in (
            run.checkpoint('sft', 0),
            run.checkpoint('sft', 16),
            run.checkpoint('sft', 128),
            run.checkpoint('rl', 128),
        )
    }


def compared(ours, theirs):
    """How far apart two runs are: weights relative to how far training moved them, episodes that end otherwise,
    accuracy."""
    (episodes, weights), (others, their) = ours, theirs
    flat = lambda w: torch.cat([v.double().flatten() for _, v in sorted(w.items())])
    start = flat(weights['sft-000000'])
    apart = {
        n: ((flat(weights[n]) - flat(their[n])).norm() / (flat(weights[n]) - start).norm()).item()
        for n in weights
        if n != 'sft-000000'
    }
    same = (episodes - others).abs().groupby(['stage', 'checkpoint']).mean()
    accuracy = (
        episodes.groupby(['stage', 'checkpoint', 'split']).mean()
        - others.groupby(['stage', 'checkpoint', 'split']).mean()
    ).abs()
    return dict(
        weights_sft_16=apart['sft-000016'],
        weights_sft_128=apart['sft-000128'],
        weights_rl=apart['rl-000128'],
        episodes_otherwise=same.mean(),
        largest_change_of_accuracy=accuracy.max(),
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true')
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as tmp:
        ours, rows = made(Path(tmp)/'ours'), []
        for k, (name, how) in enumerate(KINDS.items()):
            rows.append(dict(machine=name) | compared(ours, made(Path(tmp)/str(k), *how)))
            print(json.dumps(rows[-1]), flush=True)
    if write:
        pd.DataFrame(rows).to_csv(ROOT/'figures'/'machines.csv', index=False, float_format='%.3g', lineterminator='\n')
