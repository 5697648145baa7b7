"""The chain notebook by notebook, and with more than is made by default: tasks, seeds, figures, a task of one's own."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
from conftest import names, rlheals, stamps
from rlheals.core.prefork import command
from rlheals.running.tables import figures_dir
from rlheals.running.workflow import execute
from rlheals.analysis.evaluation import evaluation_parts
from rlheals.running.figures import ACROSS
from rlheals.training.runs import Run
from rlheals.analysis.surgery import surgery_ends

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('jobs')


def papermill(notebook, cwd, as_job=False, **parameters):
    "Execute a notebook of the chain with the profile `smoke`, as `papermill` on the command line or a job of a run."
    flags = [x for k, v in dict(profile='smoke', **parameters).items() for x in ('-p', k, str(v))]
    source = ROOT/'nbs'/'paper'/f'{notebook}.ipynb'
    python_m = command() if as_job else [sys.executable, '-m']
    words = [*python_m, 'papermill', str(source), f'{notebook}.out.ipynb', *flags]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
