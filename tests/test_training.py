"Training of converted models: the maps alone by their teacher, the whole by its task."
import json, math, os, socket, subprocess, sys
import pytest, torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from hedgehog_nb.cli import app
from hedgehog_nb.training.losses import naive_weight_loss
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.checkpoint import load_state, TrainingHistory, save_state
from hedgehog_nb.training.batches import batch_indices, Placeholder, split_rows, StepBatches, TrainingData
from hedgehog_nb.training.distill import distill, teacher_pass
from hedgehog_nb.training.finetune import finetune
from hedgehog_nb.training.evaluate import perplexity
from helpers.tiny_models import MODELS, VOCAB, corpus, inputs, llama, vit
from helpers.two_processes import train
from helpers.training import finetuned, OnStep

pytestmark = pytest.mark.processes

CAUSAL = 'llama','gpt2'

@torch.no_grad()
def logits(model, **x): return model(**x).logits

@torch.no_grad()
def kl(model, batch):
    "KL to the teacher of each layer, by the n × n oracle."
    out = []
    teacher_pass(model, batch,
        lambda module, q, k, v, causal, scale, mask, o: out.append(naive_weight_loss(q, k, module.feature_map, causal, scale, mask).mean().item()))
    return out

def batches_of(model, name, n):
    if name=='vit': return [inputs(model, B=4, seed=i) for i in range(n)]
    return [dict(input_ids=corpus(4, seed=i), **(dict(attention_mask=torch.ones(4,24, dtype=torch.long)) if name=='bert' else {})) for i in range(n)]

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('objective', ['weights','outputs','both'])
def test_distillation_teaches_the_maps_alone(name, objective):
    model = linearize(MODELS[name](), layers='0,2').train()
    batches,held = batches_of(model, name, 25),batches_of(model, name, 26)[-1]
    before = {k:v.clone() for k,v in model.state_dict().items()}
    kl0 = kl(model.eval(), held); model.train()
    seen = []
    history = distill(model, batches, 25, callbacks=[OnStep(lambda *a: seen.append(a))]).losses
    assert model.training and len(history)==25 and [s[0] for s in seen]==list(range(1,26)) and [s[1] for s in seen]==history
    assert all(math.isfinite(x) for x in history) and sum(history[-5:])<.95*sum(history[:5])
    if objective=='weights': assert all(b<.95*a for a,b in zip(kl0, kl(model.eval(), held)))
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])==('.feature_map.' not in k), k
    assert all(p.grad is None for n,p in model.named_parameters() if '.feature_map.' not in n)

def test_distillation_sees_the_teacher_not_the_student():
    "A layer is taught on what softmax layers below would give it: wrecked maps below change nothing above."
    model = linearize(llama()); batch = dict(input_ids=corpus(2))
    want = kl(model, batch)
    layers = list(linear_layers(model).values())
    with torch.no_grad(): layers[0].feature_map.w_q.mul_(-3)
    got = kl(model, batch)
    assert got[0]!=want[0] and got[1:]==want[1:]

def test_a_loss_that_is_not_finite_names_its_layer():
    model = linearize(llama())
    names = list(linear_layers(model))
    with torch.no_grad(): linear_layers(model)[names[1]].feature_map.w_k[0,0,0] = float('nan')
    for objective in ('weights','outputs','both'):
        with pytest.raises(FloatingPointError, match=f'{names[1]} .*nothing was learned yet'): distill(model, [corpus(2)], 1, objective=objective)
    assert not model.training and model.config._attn_implementation=='hedgehog'

def test_settings_of_distillation_are_checked():
    model = linearize(llama())
    with pytest.raises(ValueError, match='weights.*outputs'): distill(model, [corpus(2)], 1, objective='logits')
    with pytest.raises(ValueError, match='no maps'): distill(linearize(llama(), 'elu'), [corpus(2)], 1)
    with pytest.raises(ValueError, match='no maps'): distill(llama(), [corpus(2)], 1)
    with pytest.warns(UserWarning, match='the data ended after 3 of 9 steps'): assert len(distill(model, iter([corpus(2)]*3), 9).losses)==3
    assert len(distill(model, [corpus(2)]*3, 9).losses)==9  # a list is begun anew

