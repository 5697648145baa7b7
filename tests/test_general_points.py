"""The verifier against an independent evaluator, on every solution and on many mutations."""
import ast, operator, random
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement, permutations
import pytest
from hypothesis import given, settings, strategies as st
from rlheals.tasks.formulas import (FACES, RULES, FormulaError, all_hands, card_value, parse_answer, parse_formula,
                                    solve, solve_all)
from rlheals.tasks.general_points import GeneralPoints
from rlheals.tasks.hands import split_hands

TASKS = [GeneralPoints('paper'), GeneralPoints('brief')]
OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def oracle(formula, values, target=24):
    "Python's own grammar, exact fractions: does the equation hold with each value used once?"
    left, *right = formula.split('=')
    if len(right) > 1 or right and right[0].strip() != str(target): return False
    numbers = []

    def walk(n):
        if isinstance(n, ast.BinOp) and type(n.op) in OPS: return OPS[type(n.op)](walk(n.left), walk(n.right))
        if isinstance(n, ast.Constant) and type(n.value) is int: numbers.append(n.value); return Fraction(n.value)
        raise ValueError

    try: value = walk(ast.parse(left.strip(), mode='eval').body)
    except (ValueError, SyntaxError, ZeroDivisionError): return False
    return value == target and sorted(numbers) == sorted(values)


def hands(split):
    for hand in all_hands():
        if split == 'id' or any(c in FACES for c in hand): yield hand, [card_value(c, RULES[split]) for c in hand]


@pytest.mark.parametrize('split', ['id', 'ood'])
def test_every_solution_of_every_hand_is_accepted(split):
    n = 0
    for k, (hand, values) in enumerate(hands(split)):
        task = TASKS[k % 2]
        p = task.problem(hand, split)
        for f in solve(values):
            v = task.verify(p, task.answer(p, f))
            assert v.correct and v.reward == 5, (hand, f)
            n += 1
    assert n == dict(id=43_696, ood=32_671)[split]


def test_solver_finds_what_an_exhaustive_search_finds():
    "Independent search, combining two numbers at a time, on all hands of 1-13; and the known counts."
    @lru_cache(maxsize=None)
    def reach(xs):
        if len(xs) == 1: return xs[0] == 24
        return any(reach(tuple(sorted([r, *(x for k, x in enumerate(xs) if k not in (i, j))])))
                   for i in range(len(xs)) for j in range(len(xs)) if i != j
                   for r in [xs[i] + xs[j], xs[i] - xs[j], xs[i] * xs[j]] + ([xs[i] / xs[j]] if xs[j] else []))
    solved = solve_all(combinations_with_replacement(range(1, 14), 4))
    for values, formulas in solved.items(): assert bool(formulas) == reach(tuple(map(Fraction, values))), values
    assert (len(solved), sum(map(bool, solved.values())), sum(bool(f) for v, f in solved.items() if max(v) <= 10)) == (
        1820,
        1362,
        566,
    )


@pytest.mark.parametrize(
    'values, target',
    [((3, 3, 8, 8), 24), ((1, 2, 7, 13), 24), ((2, 5, 9), 7), ((4, 6), 24), ((1, 5, 5, 5), 24), ((2, 3, 11, 40), 61)],
)
def test_every_formula_is_found_once(values, target):
    "Against all orders, operators and bracketings written out as text and evaluated by Python's own grammar."
    def trees(xs):
        if len(xs) == 1: yield str(xs[0])
        for k in range(1, len(xs)):
            for left in trees(xs[:k]):
                for right in trees(xs[k:]):
                    for op in '+-*/': yield f'({left}{op}{right})'
    expected = {f[1:-1] for order in set(permutations(values)) for f in trees(order) if oracle(f, values, target)}
    assert set(solve(values, target)) == expected and len(solve(values, target)) == len(expected)


def mutate(rng, text):
    i = rng.randrange(len(text))
    return rng.choice(
        [
            lambda: text[:i] + text[i + 1 :],
            lambda: text[:i] + rng.choice('0123456789+-*/()=. x') + text[i:],
            lambda: text[:i] + rng.choice('0123456789+-*/()') + text[i + 1 :],
            lambda: text[:i] + text[i:][::-1],
            lambda: text.replace('24', '25', 1),
            lambda: text + text,
        ]
    )()


def test_mutations_are_rejected_exactly():
    "A mutation is accepted only if the oracle accepts it too; at least 100,000 are rejected."
    rng, rejected, accepted = random.Random(0), 0, 0
    pool = [(split, h, v) for split in ('id', 'ood') for h, v in hands(split) if solve(v)]
    while rejected < 100_000:
        split, hand, values = rng.choice(pool)
        task = rng.choice(TASKS)
        p = task.problem(hand, split)
        formula = rng.choice(solve(values)) + '=24'
        for _ in range(rng.randint(1, 3)): formula = mutate(rng, formula) or 'x'
        text = '{"cards": [%s], "number": %s, "formula": "%s"}' % (', '.join(f'"{c}"' for c in hand), values, formula)
        correct = task.verify(p, text).correct
        assert correct == oracle(formula, values), (hand, values, formula)
        rejected += not correct; accepted += correct
    assert accepted > 100  # some mutations only swap equals: the test sees both sides


