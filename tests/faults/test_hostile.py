"""What a model writes, a checkpoint holds or a command line says is data: it is never run, and never goes anywhere but
where it points."""
import json, os, pickle, random, shutil, sys, time
from pathlib import Path
import pytest
from conftest import rlheals
from hypothesis import HealthCheck, given, settings, strategies as st
from rlheals.running.tables import figures_dir
from rlheals.running.workflow import execute
from rlheals.training.models import ASSETS, load_model, save_model
from rlheals.training.rules import split_changes
from rlheals.training.runs import Run
from rlheals.core.randomness import seeded
from rlheals.tasks.protocol import load_task

BIN, ROOT = Path(sys.executable).parent, Path(__file__).parents[2]
TASKS = [
    (name, style) for name in ('general_points', 'navigation', 'rank', 'determinant') for style in ('brief', 'paper')
]
PIECES = [
    '{',
    '}',
    '[',
    ']',
    '(',
    ')',
    '"',
    "'",
    ':',
    ',',
    '\\',
    '\n',
    '\t',
    '\0',
    '\ufeff',
    '\u202e',
    '𝟙',
    '²',
    '１',
    'e',
    'E',
    '.',
    '-',
    '+',
    '*',
    '/',
    '**',
    '//',
    '%',
    '!',
    '=',
    '==',
    '_',
    '__',
    '0',
    '1',
    '9' * 30,
    '1e999',
    '-0',
    '0x1f',
    '0b1',
    '1_0',
    'NaN',
    'Infinity',
    'true',
    'null',
    'lambda: 0',
    '__import__("os").system("true")',
    '().__class__',
    'open("/etc/passwd")',
    '{0.__class__}',
    '%s%n',
    '$(touch pwned)',
    '`touch pwned`',
    '<script>',
    '\ud800',
    'J',
    'Q',
    'K',
    'A',
    'cards',
    'number',
    'formula',
    'answer',
    'see',
    'plan',
    'do',
    'current observation',
    'current instruction',
    'action',
    'rank',
    'determinant',
    'matrix',
]


def mutate(rng, text, words):
    """A right answer, spoilt in one to six places: pieces put in, taken out, doubled, moved, or replaced by others'
    pieces."""
    for _ in range(rng.randint(1, 6)):
        i, j = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        kind = rng.randrange(6)
        if kind == 0: text = text[:i] + rng.choice(PIECES) + text[i:]
        elif kind == 1: text = text[:i] + text[min(j, i + 12):]
        elif kind == 2: text = text[:j] + text[i:min(j, i + 200)] + text[j:]
        elif kind == 3: text = text[:i] + rng.choice(words) + text[min(j, i + 12):]
        elif kind == 4: text = text[:i] + chr(rng.choice((rng.randrange(128), rng.randrange(0x110000)))) + text[i + 1:]
        else:
            text = (
                text[::-1]
                if rng.random() < 0.02
                else text[:i]
                + str(rng.choice((-1, 1)) * rng.randrange(10 ** rng.randint(1, 25)))
                + text[min(j, i + 3) :]
            )
    return text[:5000]


def fuzz(name, style, n, seed=0):
    "Give a task's verifier `n` spoilt answers: (the slowest in seconds of the processor, how many were still right)."
    task, rng, slowest, right = load_task(name, style=style), random.Random(f'{name} {style} {seed}'), 0., 0
    problems = [task.sample(seeded(seed, k), 'train') for k in range(50)]
    experts = [task.expert(p, seeded(seed, k)) for k, p in enumerate(problems)]
    words = sorted({w for e in experts for w in e.split()})
    for k in range(n):
        p = problems[k % 50]
        text = mutate(rng, experts[k % 50], words)
        start = time.thread_time()
        try: v = task.verify(p, text)
        except BaseException as e: raise AssertionError(f'{name} ({style}) ends in {e!r} on {text!r}') from e
        slowest = max(slowest, time.thread_time() - start)
        right += v.correct
        assert isinstance(v.correct, bool) and abs(sum(v.parts.values()) - v.reward) < 1e-9 and (v.correct or v.error)
    return slowest, right


