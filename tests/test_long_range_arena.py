"Long Range Arena: what is generated, by independent computations; how rows become tokens; runs that are stopped, chosen and continued, in seconds."
import json
import numpy as np, pytest
from helpers.commands import hedgehog

torch = pytest.importorskip('torch')
from collections import Counter
from copy import deepcopy
from functools import partial
from io import BytesIO
from PIL import Image
from scipy import ndimage
from hedgehog_nb.data.text import DataError
from hedgehog_nb.experiments import long_range_arena
from hedgehog_nb.experiments.long_range_arena import (ARENA_VARIANTS, arena_data, arena_model, arena_size, curves, distances, LISTOPS, listops,
    listops_value, lra_experiment, pathfinder, Symbols)
from hedgehog_nb.results import read_results

def by_stack(tokens):
    "The value of an expression, by a stack and numpy."
    stack = []
    for t in tokens:
        if t!=4: stack.append(t-5 if t>4 else LISTOPS[t]); continue
        args = []
        while not isinstance(stack[-1], str): args.append(stack.pop())
        x = np.array(args)
        stack.append(int(dict(zip(LISTOPS, (x.min, x.max, lambda: np.floor(np.median(x)), lambda: x.sum()%10)))[stack.pop()]()))
    value, = stack
    return value

def depth_and_args(tokens):
    "(levels of the tree, arguments of each operator)."
    open,most,args = [],1,[]
    for t in tokens:
        if t==4: args.append(open.pop()); continue
        if open: open[-1] += 1
        most = max(most, len(open)+1)
        if t<4: open.append(0)
    assert not open
    return most,args

def test_listops():
    rows = listops(300, seed=3)
    assert [r['label'] for r in rows]==[by_stack(r['tokens']) for r in rows]
    assert len({r['tokens'] for r in rows})==300 and all(500<len(r['tokens'])<2000 for r in rows)
    trees = [depth_and_args(r['tokens']) for r in rows]
    assert max(d for d,_ in trees)==10 and {a for _,args in trees for a in args}=={*range(2, 11)}
    inner = Counter('digit' if t>4 else 'operator' for r in rows for t in r['tokens'] if t!=4)
    assert .15<inner['operator']/inner.total()<.25 # a quarter, less at the last level
    assert {*Counter(LISTOPS[t] for r in rows for t in r['tokens'])}=={*LISTOPS}

def test_listops_limits():
    rows = listops(200, min_length=5, max_length=30, max_depth=3, max_args=4)
    trees = [depth_and_args(r['tokens']) for r in rows]
    assert max(d for d,_ in trees)==3 and max(a for _,args in trees for a in args)==4 and {len(r['tokens']) for r in rows}<={*range(6, 30)}
    assert listops(50, seed=1)==listops(60, seed=1)[:50]!=listops(50, seed=2)
    with pytest.raises(ValueError, match='hardly a tree fits min_length=30, max_length=20'): listops(2, min_length=30, max_length=20)

def test_the_benchmark_s_example():
    "The one of the paper that describes the benchmark."
    assert listops_value([LISTOPS.index(t) for t in '[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]'.split()])==5

def test_distances():
    rng = np.random.default_rng(0)
    for points in (rng.uniform(0, 12, (n,2)) for n in (1, 5)):
        slow = [[min(np.hypot(px-x, py-y) for px,py in points) for x in range(12)] for y in range(12)]
        np.testing.assert_allclose(distances(points, 12), slow)

def test_curves():
    found = curves(np.random.default_rng(0), 100, 20, 32)
    assert len(found)>50 and found.shape[1:]==(41,2) and found.min()>=2 and found.max()<=29
    np.testing.assert_allclose(np.linalg.norm(np.diff(found, axis=1), axis=-1), .5)

