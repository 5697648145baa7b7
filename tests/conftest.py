import gc, os, shutil, subprocess, sys
from pathlib import Path
import pytest
from filelock import FileLock
from rlheals.core.prefork import server
from rlheals.training.runs import Run


def pytest_addoption(parser):
    parser.addoption('--inputs', type=int, default=80_000, help='spoilt answers given to the verifiers, in all')
    parser.addoption('--faults', type=int, default=50, help='faults that the long test puts a smoke run through')
    parser.addoption('--fault-seed', type=int, default=0, help='of the faults and of their moments')
    parser.addoption(
        '--publish-faults',
        action='store_true',
        help='write the counts of the long test to figures/faults.csv and .json',
    )


def rlheals(*words, cwd):
    "Run the command `rlheals`, offline."
    return subprocess.run(
        [str(Path(sys.executable).parent / 'rlheals'), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1'),
    )


def linear(seconds, n, slack=.02):
    """Whether time grows with the input and not with its square: of three doublings, one takes less than three times as
    long. A linear reader may take much longer once, where it first asks the system for memory; a quadratic one takes
    four times as long every time. Less than `slack` seconds is linear."""
    def once(size):
        gc.disable()  # what else the process keeps is not the reader's time
        try: return seconds(size)
        finally: gc.enable()

    before = min(once(n) for _ in range(3))
    for doubling in range(1, 4):
        now = []
        while len(now) < 3:  # most readers show it the first time
            now.append(once(n << doubling))
            if min(now) < 3 * before + slack: return True
        print(f'{n << doubling}: {before:.3f} s, and {min(now):.3f} s for twice as much')
        before = min(now)
    return False


@pytest.fixture
def inputs(request): return request.config.getoption('--inputs')


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    """A directory in which `smoke` has run; who changes something there puts it back. With several processes of
    pytest, the first that needs it runs it, and each has a copy."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base)/'smoke'  # of all processes of this test run
    with FileLock(f'{shared}.lock'):
        if not (shared/'said').exists():
            shared.mkdir(exist_ok=True)
            done = rlheals('reproduce', '--profile', 'smoke', cwd=shared)
            assert done.returncode == 0, done.stdout + done.stderr
            (shared/'said').write_text(done.stdout)
    return shutil.copytree(shared, tmp_path_factory.mktemp('home'), dirs_exist_ok=True, symlinks=True)


@pytest.fixture
def run(home): return Run('smoke', root=home/'runs')


def stamps(run):
    "Every file that a run is made of (not its logs), with its time."
    return {
        p: p.stat().st_mtime_ns
        for p in run.dir.rglob('*')
        if p.is_file()
        and 'logs' not in p.parts
        and (p.suffix in ('.parquet', '.png', '.svg', '.csv') or p.name == 'model.safetensors')
    }


def names(run, paths):
    "These files of a run, without the directory of the task and the seed."
    return {str(p.relative_to(run.dir)).replace('general_points/seed0/', '') for p in paths}


@pytest.fixture(scope='module')
def jobs(home):
    "A server for the jobs of a module's tests: one import of what they need. The run of `home` had its own."
    with server(['training', 'model', 'drawing'], os.environ | dict(HF_HUB_OFFLINE='1')) as found:
        os.environ.update(found)
        yield
        for name in found: del os.environ[name]


@pytest.fixture
def say(request):
    "Function that keeps a line for the end of the test run."
    return lambda line: request.node.user_properties.append(('said', line))


def pytest_terminal_summary(terminalreporter):
    reports = [r for of_one in terminalreporter.stats.values() for r in of_one if getattr(r, 'when', '') == 'call']
    lines = [line for r in reports for key, line in r.user_properties if key == 'said']
    if not lines: return
    terminalreporter.section('measured')
    for line in lines: terminalreporter.write_line(line)
