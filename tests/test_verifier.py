"""What counts as an answer: fields by their exact names, each once; other characters for the same signs; and nothing
that talks a reward out of the verifier."""
import json
import pytest
from conftest import linear
from hypothesis import given, settings, strategies as st
from rlheals.tasks.matrices import Determinant
from rlheals.tasks.formulas import FormulaError, parse_answer, parse_formula, read_formula
from rlheals.tasks.general_points import GeneralPoints
from rlheals.tasks.navigation import Navigation
from rlheals.tasks.matrices import Rank
from rlheals.core.randomness import seeded
from rlheals.tasks.answers import answer_reader, plain_signs, read_integer
from rlheals.tasks.protocol import Problem

GP, ALL, BRIEF = GeneralPoints(), GeneralPoints(checks='all'), GeneralPoints('brief')
HAND, EIGHTS = GP.problem(("5", "J", "3", "A"), "id"), GP.problem(("3", "3", "8", "8"), "id")
RIGHT, FIELDS = '(3*5-1)+10=24', '"cards": ["5", "J", "3", "A"], "number": [5, 10, 3, 1]'
GOOD = f'"formula": "{RIGHT}"'
DET = Problem('determinant', 'id', (), dict(matrix=[[1, 2], [3, 4]], determinant=-2))
RANK = Problem('rank', 'id', (), dict(matrix=[[1, 2], [2, 4]], rank=1))

ACCEPTED = {  # kind of tolerance -> answers, for the hand above
    'names that begin, end or go on like a field': [
        f'{{"formula_steps": "3*5=15", {FIELDS}, {GOOD}}}',
        f'{{"my formula": "1+1", {FIELDS}, {GOOD}}}',
        f'{{{FIELDS}, {GOOD}, "formulas": ["1+1"]}}',
        f'{{"cards_left": [], "number_of_cards": 4, {FIELDS}, {GOOD}}}',
        f"{{'formula-type': 'sum', {FIELDS}, {GOOD}}}",
        f'{{formula_type: sum, formula: {RIGHT}}}',
    ],
    'sentences about a field': [
        f'{{"thought": "the formula: 1+1", {FIELDS}, {GOOD}}}',
        f'{{{FIELDS}, {GOOD}, "check": "formula is 24, number each once"}}',
        f'{{"plan": "first {{cards}}, then {{formula: 1+1}}", {FIELDS}, {GOOD}}}',
        f'The formula is easy: {{{FIELDS}, {GOOD}}} The formula uses every number.',
    ],
    'the same field twice, the same': [
        f'{{{FIELDS}, {GOOD}, {GOOD}}}',
        f'{{{GOOD}, {FIELDS}, {FIELDS}, {GOOD}}}',
        f"{{{FIELDS}, {GOOD}, 'formula': ' {RIGHT}'}}".replace("' (", "'("),
    ],
    'objects in objects and lists': [
        f'{{"answer": {{{FIELDS}, {GOOD}}}}}',
        f'[{{"note": 1}}, {{{FIELDS}, {GOOD}}}]',
        f'{{"answers": [{{{FIELDS}, {GOOD}}}]}}',
        f'{{{FIELDS}, {GOOD}, "meta": {{"sure": {{"very": [1, {{}}]}}}}}}',
        f'{{"formula": {{"cards": [], {GOOD}, "number": []}}}}',
    ],
    'looser than JSON': [
        f'{{cards: [5, J, 3, A], number: [5, 10, 3, 1], formula: {RIGHT}}}',
        f"{{'cards': ('5'), {GOOD}}}".replace("('5')", "['5' 'J' '3' 'A']"),
        f'{{,{FIELDS},,\n{GOOD},\n}}',
        f'{{{FIELDS}\n{GOOD}}}',
        f'{{"reason": "two\nlines", {FIELDS}, {GOOD}}}',
        f'Let {{x}} be {{1, 2}} and "{{". {{{FIELDS}, {GOOD}}}',
        f'{{"half": {{{FIELDS}, {GOOD}}}',
    ],
    "JSON's escapes": [
        f'{{{FIELDS}, "formula": "(3\\u00d75\\u22121)\\u002b10\\u003d24"}}',
        f'{{{FIELDS}, "formul\\u0061": "{RIGHT}"}}',
        f'{{"quote": "he said \\"formula\\": \\"1+1\\"", {FIELDS}, {GOOD}}}',
        f'{{{FIELDS}, "formula": "(3*5-1)\\n+10\\t=24"}}',
        f'{{{FIELDS}, "formula": "\\uff083*5-1\\uff09+10"}}',
    ],
}
REFUSED = {  # kind -> answers that must not be accepted
    'a field twice, in two ways': [
        f'{{{FIELDS}, {GOOD}, "formula": "3*5"}}',
        f'{{"formula": "3*5", {FIELDS}, {GOOD}}}',
        f"{{{FIELDS}, {GOOD}, 'formula': null}}",
        f'{{{FIELDS}, {GOOD}, "number": [1, 2, 3, 4]}}',
        f'{{{FIELDS}, {GOOD}, "formula": {{"formula": "1+1"}}}}',
        f'{{{FIELDS}, {GOOD}, "formul\\u0061": "1+1"}}',
        f'{{{FIELDS}, {GOOD}, "numbers": [1]}}',
        f'{{ formula {RIGHT} number [ 5 10 3 1 ] formula 1+1 }}',
        f'{{formula: {RIGHT}, formula: 1+1}}',
        f'{{ formula 1+1 formula {RIGHT} }}',
    ],
    'the first answer is the answer': [
        f'{{"formula": "1+1"}} {{{FIELDS}, {GOOD}}}',
        f'{{"formula": "1+1", "better": {{{GOOD}}}}}',
        f'{{"draft": {{{GOOD}}}, "formula": "1+1"}}',
        f'{{ formula 1+1 }} {{ formula {RIGHT} }}',
    ],
    'not an object': [
        f'{{{FIELDS}, {GOOD}',
        f'{FIELDS}, {GOOD}',
        f'{{{FIELDS}, {GOOD} and so on}}',
        f'{{"text": "{{ formula {RIGHT} }}"}}',
        f'{{"text": "say \\"formula\\": \\"{RIGHT}\\""}}',
        '{"a": ' * 9 + f'{{{GOOD}}}' + '}' * 9,
    ],
    'other names': [
        f'{{{FIELDS}, "Formula": "{RIGHT}"}}',
        f'{{{FIELDS}, "formula ": "{RIGHT}"}}',
        f'{{{FIELDS}, "the_formula": "{RIGHT}"}}',
        f'{{ my-formula {RIGHT} }}',
        f'{{ formula_type {RIGHT} }}',
    ],
    'a number that is none': [
        f'{{"number": [5, "J", 3, 1], {GOOD}}}',
        f'{{"number": ["five", 10, 3, 1], {GOOD}}}',
        f'{{"number": "5, J, 3, 1", {GOOD}}}',
        f'{{"number": [5, [10], 3, 1], {GOOD}}}',
        f'{{"number": [5, null, 3, 1], {GOOD}}}',
    ],
    'a formula that is none': [
        f'{{{FIELDS}, "formula": ["3*5-1", "+10"]}}',
        f'{{{FIELDS}, "formula": 24}}',
        f'{{{FIELDS}, "formula": {{"value": "{RIGHT}"}}}}',
        f'{{{FIELDS}, "formula": "{RIGHT} or 1+1"}}',
        f'{{{FIELDS}, "formula": true}}',
    ],
}
each = lambda kinds: [pytest.param(t, id=f'{kind} {k}') for kind, texts in kinds.items() for k, t in enumerate(texts)]


