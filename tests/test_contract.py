"""What every task must keep to, stated once and run on all of them, in both wordings."""
import time
import numpy as np
import pytest
from conftest import linear
from hypothesis import HealthCheck, given, settings, strategies as st
from rlheals.core.randomness import seeded
from rlheals.tasks.new_task import check_task
from rlheals.tasks.protocol import STYLES, TASKS, Episode, fingerprint, load_task, problem_set, steps

ALL = [(name, style) for name in TASKS for style in STYLES]
every_task = pytest.mark.parametrize('name, style', ALL)
seeds = st.integers(0, 2**32)


def parts_add_up(v): return v.reward == sum(v.parts.values())


@every_task
def test_the_contract_that_ships(name, style): check_task(load_task(name, style=style), 30)


@every_task
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_experts_are_right(name, style, data):
    task = load_task(name, style=style)
    start = task.sample(np.random.default_rng(data.draw(seeds)), data.draw(st.sampled_from(task.splits)))
    for p in steps(task, start):
        v = task.verify(p, task.expert(p, np.random.default_rng(data.draw(seeds))))
        assert v.correct and parts_add_up(v) and v.reward > 0 and (v.reason, v.error) == ('', '')


@every_task
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_no_text_breaks_a_verifier(name, style, data):
    "Any unicode, texts of the answer's own letters, and answers with pieces moved, lost or doubled."
    task = load_task(name, style=style)
    p = task.sample(seeded(data.draw(st.integers(0, 50))), data.draw(st.sampled_from(('train', 'id', 'ood'))))
    right = task.expert(p, seeded(0))
    words = right.split(' ')
    text = data.draw(st.text(max_size=400) | st.text(sorted(set(right)) + ['\0', '\ud800', '٣'], max_size=400)
                     | st.lists(st.sampled_from(words + ['{', '}', '[', ']', '(', '"']), max_size=60).map(' '.join))
    v = task.verify(p, text)
    assert parts_add_up(v)
    assert v.correct or (v.reason and v.error in task.errors and task.followup(p, v))


