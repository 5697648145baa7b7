"""The chain end to end with the `smoke` profile, as a user runs it: from the command line, and notebook by notebook."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from conftest import rlheals
from rlheals.core.environment import ChainError
from rlheals.core.prefork import command, server
from rlheals.running.tables import figures_dir
from rlheals.running.workflow import execute
from rlheals.analysis.evaluation import evaluation_parts, metrics_of
from rlheals.beyond.baselines import METHODS
from rlheals.results.style import EQUAL
from rlheals.running.figures import ACROSS, EXTRA, FIGURES
from rlheals.training.runs import Run
from rlheals.analysis.surgery import surgery_ends

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def run(home): return Run('smoke', root=home/'runs')


def stamps(run):
    "Every file the run is made of (not its logs), with its time."
    return {
        p: p.stat().st_mtime_ns
        for p in run.dir.rglob('*')
        if p.is_file()
        and 'logs' not in p.parts
        and (p.suffix in ('.parquet', '.png', '.svg', '.csv') or p.name == 'model.safetensors')
    }


def papermill(notebook, cwd, as_job=False, **parameters):
    "Execute a notebook of the chain with the profile `smoke`, as `papermill` on the command line or a job of a run."
    flags = [x for k, v in dict(profile='smoke', **parameters).items() for x in ('-p', k, str(v))]
    source = ROOT/'nbs'/'paper'/f'{notebook}.ipynb'
    python_m = command() if as_job else [sys.executable, '-m']
    words = [*python_m, 'papermill', str(source), f'{notebook}.out.ipynb', *flags]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module', autouse=True)
def jobs(home):
    "A server for the jobs of all tests here: one import of what they need. The run of `home` had its own."
    with server(['training', 'model', 'drawing'], os.environ | dict(HF_HUB_OFFLINE='1')) as found:
        os.environ.update(found)
        yield
        for name in found: del os.environ[name]


def names(run, paths): return {str(p.relative_to(run.dir)).replace('general_points/seed0/', '') for p in paths}


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


@pytest.mark.parametrize(
    'notebook, parameters',
    [
        ('01_sft', {}),
        ('02_rl', dict(start=2)),
        ('03_evaluate', dict(table='eval-rl-00')),
        ('04_spectra', {}),
        ('05_surgery', dict(sweep='layers')),
        ('05_surgery', dict(sweep='peak')),
        ('05b_drift', {}),
        ('05d_explorer', {}),
        ('06_figures', dict(figure='F1')),
    ],
)
def test_each_notebook_runs_alone(home, tmp_path, notebook, parameters):
    shutil.copytree(home/'runs'/'smoke', tmp_path/'runs'/'smoke')
    papermill(notebook, tmp_path, as_job=True, **parameters)


def test_a_notebook_alone_makes_what_it_needs(tmp_path):
    "In an empty directory, the notebook of RL first makes the SFT checkpoints."
    papermill('02_rl', tmp_path, start=2)
    run = Run('smoke', root=tmp_path/'runs')
    assert run.checkpoint('rl', 2).is_dir() and not run.checkpoint('rl', 4).exists()


OWN_TASK = '''
from rlheals.tasks.protocol import Problem, Task, Verdict, home_of
from rlheals.tasks.answers import answer_reader

class Largest(Task):
    name, errors, read = 'largest', dict(format='format', answer='solving'), staticmethod(answer_reader('answer'))
    def __init__(self, style='brief', tries=1, most=9): self.style, self.tries, self.most = style, tries, most
    def sample(self, rng, split):
        while home_of(self.name, key := tuple(sorted(rng.integers(0, self.most, 3).tolist()))) != split: pass
        return Problem(self.name, split, key, {})
    def prompt(self, problem): return f'find {problem.key} :'
    def expert(self, problem, rng): return f'{{ answer {problem.key[-1]} }}'
    def verify(self, problem, text):
        right = (self.read(text) or [''])[0] == str(problem.key[-1])
        reward = 1. if right else -1.
        reason, error = ('', '') if right else ('it is not the largest', 'answer')
        return Verdict(reward, right, reason, error, dict(right=reward))
'''


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    "A class in a module that is none of ours goes through the chain, with its own option as a setting."
    (tmp_path/'mine.py').write_text(OWN_TASK)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path)); monkeypatch.syspath_prepend(tmp_path)
    run = Run('smoke', ('task.most=40',), root=tmp_path/'runs', task_name='mine:Largest')
    execute(run, targets=[os.path.relpath(run.table('eval-sft-01'), run.dir)], say=lambda line: None)
    assert set(run.load('eval-sft-01')['task']) == {'mine:Largest'} and run.config['task']['most'] == 40


def test_a_second_seed_has_the_first_as_donor(home, run):
    """The control with another seed's directions: only from the second seed on, and without it the figures say that it
    is missing."""
    second = Run('smoke', seed=1, root=home/'runs')
    figures = [os.path.relpath(figures_dir(run, f)/f'{f}.csv', run.dir) for f in ('F10', 'F11')]
    assert 'other_seed' not in set(pd.read_csv(run.dir/figures[0])['edit']) and not run.table('surgery-seed').exists()
    execute(
        second, seeds=2, targets=[os.path.relpath(second.table('surgery-seed'), run.dir)], say=lambda line: None
    )
    table = second.load('surgery-seed')
    assert set(table['edit']) == {'other_seed'} and set(table['sweep']) == {'rank', 'layers'}
    with pytest.raises(ValueError, match='seed 0 has none'): surgery_ends(run, 'seed')


def test_all_tasks_run_the_chain(home, run):
    """The other three tasks beside the one that is there, by figures that need training, RL, evaluation, baselines,
    surgery and states; F5 then shows four, also when GeneralPoints is asked for alone."""
    wanted = ('F1', 'F4', 'F5', 'F10', 'F14', 'S1')
    # where the test above has left a second seed, figures show it from now on
    rlheals('reproduce', '--profile', 'smoke', cwd=home)
    before = stamps(run)
    done = rlheals(
        'reproduce',
        '--profile',
        'smoke',
        '--task',
        'navigation,rank',
        '--task',
        'determinant',
        *(x for f in wanted for x in ('--figure', f)),
        cwd=home,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = stamps(run)
    assert names(run, (p for p in before if after[p] != before[p])) == {
        f'figures/{f}.{e}' for f in {*wanted} & {*ACROSS} for e in ('png', 'svg', 'csv')
    }
    for task in ('navigation', 'rank', 'determinant'):
        other = Run('smoke', root=home/'runs', task_name=task)
        assert set(other.load(*evaluation_parts(other, 'rl'))['task']) == {task} and other.checkpoint('rl', 4).is_dir()
        assert {p.stem for p in (run.dir/'figures'/task).glob('*.png')} == set(wanted) - set(ACROSS)
        assert json.loads((run.dir/'figures'/task/'F1.json').read_text())['tasks'] == [task]
    assert list(pd.read_csv(run.dir / 'figures' / 'F5.csv')['task'].unique()) == [
        'general_points',
        'navigation',
        'rank',
        'determinant',
    ]
    assert 'nothing to do' in rlheals('reproduce', '--profile', 'smoke', cwd=home).stdout


def test_figures_beyond_the_default_are_made_when_asked_for(home, run):
    "S3 and S4 make the tables that they need, and nothing of them is there otherwise."
    assert (
        not list(run.dir.rglob('preserve-*.parquet'))
        and not run.table('warning').exists()
        and not any((run.dir / 'figures' / f'{f}.png').exists() for f in ('S3', 'S4'))
    )
    before = stamps(run)
    done = rlheals('reproduce', '--profile', 'smoke', '--figure', 'S3', '--figure', 'S4', cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {p for p, t in stamps(run).items() if before.get(p) != t}
    assert names(run, made) == {
        *(f'tables/preserve-{m}.parquet' for m in run.config['preserve']['methods']),
        'tables/warning.parquet',
        *(f'figures/{f}.{e}' for f in ('S3', 'S4') for e in ('png', 'svg', 'csv')),
    }
    assert set(pd.read_csv(run.dir/'figures'/'S3.csv')['method']) == {'sft', *run.config['preserve']['methods']}
    assert 'nothing to do' in rlheals('reproduce', '--profile', 'smoke', '--figure', 'S3', cwd=home).stdout
    papermill('09_beyond', home)


def test_seeds_are_independent_and_drawn_together(home, run):
    done = rlheals('reproduce', '--profile', 'smoke', '--seeds', '2', '--figure', 'F1', '--figure', 'F9', cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    second = Run('smoke', seed=1, root=home/'runs')
    assert (run.load('losses')['value'] != second.load('losses')['value']).any()
    assert json.loads((run.dir/'figures'/'F1.json').read_text())['seeds'] == dict(general_points=[0, 1])
    drawn = pd.read_csv(run.dir/'figures'/'F1.csv')
    assert set(drawn['seed']) == {'all', '0', '1'} and (drawn[drawn.seed == 'all'].seeds == 2).all()
