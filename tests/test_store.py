"""A run's finished files in a bucket: an S3 of our own (moto) on this machine."""
import os, shutil, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from rlheals.training.models import load_model, save_model
from rlheals.training.runs import Run
from rlheals.core.store import fetch, fetch_checkpoint, put, read_manifest
from rlheals.analysis.weights import matrices, read

pytestmark = pytest.mark.skipif(
    not (find_spec('moto') and find_spec('s3fs') and find_spec('flask')),
    reason="needs moto and s3fs: pip install -e '.[test,s3]'",
)


@pytest.fixture(scope='module')
def bucket():
    "The URL of an empty bucket."
    from moto.server import ThreadedMotoServer
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    before, there = (
        dict(os.environ),
        dict(
            AWS_ENDPOINT_URL=f'http://{host}:{port}',
            AWS_ACCESS_KEY_ID='x',
            AWS_SECRET_ACCESS_KEY='x',
            AWS_DEFAULT_REGION='us-east-1',
        ),
    )
    os.environ.update(there)
    import fsspec
    fsspec.filesystem('s3').mkdir('ours')
    yield 's3://ours/somewhere'
    server.stop()
    os.environ.clear(); os.environ.update(before)


def test_a_checkpoint_in_a_bucket_is_a_checkpoint(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv('RLHEALS_CACHE', str(tmp_path/'cache'))
    model, tok = load_model('tiny', 'cpu')
    save_model(model, tok, tmp_path/'run'/'sft-000002')
    sent = put(tmp_path/'run', bucket)
    assert 'sft-000002/model.safetensors' in sent and put(tmp_path/'run', bucket) == []
    url = f'{bucket}/sft-000002'
    again, _ = load_model(url, 'cpu')
    assert all((a == b).all() for a, b in zip(model.parameters(), again.parameters()))
    name = 'model.layers.0.self_attn.q_proj.weight'
    assert (read(matrices(url)[name]) == model.state_dict()[name]).all()  # spectra, surgery and compare read weights so
    assert Run('smoke', (f'model.name={url}',)).base == url
    with pytest.raises(ValueError, match='no checkpoint at'): fetch_checkpoint(f'{bucket}/sft-000004')
    with pytest.raises(ValueError, match='cannot be reached'): put(tmp_path/'run', 's3://another/bucket')


def test_a_run_goes_on_elsewhere(bucket, home, tmp_path):
    """What one machine has put into a store another one takes from there, and has nothing left to do; a deleted table
    is made again, and only that is sent."""

    def rlheals(cwd, *words):
        return subprocess.run(
            [str(Path(sys.executable).parent / 'rlheals'), *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=os.environ | dict(HF_HUB_OFFLINE='1'),
        )

    ask = ['reproduce', '--profile', 'smoke', '--store', f'{bucket}/smoke']
    done = rlheals(home, *ask)
    assert done.returncode == 0, done.stdout + done.stderr
    held = read_manifest(f'{bucket}/smoke')
    done = rlheals(tmp_path, *ask)
    assert done.returncode == 0 and 'nothing to do' in done.stdout, done.stdout + done.stderr
    here, there = (Run('smoke', root=d/'runs') for d in (tmp_path, home))
    assert here.table('losses').read_bytes() == there.table('losses').read_bytes() and load_model(
        here.checkpoint('rl', 4), 'cpu'
    )
    here.table('drift').unlink()
    shutil.rmtree(here.checkpoint('sft', 1))  # it comes from the store
    done = rlheals(tmp_path, *ask)
    assert done.returncode == 0 and 'nothing to do' in done.stdout, done.stdout + done.stderr  # both did
    assert {n: s for n, s in read_manifest(f'{bucket}/smoke').items() if 'notebooks' not in n} == {
        n: s for n, s in held.items() if 'notebooks' not in n
    }
    assert fetch(tmp_path/'runs'/'smoke', f'{bucket}/smoke') == []
