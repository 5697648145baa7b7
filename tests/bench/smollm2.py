"""Tokens per second of a real language model, SmolLM2-135M-Instruct, in SFT, generation and PPO:

    python tests/bench/smollm2.py [OLD_CHECKOUT] [--only WHAT ...] [--set KEY=VALUE ...]

On GeneralPoints with the brief prompt, unless --set says otherwise (JSON: task, options, batch, micro_batch, envs,
max_new_tokens, turns, updates, threads, scale); --only names those to measure. Each checkout works in processes of its
own, by turns, and counts its own tokens: in SFT those of training examples, else those of sampled answers. Each
computes in the precision that its own profile has (--set 'scale={"precision": "float32"}' for the same one).
Beside them stands a roofline: twice the parameters of the linear layers in multiplications and additions per token
forward, three times that in training, at the rate at which this machine multiplies matrices of the model's size."""
import argparse, json, os, statistics, subprocess, sys, time, warnings
from pathlib import Path

HERE = Path(__file__).parents[2]
PARTS = ('sft', 'generation', 'ppo')


def first(*places):
    "The first of these `module:name` that this checkout has."
    from importlib import import_module
    for place in places:
        module, _, name = place.partition(':')
        try: return getattr(import_module(f'rlheals.{module}'), name)
        except (ImportError, AttributeError): pass
    raise ImportError(f'none of {places}')


def measured(what, settings):
    "Tokens per second of one thing, in this process."
    import torch
    load_model = first('training.models:load_model', 'models:load_model')
    first('training.computing:set_up_torch', 'models:set_up_torch')(settings['threads'], seed=0)
    task = first('tasks.protocol:load_task', 'tasks:load_task')(settings['task'], **settings['options'])
    problem_set = first('tasks.protocol:problem_set', 'tasks:problem_set')
    generate, encode = (first(f'training.generation:{f}', f'models:{f}') for f in ('generate', 'encode'))
    load_profile = first('training.rules:load_profile', 'profiles:load_profile')
    try: own = load_profile('smollm2-short')['scale']
    except (KeyError, ValueError): own = load_profile('smollm2')['scale']  # a checkout from before the short one
    scale = own | settings['scale']
    model, tok = load_model('smollm2', 'cpu', scale=scale)
    ticks = [time.perf_counter()]
    tick = lambda *_: ticks.append(time.perf_counter())
    if what == 'generation':
        prompts = [encode(tok, [task.prompt(p)]) for p in problem_set(task, 'train', settings['envs'])]
        tokens = []
        for seed in range(3):
            tokens.append(sum(map(len, generate(model, tok, prompts, settings['max_new_tokens'], 1., seed)))); tick()
        return tokens[1:], ticks[1:]
    profile = load_profile('smollm2')
    if what == 'sft':
        as_dataset = first('tasks.gym:as_dataset', 'views:as_dataset')
        pairs = first('tasks.protocol:examples', 'tasks:examples')(task, 'train', settings['batch'] * 4, 0)
        c = profile['sft'] | dict(max_steps=4, batch_size=settings['batch'], checkpoints=[], warmup_steps=1)
        data = as_dataset(task, pairs, bool(tok.chat_template))
        whole = [tok.apply_chat_template(e['prompt'] + e['completion'], tokenize=False) for e in data]
        first('training.sft:train_sft', 'sft:train_sft')(model, tok, data, {}, c, progress=tick)
        # the steps read each example once; the last of them ends the training
        tokens = sum(map(len, tok(whole, add_special_tokens=False)['input_ids'])) / c['max_steps']
        return [tokens] * (len(ticks) - 2), ticks[1:]
    c = profile['rl'] | dict(updates=settings['updates'], envs=settings['envs'], turns=settings['turns'], epochs=2,
                             minibatch=settings['batch'], micro_batch=settings['micro_batch'], log_kl=False,
                             threads=settings['threads'])
    train = first('training.ppo:train_ppo', 'ppo:train_ppo')
    if what == 'products': return products(train, model, tok, task, c, settings)
    log, _ = train(model, tok, task, c, settings['max_new_tokens'], progress=tick)
    # what an update is: answers sampled, read with their prompts, and learnt from
    answers = log[log.metric == 'response_tokens'].value * c['envs'] * c['turns']
    return answers.tolist()[1:], ticks[1:]


