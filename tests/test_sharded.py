"""Two processes that hold a part of the weights each end as one process does that holds all (FSDP2, gloo, on the CPU).

Tolerances: sums over processes and passes are taken in another order, so losses agree to rounding (1e-4 is ample), and
Adam turns
rounding of small gradients into steps. A sampled token could fall on the other side of a probability; on the seeds here
none does.
"""
import json, os, shutil, subprocess, sys
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from rlheals.tasks.general_points import GeneralPoints
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import encode
from rlheals.training.models import ASSETS, load_model
from rlheals.training.logprobs import logprobs_and_values
from rlheals.training.ppo import train_ppo
from rlheals.training.rl import rl_stage
from rlheals.training.launching import launch
from rlheals.training.rules import load_profile
from rlheals.training.runs import Run
from rlheals.training.sft import sft_stage
from rlheals.analysis.spectra import angles_table, spectra_table

# minibatches of 3, 3, 3 and 1: the second process has fewer actions, and then none
SETTINGS = load_profile('smoke')['rl'] | dict(envs=5, turns=2, minibatch=3, micro_batch=1, updates=3)
ANSWERS = ['( 5 + 3 )', '11 - 1', '5 * 5 - 1 <end>']
TWO = '''
import json, math, sys, torch
from pathlib import Path
import rlheals.training.ppo
from rlheals.core.distributed import gathered, is_sharded, local_shard, processes
from rlheals.tasks.general_points import GeneralPoints
from rlheals.tasks.protocol import Problem, Task, Verdict
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import encode, generate
from rlheals.training.grpo import train_grpo
from rlheals.training.launching import keep_stopped
from rlheals.training.logprobs import logprobs_and_values
from rlheals.training.models import load_model
from rlheals.training.ppo import train_ppo
from rlheals.training.rules import load_profile
from rlheals.training.runs import Run
home, settings, answers = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
set_up_torch(1)
def fresh(precision='float32'):
    return load_model('tiny', 'cpu', scale=dict(sharding='fsdp2', precision=precision, gradient_checkpointing=False))


us = processes('cpu')
task, said = GeneralPoints('brief', tries=3), {}

# each process has half of every weight
model, tok = fresh()
assert is_sharded(model) and us.num_processes == 2
said['parts'] = [sum(local_shard(p).numel() for p in model.parameters()), model.num_parameters()]

# broken off after an update, and again: the end is the same
log, actions = train_ppo(model, tok, task, settings, 12)
class Interrupted(Exception): pass
def stop_after(n):
    def progress(done, total):
        if done == n: raise Interrupted
    return progress
for n in (1, 2):
    try: train_ppo(fresh()[0], tok, task, settings, 12, progress=stop_after(n), state_file=home/'state')
    except Interrupted: continue
    raise AssertionError('it was not broken off')
resumed, updates = fresh()[0], []
again = train_ppo(
    resumed, tok, task, settings, 12, progress=lambda done, total: updates.append(done), state_file=home / 'state'
)
said['resumed'] = [
    updates,
    log.equals(again[0]),
    actions.equals(again[1]),
    all(torch.equal(local_shard(a), local_shard(b)) for a, b in zip(model.parameters(), resumed.parameters())),
]
if us.is_main_process: log.to_parquet(home/'log.parquet'); actions.to_parquet(home/'actions.parquet')

# a number that is not finite, in one process: both stop, and the weights are those from before
real = rlheals.training.ppo.ppo_loss
def spoilt(*a):
    loss, part = real(*a)
    return (loss * math.nan, part | dict(policy_loss=math.nan)) if us.process_index == 1 else (loss, part)
rlheals.training.ppo.ppo_loss = spoilt
model, _ = fresh()
try:
    with keep_stopped(Run('smoke', root=home / 'runs'), 'rl-000004', model, tok):
        train_ppo(model, tok, task, settings, 12)
except FloatingPointError as e:
    said['stopped'] = str(e)

# bfloat16 is the computation's alone
model, _ = fresh('bfloat16')
contexts, answers = [encode(tok, ['solve 5 11 3 1 :'])] * len(answers), [tok(a)['input_ids'] for a in answers]
total, entropy, _ = logprobs_and_values(model, None, contexts, answers, 1.)
total.sum().backward()
# not as many passes in each
with gathered(model): said['written'] = generate(model, tok, contexts[:1], 8 + us.process_index)
said['half'] = [total.tolist(), sorted({str(t.dtype) for p in model.parameters() for t in (p, p.grad)})]
with gathered(model): said['gathered'] = [str(model.lm_head.weight.dtype), list(model.lm_head.weight.shape)]

# GRPO, each process with all weights or with half of them, which computes activations twice
class Toy(Task):
    name, tries = 'toy', 1
    def sample(self, rng, split): return Problem(self.name, split, (), {})
    def prompt(self, problem): return 'solve 5 11 3 1 :'
    def verify(self, problem, text):
        n = sum(map(ord, text)) % 5  # anything that differs between answers
        return Verdict(float(n), n > 1, 'too little', '' if n > 1 else 'format', dict(sum=float(n)))
ends = []
for sharding in ('none', 'fsdp2'):
    model, _ = load_model(
        'tiny', 'cpu', scale=dict(sharding=sharding, precision='float32', gradient_checkpointing=sharding != 'none')
    )
    set_up_torch(1, seed=3)
    log = train_grpo(
        model,
        tok,
        Toy(),
        load_profile('smoke')['grpo'] | dict(updates=2, epochs=2, generations=4, minibatch=8),
        24,
        seed=5,
        micro_batch=2,
    )
    with gathered(model): ends.append((log, [p.detach().clone() for p in model.parameters()]))
base = [*load_model('tiny', 'cpu')[0].parameters()]
said['grpo'] = [
    max((a - b).norm().item() / (a - c).norm().item() for a, b, c in zip(ends[0][1], ends[1][1], base)),
    (ends[0][0].value - ends[1][0].value).abs().max(),
    ends[0][0].query('metric == "gradient_norm"').value.min(),
]
(home/f'said-{us.process_index}.json').write_text(json.dumps(said))
'''


