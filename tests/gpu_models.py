"""Whole models on a GPU, in one command of at most nine minutes: two of them converted, and the larger one's speed beside its softmax original.

    python tests/gpu_models.py --out DIR                             all parts
    python tests/gpu_models.py --out DIR --steps 2 --device cpu      the same things in little, on a machine without a GPU

Parts, each a process of its own with its share of the time:
    embedded       `hedgehog linearize` of the model that comes with the package, on its own stories
    smollm2-135m   the same of SmolLM2-135M (--model: a folder or .gguf file) on WikiText-2 (--data: a folder)
    decode         tokens per second of SmolLM2-135M in bf16, reading and writing: key-value cache against recurrent state

What is done is kept in --work, and the same command goes on from there. DIR gets six files, the largest of 15.9 MB: gpu-PART.json, the results
of each part, gpu-models.json, what they cost, and embedded.tar and smollm2-135m.tar, maps and adapters of the converted models. At home:

    tar xf smollm2-135m.tar && hedgehog evaluate smollm2-135m --base MODEL --data wikitext-2

Why it fits. Operations are no limit: SmolLM2 takes 2·134.5M of them to read a token and 6·134.5M to train on it, 0.8 GFLOP; at 5% of the
990 TFLOP/s that an H100 does in bf16, 60,000 tokens a second. Launching kernels takes longer, at 10 µs each: a step of distillation has
B·⌈T/rows⌉·39 a layer, a step of finetuning 225 (both counted), so for 4,096 tokens of SmolLM2
    distil 30·8·39 = 9,400, 0.1 s      finetune 30·225 and 1,000 around them = 7,800, 0.08 s
With 250 steps of each, and twice that for what is not counted: 50 s and 40 s. Then four evaluations of 32,768 tokens, 10 s, loading and
tokenising, 30 s, and compiling kernels, 60 s: 190 s of 270. The embedded model has 5 layers and 100 steps: under 10 s, and 60 s to start.
The rest, 150 s or more, is decoding, the most important cases first."""
import argparse, json, os, shutil, signal, subprocess, sys, tarfile, time, warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {'embedded':90, 'smollm2-135m':270, 'decode':540} # seconds at most
TRAIN = {'embedded': '--map hedgehog --last-state --seq-len 256 --batch-size 16 --num-maps 8 --lr 0.1 --finetune-lr 5e-3 '
                     '--distill-tokens 409600 --finetune-tokens 409600',
         'smollm2-135m': '--map hedgehog --last-state --seq-len 512 --batch-size 8 --lr 1e-2 --finetune-lr 1e-3 '
                         '--distill-tokens 1024000 --finetune-tokens 1024000 --eval-tokens 32768'}
LITTLE = '--seq-len 64 --batch-size 2 --lr 1e-2 --finetune-lr 1e-3 --eval-tokens 256'

def options(argv=None):
    files = os.environ.get('HEDGEHOG_GPU_FILES', '.') # where tests/gpu.sh puts what was carried
    models,data = (os.environ.get(f'HEDGEHOG_{n}') or f'{files}/{n.lower()}' for n in ('MODELS','DATA'))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for results')
    p.add_argument('--work', type=Path, default=ROOT/'build'/'gpu-models', help='folder that keeps what is done')
    p.add_argument('--model', default=f'{models}/smollm2-135m-instruct', help="SmolLM2-135M, a folder (of HEDGEHOG_MODELS) or .gguf file; or 'embedded'")
    p.add_argument('--data', default=f'{data}/wikitext-2', help="WikiText-2, a folder (of HEDGEHOG_DATA); or 'embedded'")
    p.add_argument('--parts', default=','.join(PARTS), help='which parts, with commas between')
    p.add_argument('--minutes', type=float, default=8.6, help='for all parts together')
    p.add_argument('--steps', type=int, help='so many steps and tokens in place of the budgets, on short texts')
    p.add_argument('--device', help='the GPU if there is one')
    p.add_argument('--part', choices=PARTS, help='only this, in this process')
    a = p.parse_args(argv)
    if bad := set(a.parts.split(','))-PARTS.keys(): p.error(f"parts are {', '.join(PARTS)}; given {', '.join(sorted(bad))}")
    return a