@pytest.mark.parametrize('side', [24, 32])
def test_pathfinder(side):
    "By connected regions of pixels: marks in one where a curve joins them; each region is a curve, of which two are long."
    rng = np.random.default_rng(side)
    for label in [0,1]*100:
        image,marks = pathfinder(rng, label, side)
        regions,n = ndimage.label(ndimage.binary_dilation(image>60, np.ones((2,2))), np.ones((3,3)))
        a,b = (regions[y,x] for x,y in marks.round().astype(int))
        assert a and b and (a==b)==label and 2<=n<=2+side//6
        sizes = ndimage.sum_labels(np.ones_like(image), regions, range(1, n+1))
        assert label or {a,b}=={*(1+sizes.argsort()[-2:])}
        assert image.shape==(side,side) and image.dtype==np.uint8 and image[0].max()<128

def test_pathfinder_is_too_small():
    with pytest.raises(ValueError, match='24 × 24 pixels or more; given 16 × 16'): pathfinder(np.random.default_rng(0), 1, 16)

def small(task, **kw): return arena_size('cpu', task, **{**dict(train=60, held=20, layers=1, width=16, heads=2, batch_size=10, steps=3), **kw})

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Reviews, and CIFAR-10's two files, of a few rows."
    d = tmp_path_factory.mktemp('lra')
    (d/'imdb').mkdir(); (d/'cifar10').mkdir()
    for split in ('train','test'):
        text = [('good ' if i%2 else 'bad ')*(2+i%5)+f'é{i}' for i in range(80)]
        (d/'imdb'/f'{split}.jsonl').write_text('\n'.join(json.dumps(dict(id=f'{i}_x', label=i%2, text=t)) for i,t in enumerate(text)))
        parts = []
        for i in range(80):
            Image.fromarray(np.full((32,32,3), [i, 2*i, 3*i], np.uint8)).save(b := BytesIO(), 'PNG')
            parts.append(b.getvalue())
        np.savez(d/'cifar10'/f'{split}_jpeg.npz', jpeg=np.frombuffer(b''.join(parts), np.uint8), labels=np.arange(80)%10,
            offsets=np.cumsum([0, *map(len, parts)]))
    return d

def test_text(folders):
    t = arena_data('text', small('text', seq_len=16), folders/'imdb')
    assert (len(t.train), len(t.valid), len(t.test))==(60, 8, 20) # a tenth of the reviews is to choose by
    for row,x in zip(t.data.test, t.test):
        ids = x['input_ids'].tolist()
        text = bytes(i-2 for i in ids[1:]).decode(errors='ignore')
        assert ids[0]==1 and len(ids)<=17 and text.startswith('good ' if x['labels'] else 'bad ')
    assert t.longest()==17

def test_text_needs_its_columns(tmp_path):
    for split in ('train','test'): (tmp_path/f'{split}.csv').write_text('review,label\n'+''.join(f'a,{i%2}\n' for i in range(40)))
    with pytest.raises(DataError, match='given text to read'): arena_data('text', small('text'), tmp_path)
    for split in ('train','test'): (tmp_path/f'{split}.csv').write_text('text,label\n'+''.join(f'a,{i/3}\n' for i in range(40)))
    with pytest.raises(DataError, match='a class for each text; .* holds numbers'): arena_data('text', small('text'), tmp_path)

def test_image(folders):
    t = arena_data('image', small('image', seq_len=1024), folders/'cifar10')
    for row,x in zip(t.data.test, t.test):
        grey = x['input_ids'][1:]-2
        i = round(float(grey[0]/(.299+2*.587+3*.114))) # the weights of ITU-R 601
        assert len(grey)==1024 and len({*grey.tolist()})==1 and x['labels']==i%10
    assert len(arena_data('image', small('image', seq_len=256), folders/'cifar10').test[0]['input_ids'])==257
    with pytest.raises(ValueError, match='a square of 16 × 16 pixels or more; given seq_len=300'):
        arena_data('image', small('image', seq_len=300), folders/'cifar10')

