"""SFT and RL that are killed again and again end with the weights and tables of those that never were."""
import os, random, signal, subprocess, sys, time
import pytest
from rlheals.training.models import load_model, save_model
from rlheals.training.runs import Run

CHANGES = ('rl.updates=12', 'rl.envs=16', 'rl.turns=2')
CODE = (
    "from pathlib import Path; from rlheals.training.rl import rl_stage; from rlheals.training.runs import Run; "
    f"rl_stage(Run('smoke', {CHANGES!r}, root=Path('runs'), task_name=%r), 4)"
)


def start(home, task):
    "An RL job in a process of its own, from a copy of the base model."
    run = Run('smoke', CHANGES, root=home/'runs', task_name=task)
    if not run.checkpoint('sft', 4).exists(): save_model(*load_model('tiny', device='cpu'), run.checkpoint('sft', 4))
    return run, lambda: subprocess.Popen(
        [sys.executable, '-c', CODE % task],
        cwd=home,
        env=os.environ | dict(HF_HUB_OFFLINE='1'),
        stderr=subprocess.DEVNULL,
    )


def results(run):
    return {
        n: p.read_bytes()
        for n, p in dict(
            weights=run.checkpoint('rl', 4) / 'model.safetensors',
            log=run.table('rl-000004'),
            actions=run.table('advantages-000004'),
        ).items()
    }


@pytest.mark.parametrize('task', ['general_points', 'navigation'])
def test_killed_five_times(tmp_path, task):
    run, job = start(tmp_path/'whole', task)
    assert job().wait(timeout=300) == 0
    assert not run.path('partial', 'rl-000004.pt').exists()  # what was kept for a restart is gone
    killed, again = start(tmp_path/'killed', task)
    state, rng = killed.path('partial', 'rl-000004.pt'), random.Random(0)
    for _ in range(5):
        seen, process = state.stat().st_mtime_ns if state.exists() else 0, again()
        # at least one more update
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == seen): time.sleep(.01)
        time.sleep(rng.random() * .25)  # and then anywhere: in a rollout, a backward pass, a write
        assert process.poll() is None, 'it ended before it could be killed'
        process.send_signal(signal.SIGKILL); process.wait()
        assert not killed.checkpoint('rl', 4).exists()
    assert again().wait(timeout=300) == 0
    assert results(killed) == results(run)


SFT = ('sft.max_steps=16', 'sft.checkpoints=0,5,10,16')
SFT_CODE = (
    "from pathlib import Path; from rlheals.training.sft import sft_stage; from rlheals.training.runs import Run; "
    f"sft_stage(Run('smoke', {SFT!r}, root=Path('runs')), keep_every=0)"
)


def test_sft_killed_three_times(tmp_path):
    def job(home):
        home.mkdir(exist_ok=True)
        run = Run('smoke', SFT, root=home/'runs')
        env = os.environ | dict(HF_HUB_OFFLINE='1')
        return run, subprocess.Popen([sys.executable, '-c', SFT_CODE], cwd=home, env=env, stderr=subprocess.DEVNULL)
    def made(run):
        weights = [run.checkpoint('sft', s)/'model.safetensors' for s in run.config['sft']['checkpoints']]
        return [p.read_bytes() for p in (*weights, run.table('losses'))]

    whole, process = job(tmp_path/'whole')
    assert process.wait(timeout=300) == 0
    assert not whole.path('partial', 'sft').exists()  # what was kept for a restart is gone
    rng, last = random.Random(0), 0
    for _ in range(3):
        killed, process = job(tmp_path/'killed')
        # `SHA256SUMS` is what makes a state count
        kept = lambda: killed.path('partial', 'sft').glob('checkpoint-*/SHA256SUMS')
        done = lambda: max((int(p.parent.name.rpartition('-')[2]) for p in kept()), default=0)
        while process.poll() is None and done() <= last: time.sleep(.01)
        time.sleep(rng.random() * .25)  # and then anywhere: in a backward pass, an update, a write
        assert process.poll() is None, 'it ended before it could be killed'
        process.send_signal(signal.SIGKILL); process.wait()
        assert not killed.table('losses').exists()
        # as the workflow does before it runs a job again
        for step in killed.config['sft']['checkpoints']:
            (killed.checkpoint('sft', step)/'model.safetensors').unlink(missing_ok=True)
        last = done()
    again, process = job(tmp_path/'killed')
    assert process.wait(timeout=300) == 0
    assert made(again) == made(whole)
