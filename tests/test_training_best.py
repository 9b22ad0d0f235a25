"No phase of training ends worse than it began on held-out data; learning rates that fit or are found."
import copy, math, os, signal, subprocess, sys, warnings
import pytest, torch, transformers
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.data.text import load_texts, token_blocks
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.checkpoint import load_state, TrainingHistory
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import add_lora, finetune
from hedgehog_nb.training.lr_finder import default_lr, find_lr, LRSearch
from helpers.tiny_models import corpus, gpt2, llama, shake
from helpers.training import OnStep

PHASES = [distill, finetune]
BLOCKS,HELD = corpus(12),corpus(5, seed=7)
LORA = dict(r=2, target_modules='all-linear')
BAD = {distill:30., finetune:1.} # learning rates that only do harm

def made(make=llama, **kw): return shake(linearize(make(layers=2), **kw))

def weights(model): return {n:t.clone() for n,t in model.state_dict().items()}

def same(model, before): return all(torch.equal(t, before[n]) for n,t in model.state_dict().items())

def held_loss(train, model, **kw): # an evaluation before a step that does nothing
    return train(copy.deepcopy(model), BLOCKS, 1, lr=1e-30, eval_data=HELD, **kw).evaluations[0]['loss']

class Stop(Exception): pass

def stop_at(at):
    def stop(step, *_):
        if step==at: raise Stop
    return OnStep(stop)

# --- the best state

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('on_disk', [True, False])
def test_a_phase_that_does_harm_leaves_the_model_as_it_was(tmp_path, train, on_disk):
    model = made(); before = weights(model)
    kw = dict(checkpoint=tmp_path/'a') if on_disk else {}
    with pytest.warns(UserWarning, match=r'^hedgehog_nb: no step was better than the start \(loss \d.*; the model is as it was: try a lower .*\(given'):
        h = train(model, BLOCKS, 8, 4, lr=BAD[train], eval_data=HELD, **kw)
    assert same(model, before) and h.best_step==0 and h.restored and h.best_value==h.evaluations[0]['loss']<min(e['loss'] for e in h.evaluations[1:])
    assert not on_disk or [p.name for p in tmp_path.iterdir()]==['a']
    if on_disk:
        again = made()
        with torch.no_grad(): [p.mul_(2) for m in linear_layers(again).values() for p in m.feature_map.parameters()]
        assert train(again, BLOCKS, 8, 4, lr=BAD[train], eval_data=HELD, **kw)==h==TrainingHistory.load(tmp_path/'a') and same(again, before)

@pytest.mark.parametrize('train', PHASES)
def test_without_keep_best_the_last_step_stays(train):
    model = made(); before = weights(model)
    with pytest.warns(UserWarning, match='keep_best=True would have kept it'): h = train(model, BLOCKS, 8, 4, lr=BAD[train], eval_data=HELD, keep_best=False)
    assert not same(model, before) and not h.restored and h.best_step==0
    assert held_loss(train, model)==pytest.approx(h.evaluations[-1]['loss'], rel=1e-4)

@pytest.mark.parametrize('train', PHASES)
def test_the_best_in_between(train):
    "A rate that rises: first it helps, then it harms."
    kw = dict(lr=BAD[train]*3, lr_scheduler_type='constant_with_warmup', warmup_steps=400, eval_data=HELD, eval_steps=2)
    model,other = made(),made()
    h = train(model, BLOCKS, 40, 4, **kw)
    assert 0<h.best_step<40 and h.restored and h.best_value==min(e['loss'] for e in h.evaluations)
    assert held_loss(train, model)==pytest.approx(h.best_value, rel=1e-5)
    train(other, BLOCKS, 40, 4, **kw, keep_best=False)
    assert not same(other, weights(model))
    assert f"best at step {h.best_step} of 40 (loss {h.best_value:.4g}), restored; it began at {h.evaluations[0]['loss']:.4g}"==h.verdict

def test_the_last_step_is_the_best():
    model,other = made(),made()
    h = distill(model, BLOCKS, 10, 4, lr=.05, eval_data=HELD)
    distill(other, BLOCKS, 10, 4, lr=.05)
    assert h.best_step==10 and not h.restored and same(model, weights(other)) and h.verdict.startswith('best at the last step, 10 (loss ')
    assert distill(made(), BLOCKS, 2, 4).verdict=='2 steps, none compared: there was no evaluation with a finite loss'

