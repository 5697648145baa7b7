"""What drawing and checking problems costs, beside the obvious way to do it: python tests/bench/tasks.py prints both
and their ratios, measured in one run."""
import json, random, time
from fractions import Fraction
from itertools import combinations_with_replacement, permutations, product
import numpy as np
from rlheals.tasks.navigation import _ways, city
from rlheals.tasks.formulas import solve_all
from rlheals.tasks.protocol import TASKS, examples, load_task


def per_call(f, n):
    start = time.perf_counter()
    f(n)
    return (time.perf_counter() - start) / n


# --- the obvious way: permutations with fractions

OPS = dict(zip('+-*/', (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a / b)))


def obvious_solve(values):
    found = []
    for a, b, c, d in set(permutations(map(Fraction, values))):
        for p, q, r in product(OPS, repeat=3):
            P, Q, R = OPS[p], OPS[q], OPS[r]
            for shape, f in (
                ('(({}{}{}){}{}){}{}', lambda: R(Q(P(a, b), c), d)),
                ('({}{}({}{}{})){}{}', lambda: R(P(a, Q(b, c)), d)),
                ('({}{}{}){}({}{}{})', lambda: Q(P(a, b), R(c, d))),
                ('{}{}(({}{}{}){}{})', lambda: P(a, R(Q(b, c), d))),
                ('{}{}({}{}({}{}{}))', lambda: P(a, Q(b, R(c, d)))),
            ):
                try:
                    if f() == 24: found.append(shape.format(a, p, b, q, c, r, d))
                except ZeroDivisionError: pass
    return found


def obvious_rank_and_determinant(matrix):
    rows, rank, det = [list(map(Fraction, r)) for r in matrix], 0, Fraction(1)
    for c in range(len(rows[0])):
        pivot = next((r for r in range(rank, len(rows)) if rows[r][c]), None)
        if pivot is None: det = Fraction(0); continue
        if pivot != rank: rows[rank], rows[pivot], det = rows[pivot], rows[rank], -det
        det *= rows[rank][c]
        for r in range(rank + 1, len(rows)):
            factor = rows[r][c] / rows[rank][c]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[rank])]
        rank += 1
        if rank == len(rows): break
    return rank, det


def obvious_example(name, rng):
    if name == 'general_points':
        while not (found := obvious_solve([min(rng.randint(1, 13), 10) for _ in range(4)])): pass
        return rng.choice(found)
    if name == 'navigation':  # a city for every route
        city.cache_clear(); _ways.cache_clear()
        return examples(load_task(name), 'train', 1)
    numpy = np.random.default_rng(rng.getrandbits(32))
    return obvious_rank_and_determinant(
        numpy.integers(-4, 5, (4, 4)) @ numpy.integers(-4, 5, (4, 5))
        if name == 'rank'
        else numpy.integers(-4, 5, (2, 2))
    )


def obvious_verify(name, p, answer):
    said = json.loads(answer)
    if name == 'general_points': return said['formula'].split('=')[0] in obvious_solve(p.data['values'])
    if name == 'navigation': return (*said.values(),) == p.data['script'][p.data['step']]
    return said['answer'] == obvious_rank_and_determinant(p.data['matrix'])[name == 'determinant']


hands = list(combinations_with_replacement(range(1, 14), 4))
ours = min(per_call(lambda n: solve_all(hands), 1) for _ in range(3))
some = random.Random(0).sample(hands, 25)
theirs = per_call(lambda n: [obvious_solve(h) for h in some], 1) * len(hands) / len(some)
print(
    f'all {len(hands)} hands solved: {ours:.3f} s, {theirs / ours:.0f} times as fast as permutations with fractions '
    f'({theirs:.1f} s)'
)

for name in TASKS:
    task, rng = load_task(name), random.Random(0)
    drawn = examples(task, 'train', 2000)  # also fills what is made once
    example = min(per_call(lambda n: examples(task, 'train', n, seed), 2000) for seed in range(3))
    answers = [(p, task.expert(p, np.random.default_rng(0))) for p, _ in drawn]
    verify = min(per_call(lambda n: [task.verify(p, a) for p, a in answers], len(answers)) for _ in range(3))
    few = 5 if name in ('general_points', 'navigation') else 300
    obvious = per_call(lambda n: [obvious_example(name, rng) for _ in range(n)], few)
    obvious_check = per_call(lambda n: [obvious_verify(name, p, a) for p, a in answers[:n]], few)
    print(
        f'{name:15} a training example {1e6 * example:5.1f} us, the obvious way takes {obvious / example:8.1f} times '
        'as long;   '
        f'checking an answer {1e6 * verify:5.1f} us, the obvious way {obvious_check / verify:8.1f} times'
    )