def test_generated_tasks():
    "Those held out are the same, however many there are to learn from; pathfinder's classes are balanced in each split."
    for task,kw in (('listops', dict(seq_len=24)), ('pathfinder', {})):
        few,more = (arena_data(task, small(task, train=n, **kw)) for n in (20, 60))
        for part in ('valid','test'): assert [*map(str, getattr(few, part))]==[*map(str, getattr(more, part))]
        assert len(more.train)==60 and few.digest()!=more.digest()
    assert all(sum(r['label'] for r in part)*2==len(part) for part in (more.data.train, more.data.valid, more.data.test))
    assert more.longest()==577
    for task in ('retrieval', 'ListOps'):
        with pytest.raises(ValueError, match='one of listops, text, image, pathfinder'): arena_size('cpu', task)
    with pytest.raises(ValueError, match='one of cpu, gpu'): arena_size('tpu', 'text')

def test_symbols_pad():
    tok = Symbols()
    batch = tok.pad([{**tok(x, 6), 'labels':y} for x,y in ((b'\x00\xff', 1), ('abcdefgh', 0))])
    assert batch['input_ids'].tolist()==[[1,2,257,0,0,0], [1,99,100,101,102,103]] and batch['labels'].tolist()==[1,0]
    assert batch['attention_mask'].tolist()==[[1,1,1,0,0,0], [1]*6]