def test_another_metric():
    "The larger the better, as transformers decides by its name."
    model = made()
    h = finetune(model, BLOCKS, 6, 4, lr=1e-3, eval_data=HELD, eval_steps=2, metric_for_best_model='accuracy',
        compute_metrics=lambda p, n=iter([.1,.3,.2,.1]): dict(accuracy=next(n)))
    assert (h.best_step, h.best_value, h.metric, h.restored)==(2, .3, 'accuracy', True) and 'best at step 2 of 6 (accuracy 0.3), restored' in h.verdict
    with pytest.raises(KeyError, match='eval_f1'): finetune(made(), BLOCKS, 2, 4, eval_data=HELD, metric_for_best_model='f1')

@pytest.mark.parametrize('train', PHASES)
def test_a_loss_that_is_not_finite_leaves_the_best_state(train):
    model = made(); kw = dict(eval_data=HELD, eval_steps=1)
    seen = {}
    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step==2:
                seen.update(weights(model))
                with torch.no_grad(): next(p for m in linear_layers(model).values() for p in m.feature_map.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match='the model is as it was at step 2, its best evaluation'):
        train(model, BLOCKS, 6, 4, lr=1e-3, callbacks=[Break()], **kw)
    assert same(model, seen)

def test_so_do_adapters():
    model,seen = made(),[]
    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kw):
            if state.global_step==2:
                with torch.no_grad():
                    seen.append(model.eval()(input_ids=HELD).logits)
                    next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(FloatingPointError, match='as it was at step 2'):
        finetune(model, BLOCKS, 6, 4, lr=1e-2, warmup_ratio=0, lora=LORA, callbacks=[Break()], eval_data=HELD, eval_steps=1)
    with torch.no_grad(): torch.testing.assert_close(model(input_ids=HELD).logits, seen[0], atol=1e-4, rtol=1e-4)
    assert not hasattr(model, 'peft_config') and not any('lora' in n for n,_ in model.named_parameters())

@pytest.mark.parametrize('lora', [None, LORA])
@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('at', [1,4,7,10,13])
def test_resumed_it_ends_with_the_same_best(tmp_path, train, lora, at):
    "The best is at a step between, before and after the checkpoint that the run resumes from."
    if lora and train is distill: return
    kw = dict(lr=BAD[train]*3, lr_scheduler_type='constant_with_warmup', warmup_steps=3000 if train is distill else 1500, eval_data=HELD, eval_steps=1,
        save_steps=3, **(dict(lora=lora) if lora else {}))
    with pytest.raises(Stop): train(made(), BLOCKS, 14, 4, checkpoint=tmp_path/'a', callbacks=[stop_at(at)], **kw)
    a,b = made(),made()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        x,y = train(a, BLOCKS, 14, 4, checkpoint=tmp_path/'a', **kw),train(b, BLOCKS, 14, 4, **kw)
    assert x.evaluations==y.evaluations and x.losses==y.losses and y.restored and 5<y.best_step<14
    assert (x.best_step, x.best_value, x.verdict)==(y.best_step, y.best_value, y.verdict)
    assert same(a, weights(b)) and [p.name for p in tmp_path.iterdir()]==['a']

SCRIPT = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_training_best as t, hedgehog_nb.training.checkpoint as c, hedgehog_nb.training.best as b
folder,where,n = Path(sys.argv[2]),sys.argv[3],int(sys.argv[4])
count = 0
def bomb(f):
    def g(*args, **kw):
        global count
        count += 1
        if count==n: os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kw)
    return g
