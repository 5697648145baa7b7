"""The house: what ships is what the notebooks say, and chapters only build on earlier ones."""
import ast, json, re, shutil, statistics, subprocess, sys
from pathlib import Path
import pytest
from rlheals.training.rules import load_profile

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PARTS = 'core tasks training analysis results beyond running'.split()  # each imports from those before it
CHAPTERS = {  # module -> notebook, in reading order
    m[1]: p for p in sorted((ROOT/'nbs').glob('[0-9]_*/[0-9]*.ipynb'))
    if (m := re.search(r'#\| default_exp ([\w.]+)', p.read_text())) and not m[1].endswith('__init__')
}


def cells(path): return json.loads(path.read_text())['cells']


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the files under version control (or to be)."
    to = tmp_path_factory.mktemp('house')
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split('\n')
    for n in filter(None, names):
        if (ROOT/n).is_file():
            (to/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/n, to/n)
    return to


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }


def test_export_and_clean_leave_no_diff(copy):
    before = contents(copy)
    for command in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([str(BIN/command)], cwd=copy, check=True, capture_output=True)
    after = contents(copy)
    assert sorted(before) == sorted(after)
    assert [n for n in before if before[n] != after[n]] == []


def test_export_writes_the_package(copy):
    "The check above can fail: without the package, export makes it again."
    (copy/'rlheals'/'tasks'/'protocol.py').unlink()
    subprocess.run([str(BIN/'nbdev_export')], cwd=copy, check=True, capture_output=True)
    assert (copy/'rlheals'/'tasks'/'protocol.py').read_bytes() == module_file('tasks.protocol').read_bytes()


def test_readme_is_made_from_index():
    from rlheals.running.readme import readme
    assert (ROOT/'README.md').read_text() == readme(ROOT/'nbs'/'index.ipynb'), 'run `rlheals readme`'


def test_the_list_of_chapters_is_current():
    from rlheals.running.readme import contents
    shown = [''.join(out['data']['text/markdown']) for cell in cells(ROOT/'nbs'/'chapters.ipynb')
             for out in cell.get('outputs', ()) if 'text/markdown' in out.get('data', {})]
    assert [text.strip() for text in shown] == [contents(ROOT/'nbs').strip()], 'execute nbs/chapters.ipynb'


def test_readme_is_a_page():
    "Both commands are seen without scrolling, and the whole is read in five minutes."
    lines = (ROOT/'README.md').read_text().splitlines()
    assert len(lines) <= 140 and sum(len(l.split()) for l in lines) <= 1400
    assert [i for i, l in enumerate(lines, 1) if l.startswith('pip install -e')][1] < 25


def test_readme_points_to_what_exists():
    for link in re.findall(r'\]\(([^)#]+)\)', (ROOT/'README.md').read_text()):
        assert link.startswith('http') or (ROOT/link).exists(), link


def needs(path):
    "The modules of the package that a file imports, at its top or in its functions."
    where = path.relative_to(ROOT).with_suffix('').parts
    for n in ast.walk(ast.parse(path.read_text())):
        if not isinstance(n, ast.ImportFrom): continue
        parts = [*(where[:-n.level] if n.level else ()), *(n.module or '').split('.')]
        if parts[0] != 'rlheals': continue
        named = '.'.join(filter(None, parts[1:]))
        yield from [named] if named in CHAPTERS else [f'{named}.{a.name}'.strip('.') for a in n.names]


def module_file(module): return ROOT/'rlheals'/f'{module.replace(".", "/")}.py'


def test_every_chapter_is_a_module_of_its_part():
    assert len(CHAPTERS) > 80 and list(dict.fromkeys(m.split('.')[0] for m in CHAPTERS)) == PARTS
    for module, path in CHAPTERS.items():
        part, name = module.split('.')
        assert re.fullmatch(rf'\d_{part}', path.parent.name) and re.fullmatch(rf'\d\d_{name}', path.stem), path
        assert module_file(module).exists()


