"""`rlheals edit`: what is written, what is left, and what is refused."""
import json, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from rlheals.beyond.compare import compare
from rlheals.beyond.edit import byte_ranges, edit_checkpoint, undo, undone
from rlheals.training.models import load_model, save_model
from rlheals.analysis.weights import matrices

def quiet(line): pass

@pytest.fixture(scope='module')
def pair(tmp_path_factory):  # a donor, and a target with noise in all its weights; both in bfloat16, in several files
    d = tmp_path_factory.mktemp('pair')
    model, tok = load_model('tiny', 'cpu', 'bfloat16')
    save_model(model, tok, d/'donor', '500KB')
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02 * torch.randn(p.shape))
    save_model(model, tok, d/'target', '500KB')
    return d/'target', d/'donor'

def tensors(folder):
    return {n: W for f in sorted(Path(folder).glob('*.safetensors')) for n, W in load_file(f).items()}

def test_compare_shows_exactly_the_edit(pair, tmp_path):
    target, donor = pair
    edit_checkpoint(target, donor, tmp_path/'edited', top=.5, layers=[1, 2], kinds=('q_proj', 'v_proj'), say=quiet)
    compare(target, tmp_path/'edited', tmp_path/'seen', kinds=None, say=quiet)
    m = pd.read_parquet(tmp_path/'seen'/'matrices.parquet')
    moved = m[m.note != 'same']
    assert set(zip(moved.layer, moved.kind)) == {(a, k) for a in (1, 2) for k in ('q_proj', 'v_proj')}

def test_both_at_the_full_rank_are_the_donors_bytes(pair, tmp_path):
    target, donor = pair
    n = edit_checkpoint(target, donor, tmp_path/'edited', 'both', kinds=None, say=quiet)
    ours, was, theirs = tensors(tmp_path/'edited'), tensors(target), tensors(donor)
    assert n == len(matrices(target, None))
    for name, W in ours.items():
        assert torch.equal(W, theirs[name] if W.ndim == 2 else was[name]), name
    files = {f.name for f in target.iterdir()} - {'SHA256SUMS'}
    assert len([f for f in files if f.endswith('.safetensors')]) > 2
    assert files <= {f.name for f in (tmp_path/'edited').iterdir()}
    for f in files:  # the same division into files, the same headers
        if f.endswith('.safetensors'): assert byte_ranges(target/f) == byte_ranges(tmp_path/'edited'/f)

def test_a_part_of_the_rank_comes_closer_to_the_donor_without_its_values(pair, tmp_path):
    target, donor = pair
    edit_checkpoint(target, donor, tmp_path/'edited', 'values', say=quiet)
    ours, was, theirs = (matrices(c, ('q_proj',)) for c in (tmp_path/'edited', target, donor))
    for n in ours:
        a, b, c = (torch.linalg.svdvals(m[n].load().float()) for m in (ours, was, theirs))
        assert (a - c).norm() < .1 * (b - c).norm()  # up to rounding to bfloat16

def test_fused_matrices_are_edited_in_part(tmp_path):
    from transformers import Phi3Config, Phi3ForCausalLM
    c = Phi3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, pad_token_id=0)
    for seed, name in enumerate(('target', 'donor')):
        torch.manual_seed(seed)
        Phi3ForCausalLM(c).save_pretrained(tmp_path/name)
    edit_checkpoint(tmp_path/'target', tmp_path/'donor', tmp_path/'edited', 'both', kinds=('k_proj',), say=quiet)
    ours, was, theirs = (matrices(tmp_path/n, ('q_proj', 'k_proj', 'v_proj')) for n in ('edited', 'target', 'donor'))
    for n, m in ours.items(): assert torch.equal(m.load(), (theirs if m.kind == 'k_proj' else was)[n].load()), n
    Phi3ForCausalLM.from_pretrained(tmp_path/'edited')