def test_padding_and_starts():
    "Every attention starts from the same weights, and padding changes no output."
    size = small('listops', seq_len=40)
    task = arena_data('listops', size)
    models = {v:arena_model(v, task, 15, size) for v in ARENA_VARIANTS}
    shared = [dict(m.named_parameters()) for m in models.values()]
    assert all(p.equal(shared[0][n]) for s in shared[1:] for n,p in s.items() if n in shared[0])
    for m in models.values():
        torch.testing.assert_close(task.predict(m, task.valid, 20)[0], task.predict(m, task.valid, 1)[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no variant is called 'linear'; there are softmax, elu"): arena_model('linear', task, 15, size)

def test_runs(tmp_path):
    "A rate is chosen on the first seed by sequences held out, and is that of the second; the curve ends with the score it is chosen by."
    size,told = small('listops', seq_len=24, steps=8),[]
    def listen(event, label=None, seed=None, lr=None, **_): told.extend([(label, seed, lr)] if event=='run' else ())
    kw = dict(variants=['elu'], size=size, lrs=(1e-2, 1e-7), evals=3, on_event=listen)
    rows = lra_experiment(tmp_path/'x.json', 'listops', seeds=(0, 1), **kw)
    best = rows[0]['lr']
    assert [p.name for p in tmp_path.iterdir()]==['x.json'] and told==[('elu',0,1e-2), ('elu',0,1e-7), ('elu',1,best)] and {r['lr'] for r in rows}=={best}
    curve = [r for r in rows if r['metric']=='accuracy-held-out' and not r['seed']]
    last, = (r for r in rows if r['metric']=='accuracy' and not r['seed'])
    assert len(curve)==3 and curve[-1]['tokens']==last['tokens'] and last['stage']=='trained' and last['seq_len']==24
    tried = last['tried']
    assert round(curve[-1]['value'], 2)==tried[f'{best:g}']==max(tried.values())
    mean = arena_data('listops', size).mean_tokens()
    assert abs(last['tokens']-8*10*mean)<1 and abs(curve[0]['tokens']-2*10*mean)<1
    with pytest.raises(ValueError, match='runs of lra-listops, not of lra-pathfinder'):
        lra_experiment(tmp_path/'x.json', 'pathfinder', **{**kw, 'size':small('pathfinder')})
    with pytest.raises(ValueError, match='runs of other settings'): lra_experiment(tmp_path/'x.json', 'listops', **{**kw, 'evals':2})

def test_what_does_not_fit_is_said(tmp_path):
    size = small('listops', seq_len=24, steps=1)
    for more,says in ((dict(lrs=()), 'one learning rate or more'), (dict(seeds=()), 'seeds is above 0'), (dict(evals=0), 'evals is above 0'),
        (dict(size=small('listops', seq_len=24, held=0)), 'held is above 0'), (dict(variants=['linear']), "no variant is called 'linear'"),
        (dict(data='imdb'), 'listops is generated and takes no data; given imdb')):
        with pytest.raises(ValueError, match=says): lra_experiment(tmp_path/'x.json', 'listops', **{**dict(size=size, variants=['elu']), **more})
    assert not [*tmp_path.iterdir()] and lra_experiment(tmp_path/'x.json', 'listops', variants=[], size=size)==[]

def test_drawing_is_shown():
    for task,seq_len in (('listops',24), ('pathfinder',576)):
        told = []
        size = small(task, seq_len=seq_len, train=200, held=20)
        arena_data(task, size, on_event=lambda event, **kw: told.append((event, kw['phase'], kw['done'], kw['total'])))
        assert told==[('progress','draw',n,240) for n in (100,200,240)]

def test_measures_what_it_says(tmp_path):
    "The accuracy in the file is that of the trained model, counted anew."
    size,seen = small('listops', seq_len=24, steps=8),{}
    task = arena_data('listops', size)
    def keep(event, row=None, model=None, **_):
        if event=='row' and row['metric'].startswith('accuracy'):
            rows,model = task.test if row['metric']=='accuracy' else task.valid,deepcopy(model).eval()
            right = [model(input_ids=torch.tensor(x['input_ids'])[None].long()).logits.argmax().item()==x['labels'] for x in rows]
            seen[row['metric'], row['tokens']] = 100*sum(right)/len(right)
    rows = lra_experiment(tmp_path/'x.json', 'listops', variants=['hedgehog'], size=size, lrs=(1e-2,), evals=2, on_event=keep)
    assert len(seen)==3
    for r in rows:
        if r['metric']!='loss': assert abs(seen[r['metric'], r['tokens']]-r['value'])<1e-3

@pytest.mark.parametrize('at', [3, 5])
def test_stopped_run_goes_on(tmp_path, monkeypatch, at):
    "From the step that was kept last; to the same rows, those from before the stop included."
    class Stop(Exception): pass
    steps = []
    def listen(event, phase=None, done=0, **kw):
        if phase!='finetune': return
        steps.append(done)
        if len(steps)==at: raise Stop
    monkeypatch.setattr(long_range_arena, 'finetune_task', partial(long_range_arena.finetune_task, save_steps=2))
    kw = dict(task='listops', variants=['hedgehog'], size=small('listops', seq_len=24, steps=6), lrs=(1e-2,), evals=3)
    values = lambda rows: [(r['metric'], r['tokens'], r['value'], r['stage']) for r in rows]
    with pytest.raises(Stop): lra_experiment(tmp_path/'a.json', on_event=listen, **kw)
    again = lra_experiment(tmp_path/'a.json', on_event=listen, **kw)
    assert steps==[*range(1, at+1), *range(at//2*2+1, 7)] and values(again)==values(lra_experiment(tmp_path/'b.json', **kw))

def test_lra_command(tmp_path):
    run = lambda task, *more, **kw: hedgehog('experiment', 'lra', task, '--out', tmp_path/f'{task}.json', *more, **kw)
    few = '--train', 40, '--held-out', 10, '--batch-size', 4, '--steps', 2, '--lr', 1e-3
    for task,more,says in (('retrieval', (), 'one of listops, text, image, pathfinder'), ('listops', ('--variant','linear'), 'no variant is called'),
        ('text', ('--data',tmp_path/'none'), 'no such file or folder'), ('listops', ('--size','tpu'), 'one of cpu, gpu'),
        ('pathfinder', ('--seq-len',600), 'a square of 24 × 24')):
        r = run(task, *few, *more, code=1)
        assert says in ' '.join(r.stderr.split()) and 'goes on from there' not in r.stderr and not (tmp_path/f'{task}.json').exists(), r.stderr
    r = run('listops', *few, '--seq-len', 24, '--variant', 'hedgehog')
    rows = read_results(tmp_path)
    assert 'hedgehog, seed 0, rate 0.001' in r.stderr and {(r['experiment'], r['variant'], r['seq_len']) for r in rows}=={('lra-listops','hedgehog',24)}
    r = run('listops', *few, '--seq-len', 30, '--variant', 'elu', code=1)
    assert 'runs of other settings (seq_len 24 there, 30 here' in ' '.join(r.stderr.split())
