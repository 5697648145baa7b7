"""SFT and RL that are killed again and again end with the weights and tables of those that never were."""
import multiprocessing, random, time
import pytest
from rlheals.training.models import load_model, save_model
from rlheals.training.rl import rl_stage
from rlheals.training.runs import Run
from rlheals.training.sft import sft_stage

CHANGES = ('rl.updates=12', 'rl.envs=16', 'rl.turns=2')
# jobs in processes of their own, forked from one that has imported what they need: nineteen starts, one import
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['rlheals.training.rl', 'rlheals.training.sft', 'transformers.models.llama', 'trl'])


def job(stage, *args, **kwargs):
    "A process that runs a stage."
    process = FORKS.Process(target=stage, args=args, kwargs=kwargs)
    process.start()
    return process


def ended(process):
    "Its exit status."
    process.join(timeout=300)
    return process.exitcode


def start(home, task):
    "A function that starts an RL job from a copy of the base model."
    run = Run('smoke', CHANGES, root=home/'runs', task_name=task)
    if not run.checkpoint('sft', 4).exists(): save_model(*load_model('tiny', device='cpu'), run.checkpoint('sft', 4))
    return run, lambda: job(rl_stage, run, 4)


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
    run, whole = start(tmp_path/'whole', task)
    assert ended(whole()) == 0
    assert not run.path('partial', 'rl-000004.pt').exists()  # what was kept for a restart is gone
    killed, again = start(tmp_path/'killed', task)
    state, rng = killed.path('partial', 'rl-000004.pt'), random.Random(0)
    for _ in range(5):
        seen, process = state.stat().st_mtime_ns if state.exists() else 0, again()
        # at least one more update
        while process.is_alive() and (not state.exists() or state.stat().st_mtime_ns == seen): time.sleep(.01)
        time.sleep(rng.random() * .25)  # and then anywhere: in a rollout, a backward pass, a write
        assert process.is_alive(), 'it ended before it could be killed'
        process.kill(); process.join()
        assert not killed.checkpoint('rl', 4).exists()
    assert ended(again()) == 0
    assert results(killed) == results(run)


SFT = {
    'smoke': ('sft.max_steps=16', 'sft.checkpoints=0,5,10,16'),
    'smollm2-short': ('sft.max_steps=8', 'sft.checkpoints=0,3,8'),  # a real language model, a step takes seconds
}


@pytest.mark.parametrize('profile, wait', [('smoke', .25), pytest.param('smollm2-short', 4., marks=pytest.mark.long)])
def test_sft_killed_three_times(tmp_path, profile, wait):
    def begin(home):
        run = Run(profile, SFT[profile], root=home/'runs')
        return run, job(sft_stage, run, keep_every=0)

    def made(run):
        weights = [run.checkpoint('sft', s)/'model.safetensors' for s in run.config['sft']['checkpoints']]
        return [p.read_bytes() for p in (*weights, run.table('losses'))]

    whole, process = begin(tmp_path/'whole')
    assert ended(process) == 0
    assert not whole.path('partial', 'sft').exists()  # what was kept for a restart is gone
    rng, last = random.Random(0), 0
    for _ in range(3):
        killed, process = begin(tmp_path/'killed')
        # `SHA256SUMS` is what makes a state count
        kept = lambda: killed.path('partial', 'sft').glob('checkpoint-*/SHA256SUMS')
        done = lambda: max((int(p.parent.name.rpartition('-')[2]) for p in kept()), default=0)
        while process.is_alive() and done() <= last: time.sleep(.01)
        time.sleep(rng.random() * wait)  # and then anywhere: in a backward pass, an update, a write
        assert process.is_alive(), 'it ended before it could be killed'
        process.kill(); process.join()
        assert not killed.table('losses').exists()
        # as the workflow does before it runs a job again
        for step in killed.config['sft']['checkpoints']:
            (killed.checkpoint('sft', step)/'model.safetensors').unlink(missing_ok=True)
        last = done()
    again, process = begin(tmp_path/'killed')
    assert ended(process) == 0
    assert made(again) == made(whole)
