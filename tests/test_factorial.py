"""The factorial study and its confirmation: what is kept, what is noticed, and what is refused."""
from dataclasses import replace
from unittest.mock import patch
import pandas as pd
import pytest
from rlheals.core.environment import ROOT
from rlheals.core.files import Damaged
from rlheals.beyond import factorial
from rlheals.beyond.confirmation import REGISTERED, confirm, registered
from rlheals.beyond.factorial import FACTORS, factorial_cell, factorial_study, factorial_table, levels_of
from rlheals.beyond.when_rl_heals import confirmation, effects, made_up_study, power
from rlheals.running.studies import continue_factorial, save_s8, write_factorial
from rlheals.training.runs import Run

DEVELOPMENT = ('eval.splits=id,ood_dev',)


@pytest.fixture
def run(tmp_path): return Run('tiny', DEVELOPMENT, 91, tmp_path)


@pytest.fixture
def made():
    "Names of the cells that are trained, in their order; their results are made up."
    names, of = [], dict(margin=1., chance=.1, success=.5, first_try=.4)
    def trained(run, rl, *rest):
        names.append(f'{run.seed}/{rl.root.name}')
        return None, None, pd.DataFrame(dict(update=[0, 1], metric='response_margin', value=[2., 3.]))
    with (patch.object(factorial, '_start', lambda *what: of), patch.object(factorial, '_trained', trained),
          patch.object(factorial, 'all_responses', lambda *what: of)): yield names


def test_a_study_that_is_stopped_goes_on_with_the_cell_it_was_at(run, made):
    def stopped(run, rl, *rest):
        if (run.seed, rl.root.name) == (92, '05'): raise KeyboardInterrupt
        return now(run, rl, *rest)
    now, what = factorial._trained, dict(seeds=(91, 92), cells=(0, 5, 10))
    with patch.object(factorial, '_trained', stopped), pytest.raises(KeyboardInterrupt): factorial_study(run, **what)
    assert made == ['91/00', '91/05', '91/10', '92/00']
    with pytest.raises(ValueError, match='seed92/tables/factorial-05.parquet is missing: run the study again'):
        factorial_table(run, **what)
    factorial_study(run, **what)
    assert made == ['91/00', '91/05', '91/10', '92/00', '92/05', '92/10']
    found = factorial_table(run, **what)
    # of the margin, the change is that of its mean over the last updates
    assert len(found) == 6 * 4 and {*found[found.response == 'margin'].change} == {1.5}


def test_the_weights_of_sft_stay_until_all_cells_are_made(run, made):
    weights = run.path('factorial', 'sft+1')
    weights.mkdir(parents=True)
    factorial_study(run, (91,), range(15))
    assert weights.exists()
    factorial_study(run, (91,))
    assert not weights.exists() and len(made) == 16


def test_a_damaged_cell_is_named_and_made_again(run, made):
    what = dict(seeds=(91,), cells=(0, 5))
    factorial_study(run, **what)
    path = run.table('factorial-05')
    path.write_bytes(path.read_bytes()[:-9])
    for use in (factorial_study, factorial_table):
        with pytest.raises(Damaged, match='factorial-05.parquet is damaged.*delete it, and run the study again'):
            use(run, **what)
    path.unlink()
    factorial_study(run, **what)
    assert made == ['91/00', '91/05', '91/05'] and len(factorial_table(run, **what))


def test_a_cell_of_other_settings_is_not_taken_for_one_of_the_study(run, made):
    what = dict(seeds=(91,), cells=(0, 5))
    with patch.dict(FACTORS, entropy=('entropy bonus', 'rl.entropy_coef=0.0', 'rl.entropy_coef=0.02')):
        factorial_study(run, **what)  # cell 0 has no entropy bonus in either
    with pytest.raises(ValueError, match='factorial-05.parquet was made with other settings: run the study again'):
        factorial_table(run, **what)
    factorial_study(run, **what)
    assert made == ['91/00', '91/05', '91/05'] and len(factorial_table(run, **what))


@pytest.mark.parametrize('changes, seed', [(DEVELOPMENT, 89), (DEVELOPMENT, 0), ((), 91), ((), 0)])
@pytest.mark.parametrize('method', ['rl', 'further_sft'])
def test_published_seeds_and_problems_are_refused(tmp_path, made, changes, seed, method):
    wrong = Run('tiny', changes, seed, tmp_path)
    with pytest.raises(ValueError, match='needs --set eval.splits=id,ood_dev and seeds from 90 on'):
        factorial_cell(wrong, '00', levels_of(0), method)
    assert made == [] and not [*tmp_path.iterdir()]


def test_nothing_is_judged_while_a_cell_is_missing_and_another_clone_goes_on(run, made, tmp_path):
    folder, elsewhere = tmp_path/'figures', replace(run, root=tmp_path/'elsewhere')
    factorial_study(run, (91, 92), range(15))
    write_factorial(run, (91, 92), folder)
    with pytest.raises(ValueError, match='30 of 32 cells of the study have been made'): save_s8(folder)
    made.clear()
    assert continue_factorial(elsewhere, (91, 92), folder) == 30
    factorial_study(elsewhere, (91, 92))
    assert made == ['91/15', '92/15'] and len(factorial_table(elsewhere, (91, 92)))
    (folder/'factorial.csv').write_text((folder/'factorial.csv').read_text().replace('1.5', '1.6'))
    with pytest.raises(ValueError, match='factorial.csv differs from its record'):
        continue_factorial(replace(run, root=tmp_path/'third'), (91, 92), folder)


def test_a_table_that_lacks_one_run_is_refused():
    whole = made_up_study()
    lacks = whole[(whole.seed != 94) | (whole.cell != '07')]
    for use in (effects, confirmation):
        with pytest.raises(ValueError, match="lacks runs of the design for 'margin'"): use(lacks)
    with pytest.raises(ValueError, match='the same two or more cells'): power(lacks)


def test_nothing_is_confirmed_that_is_not_registered(run, made, tmp_path):
    made_up_study(dict(updates=3.)).to_csv(tmp_path/'factorial.csv', index=False)
    with pytest.raises(ValueError, match=f'{REGISTERED} is missing'): confirm(run, tmp_path)
    (tmp_path/REGISTERED).write_text('{}')
    with pytest.raises(ValueError, match=f'{REGISTERED} contradicts this run in arms'): confirm(run, tmp_path)
    assert made == []


def test_a_registration_that_is_kept_still_says_what_would_be_run():
    folder = ROOT/'figures'/'development'
    if (folder/REGISTERED).exists(): assert registered(Run('tiny', DEVELOPMENT), folder)
    else: assert not [*folder.glob('confirmation*')]  # nothing has been confirmed without one
