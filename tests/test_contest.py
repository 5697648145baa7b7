"""The contest of explanations of forgetting: what is kept, what is noticed, and what is refused."""
from unittest.mock import patch
import pandas as pd
import pytest
from filelock import FileLock
from rlheals.core.files import Damaged
from rlheals.beyond import forgetting_runs
from rlheals.beyond.forgetting_runs import Variant, contest_runs, measure_variant, run_contest, variant_run
from rlheals.beyond.what_predicts_forgetting import paths
from rlheals.running.studies import continue_contest, save_s7, write_contest

FEW = [Variant('plain-rate', rate=.5), Variant('lora', 'lora-4'), Variant('osf', 'osf-0.5')]


def measured(v, run):
    "What `measure_variant` would return, without any training."
    steps = run.config['sft']['checkpoints']
    table = pd.DataFrame(dict(checkpoint=steps, measure='ood', value=.5))
    return table.assign(variant=v.name, method=v.family, changes=v.differs, seed=v.seed)


@pytest.fixture
def made():
    "Names of the variants that are measured, in their order."
    names = []
    def counted(v, run):
        names.append(v.name)
        return measured(v, run)
    with patch.object(forgetting_runs, 'measure_variant', counted): yield names


def test_a_run_that_fails_leaves_the_others(tmp_path, made):
    def full(v, run):
        if v == FEW[1]: raise OSError('no space left on device')
        return measured(v, run)
    with patch.object(forgetting_runs, 'measure_variant', full), pytest.raises(OSError): run_contest(tmp_path, FEW)
    table = run_contest(tmp_path, FEW)
    assert made == [v.name for v in FEW[1:]]
    assert [*table.variant.unique()] == [v.name for v in FEW]  # in the order of the list


def test_processes_share_the_list(tmp_path, made):
    with FileLock(tmp_path/f'.{FEW[0].name}.lock'):  # another process has the first
        assert run_contest(tmp_path, FEW) is None
    assert made == [v.name for v in FEW[1:]]
    assert len(run_contest(tmp_path, FEW)) and made == [v.name for v in (*FEW[1:], FEW[0])]


def test_a_damaged_file_is_named_and_made_again(tmp_path, made):
    run_contest(tmp_path, FEW)
    path = tmp_path/f'{FEW[1].name}.parquet'
    path.write_bytes(path.read_bytes()[:-9])
    for use in (lambda: run_contest(tmp_path, FEW), lambda: write_contest(contest_runs(tmp_path, FEW), tmp_path)):
        with pytest.raises(Damaged, match=f'{path.name} is damaged.*delete it, and run the contest again'): use()
    path.unlink()
    made.clear()
    assert len(run_contest(tmp_path, FEW)) and made == [FEW[1].name]


def test_a_file_of_another_variant_is_named_before_anything_is_trained(tmp_path, made):
    run_contest(tmp_path, FEW[:1])
    (tmp_path/f'{FEW[0].name}.parquet').rename(tmp_path/f'{FEW[1].name}.parquet')
    made.clear()
    with pytest.raises(ValueError, match=f'{FEW[1].name}.parquet was made with other settings: delete it'):
        run_contest(tmp_path, FEW)
    assert made == []


@pytest.mark.parametrize('how', [dict(variants=[FEW[0], Variant('lora', 'lora-4', seed=3)]),
                                 dict(variants=FEW, changes=('eval.splits=id,ood',))])
def test_published_seeds_and_problems_are_refused_before_anything_is_trained(tmp_path, made, how):
    with pytest.raises(ValueError, match='eval.splits=id,ood_dev and a seed from 90 on'): run_contest(tmp_path, **how)
    assert made == [] and not [*tmp_path.glob('*.parquet')]


def test_nothing_is_judged_while_a_run_is_missing_and_another_clone_goes_on(tmp_path, made):
    here, there, figures = tmp_path/'here', tmp_path/'there', tmp_path/'figures'
    with pytest.raises(ValueError, match='no run of the contest has been made'):
        write_contest(contest_runs(here, FEW), figures)
    run_contest(here, FEW[:2])
    write_contest(contest_runs(here, FEW), figures)
    with pytest.raises(ValueError, match='2 of 3 runs of the contest have been made'): save_s7(figures)
    assert not [*figures.glob('S7.*')]
    made.clear()
    assert continue_contest(contest_runs(there, FEW), figures) == 2
    assert len(run_contest(there, FEW)) and made == [FEW[2].name]
    (figures/'forgetting.csv').write_text((figures/'forgetting.csv').read_text().replace('0.5', '0.6'))
    with pytest.raises(ValueError, match='forgetting.csv differs from its record'):
        continue_contest(contest_runs(tmp_path/'elsewhere', FEW), figures)


def test_the_analysis_reads_what_a_run_measures_and_refuses_less(tmp_path):
    small = ('sft.max_steps=2', 'sft.warmup_steps=1', 'sft.checkpoints=0,2', 'eval.episodes=2')
    table = measure_variant(FEW[0], variant_run(FEW[0], tmp_path, 'smoke', small))
    assert len(paths(table)) == 1
    with pytest.raises(ValueError, match=f'{FEW[0].name} lacks rotation at checkpoint 2'):
        paths(table[table.measure != 'rotation'])
    with pytest.raises(ValueError, match='lacks ood at checkpoint 0'):
        paths(table[(table.measure != 'ood') | (table.checkpoint > 0)])