def linearize(a, name):
    "One conversion, as a user would type it; then how much memory it took."
    import torch
    from hedgehog_nb.cli import app
    from hedgehog_nb.cli.inputs import pick_device
    device,out = pick_device(a.device),a.work/name
    if (out/'results.json').exists(): return
    model,data = ('embedded','embedded') if name=='embedded' else (a.model,a.data)
    budget = f'{LITTLE} --distill-steps {a.steps} --finetune-steps {a.steps}' if a.steps else TRAIN[name]
    how = f'--save trained --lora-rank 8 --autocast bfloat16 --experiment gpu-linearize --save-every 25 --device {device} {budget}'
    code = app(['linearize', model, '--data', data, '--out', str(out), *how.split()], prog_name='hedgehog', standalone_mode=False)
    if code: sys.exit(code)
    if device.startswith('cuda'): (a.work/f'{name}.peak').write_text(str(torch.cuda.max_memory_allocated()))

def decode(a):
    "Prefill and decoding of the model in bf16, with softmax, on the kernels, and on PyTorch alone."
    warnings.filterwarnings('ignore', '.*past_key_values. is deprecated')
    from copy import deepcopy
    from hedgehog_nb.cli.inputs import pick_device
    from hedgehog_nb.data.models import load_model
    from hedgehog_nb.models.linearize import linearize
    from hedgehog_nb.models.attention import set_implementation
    from hedgehog_nb.experiments.generation import benchmark_models
    device,kept = pick_device(a.device),a.work/'decode'/'results.json'
    gpu,name = device.startswith('cuda'),'embedded' if a.model=='embedded' else 'smollm2-135m'
    softmax = load_model(a.model, 'float32', device)[0].bfloat16() # some transformers would keep the blocks of a GGUF
    ours,plain = linearize(deepcopy(softmax)),linearize(deepcopy(softmax))
    set_implementation(ours, 'triton' if gpu else None); set_implementation(plain, 'chunked')
    def on_case(case, got):
        said = got if isinstance(got, str) else f"{got['tokens_per_s']:>12,.0f} tokens/s  {got['bytes']/1e6:>10,.2f} MB remembered"
        print(f'  {case:<40}', said, flush=True)
    kw = dict(batches=(1,), contexts=(64,), steps=a.steps, compiled=()) if a.steps else dict(batches=(64,1,16))
    kw |= dict(minutes=a.minutes, on_case=on_case, command=f"tests/gpu_models.py{f' --steps {a.steps}' if a.steps else ''}")
    benchmark_models(dict(softmax=softmax, hedgehog=ours), kept, name, **kw)
    benchmark_models({'hedgehog-torch':plain}, kept, name, **kw | dict(contexts=kw.get('contexts', (8192,)), compiled=()))

def run(part, argv, seconds):
    "A part as a process: how it went, and the seconds it took. One that is cut off has 20 seconds to put its work away."
    t,p = time.time(),subprocess.Popen([sys.executable, __file__, *argv, '--part', part, '--minutes', str(seconds/60)])
    try: code = p.wait(seconds)
    except subprocess.TimeoutExpired:
        p.send_signal(signal.SIGTERM)
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill(); p.wait()
        code = None
    return {0:'done', None:'cut off'}.get(code, f'FAILED ({code})'), time.time()-t

def bring(a, part):
    "Put what a part has measured, and what it has trained, into --out."
    done = a.work/part
    if (done/'results.json').exists(): shutil.copyfile(done/'results.json', a.out/f'gpu-{part}.json')
    if (done/'maps.safetensors').exists():
        with tarfile.open(a.out/f'{part}.tar', 'w') as f: f.add(done, part)