@pytest.mark.parametrize('name', CAUSAL)
def test_finetuning_reaches_everything(name):
    model = linearize(MODELS[name](layers=2)); blocks = corpus(32)
    before,ppl = {k:v.clone() for k,v in model.named_parameters()},perplexity(model, blocks)
    assert len(finetune(model, blocks, 20, batch_size=8, lr=1e-2).losses)==20 and not model.training
    assert perplexity(model, blocks)<.8*ppl
    assert not [k for k,v in model.named_parameters() if torch.equal(v, before[k])]
    assert model.config._attn_implementation=='hedgehog'

def test_perplexity_by_hand():
    model = linearize(llama()); x = corpus(5)
    p = logits(model, input_ids=x)[:,:-1].log_softmax(-1).gather(-1, x[:,1:,None])
    want = math.exp(-p.mean().item())
    assert perplexity(model, x, batch_size=2)==pytest.approx(want, rel=1e-5)==pytest.approx(perplexity(model, x, batch_size=5), rel=1e-5)

@pytest.mark.parametrize('shape', [(3,1), (0,8), (8,)])
def test_perplexity_needs_something_to_predict(shape):
    with pytest.raises(ValueError, match='1 or more blocks of 2 or more tokens; given'): perplexity(llama(), torch.zeros(shape, dtype=torch.long))

def test_perplexity_leaves_the_model_in_its_mode():
    model = llama().train()
    with pytest.raises(IndexError): perplexity(model, torch.full((2,8), 10**6))
    assert model.training
    perplexity(model, torch.ones(2, 8, dtype=torch.long)); assert model.training
    with torch.no_grad(): model.lm_head.weight.mul_(1e6)
    assert perplexity(model, torch.arange(16).view(2, 8))==float('inf') # where a float overflows

# --- pieces and processes

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('accumulate', [2,3,7])
def test_pieces_make_the_same_step(name, accumulate):
    "With uneven padding, where rows must be weighted by their tokens"
    runs = []
    for n in (1,accumulate):
        model = linearize(MODELS[name](layers=2).double())
        data = [{k: v.double() if v.is_floating_point() else v for k,v in b.items()} for b in batches_of(model, name, 3)]
        if name!='vit':
            for b in data: b['attention_mask'] = torch.ones(4,24, dtype=torch.long); b['attention_mask'][1,:9] = 0; b['attention_mask'][2,:20] = 0
        runs.append((distill(model, data, 3, gradient_accumulation_steps=n).losses, [p for p in model.parameters()]))
    (a,p),(b,q) = runs
    assert a==pytest.approx(b, rel=1e-6)
    for x,y in zip(p,q): torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('n,pieces', [(10,4), (5,3), (2,7), (0,2)])
def test_rows_are_cut_evenly(n, pieces):
    cut = split_rows(list(range(n)), pieces)
    assert len(cut)==pieces and sum(cut, [])==list(range(n)) and max(map(len, cut))-min(map(len, cut))<=1

@pytest.mark.parametrize('kind', ['rows','stream','batches'])
@pytest.mark.parametrize('n,batch_size,pieces,world', [(10,4,1,2), (9,4,2,2), (5,8,3,1), (7,3,4,1), (16,4,2,1)])
def test_all_processes_together_compute_the_batch(n, batch_size, pieces, world, kind):
    "Each row of a batch once, in equally many pieces of every process; and from any step on the same."
    blocks,model = torch.arange(n).view(n,1).repeat(1,3),llama()
    data = dict(rows=lambda: blocks, stream=lambda: iter([b for _ in range(30) for b in blocks]), batches=lambda: blocks.split(batch_size))[kind]
    def of(world, rank, done, pieces):
        b = StepBatches(TrainingData(model, data(), batch_size), steps, 3, pieces, rank, world, done)
        for epoch in range(done//b.per_epoch, math.ceil(steps/b.per_epoch)):
            b.set_epoch(epoch); yield from b
    steps = 7
    whole = [b['input_ids'][:,0].tolist() for b in of(1, 0, 0, 1)]
    ranks = [list(of(world, r, 0, pieces)) for r in range(world)]
    assert len(whole)==steps and all(len(r)==steps*pieces for r in ranks)
    for i,rows in enumerate(whole):
        mine = [p for r in ranks for p in r[i*pieces:(i+1)*pieces]]
        assert sorted(x for p in mine if not isinstance(p, Placeholder) for x in p['input_ids'][:,0].tolist())==sorted(rows)
        assert all(len(p['input_ids']) for p in mine)
    later = [list(of(world, r, 4, pieces)) for r in range(world)]
    for a,b in zip(ranks, later):
        assert [(type(x), x['input_ids'].tolist()) for x in a[4*pieces:]]==[(type(x), x['input_ids'].tolist()) for x in b]
    if kind=='rows': assert whole==list(batch_indices(n, steps, batch_size, 3)) and sorted(sum(whole[:math.ceil(n/batch_size)], []))==list(range(n))

def test_a_batch_is_computed_in_one_or_more_pieces():
    with pytest.raises(ValueError, match='gradient_accumulation_steps=0'): distill(linearize(llama()), [corpus(2)], 1, gradient_accumulation_steps=0)

@pytest.mark.parametrize('name', ['llama','bert'])
def test_finetuning_in_pieces(name):
    out = []
    for n in (1,2):
        model = linearize(MODELS[name](layers=2)).eval()
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        data = [dict(input_ids=x, labels=torch.where(torch.arange(24)<24-5*(i%4), x, -100)) for i,x in enumerate(corpus(10))]  # labels are not equally many
        losses = finetune(model, data, 4, batch_size=4, gradient_accumulation_steps=n, lr=1e-3, warmup_ratio=0).losses
        out.append((losses, list(model.parameters())))
    assert out[0][0]==pytest.approx(out[1][0], rel=1e-5)
    for a,b in zip(out[0][1], out[1][1]): torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)