@pytest.mark.parametrize('module', CHAPTERS)
def test_no_chapter_needs_a_later_one(module):
    order = list(CHAPTERS)
    used = [u for u in needs(module_file(module)) if u in CHAPTERS]
    assert all(order.index(u) < order.index(module) for u in used), (module, used)


@pytest.mark.parametrize('part', PARTS)
def test_a_part_needs_only_earlier_ones(part):
    later = PARTS[PARTS.index(part) + 1:]
    files = list((ROOT/'rlheals'/part).glob('*.py'))
    assert len(files) > 4
    assert not [(f.name, u) for f in files for u in needs(f) if u.split('.')[0] in later]


def test_the_imports_of_chapters_are_seen():
    found = {m: [*needs(module_file(m))] for m in CHAPTERS}
    assert {'tasks.protocol', 'core.files', 'training.models'} <= {u for used in found.values() for u in used}
    assert sum(map(bool, found.values())) > .8 * len(CHAPTERS)


def test_modules_and_cells_are_short():
    "A module is read in one go, a cell of exported code is mostly one definition."
    lines = {m: len(module_file(m).read_text().splitlines()) for m in CHAPTERS}
    assert not {m: n for m, n in lines.items() if n > 300 and m != 'training.settings'}
    code = [(path.name, ''.join(cell['source'])) for path in CHAPTERS.values() for cell in cells(path)
            if cell['cell_type'] == 'code' and re.match(r'#\| *export', ''.join(cell['source']))]
    assert len(code) > 800
    assert statistics.median(len(text.splitlines()) - 1 for _, text in code) <= 10
    kinds = ast.FunctionDef, ast.ClassDef
    definitions = [sum(isinstance(n, kinds) for n in ast.parse(text).body) for _, text in code]
    assert sum(n > 1 for n in definitions) < .1 * len(definitions)