@pytest.mark.parametrize('text', each(ACCEPTED))
def test_right_answers_are_accepted(text):
    v = GP.verify(HAND, text)
    assert v.correct and v.by['formula'], (text, v)
    if 'cards": ["5", "J", "3", "A"]' in text: assert ALL.verify(HAND, text).correct and parse_answer(text)


@pytest.mark.parametrize('text', each(REFUSED))
def test_wrong_answers_are_refused(text):
    for task in (GP, ALL, BRIEF):
        v = task.verify(HAND, text)
        assert not v.correct and not any(v.by.values()) and v.reason and v.reward < 0, (text, v)


SIGNS = {
    '*': '×⋅·∗✕✖⨯•∙＊﹡', '/': '÷∕⁄／', '-': '−–—‒‐‑－﹣', '+': '＋﹢➕', '=': '＝﹦', '(': '（⟮❨﹙',
    ')': '）⟯❩﹚'}


@pytest.mark.parametrize('sign, other', [(s, o) for s, others in SIGNS.items() for o in others])
def test_other_characters_for_the_same_sign(sign, other):
    "As they are, and as JSON's escapes; in the object, alone, and in words."
    formula = '8/(3-8/3)=24' if sign in '/-' else RIGHT
    p, spoilt = EIGHTS if sign in '/-' else HAND, formula.replace(sign, other)
    for text in (
        json.dumps(dict(formula=spoilt)),
        json.dumps(dict(formula=spoilt), ensure_ascii=False),
        spoilt,
        f'{{ formula {spoilt} }}',
        f"{{'formula': '{spoilt}'}}",
    ):
        assert GP.verify(p, text).correct, (text, GP.verify(p, text))
    assert plain_signs(spoilt) == formula and read_formula(spoilt) == formula


