"""The mathematics of PPO against plain NumPy, episode by episode, on random data."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rlheals.tasks.general_points import GeneralPoints
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import encode, generate
from rlheals.training.models import load_model
from rlheals.training.logprobs import logprobs_and_values, value_head
from rlheals.training.ppo import add_advantages, collect, constant_value, gae, ppo_loss
from rlheals.training.rollouts import Environments


def reference_advantages(rewards, values, dones, gamma, lam):
    "Sum of discounted TD errors up to the end of the episode (arXiv 1506.02438, eq. 16), written as the sum it is."
    T, N = rewards.shape
    out = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.
            for u in range(t, T):
                bootstrap = 0. if dones[u, n] else gamma * values[u + 1, n]
                out[t, n] += weight * (rewards[u, n] + bootstrap - values[u, n])
                if dones[u, n]: break
                weight *= gamma * lam
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae(T, N, gamma, lam, seed):
    rng = np.random.default_rng(seed)
    rewards, values, dones = (
        rng.normal(size=(T, N)),
        rng.normal(size=(T + 1, N)),
        (rng.random((T, N)) < 0.4).astype(float),
    )
    got = gae(*(torch.tensor(x) for x in (rewards, values, dones)), gamma, lam)
    np.testing.assert_allclose(got.numpy(), reference_advantages(rewards, values, dones, gamma, lam), atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.floats(.05, .4), st.sampled_from((0., .1, .7)), st.integers(0, 10**6))
def test_loss(n, clip, value_clip, seed):
    rng = np.random.default_rng(seed)
    logp, old, value, advantage, returns, entropy, old_value = rng.normal(size=(7, n))
    c = dict(clip=clip, value_clip=value_clip, value_coef=.5, entropy_coef=.01)
    loss, _ = ppo_loss(*(torch.tensor(x) for x in (logp, entropy, value, old, advantage, returns, old_value)), c)
    ratio = np.exp(logp - old)
    gains = [min(r * a, np.clip(r, 1 - clip, 1 + clip) * a) for r, a in zip(ratio, advantage)]
    errors = [
        (v - r) ** 2 if not value_clip else max((v - r) ** 2, (o + np.clip(v - o, -value_clip, value_clip) - r) ** 2)
        for v, o, r in zip(value, old_value, returns)
    ]
    expected = -np.mean(gains) + .5 * .5 * np.mean(errors) - .01 * np.mean(entropy)
    assert loss.item() == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope='module')
def tiny():
    set_up_torch(1, matmul_precision='highest', seed=0)
    return load_model('tiny', device='cpu')


def test_ratio_of_a_fresh_policy_is_one(tiny):
    "Whatever the batch an answer is scored in: padding and neighbours do not change its probability."
    model, tok = tiny
    task = GeneralPoints('brief', tries=2)
    c = dict(turns=2, temperature=1., micro_batch=8, max_new_tokens=20)
    batch = collect(model, value_head(128), tok, Environments(task, range(12), seed=0), c, 0)
    pick = np.random.default_rng(0).permutation(len(batch['contexts']))[:7]
    contexts, answers = ([batch[k][i] for i in pick] for k in ('contexts', 'answers'))
    with torch.no_grad(): logprobs, _, _ = logprobs_and_values(model, None, contexts, answers)
    np.testing.assert_allclose((logprobs - batch['logprobs'][pick]).exp().numpy(), 1., atol=1e-5)


def test_sampled_tokens_follow_the_scored_probabilities(tiny):
    "Sampling and scoring use the same distribution: first tokens of many samples against the scored probabilities."
    model, tok = tiny
    context = encode(tok, ['solve 5 11 3 1 :'])
    first = np.array([a[0] for a in generate(model, tok, [context] * 4000, 1, temperature=.7, seed=1)])
    with torch.no_grad():
        answers = [[t] for t in range(len(tok))]
        probability = logprobs_and_values(model, None, [context] * len(tok), answers, temperature=.7)[0].exp().numpy()
    assert probability.sum() == pytest.approx(1, abs=1e-4)
    error = np.sqrt(probability * (1 - probability) / len(first))
    assert (abs(np.bincount(first, minlength=len(tok)) / len(first) - probability) <= 5 * error + 1e-3).all()


def test_value_head_fits_known_returns(tiny):
    "The head alone, on frozen features, learns which of two kinds of prompt is worth more."
    model, tok = tiny
    contexts = [encode(tok, [f"{'solve' if i % 2 else 'write formula'} {i % 9 + 1} 3 8 2 :"]) for i in range(64)]
    target = torch.tensor([5. if i % 2 else -3. for i in range(64)])
    torch.manual_seed(0)
    head = value_head(128)
    opt = torch.optim.Adam(head.parameters(), lr=1e-2)
    first = None
    for _ in range(60):
        loss = (logprobs_and_values(model, head, contexts, [[]] * 64)[2] - target).square().mean()
        first = first or loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < .05 * first


def test_episodes_carry_on_and_finish(tiny):
    """Two tries per episode: after two turns every environment has finished its first episode, and drawn a training
    hand."""
    model, tok = tiny
    task = GeneralPoints('brief', tries=2)
    c, envs = dict(turns=3, temperature=1., micro_batch=8, max_new_tokens=8), Environments(task, range(5), seed=1)
    before = [e.problem.key for e in envs.episodes]
    batch = collect(model, value_head(128), tok, envs, c, 0)
    assert batch['attempts'] == [0] * 5 + [1] * 5 + [0] * 5
    assert len(add_advantages(batch, .9, .95)['advantages']) == 15
    assert [e.problem.key for e in envs.episodes] != before
    assert all(len(e.verdicts) == 1 and e.problem.split == 'train' for e in envs.episodes)


def test_only_open_episodes_are_bootstrapped(tiny):
    """After a first turn every environment is between two tries, so its next prompt has a value; after the second none
    is."""
    model, tok = tiny
    head, envs = value_head(128), Environments(GeneralPoints('brief', tries=2), range(4), seed=2)
    torch.nn.init.constant_(head[-1].bias, 3.)
    c = dict(turns=1, temperature=1., micro_batch=8, max_new_tokens=4)
    for still_open in (True, False):
        batch = collect(model, head, tok, envs, c, 0)
        np.testing.assert_allclose(batch['next_values'].numpy(), 3. if still_open else 0.)
        np.testing.assert_allclose(batch['dones'].numpy(), float(not still_open))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 5), st.floats(0, .95), st.integers(0, 10**6))
def test_the_constant_value_leaves_no_error_on_average(T, N, gamma, seed):
    """With it, temporal differences are 0 in the mean, whatever the episodes: turns are not told apart by how many are
    left."""
    rng = np.random.default_rng(seed)
    rewards, dones = torch.tensor(rng.normal(size=T * N)), torch.tensor((rng.random(T * N) < .5).astype(float))
    V = constant_value(dict(rewards=rewards, dones=dones), gamma)
    assert (rewards + gamma * V * (1 - dones) - V).mean().item() == pytest.approx(0, abs=1e-9)
    values = torch.full((T * N,), V, dtype=torch.float64)
    batch = dict(rewards=rewards, dones=dones, values=values, next_values=values[:N])
    assert add_advantages(batch, gamma, 0.)['advantages'].mean().item() == pytest.approx(0, abs=1e-9)