def test_imports_are_light():
    "Heavy libraries are imported where they are used."
    code = f"import sys, rlheals, {', '.join(f'rlheals.{m}' for m in CHAPTERS)}; print(*sys.modules)"
    loaded = set(
        subprocess.run(
            [sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
    )
    assert not loaded & {
        'torch',
        'transformers',
        'trl',
        'datasets',
        'pandas',
        'scipy',
        'statsmodels',
        'matplotlib',
        'seaborn',
        'snakemake',
    }


def test_notebooks_are_small_and_without_errors():
    paths = list((ROOT/'nbs').rglob('*.ipynb'))
    assert len(paths) > 100
    for path in paths:
        assert path.stat().st_size < 1_000_000, path
        kept = (
            json.loads(path.read_text())['metadata']
            .get('widgets', {})
            .get('application/vnd.jupyter.widget-state+json', {})
            .get('state', {})
        )
        for cell in cells(path):
            for out in cell.get('outputs', []):
                assert out['output_type'] != 'error' and out.get('name') != 'stderr', (path, out)
                if view := out.get('data', {}).get('application/vnd.jupyter.widget-view+json'):
                    assert view['model_id'] in kept, (
                        f'{path}: the view of a widget whose state is not kept shows an error where no kernel runs; '
                        'remove it, and leave its text'
                    )


def test_chain_notebooks_have_parameters():
    paths = list((ROOT/'nbs'/'paper').glob('*.ipynb'))
    assert len(paths) == 14
    for path in paths:
        tagged = [c for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
        assert len(tagged) == 1, path


def test_weights_are_small():
    assert sum(p.stat().st_size for p in (ROOT/'rlheals'/'assets').rglob('*') if p.is_file()) < 20e6


# what has changed since the runs from which the explorer of the other tasks and the shortened run are kept
EARLIER = {
    'task.tries',
    'task.checks',
    'sft.learning_rate',
    'sft.schedule',
    'sft.warmup_steps',
    'sft.checkpoints',
    'sft.end',
    'grpo.starts',
    'rl.starts',
    'rl.micro_batch',
    'rl.learning_rate',
    'rl.entropy_coef',
    'surgery.edits',
}


def assert_settings(record, now, sections):
    "The settings of a record are today's, except for those that have changed since; and the gallery says so."
    from rlheals.running.gallery import differing, made_with
    then = {s: record['settings'][s] for s in sections}
    of_then = {f'{s}.{k}' for s, c in then.items() for k in c}  # a setting that came later had no other value then
    if changed := differing(then, now):
        note = made_with(ROOT/'figures')
        assert note and note in (ROOT/'nbs'/'gallery.ipynb').read_text()
        assert set(changed) & of_then <= EARLIER, set(changed) & of_then - EARLIER


def test_the_gallery_says_what_was_made_with_other_settings():
    from rlheals.running.gallery import made_with
    assert made_with(ROOT/'figures') in (ROOT/'nbs'/'gallery.ipynb').read_text()


@pytest.mark.parametrize('figure', 'F1 F2 F3 F4 F5 F6 F7 F8 F9 F10 F11 F12 F13 F14 S1 S5 S6'.split())
def test_committed_figures_come_from_the_default_run(figure):
    from rlheals.running.gallery import differing
    record = json.loads((ROOT/'figures'/f'{figure}.json').read_text())
    assert record['profile'] == 'tiny' and record['changes'] == [] and record['inputs']
    now = load_profile('tiny')
    assert {'model', 'task', 'lora', 'sft', 'rl', 'grpo', 'eval', 'spectra', 'surgery', 'drift'} <= set(
        record['settings']
    )
    assert differing(record['settings'], now) == []
    assert all((ROOT/'figures'/f'{figure}.{e}').stat().st_size for e in ('png', 'svg', 'csv'))


def test_the_shortened_run_is_that_of_the_profile():
    from rlheals.core.files import damaged_outputs
    records, now = sorted((ROOT/'figures'/'smollm2').glob('*.json')), load_profile('smollm2-short')
    beside = {'S1', 'S5', 'S6', 'one_seed', 'answers', 'stages'}
    assert {p.stem for p in records} == {*(f'F{i}' for i in range(1, 15)), *beside}
    for path in records:
        record = json.loads(path.read_text())
        assert load_profile(record['profile'], record['changes']) == now, path
        assert (record['profile'], record['changes'], record['tasks']) == ('smollm2-short', [], ['small_rank']), path
        assert_settings(
            record, now, ('model', 'task', 'sft', 'rl', 'grpo', 'baselines', 'eval', 'spectra', 'surgery', 'drift')
        )
        assert not damaged_outputs(path)


@pytest.mark.parametrize('task', 'general_points navigation rank determinant'.split())
def test_the_explorer_opens_in_a_fresh_clone(task):
    from rlheals.beyond.explorer_table import PARTS, named, open_tables
    path = ROOT/'figures'/'explorer'/f'{task}.parquet'
    assert path.stat().st_size < 1_500_000
    table = open_tables(ROOT/'nowhere', path.parent)[task]
    assert (
        set(table.part) == set(PARTS)
        and set(table.task) == {task}
        and set(named(table)) == {'base', 'SFT_MaxOOD', 'SFT_End', 'RL_End'}
    )
    record, now = json.loads(path.with_suffix('.json').read_text()), load_profile('tiny', task=task)
    assert (
        record['profile'] == 'tiny'
        and record['changes'] == []
        and f'{task}/seed0/tables/explorer.parquet' in record['inputs']
    )
    assert_settings(record, now, ('model', 'task', 'sft', 'rl', 'eval', 'explorer'))


def test_lines_end_at_120_characters():
    "In the code of all notebooks, of the modules (but for what nbdev writes itself) and of the tests."
    code = [(f"{path.name} {cell['id']}", ''.join(cell['source'])) for path in (ROOT/'nbs').rglob('*.ipynb')
            for cell in cells(path) if cell['cell_type'] == 'code']
    files = [(path.name, path.read_text()) for folder in ('rlheals', 'tests') for path in (ROOT/folder).rglob('*.py')
             if path.name != '_modidx.py']
    assert len(code) > 500 and len(files) > 60
    long = [(where, line) for where, text in code + files for line in text.splitlines()
            if len(line) > 120 and not line.startswith('__all__ = ')]
    assert not long, long
