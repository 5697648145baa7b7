"""What makes RL fast here, beside the usual ways: python tests/bench/rl.py [threads] prints ratios measured in one run,
and where the time of a PPO update goes."""
import cProfile, os, pstats, statistics, sys, time, warnings
os.environ.setdefault('HF_HUB_OFFLINE', '1')
warnings.filterwarnings('ignore')
import torch
from measure import seconds
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


class LinearLayers(torch.overrides.TorchFunctionMode):
    "Notes the shapes of all linear layers' products, and whether gradients pass through them."
    def __init__(self): super().__init__(); self.seen = []
    def __torch_function__(self, f, types, args=(), kwargs=None):
        if f is torch.nn.functional.linear:
            x, W = args[:2]
            self.seen.append((x.numel() // x.shape[-1], *W.shape[::-1], torch.is_grad_enabled()))
        return f(*args, **(kwargs or {}))


def products_alone(shapes):
    "Seconds of the matrix products of these layers, forward and, where gradients pass, backward, and of nothing else."
    made = {}
    for m, k, n, _ in shapes:
        if (m, k, n) not in made: made[m, k, n] = torch.randn(m, k), torch.randn(k, n), torch.randn(m, n)
    started = time.perf_counter()
    for m, k, n, trained in shapes:
        x, W, y = made[m, k, n]
        torch.mm(x, W)
        if trained: torch.mm(y, W.T); torch.mm(x.T, y)
    return time.perf_counter() - started


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
    ends = []
    with LinearLayers() as layers:
        train_ppo(fresh()[0], tok, task, ppo, 40, progress=lambda *_: ends.append(len(layers.seen)))
    least = statistics.median(products_alone(layers.seen[ends[-2]:ends[-1]]) for _ in range(5))
    print(
        f'  roofline: the matrix products of such an update alone take {least:.2f} s; with nothing else, PPO would be '
        f'{theirs / least:.1f} times as fast as TRL'
    )

task, taken = Run('tiny').task(), []  # with all its tries: prompts grow, and turns of an episode share their beginnings
for _ in range(3): taken += updates(train_ppo, task, c['rl'] | dict(updates=4))
print(f"an update of the default job, {c['rl']['envs'] * c['rl']['turns']} responses: {statistics.median(taken):.2f} s")

task = load_task('general_points', style='brief', tries=1)
profile = cProfile.Profile()
learner = fresh()[0]
profile.runcall(train_ppo, learner, tok, task, ppo, 40)
stats = pstats.Stats(profile).stats
spent = lambda *names: sum(cumulative for (file, _, name), (_, _, _, cumulative, _) in stats.items() if name in names)
total, backward = (
    spent('train_ppo'),
    spent('run_backward') or spent("<method 'run_backward' of 'torch._C._EngineBase' objects>"),
)
parts = dict(generation=spent('_generate'), forward=spent('_score'), backward=backward, optimiser=spent('step') / 2)
parts['the rest (Python)'] = max(0., total - sum(parts.values()))
print('of PPO, with setting up: ' + ', '.join(f'{k} {100 * v / total:.0f} %' for k, v in parts.items()))