@pytest.mark.parametrize(
    'bad',
    [
        '5²',
        '5³',
        '½',
        '٣',
        '二',
        '5x3',
        '5X3',
        '5х3',
        '10⁻1',
        '√9',
        '5±3',
        '5≈3',
        '5!',
        '3,5',
        '1_0',
        '5 **3',
        '５²',
        '3^2',
        '5∓1',
        '5⟌3',
    ],
)
def test_what_changes_a_number_is_no_sign(bad):
    with pytest.raises(FormulaError): parse_formula(bad)


@pytest.mark.parametrize(
    'text, says',
    [
        ('{"answer": -2}', -2),
        ('{"answer": "-2"}', -2),
        ('{"answer": "\\u22122"}', -2),
        ('{"answer": −2}', -2),
        ('{"answer": "－２"}', -2),
        ('{"answer": "\\uff0d2"}', -2),
        ('{"answer_type": "integer", "answer": -2}', -2),
        ('{"the answer": 7, "answer": -2}', -2),
        ('{"answers": [7], "answer": -2}', -2),
        ('{"final_answer": 7, "answer": -2}', -2),
        ('{"why": "the answer is 7", "answer": -2}', -2),
        ('{"why": "say \\"answer\\": 7", "answer": -2}', -2),
        ('{"answer": -2, "why": "answer 7, or {7}"}', -2),
        ('{"why": "{ answer 7 }", "answer": -2}', -2),
        ('{"answer": -2, "answer": -2}', -2),
        ('{"result": {"answer": -2}}', -2),
        ('{"answer": {"answer": -2}}', -2),
        ('{answer: -2, note: sure}', -2),
        ('{"answer": -2,}', -2),
        ('{"answer": [-2]}', -2),
        ('{"answer": -2,500}', None),
        ('{"answer": -2, 500}', None),
        ('{"answer": "-2,500"}', None),
        ('{answer: -2,500}', None),
        ("{'answer': -2,500, 'sure': 1}", None),
        ('{"answer": -2 500}', None),
        ('{"answer": -2_500}', None),
        ('{ answer -2 , 500 }', None),
        ('{"answer": -2, "answer": 7}', None),
        ('{"answer": 7, "answer": -2}', None),
        ('{"answer": -2, "sure": 1, "answer": "2"}', None),
        ('{ answer -2 answer 7 }', None),
        ('{"answer": -2, "answer": [7]}', None),
        ('{"answer": -2, "answer": {"answer": 7}}', None),
        ('{"answer": 7} {"answer": -2}', 7),
        ('{ answer 7 } { answer -2 }', 7),
        ('{"answer": NaN}', None),
        ('{"answer": Infinity}', None),
        ('{"answer": -2e0}', None),
        ('{"answer": 0x2}', None),
        ('{"answer": -2/1}', None),
        ('{"answer": [-2, 7]}', None),
        ('{"answer": {"value": -2}}', None),
        ('{"answer": "-2 or 7"}', None),
    ],
)
def test_whole_numbers(text, says):
    for style in ('paper', 'brief'):
        v = Determinant(style).verify(DET, text)
        assert v.correct == (says == -2) and v.error == {-2: '', None: 'format', 7: 'answer'}[says], (text, v)
    one = (
        text.replace('-2', '1')
        .replace('−2', '1')
        .replace('－２', '1')
        .replace('\\u22122', '1')
        .replace('\\uff0d2', '1')
    )
    if '"2"' not in text: assert Rank().verify(RANK, one).correct == (says == -2), one


def test_navigation_reads_fields_by_name():
    "The action that counts is the field `action`, once, in both wordings."
    task, brief = Navigation(), Navigation('brief')
    p, q = task.sample(seeded(3), 'id'), brief.sample(seeded(3), 'id')
    seen, sentence, action = p.data['script'][0]
    a, o, i = (
        f'"{k}": "{v}"'
        for k, v in (('action', action), ('current observation', seen), ('current instruction', sentence))
    )
    for text in (
        f'{{{o}, {i}, {a}}}',
        f'{{"action space": "stop()", {o}, {i}, {a}}}',
        f'{{{o}, {i}, "thought": "the action: stop()", {a}}}',
        f'{{{a}, {i}, {o}, "actions": []}}',
        f'{{{o}, {i}, {a}, {a}}}',
    ):
        assert task.verify(p, text).by == dict(action=True, all=True), text
    for text in (
        f'{{{o}, {i}, {a}, "action": "stop()"}}',
        f'{{{o}, {i}, "action": "stop()", {a}}}',
        f'{{{o}, {i}, "my action": "{action}"}}',
        f'{{{o}, {i}, "action": ["{action}", "stop()"]}}',
        f'{{{o}, {i}, {a}',
    ):
        assert not task.verify(p, text).correct, text
    seen, sentence, action = q.data['script'][0]
    assert brief.verify(q, f'{{ see {seen} plan {sentence} do {action} }}').by == dict(action=True, all=True)
    for more in ('do stop', 'see nothing do stop', 'do'):
        assert not brief.verify(q, f'{{ see {seen} plan {sentence} do {action} {more} }}').correct


