"""What SFT and PPO of `tiny` take on a CPU and what the plan says, over many settings: the measurements behind
`KERNELS` in the chapter on memory.

    python tests/bench/memory.py            all of them: twenty minutes
    python tests/bench/memory.py navigation rl.updates=3 rl.envs=64
"""
import sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_memory import peak  # noqa: E402
from rlheals.running.memory import estimate_memory# noqa: E402
from rlheals.training.runs import Run# noqa: E402

SETTINGS = (  # a task other than the default stands first
    'rl.updates=2',
    'rl.updates=8',
    'rl.updates=20',
    'rl.updates=2 rl.micro_batch=8',
    'rl.updates=6 rl.micro_batch=8',
    'rl.updates=12 rl.micro_batch=8',
    'rl.updates=20 rl.micro_batch=8',
    'rl.updates=12 rl.micro_batch=4',
    'rl.updates=12 rl.micro_batch=16',
    'rl.updates=12 rl.micro_batch=32',
    'rl.updates=3 rl.envs=256',
    'rl.updates=3 rl.envs=512 rl.minibatch=128 rl.micro_batch=128',
    'rl.updates=6 rl.envs=64 rl.minibatch=32 rl.micro_batch=16',
    'rl.updates=5 model.max_new_tokens=80',
    'rl.updates=6 rl.turns=4',
    'rl.updates=4 task.tries=1',
    'rl.updates=4 lora.rank=8',
    'sft.batch_size=256 rl.updates=2',
    'navigation rl.updates=6',
    'determinant rl.updates=6',
    'rank rl.updates=6',
)

print(f'{"settings":>60}  {"SFT (GiB)":>9}  planned        {"PPO (GiB)":>9}  planned')
for words in [sys.argv[1:]] if sys.argv[1:] else map(str.split, SETTINGS):
    task = 'general_points' if '=' in words[0] else words[0]
    with tempfile.TemporaryDirectory() as home:
        run = Run(
            'tiny', ('sft.max_steps=6', 'rl.starts=6', *(w for w in words if '=' in w)), root=Path(home), task_name=task
        )
        line = f'{" ".join(words):>60}'
        for stage in (['sft'], ['rl', '--start', '6']):
            took, planned = peak(run, *stage, '--task', task), estimate_memory(run, stage[0]).total
            line += f'  {took / 2**30:9.2f}  {planned / 2**30:7.2f} ({planned / took - 1:+4.0%})'
        print(line, flush=True)
