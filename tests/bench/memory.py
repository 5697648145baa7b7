"""How PPO's memory on a CPU grows with the number of its passes, and what the plan says: the measurements behind `SHAPES` in the chapter on footprints.

    python tests/bench/memory.py
"""
import sys, tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_footprint import peak  # noqa: E402
from rlheals.footprint import footprint  # noqa: E402
from rlheals.profiles import Run  # noqa: E402

print('updates  micro-batch  taken (GiB)  planned')
for updates, rows in ((2, 64), (12, 64), (20, 64), (2, 8), (12, 8)):
    with tempfile.TemporaryDirectory() as home:
        run = Run('tiny', ('sft.max_steps=6', 'rl.starts=6', f'rl.updates={updates}', f'rl.micro_batch={rows}'), root=Path(home))
        peak(run, 'sft')
        print(f'{updates:7}  {rows:11}  {peak(run, "rl", "--start", "6") / 2**30:11.2f}  {footprint(run, "rl").total / 2**30:7.2f}', flush=True)
