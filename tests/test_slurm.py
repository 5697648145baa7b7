"""The chain as jobs of SLURM: of the cluster that answers here, or else of a SLURM of one node that the test starts
(.ci/slurm)."""
import os, re, shutil, signal, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
import pytest
from rlheals.running.locking import lock_run
from rlheals.running.plan import snakemake
from rlheals.running.locking import queue_name
from rlheals.training.runs import Run

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
CHANGES = ('rl.updates=24', 'rl.envs=16', 'rl.turns=2')  # long enough to be killed in


def asks(run):
    "Rule (of the first task) -> what Snakemake says that its jobs ask for."
    (run.root/run.dir.name).mkdir(parents=True, exist_ok=True)
    said = subprocess.run(snakemake(run, jobs=8, more=['--dry-run']), capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    found = re.findall(
        r'^rule (\w+)_(?:\d+|all):\n(?:    .*\n)*?(?:    threads: (\d+)\n)?    resources: (.*)\n', said.stdout, re.M
    )
    return {
        rule: dict(pair.split('=', 1) for pair in text.split(', ')) | dict(threads=threads or '1')
        for rule, threads, text in found
    }


def test_jobs_ask_for_what_the_profile_says(tmp_path):
    run = Run(
        'smoke',
        (
            'cluster.sft_memory=2.5',
            'cluster.sft_hours=0.5',
            'cluster.rl_gpus=2',
            'cluster.rl_memory=64',
            'cluster.rl_hours=36',
            'cluster.other_gpus=1',
            'cluster.other_hours=0.01',
            'cluster.partition=a100',
            'rl.threads=3',
        ),
        root=tmp_path,
    )
    found = asks(run)
    want = dict(
        sft=dict(mem_mb='2560', runtime='30', threads='2'),
        rl=dict(mem_mb='65536', runtime='2160', gpu='2', threads='3'),
        grpo=dict(mem_mb='65536', runtime='2160', gpu='2', threads='1'),
    )
    want['baselines'] = want['grpo']
    for rule in ('evaluate', 'spectra', 'surgery', 'drift', 'figure'):
        want[rule] = dict(mem_mb='4096', runtime='1', gpu='1', threads='1')
    assert {
        rule: {k: v for k, v in have.items() if k in ('mem_mb', 'runtime', 'gpu', 'threads')}
        for rule, have in found.items()
    } == want
    assert all(have['slurm_partition'] == 'a100' and have['nodes'] == '1' for have in found.values())
    assert not any('gpu' in have or 'slurm_partition' in have for have in asks(Run('smoke', root=tmp_path)).values())


def test_jobs_on_this_machine_are_not_limited_by_it(home):
    "More memory and GPUs than there are, and no time: the same run, and done."
    run = Run('smoke', root=home/'runs')
    figure, table = run.dir/'figures'/'F3.csv', run.table('eval-rl-00')
    reproduce(home).communicate()  # figures of the second seed that other tests have left there
    before = figure.read_bytes(), table.read_bytes()
    figure.unlink(); table.unlink()
    done = reproduce(
        home,
        *(
            x
            for c in ('other_memory=9999999', 'other_gpus=64', 'other_hours=0.0001')
            for x in ('--set', f'cluster.{c}')
        ),
    ).communicate()
    assert 'jobs done' in done[0], done[1]
    assert (figure.read_bytes(), table.read_bytes()) == before


@pytest.mark.parametrize(
    'words, says',
    [
        (['--executor', 'slrum'], 'must be local or slurm'),
        (['--executor', 'slurm', '--set', 'cluster.rl_gpus=-1'], 'must be at least 0'),
        (['--executor', 'slurm', '--set', 'cluster.rl_hours=0'], 'above 0'),
        (['--executor', 'slurm', '--set', 'cluster.rl_memory=much'], 'must be a number'),
    ],
)
def test_what_cannot_be_is_said_at_once(tmp_path, words, says):
    process = reproduce(tmp_path, *words)
    _, error = process.communicate()
    assert process.returncode == 2 and says in error and 'Traceback' not in error
    assert not (tmp_path/'runs').exists()


STARTED = []


def reproduce(cwd, *words):
    STARTED.append(
        subprocess.Popen(
            [str(BIN / 'rlheals'), 'reproduce', '--profile', 'smoke', *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | dict(HF_HUB_OFFLINE='1'),
            # a shell that runs tests in the background
            # has it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    )
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_is_left():
    "A test that fails takes its command with it."
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None: process.terminate(); process.communicate()


@pytest.fixture(scope='module')
def slurm(tmp_path_factory):
    "A SLURM whose commands answer."
    if find_spec('snakemake_executor_plugin_slurm') is None:
        pytest.skip("no snakemake-executor-plugin-slurm here: pip install 'rlheals[slurm]'")
    settings = tmp_path_factory.mktemp('profile')
    (settings/'config.yaml').write_text('slurm-init-seconds-before-status-checks: 2\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SNAKEMAKE_PROFILE', str(settings))
        if shutil.which('sinfo') and subprocess.run(['timeout', '20', 'sinfo'], capture_output=True).returncode == 0:
            yield
            return
        if not all(map(shutil.which, ('munged', 'slurmctld', 'slurmd'))) or os.getuid():
            pytest.skip(
                'no SLURM answers, and for one of its own the test needs root and the packages slurm-wlm and munge'
            )
        one = subprocess.Popen(
            [str(ROOT / '.ci' / 'slurm'), 'sh', '-c', 'echo "$PATH"; echo "$SLURM_CONF"; exec cat'],
            env=os.environ | dict(GPUS='2'),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            for name in ('PATH', 'SLURM_CONF'): patch.setenv(name, one.stdout.readline().strip())
            assert os.environ['SLURM_CONF'], 'SLURM did not start'
            yield
        finally: one.stdin.close(); one.wait(timeout=120)


def jobs(run, rule=''):
    "The numbers of a run's jobs in the queue, of one rule, that run."
    said = subprocess.run(
        ['squeue', '--noheader', '--states=RUNNING', '--format=%A %j %k'], capture_output=True, text=True, check=True
    ).stdout
    return [
        line.split()[0]
        for line in said.splitlines()
        if line.split()[1].startswith(queue_name(run.dir)) and f'rule_{rule}' in line
    ]


def wait_for(what, process, seconds=1800):
    until = time.time() + seconds
    while not (found := what()):
        assert process.poll() is None, 'it ended before: ' + ''.join(process.communicate())
        assert time.time() < until, 'it does not come'
        time.sleep(.1)
    return found


def tables(run):
    return {
        str(p.relative_to(run.dir)): p.read_bytes()
        for p in sorted(run.dir.rglob('*'))
        if p.suffix == '.parquet' or (p.suffix == '.csv' and p.parent.name == 'figures')
    }


@pytest.mark.long
def test_smoke_passes(slurm, home, tmp_path):
    "Every table is the one that jobs without SLURM make."
    process = reproduce(tmp_path, '--executor', 'slurm', '--jobs', '4')
    said, error = process.communicate(timeout=7200)
    assert process.returncode == 0, error + said
    run = Run('smoke', root=tmp_path/'runs')
    mine, theirs = tables(run), tables(Run('smoke', root=home/'runs'))  # which may have more seeds and tasks by now
    assert {n for n in mine if n.endswith('.csv')} and {n: d for n, d in mine.items() if n.endswith('.parquet')} == {
        n: theirs[n] for n in mine if n.endswith('.parquet')
    }
    assert '] rl-000002' in said and not (run.dir/'.queue').exists() and not jobs(run)
    again, _ = reproduce(tmp_path).communicate()
    assert 'nothing to do' in again  # on this machine, too


def changed(root): return Run('smoke', CHANGES, root=root/'runs')
def flags(): return [x for c in CHANGES for x in ('--set', c)] + ['--figure', 'F6']


@pytest.mark.long
def test_killed_and_requeued(slurm, tmp_path):
    """RL that is killed in the middle and RL that is requeued go on where they were, and end with the tables of an
    undisturbed run."""
    whole = tmp_path/'whole'; whole.mkdir()
    process = reproduce(whole, *flags())
    said, error = process.communicate()
    assert process.returncode == 0, error + said
    (tmp_path/'hurt').mkdir()
    run = changed(tmp_path/'hurt')
    # one after the other
    process = reproduce(tmp_path/'hurt', *flags(), '--executor', 'slurm', '--jobs', '1', '--set', 'cluster.rl_gpus=0')
    begun = []
    for how in (['scontrol', 'requeue'], ['scancel', '--signal=KILL', '--full']):
        # at least one update is done
        state = wait_for(lambda: [p for p in run.path('partial').glob('rl-*.pt') if p.name not in begun], process)[0]
        begun.append(state.name)
        number = jobs(run, 'rl')[0]
        subprocess.run([*how, number], check=True)
        wait_for(lambda: number not in jobs(run, 'rl'), process, 120)
        assert not (run.checkpoint('rl', int(state.stem[3:])) / 'model.safetensors').exists(), (
            'it had ended before it was killed'
        )
    said, error = process.communicate(timeout=7200)
    assert process.returncode == 0, error + said
    log = (run.dir/'snakemake.log').read_text()
    # SFT, RL, the figure; the killed one is given to SLURM again, the requeued one is still the same job
    assert log.count('has been submitted with SLURM jobid') == 1 + 2 + 1 + 1
    assert tables(run) == tables(changed(whole))


@pytest.mark.long
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_job_outlives_the_command(slurm, tmp_path, number):
    "Ended, the command takes its jobs with it; killed, the next command does."
    run = changed(tmp_path)
    process = reproduce(tmp_path, *flags(), '--executor', 'slurm')
    job = wait_for(lambda: jobs(run), process)
    process.send_signal(number)
    process.communicate(timeout=120)
    if number == signal.SIGKILL:
        assert (run.dir/'.queue').exists() and jobs(run) == job
        # it has not begun, as others on a cluster
        subprocess.run(
            [
                'sbatch',
                '--hold',
                '--job-name',
                f'{queue_name(run.dir)}_waiting',
                '--output',
                '/dev/null',
                '--wrap',
                'true',
            ],
            check=True,
            capture_output=True,
        )
        said = []
        with lock_run(run.dir, said.append): pass
        assert re.search(r'cancelled \d SLURM jobs', said[-1]), said
    assert not jobs(run) and not (run.dir/'.queue').exists()


@pytest.mark.long
def test_a_job_has_its_gpus(slurm, tmp_path):
    "What the scheduler is asked for, it gives: here in name only."
    if subprocess.run('sinfo --noheader --format=%G | grep -q gpu', shell=True).returncode:
        pytest.skip('this cluster has no GPU')
    run = Run('smoke', ('cluster.sft_gpus=1', 'cluster.sft_memory=3'), root=tmp_path/'runs')
    process = reproduce(
        tmp_path,
        '--figure',
        'F3',
        '--executor',
        'slurm',
        '--jobs',
        '1',
        '--set',
        'cluster.sft_gpus=1',
        '--set',
        'cluster.sft_memory=3',
    )
    try: job = wait_for(lambda: jobs(run, 'sft'), process)[0]
    finally: process.terminate()
    shown = subprocess.run(['scontrol', 'show', 'job', job], capture_output=True, text=True, check=True).stdout
    process.communicate(timeout=120)
    assert (
        re.search(r'TRES=cpu=2,mem=3G,node=1', shown)
        and re.search(r'gres[:/]gpu[:=]1', shown)
        and 'TimeLimit=01:00:00' in shown
    ), shown


@pytest.mark.long
def test_a_partition_that_is_not_there(slurm, tmp_path):
    process = reproduce(tmp_path, '--executor', 'slurm', '--set', 'cluster.partition=nowhere')
    _, error = process.communicate()
    assert (
        process.returncode == 2
        and 'cluster.partition must be one of' in error
        and not (tmp_path / 'runs').exists()
    )
