"""What `RotationCallback` costs at its default interval: the same SFT of the tiny model by TRL's trainer, with it and
without, in turns.

    python tests/bench/callback.py [--steps 300] [--runs 3]
"""
import argparse, statistics, tempfile, time


def train(steps, watched):
    "Seconds of one run, and the callback, if it had one."
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from rlheals.beyond.during_training import RotationCallback
    from rlheals.training.computing import set_up_torch
    from rlheals.training.models import load_model
    set_up_torch(1)
    texts = [f'solve {a} {b} {c} {d} : {{ cards [ {a} {b} {c} {d} ] }}' for a in range(1, 9) for b in range(1, 9)
             for c in range(1, 9) for d in range(1, 9)]
    model, tok = load_model('tiny', 'cpu')
    with tempfile.TemporaryDirectory() as d:
        args = SFTConfig(output_dir=d, max_steps=steps, per_device_train_batch_size=16, learning_rate=1e-4,
                         report_to='none', disable_tqdm=True, use_cpu=True, save_strategy='no', bf16=False,
                         activation_checkpointing=False, logging_steps=steps)
        trainer = SFTTrainer(model, args, train_dataset=Dataset.from_dict(dict(text=texts)), processing_class=tok)
        watch = RotationCallback(trainer) if watched else None
        if watch: trainer.add_callback(watch)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, watch


if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--steps', type=int, default=300)
    p.add_argument('--runs', type=int, default=3)
    a = p.parse_args()
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar(); disable_progress_bars()
    train(10, True)  # does not count
    ratios = []
    for _ in range(a.runs):
        (plain, _), (watched, watch) = train(a.steps, False), train(a.steps, True)
        ratios.append(watched / plain)
        n = len({r['step'] for r in watch.rows})
        print(f'{a.steps} steps: {plain:.1f} s, with the callback {watched:.1f} s: {watched / plain:.3f} times as '
              f'long; measured every {watch.every} steps, {n} times', flush=True)
    print(f'median {statistics.median(ratios):.3f} times (at most 1.1)')
