"""Rules and settings are registered before the runs that they judge."""
import json, subprocess
from datetime import datetime
from pathlib import Path
from rlheals.running.ledger import registration

ROOT = Path(__file__).parents[1]
KEPT = ROOT/'figures'/'registration.json'


def precedes(registered, ledger, committed):
    """What contradicts a ledger's claim to have been registered: other rules, or for a task that it judges other seeds
    or settings, or tables made before the registration was committed. A registered task may be still to be run."""
    seeds = {t: len(s) for t, s in ledger['seeds'].items()}
    known = {t: registered['settings'][t] for t in seeds}
    settings = {t: {s: v for s, v in c.items() if s in known[t]} for t, c in ledger['settings'].items()}
    return [
        what for what, wrong in dict(
            rules=ledger['rules'] != registered['rules'],
            seeds=not seeds or seeds != {t: registered['seeds'][t] for t in seeds},
            settings=settings != known,
            date=datetime.fromisoformat(ledger['begun']) <= datetime.fromisoformat(committed),
        ).items() if wrong
    ]


def test_what_is_registered_are_the_rules_and_settings_of_today():
    assert json.loads(KEPT.read_text()) == registration()


def test_the_published_ledger_was_registered_before():
    path = ROOT/'figures'/'ledger.json'
    if not path.exists():  # nothing is judged yet, and the README says so
        assert 'No seed has been judged by these rules yet' in (ROOT/'README.md').read_text()
        return
    last = subprocess.run(['git', 'log', '-1', '--format=%cI', '--', KEPT], cwd=ROOT, capture_output=True, text=True)
    assert precedes(json.loads(KEPT.read_text()), json.loads(path.read_text()), last.stdout.strip()) == []


def test_what_contradicts_a_registration_is_found():
    registered = registration()
    ledger = dict(rules=registered['rules'], settings=registered['settings'], begun='2030-01-02T00:00:00+00:00',
                  seeds={t: [*range(n)] for t, n in registered['seeds'].items()})
    committed = '2030-01-01T12:00:00+02:00'
    assert precedes(registered, ledger, committed) == []
    assert precedes(registered, ledger | dict(begun='2030-01-01T09:00:00+00:00'), committed) == ['date']
    fewer = {t: s[:4] for t, s in ledger['seeds'].items()}
    assert precedes(registered, ledger | dict(seeds=fewer), committed) == ['seeds']
    one = {k: dict(rank=v['rank']) for k, v in ledger.items() if k in ('seeds', 'settings')}
    assert precedes(registered, ledger | one, committed) == []
    assert precedes(registered, ledger | one | dict(seeds=dict(rank=[0])), committed) == ['seeds']
    assert precedes(registered, ledger | dict(seeds={}, settings={}), committed) == ['seeds']
    other = json.loads(json.dumps(registered['settings']))
    other['rank']['rl']['updates'] = 7
    assert precedes(registered, ledger | dict(settings=other), committed) == ['settings']
    assert precedes(registered, ledger | dict(rules=registered['rules'] | dict(level=.1)), committed) == ['rules']
