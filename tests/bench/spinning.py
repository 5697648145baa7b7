"""How long PyTorch's waiting threads should keep their core: python tests/bench/spinning.py prints the seconds of
a step of SFT of the tiny model with two threads, on an idle machine and beside other work, for three settings."""
import os, statistics, subprocess, sys
from rlheals.core.environment import SPINS

SETTINGS = {
    'the default': {},
    'as jobs have it': dict(GOMP_SPINCOUNT=SPINS),
    'sleeping at once': dict(OMP_WAIT_POLICY='passive'),
}
TRAIN = """
import sys, time, warnings; warnings.filterwarnings('ignore')
from rlheals.training.computing import set_up_torch
from rlheals.training.models import load_model
from rlheals.training.runs import Run
from rlheals.training.sft import sft_data, train_sft
set_up_torch(2)
model, tok = load_model('tiny', 'cpu')
run, ticks = Run('tiny', ('sft.examples=1024',)), []
_, data, _ = sft_data(run, tok)
c = run.config['sft'] | dict(max_steps=5 + int(sys.argv[1]), checkpoints=[])
train_sft(model, tok, data, {}, c, progress=lambda *_: ticks.append(time.perf_counter()))
print((ticks[-1] - ticks[4]) / int(sys.argv[1]))
"""
BUSY = 'while True: pass'  # a program with one thread


def train(environment, steps):
    "Start a training with two threads, and return the process."
    env = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    words = [sys.executable, '-c', TRAIN, str(steps)]
    return subprocess.Popen(words, env=env | environment, stdout=subprocess.PIPE, text=True)


def seconds(environment, beside):
    "Seconds of a step of SFT: alone, beside a program of one thread, or beside another such training."
    other = subprocess.Popen([sys.executable, '-c', BUSY]) if beside == 'a busy core' else None
    # fewer steps where they can take seconds each
    mine = [train(environment, 3), train(environment, 3)] if beside == 'another training' else [train(environment, 20)]
    try: return max(float(p.communicate()[0]) for p in mine)
    finally:
        if other: other.kill(); other.wait()


print(f'{os.cpu_count()} cores; seconds of a step of SFT with two threads, median of three')
for beside in ('nothing', 'a busy core', 'another training'):
    took = {name: [] for name in SETTINGS}
    for _ in range(3):  # by turns
        for name, env in SETTINGS.items(): took[name].append(seconds(env, beside))
    medians = {name: statistics.median(t) for name, t in took.items()}
    print(f'beside {beside}: ' + ', '.join(f'{name} {t:.3f}' for name, t in medians.items()), flush=True)
