"""A catalogue of what can be wrong with what a user gives: each ends within five seconds of computing, names the value,
and says what would be right."""
import json, os, resource, shutil, subprocess, sys
from pathlib import Path
from unittest.mock import patch
import pytest
from rlheals.running.workflow import execute
from rlheals.core import files
from rlheals.training.models import ASSETS
from rlheals.training.rules import load_profile
from rlheals.training.runs import Run
from rlheals.training.settings import PROFILES

BIN = Path(sys.executable).parent
# seen only by loading the model, and to import torch and transformers takes most of five seconds on a small machine
LOADING = ('weights of another architecture', 'a matrix missing')
TOOK = []


def refused(words, cwd, code=2, limit=10, **env):
    """Run `rlheals` with these words; what it said, if it ended at once (`limit`: seconds of the processor) without a
    stack trace and without training anything."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [str(BIN / 'rlheals'), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1') | env,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor: who else is busy on this machine makes no difference
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == code and 'Traceback' not in done.stderr, (done.returncode, done.stdout, done.stderr)
    assert took < limit, took
    TOOK.append(took)
    assert not [*Path(cwd).rglob('losses.parquet'), *Path(cwd).rglob('sft-*')]
    return ' '.join(done.stderr.split())


SETTINGS = [  # setting, and what the message must say beside its name
    # wrong types
    ('sft.max_steps=many', 'an integer'),
    ('sft.max_steps=1.5', 'an integer'),
    ('sft.max_steps=', 'an integer'),
    ('sft.max_steps=true', 'an integer'),
    ('rl.learning_rate=fast', 'a number'),
    ('rl.learning_rate=[1]', 'a number'),
    ('sft.checkpoints=a,b', 'an integer'),
    ('spectra.shares=half', 'a number'),
    ('rl.log_kl=perhaps', 'true or false'),
    ('rl.updates={"a":1}', 'an integer'),
    # out of range
    ('sft.learning_rate=0', 'above 0'),
    ('sft.learning_rate=-1e-3', 'above 0'),
    ('sft.learning_rate=NaN', 'above 0'),
    ('sft.learning_rate=Infinity', 'above 0'),
    ('rl.learning_rate=1e999', 'above 0'),
    ('rl.gamma=1.1', 'between 0 and 1'),
    ('rl.lam=-1', 'between 0 and 1'),
    ('rl.clip=0', 'above 0'),
    ('rl.temperature=0', 'above 0'),
    ('eval.temperature=-1', 'at least 0'),
    ('eval.temperature=NaN', 'at least 0'),
    ('rl.entropy_coef=-0.1', 'at least 0'),
    ('sft.batch_size=0', 'at least 1'),
    ('rl.envs=-4', 'at least 1'),
    ('rl.epochs=0', 'at least 1'),
    ('rl.minibatch=100000', 'at most rl.envs'),
    ('rl.micro_batch=0', 'at least 1'),
    ('sft.checkpoints=-1', 'at least 0'),
    ('surgery.ranks=0', 'above 0 and at most 1'),
    ('surgery.ranks=', 'one or more shares'),
    ('spectra.shares=1.5', 'at most 1'),
    ('surgery.blocks=0', 'at least 1'),
    ('lora.rank=-1', 'at least 0'),
    ('lora.alpha=0', 'above 0'),
    ('baselines.share=2', 'between 0 and 1'),
    ('preserve.share=0', 'above 0'),
    ('sft.threads=0', 'at least 1'),
    ('sft.processes=7', 'divisor'),
    ('rl.processes=1000', 'at most rl.envs'),
    ('grpo.generations=1', 'at least 2'),
    ('grpo.minibatch=3', 'a multiple of grpo.generations=8'),
    ('grpo.responses=7', 'multiple'),
    ('rl.starts=', 'one or more'),
    ('rl.starts=3', 'among sft.checkpoints'),
    ('baselines.rounds=1000', 'at most rl.updates'),
    ('task.tries=0', 'tries'),
    # empty data
    ('sft.examples=0', 'at least 1'),
    ('sft.test_examples=0', 'at least 1'),
    ('eval.episodes=0', 'at least 1'),
    ('grpo.responses=0', 'at least 1'),
    ('drift.prompts=0', 'at least 1'),
    ('warning.prompts=0', 'at least 1'),
    ('explorer.problems=0', 'at least 1'),
    # unknown names
    ('sft.max_step=20', 'did you mean sft.max_steps'),
    ('learning_rate=1', 'no setting'),
    ('sft=1', 'no setting'),
    ('sft.max_steps', 'not of the form'),
    ('=1', 'no setting'),
    ('rl.engine=sglang', 'one of transformers, vllm'),
    ('surgery.edits=both', "'directions' and any of"),
    ('preserve.methods=dropout', 'rpsft-'),
    ('sft.schedule=linearly', 'constant_with_warmup'),
    ('grpo.schedule=x', 'cosine'),
    ('rl.schedule=linear', 'one of cosine, constant'),
    ('model.dtype=float33', 'bfloat16'),
    ('model.device=tpu', 'cuda'),
    ('scale.sharding=fsdp', 'none, fsdp2, zero3'),
    ('scale.sharding=fsdp2', 'sft.processes'),
    ('scale.precision=float16', 'one of float32, bfloat16'),
    ('cluster.rl_gpus=-1', 'at least 0'),
    ('cluster.sft_memory=0', 'above 0'),
    ('cluster.other_hours=NaN', 'above 0'),
    ('model.name=model.gguf', 'a .gguf file'),
    ('task.style=haiku', 'style'),
    ('task.name=rank', 'with --task rank'),
    ('base.steps=100', 'model.name=anew'),
    ('model.name=my model', 'a .gguf file, a name on the hub'),
    ('model.name=/no/such/place', 'a .gguf file, a name on the hub'),
]


@pytest.mark.parametrize('setting, says', SETTINGS)
def test_a_setting_that_cannot_be(setting, says):
    with pytest.raises(ValueError) as e: load_profile('tiny', [setting])
    key = setting.partition('=')[0]
    assert says in str(e.value) and key in str(e.value), e.value


WORDS = [  # what is given on the command line
    (['--profile', 'smokey'], 'tiny, smoke'),
    (['--set', 'sft.max_step=20'], 'did you mean sft.max_steps'),
    (['--set', 'rl.updates=many'], 'an integer'),
    (['--task', 'chess'], 'general_points'),
    (['--task', 'no_module:Task'], 'no_module'),
    (['--task', 'json:Task'], 'json'),
    (['--figure', 'F99'], 'F14'),
    (['--seeds', '0'], 'seeds'),
    (['--jobs', '-1'], 'jobs'),
    (['--log', 'paper'], 'tensorboard'),
    (['--set', 'model.device=cuda'], "this machine has no device 'cuda'"),
    (['--runs', 'file'], 'file'),
    (
        ['--set', 'model.name=Qwen/Qwen2.5-7B-Instruct'],
        'not on this machine and cannot be downloaded from the Hugging Face hub: check its name and the network',
    ),
]


@pytest.mark.parametrize('words, says', WORDS)
def test_words_that_cannot_be(tmp_path, words, says):
    import torch
    if 'model.device=cuda' in words and torch.cuda.is_available(): pytest.skip('there is a GPU here')
    (tmp_path/'file').write_text('')
    said = refused(
        ['reproduce', *(['--profile', 'smoke'] if '--profile' not in words else []), *words],
        tmp_path,
        1 if 'file' in words else 2,
    )
    assert says in said, said


PLANS = [  # what cannot be planned, or does not fit
    (['--gpu', 'v100'], 'h100', 2),
    (['--profile', 'qwen2.5'], 'qwen2.5-7b', 2),
    (['--profile', 'llama3.2-11b', '--gpus', '1', '--gpu', 'h100'], 'lora.rank=16', 1),
    (['--profile', 'qwen2.5-7b', '--gpus', '4', '--gpu', 'rtx4090'], '23.5 GiB, most of it optimiser', 1),
    (['--set', 'model.name=nobody/nothing', '--gpu', 'h100'], 'its config.json is neither here nor on the hub', 2),
]


@pytest.mark.parametrize('words, says, code', PLANS)
def test_plans_that_cannot_be(tmp_path, words, says, code):
    said = refused(['plan', *words], tmp_path, code, limit=20)  # counting the tokens of prompts takes a tokenizer
    assert says in said, said


def test_a_model_whose_training_does_not_fit(tmp_path):
    """Its weights would, what training keeps beside them would not: on a processor nothing else could be done about it
    than ending the process."""
    from rlheals.training.models import ASSETS
    shutil.copytree(ASSETS/'tiny', tmp_path/'model')
    said = refused(
        [
            'reproduce',
            '--profile',
            'smoke',
            '--set',
            f'model.name={tmp_path / "model"}',
            '--set',
            'sft.batch_size=4000000',
            '--set',
            'sft.examples=4000000',
        ],
        tmp_path,
        limit=10,
    )
    assert 'smoke does not fit: sft takes' in said and 'a smaller sft.batch_size' in said, said


def test_a_model_without_network(tmp_path):
    "Not offline by a switch, but because there is no way to the hub: no long waiting for it."
    said = refused(
        ['reproduce', '--profile', 'smoke', '--set', 'model.name=nobody/no-such-model-at-all'],
        tmp_path,
        HF_HUB_OFFLINE='0',
        HF_ENDPOINT='http://127.0.0.1:9',
    )
    assert "the model 'nobody/no-such-model-at-all' is not on this machine" in said, said


def model_dir(path, change):
    "A copy of the tiny model, changed."
    shutil.copytree(ASSETS/'tiny', path)
    (path/'SHA256SUMS').unlink(missing_ok=True)
    change(path)
    return path


def edit_json(name, **values):
    return lambda path: (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | values))


def weights(change):
    def do(path):
        from safetensors.torch import load_file, save_file
        kept = load_file(path/'model.safetensors')
        change(kept); save_file(kept, path/'model.safetensors', metadata=dict(format='pt'))
    return do


def larger_vocabulary(path):
    words = json.loads((path/'tokenizer.json').read_text())
    words['added_tokens'] += [dict(words['added_tokens'][0], id=5000 + k, content=f'<extra {k}>') for k in range(900)]
    (path/'tokenizer.json').write_text(json.dumps(words))


def no_tokenizer(path):
    for f in path.glob('tok*'): f.unlink()


MODELS = {  # what is done to a model, and what must be said of it
    'no config': (lambda p: (p / 'config.json').unlink(), 'config.json'),
    'a config that is no JSON': (lambda p: (p / 'config.json').write_text('{'), 'config.json'),
    'an unknown kind': (edit_json('config.json', model_type='brain', architectures=['BrainForCausalLM']), 'brain'),
    'no weights': (lambda p: (p / 'model.safetensors').unlink(), 'model.safetensors'),
    'weights cut short': (
        lambda p: (p / 'model.safetensors').write_bytes((p / 'model.safetensors').read_bytes()[:100_000]),
        'weights cannot be read',
    ),
    'weights that are text': (lambda p: (p / 'model.safetensors').write_text('not weights'), 'weights cannot be read'),
    'weights of another architecture': (
        edit_json('config.json', model_type='gpt2', architectures=['GPT2LMHeadModel'], n_embd=128, n_head=4, n_layer=4),
        'missing or have another shape',
    ),
    'weights of another shape': (edit_json('config.json', intermediate_size=200), 'other shapes'),
    'a matrix missing': (
        weights(lambda w: w.pop('model.layers.1.mlp.up_proj.weight')),
        'model.layers.1.mlp.up_proj.weight',
    ),
    'not a number': (weights(lambda w: w['model.norm.weight'].__setitem__(0, float('nan'))), 'model.norm.weight'),
    'infinity': (weights(lambda w: w['model.norm.weight'].__setitem__(0, float('inf'))), 'infinite or NaN'),
    'no tokenizer': (no_tokenizer, 'tokenizer'),
    'the tokenizer of another model': (larger_vocabulary, 'the model embeds only'),
    'a tokenizer that is no JSON': (
        lambda p: (p / 'tokenizer.json').write_text('{"version":'),
        'tokenizer.json cannot be read',
    ),
}


@pytest.mark.parametrize('kind', MODELS)
def test_a_model_that_cannot_be(tmp_path, kind):
    change, says = MODELS[kind]
    path = model_dir(tmp_path/'mine', change)
    said = refused(
        ['reproduce', '--profile', 'smoke', '--set', f'model.name={path}'],
        tmp_path,
        limit=20 if kind in LOADING else 10,
    )
    assert says in said and 'mine' in said, said


def huge(path):
    "A model of forty billion parameters that takes no room: a sparse file."
    model_dir(path, lambda p: None)
    head = json.dumps(
        dict(
            w=dict(dtype='F32', shape=[200_000, 200_000], data_offsets=[0, 160_000_000_000]),
            e=dict(dtype='F32', shape=[384, 128], data_offsets=[160_000_000_000, 160_000_196_608]),
        )
    ).encode()
    with open(path/'model.safetensors', 'wb') as f:
        f.write(len(head).to_bytes(8, 'little') + head)
        f.truncate(8 + len(head) + 160_000_196_608)
    return path


def test_a_model_that_does_not_fit(tmp_path):
    said = refused(['reproduce', '--profile', 'smoke', '--set', f'model.name={huge(tmp_path/"huge")}'], tmp_path)
    assert 'smoke does not fit: sft takes' in said and 'optimiser (298.0 GiB)' in said and 'lora.rank' in said, said


def test_checkpoints_that_do_not_fit_on_the_disk(tmp_path):
    run, usage = Run('smoke', root=tmp_path), shutil.disk_usage(tmp_path)
    with (
        patch.object(files.shutil, 'disk_usage', lambda path: usage._replace(free=1_000_000)),
        pytest.raises(
            ValueError, match='the disk of .* has only 1.0 MB left, but the 6 checkpoints of this run need .*: free'
        ),
    ):
        execute(run, say=lambda line: None)
    assert not [*tmp_path.rglob('*.parquet')]


DAMAGE = {
    'cut short': lambda data: data[: len(data) // 2],
    'one bit flipped': lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    'empty': lambda data: b'',
    'something else': lambda data: b'x' * len(data),
}


@pytest.mark.parametrize('kind', DAMAGE)
@pytest.mark.parametrize('sealed', [True, False])
def test_a_table_that_is_damaged(tmp_path, kind, sealed):
    "With its checksum any damage is seen; without one, what cannot be read is still said in a sentence."
    import pandas as pd
    run = Run('smoke', root=tmp_path)
    run.save(pd.DataFrame(dict(checkpoint=[0, 1], value=[3., 2.])), 'losses')
    path = run.table('losses')
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    if not sealed:
        if kind == 'one bit flipped': pytest.skip('cannot be seen without a checksum')
        path.with_name(f'.{path.name}.sha256').unlink()
    with pytest.raises(ValueError, match='losses.parquet.*rlheals reproduce --repair'): run.load('losses')


def test_how_long_it_took(say):
    say(
        f'bad input: {len(SETTINGS)} settings, {len(TOOK)} commands refused, each in at most '
        f'{max(TOOK, default=0):.1f} s of the processor'
    )


def test_every_profile_is_right():
    for name in PROFILES: load_profile(name)
