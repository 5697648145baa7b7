"""The ledger: silent where there is nothing, the same from tables as from arrays, and what `rlheals claims` says."""
import json, re, shutil, subprocess
from pathlib import Path
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner
from rlheals.running.plan import snakemake
from rlheals.running.tables import publish
from rlheals.results.claims import CLAIMS
from rlheals.running.cli import app
from rlheals.running.ledger import (PUBLISHED, check_ledger, judge_tasks, make_inputs, read_published, read_run,
                                    write_made_up)
from rlheals.training.runs import Run
from rlheals.results.made_up_runs import DESIGNS, UNKIND, WORLD, Runs
from rlheals.results.style import TASK_NAMES
from rlheals.results.verdicts import markdown
from rlheals.results.trials import FALSE_HERE, false_positives, false_refutations, power

ROOT = Path(__file__).parents[1]


def unlucky(wrong, n, level=.05):
    "Whether a share of `n` runs is more than chance allows at a true share of `level`."
    return stats.binomtest(round(wrong * n), n, level, alternative='greater').pvalue < 1e-4


@pytest.mark.parametrize('world', ['kind', *UNKIND])
@pytest.mark.parametrize('name', DESIGNS)
def test_what_is_false_is_not_called_supported_nor_what_is_true_refuted(name, world):
    """In at most 5 % of the ledgers, for every claim and whichever of its parts is false, all else being as in the
    paper; also where seeds have heavy tails, share their problems, or differ in when they peak."""
    n = 500 if world == 'kind' else 200
    design = DESIGNS[name]._replace(world=DESIGNS[name].world | UNKIND.get(world, {}))
    found = false_positives(design, n)
    assert {c for c, _ in found} == {*CLAIMS, 'any'}
    assert not {k: v for k, v in found.items() if unlucky(v, n)}
    assert not unlucky(false_refutations(design, n)['any'], n)


def test_what_the_paper_reports_is_seen():
    "With the seeds that are registered for GeneralPoints."
    strong = power(DESIGNS['GeneralPoints'], 400)
    weak = {c: p for c, p in strong.items() if c not in FALSE_HERE and p < .8}
    assert DESIGNS['GeneralPoints'].seeds == PUBLISHED['general_points'] - 1 and not weak, weak


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Tables of two made-up tasks where a run of `tiny` would have left them."
    root = tmp_path_factory.mktemp('made')/'runs'
    for n, (task, seeds) in enumerate(dict(general_points=4, rank=3).items()):
        write_made_up(Run('tiny', root=root, task_name=task), Runs(WORLD, seeds, 100, 1, n))
    return root


@pytest.fixture
def root(made, tmp_path): return shutil.copytree(made, tmp_path/'runs')


def claims(*words): return CliRunner().invoke(app, ['claims', *map(str, words)], env=dict(COLUMNS='160'))


def test_command_prints_and_writes(root):
    got = claims('--runs', root)
    assert got.exit_code == 0, got.output
    assert (
        'general_points: 4 seeds judged' in got.output
        and 'rank: 3 seeds judged' in got.output
        and not (root.parent / 'figures').exists()
    )
    assert all(f'│ {c} ' in got.output for c in CLAIMS) and '[' in got.output
    one = claims('--runs', root, '--task', 'rank', '--write')  # shows one, writes all
    assert one.exit_code == 0 and 'general_points:' not in one.output
    folder = root.parent/'figures'/'own'/'tiny'
    table = pd.read_csv(folder/'ledger.csv')
    assert (
        len(table) == 2 * len(CLAIMS)
        and set(table.task) == {'general_points', 'rank'}
        and len(pd.read_csv(folder / 'ledger_parts.csv')) == 2 * sum(len(c.parts) for c in CLAIMS.values())
    )
    assert (folder/'ledger.md').read_text() == markdown(table)
    record = json.loads((folder/'ledger.json').read_text())
    assert (
        record['seeds'] == dict(general_points=[0, 1, 2, 3, 4], rank=[0, 1, 2, 3])
        and record['chooses'] == [0]
        and all(len(h) == 64 for h in record['inputs'].values())
    )


def test_fewer_seeds_when_asked(root):
    got = claims('--runs', root, '--task', 'general_points', '--seeds', 4)
    assert got.exit_code == 0 and 'general_points: 3 seeds judged' in got.output