@pytest.fixture(scope='module', autouse=True)
def no_gpu():
    "All of this is for the CPU."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('CUDA_VISIBLE_DEVICES', '')
        yield


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A smoke run in one process, and sharded over two, which compute activations twice; as far as the end of RL from
    its last SFT checkpoint.

    At small learning rates, which do not amplify rounding: at the default one a last bit becomes 0.2 % of the loss
    within four steps."""
    out = {}
    for n, more in ((1, ()), (2, ('scale.sharding=fsdp2', 'scale.gradient_checkpointing=true'))):
        run = Run(
            'smoke',
            (
                f'sft.processes={n}',
                f'rl.processes={n}',
                'sft.threads=1',
                'rl.envs=9',
                'sft.learning_rate=3e-5',
                'rl.learning_rate=3e-5',
                'model.device=cpu',
                'storage.max_shard_size=1MB',
                *more,
            ),
            0,
            tmp_path_factory.mktemp(f'sharded{n}'),
        )
        out[n] = (run, sft_stage(run), rl_stage(run, 4))
    return out


def test_sharded_losses_are_those_of_one_process(runs):
    (_, sft, rl), (_, sft2, rl2) = runs[1], runs[2]
    assert sft[['split', 'problems', 'checkpoint', 'metric']].equals(
        sft2[['split', 'problems', 'checkpoint', 'metric']]
    )
    np.testing.assert_allclose(sft2['value'], sft['value'], rtol=1e-4)
    assert rl[['update', 'metric']].equals(rl2[['update', 'metric']])
    np.testing.assert_allclose(rl2['value'], rl['value'], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('stage', ['sft', 'rl'])
def test_sharded_checkpoints_are_ordinary_directories(runs, stage):
    "The same files, several for the weights; they open in one process, with the weights of one process."
    one, two = (run.checkpoint(stage, 4) for run, *_ in (runs[1], runs[2]))
    assert (
        sorted(f.name for f in one.iterdir()) == sorted(f.name for f in two.iterdir())
        and len(list(two.glob('model-*.safetensors'))) > 1
    )
    for name in ('config.json', 'tokenizer.json'): assert (one/name).read_bytes() == (two/name).read_bytes(), name
    a, b = (load_model(p, device='cpu')[0].state_dict() for p in (one, two))
    before = load_model('tiny', device='cpu')[0].state_dict()
    assert a.keys() == b.keys()
    for name in a:
        moved = (a[name] - before[name]).norm()
        assert moved > 0 and (a[name] - b[name]).norm() <= .01 * moved, name


def test_sharded_runs_have_the_spectra_of_one_process(runs):
    tables = []
    for run, *_ in runs.values():
        at = dict(base=run.checkpoint('sft', 0), sft=run.checkpoint('sft', 4), rl=run.checkpoint('rl', 4))
        tables.append(
            (spectra_table(at, dtype='float64'), angles_table(dict(sft=(at['base'], at['sft'])), dtype='float64'))
        )
    (values, angles), (values2, angles2) = tables
    np.testing.assert_allclose(values2['value'], values['value'], rtol=1e-4)
    assert (abs(angles2['value'] - angles['value']) <= 1e-2 * angles['value'].max()).all()


def test_grpo_does_not_mind(two):
    for said in two[1]:
        weights, log, gradient = said['grpo']
        assert weights < 1e-3 and log < 1e-3 and gradient > 0, said['grpo']


def files_of(run):
    return sorted(str(p.relative_to(run.dir)) for p in run.dir.rglob('*') if p.is_file() and 'logs' not in p.parts)


def test_sharded_baselines_are_those_of_one_process(runs, tmp_path):
    """The same answers are sampled, and nearly all of the evaluation's come out the same: an argmax can fall otherwise
    by rounding."""
    from rlheals.beyond.baselines import baselines_stage
    copies = []
    for n, (run, *_) in runs.items():  # RL hardly moves in so few updates: another checkpoint stands in for its end
        copies.append(replace(run, root=shutil.copytree(run.root, tmp_path/str(n))))
        shutil.rmtree(copies[-1].checkpoint('rl', 4))
        shutil.copytree(copies[-1].checkpoint('sft', 2), copies[-1].checkpoint('rl', 4))
    one, two = map(baselines_stage, copies)
    assert files_of(copies[0]) == files_of(copies[1])
    columns = ['stage', 'checkpoint', 'split', 'problems', 'episode', 'metric']
    assert one[columns].equals(two[columns]) and (abs(one['value'] - two['value']) < 1e-6).mean() > .95
    kept, moved = (one[(one.split == 'train') & (one.stage == s)] for s in ('rejection', 'further_sft_equal'))
    assert kept[kept.metric == 'answers'].value.min() > 0 and kept.value.equals(two.loc[kept.index].value)
    assert moved.metric.tolist() == ['distance', 'rl_distance', 'factor'] and moved.value.min() > 0
    train = one[one.split == 'train']
    np.testing.assert_allclose(two.loc[train.index].value, train.value, rtol=1e-2)  # see the ends of SFT and RL above


def test_grpo_as_a_stage_of_a_sharded_run(runs):
    from rlheals.training.grpo import grpo_stage
    one, two = (grpo_stage(run, 4) for run, *_ in runs.values())  # each process has chances of its own, so they differ
    run = runs[2][0]
    assert (
        set(zip(one['update'], one['metric'])) & {(0, 'reward'), (0, 'gradient_norm')}
        == {(0, 'reward'), (0, 'gradient_norm')}
        <= set(zip(two['update'], two['metric']))
        and two['value'].notna().all()
    )
    assert run.weights('grpo', 4).exists() and load_model(run.checkpoint('grpo', 4), 'cpu')


def test_sharded_runs_leave_one_set_of_files(runs):
    files = [files_of(run) for run, *_ in runs.values()]
    assert files[0] == files[1]


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes say of a sharded model, and where they wrote."
    home = tmp_path_factory.mktemp('two')
    (home/'two.py').write_text(TWO)
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'accelerate.commands.launch',
            '--multi_gpu',
            '--num_processes',
            '2',
            '--num_machines',
            '1',
            '--mixed_precision',
            'no',
            '--dynamo_backend',
            'no',
            '--main_process_port',
            '0',
            home / 'two.py',
            home,
            json.dumps(SETTINGS),
            json.dumps(ANSWERS),
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HUB_OFFLINE='1'),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home, [json.loads((home/f'said-{i}.json').read_text()) for i in (0, 1)]


def test_each_process_holds_its_part(two):
    own, whole = zip(*(said['parts'] for said in two[1]))
    assert sum(own) == whole[0] and max(own) < .51 * whole[0]


def test_minibatches_that_cannot_be_shared_evenly(two):
    "One process has fewer actions than the other, or none, and the log is that of one process."
    set_up_torch(1)
    log, actions = train_ppo(
        load_model('tiny', 'cpu')[0], load_model('tiny', 'cpu')[1], GeneralPoints('brief', tries=3), SETTINGS, 12
    )
    log2, actions2 = pd.read_parquet(two[0]/'log.parquet'), pd.read_parquet(two[0]/'actions.parquet')
    assert log[['update', 'metric']].equals(log2[['update', 'metric']])
    # three updates of single actions, each a step of Adam
    np.testing.assert_allclose(log2['value'], log['value'], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(actions2['reward'], actions['reward'])


def test_a_sharded_run_that_is_broken_off_ends_as_if_it_had_not_been(two):
    for said in two[1]: assert said['resumed'] == [[3], True, True, True]


def test_a_number_that_is_not_finite_stops_all_processes(two):
    home, said = two
    assert all('PPO loss is nan' in s['stopped'] for s in said)
    kept, base = (
        load_model(p, 'cpu')[0].state_dict()
        for p in (Run('smoke', root=home / 'runs').path('partial', 'rl-000004-stopped'), 'tiny')
    )
    assert all(torch.equal(kept[n], base[n]) for n in base)


def test_bfloat16_is_the_precision_of_the_computation_alone(two):
    set_up_torch(1)
    model, tok = load_model('tiny', 'cpu')
    with torch.no_grad():
        exact = logprobs_and_values(
            model, None, [encode(tok, ['solve 5 11 3 1 :'])] * len(ANSWERS), [tok(a)['input_ids'] for a in ANSWERS]
        )[0].tolist()
    for said in two[1]:
        total, types = said['half']
        assert types == ['torch.float32'] and total != exact
        np.testing.assert_allclose(total, exact, rtol=.03)
        assert said['gathered'] == ['torch.bfloat16', [296, 128]] and len(said['written']) == 1


def test_adapters_are_not_sharded():
    with pytest.raises(ValueError, match='scale.sharding'):
        load_profile('smoke', ['scale.sharding=fsdp2', 'sft.processes=2', 'lora.rank=4'])


def test_zero3_is_refused_without_deepspeed_and_set_up_by_a_file_that_accelerate_reads(tmp_path):
    "DeepSpeed itself has not been run."
    from importlib.util import find_spec
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(ASSETS/'accelerate'/'zero3.yaml'))
    assert config.distributed_type == 'DEEPSPEED' and config.deepspeed_config['zero_stage'] == 3
    if find_spec('deepspeed') is None:
        with pytest.raises(ValueError, match='DeepSpeed'):
            launch(Run('smoke', ('scale.sharding=zero3', 'sft.processes=2'), root=tmp_path), 'sft')
