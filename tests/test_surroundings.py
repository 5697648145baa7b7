"""What stands around a run is not looked at: files in the working directory, other clones, kernels of environments that
are gone, a home that cannot be written."""
import json, os, subprocess, sys
import pytest
from rlheals.core import environment
from rlheals.core.environment import ROOT, ChainError, isolated, job_environment
from rlheals.running import plan as planning
from rlheals.running.plan import plan
from rlheals.running.tables import sft_files
from rlheals.beyond.two_checkpoints import read_prompts
from rlheals.training.runs import Run


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A working directory with modules that shadow Python's own and ours, a Jupyter kernel of an environment that is
    gone, and no home."""
    for name in ('random', 'queue', 'json', 'papermill', 'snakemake', 'ipykernel', 'typing_extensions'):
        (tmp_path / f'{name}.py').write_text('x = 1\n')
    (tmp_path/'rlheals').mkdir(); (tmp_path/'rlheals'/'__init__.py').write_text('raise ImportError("another clone")\n')
    kernel = tmp_path/'data'/'kernels'/'python3'; kernel.mkdir(parents=True)
    kernel.joinpath('kernel.json').write_text(
        json.dumps(
            dict(
                argv=['no-such-env/bin/python', '-m', 'ipykernel_launcher', '-f', '{connection_file}'],
                display_name='Python 3',
                language='python',
            )
        )
    )
    for k in ('XDG_CACHE_HOME', 'MPLCONFIGDIR', 'IPYTHONDIR', 'JUPYTER_PATH', 'PYTHONSAFEPATH'):
        monkeypatch.delenv(k, raising=False)
    for k, v in dict(
        JUPYTER_DATA_DIR=tmp_path / 'data', JUPYTER_PREFER_ENV_PATH='0', HOME='/dev/null/nohome', PYTHONPATH=ROOT
    ).items():
        monkeypatch.setenv(k, str(v))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_planned_and_its_jobs_executed(hostile):
    "By the command itself: a plan, and a job that makes SFT's checkpoints."
    go = """
import os
from rlheals.running.tables import sft_files
from rlheals.running.workflow import execute
from rlheals.training.runs import Run
r = Run('smoke', root='runs')
execute(r, targets=[os.path.relpath(p, r.dir) for p in sft_files(r)])
"""
    done = subprocess.run([sys.executable, '-P', '-c', go], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    run = Run('smoke', root=hostile/'runs')
    assert all(f.exists() for f in sft_files(run)) and (run.dir/'.cache').is_dir()


def test_a_notebook_runs_here(hostile):
    "In the interpreter that asks for it, with our package, and the environment is as before afterwards."
    import nbformat
    from nbclient import NotebookClient
    before = dict(os.environ)
    cell = nbformat.v4.new_code_cell(
        'import sys, random, rlheals; print(sys.executable, random.Random(1).random() > 0, rlheals.__file__)'
    )
    book = nbformat.v4.new_notebook(
        cells=[cell], metadata=dict(kernelspec=dict(name='python3', display_name='x', language='python'))
    )
    (hostile/'elsewhere').mkdir()
    with isolated(): NotebookClient(book, resources=dict(metadata=dict(path=str(hostile/'elsewhere')))).execute()
    assert book.cells[0].outputs[0].text.split() == [sys.executable, 'True', str(ROOT/'rlheals'/'__init__.py')]
    assert dict(os.environ) == before


def test_what_is_well_stays_as_it_is(tmp_path, monkeypatch):
    "With a home that can be written, caches stay there; variables that are set keep what they held."
    for k in ('XDG_CACHE_HOME', 'MPLCONFIGDIR'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('JUPYTER_PATH', '/a:/b')
    monkeypatch.setenv('PYTHONPATH', f'/c:{ROOT}')
    env = job_environment(tmp_path/'run')
    assert not {'XDG_CACHE_HOME', 'MPLCONFIGDIR', 'HF_HOME', 'HOME'} & set(env) and env['PYTHONSAFEPATH'] == '1'
    assert env['JUPYTER_PATH'] == f"{tmp_path/'run'/'.jupyter'}:/a:/b" and env['PYTHONPATH'] == f'{ROOT}:/c'
    stamp = (tmp_path/'run/.jupyter/kernels/python3/kernel.json').stat().st_mtime_ns
    assert (
        job_environment(tmp_path / 'run') == env
        and (tmp_path / 'run/.jupyter/kernels/python3/kernel.json').stat().st_mtime_ns == stamp
    )


def test_models_in_a_home_that_can_only_be_read_are_found(tmp_path, monkeypatch):
    for k in ('XDG_CACHE_HOME', 'HF_HOME'): monkeypatch.delenv(k, raising=False)
    (tmp_path/'.cache'/'huggingface').mkdir(parents=True)
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setattr(environment, '_writable', lambda folder: False)
    env = job_environment(tmp_path/'run')
    assert env['HF_HOME'] == str(tmp_path / '.cache' / 'huggingface') and env['XDG_CACHE_HOME'].startswith(
        str(tmp_path / 'run')
    )


@pytest.mark.parametrize('said', ['', 'a reason'])
def test_the_reason_is_never_empty(said, tmp_path, monkeypatch):
    monkeypatch.setattr(
        planning, 'snakemake', lambda *a, **k: [sys.executable, '-c', f'import sys; sys.exit({said!r} or 3)']
    )
    with pytest.raises(ChainError, match=said or r'says nothing \(exit status 3\)'): plan(Run('smoke', root=tmp_path))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path/'runs').write_text('a file')
    with pytest.raises(ChainError, match='cannot write in .*runs'): plan(Run('smoke', root=tmp_path/'runs'))


@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'])
@pytest.mark.parametrize('end', [b'\n', b'\r\n'])
def test_prompts_written_on_windows(mark, end, tmp_path):
    (tmp_path/'p.txt').write_bytes(mark + end.join([b'one', b'', 'zwölf'.encode(), b' three ', b'four']))
    assert read_prompts(tmp_path/'p.txt') == ['one', 'zwölf', 'three', 'four']


def test_prompts_in_another_encoding_are_refused_with_the_remedy(tmp_path):
    (tmp_path/'p.txt').write_text('one\ntwo\nthree\nfour\n', encoding='utf-16')
    with pytest.raises(ValueError, match=r'p\.txt.*UTF-8'): read_prompts(tmp_path/'p.txt')
