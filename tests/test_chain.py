"""The chain end to end with the `smoke` profile, as a user runs it from the command line."""
import json, os, shutil
import pandas as pd
import pytest
from conftest import names, rlheals, stamps
from rlheals.core.environment import ChainError
from rlheals.running.workflow import execute
from rlheals.analysis.evaluation import evaluation_parts, metrics_of
from rlheals.beyond.baselines import METHODS
from rlheals.results.style import EQUAL
from rlheals.running.figures import EXTRA, FIGURES
from rlheals.training.runs import Run

pytestmark = pytest.mark.usefixtures('jobs')


def test_everything_is_there(home, run):
    # on request only
    assert not any((run.dir/'figures'/f'{f}.png').exists() for f in EXTRA)
    for f in set(FIGURES) - set(EXTRA):
        for ext in ('png', 'svg', 'csv', 'json'): assert (run.dir/'figures'/f'{f}.{ext}').stat().st_size > 0
        record = json.loads((run.dir/'figures'/f'{f}.json').read_text())
        assert (
            record['profile'] == 'smoke'
            and record['settings'] == run.config
            and all(len(h) == 64 for h in record['inputs'].values())
        )
    assert set(FIGURES) == {*(f'F{n}' for n in range(1, 15)), 'S1', 'S3', 'S4', 'S5', 'S6'}
    said = (home/'said').read_text()
    assert 'rl-000002' in said and 'left' in said
    assert not list(run.dir.rglob('.*.safetensors')) and not list((run.dir/'.progress').glob('*'))


def test_tables_are_tidy(run):
    c = run.config
    for name, steps in (
        evaluation_parts(run, 'sft') | evaluation_parts(run, 'rl') | evaluation_parts(run, 'grpo')
    ).items():
        t = run.load(name)
        assert list(t.columns) == [
            'task',
            'seed',
            'stage',
            'checkpoint',
            'is_end',
            'split',
            'drawn_from',
            'problems',
            'episode',
            'metric',
            'value',
        ]
        # a revision only where a second answer was given, losses only of SFT's checkpoints
        always = set(metrics_of(run.task())) - {'revision', *(['answer_loss'] if 'sft' not in name else [])}
        assert t.drawn_from.eq(t.split).all() and set(t[t.is_end].checkpoint) == set(steps) & {run.sft_end}
        assert (
            (t.metric != 'revision').sum() == 2 * c['eval']['episodes'] * len(always) * len(steps)
            and set(t.metric) - {'revision'} == always
            and set(t['checkpoint']) == set(steps)
            and t.notna().all(axis=None)
        )
    problems = (
        pd.concat(run.load(n) for n in evaluation_parts(run, 'sft') | evaluation_parts(run, 'rl'))
        .groupby('split')['problems']
        .unique()
    )
    # the same problems for every checkpoint
    assert problems.map(len).eq(1).all() and problems.map(lambda f: len(f[0])).eq(16).all()
    others = run.load('baselines')
    assert (
        list(others.columns) == [x for x in t.columns if x != 'is_end']
        and others.notna().all(axis=None)
        and set(others['stage']) == {m + suffix for m in METHODS for suffix in ('', EQUAL)}
        and set(others['checkpoint']) == set(c['baselines']['starts'])
    )
    assert set(others[others['split'] != 'train']['problems']) == set(problems.map(lambda f: f[0]))
    losses = run.load('losses')
    assert set(losses['checkpoint']) == set(c['sft']['checkpoints']) and set(losses['split']) == {'train', 'id', 'ood'}
    for start in c['rl']['starts']:
        t = run.load(f'advantages-{start:06d}')
        assert len(t) == c['rl']['updates'] * c['rl']['envs'] * c['rl']['turns']
        for _, update in t.groupby('update'):  # normalised per update; 0 where all advantages are the same
            assert (
                abs(update['normalised'].mean()) < 1e-4
                and abs(update['normalised'].std() - (update['advantage'].std() > 1e-6)) < 1e-2
            )
    assert t['reward'].nunique() > 1


def test_tables_of_the_weights(run):
    c, change, peak = run.config, run.load('change'), run.load('surgery-peak')
    assert list(change.columns) == ['task', 'seed', 'pair', 'layer', 'kind', 'of', 'value']
    assert set(change['pair']) == {'SFT: end vs base', 'RL: rl_end vs end'} and set(change['of']) == {'update', 'noise'}
    assert change['value'].between(0, 1, inclusive='neither').all()  # every matrix was trained, and a little
    assert set(peak[['edit', 'share']].itertuples(index=False, name=None)) == {('none', 0), ('donor', 1)} | {
        (e, s) for e in ('directions', 'random_matched') for s in c['surgery']['ranks']
    }
    assert peak.groupby(['edit', 'share', 'split', 'metric']).size().max() == c['eval']['episodes']


def test_training_changes_the_weights(run):
    from safetensors.torch import load_file
    last = run.config['sft']['max_steps']
    a, b, c = (
        load_file(p / 'model.safetensors')
        for p in (run.checkpoint('sft', 0), run.checkpoint('sft', last), run.checkpoint('rl', last))
    )
    assert all((a[n] != b[n]).any() and (b[n] != c[n]).any() for n in a if 'proj' in n)


def test_checkpoints_open_with_transformers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = run.checkpoint('rl', run.config['rl']['starts'][0])
    assert (
        AutoModelForCausalLM.from_pretrained(path).num_parameters() > 0 and len(AutoTokenizer.from_pretrained(path)) > 0
    )


def test_a_second_call_does_nothing(home, run):
    before = stamps(run)
    done = rlheals('reproduce', '--profile', 'smoke', cwd=home)
    assert done.returncode == 0 and 'nothing to do' in done.stdout
    assert stamps(run) == before