@pytest.fixture(scope='module')
def in_processes(root, tmp_path_factory):
    "{number of processes: folder} after the same short training; two are stopped in between once, and started again"
    def run(folder, stopped=False):
        p = subprocess.run([*torchrun, str(root/'tests'/'helpers'/'two_processes.py'), str(folder), *['--stop']*stopped],
            capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':os.pathsep.join(sys.path), 'OMP_NUM_THREADS':'1'})
        assert (p.returncode!=0)==stopped, p.stderr
    d = {n:tmp_path_factory.mktemp(f'p{n}') for n in (1,2)}
    torchrun = sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(free_port())
    train(d[1])
    run(d[2], stopped=True); assert not (d[2]/'done').exists() and (d[2]/'distill').exists()
    run(d[2])
    return d

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return s.getsockname()[1]

def test_two_processes_make_the_same_steps(in_processes):
    "Losses up to fp32 rounding. Weights less so: Adam divides a gradient by its own size, and magnifies the rounding of one that is nearly nothing."
    one,two = (load_file(in_processes[n]/'done') for n in (1,2))
    torch.testing.assert_close(one.pop('losses'), two.pop('losses'), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(one.pop('evaluations'), two.pop('evaluations'), atol=2e-6, rtol=1e-6)
    assert one.keys()==two.keys()
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=0, atol=2e-4)
    assert sorted(p.name for p in in_processes[2].iterdir())==['align','distill','done','finetune']

@pytest.mark.slow
def test_the_command_in_two_processes(root, tmp_path):
    "The same rows as in one, up to rounding; said and written once."
    (tmp_path/'hedgehog.py').write_text("from hedgehog_nb.cli import app\napp(prog_name='hedgehog')\n")
    args = ('linearize embedded --data embedded --seq-len 64 --batch-size 4 --eval-tokens 128 --distill-steps 3 '
        '--finetune-steps 3 --finetune-lr 1e-3 --lr 0.1 --save-every 2 --json --out').split()
    r = CliRunner().invoke(app, [*args, str(tmp_path/'a')])
    assert r.exit_code==0, r.stderr
    p = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', str(free_port()), 'hedgehog.py', *args, 'b'],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH':os.pathsep.join([str(root), *sys.path]), 'OMP_NUM_THREADS':'1'})
    assert p.returncode==0, p.stderr
    one,two,said = json.loads(r.stdout),json.loads(p.stdout),p.stderr
    names = lambda r: [(x['variant'], x['stage'], x['metric'], x['tokens']) for x in r['rows']]
    assert names(one)==names(two) and [x['value'] for x in two['rows']]==pytest.approx([x['value'] for x in one['rows']], rel=1e-4)
    assert said.count('untrained')==2 and sorted(p.name for p in tmp_path.iterdir())==['a','b','hedgehog.py']  # a line, and a row of the table
    a,b = (load_file(tmp_path/n/'model.safetensors') for n in 'ab')
    assert a.keys()==b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=5e-4)

# --- what is kept

