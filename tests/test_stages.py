"""Training stages in other ways than the default: several processes, adapters, another engine."""
import importlib, sys, types
from importlib.util import find_spec
import numpy as np
import pytest
import torch
from rlheals.beyond import baselines
from rlheals.beyond.baselines import METHODS, baselines_stage, distance
from rlheals.results.style import EQUAL
from rlheals.tasks.general_points import GeneralPoints
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import generate
from rlheals.training.models import load_model
from rlheals.training.ppo import train_ppo
from rlheals.training.rl import rl_stage
from rlheals.training.rules import load_profile
from rlheals.training.runs import Run
from rlheals.training.sft import sft_stage


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The same smoke run in one process and in two (`accelerate launch`, gloo), as far as the end of RL from its last
    SFT checkpoint.

    At small learning rates: at the default one of SFT, four steps from this base turn a change of the last bit of its
    weights into 0.2 % of the loss."""
    out = {}
    for n in (1, 2):
        run = Run(
            'smoke',
            (f'sft.processes={n}', f'rl.processes={n}', 'rl.envs=9', 'sft.learning_rate=3e-5', 'rl.learning_rate=3e-5'),
            0,
            tmp_path_factory.mktemp(f'processes{n}'),
        )
        out[n] = (run, sft_stage(run), rl_stage(run, 4))
    return out


def test_two_processes_have_the_losses_of_one(runs):
    (_, sft, rl), (_, sft2, rl2) = runs[1], runs[2]
    assert sft['problems'].tolist() == sft2['problems'].tolist()
    np.testing.assert_allclose(sft2['value'], sft['value'], rtol=1e-4)
    assert rl[['update', 'metric']].equals(rl2[['update', 'metric']])
    np.testing.assert_allclose(rl2['value'], rl['value'], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('stage, step', [('sft', 4), ('rl', 4)])
def test_two_processes_end_with_the_weights_of_one(runs, stage, step):
    one, two = (load_model(runs[n][0].checkpoint(stage, step), device='cpu')[0].state_dict() for n in (1, 2))
    before = load_model('tiny', device='cpu')[0].state_dict()
    for name in one:
        moved = (one[name] - before[name]).norm()
        # Adam turns rounding of small gradients into steps
        assert (one[name] - two[name]).norm() <= .01 * moved + 1e-6, name


def test_two_processes_leave_one_set_of_files(runs):
    files = [
        sorted(str(p.relative_to(run.dir)) for p in run.dir.rglob('*') if p.is_file() and 'logs' not in p.parts)
        for run, *_ in runs.values()
    ]
    assert files[0] == files[1]


def test_adapters_through_both_stages(tmp_path):
    """With `lora.rank` the stages leave ordinary models: the base's matrices plus an update of that rank; embeddings
    untouched."""
    # after so little SFT all answers earn the same, and only the bonus has a gradient
    run = Run('smoke', ('lora.rank=3', 'rl.entropy_coef=0.01'), 0, tmp_path)
    sft_stage(run); rl_stage(run, 4)
    ends = baselines_stage(run)  # they train adapters too, and interpolate what has them merged
    assert set(ends['stage']) == {m + suffix for m in METHODS for suffix in ('', EQUAL)} and ends['value'].notna().all()
    base, sft, rl = (
        load_model(p, device='cpu')[0].state_dict() for p in ('tiny', run.checkpoint('sft', 4), run.checkpoint('rl', 4))
    )
    assert base.keys() == sft.keys() == rl.keys()
    for name, W in base.items():
        if '_proj' not in name: assert torch.equal(W, sft[name]) and torch.equal(W, rl[name]); continue
        for before, after in ((W, sft[name]), (sft[name], rl[name])):
            S = torch.linalg.svdvals((after - before).double())
            assert S[0] > 0 and S[3] < 1e-3 * S[0] + 1e-6, name


@pytest.mark.parametrize('changes', [(), ('lora.rank=3', 'rl.entropy_coef=0.01')])
def test_baselines_are_evaluated_as_far_from_their_start_as_rl(tmp_path, monkeypatch, changes):
    "What is evaluated the second time is as far from the SFT checkpoint as RL's checkpoint, or is the start itself."
    run = Run('smoke', changes, 0, tmp_path)
    sft_stage(run); rl_stage(run, 4)
    first, start, rl = (load_model(run.checkpoint(*c), 'cpu')[0] for c in (('sft', 2), ('sft', 4), ('rl', 4)))
    evaluated, evaluate = [], baselines.evaluate_run

    def seen(run, model, tok):
        evaluated.append(distance(model, start))
        return evaluate(run, model, tok)

    monkeypatch.setattr(baselines, 'evaluate_run', seen)
    table = baselines_stage(run)
    train = table[(table.split == 'train') & table.stage.str.endswith(EQUAL)]
    said = train.pivot(index='stage', columns='metric', values='value').loc[[m + EQUAL for m in METHODS]]
    assert said.distance.tolist() == evaluated[::2] and (said.rl_distance == distance(rl, start)).all()
    for method, before, after in zip(METHODS, evaluated[::2], evaluated[1::2]):
        want = distance(rl, start) if before else 0
        if method == 'interpolation': want = min(want, distance(first, start))
        assert abs(after - want) <= 1e-4 * want, (method, before, after, want)
    assert evaluated[0] > 0 and evaluated[4] > 0 and distance(rl, start) > 0


def test_an_engine_gets_the_contexts_and_the_weights_of_the_moment(monkeypatch):
    """vLLM itself needs a GPU; here TRL's class is replaced, and what it is given and what becomes of its answers is
    checked."""
    seen = dict(synced=0, asked=0)

    class Fake:
        def __init__(self, model, accelerator, tokenizer, **options):
            self.model, self.tokenizer, self.options = model, tokenizer, options

        def sync_weights(self): seen['synced'] += 1
        def generate(self, contexts, images, n):
            assert (
                images is None
                and n == 1
                and self.options['temperature'] == 1.0
                and self.options['max_completion_length'] == 6
            )
            seen['asked'] += 1
            return contexts, generate(self.model, self.tokenizer, contexts, 6, 1., seed=seen['asked']), None, None

    monkeypatch.setitem(sys.modules, 'trl.generation.vllm_generation', types.SimpleNamespace(VLLMGeneration=Fake))
    monkeypatch.setattr(importlib.import_module('trl.import_utils'), 'is_vllm_available', lambda *a, **k: True)
    set_up_torch(1)
    model, tok = load_model('tiny', device='cpu')
    log, _ = train_ppo(
        model, tok, GeneralPoints('brief', tries=1), load_profile('smoke')['rl'] | dict(engine='vllm', updates=2), 6
    )
    assert seen == dict(synced=1 + 2 * 2, asked=1 + 2 * 2)  # once before the first update, then for each turn
    assert log['update'].max() == 1


@pytest.mark.skipif(find_spec('vllm') is not None, reason='vLLM is here')
def test_vllm_is_refused_where_it_is_not_installed():
    with pytest.raises(ValueError, match='rl.engine'): load_profile('smoke', ['rl.engine=vllm'])


def test_some_second_try_mends_a_first(tmp_path):
    """Retries were dead once: no second answer was ever right, and RL's data was a constant penalty.

    A few seconds of SFT from the shipped base are enough to see one succeed."""
    from rlheals.training.rollouts import play
    from rlheals.tasks.protocol import problem_set

    run = Run(
        'tiny', ('sft.max_steps=24', 'sft.examples=1600', 'sft.test_examples=8', 'eval.splits=id,ood_dev'), 90, tmp_path
    )
    sft_stage(run)
    set_up_torch(2)
    model, tok = load_model(run.checkpoint('sft', 24), 'cpu')
    for part, split in run.splits.items():
        episodes = play(model, tok, run.task(), problem_set(run.task(), split, 80, 90), 40, .2, seed=1)
        second = [r for e in episodes for r in e.revisions]
        assert len(second) > 5 and sum(second) / len(second) > .1, (part, sum(second), len(second))
        assert sum(e.solved_within(run.task(), 5) for e in episodes) > sum(
            e.solved_within(run.task(), 1) for e in episodes
        )