@pytest.mark.parametrize(
    'deleted, redone',
    [
        ('figures/F3.png', {'figures/F3.png', 'figures/F3.svg', 'figures/F3.csv'}),
        (
            'tables/eval-rl-00.parquet',
            {
                'tables/eval-rl-00.parquet',
                'tables/surgery-impose.parquet',  # one of its ends is RL_End
                *(f'figures/{f}.{e}' for f in ('F1', 'F5', 'F12', 'S5') for e in ('png', 'svg', 'csv')),
            },
        ),
        (
            'checkpoints/rl-000002',
            {
                'checkpoints/rl-000002/model.safetensors',
                'tables/rl-000002.parquet',
                'tables/advantages-000002.parquet',
                'tables/eval-rl-00.parquet',
                'tables/surgery-impose.parquet',
                *(f'figures/{f}.{e}' for f in ('F1', 'F5', 'F6', 'F12', 'S5') for e in ('png', 'svg', 'csv')),
            },
        ),
    ],
)
def test_what_is_deleted_is_made_again_and_nothing_else(home, run, deleted, redone):
    before = stamps(run)
    tables = {p: p.read_bytes() for p in before if p.suffix == '.parquet'}
    path = run.dir/deleted if deleted.startswith('figures') else run.path(*deleted.split('/'))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = rlheals('reproduce', '--profile', 'smoke', cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    after = stamps(run)
    assert set(after) == set(before)
    assert names(run, (p for p in after if after[p] != before[p])) == redone
    assert {p: p.read_bytes() for p in tables} == tables  # the same again, to the byte


def test_baselines_are_shown(run):
    f1, f5 = (pd.read_csv(run.dir/'figures'/f'{f}.csv') for f in ('F1', 'F5'))
    assert {*METHODS, *(m + EQUAL for m in METHODS)} < set(f1['stage'])
    assert {s for s in f5['model'] if s.removesuffix(EQUAL) in METHODS} == set(METHODS)
    own = (
        run.load('baselines').query("stage == 'further_sft' and split == 'id' and metric == 'success'")['value'].mean()
    )
    assert f5.query("model == 'further_sft' and split == 'id' and seed == 'all'")['mean'].item() == own


def test_weights_go_when_nothing_more_is_made_from_them(home):
    """With storage.keep=needed, and checkpoints in several files: a table that needs deleted weights brings them back
    for as long as it takes."""
    settings = 'storage.keep=needed', 'storage.max_shard_size=1MB'
    whole, run = Run('smoke', root=home/'runs'), Run('smoke', settings, root=home/'runs')
    ask = lambda: rlheals(
        'reproduce',
        '--profile',
        'smoke',
        '--figure',
        'F2',
        '--figure',
        'F6',
        *(word for s in settings for word in ('--set', s)),
        cwd=home,
    )
    tables = [
        run.table(n)
        for n in (*evaluation_parts(run, 'sft'), *(f'advantages-{s:06d}' for s in run.config['rl']['starts']))
    ]
    for again in (False, True):
        done = ask()
        assert done.returncode == 0, done.stdout + done.stderr
        assert [t.read_bytes() for t in tables] == [whole.table(t.stem).read_bytes() for t in tables]
        assert run.checkpoint('sft', 2).is_dir() and not list(run.path('checkpoints').rglob('*.safetensors'))
        if again: break
        # of the checkpoints that SFT makes again, RL needs one
        tables[-1].unlink(); (run.dir/'figures'/'F6.png').unlink()
    assert 'nothing to do' in ask().stdout
    shutil.rmtree(run.dir)


def test_dry_run_lists_jobs_and_makes_none(home):
    done = rlheals('reproduce', '--profile', 'smoke', '--set', 'rl.updates=3', '--dry-run', cwd=home)
    assert done.returncode == 0 and 'about' in done.stdout and 'rl' in done.stdout, done.stderr
    assert not (home/'runs'/'smoke_rl.updates=3'/'general_points').exists()


@pytest.mark.parametrize(
    'words, says',
    [
        (['--profile', 'smokey'], 'tiny, smoke'),
        (['--set', 'sft.max_step=20'], 'sft.max_steps'),
        (['--set', 'rl.updates=many'], 'must be an integer'),
    ],
)
def test_wrong_settings_end_at_once(home, words, says):
    done = rlheals('reproduce', *words, cwd=home)
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr
    assert not (home/'runs'/'tiny').exists()


def test_a_failing_stage_says_so_and_the_rest_is_kept(home):
    """A checkpoint that cannot be read, and without checksums is only noticed then: the error names the stage, its log
    and its notebook; the other jobs go on."""
    run = Run('smoke', ('surgery.blocks=1',), 0, home/'runs')
    shutil.copytree(home/'runs'/'smoke', run.dir)
    path = run.checkpoint('rl', 2)/'model.safetensors'
    path.write_bytes(b'broken'); (path.parent/'SHA256SUMS').unlink()
    tables = [run.table(n) for n in ('eval-rl-00', 'eval-sft-00')]
    for t in tables: t.unlink()
    with pytest.raises(ChainError, match='eval-rl-00 failed'):
        execute(run, targets=[t.relative_to(run.dir) for t in tables], say=lambda line: None)
    assert [t.exists() for t in tables] == [False, True]


def test_two_runs_do_not_mix(home, run):
    from rlheals.running.locking import lock_run
    with lock_run(run.dir):
        done = rlheals('reproduce', '--profile', 'smoke', cwd=home)
    assert done.returncode == 1 and f'in use by process {os.getpid()}' in done.stderr