@pytest.mark.parametrize('name, style', TASKS)
def test_spoilt_answers(name, style, inputs):
    "No exception, nothing slow, no code run."
    pwned = Path('pwned')
    slowest, right = fuzz(name, style, inputs // len(TASKS))
    # of long answers much may be spoilt that nobody reads
    assert slowest < .5 and right < .9 * inputs / len(TASKS) and not pwned.exists()


@pytest.mark.parametrize('name, style', TASKS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    text=st.one_of(
        st.text(max_size=300),
        st.lists(st.sampled_from(PIECES), max_size=60).map(''.join),
        st.recursive(
            st.none() | st.floats() | st.integers() | st.text(),
            lambda x: st.lists(x) | st.dictionaries(st.text(), x),
            max_leaves=20,
        ).map(lambda x: json.dumps(x)),
    )
)
def test_any_text_is_only_wrong(name, style, text):
    task = load_task(name, style=style)
    v = task.verify(task.sample(seeded(1), 'train'), text)
    assert v.error or v.correct


@pytest.mark.long
def test_a_million_spoilt_answers(say):
    start = time.time()
    slowest = max(fuzz(name, style, 1_000_000 // len(TASKS), seed=1)[0] for name, style in TASKS)
    say(f'a million spoilt answers: no exception, the slowest {1000 * slowest:.1f} ms, in {time.time() - start:.0f} s')
    assert slowest < .5


def test_no_parser_runs_what_it_reads():
    """By the code itself: nothing in the package evaluates text, but for the solver's arithmetic on Python's own syntax
    tree."""
    import ast
    for path in (ROOT/'rlheals').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ('eval', 'exec', 'compile', '__import__'), (path.name, node.lineno)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != 'system' and not any(k.arg == 'shell' for k in node.keywords), (
                    path.name,
                    node.lineno,
                )
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, 'attr', '') == 'load'
                and getattr(getattr(node.func, 'value', None), 'id', '') == 'torch'
            ):
                assert any(k.arg == 'weights_only' and k.value.value is True for k in node.keywords), (
                    path.name,
                    node.lineno,
                )
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, 'attr', '') == 'from_pretrained'
                and 'Auto' in ast.unparse(node.func)
            ):
                assert any(k.arg == 'trust_remote_code' and k.value.value is False for k in node.keywords), (
                    path.name,
                    node.lineno,
                )
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {'pickle', 'dill', 'cloudpickle', 'joblib'} & {a.name for a in node.names}, path.name


class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def test_a_pickle_is_not_opened(tmp_path):
    "Neither as weights of a model nor as the state of a run."
    import torch
    from rlheals.training.rl import rl_stage
    model = shutil.copytree(ASSETS/'tiny', tmp_path/'model')
    (model/'SHA256SUMS').unlink(missing_ok=True); (model/'model.safetensors').unlink()
    (model/'pytorch_model.bin').write_bytes(pickle.dumps(Bomb(tmp_path/'run by weights')))
    with pytest.raises(ValueError, match='cannot load'): load_model(model, 'cpu')
    run = Run('smoke', root=tmp_path/'runs')
    save_model(*load_model('tiny', 'cpu'), run.checkpoint('sft', 4))
    state = run.path('partial', 'rl-000004.pt')
    state.parent.mkdir(parents=True)
    torch.save(dict(key=0, bomb=Bomb(tmp_path/'run by state')), state)
    rl_stage(run, 4)
    assert not list(tmp_path.glob('run by*'))


@pytest.mark.parametrize('part', ['model', 'tokenizer', 'config'])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, part):
    model = shutil.copytree(ASSETS/'tiny', tmp_path/'model')
    (model/'SHA256SUMS').unlink(missing_ok=True)
    (model / 'theirs.py').write_text(
        f'import os; os.mkdir({str(tmp_path / "pwned")!r})\nfrom transformers import LlamaConfig as Config, '
        'LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tok\n'
    )
    auto = dict(
        model=('config.json', dict(AutoModelForCausalLM='theirs.Model')),
        config=('config.json', dict(AutoConfig='theirs.Config')),
        tokenizer=('tokenizer_config.json', dict(AutoTokenizer=[None, 'theirs.Tok'])),
    )
    file, said = auto[part]
    old = json.loads((model/file).read_text())
    if part == 'config': old['model_type'] = 'theirs'
    (model/file).write_text(json.dumps(old | dict(auto_map=said)))
    try: load_model(model, 'cpu')
    except ValueError: pass  # refused, or loaded without it
    assert not (tmp_path/'pwned').exists()


