"""The house: what ships is what the notebooks say, and chapters only build on earlier ones."""
import ast, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from rlheals.profiles import load_profile

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CHAPTERS = {m[1]: p for p in sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
            if (m := re.search(r'#\| default_exp (\w+)', p.read_text()))}  # in reading order


def cells(path): return json.loads(path.read_text())['cells']


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the files under version control (or to be)."
    to = tmp_path_factory.mktemp('house')
    names = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\n')
    for n in filter(None, names):
        if (ROOT/n).is_file():
            (to/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/n, to/n)
    return to


def contents(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


def test_export_and_clean_leave_no_diff(copy):
    before = contents(copy)
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([str(BIN/command)], cwd=copy, check=True, capture_output=True)
    after = contents(copy)
    assert sorted(before) == sorted(after)
    assert [n for n in before if before[n] != after[n]] == []


def test_export_writes_the_package(copy):
    "The check above can fail: without the package, export makes it again."
    (copy/'rlheals'/'tasks.py').unlink()
    subprocess.run([str(BIN/'nbdev_export')], cwd=copy, check=True, capture_output=True)
    assert (copy/'rlheals'/'tasks.py').read_bytes() == (ROOT/'rlheals'/'tasks.py').read_bytes()


def test_readme_is_made_from_index():
    from rlheals.docs import readme
    assert (ROOT/'README.md').read_text() == readme(ROOT/'nbs'/'index.ipynb'), 'run `rlheals readme`'


def test_readme_points_to_what_exists():
    for link in re.findall(r'\]\(([^)#]+)\)', (ROOT/'README.md').read_text()):
        assert link.startswith('http') or (ROOT/link).exists(), link


@pytest.mark.parametrize('module', CHAPTERS)
def test_no_chapter_needs_a_later_one(module):
    order = list(CHAPTERS)
    tree = ast.parse((ROOT/'rlheals'/f'{module}.py').read_text())
    used = {n.module.split('.')[1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('rlheals.')}
    assert all(order.index(u) < order.index(module) for u in used), (module, used)


def test_imports_are_light():
    "Heavy libraries are imported where they are used."
    code = f"import sys, rlheals, {', '.join(f'rlheals.{m}' for m in CHAPTERS)}; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & {'torch', 'transformers', 'trl', 'datasets', 'pandas', 'scipy', 'statsmodels', 'matplotlib', 'seaborn', 'snakemake'}


def test_notebooks_are_small_and_without_errors():
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        assert path.stat().st_size < 1_000_000, path
        kept = json.loads(path.read_text())['metadata'].get('widgets', {}).get('application/vnd.jupyter.widget-state+json', {}).get('state', {})
        for cell in cells(path):
            for out in cell.get('outputs', []):
                assert out['output_type'] != 'error' and out.get('name') != 'stderr', (path, out)
                if view := out.get('data', {}).get('application/vnd.jupyter.widget-view+json'): assert view['model_id'] in kept, f'{path}: the view of a widget whose state is not kept shows an error where no kernel runs; remove it, and leave its text'


def test_chain_notebooks_have_parameters():
    for path in (ROOT/'nbs'/'paper').glob('*.ipynb'):
        tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1, path


def test_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT/'rlheals'/'assets').rglob('*') if p.is_file()) < 20e6


@pytest.mark.parametrize('figure', 'F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 F13 F14 S1'.split())
def test_committed_figures_come_from_the_default_run(figure):
    record = json.loads((ROOT/'figures'/f'{figure}.json').read_text())
    assert record['profile'] == 'tiny' and record['changes'] == [] and record['inputs']
    now = load_profile('tiny')
    assert {'model', 'task', 'lora', 'sft', 'rl', 'grpo', 'eval', 'spectra', 'surgery', 'drift'} <= set(record['settings'])
    assert record['settings'] == {s: now[s] for s in record['settings']}  # as the profile is now; it may have got sections that no such figure depends on
    assert all((ROOT/'figures'/f'{figure}.{e}').stat().st_size for e in ('png', 'svg', 'csv'))


def test_the_shortened_run_is_that_of_the_readme():
    from rlheals.files import damaged_outputs
    said = re.search(r'^rlheals reproduce --profile smollm2 (--set (?:.*\\\n)*.*)$', (ROOT/'README.md').read_text(), re.M)[1]
    changes, records = re.findall(r'--set (\S+)', said), sorted((ROOT/'figures'/'smollm2-short').glob('*.json'))
    now = load_profile('smollm2', changes)
    assert len(records) == 15
    for path in records:
        record = json.loads(path.read_text())
        assert record['profile'] == 'smollm2' and record['changes'] == changes, path
        for section in ('model', 'task', 'sft', 'rl', 'grpo', 'baselines', 'eval', 'spectra', 'surgery', 'drift'): assert record['settings'][section] == now[section], (path, section)
        assert not damaged_outputs(path)


@pytest.mark.parametrize('task', 'general_points navigation rank determinant'.split())
def test_the_explorer_opens_in_a_fresh_clone(task):
    from rlheals.explorer import PARTS, named, open_tables
    path = ROOT/'figures'/'explorer'/f'{task}.parquet'
    assert path.stat().st_size < 1_500_000
    table = open_tables(ROOT/'nowhere', path.parent)[task]
    assert set(table.part) == set(PARTS) and set(table.task) == {task} and set(named(table)) == {'base', 'SFT_MaxOOD', 'SFT_End', 'RL_End'}
    record, now = json.loads(path.with_suffix('.json').read_text()), load_profile('tiny', task=task)
    assert record['profile'] == 'tiny' and record['changes'] == [] and f'{task}/seed0/tables/explorer.parquet' in record['inputs']
    assert {s: record['settings'][s] for s in ('model', 'task', 'sft', 'rl', 'eval', 'explorer')} == {s: now[s] for s in ('model', 'task', 'sft', 'rl', 'eval', 'explorer')}