def speeds(rows):
    "{phase: tokens per second} of a conversion."
    at = lambda stage: next(((r['tokens'], r['seconds']) for r in rows if r.get('stage')==stage and r['metric']=='ppl'), None)
    a,b = at('distilled'),at('finetuned')
    return {k:n/s for k,(n,s) in dict(distill=a or (0,1), finetune=(b[0]-a[0], b[1]-a[1]) if a and b else (0,1)).items() if n and s}

def costs(a, parts):
    "Rows for gpu-models.json, and a table of them for people, from {part: (how it went, seconds)}."
    from hedgehog_nb.results import Table
    rows,cells,stages = [],[],('teacher','swapped','distilled','finetuned')
    for part,(state,s) in parts.items():
        f,peak = a.work/part/'results.json',a.work/f'{part}.peak'
        got = json.loads(f.read_text())['rows'] if f.exists() else []
        mem = max([r['value'] for r in got if r['metric']=='peak_bytes'], default=int(peak.read_text()) if peak.exists() else None)
        fast,ppl = speeds(got),[f"{r['value']:.4g}" for r in got if r['metric']=='ppl' and r['stage'] in stages]
        same = dict(experiment='gpu-models', model=part, data='embedded' if part=='embedded' else 'wikitext-2', variant='hedgehog')
        rows += [dict(same, metric='wall_s', value=s, unit='s')] + ([dict(same, metric='peak_bytes', value=mem, unit='B')] if mem else [])
        rows += [dict(same, metric='tokens_per_s', value=x, phase=p) for p,x in fast.items()]
        rate = [f'{fast[p]:,.0f}' if p in fast else '–' for p in ('distill','finetune')]
        cells.append([part, state, f'{s:.0f} s', f'{mem/1e9:.2f} GB' if mem else '–', *rate, ' → '.join(ppl) or '–'])
    head = 'part','state','wall time','peak GPU memory','distil, tokens/s','finetune, tokens/s','perplexity: softmax → swapped → distilled → finetuned'
    return rows, Table(head, cells)

def main(argv=None):
    a = options(argv)
    for d in (a.out, a.work): d.mkdir(parents=True, exist_ok=True)
    if a.part: return decode(a) if a.part=='decode' else linearize(a, a.part)
    start,done = time.time(),{}
    for part in a.parts.split(','):
        left = min(PARTS[part], 60*a.minutes-(time.time()-start)-25) if not a.steps else 3600
        lacks = [x for x in dict(embedded=(), decode=(a.model,)).get(part, (a.model, a.data)) if x!='embedded' and not Path(x).exists()]
        if lacks:
            half = Path(lacks[0]).with_name(Path(lacks[0]).name+'.part').exists()
            done[part] = f"not run: {lacks[0]} is not complete, carry the other parts" if half else f'not run: there is no {lacks[0]}',0.
        elif left<5: done[part] = 'not run: no time left',0.
        else:
            print(f'== {part} (at most {left:.0f} s)', flush=True)
            done[part] = run(part, sys.argv[1:] if argv is None else argv, left)
            bring(a, part)
    from hedgehog_nb.results import write_results
    from hedgehog_nb.experiments.generation import models_table
    rows,table = costs(a, done)
    write_results(a.out/'gpu-models.json', rows, f"tests/gpu_models.py{f' --steps {a.steps}' if a.steps else ''}", wall_s=time.time()-start, device=a.device)
    if (f := a.work/'decode'/'results.json').exists():
        got = json.loads(f.read_text())['rows']
        for phase in ('prefill','decode'): print(f'\n{phase}\n{models_table(got, phase)}')
    print(f'\n{table}\n\nin {a.out}:', ', '.join(f'{p.name} {p.stat().st_size/1e6:.2f} MB' for p in sorted(a.out.iterdir())))
    return any(state!='done' for state,_ in done.values())

if __name__=='__main__':
    for k,v in dict(HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', HEDGEHOG_TRITON='check', HEDGEHOG_TUNE='0').items(): os.environ.setdefault(k, v)
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
