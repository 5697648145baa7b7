"""Training that meets a number that is none, or too little memory, or too little room."""
from unittest.mock import patch
import pytest, torch
from rlheals.core import files
from rlheals.training import rl, sft
from rlheals.training.grpo import grpo_stage
from rlheals.training.models import load_model, save_model
from rlheals.training.rl import rl_stage
from rlheals.training.runs import Run
from rlheals.training.sft import sft_stage
from rlheals.tasks.protocol import Verdict

STAGES = dict(sft=sft_stage, rl=lambda run: rl_stage(run, 4), grpo=lambda run: grpo_stage(run, 4))
NAMES = dict(sft='sft', rl='rl-000004', grpo='grpo-000004')


def of(tmp_path, *changes):
    "A run with a start for RL, which is the base model."
    run = Run('smoke', changes, root=tmp_path)
    save_model(*load_model('tiny', device='cpu'), run.checkpoint('sft', 4))
    return run


@pytest.mark.parametrize('stage, rate', [('sft', 'sft.learning_rate=1e25'), ('rl', 'rl.learning_rate=1e25')])
def test_numbers_that_blow_up_end_a_stage(tmp_path, stage, rate):
    "A learning rate beyond all reason: the stage ends, says what to lower, and what it leaves behind are numbers."
    run = of(tmp_path, rate, 'rl.entropy_coef=0.01')  # where all answers earn the same, the bonus alone has a gradient
    with pytest.raises(
        FloatingPointError, match=f'{rate.split("=")[0]}.*last good weights are in .*{NAMES[stage]}-stopped'
    ):
        STAGES[stage](run)
    load_model(run.path('partial', f'{NAMES[stage]}-stopped'), 'cpu')
    assert not run.table('losses' if stage == 'sft' else NAMES[stage]).exists()


@pytest.mark.parametrize('stage', STAGES)
def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, stage):
    "The loss is finite, the gradient is not: the weights kept are those before it."
    run, seen = of(tmp_path), []
    start = {k: v.clone() for k, v in load_model('tiny', 'cpu')[0].state_dict().items()}
    def spoil(model):
        model.model.norm.weight.register_hook(lambda g: seen.append(1) or g * float('nan'))
        return model
    def loaded(*a, **kw):
        model, tok = load_model(*a, **kw)
        return spoil(model), tok

    with (
        patch.object(sft, 'load_model', loaded),
        patch.object(rl, 'load_model', loaded),
        pytest.raises(FloatingPointError, match='gradient.* is nan'),
    ):
        STAGES[stage](run)
    kept = load_model(run.path('partial', f'{NAMES[stage]}-stopped'), 'cpu')[0].state_dict()
    assert seen and all(torch.equal(kept[k], start[k]) for k in start)


def results(run, stage):
    what = dict(sft=['losses'], rl=['rl-000004', 'advantages-000004'], grpo=['grpo-000004'])[stage]
    weights = load_model(run.checkpoint(stage, 4), 'cpu')[0].state_dict()
    return [run.load(n) for n in what], weights


def little_memory(rows, training=False):
    "Loading, of models whose forward pass takes so many rows and no more (or only that of training)."
    def loaded(*a, **kw):
        model, tok = load_model(*a, **kw)
        whole = model.model.forward
        def forward(input_ids=None, **k):
            if len(input_ids) > rows and (torch.is_grad_enabled() or not training):
                raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.')
            return whole(input_ids=input_ids, **k)
        model.model.forward = forward
        return model, tok
    return loaded


