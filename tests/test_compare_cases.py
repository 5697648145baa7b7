"""Other people's checkpoints: each gives the right numbers, or one line that names what is wrong, before any
decomposition."""
import json, shutil
import pandas as pd
import pytest, torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM,
                          Qwen3MoeConfig, Qwen3MoeForCausalLM)
from rlheals.beyond import compare as module
from rlheals.beyond.compare import compare, results
from rlheals.beyond.in_words import explain
from rlheals.training.models import ASSETS
from rlheals.analysis.decomposition import svd
from rlheals.analysis.surgery import Surgery
from rlheals.analysis.adapters import on_base, open_model, stored_weights
from rlheals.analysis.formats import locate
from rlheals.analysis.weights import check_loaded, matrices, put, read

SMALL = dict(vocab_size=296, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16,
             initializer_range=.2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(moe_intermediate_size=16, num_experts=2, num_experts_per_tok=1)
FIRST = 'model.layers.0.self_attn.q_proj.weight'
PROMPTS = [f'solve {a} 5 3 1 :' for a in range(2, 8)]


def small(path, cls=LlamaForCausalLM, config=LlamaConfig, seed=0, tokenizer=True, **kw):
    torch.manual_seed(seed)
    cls(config(**SMALL | kw)).save_pretrained(path)
    if tokenizer:
        for f in (ASSETS/'tiny').glob('tok*'): shutil.copy(f, path)
    return path


def weights(path): return load_file(path/'model.safetensors')
def write(path, tensors): save_file({n: W.contiguous() for n, W in tensors.items()}, path/'model.safetensors',
                                    metadata=dict(format='pt'))


def changed(source, path, change):
    "A copy of a checkpoint, its tensors changed in place or as `change` returns them."
    shutil.copytree(source, path)
    tensors = weights(path)
    write(path, change(tensors) or tensors)
    return path


def settings(path, name='config.json',
             **new): (path/name).write_text(json.dumps(json.loads((path/name).read_text()) | new))


def noise(tensors, only=('proj',), eps=.1):
    g = torch.Generator().manual_seed(1)
    for n, W in tensors.items():
        if W.dim() == 2 and any(o in n for o in only): tensors[n] = W + eps * W.std() * torch.randn(W.shape,
                generator=g)


def adapter(path, base, trained=.1, **config):
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                           LoraConfig(**dict(r=4, lora_alpha=8, target_modules=['q_proj', 'v_proj'],
                                             task_type='CAUSAL_LM') | config))
    for n, p in model.named_parameters():
        if trained and ('lora_B' in n or 'lora_embedding_A' in n
                        or 'modules_to_save' in n): p.data += trained * torch.randn_like(p)
    model.save_pretrained(path)
    settings(path, 'adapter_config.json', base_model_name_or_path=str(base))
    return path


@pytest.fixture(autouse=True)
def words_only(monkeypatch, request):
    "Figures and the notebook take longer than everything else; one test makes them."
    if request.node.originalname == 'test_all_kinds_of_kinds': return
    def write(tables, given, share, dtype, out, notes, say, leading):
        (out/'compare.json').write_text(json.dumps(explain(tables, given['base'], given['tuned'], given.get('donor'),
                                                           share, dtype, notes, leading)))
    monkeypatch.setattr(module, '_write', write)


def says(out): return json.loads((out/'compare.json').read_text())


def run(tmp, base='base', tuned='tuned', donor=None, **kw):
    "Tables and sentences of a comparison."
    kw = dict(prompts=PROMPTS, ranks=(.5, 1.), say=lambda line: None) | kw
    tables = compare(tmp/base, tmp/tuned, tmp/'out', donor=tmp/donor if donor else None, **kw)
    return tables, says(tmp/'out')


def refused(match, *args, decomposed=False, **kw):
    "One line, before anything is decomposed."
    with pytest.raises(ValueError, match=match) as e, pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'tabulate', lambda *a, **k: pytest.fail('matrices were decomposed first'))
        run(*args, **kw)
    assert '\n' not in str(e.value)


# two readings


@pytest.mark.parametrize('way', [dict(init_lora_weights='pissa'), dict(init_lora_weights='olora'),
                                 dict(init_lora_weights='pissa', use_rslora=True, r=8)])