HOSTILE = 'a $(touch pwned) `touch pwned`; touch pwned & "q" \'s\' {x} %s: #n'  # a directory's name


def test_a_path_is_a_path(tmp_path):
    "The strangest name of a directory is only a name: the chain works in it, and nothing else happens."
    home = tmp_path/HOSTILE
    home.mkdir()
    model = shutil.copytree(ASSETS/'tiny', home/'my model; x')
    run = Run('smoke', (f'model.name={model}', 'sft.max_steps=2', 'rl.starts=2'), root=home/'runs')
    execute(
        run,
        targets=['general_points/seed0/tables/eval-sft-00.parquet', str(figures_dir(run) / 'F6.csv')],
        say=lambda line: None,
    )
    assert run.table('eval-sft-00').is_file() and (figures_dir(run)/'F6.csv').is_file()
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == [HOSTILE]
        and sorted(p.name for p in home.iterdir()) == ['my model; x', 'runs']
        and not list(tmp_path.rglob('pwned'))
        and not Path('pwned').exists()
    )


@pytest.mark.parametrize(
    'words',
    [
        ['--set', 'model.name=$(touch pwned)'],
        ['--set', 'sft.schedule="; import os; os.mkdir(\'pwned\'); "'],
        ['--task', 'general_points"; touch pwned; "'],
        ['--profile', 'smoke; touch pwned'],
        ['--figure', '../../F1'],
        ['--task', '../etc'],
        ['--set', 'sft.max_steps=__import__("os").mkdir("pwned")'],
    ],
)
def test_words_are_not_run(tmp_path, words):
    done = rlheals(
        'reproduce', *(['--profile', 'smoke'] if '--profile' not in words else []), *words, '--dry-run', cwd=tmp_path
    )
    assert done.returncode == 2 and 'Traceback' not in done.stderr and not list(tmp_path.rglob('pwned')), done.stderr


@pytest.mark.parametrize(
    'name, value',
    [
        ('changes', '"; import os; os.mkdir("pwned"); "'),
        ('changes', "'''\nimport os; os.mkdir('pwned')\n'''"),
        ('task', '__import__("os").mkdir("pwned")'),
        ('root', '"+__import__("os").mkdir("pwned")+"'),
        ('profile', '\\"; import os; os.mkdir("pwned") #'),
    ],
)
@pytest.mark.parametrize('flag', ['-p', '-r'])
def test_parameters_of_a_notebook_are_not_run(tmp_path, name, value, flag):
    "papermill writes them into a cell: as text, whatever they hold."
    from papermill.parameterize import parameterize_notebook
    from papermill.cli import _resolve_type
    from papermill.iorw import load_notebook_node
    book = load_notebook_node(str(ROOT/'nbs'/'paper'/'01_sft.ipynb'))
    book = parameterize_notebook(book, {name: value if flag == '-r' else _resolve_type(value)})
    [cell] = [c for c in book.cells if 'injected-parameters' in c.metadata.get('tags', [])]
    space, here = {}, Path.cwd()
    os.chdir(tmp_path)
    try: exec(cell.source, space)
    finally: os.chdir(here)
    assert space[name] == value and not list(tmp_path.iterdir())


def test_changes_are_split_where_a_setting_begins():
    assert split_changes('sft.max_steps=20; sft.learning_rate=1e-3') == ['sft.max_steps=20', 'sft.learning_rate=1e-3']
    assert split_changes('model.name=my model; old/x;sft.max_steps=20') == [
        'model.name=my model; old/x',
        'sft.max_steps=20',
    ]
    assert split_changes('') == split_changes(' ; ') == []