def go(model, folder, steps=8, phase='both', **kw):
    if phase!='finetune': distill(model, [corpus(4, seed=i) for i in range(steps)], steps, checkpoint=folder/'distill', save_steps=3, **kw)
    if phase!='distill': finetune(model, corpus(16), steps, 4, lr=1e-3, checkpoint=folder/'finetune', save_steps=3, **kw)
    return model

def equal(a, b): return all(torch.equal(x, y) for x,y in zip(a.state_dict().values(), b.state_dict().values()))

class Stop(Exception): pass

def stop_at(n):
    def on_step(step, *_):
        if step==n: raise Stop
    return on_step

@pytest.mark.parametrize('name', ['llama','gpt2'])  # GPT-2's dropout throws dice
@pytest.mark.parametrize('phase', ['distill','finetune'])
@pytest.mark.parametrize('at', [2,4,8])
@pytest.mark.parametrize('lora', [None,'all-linear'])
def test_taken_up_it_is_the_same(tmp_path, name, phase, at, lora):
    if lora and phase=='distill': return
    kw = dict(lora=dict(r=2, target_modules=lora, lora_dropout=.1)) if lora else {}
    seen,make = [],lambda: linearize(MODELS[name](layers=2))
    with pytest.raises(Stop): go(make(), tmp_path/'a', phase=phase, callbacks=[OnStep(stop_at(at))], **kw)
    a = go(make(), tmp_path/'a', phase=phase, callbacks=[OnStep(lambda *s: seen.append(s[:2]))], **kw)
    b = go(make(), tmp_path/'b', phase=phase, **kw)
    assert equal(a, b) and [s for s,_ in seen]==list(range(1,9))
    assert [l for _,l in seen]==TrainingHistory.load(tmp_path/'b'/phase).losses
    assert equal(go(make(), tmp_path/'a', phase=phase, **kw), b)  # and once more, when it is done

def test_states_are_safetensors_alone(tmp_path):
    go(linearize(llama(layers=2)), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())==['distill','finetune']
    for p in tmp_path.iterdir():
        n = int.from_bytes(p.read_bytes()[:8], 'little')
        assert json.loads(p.read_bytes()[8:8+n])['__metadata__']['state']

def test_what_a_killed_save_left_goes_with_the_next(tmp_path):
    code = ("import os, sys, torch; from hedgehog_nb.training.checkpoint import save_state; "
        "os.replace = lambda *a: os.kill(os.getpid(), 9); save_state(sys.argv[1], x=torch.ones(5))")
    assert subprocess.run([sys.executable, '-c', code, str(tmp_path/'s')]).returncode==-9
    assert [p.name for p in tmp_path.iterdir()]==['.s.tmp']
    (tmp_path/'.s.tmp'/'.tmpFrnJEF').write_text('as safetensors leaves one')
    save_state(tmp_path/'s', x=torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()]==['s'] and load_state(tmp_path/'s')['x'].tolist()==[1,1,1]

def test_a_state_comes_back_as_it_was(tmp_path):
    state = dict(a=[1, (2., 'x', None)], b={0:torch.arange(3), 'k':{1.5:True}}, c=torch.tensor(1.), d=torch.zeros(0,2), e=torch.arange(6).view(2,3).T, f={})
    save_state(tmp_path/'s', **state); got = load_state(tmp_path/'s')
    def check(x, y):
        assert type(x)==type(y)
        if isinstance(x, torch.Tensor): assert torch.equal(x, y) and x.dtype==y.dtype
        elif isinstance(x, dict): assert list(x)==list(y); [check(x[k], y[k]) for k in x]
        elif isinstance(x, (list,tuple)): assert len(x)==len(y); [check(*p) for p in zip(x, y)]
        else: assert x==y
    check(got, state)

def test_another_run_or_model_is_refused(tmp_path):
    go(linearize(llama(layers=2)), tmp_path)
    with pytest.raises(ValueError, match='steps is 8 there, 9 here.*delete it'): go(linearize(llama(layers=2)), tmp_path, steps=9)
    with pytest.raises(ValueError, match='another model: model.layers'): go(linearize(llama(layers=2), num_maps=2), tmp_path)
    with pytest.raises(ValueError, match='lora is None there'):
        go(linearize(llama(layers=2)), tmp_path, lora=dict(r=2, target_modules='all-linear'), phase='finetune')
    for broken in (b'', (tmp_path/'distill').read_bytes()[:999], b'\x80\x04N.'):
        (tmp_path/'distill').write_bytes(broken)
        with pytest.raises(ValueError, match='keeps no state.*start anew'): go(linearize(llama(layers=2)), tmp_path)