def test_an_adapter_that_changes_its_base_and_is_not_trained_changes_nothing(tmp_path, way):
    adapter(tmp_path/'tuned', small(tmp_path/'base'), trained=0, **way)
    tables, words = run(tmp_path)
    assert (
        tables['matrices'].change.max() < 1e-5 and 'nothing was tuned' in words['summary'] and 'rotation' not in words
    )
    assert 'same up to rounding in all layers' in words['drift']


@pytest.mark.parametrize('way', [dict(init_lora_weights='pissa'), dict(target_modules=['q_proj', 'embed_tokens']),
                                 dict(use_dora=True), dict(modules_to_save=['lm_head']),
                                 dict(rank_pattern=dict(v_proj=2), alpha_pattern=dict(v_proj=16)),
                                 dict(use_rslora=True), dict(target_modules=['lm_head', 'down_proj']), dict()])
def test_both_readings_of_an_adapter_are_one(tmp_path, way):
    base, path = small(tmp_path/'base'), adapter(tmp_path/'tuned', tmp_path/'base', **way)
    found = matrices(path, None)
    assert check_loaded(open_model(path, 'cpu', tokenizer=False)[0], found) == []
    was = matrices(base, None)
    moved = {m.kind for n, m in found.items() if (read(m) - read(was[n])).norm() > 1e-4}
    want = {'q_proj', 'v_proj'} if not way.get('target_modules') else set(way['target_modules'])
    assert moved == want | set(way.get('modules_to_save', ()))


def test_an_embedding_that_an_adapter_changes_is_seen(tmp_path):
    adapter(tmp_path/'tuned', small(tmp_path/'base'), target_modules=['embed_tokens'])
    words = run(tmp_path)[1]
    assert 'nothing was tuned in them' in words['summary'] and 'embed_tokens.weight' in words['summary']
    assert run(tmp_path, kinds=('embed_tokens',))[0]['matrices'].change.item() > .1


def test_tensors_without_a_place_are_an_error_or_named(tmp_path):
    base = small(tmp_path/'base')
    changed(base, tmp_path/'tuned', lambda t: t.update({'model.layers.7.self_attn.q_proj.weight': torch.randn(32, 32)}))
    changed(tmp_path/'tuned', tmp_path/'other', noise)
    words = run(tmp_path, 'tuned', 'other')[1]  # a layer that no model has
    assert '1 matrices stored' in words['summary'] and 'layers.7' in words['summary']
    path = adapter(tmp_path/'adapter', base)
    tensors = load_file(path/'adapter_model.safetensors')
    save_file({n: W for n, W in tensors.items() if 'layers.1.self_attn.v_proj.lora_B' not in n},
              path/'adapter_model.safetensors')
    refused('only one of the two matrices', tmp_path, tuned='adapter')
    save_file({n: W[:0] for n, W in tensors.items()}, path/'adapter_model.safetensors')  # as DeepSpeed leaves them
    refused('save the adapter again', tmp_path, tuned='adapter')


def test_files_that_say_two_things(tmp_path):
    base = small(tmp_path/'base')
    changed(base, tmp_path/'tuned', noise)
    (tmp_path/'tuned/model.safetensors.index.json').write_text(json.dumps(dict(weight_map={FIRST: 'old.safetensors'})))
    shutil.copy(base/'model.safetensors', tmp_path/'tuned/old.safetensors')  # transformers reads model.safetensors
    assert run(tmp_path)[0]['matrices'].change.min() > .05


# edits arrive


def moe(path, **kw): return small(path, Qwen3MoeForCausalLM, Qwen3MoeConfig, **EXPERTS | kw)


@pytest.mark.parametrize('make', [moe, lambda p: small(p), lambda p: small(p, Phi3ForCausalLM, Phi3Config),
                                  lambda p: small(p, tie_word_embeddings=True),
                                  lambda p: changed(small(p.with_name('named')), p,
                                                    lambda t: {n.removeprefix('model.'): W for n, W in t.items()})])
def test_every_edit_arrives(tmp_path, make):
    base = make(tmp_path/'base')
    changed(base, tmp_path/'tuned', lambda t: noise(t, eps=.5))
    model = open_model(tmp_path/'tuned', 'cpu')[0]
    put(model, Surgery(base, tmp_path/'tuned').edit('both', 1.))
    back, want = stored_weights(model), stored_weights(open_model(base, 'cpu')[0])
    for n in want: assert torch.allclose(back[n], want[n], atol=1e-4), n