if where=='save': c.os.replace = bomb(os.replace)
if where=='forget': b.BestState._forget = bomb(b.BestState._forget)
if where=='restore': b.BestState.restore = bomb(b.BestState.restore)
if where=='rewrite': c.TrainingCheckpoint.rewrite = bomb(c.TrainingCheckpoint.rewrite)
if where=='clear': b.BestState.clear = bomb(b.BestState.clear)
t.killed(folder/'a')
"""

def killed(checkpoint=None):
    model = made()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        h = distill(model, BLOCKS, 10, 4, lr=90., lr_scheduler_type='constant_with_warmup', warmup_steps=3000, eval_data=HELD, eval_steps=1, save_steps=2,
            checkpoint=checkpoint)
    return model,h

@pytest.mark.processes
@pytest.mark.parametrize('where,n', [('save',7), ('forget',5), ('restore',1), ('rewrite',1), ('clear',1)])
def test_killed_while_it_writes(tmp_path, root, where, n):
    "By SIGKILL, between the two files of a state and at the end."
    p = subprocess.run([sys.executable, '-c', SCRIPT, str(root/'tests'), str(tmp_path), where, str(n)], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH':os.pathsep.join(sys.path)})
    assert p.returncode==-signal.SIGKILL, p.stderr
    (a,x),(b,y) = killed(tmp_path/'a'),killed()
    assert 0<y.best_step<10 and same(a, weights(b)) and x.losses==y.losses and x.evaluations==y.evaluations and x.verdict==y.verdict
    assert [p.name for p in tmp_path.iterdir()]==['a']

def test_the_file_that_a_checkpoint_refers_to_is_needed(tmp_path):
    kw = dict(lr=.05, eval_data=HELD, eval_steps=2, save_steps=2, checkpoint=tmp_path/'a')
    with pytest.raises(Stop): distill(made(), BLOCKS, 8, 4, callbacks=[stop_at(5)], **kw)
    assert sorted(p.name for p in tmp_path.iterdir())==['a','a.best-4']
    assert {*load_state(tmp_path/'a.best-4')['model']}=={n for n,_ in made().named_parameters() if 'feature_map' in n} # what is trained, no more
    (tmp_path/'a.best-4').unlink()
    with pytest.raises(ValueError, match='a.best-4 is missing.*start anew'): distill(made(), BLOCKS, 8, 4, **kw)
    assert distill(made(), BLOCKS, 8, 4, keep_best=False, **kw).losses # it is not needed then

def test_files_of_other_checkpoints_stay(tmp_path):
    (tmp_path/'b.best-3').write_text('x'); (tmp_path/'ab.best-1').write_text('x')
    for name in ('b2','a'): distill(made(), BLOCKS, 4, 4, lr=.05, eval_data=HELD, checkpoint=tmp_path/name)
    assert sorted(p.name for p in tmp_path.iterdir())==['a','ab.best-1','b.best-3','b2']

def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    import hedgehog_nb.training.checkpoint as c
    kw = dict(lr=.05, eval_data=HELD, checkpoint=tmp_path/'a', save_steps=2)
    with pytest.raises(Stop): distill(made(), BLOCKS, 8, 4, callbacks=[stop_at(4)], **kw)
    def full(tensors, path, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(c, 'save_file', full)
    with pytest.raises(OSError, match='No space left.*step 2 of 8 is kept'): distill(made(), BLOCKS, 8, 4, **kw)

# --- patience

@pytest.mark.parametrize('train', PHASES)
def test_patience_stops_and_the_best_is_restored(train, tmp_path):
    kw = dict(lr=BAD[train], lr_scheduler_type='constant', eval_data=HELD, eval_steps=1, patience=3, save_steps=2)
    with pytest.warns(UserWarning, match='no step was better'): h = train(model := made(), BLOCKS, 30, 4, **kw)
    assert len(h.losses)==3 and same(model, weights(made()))
    for at in (1,2):
        with pytest.raises(Stop): train(made(), BLOCKS, 30, 4, checkpoint=tmp_path/f'{at}', callbacks=[stop_at(at)], **kw)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for _ in range(2): assert train(made(), BLOCKS, 30, 4, checkpoint=tmp_path/f'{at}', **kw).losses==h.losses

def test_min_delta():
    run = lambda **kw: len(distill(made(), BLOCKS, 12, 4, lr=1e-4, eval_data=HELD, eval_steps=1, patience=2, **kw).losses)
    assert run()==12 and run(min_delta=10.)==2

def test_patience_needs_evaluations():
    with pytest.raises(ValueError, match='patience=3 counts evaluations: give eval_data'): distill(made(), BLOCKS, 4, patience=3)
    with pytest.raises(ValueError, match='patience=0'): distill(made(), BLOCKS, 4, patience=0, eval_data=HELD)

def test_transformers_says_nothing_of_its_own_checkpoints(caplog):
    distill(made(), BLOCKS, 3, 4, eval_data=HELD, patience=3)
    assert not [r for r in caplog.records if 'EarlyStopping' in r.message]

# --- rates

@pytest.mark.parametrize('size,hybrid,want', [(3e8, False, 6e-4), (3e8, True, 1e-4), (1.7e9, False, 1e-4), (1.7e9, True, 3e-5),
    (7e9, False, 2e-5), (7e9, True, 1e-5)])
def test_default_rates_follow_size_and_kind(size, hybrid, want):
    model = made(**(dict(attention='hedgehog-window', window=4) if hybrid else {}))
    model.num_parameters = lambda: int(size)
    assert [default_lr(model), default_lr(model, 'distill'), default_lr(model, lora=True)]==[want, 1e-2, 1e-4]

def test_default_rates_are_what_none_means():
    seen = lambda train, model, **kw: train(model, BLOCKS, 2, 4, **kw).lr
    assert [seen(distill, made()), seen(finetune, made())]==[1e-2, 6e-4]
    assert [seen(finetune, made(), lora=LORA), seen(finetune, add_lora(made(), **LORA))]==[1e-4, 1e-4]
    assert seen(finetune, made(softmax_heads='0:0-1'))==1e-4==seen(finetune, made(attention='hedgehog-window', window=4)) and seen(distill, made(), lr=.5)==.5
    with pytest.raises(ValueError, match="phase is 'distill', 'align' or 'finetune'"): default_lr(made(), 'train')
    for train in PHASES:
        with pytest.raises(ValueError, match="lr is a number, None, or 'auto'; given 'best'"): train(made(), BLOCKS, 2, lr='best')

@pytest.mark.parametrize('lora', [None, LORA])
def test_maps_at_a_rate_of_their_own(lora, tmp_path):
    groups = {}
    class Note(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kw):
            names = {id(p):n for n,p in model.named_parameters()}
            for g in optimizer.param_groups: groups.update({names[id(p)]:(g['lr'], g['weight_decay'], g['initial_lr']) for p in g['params']})
    kw = dict(lr=1e-3, map_lr=.1, warmup_ratio=0, weight_decay=.01, lora=lora)
    model = made(bias=True); before = weights(model)
    finetune(model, BLOCKS, 3, 4, callbacks=[Note()], **kw)
    assert {'feature_map' in n for n in groups}=={True, False}
    for n,(lr,decay,first) in groups.items():
        assert lr==first==(.1 if 'feature_map' in n else 1e-3), n
        assert decay==(0 if 'bias' in n or 'norm' in n else .01), n
    moved = lambda m: sum((p-before[n]).abs().max().item() for n,p in m.named_parameters() if 'feature_map' in n)
    other = made(bias=True); finetune(other, BLOCKS, 3, 4, **{**kw, 'map_lr':None})
    assert moved(model)>20*moved(other)
    with pytest.raises(Stop): finetune(made(bias=True), BLOCKS, 6, 4, checkpoint=tmp_path/'a', save_steps=1, callbacks=[stop_at(3)], **kw)
    a,b = made(bias=True),made(bias=True)
    finetune(a, BLOCKS, 6, 4, checkpoint=tmp_path/'a', save_steps=1, **kw); finetune(b, BLOCKS, 6, 4, **kw)
    assert same(a, weights(b))
    with pytest.raises(ValueError, match='map_lr is 0.1 there, 0.2 here'):
        finetune(made(bias=True), BLOCKS, 6, 4, checkpoint=tmp_path/'a', **{**kw, 'map_lr':.2})
    with pytest.raises(ValueError, match='this model has none'): finetune(llama(), BLOCKS, 2, map_lr=.1)

# --- the search

@pytest.mark.parametrize('train,kw', [(distill, {}), (distill, dict(objective='outputs')), (finetune, {}), (finetune, dict(objective='teacher'))])
@pytest.mark.parametrize('held', [HELD, None])
def test_the_search_leaves_the_model_as_it_was(train, kw, held):
    model = made(gpt2).train(); before,flags = weights(model),[p.requires_grad for p in model.parameters()]
    a = find_lr(train, model, BLOCKS, held, steps=4, batch_size=4, **kw)
    assert same(model, before) and model.training and flags==[p.requires_grad for p in model.parameters()] and all(p.grad is None for p in model.parameters())
    b = find_lr(train, model, BLOCKS, held, steps=4, batch_size=4, **kw)
    assert a==b and a.chosen==a.rates[a.losses.index(min(a.losses))] and a.metric==('training loss' if held is None else 'held-out loss')
    assert a.rates==sorted(a.rates) and a.rates[0]==pytest.approx(default_lr(model, train.__name__)/100)

def test_the_chosen_rate_ends_better_than_the_extremes():
    model,tok = load_embedded()
    train,test = (token_blocks(load_texts('embedded', s), tok, 64, seed=0)[:64] for s in ('train','test'))
    model = linearize(model, num_maps=4, bias=True)
    search = find_lr(distill, model, train, test[:16], rates=[1e-4,1e-3,1e-2,1e-1,1.,10.,100.])
    ends = {lr:distill(copy.deepcopy(model), train, 24, lr=lr, eval_data=test[:16], keep_best=False, eval_steps=24).evaluations[-1]['loss']
        for lr in (search.rates[0], search.chosen, search.rates[-1])}
    assert search.rates[0]<search.chosen<search.rates[-1] and ends[search.chosen]==min(ends.values()) and ends[search.chosen]<.9*sorted(ends.values())[1]
    assert search.rates[-1]<100 # it stopped climbing

def test_rates_that_diverge_are_no_choice():
    model = made(); before = weights(model)
    s = find_lr(finetune, model, BLOCKS, HELD, rates=[1e30,1e-3,1e38], steps=3, batch_size=4, warmup_ratio=0)
    assert s.chosen==1e-3 and s.rates==[1e-3,1e30] and s.losses[1]>s.losses[0] and same(model, before)
    with pytest.raises(FloatingPointError, match='no rate of 1e38 … gives a finite loss: give lower ones'):
        find_lr(finetune, model, BLOCKS, rates=[1e38], steps=3, batch_size=4, warmup_ratio=0)
    assert same(model, before)

@pytest.mark.parametrize('train', PHASES)
@pytest.mark.parametrize('lora', [None, LORA])
def test_auto_is_search_and_run(train, lora, tmp_path):
    if lora and train is distill: return
    kw = dict(eval_data=HELD, **(dict(lora=lora) if lora else {}))
    a = made(); h = train(a, BLOCKS, 6, 4, lr='auto', checkpoint=tmp_path/'a', save_steps=2, **kw)
    assert h.lr==h.search.chosen and h.verdict.startswith(h.search.verdict) and h.search.steps==8
    b = made(); train(b, BLOCKS, 6, 4, lr=h.lr, **kw)
    assert same(a, weights(b)) and TrainingHistory.load(tmp_path/'a')==h

def test_a_resumed_run_does_not_search_again(tmp_path, monkeypatch):
    import hedgehog_nb.training.distill as d
    kw = dict(lr='auto', checkpoint=tmp_path/'a', save_steps=2)
    with pytest.raises(Stop): distill(made(), BLOCKS, 6, 4, callbacks=[stop_at(3)], **kw)
    whole = distill(b := made(), BLOCKS, 6, 4, lr='auto')
    monkeypatch.setattr(d, 'find_lr', None)
    h = distill(a := made(), BLOCKS, 6, 4, **kw)
    assert h.losses==whole.losses and h.search==whole.search and same(a, weights(b))
    with pytest.raises(ValueError, match='lr is auto there, 0.1 here'): distill(made(), BLOCKS, 6, 4, **{**kw, 'lr':.1})

def test_what_cannot_be_searched():
    for args,kw,said in (((iter(BLOCKS),), {}, 'reads the data again; given .*iterator'), ((BLOCKS,), dict(rates=[]), '1 or more; given'),
        ((BLOCKS,), dict(rates=[0.,1.]), 'above 0'), ((BLOCKS,), dict(lora=LORA), 'give the model from add_lora'),
        ((BLOCKS,), dict(checkpoint='x'), 'none of its own')):
        with pytest.raises(ValueError, match=said): find_lr(finetune, made(), *args, **kw)

def test_one_line_and_a_plot():
    s = LRSearch([1e-4,1e-3,3e-3,1e-2,1e-1], [2.,1.5,1.2,1.6,math.inf], 3e-3, 8, 'held-out loss')
    assert s.verdict=='lr 3e-3, the best of 1e-4 … 1e-1 after 8 steps each'
    ax = s.plot()
    assert ax.get_xscale()=='log' and ax.get_xlabel()=='learning rate' and len(ax.lines[0].get_xdata())==4 # what diverged is left out