def tree(d): return {p.name:p.read_bytes() for p in d.iterdir()}

@pytest.mark.parametrize('phase', ['distill','finetune'])
def test_disk_full_leaves_the_last_state(tmp_path, phase, monkeypatch):
    import hedgehog_nb.training.checkpoint as t
    with pytest.raises(Stop): go(linearize(llama(layers=2)), tmp_path, phase=phase, callbacks=[OnStep(stop_at(4))])
    before = tree(tmp_path)
    def full(tensors, path, **kw): path.write_bytes(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(t, 'save_file', full)
    with pytest.raises(OSError) as e: go(linearize(llama(layers=2)), tmp_path, phase=phase)
    assert all(s in str(e.value) for s in ('No space left on device', f'step 3 of 8 is kept in {tmp_path/phase}', 'the same call goes on'))
    assert tree(tmp_path)==before
    monkeypatch.undo()
    assert equal(go(linearize(llama(layers=2)), tmp_path, phase=phase), go(linearize(llama(layers=2)), tmp_path/'b', phase=phase))

def test_a_file_that_cannot_grow(tmp_path):
    "Not simulated: the system refuses to write more than some bytes to a file"
    code = ("import resource, signal, torch; from hedgehog_nb.training.checkpoint import save_state; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save_state('s', x=torch.ones(10)); resource.setrlimit(resource.RLIMIT_FSIZE, (1000,1000))\n"
        "try: save_state('s', x=torch.ones(10**6))\nexcept OSError as e: print('refused', e)")
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH':os.pathsep.join(sys.path)})
    assert out.stdout.startswith('refused'), out
    assert [p.name for p in tmp_path.iterdir()]==['s'] and torch.equal(load_state(tmp_path/'s')['x'], torch.ones(10))

@pytest.mark.parametrize('phase', ['distill','finetune'])
def test_ctrl_c_says_where_the_state_is(tmp_path, phase):
    def on_step(step, *_):
        if step==5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match=f'step 3 of 8 is kept in {tmp_path/phase}, and the same call goes on'):
        go(linearize(llama(layers=2)), tmp_path, phase=phase, callbacks=[OnStep(on_step)])
    with pytest.raises(KeyboardInterrupt, match='nothing was kept yet'):
        go(linearize(llama(layers=2)), tmp_path/'b', phase=phase, callbacks=[OnStep(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))])

def test_what_is_not_finite_is_not_kept(tmp_path):
    with pytest.raises(FloatingPointError, match=r'step \d: .*lower the learning rate'):
        finetune(linearize(llama(layers=2)), corpus(16), 8, 4, lr=1e38, warmup_ratio=0, checkpoint=tmp_path/'f', save_steps=1)
    if (tmp_path/'f').exists(): assert all(t.isfinite().all() for t in load_state(tmp_path/'f')['model'].values())
    model = linearize(llama(layers=2))
    with torch.no_grad(): model.lm_head.weight[0] = float('nan')
    with pytest.raises(FloatingPointError, match='step 1: the loss is nan'): finetune(model, corpus(16), 2, 4)

@pytest.mark.slow
def test_killed_at_random():
    from helpers.kill_resume import trials
    out = list(trials(3, seed=1))
    assert len(out)==3 and all(kills>0 and differ==0 for kills,differ in out), out

# --- heads, adapters, precision

def test_lora_moves_its_targets_and_the_maps():
    model = linearize(llama(layers=2)); before = {k:v.clone() for k,v in model.named_parameters()}
    finetune(model, corpus(16), 3, 4, lr=1e-2, warmup_ratio=0, lora=dict(r=2, target_modules=['q_proj','v_proj']))
    moved = {k for k,v in model.named_parameters() if not torch.equal(v, before[k])}
    assert list(dict(model.named_parameters()))==list(before) and all(p.requires_grad for p in model.parameters())
    assert moved=={k for k in before if 'q_proj' in k or 'v_proj' in k or 'feature_map' in k}
    finetune(model, corpus(16), 1, 4, lora=dict(r=2, target_modules='all-linear'))  # and again
    with pytest.raises(ValueError, match='target_modules'): finetune(model, corpus(16), 1, 4, lora=dict(r=2, target_modules=['nowhere']))