def test_restoration_with_experts(tmp_path):
    changed(moe(tmp_path/'base'), tmp_path/'tuned', lambda t: noise(t, ('experts',), .5))
    tables, words = run(tmp_path, donor='base', kinds=('gate_proj', 'up_proj', 'down_proj'))
    r = tables['restoration'].groupby(['edit', 'share']).value.mean()
    assert r['values', 1.] != r['none', 0.] and r['directions', 1.] < .5 * r['none', 0.] and r['parameters', 1.] < 1e-5


def test_an_edit_without_a_place_is_an_error(tmp_path):
    model = open_model(small(tmp_path/'base'), 'cpu')[0]
    for name, W in (('model.layers.9.self_attn.q_proj.weight', torch.zeros(32, 32)), (FIRST, torch.zeros(3, 3)),
                    ('layer.0.q', torch.zeros(32, 32))):
        with pytest.raises(ValueError, match='has no matrix'): put(model, {name: W})


def test_nothing_to_restore_is_said(tmp_path):
    base = small(tmp_path/'base')
    changed(base, tmp_path/'tuned', lambda t: noise(t, ('down_proj',)))
    assert 'nothing to restore' in run(tmp_path, donor='tuned', kinds=('q_proj',))[1]['restoration']
    assert 'no edit changes that' in run(tmp_path, donor='base', kinds=('q_proj',))[1]['restoration']


# stored numbers


def eight_bits(tensors, block=16):
    out = {}
    for n, W in tensors.items():
        if W.dim() != 2 or 'layers' not in n: out[n] = W; continue
        m, k = -(-W.shape[0] // block), -(-W.shape[1] // block)
        s = torch.stack([torch.stack([W[i * block:(i + 1) * block, j * block:(j + 1) * block].abs().max() / 448
                                      for j in range(k)]) for i in range(m)])
        big = s.repeat_interleave(block, 0)[:W.shape[0]].repeat_interleave(block, 1)[:, :W.shape[1]]
        out |= {n: (W / big).to(torch.float8_e4m3fn), f'{n}_scale_inv': s}
    return out


def test_float8_is_widened_as_transformers_does(tmp_path):
    base = small(tmp_path/'base')
    changed(base, tmp_path/'tuned', eight_bits)
    settings(tmp_path/'tuned', quantization_config=dict(quant_method='fp8', activation_scheme='dynamic',
                                                        weight_block_size=[16, 16]))
    was = matrices(base)
    for n, m in matrices(tmp_path / 'tuned').items():
        assert 0.005 < (read(m) - read(was[n])).norm() / read(was[n]).norm() < 0.05
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path/'tuned', dtype=torch.float32).state_dict()
    assert torch.allclose(theirs[FIRST], read(matrices(tmp_path/'tuned')[FIRST]), rtol=1e-2)
    words = run(tmp_path)[1]['summary']
    assert 'float32 before, float8_e4m3fn after' in words and 'nothing was tuned' in words


@pytest.mark.parametrize('change, config', [
    (eight_bits, {}),  # scales, and no word of them
    (lambda t: t | {FIRST: (t[FIRST] * 20).to(torch.int8)}, {}),
    (lambda t: t | {FIRST.replace('weight', 'SCB'): torch.ones(32)}, {}),
    (lambda t: {n.replace('q_proj.weight', 'q_proj.qweight'): W.to(torch.int32) if 'q_proj' in n else W for n,
                W in t.items()}, dict(quant_method='gptq', bits=4)),
    (lambda t: t | {FIRST: torch.zeros(512, 1, dtype=torch.uint8), FIRST + '.absmax': torch.ones(16)},
     dict(quant_method='bitsandbytes', load_in_4bit=True)),
    (lambda t: None, dict(quant_method='compressed-tensors'))])
def test_other_quantisations_are_refused_by_name(tmp_path, change, config):
    changed(small(tmp_path/'base'), tmp_path/'tuned', change)
    if config: settings(tmp_path/'tuned', quantization_config=config)
    refused(f'tuned. is quantised.*{config.get("quant_method", "")}.*give the checkpoint', tmp_path)


# sentences about nothing