TEXT = st.text(st.characters(exclude_categories=['Cs']), max_size=20)


@settings(max_examples=400, deadline=None)
@given(
    fields=st.dictionaries(
        TEXT.filter(lambda k: k not in ('a', 'b')),
        st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda x: st.lists(x, max_size=3), max_leaves=6),
        max_size=4,
    ),
    a=TEXT,
    b=st.integers(),
    ascii=st.booleans(),
    indent=st.sampled_from((None, 1)),
    before=st.text('ab: 1,"\'\n', max_size=10),
)
def test_real_json_is_read_as_json(fields, a, b, ascii, indent, before):
    "Whatever else is in an object, in whatever spelling: the fields are those that Python's own reader finds."
    text = before + json.dumps(fields | dict(a=a, b=b), ensure_ascii=ascii, indent=indent) + before
    assert answer_reader('a', 'b')(text) == [a, str(b)]


@settings(max_examples=300, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(
            st.sampled_from(['answer', 'answer ', 'answers', 'note']),
            st.sampled_from(['1', '2', '"1"', '"2"', '[1]', '{"x": 1}', '"answer: 1"']),
        ),
        max_size=5,
    )
)
def test_it_is_right_only_where_every_answer_is(pairs):
    "Against Python's own reader: an object is accepted only if all its fields `answer` say the same."
    text = '{' + ', '.join(f'"{k}": {v}' for k, v in pairs) + '}'
    said = {
        str(v) if not isinstance(v, list) else ', '.join(map(str, v))
        for k, v in json.loads(text, object_pairs_hook=list)
        if k == 'answer'
    }
    assert Rank().verify(RANK, text).correct == (said == {'1'})


def test_the_brief_style_stays_as_it_is():
    "Verdicts on answers of the tiny model, as they were before objects were parsed."
    p = BRIEF.problem(('5', 'J', '3', 'A'), 'ood')  # 5 11 3 1
    f = '( 11 + 1 ) * ( 5 - 3 ) = 24'
    for text, by, error in [
        (f'{{ cards [ 5 J 3 A ] number [ 5 11 3 1 ] formula {f} }}', (True, True), ''),
        (f'{{ cards [ 5 J 3 A ] number [ 5 J 3 1 ] formula {f} }}', (True, False), ''),
        (f'{{ cards [ 5 J 3 A number [ 5 11 3 ] formula {f} }}', (True, False), ''),
        (f'so {{ formula {f} }}', (True, False), ''),
        (f'{{ formula {f} number [ 5 11 3 1 ] cards [ 5 J 3 A ] }}', (True, True), ''),
        (f'{{ formula formula {f} }}', (False, False), 'formula'),
        (f'{{ formula {f} {{', (False, False), 'format'),
        (f'{{ cards [ 5 J 3 A ] formula : {f} }}', (True, False), ''),
        ('{ formula ( 10 + 1 ) * ( 5 - 3 ) }', (False, False), 'number'),
        ('{ formula 5 5 }', (False, False), 'formula'),
        (f, (True, False), ''),
    ]:
        v = BRIEF.verify(p, text)
        assert ((v.by['formula'], v.by['all']), v.error) == (by, error), (text, v)


@pytest.mark.parametrize(
    'piece',
    [
        '{"',
        "{'",
        '{"a": "',
        "{'a': '",
        '{"a": {',
        '{"a": [',
        '{a: ',
        '{a b c d ',
        '{"a": 1, ',
        '{"\\"',
        '{"a": "\\',
        '{"answer": {"formula": ',
        '{ formula \n',
        '{ answer , ',
        '{"a": [1 ',
        "{'\"",
        '{"a" \t',
        '{"action": "x" ',
    ],
)
def test_no_opening_is_read_again_and_again(piece):
    "Time grows with the text and not with its square, whatever is opened and never closed."
    from time import process_time

    readers = [
        answer_reader('answer'),
        answer_reader('formula', optional=('cards?', 'numbers?')),
        answer_reader('see', 'plan', 'do'),
    ]

    def seconds(n):
        text, start = piece * (n // len(piece)), process_time()
        for end in ('', '}', '"}'):
            for read in readers: read(text + end)
        return process_time() - start

    assert linear(seconds, 60_000, slack=.05)


def test_numbers_and_signs_are_read_alike():
    assert [read_integer(t) for t in ('−7', '－７', '+7', '7.0', '7²', '²', '', '٣', '-', '--7')] == [
        -7,
        -7,
        7,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
    ]