@pytest.mark.parametrize('field', ['cards', 'number'])
def test_a_wrong_field_is_rejected_where_all_count(field):
    "And by the official criterion, where the formula alone counts, it is accepted; each verdict says what both say."
    rng = random.Random(0)
    for _ in range(2000):
        split = rng.choice(['id', 'ood'])
        hand = rng.choice(split_hands(split))
        task, strict = TASKS[0], GeneralPoints(checks='all')
        p = task.problem(hand, split)
        cards, numbers = list(hand), list(p.data['values'])
        if field == 'cards': cards[rng.randrange(4)] = rng.choice([c for c in 'A23456789JQK' if c not in hand])
        else: numbers[rng.randrange(4)] += rng.choice([-1, 1, 20])
        text = '{"cards": %s, "number": %s, "formula": "%s=24"}' % (
            str(cards).replace("'", '"'),
            numbers,
            solve(p.data['values'])[0],
        )
        v, official = strict.verify(p, text), task.verify(p, text)
        assert not v.correct and v.error == field and official.correct and official.reward == 5
        assert v.by == official.by == dict(formula=True, all=False)


NUMBERS = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(
    hand=st.sampled_from([*hands('ood')]),
    numbers=NUMBERS,
    signs=st.lists(st.sampled_from('+-*/'), min_size=4, max_size=4),
)
def test_feedback_names_what_is_to_be_changed(hand, numbers, signs):
    """Who drops the numbers that the brief feedback puts before `so`, and takes those after it, has the hand's numbers;
    the paper's wording names the same."""
    (cards, values), brief, paper = hand, TASKS[1], TASKS[0]
    p = brief.problem(cards, 'ood')
    formula = ' '.join(w for x, s in zip(numbers, signs + ['']) for w in (str(x), s)).rstrip('+-*/ ')
    v = brief.verify(p, f'{{ formula {formula} = 24 }}')
    said = brief.followup(p, v).split()
    if sorted(numbers) == sorted(values): assert v.correct or said[:2] == ['wrong', 'result']; return
    assert (
        said[:2] == ['wrong', 'number']
        and said[-1] == ':'
        and v.error == ('number' if set(numbers) - set(values) else 'use')
    )
    drop, take = ' '.join(said[2:-1]).partition('so')[::2]
    mended = Counter(numbers) - Counter(map(int, drop.split())) + Counter(map(int, take.split()))
    assert mended == Counter(values)
    words = paper.followup(p, paper.verify(p, f'{{"formula": "{formula}=24"}}'))
    for x in map(int, take.split()): assert f'{x}' in words.partition("didn't use")[2]
    assert ('invalid' in words) == (v.error == 'number') and paper.verify(
        p, f'{{"formula": "{formula}=24"}}'
    ).reward in (-2.0, -4.0)


def test_feedback_on_an_ood_hand_says_what_the_face_cards_count():
    p = TASKS[1].problem(('5', 'J', '3', 'A'), 'ood')
    v = TASKS[1].verify(p, TASKS[1].answer(p, '(10-5)*3+9', numbers=(5, 10, 3, 9)))
    assert TASKS[1].followup(p, v) == 'wrong number 10 9 so 11 1 :'


def test_the_trap_of_floating_point():
    p = TASKS[0].problem(('3', '3', '8', '8'), 'id')
    for f in ('8/(3-8/3)', '8 / (3 - (8/3)) = 24'):
        assert TASKS[0].verify(p, '{"cards": ["3","3","8","8"], "number": [3,3,8,8], "formula": "%s"}' % f).correct


@settings(max_examples=1500, deadline=None)
@given(st.text(max_size=300) | st.text('0123456789+-*/()= {}[]"cardsnumberformula:,JQKA', max_size=300))
def test_no_text_breaks_the_verifier(text):
    p = TASKS[0].problem(('5', 'J', '3', 'A'), 'ood')
    v = TASKS[0].verify(p, text)
    assert v.correct or v.reward < 5 and v.reason and v.error in TASKS[0].errors
    parse_answer(text)
    try: parse_formula(text)
    except FormulaError: pass


def test_splits_are_disjoint_and_solvable():
    splits = {s: set(split_hands(s)) for s in ('train', 'id', 'ood', 'id_novel', 'ood_novel')}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))
    assert all(any(c in FACES for c in h) for h in splits['ood'] | splits['ood_novel'])
    assert min(len(splits['id']), len(splits['ood'])) >= 234
