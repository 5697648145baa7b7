import os, subprocess, sys
from pathlib import Path
import pytest


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
    """Whether four times the input takes less than ten times as long (quadratic time: sixteen times). Asked up to three
    times, as a machine may be slower for a while."""
    for _ in range(3):
        small, large = (min(seconds(size) for _ in range(3)) for size in (n, 4 * n))
        if large < 10 * small + slack: return True
        print(f'{small:.3f} s, and {large:.3f} s for four times as much')
    return False


@pytest.fixture
def inputs(request): return request.config.getoption('--inputs')


@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "A directory in which `smoke` has run; who changes something there puts it back."
    home = tmp_path_factory.mktemp('home')
    done = rlheals('reproduce', '--profile', 'smoke', cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    (home/'said').write_text(done.stdout)
    return home


SAID = []  # lines for the end of the test run


@pytest.fixture
def say(): return SAID.append


def pytest_terminal_summary(terminalreporter):
    if not SAID: return
    terminalreporter.section('faults')
    for line in SAID: terminalreporter.write_line(line)
