"""How fast the explorer answers: python tests/bench/explorer.py prints the median time per kind of change, from the
published tables, and what keeping the axes as pixels is worth."""
import io, itertools, statistics, time
from pathlib import Path
from measure import seconds
from rlheals.beyond.explorer import Explorer
from rlheals.beyond.explorer_table import open_tables

LIMIT = .2  # seconds per change
ROOT = Path(__file__).parents[2]
tables = open_tables(ROOT/'runs', ROOT/'figures'/'explorer')
start = time.perf_counter()
app = Explorer(tables)
print(f'{len(tables)} tasks: open after {time.perf_counter() - start:.1f} s')

for name, widget in app.controls.items():
    values = [o[1] if isinstance(o, tuple) else o for o in widget.options]
    if len(values) < 2: continue
    taken = []
    for value in itertools.islice(itertools.cycle(values), 24):
        if value == widget.value: continue
        start, cpu = time.perf_counter(), time.process_time(); widget.value = value
        taken.append((time.perf_counter() - start, time.process_time() - cpu))
    wall, own = (statistics.median(t) for t in zip(*taken))
    print(
        f'{name:11} {1000 * wall:5.0f} ms per change ({1000 * own:.0f} ms of this process), {wall / LIMIT:4.0%} of the '
        'limit'
    )

p = next(iter(app.panels.values()))
print(
    f'a picture: {seconds(lambda: p.figure.savefig(io.BytesIO()), 5) / seconds(p.png, 5):.1f} times as fast as drawing '
    'all of it'
)