def test_a_deleted_run_is_missed_and_a_new_one_judged_anew(root):
    run = Run('tiny', root=root, task_name='rank')
    judged = lambda: judge_tasks(read_run(run, check_ledger(run, ['rank'])))[1]
    before = judged()
    shutil.rmtree(root/'tiny'/'rank')
    got = claims('--runs', root, '--task', 'rank')
    assert got.exit_code == 2 and f'rlheals reproduce --profile tiny --task rank --seeds 4 --runs {root}' in ' '.join(
        got.output.split()
    )
    write_made_up(run, Runs(WORLD, 3, 100, 1, 7))
    after = judged()
    assert (before['mean'] != after['mean']).any() and list(before.part) == list(after.part)


def test_run_asks_the_chain_for_what_is_missing(root, monkeypatch):
    "And for nothing else. (The chain itself is not started here.)"
    run, asked = Run('tiny', root=root, task_name='rank'), []
    keep = lambda *a, **k: asked.append((a[1], k['targets'], k['tasks']))
    monkeypatch.setattr('rlheals.running.ledger.execute', keep)
    make_inputs(run, ['rank'])
    assert asked == []
    run.table('change').unlink()
    make_inputs(run, ['rank'], 4)
    assert asked == [(4, ['rank/seed0/tables/change.parquet'], ['rank'])]


def test_a_deleted_run_is_made_again_and_judged(root, monkeypatch):
    """`rlheals claims`, a seed deleted, `rlheals claims`: the chain is asked for that seed (here it copies it back),
    and the same ledger is printed."""
    first, kept = claims('--runs', root, '--task', 'rank'), root.parent/'kept'
    assert first.exit_code == 0
    (root/'tiny'/'rank'/'seed2').rename(kept)
    def chain(run, seeds, targets, tasks, **_):
        assert (seeds, tasks) == (4, ['rank']) and targets and all(t.startswith('rank/seed2/tables/') for t in targets)
        kept.rename(root/'tiny'/'rank'/'seed2')
    monkeypatch.setattr('rlheals.running.ledger.execute', chain)
    again = claims('--runs', root, '--task', 'rank')
    assert again.exit_code == 0 and again.output.endswith(first.output)
    assert 'making them again' in ' '.join(again.output.split())


def test_published_episodes_are_judged_where_there_are_no_tables(root):
    "What is kept beside the figures gives the same ledger, to the last digit; other settings or tasks are refused."
    with_tables = claims('--runs', root, '--write')
    publish(Run('tiny', root=root))
    shutil.rmtree(root)
    got = claims('--runs', root)
    assert got.exit_code == 0 and 'published episodes' in got.output
    tables = lambda text: [l for l in text.splitlines() if l.startswith(('│', '┃'))]
    assert tables(got.output) == tables(with_tables.output)
    folder = root.parent/'figures'
    pd.testing.assert_frame_equal(
        judge_tasks(read_published(Run('tiny', root=root)))[0].fillna(''), pd.read_csv(folder / 'ledger.csv').fillna('')
    )
    assert claims('--runs', root, '--task', 'navigation').exit_code == 2
    record = json.loads((folder/'ledger.json').read_text())
    record['settings']['rank']['rl']['updates'] = 7
    (folder/'ledger.json').write_text(json.dumps(record))
    other = claims('--runs', root, '--task', 'rank')
    assert other.exit_code == 0 and 'were made with earlier settings' in ' '.join(other.output.split())
    with pytest.raises(ValueError, match='other settings of rank'): read_published(Run('tiny', root=root), ['rank'])


def test_what_a_new_ledger_would_drop_is_said(root):
    claims('--runs', root, '--write'); publish(Run('tiny', root=root))
    shutil.rmtree(root/'tiny'/'general_points')
    write = lambda: ' '.join(claims('--runs', root, '--task', 'rank', '--write').output.split())
    assert 'Not in it' not in write()  # taken over
    path = root.parent/'figures'/'ledger.json'
    record = json.loads(path.read_text())
    record['settings']['general_points']['rl']['updates'] = 7
    path.write_text(json.dumps(record))
    assert 'Not in it: general_points, judged in the published ledger by other rules or settings' in write()


