"""The `smoke` chain is killed, starved of disk and damaged at random moments, and run again: in the end everything is
as if nothing had happened, or a clear error named the damaged file and the command that makes it again."""
import csv, hashlib, json, os, random, shlex, shutil, signal, subprocess, sys, time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
import psutil
import pytest
from conftest import rlheals
from rlheals.running.plan import plan
from rlheals.running.checks import find_damaged, finished
from rlheals.running.locking import end_workers, workers
from rlheals.training.runs import Run

BIN, ROOT = Path(sys.executable).parent, Path(__file__).parents[2]
STRAY = '.*.[0-9a-f]*-[0-9]*-*'  # half-written files


def results(run):
    "What a run is for, to the byte: tables, checkpoints, and figures with what is behind them."
    files = [
        p
        for p in run.dir.rglob('*')
        if p.is_file()
        and not {'partial', 'svd', '.snakemake'} & set(p.relative_to(run.dir).parts)
        and (
            p.suffix in ('.parquet', '.safetensors')
            or p.parent.name == 'figures'
            and p.suffix in ('.png', '.svg', '.csv')
        )
    ]
    return {str(p.relative_to(run.dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Smoke:
    "A `smoke` run in a directory, that can be started, hurt and looked at."
    def __init__(self, home, rng):
        self.home, self.rng, self.run, self.said = home, rng, Run('smoke', root=(home/'runs').resolve()), ''

    def start(self, words=('reproduce', '--profile', 'smoke', '--jobs', '2')):
        self.log = open(self.home.parent/'said', 'w+')
        self.process = subprocess.Popen(
            [str(BIN / 'rlheals'), *words],
            cwd=self.home,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(HF_HUB_OFFLINE='1'),
            start_new_session=True,
        )

    def end(self):
        "Wait for it: its exit status, and what it said in `said`."
        code = self.process.wait(timeout=900)
        self.log.seek(0)
        self.said = self.log.read()
        return code

    def workers(self, of='', patience=0.):
        "Its processes whose command has a word in it; waits for one."
        until = time.time() + patience
        while True:
            found = []
            for p in workers(self.run.dir):
                try: found += [p] * (of in ' '.join(p.cmdline()))
                except psutil.Error: pass
            if found or time.time() > until or self.process.poll() is not None: return found
            time.sleep(.1)

    def finished(self): return [p for p in finished(self.run.path()) if not p.is_symlink()]

    def delete_some(self):
        "Make work: some results go, and everything that depends on them; seldom what everything depends on."
        late = [p for p in self.finished() if not p.name.startswith(('sft', 'losses'))]
        for path in self.rng.sample(late if self.rng.random() < .8 else self.finished(), 3):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def may_mount(tmp):
    "May this process mount a small disk of its own?"
    tmp.mkdir(parents=True, exist_ok=True)
    if (
        shutil.which('mount') is None
        or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(tmp)], capture_output=True).returncode
    ):
        return False
    subprocess.run(['umount', str(tmp)], check=True)
    return True


# Each fault happens while the chain works (or before it starts) and returns 'survived' or 'refused'; whether it was
# survived shows when the chain is next complete.

def kill(p):
    try: p.kill()
    except psutil.Error: pass


def kill_command(s):
    s.process.kill(); s.end()
    return 'survived'


def kill_snakemake(s):
    for p in s.workers('snakemake', 20)[:1]: kill(p)
    s.end()
    return 'survived'


def kill_kernel(s):
    if found := s.workers('ipykernel_launcher', 60): kill(s.rng.choice(found))
    s.end()
    return 'survived'


def kill_papermill(s):
    if found := s.workers('papermill', 60): kill(s.rng.choice(found))
    s.end()
    return 'survived'


def kill_group(s):
    everything = [psutil.Process(s.process.pid), *s.workers()]
    for p in everything: kill(p)
    s.end()
    return 'survived'


def terminate(s):
    s.process.send_signal(s.rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGINT)))
    s.end()
    assert not s.workers(), 'it left processes behind'
    return 'survived'


def fill_disk(s):
    ballast = s.home/'ballast'
    try:
        with open(ballast, 'wb', buffering=0) as f:
            while f.write(bytes(1 << 20)): pass
    except OSError: pass
    os.truncate(ballast, max(0, ballast.stat().st_size - s.rng.choice((0, 4096, 100_000))))
    code = s.end()
    ballast.unlink()
    if code == 0: return 'survived'  # it had no more to write
    assert clear(s.said, 'No space left on device', 'has .* left'), s.said
    return 'refused'


def read_only(s):
    there = s.rng.choice(
        [
            d
            for d in (
                s.run.dir,
                s.run.path('tables'),
                s.run.path('checkpoints'),
                s.run.path('notebooks'),
                s.run.path('logs'),
                s.run.dir / 'figures',
            )
            if d.is_dir()
        ]
    )
    for words in (['--bind', there, there], ['-o', 'remount,bind,ro', there]):
        subprocess.run(['mount', *map(str, words)], check=True)
    try: code = s.end()
    finally: subprocess.run(['umount', '-l', str(there)], check=True)
    if code == 0: return 'survived'
    assert clear(s.said, 'Read-only file system'), s.said
    return 'refused'


def clear(said, *patterns):
    "An error in words: one of the patterns, and no stack trace of the command itself."
    import re
    return 'error: ' in said and not said.startswith('Traceback') and any(re.search(p, said) for p in patterns)