def test_zero_matrices_are_left_out_and_named(tmp_path):
    def zero(t): t['model.layers.1.mlp.down_proj.weight'].zero_()
    base = changed(small(tmp_path/'full'), tmp_path/'base', zero)
    def trained(t): noise(t); t['model.layers.1.mlp.down_proj.weight'] = torch.randn(32, 48)
    changed(base, tmp_path/'tuned', trained)
    for a, b in (('base', 'tuned'), ('tuned', 'base')):
        tables, words = run(tmp_path, a, b)
        assert (
            'inf' not in str(words)
            and 'nan' not in str(words)
            and not tables['matrices'].isin([float('inf')]).any().any()
        )
        row = tables['matrices'].set_index('name').loc['model.layers.1.mlp.down_proj.weight']
        assert row.angle_left != row.angle_left and row.angle_note == 'zero'
    assert 'down_proj of layer 1' in run(tmp_path)[1]['summary']


@pytest.mark.parametrize('share, words_of', [(.01, 'cannot be measured'), (.03, 'no rotation'),
                                             (1., 'the whole space does not turn')])
def test_shares_of_nothing_and_of_all(tmp_path, share, words_of):
    changed(small(tmp_path/'base'), tmp_path/'tuned', noise)
    words = run(tmp_path, share=share)[1]
    assert words_of in words['rotation'] + words.get('energy',
                                                     '') and 'nan' not in str(words) and 'inf' not in str(words)


def test_a_rank_below_the_share(tmp_path):
    def thin(t): t[FIRST] = torch.outer(torch.randn(32), torch.randn(32))
    changed(small(tmp_path/'full'), tmp_path/'base', thin)
    changed(tmp_path/'base', tmp_path/'tuned', lambda t: noise(t, ('v_proj', 'q_proj')))
    tables, words = run(tmp_path)
    assert (
        tables['matrices'].set_index('name').angle_note[FIRST] == 'rank'
        and 'Not measured: q_proj of layer 0' in words['rotation']
    )


@pytest.mark.parametrize('types', [('float32', 'bfloat16'), ('bfloat16', 'float32'), ('float32', 'float16')])
def test_storing_in_another_type_is_not_tuning(tmp_path, types):
    full = small(tmp_path/'full')
    for name, t in zip(('base', 'tuned'), types): changed(full, tmp_path/name,
                                                          lambda T: {n: W.to(getattr(torch, t)) for n, W in T.items()})
    words = run(tmp_path)[1]
    assert 'nothing was tuned' in words['summary'] and f'{types[0]} before, {types[1]} after' in words['summary']
    changed(full, tmp_path/'more', lambda T: (noise(T), {n: W.to(getattr(torch, types[1])) for n, W in T.items()})[1])
    assert 'alone moves a matrix by' in run(tmp_path, tuned='more')[1]['summary']


# crashes at the end


@pytest.mark.parametrize('make, kinds', [(moe, None), (small, ('embed_tokens', 'q_proj')), (small, ('lm_head',))])
def test_all_kinds_of_kinds(tmp_path, make, kinds):
    changed(make(tmp_path/'base'), tmp_path/'tuned', lambda t: noise(t, ('proj', 'embed', 'head')))
    tables, words = run(tmp_path, kinds=kinds)
    assert {'spectra', 'rotation', 'energy'} <= words['says'].keys() and (tmp_path/'out/compare.ipynb').is_file()
    assert len(tables['spectra'].drop_duplicates(['name', 'checkpoint', 'index'])) == len(tables['spectra'])


# other classes of errors


@pytest.mark.parametrize('name', [None, '', '/nowhere/else', '.'])
def test_an_adapter_without_a_base_is_put_on_the_one_given(tmp_path, name):
    path = adapter(tmp_path/'tuned', small(tmp_path/'base'))
    want = {n: read(m) for n, m in matrices(path).items()}
    settings(path, 'adapter_config.json', base_model_name_or_path=name)
    if name != '.':
        words = run(tmp_path)[1]
        assert 'was not found: it was applied to' in words['summary']
    with pytest.raises(ValueError, match='base_model_name_or_path'): matrices(path)
    for n, m in matrices(on_base(path, tmp_path/'base')).items(): assert torch.equal(read(m), want[n])
    refused('names no base|is not found|without a model', tmp_path, 'tuned', 'base')  # nobody else could say


def test_an_output_that_cannot_be_written(tmp_path):
    changed(small(tmp_path/'base'), tmp_path/'tuned', noise)
    (tmp_path/'file').touch()
    for out in (tmp_path/'file/out', tmp_path/'file', '/proc/nowhere/out'):
        with pytest.raises(ValueError, match='cannot be written|is a file'): compare(tmp_path/'base', tmp_path/'tuned',
                out, say=lambda line: None)


