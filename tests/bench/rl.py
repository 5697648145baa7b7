"""What makes RL fast here, beside the usual ways: python tests/bench/rl.py [threads] prints ratios measured in one run,
and where the time of a PPO update goes."""
import os, statistics, sys, time, warnings
from unittest.mock import patch
os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')
import torch
from measure import LinearLayers, products_alone, seconds
from rlheals.training.grpo import train_grpo
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import encode
from rlheals.training.models import load_model
from rlheals.training.ppo import train_ppo
from rlheals.training.rules import load_profile
from rlheals.training.runs import Run
from rlheals.training.rollouts import play
from rlheals.tasks.protocol import Episode, load_task, problem_set


threads = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
set_up_torch(threads)
path = Run('tiny').checkpoint('sft', 128)  # answers of a usual length, if the default run is there
fresh = lambda: load_model(path if path.exists() else 'tiny', device='cpu')
model, tok = fresh()
task = Run('tiny').task()
task.tries = 1
problems = problem_set(task, 'train', 256)


def one_at_a_time(problems):
    "The reference's way: an episode after the other, `generate` for each response."
    for p in problems:
        e = Episode.start(task, p)
        ids = torch.tensor([encode(tok, e.turns)])
        said = model.generate(ids, max_new_tokens=40, do_sample=True, temperature=1., top_k=0)[0, ids.shape[1]:]
        e.answer(task, tok.decode(said, skip_special_tokens=True))


single, together = [], []
for _ in range(5):  # by turns, so that whatever else the machine does slows both
    single.append(seconds(lambda: one_at_a_time(problems[:16]), 1) / 16)
    together.append(seconds(lambda: play(model, tok, task, problems, 40, 1.), 2) / len(problems))
single, together = statistics.median(single), statistics.median(together)
print(
    f'{threads} threads; rollouts: {1 / together:.0f} episodes per second, {single / together:.1f} times as many as '
    f'one response at a time with generate ({1 / single:.1f})'
)

c = load_profile('tiny')
# first answers only are of like length, and go through the model together
ppo = c['rl'] | dict(updates=4, turns=1, envs=256, log_kl=False, micro_batch=c['rl']['minibatch'])
grpo = c['grpo'] | dict(updates=4)
assert ppo['envs'] * ppo['turns'] == grpo['responses'] and ppo['epochs'] == grpo['epochs']


def updates(train, task, settings):
    "Seconds of each update after the first, which pays for setting up."
    ticks = []
    train(fresh()[0], tok, task, settings, 40, progress=lambda done, total: ticks.append(time.perf_counter()))
    return [b - a for a, b in zip(ticks, ticks[1:])][:-1]  # the last of TRL's takes its leave as well


for style, what in (
    ('brief', "the tiny model's prompts"),
    ('paper', 'prompts of the length of the paper\'s (of whose words the tiny model knows few)'),
):
    task, ours, theirs = load_task('general_points', style=style, tries=1), [], []
    for _ in range(3):
        ours += updates(train_ppo, task, ppo)
        theirs += updates(train_grpo, task, grpo)
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(
        f"an update of {grpo['responses']} responses, {ppo['epochs']} epochs, {what}: PPO here {ours:.2f} s, TRL's "
        f"GRPOTrainer {theirs:.2f} s, {theirs / ours:.1f} times as long"
    )
    if style == 'brief': short = theirs
    ends = []
    with LinearLayers() as layers:
        train_ppo(fresh()[0], tok, task, ppo, 40, progress=lambda *_: ends.append(len(layers.seen)))
    least = statistics.median(products_alone(layers.seen[ends[-2]:ends[-1]]) for _ in range(5))
    print(
        f"  roofline: the linear layers' matrix products alone take {least:.2f} s; with nothing else, PPO would be "
        f'{theirs / least:.1f} times as fast as TRL'
    )


def equal_passes(tokens, scored, rows): return [len(tokens[k:k + rows]) for k in range(0, len(tokens), rows)]


# with all its tries: prompts grow, and turns of an episode share their beginnings
task, settings, by_length, by_number = Run('tiny').task(), c['rl'] | dict(updates=4), [], []
for _ in range(3):
    by_length += updates(train_ppo, task, settings)
    with patch('rlheals.training.reading.pass_sizes', equal_passes): by_number += updates(train_ppo, task, settings)
by_length, by_number = statistics.median(by_length), statistics.median(by_number)
print(
    f"an update of the default job, {settings['envs'] * settings['turns']} responses: {by_length:.2f} s, with equal "
    f'numbers of rows in each pass {by_number:.2f} s, {by_number / by_length:.2f} times as long'
)

task = load_task('general_points', style='brief', tries=1)
ticks, took = [], torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


def watched(done, total):
    "The third update goes through the profiler, which makes it a little slower."
    ticks.append(time.perf_counter())
    if done == 2: took.start()
    if done == 3: took.stop()


train_ppo(fresh()[0], tok, task, ppo, 40, progress=watched)
own = {e.key: e.self_cpu_time_total / 1e6 for e in took.key_averages() if not e.key.startswith('ProfilerStep')}
products = sum(own.get(f'aten::{f}', 0.) for f in ('mm', 'addmm', 'bmm', 'baddbmm'))
print(
    f'where an update of {ticks[2] - ticks[1]:.2f} s goes: matrix products {products:.2f} s, all other operators of '
    f"PyTorch {sum(own.values()) - products:.2f} s, the rest is Python's; with the operators alone, PPO would be "
    f'{short / sum(own.values()):.1f} times as fast as TRL'
)
