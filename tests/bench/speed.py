"""What the design choices for speed are worth here: python tests/bench/speed.py prints ratios, measured in one run."""
import torch
from measure import seconds
from rlheals.tasks.general_points import GeneralPoints
from rlheals.training.computing import set_up_torch
from rlheals.training.generation import encode, generate
from rlheals.training.models import load_model
from rlheals.training.logprobs import logprobs_and_values
from rlheals.training.rules import load_profile
from rlheals.training.sft import train_sft
from rlheals.core.randomness import seeded
from rlheals.tasks.protocol import problem_set
from rlheals.tasks.gym import expert_dataset


def training_step(model, contexts, answers):
    model.zero_grad()
    logprobs_and_values(model, None, contexts, answers, rows=64)[0].sum().backward()


set_up_torch(1)
model, tok = load_model('tiny', device='cpu')
task = GeneralPoints('brief')
problems = problem_set(task, 'train', 64)
contexts = [encode(tok, [task.prompt(p)]) for p in problems]
answers = [tok.encode(task.expert(p, seeded(0)), add_special_tokens=False) for p in problems]

together = seconds(lambda: generate(model, tok, contexts, 40))
alone = seconds(lambda: [generate(model, tok, [c], 40) for c in contexts[:8]], 1) * len(contexts) / 8
print(f'generation, 64 answers: one batch {alone / together:.1f} times as fast as one by one')

step = lambda: training_step(model, contexts, answers)
fast = seconds(step)
torch.set_float32_matmul_precision('highest')
plain = seconds(step)
torch.set_float32_matmul_precision('medium')
print(f'training step: matrix precision "medium" {plain / fast:.2f} times as fast as "highest"')
sdpa = type(model).from_pretrained(model.name_or_path, attn_implementation='sdpa')
print(
    f'training step: plain attention {seconds(lambda: training_step(sdpa, contexts, answers)) / fast:.2f} times as '
    'fast as fused attention'
)

settings = load_profile('tiny', ['sft.max_steps=10'])['sft']
data = expert_dataset(task, 'train', 640)
sft = lambda: train_sft(load_model('tiny', device='cpu')[0], tok, data, {}, settings)
lean = seconds(sft, 1)
torch.utils.deterministic.fill_uninitialized_memory = True
print(
    f"ten steps of TRL's SFTTrainer: not filling uninitialised memory {seconds(sft, 1) / lean:.2f} times as fast as "
    "filling it"
)
