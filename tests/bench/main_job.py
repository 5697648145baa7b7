"""Processor seconds of the main job, stage by stage, in this checkout and in another:

    python tests/bench/main_job.py OLD_CHECKOUT [--set KEY=VALUE ...]

Both make the paper's figures with the profile `tiny`, one job at a time, one checkout after the other, and with the
same settings as far as both have them (see `REDUCED`); on a machine that does nothing else."""
import json, os, resource, subprocess, sys, tempfile
from pathlib import Path
import pandas as pd

HERE = Path(__file__).parents[2]
REDUCED = (  # of the default job: fewer of everything, which takes some ten minutes; more with --set
    'sft.max_steps=64',
    'sft.checkpoints=[0,8,16,32,64]',
    'sft.end=64',
    'sft.learning_rate=0.001',
    'rl.starts=[16,64]',
    'rl.updates=3',
    'rl.envs=128',
    'rl.turns=2',
    'rl.learning_rate=0.0001',
    'rl.entropy_coef=0.0',
    'grpo.starts=[64]',
    'grpo.updates=3',
    'baselines.starts=[64]',
    'baselines.rounds=2',
    'surgery.edits=["directions","values","random","interpolation"]',
    'surgery.ranks=[0.5,1.0]',
    'eval.episodes=26',
    'eval.splits=[id,ood_dev]',
    'task.tries=5',
)
def named(checkout, *modules):
    """The first of these modules that a checkout has: what is missing in one would be found in another that is
    installed here to be edited."""
    return next(m for m in modules if (checkout/m.replace('.', '/')).with_suffix('.py').exists())


def run(checkout, folder, settings):
    "Processor seconds of the whole, and seconds of each stage's notebooks."
    words = ['reproduce', '--jobs', '1', '--runs', folder/'runs', *(w for s in settings for w in ('--set', s))]
    words += [w for n in range(1, 15) for w in ('--figure', f'F{n}')]  # the paper's, which both draw
    env = os.environ | dict(PYTHONPATH=str(checkout), HF_HUB_OFFLINE='1', PYTHONSAFEPATH='1')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    module = named(checkout, 'rlheals.running.cli', 'rlheals.cli')
    command = f'import sys; sys.argv[0] = "rlheals"; from {module} import app; app()'
    done = subprocess.run(
        [sys.executable, '-c', command, *map(str, words)], env=env, cwd=folder, capture_output=True, text=True
    )
    if done.returncode: sys.exit(f'{checkout}: {done.stdout[-2000:]}{done.stderr[-2000:]}')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = sum(getattr(after, k) - getattr(before, k) for k in ('ru_utime', 'ru_stime'))
    stages, starting = {}, 0.
    for f in folder.rglob('notebooks/*.ipynb'):
        stage = f.stem.split('-')[0] if f.stem[1:].isdigit() is False else 'figures'
        notebook = json.loads(f.read_text())
        took = notebook['metadata']['papermill']['duration']
        stages[stage] = stages.get(stage, 0.) + took
        # a notebook's time outside its cells: its processes start and end
        starting += took - sum(c['metadata'].get('papermill', {}).get('duration') or 0 for c in notebook['cells'])
    print(f'{checkout}: {starting / sum(stages.values()):.0%} of the time of all jobs is starting and ending processes')
    return spent, stages


def known(checkout, settings):
    "Those of the settings that a checkout has."
    module = named(checkout, 'rlheals.training.rules', 'rlheals.profiles')
    code = f'import json; from {module} import load_profile; print(json.dumps(load_profile("tiny")))'
    env = os.environ | dict(PYTHONPATH=str(checkout), PYTHONSAFEPATH='1')
    has = json.loads(subprocess.run([sys.executable, '-c', code], env=env, stdout=subprocess.PIPE, check=True).stdout)
    names = {f'{section}.{key}' for section, values in has.items() for key in values}
    return [s for s in settings if s.partition('=')[0] in names]


if __name__ == '__main__':
    old, more, took = Path(sys.argv[1]).resolve(), sys.argv[2:], {}
    settings = [*REDUCED, *(w for w in more if w != '--set')]
    for name, checkout in dict(old=old, new=HERE).items():
        with tempfile.TemporaryDirectory() as tmp:
            took[name] = run(checkout, Path(tmp).resolve(), known(checkout, settings))
        print(f'{name}: {took[name][0]:.0f} processor seconds', flush=True)
    table = pd.DataFrame({k: v[1] for k, v in took.items()}).round(1)
    print(table.assign(ratio=(table['new'] / table['old']).round(2)).to_string())
    print(f'all, with starting: {took["new"][0] / took["old"][0]:.2f} of the processor seconds')
