"""The same seed on the same machine: the same bytes, however many jobs run side by side."""
import pytest
from conftest import rlheals
from test_faults import results
from rlheals.training.runs import Run


def made(home, profile, jobs):
    "What a run of its own makes, with so many jobs side by side."
    home.mkdir()
    done = rlheals('reproduce', '--profile', profile, '--jobs', jobs, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    # beside the runs, in the default profile
    figures = {f'figures/{p.name}': p.read_bytes() for p in (home/'figures').glob('*.[!j]*')}
    return results(Run(profile, root=home/'runs')) | figures


@pytest.mark.long
def test_smoke_with_one_job_and_with_two(tmp_path, say):
    one, two = (made(tmp_path/f'{n} at a time', 'smoke', n) for n in (1, 2))
    assert one == two and len(one) > 70
    say(f'smoke with one job at a time and with two: the same {len(one)} files')


@pytest.mark.hours
def test_tiny_twice(tmp_path, say):
    "Two whole runs of the default profile, with one job at a time and with two: every table, checkpoint and figure."
    one, two = (made(tmp_path/f'{n} at a time', 'tiny', n) for n in (1, 2))
    assert one == two and len(one) > 100
    say(f'tiny with one job at a time and with two: the same {len(one)} files')