BIG = {  # texts of about n characters
    'unicode': lambda n: '🂡漢\u202e' * (n // 3),
    'one letter': lambda n: 'a' * n,
    'open braces': lambda n: '{' * n,
    'open brackets': lambda n: '{"cards": ' + '[' * n,
    'round brackets': lambda n: '{ cards [ 1 ] number [ 1 ] formula ' + '(' * n + ' }',
    'nested objects': lambda n: '{"a":' * (n // 6) + '1' + '}' * (n // 6),
    'quotes': lambda n: '{' + '"' * n + '}',
    'names without end': lambda n: '{ cards number formula answer see plan do ' * (n // 42),
    'names': lambda n: '{' + 'cards: ' * (n // 7) + '}',
    'spaces': lambda n: '{ answer ' + ' ' * n + '}',
    'NUL': lambda n: '\0' * n,
    'digits': lambda n: '{"answer": ' + '9' * n + '}',
    'power': lambda n: '{ cards [ 1 ] number [ 1 ] formula ' + '9**' * (n // 3) + '9 }',
    'sentences': lambda n: (
        '{"current observation": "' + 'You are. ' * (n // 9) + '", "current instruction": "x", "action": "stop now"}'
    ),
    'colons': lambda n: '{ answer' + ' :' * (n // 2) + '}',
    'objects': lambda n: '{"answer": x} ' * (n // 14),
    'fields': lambda n: '{' + '"current observation" ' * (n // 22) + '}',
    'words': lambda n: '{ see ' + 'plan ' * (n // 5) + 'do }',
}


def test_what_counts_as_linear():
    assert linear(lambda n: n / 1e3, 10)
    assert linear(lambda n: n / 1e3 * (1 if n < 15 else 20), 10)  # with a jump
    assert not linear(lambda n: n**2 / 1e3, 10)
    assert not linear(lambda n: n / 1e3 + n**2 / 1e3, 10)


@every_task
@pytest.mark.parametrize('kind', BIG)
def test_a_megabyte_is_read_in_linear_time(name, style, kind):
    "No text can hang a verifier."
    task = load_task(name, style=style)
    p = task.sample(seeded(1), 'train')

    def seconds(n):
        text, start = BIG[kind](n), time.process_time()
        v = task.verify(p, text)
        taken = time.process_time() - start
        assert not v.correct and parts_add_up(v)
        return taken

    assert linear(seconds, 500_000)


@every_task
@settings(max_examples=30, deadline=None)
@given(seed=seeds, split=st.sampled_from(('train', 'id', 'ood', 'ood_dev')))
def test_same_seed_same_problem(name, style, seed, split):
    one, two = (load_task(name, style=style) for _ in range(2))
    p, q = one.sample(np.random.default_rng(seed), split), two.sample(np.random.default_rng(seed), split)
    assert p == q and p.data == q.data and one.prompt(p) == two.prompt(q) and p.split == split
    assert one.expert(p, np.random.default_rng(seed)) == two.expert(q, np.random.default_rng(seed))


@pytest.mark.parametrize('name', TASKS)
def test_splits_are_disjoint(name):
    """By key, over thousands of draws with different seeds; and the key is what the model is asked, in whatever
    disguise."""
    task = load_task(name)
    keys = {
        split: {
            task.sample(rng, split).key
            for rng in [seeded(split, name)]
            for _ in range(2500 if split == 'train' else 600)
        }
        for split in ('train', 'id', 'ood', 'ood_dev')
    }
    for a in keys:
        for b in keys: assert a == b or not keys[a] & keys[b], (a, b)
    assert min(map(len, keys.values())) > 20


def test_matrices_do_not_come_back_in_disguise():
    """Independent of the key: no test matrix is a training matrix with rows or columns moved, signs changed, or
    transposed."""
    from itertools import permutations

    def disguises(m):
        for t in (np.array(m), np.array(m).T):
            for rows in permutations(range(t.shape[0])):
                yield t[list(rows)]

    def canonical(m):  # smallest of all row orders and transposes, with columns sorted and signs dropped
        return min(tuple(sorted(map(tuple, np.abs(d).T.tolist()))) for d in disguises(m))

    for name in ('rank', 'determinant'):
        task = load_task(name)
        train = {canonical(task.sample(rng, 'train').data['matrix']) for rng in [seeded('train')] for _ in range(400)}
        tests = {canonical(p.data['matrix']) for split in ('id', 'ood') for p in problem_set(task, split, 100)}
        if name == 'rank': assert not train & tests
        else:  # here the determinant is part of what must be left the same: signs matter
            of = lambda split, n: {
                (canonical(p.data['matrix']), p.data['determinant'])
                for p in [task.sample(r, split) for r in [seeded(split, 2)] for _ in range(n)]
            }
            assert not of('train', 400) & (of('id', 200) | of('ood', 200))


@every_task
def test_problem_sets_do_not_repeat_and_are_named(name, style):
    task = load_task(name, style=style)
    n = 48 if name == 'navigation' else 200
    problems = problem_set(task, 'id', n, 3)
    assert len({task.prompt(p) for p in problems}) == n
    assert (
        fingerprint(problems)
        == fingerprint(problem_set(task, 'id', n, 3))
        != fingerprint(problem_set(task, 'id', n, 4))
    )


@every_task
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_criterion_speaks_and_feedback_says_something(name, style, data):
    """Whichever criterion decides, a verdict says what each would; the deciding one agrees with `correct`, and feedback
    is one line that says what was wrong."""
    plain = load_task(name, style=style)
    for task in [load_task(name, style=style, checks=c) for c in plain.criteria] or [plain]:
        p = task.sample(seeded(data.draw(st.integers(0, 50))), data.draw(st.sampled_from(('train', 'id', 'ood'))))
        words = task.expert(p, seeded(0)).split(' ')
        text = ' '.join(
            data.draw(st.permutations(words))
            if data.draw(st.booleans())
            else words[: data.draw(st.integers(0, len(words)))]
        )
        v = task.verify(p, text)
        assert set(v.by) == set(task.criteria) and all(type(x) is bool for x in v.by.values())
        if task.criteria: assert v.correct == v.by[task.checks] and (not v.by['all'] or all(v.by.values()))
        if not v.correct:
            said = task.followup(p, v)
            assert (
                said.startswith('wrong ' if style == 'brief' else 'You failed this trial because ')
                and len(said) < 500
                and '\n' not in said
            )


@every_task
def test_episodes(name, style):
    "Wrong answers use up the tries, right ones end the episode or lead on; what the model reads next is never empty."
    task = load_task(name, style=style, tries=3)
    for p in problem_set(task, 'ood', 5):
        e = Episode.start(task, p)
        for _ in range(3):
            assert not e.done(task) and e.turns[-1]
            e.answer(task, 'no idea')
        assert e.done(task) and not e.solved and e.attempts == [0, 1, 2]
        e = Episode.start(task, p)
        while not e.done(task):
            e.answer(task, 'no idea'); assert e.tried == 1
            e.answer(task, task.expert(e.problem, seeded(0)))
        assert e.solved and e.first_error == 'format' and e.attempts == [0, 1] * (len(e.attempts) // 2)


def test_unknown_options_are_named():
    for name, bad in (
        ('rank', dict(turns=3)),
        ('navigation', dict(turns=0)),
        ('general_points', dict(style='x')),
        ('chess', {}),
    ):
        with pytest.raises(ValueError): load_task(name, **bad)
