"""What the README's shortened run of `smollm2` took, stage by stage, beside what was planned; and what the model
answered before and after SFT.

    rlheals reproduce --profile smollm2 --set ...        (as in the README)
    python tests/bench/smollm2.py [--runs DIRECTORY] [--write]    (--write: figures/smollm2-short)
"""
import argparse, json, re, shlex, shutil
from pathlib import Path
import pandas as pd
from rlheals.running.duration import STAGES, seconds_of, this_device
from rlheals.training.runs import Run

ROOT = Path(__file__).parents[2]
TO = ROOT/'figures'/'smollm2-short'


def shortened(root):
    "The run of the README's command."
    said = re.search(
        r'^rlheals reproduce --profile smollm2 (--set (?:.*\\\n)*.*)$', (ROOT / 'README.md').read_text(), re.M
    )[1]
    return Run('smollm2', tuple(w for w in shlex.split(said.replace('\\\n', ' ')) if w != '--set'), root=Path(root))


def stages(run):
    "Minutes of each stage: of its notebooks from beginning to end, and as the plan for this machine has it."
    device, _ = this_device()
    took = lambda f: json.loads(f.read_text())['metadata']['papermill']['duration'] / 60
    of = {
        s: [
            f
            for f in sorted(run.path('notebooks').glob('*.ipynb'))
            if f.stem.split('-')[0] == dict(evaluate='eval').get(s, s)
        ]
        for s in STAGES
    }
    return pd.DataFrame(
        [
            dict(
                stage=s,
                notebooks=len(of[s]),
                minutes=round(sum(map(took, of[s])), 1),
                planned=round(seconds_of(run, s, device) / 60, 1),
            )
            for s in STAGES
        ]
    )


def answers(run):
    "The cell of the executed notebook of SFT in which the model answers one problem of each split, before and after."
    cells = json.loads(run.path('notebooks', 'sft.ipynb').read_text())['cells']
    texts = (''.join(''.join(o['text']) for o in c.get('outputs', ()) if o['output_type'] == 'stream') for c in cells)
    return next(t for t in texts if 'step 0:' in t)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', default='runs')
    parser.add_argument('--write', action='store_true')
    args = parser.parse_args()
    run = shortened(args.runs)
    if not (run.dir / 'figures' / 'F1.json').exists():
        raise SystemExit(f'{run.dir} has no finished run: make it first, with the command of the README')
    table = stages(run)
    print(table.to_string(index=False), answers(run), sep='\n\n')
    if args.write:
        shutil.rmtree(TO, ignore_errors=True)
        shutil.copytree(run.dir/'figures', TO)
        table.to_csv(TO/'stages.csv', index=False, lineterminator='\n')
        (TO/'answers.txt').write_text(answers(run))