def test_stopped_adapters_are_taken_out_again():
    model = linearize(llama(layers=2)); before = {k:v.clone() for k,v in model.named_parameters()}
    with pytest.raises(Stop): finetune(model, corpus(16), 3, 4, lora=dict(r=2, target_modules='all-linear'), callbacks=[OnStep(stop_at(2))])
    after = dict(model.named_parameters())
    assert (list(after)==list(before) and all(p.requires_grad for p in after.values())
            and all(torch.equal(after[k], before[k]) for k in before if 'feature_map' not in k))

def test_after_half_precision_the_model_is_as_precise_as_before():
    model = finetuned(linearize(llama(layers=2)), corpus(16), 2, 4, bf16=True)
    again = linearize(llama(layers=2)); again.load_state_dict(model.state_dict())
    x = corpus(2)
    assert torch.equal(logits(model, input_ids=x), logits(again, input_ids=x))

@pytest.mark.parametrize('train', [distill, finetune])
@pytest.mark.parametrize('name,value,said', [('max_steps',3,'say steps'), ('num_train_epochs',3,'say epochs'), ('learning_rate',.1,'say lr'),
    ('per_device_train_batch_size',4,'say batch_size'), ('save_strategy','steps','say checkpoint'), ('eval_strategy','steps','say eval_data')])
def test_a_setting_has_one_name(train, name, value, said):
    with pytest.raises(ValueError, match=said): train(linearize(llama(layers=2)), corpus(16), 2, **{name:value})

def image_rows(n):
    g = torch.Generator().manual_seed(0)
    return [dict(pixel_values=torch.randn(3,16,16, generator=g)+i%2, labels=i%2) for i in range(n)]

def text_rows(n):
    g = torch.Generator().manual_seed(0)
    return [dict(input_ids=torch.randint(4+28*(i%2), 32+28*(i%2), (5+i%7,), generator=g).tolist(), attention_mask=[1]*(5+i%7), labels=i%2, idx=str(i))
        for i in range(n)]

class Pad:
    "What `DataCollatorWithPadding` does, without a tokenizer"
    def __call__(self, rows):
        n = max(len(r['input_ids']) for r in rows)
        return {**{k: torch.tensor([r[k]+[0]*(n-len(r[k])) for r in rows]) for k in ('input_ids','attention_mask')},
            'labels': torch.tensor([r['labels'] for r in rows])}

@pytest.mark.parametrize('kw', [{}, dict(gradient_accumulation_steps=2), dict(bf16=True), dict(gradient_checkpointing=True),
    dict(lora=dict(r=4, target_modules=['query','value'], modules_to_save=['classifier']))], ids=str)
@pytest.mark.parametrize('task', ['text','images'])
def test_heads(task, kw):
    torch.manual_seed(0)
    from transformers import BertConfig, BertForSequenceClassification
    if task=='images' and 'lora' in kw: kw = dict(lora=dict(r=4, target_modules=['q_proj','v_proj'], modules_to_save=['classifier']))
    if task=='text':
        model = BertForSequenceClassification(BertConfig(hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, num_labels=2))
    else: model = vit(layers=2)
    data = text_rows(32) if task=='text' else image_rows(32)
    losses = finetune(linearize(model), data, 30, 16, lr=2e-2, collator=Pad() if task=='text' else None, **kw).losses
    assert len(losses)==30 and sum(losses[-5:])<.85*sum(losses[:5])
    assert not any('lora' in n for n,_ in model.named_parameters())

@pytest.mark.parametrize('name', MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = linearize(MODELS[name](layers=2).double()).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    x,out = inputs(model),[]
    for on in (False,True):
        if on: model.gradient_checkpointing_enable(dict(use_reentrant=False))
        model.zero_grad(); model(**x).logits.square().mean().backward()
        out.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    assert model.is_gradient_checkpointing
    for a,b in zip(*out): assert a is b is None or torch.allclose(a, b, rtol=0, atol=0)

@pytest.mark.parametrize('objective', ['weights','outputs'])
def test_distillation_in_mixed_precision(objective):
    model = linearize(llama())
    data = [corpus(4, seed=i) for i in range(20)]
    with torch.autocast('cpu', torch.bfloat16, cache_enabled=False): history = distill(model, data, 20, objective=objective).losses
    assert history[-1]<.95*history[0] and all(p.dtype==torch.float32 for p in model.parameters())