def test_a_hole_in_a_table_is_said(root):
    run = Run('tiny', root=root, task_name='rank', seed=2)
    losses = pd.read_parquet(run.table('losses'))
    run.save(losses[losses.checkpoint != 300], 'losses')
    got = claims('--runs', root, '--task', 'rank')
    assert got.exit_code == 2 and "'losses' has 0 rows for seed 2, checkpoint 300" in ' '.join(got.output.split())


@pytest.mark.parametrize(
    'words, says',
    [
        (['--seeds', 2], 'at least 4'),
        (['--profile', 'smoke'], 'at least 3 checkpoints'),
        (['--profile', 'tinny'], 'tiny, smoke'),
        (['--task', 'chess'], 'general_points, navigation'),
        (['--set', 'rl.updatez=3'], 'rl.updates'),
        (['--set', 'surgery.edits=directions,values'], 'add random, interpolation'),
    ],
)
def test_wrong_input_ends_at_once(root, words, says):
    got = claims('--runs', root, *words)
    assert got.exit_code == 2 and says in ' '.join(got.output.split()), got.output


def test_the_chain_has_the_ledger_from_four_seeds_on(tmp_path):
    "What Snakemake plans; nothing is run."
    planned = lambda *a: (
        subprocess.run(
            snakemake(*a, more=['--summary', '--quiet', 'all']), capture_output=True, text=True, check=True
        ).stdout
    )
    (tmp_path/'runs'/'tiny').mkdir(parents=True); (tmp_path/'runs'/'smoke').mkdir()
    assert 'ledger.csv' in planned(Run('tiny', root=tmp_path/'runs'), 4)
    assert 'ledger.csv' not in planned(Run('tiny', root=tmp_path / 'runs'), 3) and 'ledger.csv' not in planned(
        Run('smoke', root=tmp_path / 'runs'), 4
    )


def test_what_is_published_is_what_the_command_wrote():
    "The README's table of verdicts is what `rlheals claims` finds in the episodes beside the figures."
    path, readme = ROOT/'figures'/'ledger.csv', (ROOT/'README.md').read_text()
    assert path.exists() != ('No seed has been judged by these rules yet' in readme)
    assert all(f'| {c} | {claim.says} |' in readme for c, claim in CLAIMS.items())
    if not path.exists(): return
    text, judged = markdown(pd.read_csv(path)), judge_tasks(read_published(Run('tiny', root=ROOT/'runs')))[0]
    assert (ROOT/'figures'/'ledger.md').read_text() == text == markdown(judged)
    assert markdown(judged[judged.task == 'general_points']).split('\n\n')[0] in readme
    for task, rows in judged[judged.task != 'general_points'].groupby('task'):
        said = re.search(rf'\] on {TASK_NAMES[task].lower()} \(([^)]*)\)', readme)[1]
        decided = rows[rows.verdict.isin(('supported', 'refuted'))].groupby('verdict').claim.agg(', '.join)
        assert {*said.split('; ')} == ({f'{claims} {v}' for v, claims in decided.items()} or {'nothing decided'})


def test_verdicts_beside_the_figures_are_the_commands():
    """The gallery says of each claim, under each figure that bears on it, what `rlheals claims` finds in the episodes
    beside the figures; nothing as long as there are none."""
    from rlheals.running.figures import FIGURES
    from rlheals.results.style import TASK_NAMES
    cells = json.loads((ROOT/'nbs'/'gallery.ipynb').read_text())['cells']
    text = '\n'.join(
        ''.join(o['data']['text/markdown'])
        for c in cells
        for o in c.get('outputs', [])
        if 'text/markdown' in o.get('data', {})
    )
    published = (ROOT/'figures'/'ledger.npz').exists()
    assert published or 'Verdicts: ' not in text
    found = {}
    if published:
        claims, _ = judge_tasks(read_published(Run('tiny', root=ROOT / 'runs'), earlier=True))
        found = claims.set_index(['claim', 'task'])['verdict']
    said = 0
    for part in re.split(r'^### ', text, flags=re.M)[1:]:
        figure = part.split(':')[0]
        for claim, verdicts in re.findall(r'\*\*(C\d+[abc]?)\*\* \([^)]*\): ([^.;]*)', part):
            assert claim in FIGURES[figure].claims
            assert verdicts == ', '.join(f'{TASK_NAMES[t]} {v}' for t, v in found[claim].items()), (figure, claim)
            said += 1
    assert said == published * sum(len(f.claims) for f in FIGURES.values())