def damage(s, how):
    if not (finished := s.finished()): return 'survived'
    whole = s.rng.choice(finished)
    file = (
        s.rng.choice([f for f in sorted(whole.rglob('*')) if f.is_file() and f.name != 'SHA256SUMS'])
        if whole.is_dir()
        else whole
    )
    data = bytearray(file.read_bytes())
    if how == 'flip': data[s.rng.randrange(len(data))] ^= 1 << s.rng.randrange(8)
    else: del data[s.rng.randrange(len(data)):]
    file.write_bytes(data)
    code = s.end()  # of what was running at that moment: whether it noticed or not
    s.start()  # now it must
    again = s.end()
    if file.exists() and find_damaged([s.run.path()]):
        assert again == 1 and str(file) in s.said and 'rlheals reproduce --repair' in s.said, (file, code, s.said)
        words = shlex.split(s.said.strip().splitlines()[-1])
        assert words[0] == 'rlheals'
        s.start(words[1:])
        time.sleep(s.rng.uniform(0, 14))
        return 'refused'
    return 'survived'  # it was being made anew at that moment


def flip_a_bit(s): return damage(s, 'flip')


def truncate(s): return damage(s, 'cut')


def start_two(s):
    second = rlheals('reproduce', '--profile', 'smoke', cwd=s.home)
    if s.process.poll() is None:
        assert second.returncode == 1 and f'in use by process {s.process.pid}' in second.stderr, second.stderr
    s.process.kill(); s.end()
    return 'refused'


FAULTS = dict(
    kill_group=kill_group,
    flip_a_bit=flip_a_bit,
    fill_disk=fill_disk,
    kill_command=kill_command,
    kill_kernel=kill_kernel,
    truncate=truncate,
    terminate=terminate,
    read_only=read_only,
    kill_snakemake=kill_snakemake,
    start_two=start_two,
    kill_papermill=kill_papermill,
)


def torment(home, n, seed, tmp):
    "Put a finished smoke run through `n` faults; (rows: fault, tried, survived, refused, lost; seconds it took)."
    rng, place, start = random.Random(seed), tmp/'disk', time.time()
    disk = may_mount(place)
    kinds = [k for k in FAULTS if disk or k not in ('fill_disk', 'read_only')]
    room = 3 * sum(f.stat().st_size for f in home.rglob('*') if f.is_file()) + (64 << 20)
    if disk: subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={room}', 'tmpfs', str(place)], check=True)
    try:
        s = Smoke(place/'home', rng)
        shutil.copytree(home, s.home)
        # what was made on request is not made again unasked
        for name in ('preserve-*', 'warning.*', 'S3.*', 'S4.*'):
            for p in [*s.run.dir.rglob(name), *s.run.dir.rglob(f'.{name}')]:
                if p.is_file(): p.unlink()
        before, counts, open_ = results(s.run), {k: Counter() for k in kinds}, []

        def complete():
            "Run it to the end: everything must be there again, the same."
            s.start()
            assert s.end() == 0, s.said
            s.start()
            assert s.end() == 0 and 'nothing to do' in s.said, s.said
            after = results(s.run)
            lost = {k for k in before if after.get(k) != before[k]} | (set(after) - set(before))
            stray = [*s.run.dir.rglob(STRAY)]
            for kind, how in open_: counts[kind]['lost' if lost or stray else how] += 1
            open_.clear()
            assert not lost and not stray, (lost, stray)

        order = [kinds[k % len(kinds)] for k in range(n)]
        rng.shuffle(order)
        for k, kind in enumerate(order):
            if s.run.table('losses').exists() and not plan(s.run): s.delete_some()
            s.start()
            time.sleep(rng.uniform(0, 14))
            counts[kind]['tried'] += 1
            open_.append((kind, FAULTS[kind](s)))
            print(f'{k + 1} of {n}: {kind}, {open_[-1][1]}', flush=True)  # with pytest -s
            if s.process.poll() is None: s.process.kill(); s.end()
            if len(open_) >= 8: complete()
        complete()
        return [
            dict(fault=k, **{c: counts[k][c] for c in ('tried', 'survived', 'refused', 'lost')}) for k in kinds
        ], time.time() - start
    finally:
        end_workers((place/'home'/'runs'/'smoke').resolve())
        if disk: subprocess.run(['umount', '-l', str(place)], check=True)


def told(rows, seconds, say):
    total = Counter()
    for r in rows:
        say('  '.join([f'{r["fault"]:16}', *(f'{k} {r[k]}' for k in ('tried', 'survived', 'refused', 'lost'))]))
        total.update({k: r[k] for k in ('tried', 'survived', 'refused', 'lost')})
    say(f"{'all':16}  " + '  '.join(f'{k} {v}' for k, v in total.items()) + f'  in {seconds:.0f} s')
    assert total['lost'] == 0 and total['survived'] + total['refused'] == total['tried']
    return total


def test_some_faults(home, tmp_path, say, request):
    "A few, each time the tests run."
    told(*torment(home, 2, request.config.getoption('--fault-seed'), tmp_path), say)


@pytest.mark.long
def test_many_faults(home, tmp_path, say, request):
    "At least fifty, and their counts in figures/faults.csv with --publish-faults."
    n, seed = request.config.getoption('--faults'), request.config.getoption('--fault-seed')
    rows, seconds = torment(home, n, seed, tmp_path)
    total = told(rows, seconds, say)
    if not request.config.getoption('--publish-faults'): return
    with open(ROOT/'figures'/'faults.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, list(rows[0]), lineterminator='\n'); w.writeheader(); w.writerows(rows)
    record = dict(
        faults=total['tried'],
        seed=seed,
        seconds=round(seconds),
        rlheals=version('rlheals'),
        snakemake=version('snakemake'),
        papermill=version('papermill'),
        torch=version('torch'),
    )
    (ROOT/'figures'/'faults.json').write_text(json.dumps(record, indent=1) + '\n')