def test_lapack_that_does_not_converge(monkeypatch):
    import scipy.linalg
    W, whole = torch.randn(6, 4), scipy.linalg.svd
    def fails(*a, **k): raise torch.linalg.LinAlgError('did not converge')
    monkeypatch.setattr(torch.linalg, 'svd', fails)
    U, S, Vt = svd(W)
    assert U.dtype == torch.float32 and torch.allclose((U * S) @ Vt, W, atol=1e-5)
    def only_wide(a, **k):
        if a.dtype == 'float32': raise scipy.linalg.LinAlgError('did not converge')
        return whole(a, **k)
    monkeypatch.setattr(scipy.linalg, 'svd', only_wide)
    U, S, Vt = svd(W)
    assert U.dtype == torch.float32 and torch.allclose((U * S) @ Vt, W, atol=1e-5)
    monkeypatch.setattr(scipy.linalg, 'svd', lambda *a, **k: (_ for _ in ()).throw(scipy.linalg.LinAlgError('no')))
    with pytest.raises(ValueError, match='leave out its kind'): svd(W)


@pytest.mark.parametrize('file', ['config.json', 'adapter_config.json', 'model.safetensors.index.json'])
def test_broken_settings_name_their_file(tmp_path, file):
    small(tmp_path/'base'); small(tmp_path/'tuned')
    (tmp_path/'tuned'/file).write_text('{"cut')
    if 'index' in file: (tmp_path/'tuned/model.safetensors').unlink()
    refused(f'{file}. cannot be read as JSON', tmp_path)


# late, or with wrong advice


@pytest.mark.parametrize('file', ['model.safetensors', 'tokenizer.json', 'config.json', 'adapter_model.safetensors'])
def test_pointers_of_git_lfs(tmp_path, file):
    base, path = small(tmp_path/'base'), small(tmp_path/'tuned')
    if 'adapter' in file: adapter(path, base)
    (path/file).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n')
    refused(f'{file}. is a Git LFS pointer.*git lfs pull', tmp_path)


def test_parts_and_other_formats(tmp_path):
    small(tmp_path/'base')
    for n in ('a-00001-of-00003.gguf', 'a-00003-of-00003.gguf'):
        (tmp_path/n).write_bytes(b'GGUF')
        with pytest.raises(ValueError, match='one of 3 files of a split GGUF'): locate(tmp_path/n)
    (tmp_path/'b.gguf').write_text('version https://git-lfs.github.com/spec/v1')
    with pytest.raises(ValueError, match='Git LFS pointer'): locate(tmp_path/'b.gguf')
    (tmp_path/'old').mkdir(); (tmp_path/'old/pytorch_model.bin').touch()
    with pytest.raises(ValueError, match='only pytorch_model.bin'): matrices(tmp_path/'old')


@pytest.mark.parametrize('without', ['tuned', 'base', 'donor'])
def test_one_tokenizer_is_enough(tmp_path, without):
    small(tmp_path/'base')
    for n in ('tuned', 'donor'): changed(tmp_path/'base', tmp_path/n, noise)
    for f in (tmp_path/without).glob('tok*'): f.unlink()
    words = run(tmp_path, donor='donor')[1]
    assert f'{without}` came without a tokenizer' in words['summary']


def test_no_tokenizer_at_all(tmp_path):
    for n in ('base', 'tuned'): small(tmp_path/n, tokenizer=False)
    refused('there is no tokenizer in .*copy tokenizer.json', tmp_path)


@pytest.mark.parametrize('padded', ['donor', 'tuned', 'base'])
def test_padded_vocabularies(tmp_path, padded):
    small(tmp_path/'base')
    for n in ('tuned', 'donor'): changed(tmp_path/'base', tmp_path/n, noise)
    def pad(t):
        for n in ('model.embed_tokens.weight', 'lm_head.weight'): t[n] = torch.cat([t[n], torch.zeros(24, 32)])
    shutil.move(tmp_path/padded, tmp_path/'short')
    changed(tmp_path/'short', tmp_path/padded, pad); settings(tmp_path/padded, vocab_size=320)
    plain = run(tmp_path, **{padded: 'short'}, **{} if padded == 'donor' else dict(donor='donor'))[0]
    tables, words = run(tmp_path, donor='donor')
    assert 'among the first 296' in words['summary']
    for name in ('next_token', 'restoration'): torch.testing.assert_close(*(torch.tensor(t[name].value.to_numpy())
            for t in (tables, plain)), rtol=1e-3, atol=1e-4)
    refused('embed_tokens.weight. is .*296.*320|embed_tokens.weight. is .*320.*296', tmp_path, donor='donor',
            kinds=('embed_tokens',))


