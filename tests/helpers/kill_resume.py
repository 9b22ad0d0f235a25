"""Kill a training run with SIGKILL at moments drawn at random, start it again until it is done, and compare its weights with those of a run that nobody killed.

    python tests/helpers/kill_resume.py --trials 50 --record results/kill-resume-stories260k.json"""
import argparse, multiprocessing, random, signal, sys, tempfile, time
from pathlib import Path
import torch
from hedgehog_nb.data.models import load_model
from hedgehog_nb.data.text import load_texts, token_blocks
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import finetune
from hedgehog_nb.training.checkpoint import load_state, save_state

STEPS,EVERY = 12,3

def train(folder):
    "Distil, then finetune the embedded model, dropout included, and write its weights to `folder`/done."
    torch.set_num_threads(1)
    model,tok = load_model('embedded')
    model.config.attention_dropout = .1
    linearize(model, num_maps=2)
    data = token_blocks(load_texts('embedded'), tok, 64, max_tokens=2**14, seed=0)
    distill(model, data, STEPS, lr=.1, checkpoint=folder/'distill', save_steps=EVERY)
    finetune(model, data, STEPS, lr=2e-3, checkpoint=folder/'finetune', save_steps=EVERY)
    save_state(folder/'done', weights=dict(model.named_parameters()))

CLEAN = multiprocessing.get_context('forkserver') # forked from this process, autograd refuses where it has run threads here
CLEAN.set_forkserver_preload(['hedgehog_nb.data.text','hedgehog_nb.models','hedgehog_nb.training.distill','hedgehog_nb.training.finetune'])

def child(folder):
    "Start `train` in a process of its own."
    p = CLEAN.Process(target=train, args=(folder,), daemon=True)
    p.start()
    return p

def ended(p, seconds=None):
    "Exit code of a child; it is killed after `seconds`."
    p.join(seconds); p.kill(); p.join()
    return p.exitcode

def trial(folder, rng, longest):
    "Kill a run up to four times, then let it finish; how often it was killed before it was done."
    kills = [ended(child(folder), rng.uniform(0, longest)) for _ in range(rng.randint(1, 4))]
    assert set(kills) <= {0,-signal.SIGKILL} and ended(child(folder))==0
    return kills.count(-signal.SIGKILL)

def trials(n, seed=0):
    ("For each trial (kills, number of weights that differ from those of the run that nobody killed). "
     "A run that ended before its first kill came is none, and is done again.")
    rng,out = random.Random(seed),[]
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for name in ('warm','alive'): # the first is slower
            (d/name).mkdir(); t = time.perf_counter()
            assert ended(child(d/name))==0
        longest,want = time.perf_counter()-t,load_state(d/'alive'/'done')['weights']
        for i in range(n):
            kills = 0
            while not kills:
                f = Path(tempfile.mkdtemp(dir=d))
                kills = trial(f, rng, longest)
            got = load_state(f/'done')['weights']
            assert got.keys()==want.keys() and sorted(p.name for p in f.iterdir())==['distill','done','finetune'], sorted(f.iterdir())
            out.append((kills, sum((got[k]!=want[k]).sum().item() for k in want)))
            yield out[-1]

if __name__=='__main__':
    from hedgehog_nb.results import code_version, write_results
    p = argparse.ArgumentParser(); p.add_argument('--trials', type=int, default=50); p.add_argument('--record'); p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    start,commit,rows = time.perf_counter(),code_version(),[]
    for i,(kills,differ) in enumerate(trials(a.trials, a.seed)):
        print(f'trial {i}: {kills} kills, {differ} weights differ', flush=True)
        same = dict(experiment='kill-resume', model='stories260k', data='embedded', variant='hedgehog', trial=i, steps=2*STEPS, save_steps=EVERY)
        rows += [dict(same, metric='kills', value=kills), dict(same, metric='weights-that-differ', value=differ)]
    if a.record: write_results(a.record, rows, seed=a.seed, wall_s=time.perf_counter()-start, device='cpu', commit=commit)
    sys.exit(any(r['value'] for r in rows if r['metric']=='weights-that-differ'))