def test_an_adapter_is_merged_and_edited(tmp_path):
    from peft import LoraConfig, get_peft_model
    model, tok = load_model('tiny', 'cpu')
    save_model(model, tok, tmp_path/'base')
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=['q_proj'], init_lora_weights=False))
    tuned.save_pretrained(tmp_path/'adapter')
    config = json.loads((tmp_path/'adapter'/'adapter_config.json').read_text())
    (tmp_path/'adapter'/'adapter_config.json').write_text(
        json.dumps(config | dict(base_model_name_or_path=str(tmp_path/'base'))))
    edit_checkpoint(tmp_path/'adapter', tmp_path/'base', tmp_path/'edited', 'both', layers=[0], say=quiet)
    ours, base, adapted = (matrices(tmp_path/n, ('q_proj',)) for n in ('edited', 'base', 'adapter'))
    for n, m in ours.items():
        assert torch.allclose(m.load(), (base if m.layer == 0 else adapted)[n].load(), atol=1e-6), n

def test_quantised_targets_are_refused_and_nothing_is_left(pair, tmp_path):
    target, _ = pair
    folder = tmp_path/'fp8'
    folder.mkdir()
    W = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 and 'layers' in n else t for n, t in tensors(target).items()}
    scales = {f'{n}_scale_inv': torch.ones(1, 1) for n, t in W.items() if t.dtype == torch.float8_e4m3fn}
    save_file(W | scales, folder/'model.safetensors')
    config = json.loads((target/'config.json').read_text())
    quantised = dict(quant_method='fp8', weight_block_size=[1024, 1024])
    (folder/'config.json').write_text(json.dumps(config | dict(quantization_config=quantised)))
    with pytest.raises(ValueError, match='float8_e4m3fn'): edit_checkpoint(folder, target, tmp_path/'out', say=quiet)
    assert not (tmp_path/'out').exists()

def test_a_sweep_goes_on_where_it_stopped(pair, tmp_path):
    target, donor = pair
    (tmp_path/'score.py').write_text(
        'import sys, pathlib\nfrom rlheals.analysis.weights import weights\n'
        f'log = pathlib.Path({str(tmp_path/"log")!r}); n = len(log.read_text()) if log.exists() else 0\n'
        'if n == 3 and not log.with_name("again").exists(): log.with_name("again").touch(); sys.exit("power cut")\n'
        'log.write_text((n + 1) * "x"); print("score", float(next(weights(sys.argv[1], ("q_proj",)))[3].norm()))\n')
    ask = dict(shares=(.5,), kinds=('q_proj',), say=quiet)
    command = f'{sys.executable} {tmp_path}/score.py {{checkpoint}}'
    with pytest.raises(ValueError, match='power cut'): undo(target, donor, command, tmp_path/'out', **ask)
    assert len(pd.read_csv(tmp_path/'out'/'undo.csv')) == 3
    t = undo(target, donor, command, tmp_path/'out', **ask)
    assert len((tmp_path/'log').read_text()) == 5 == len(t) and (tmp_path/'out'/'undo.png').exists()
    assert not (tmp_path/'out'/'checkpoint').exists() and 'target comes to' in undone(t)

@pytest.mark.parametrize('words, why', [
    (['--layers', '9'], 'no layer 9'), (['--layers', 'x'], '0-7'), (['--take', 'all'], 'take must be one of'),
    (['--top', '0'], 'above 0'), (['--kinds', 'nope'], 'has no nope'), (['--undo'], 'given together'),
    (['--undo', '--evaluate', 'echo 1'], 'checkpoint'), (['--dtype', 'int8'], 'float32 or float64')])
def test_bad_input_is_said_in_one_line(words, why, tmp_path):
    done = subprocess.run([sys.executable, '-m', 'rlheals.running.cli', 'edit', 'tiny', '--donor', 'tiny', '--out',
                           str(tmp_path/'out'), *words], capture_output=True, text=True,
                          env=os.environ | dict(HF_HUB_OFFLINE='1', COLUMNS='300'))
    assert done.returncode == 2 and why in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not (tmp_path/'out').exists()