def test_models_of_another_make(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    small(tmp_path/'base')
    GPT2LMHeadModel(GPT2Config(vocab_size=296, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path/'tuned')
    refused(r'\(gpt2\) has no weights of decoder layers', tmp_path, 'tuned', 'tuned')


# results are whole or absent


def test_results_are_whole_or_absent(tmp_path, monkeypatch):
    changed(small(tmp_path/'base'), tmp_path/'tuned', noise)
    def fail(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, '_write', fail)
        with pytest.raises(KeyboardInterrupt): run(tmp_path)
    assert not [f for f in tmp_path.iterdir() if 'out' in f.name]
    run(tmp_path)
    (tmp_path/'out/restoration.parquet').touch()  # of an earlier comparison with a donor
    run(tmp_path)
    assert not (tmp_path/'out/restoration.parquet').exists()
    was = (tmp_path/'out/matrices.parquet').read_bytes()
    with monkeypatch.context() as m:
        m.setattr(module, '_write', fail)
        with pytest.raises(KeyboardInterrupt): run(tmp_path, share=.5)
    assert (tmp_path/'out/matrices.parquet').read_bytes() == was
    (tmp_path/'out/notes.txt').touch()
    refused('holds notes.txt', tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.name.startswith('.')]


# weights alone


def test_weights_alone_need_neither_a_model_nor_a_tokenizer(tmp_path, monkeypatch):
    changed(small(tmp_path/'base'), tmp_path/'tuned', noise)
    whole = run(tmp_path)[0]
    for folder in ('base', 'tuned'):
        for f in (tmp_path/folder).glob('tok*'): f.unlink()
    for name in ('open_model', 'open_tokenizer', 'check_loaded'):
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: pytest.fail(f'{name} was called'))
    tables, words = run(tmp_path, weights_only=True)
    assert set(tables) == {'matrices', 'spectra', 'angles', 'energy'}
    # not to the bit: where a matrix happens to lie in memory decides the order of some sums
    pd.testing.assert_frame_equal(tables['matrices'], whole['matrices'], rtol=1e-4, atol=1e-5)
    assert 'Only weights were compared' in words['summary'] and 'drift' not in words
    refused('leave out the donor', tmp_path, donor='base', weights_only=True)


@pytest.mark.parametrize('same', [True, False])
def test_other_tensors_are_compared_by_blocks(tmp_path, monkeypatch, same):
    from rlheals.analysis import weights as files
    def last_row(tensors): tensors['lm_head.weight'][-1] *= 1 if same else 2
    changed(small(tmp_path/'base'), tmp_path/'tuned', last_row)
    monkeypatch.setattr(files, 'BLOCK', 100)
    summary = run(tmp_path, weights_only=True)[1]['summary']
    assert ('other tensors are the same' in summary) == same and ('like lm_head.weight' in summary) != same


def test_two_runs_at_once(tmp_path):
    with results(tmp_path/'out') as one:
        with results(tmp_path/'out') as two:
            assert one != two
            (two/'matrices.parquet').write_text('two')
        assert (tmp_path/'out/matrices.parquet').read_text() == 'two'
        (one/'energy.parquet').write_text('one')
    assert [f.name for f in (tmp_path/'out').iterdir() if f.name != 'svd'] == ['energy.parquet']
    assert [f.name for f in tmp_path.iterdir()] == ['out']


def test_a_killed_run_leaves_its_decompositions(tmp_path):
    from unittest.mock import patch
    with patch('os.getpid', lambda: 2**22 + 1), patch('shutil.rmtree'):
        with pytest.raises(KeyError), results(tmp_path/'out') as folder:
            (folder/'svd/a.safetensors').write_text('done')
            raise KeyError
    assert folder.exists()
    with results(tmp_path/'out'): pass
    assert (tmp_path/'out/svd/a.safetensors').read_text() == 'done' and not folder.exists()