@pytest.mark.parametrize('stage', STAGES)
def test_memory_that_runs_out_halves_the_batch_and_nothing_else(tmp_path, stage, capsys, monkeypatch):
    """With memory for three rows a batch of eight goes on with two at a time: the same global batch, so the same result
    but for rounding."""
    # larger ones amplify rounding
    whole, halved = (
        of(tmp_path / name, 'sft.learning_rate=3e-5', 'rl.learning_rate=3e-5') for name in ('whole', 'halved')
    )
    odd = whole.task()
    # that differ: from rewards that are all the same GRPO learns nothing
    odd.verify = lambda p, text: Verdict(len(text) % 7 / 7, False, 'no', 'format', dict(length=len(text) % 7 / 7))
    monkeypatch.setattr(Run, 'task', lambda self: odd)
    STAGES[stage](whole)
    little = little_memory(3, stage == 'grpo')  # how many answers TRL samples at a time is not ours to say
    with (
        patch.object(sft, 'load_model', little),
        patch.object(rl, 'load_model', little),
        patch.object(sft, 'mean_loss', lambda m, e, c: 0.0),
    ):
        STAGES[stage](halved)
    assert 'out of memory' in capsys.readouterr().out
    (tables, weights), (theirs, other) = results(whole, stage), results(halved, stage)
    moved = torch.cat([(weights[k] - v).flatten() for k, v in load_model('tiny', 'cpu')[0].state_dict().items()]).norm()
    apart = torch.cat([(weights[k] - other[k]).flatten() for k in weights]).norm()
    assert 0 < moved and apart < .02 * moved, (apart, moved)
    assert all(a.shape == b.shape for a, b in zip(tables, theirs))


def test_a_short_batch_does_not_split_those_after_it(tmp_path):
    """Twelve examples in batches of eight: the last of each epoch has four rows, the next one eight again, at once.
    (What all rows begin with is read once, in a row of its own.)"""
    seen = []
    def loaded(*a, **kw):
        model, tok = load_model(*a, **kw)
        whole = model.model.forward
        def forward(input_ids=None, **k):
            if torch.is_grad_enabled(): seen.append(len(input_ids))
            return whole(input_ids=input_ids, **k)
        model.model.forward = forward
        return model, tok
    with patch.object(sft, 'load_model', loaded): sft_stage(Run('smoke', ('sft.examples=12',), root=tmp_path))
    assert seen == [1 + 8, 1 + 4, 1 + 8, 1 + 4]


def test_too_little_memory_for_one_row_is_said(tmp_path):
    with (
        patch.object(sft, 'load_model', little_memory(0)),
        patch.object(sft, 'mean_loss', lambda m, e, c: 0.0),
        pytest.raises(RuntimeError, match='out of memory'),
    ):
        sft_stage(of(tmp_path))


@pytest.mark.parametrize('stage', STAGES)
def test_a_stage_asks_for_room_before_it_trains(tmp_path, stage):
    run = of(tmp_path)
    usage = files.shutil.disk_usage(tmp_path)
    with (
        patch.object(files.shutil, 'disk_usage', lambda path: usage._replace(free=1_000_000)),
        pytest.raises(ValueError, match='the disk of .* has only 1.0 MB left, but .* need '),
    ):
        STAGES[stage](run)
    assert not run.path('tables').exists()


def test_a_state_that_is_damaged_is_not_gone_on_from(tmp_path, capsys):
    "One flipped bit in what RL keeps for a restart: training begins anew, and ends as if nothing had been."
    whole, broken = of(tmp_path/'whole'), of(tmp_path/'broken')
    rl_stage(whole, 4)
    class Stop(Exception): pass
    def first(done, total): raise Stop
    with pytest.raises(Stop): rl_stage(broken, 4, first)
    state = broken.path('partial', 'rl-000004.pt')
    data = bytearray(state.read_bytes()); data[len(data) // 2] ^= 1; state.write_bytes(data)
    rl_stage(broken, 4)
    assert 'is damaged: training starts again from the beginning' in capsys.readouterr().out and not state.exists()
    for name in ('rl-000004', 'advantages-000004'):
        assert whole.table(name).read_bytes() == broken.table(name).read_bytes()
    assert (whole.checkpoint('rl', 4) / 'model.safetensors').read_bytes() == (
        broken.checkpoint('rl', 4) / 'model.safetensors'
    ).read_bytes()
