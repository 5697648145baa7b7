"""What makes RL fast here, beside the usual ways: python tests/bench/rl.py prints ratios measured in one run, and where the time of a PPO update goes."""
import cProfile, os, pstats, sys
os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch
from measure import seconds
from rlheals.grpo import train_grpo
from rlheals.models import encode, load_model, set_up_torch
from rlheals.ppo import train_ppo
from rlheals.profiles import Run, load_profile
from rlheals.rollout import play
from rlheals.tasks import Episode, problem_set


threads = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
set_up_torch(threads)
path = Run('tiny').checkpoint('sft', 128)  # answers of a usual length, if the default run is there
model, tok = load_model(path if path.exists() else 'tiny', device='cpu')
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


single = seconds(lambda: one_at_a_time(problems[:24]), 1) / 24
together = seconds(lambda: play(model, tok, task, problems, 40, 1.)) / len(problems)
print(f'{threads} threads; rollouts: {1 / together:.0f} episodes per second, {single / together:.1f} times as many as one response at a time with generate ({1 / single:.1f})')

c = load_profile('tiny')
ppo = c['rl'] | dict(updates=1, turns=1, envs=256, log_kl=False)
grpo = c['grpo'] | dict(updates=1)
assert ppo['envs'] * ppo['turns'] == grpo['responses'] and ppo['epochs'] == grpo['epochs']
fresh = lambda: load_model(path if path.exists() else 'tiny', device='cpu')[0]
ours = seconds(lambda: train_ppo(fresh(), tok, task, ppo, 40))
theirs = seconds(lambda: train_grpo(fresh(), tok, task, grpo, 40))
print(f"an update of {grpo['responses']} responses, {ppo['epochs']} epochs: PPO here {ours:.2f} s, TRL's GRPOTrainer {theirs:.2f} s, {theirs / ours:.1f} times as long (both with loading and set-up)")

profile = cProfile.Profile()
learner = fresh()
profile.runcall(train_ppo, learner, tok, task, ppo, 40)
stats = pstats.Stats(profile).stats
spent = lambda *names: sum(cumulative for (file, _, name), (_, _, _, cumulative, _) in stats.items() if name in names)
total, backward = spent('train_ppo'), spent('run_backward') or spent("<method 'run_backward' of 'torch._C._EngineBase' objects>")
parts = dict(generation=spent('generate') if ('generate' in {n for _, _, n in stats}) else 0., forward=spent('_score'), backward=backward, optimiser=spent('step') / 2)
parts['the rest (Python)'] = max(0., total - sum(parts.values()))
print('of a PPO update: ' + ', '.join(f'{k} {100 * v / total:.0f} %' for k, v in parts.items()))