def products(train, model, tok, task, c, settings):
    "As `measured` of one update of PPO, with the time of the matrix products of its linear layers and of nothing else."
    sys.path.append(str(Path(__file__).parent))
    from measure import LinearLayers, products_alone
    ends = []
    note = lambda *_: ends.append(len(layers.seen))
    with LinearLayers() as layers: log, _ = train(model, tok, task, c, settings['max_new_tokens'], progress=note)
    took = products_alone(layers.seen[ends[0]:ends[1]], getattr(model, 'computes_in', model.dtype))
    return [log[log.metric == 'response_tokens'].value.iloc[1] * c['envs'] * c['turns']], [0., took]


def rate(checkout, what, settings):
    "Tokens per second of one thing in a checkout: the median over what was repeated."
    code = 'import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    env = os.environ | dict(PYTHONPATH=str(checkout), HF_HUB_OFFLINE='1', PYTHONSAFEPATH='1')
    words = [sys.executable, '-c', code, __file__, '--measure', what, json.dumps(settings)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode: sys.exit(f'{checkout}: {done.stderr[-2000:]}')
    tokens, ticks = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(n / (b - a) for n, a, b in zip(tokens, ticks, ticks[1:]))


def roofline(settings):
    "Tokens per second of the linear layers' products alone: (forward, forward and backward, in this type)."
    import torch
    from rlheals.training.models import load_model
    torch.set_num_threads(settings['threads'])
    model, _ = load_model('smollm2', 'cpu')
    from rlheals.training.computing import computed_in
    from rlheals.training.rules import load_profile
    precision = (load_profile('smollm2-short')['scale'] | settings['scale'])['precision']
    dtype = getattr(torch, computed_in(precision, 'cpu'))
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens, took = 1024, 0.
    for out, into in set(shapes):
        x, W = torch.randn(tokens, into, dtype=dtype), torch.randn(into, out, dtype=dtype)
        times = []
        for _ in range(4):
            started = time.perf_counter(); x @ W; times.append(time.perf_counter() - started)
        took += min(times) * shapes.count((out, into))
    return tokens / took, tokens / took / 3, dtype


if __name__ == '__main__':
    warnings.filterwarnings('ignore')
    if sys.argv[1:2] == ['--measure']:
        print(json.dumps(measured(sys.argv[2], json.loads(sys.argv[3]))))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('old', nargs='?')
    parser.add_argument('--only', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--set', action='append', default=[])
    args = parser.parse_args()
    settings = dict(task='general_points', options=dict(style='brief', tries=5), batch=16, micro_batch=8, envs=16,
                    max_new_tokens=64, turns=2, updates=3, threads=os.cpu_count(), scale={})
    for pair in args.set:
        key, _, value = pair.partition('=')
        try: settings[key] = json.loads(value)
        except ValueError: settings[key] = value
    checkouts = dict(old=Path(args.old).resolve()) if args.old else {}
    checkouts['new'] = HERE
    forward, training, dtype = roofline(settings)
    print(f'linear layers alone, {dtype}: {forward:.0f} tokens per second forward, {training:.0f} forward and backward')
    for what in args.only:
        rates = {name: [] for name in checkouts}
        for _ in range(2):  # by turns, so that whatever else the machine does slows both
            for name, checkout in checkouts.items(): rates[name].append(rate(checkout, what, settings))
        rates = {name: statistics.median(r) for name, r in rates.items()}
        ratio = f", {rates['new'] / rates['old']:.2f} times" if args.old else ''
        said = ', '.join(f'{name} {r:.0f}' for name, r in rates.items())
        print(f'{what}: {said} tokens per second{ratio}', flush=True)
        if what == 'ppo': print(f"  the products of its linear layers alone: {rate(HERE, 'products', settings):.0f}")
