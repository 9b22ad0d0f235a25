"A whole conversion: what is counted, what is written down, and that a run goes on where it stopped."
import math
import pytest, torch
from itertools import islice
from hypothesis import given, settings, strategies as st
from hedgehog_nb.models.config import LinearizeConfig
from hedgehog_nb.training.evaluate import perplexity
from hedgehog_nb.training.recipe import convert, get_recipe, log_spaced, mixed_batches, read_eval_log, RECIPES, steps_for, tokens_after
from helpers.tiny_models import corpus, llama

TRAIN,TEST = corpus(12),corpus(3)
T = TRAIN.shape[1]
SHORT = dict(distill_steps=4, finetune_steps=2, batch_size=4, recipe='paper')

def go(**kw): return convert(llama(), TRAIN, TEST, **{**SHORT, **kw})

@given(st.integers(1, 40), st.integers(1, 16), st.integers(1, 9), st.integers(1, 200))
@settings(max_examples=200, deadline=None)
def test_steps_and_tokens_are_turned_into_each_other(n, length, batch_size, steps):
    "Counted row by row, over epochs whose last batch may be smaller."
    blocks,seen = torch.zeros(n, length),0
    for s in range(steps): seen += min(batch_size, n-s%math.ceil(n/batch_size)*batch_size)*length
    assert tokens_after(steps, blocks, batch_size)==seen
    assert steps_for(seen, blocks, batch_size)==steps and steps_for(seen+1, blocks, batch_size)==steps+1

@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 6), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_an_epoch_of_two_lengths_reads_everything_once(n, batch_size, long_blocks, seed):
    text,batches = torch.arange(n*3).view(n, 3),mixed_batches(torch.arange(n*3).view(n, 3), batch_size, long_blocks, seed)
    for epoch in range(2):
        xs,seen = [],0
        while seen<text.numel(): xs.append(next(batches)); seen += xs[-1].numel()
        assert torch.equal(torch.cat([x.flatten() for x in xs]).sort()[0], text.flatten())
        assert all((x[:,1:]==x[:,:-1]+1).all() and x.shape[1] in (3, 3*long_blocks) and len(x)<=batch_size for x in xs)
        long = sum(x.numel() for x in xs if x.shape[1]>3)//(3*long_blocks)
        assert long==(n//long_blocks+1-epoch%2)//2 # half of the groups
    for t in (1, 3*n, 3*n+1):
        s = steps_for(t, text, batch_size, long_blocks)
        seen = [x.numel() for x in islice(mixed_batches(text, batch_size, long_blocks), s)]
        assert sum(seen)>=t>sum(seen[:-1])

def test_blocks_of_two_lengths(tmp_path):
    "What is counted, in both phases; killed in the second, a run ends as it would have."
    def run(**kw): return go(long_blocks=2, batch_size=2, evals=2, save_steps=1, **kw)
    rows = run()
    longs = [x.numel() for x in islice(mixed_batches(TRAIN, 2, 2), 4)]
    assert [r['tokens'] for r in rows if r['stage']=='distilled']==[sum(longs)]*2
    class Stop(Exception): pass
    def stop(event, phase=None, done=0, **kw):
        if event=='progress' and phase=='finetune' and done: raise Stop
    with pytest.raises(Stop): run(work=tmp_path/'run', on_event=stop)
    drop = lambda rows: [{k:v for k,v in r.items() if k!='seconds'} for r in rows]
    assert drop(run(work=tmp_path/'run'))==drop(rows)
    with pytest.raises(ValueError, match='keeps another run .long_blocks was 2, is 3'): go(long_blocks=3, batch_size=2, evals=2, work=tmp_path/'run')

@pytest.mark.parametrize('attention', ['hedgehog','elu'])
def test_softmax_heads_are_chosen_on_the_way(attention, tmp_path):
    "Those whose maps are furthest from softmax once they are distilled; killed at any later moment, a run ends with the same."
    from hedgehog_nb.models.heads import kl_by_head, select_softmax_heads
    kw,rows,seen = dict(config=LinearizeConfig(attention, softmax_heads=3), save_steps=1, evals=2, distill_steps=4 if attention=='hedgehog' else 0),[],{}
    def listen(event, row=None, model=None, **_):
        if event=='row' and row['stage']==('distilled' if attention=='hedgehog' else 'swapped'): seen['kl'] = kl_by_head(model, input_ids=TRAIN[-4:])
    def run(on_event=None, **more):
        model = llama()
        return model,convert(model, TRAIN, TEST, **{**SHORT, **kw}, on_event=on_event, **more)
    model,rows = run(listen)
    choice = select_softmax_heads(seen['kl'], 3, 2, variant=attention)
    assert (model.config.hedgehog['layers'], model.config.hedgehog.get('softmax_heads', ''))==(choice['layers'], choice['softmax_heads'])
    stages = [r['stage'] for r in rows if r['metric']=='ppl']
    assert stages==['teacher','swapped',*['distill','distilled']*(attention=='hedgehog'),'heads','finetune','finetuned']
    drop,weights = lambda rows: [{k:v for k,v in r.items() if k!='seconds'} for r in rows],model.state_dict()
    class Stop(Exception): pass
    for i,at in enumerate((lambda row=None, **_: row is not None and row['stage']=='heads', lambda phase=None, done=0, **_: phase=='finetune' and done)):
        def stop(event, **kw):
            if at(**kw): raise Stop
        with pytest.raises(Stop): run(stop, work=tmp_path/f'{i}')
        model,again = run(work=tmp_path/f'{i}')
        assert drop(again)==drop(rows) and all(torch.equal(x, weights[n]) for n,x in model.state_dict().items())

@pytest.mark.parametrize('n', [6, 100])
def test_too_many_softmax_heads_are_refused_before_anything_is_measured(n):
    events = []
    with pytest.raises(ValueError, match=f'softmax_heads={n}: of 6 key-value heads up to 5 can stay softmax'):
        go(config=LinearizeConfig(softmax_heads=n), on_event=lambda *a, **kw: events.append(a))
    assert not events

def test_heads_are_not_chosen_where_a_window_hides_their_maps():
    kw = dict(window=T)
    with pytest.raises(ValueError, match=f'blocks of {T} tokens are within the window of {T}: give longer blocks, or name the heads'):
        go(config=LinearizeConfig('hedgehog-window', softmax_heads=2, attention_kwargs=kw))
    go(config=LinearizeConfig('hedgehog-window', softmax_heads=2, attention_kwargs=dict(window=T-1)))

def test_the_best_state_is_chosen_at_both_lengths(monkeypatch):
    "Where half of the training text is in long blocks, half of what is held out is too; all of it is read."
    import hedgehog_nb.training.recipe as recipe
    given = []
    def see(model, text, *args, eval_data=None, **kw): given.append(eval_data); return plain(model, text, *args, eval_data=eval_data, **kw)
    plain,valid = recipe.distill,corpus(9, seed=1)
    monkeypatch.setattr(recipe, 'distill', see)
    go(long_blocks=4, valid=valid, finetune_steps=0); go(valid=valid, finetune_steps=0); go(long_blocks=4, valid=valid[:3], finetune_steps=0)
    assert sorted(tuple(x.shape) for x in given[0])==[(1, T), (1, 4*T), (4, T)] and given[1] is valid and [x.numel() for x in given[2]]==[3*T]
    assert torch.equal(torch.cat([x.flatten() for x in given[0]]).sort()[0], valid.flatten().sort()[0])

def test_long_blocks_fit_text_and_model():
    r,model = get_recipe('best'),llama()
    model.config.max_position_embeddings = 3*T
    hybrid = r.config()
    assert [r.long_for(hybrid, model, n, T) for n in (1, 2, 99)]==[1, 2, 3]
    assert get_recipe('paper').long_for(hybrid, model, 99, T)==1==r.long_for(r.config('hedgehog'), model, 99, T)

def test_alignment_is_a_phase(tmp_path):
    "Between maps and whole model; killed in it, a run ends as it would have. The logits' teacher has the projections as they were."
    kw = dict(align_steps=3, save_steps=1, finetune_on='teacher', valid=corpus(3, seed=2))
    rows = go(**kw)
    assert [r['stage'] for r in rows if r['metric']=='ppl']==['teacher','swapped','distilled','aligned','finetuned']
    class Stop(Exception): pass
    def stop(event, phase=None, done=0, **_):
        if event=='progress' and phase=='align' and done>4*T: raise Stop
    with pytest.raises(Stop): go(**kw, work=tmp_path/'run', on_event=stop)
    drop = lambda rows: [{k:v for k,v in r.items() if k!='seconds'} for r in rows]
    assert drop(go(**kw, work=tmp_path/'run'))==drop(rows)
    ended = lambda stage, rows: next(r['value'] for r in rows if (r['stage'], r['metric'])==(stage, 'ppl'))
    rows = go(**{**kw, 'align_lr':1e-12})
    assert ended('aligned', rows)==pytest.approx(ended('distilled', rows), rel=1e-6)
    best = dict(recipe='best', distill_steps=2, finetune_steps=0)
    stages = lambda model, config, **kw: [r['stage'] for r in convert(model, TRAIN, TEST, config, **best, **kw) if r['metric']=='ppl'][2:]
    assert stages(llama(), 'hedgehog')==['distilled','aligned'] and stages(llama(), None)==['distilled']==stages(llama(), 'hedgehog', align_steps=0)
    assert stages(llama().half(), 'hedgehog')==['distilled'] # which AdamW cannot train
    with pytest.raises(ValueError, match='align_steps=2 trains the weights of attention.*float16'):
        convert(llama().half(), TRAIN, TEST, align_steps=2, on_event=lambda *a, **k: 1/0)

@pytest.mark.parametrize('steps,n,want', [(100, 1, [100]), (100, 4, [12,25,50,100]), (3, 9, [1,2,3]), (1, 3, [1])])
def test_evaluations_are_spaced_by_doublings(steps, n, want): assert log_spaced(steps, n)==want

def test_rows_of_a_conversion():
    model = llama(); before = perplexity(model, TEST, 4)
    rows = convert(model, TRAIN, TEST, LinearizeConfig('hedgehog', '0,2'), evals=2, **SHORT)
    ppl = [r for r in rows if r['metric']=='ppl']
    assert [r['stage'] for r in ppl]==['teacher','swapped','distill','distilled','finetune','finetuned']
    assert [r['tokens'] for r in ppl]==[0, 0, 2*4*T, 4*4*T, 5*4*T, 6*4*T]
    assert ppl[0]['value']==before and ppl[-1]['value']==perplexity(model, TEST, 4) and model.config.hedgehog['layers']==[0,2]
    assert {r['metric'] for r in rows}-{'ppl'}=={'kl','loss'} and all(r['map']=='hedgehog' and r['seed']==0 for r in rows)

def test_a_folder_may_be_a_string_and_nothing_is_done_twice(tmp_path):
    "The second call reads all that the first has done, and gives the same rows."
    seen,rows = [],go(work=str(tmp_path/'run'))
    again = go(work=tmp_path/'run', on_event=lambda event, **kw: seen.append((event, kw.get('phase'))))
    drop = lambda rows: [{k:v for k,v in r.items() if k!='seconds'} for r in rows]
    assert drop(again)==drop(rows)==drop(go()) and ('progress','evaluate') not in seen
    assert len(read_eval_log(tmp_path/'run'/'measured.json')['rows'])==len(rows)

LOOK = dict(evals=(0, '2', True), distill_steps=(-1, 2.5), adapt_steps=(-1,), batch_size=(0,), finetune_batch_size=(0,), long_blocks=(0, 1.5),
    save_steps=(0,), seed=(-1,), gradient_accumulation_steps=(0,))

@pytest.mark.parametrize('bad,says', [
    *((dict([(n, x)]), f'{n} is a whole number') for n,xs in LOOK.items() for x in xs),
    *((dict([(n, x)]), f'^{n} is above 0') for n in ('lr','align_lr','finetune_lr') for x in (0, -1, float('inf'), True)),
    (dict(config='hedghog'), "called 'hedghog'"), (dict(recipe='beste'), 'recipe is one of paper, lolcats, best'),
    (dict(finetune_on='logits'), 'finetune_on is one of labels, teacher, both'),
    (dict(patience=2), 'give valid too'), (dict(long_blocks=13), 'long_blocks=13 joins so many blocks.*given 12 blocks'),
    (dict(valid=TEST[0]), 'valid is'), (dict(config={}), 'config is a LinearizeConfig'),
    (dict(config=LinearizeConfig(layers='0-9')), 'has layers 0 to 2'), (dict(config='elu'), "'elu' has no parameters to distil"),
    (dict(objective='w'), "objective is one of weights.*given 'w'"), (dict(objective=['weights']), 'objective is one of'), (dict(autocast='float8'), 'float8'),
    (dict(lora=dict(foo=2)), "settings of peft.LoraConfig.*foo"), (dict(trained='new', base='x'), 'would train all weights'),
    (dict(trained='new', base='x', lora=dict(r=2), adapt_steps=1), 'adapt_steps changes that')], ids=str)
def test_what_cannot_work_is_refused_before_anything_is_measured(bad, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model,events = llama(),[]
    with pytest.raises(ValueError, match=says): convert(model, TRAIN, TEST, **{**SHORT, **bad}, on_event=lambda *a, **kw: events.append(a))
    assert not events and not hasattr(model.config, 'hedgehog') and not [*tmp_path.iterdir()]

@pytest.mark.parametrize('texts', [(TRAIN[:0], TEST), (TRAIN, TEST[0]), ([1, 2], TEST), (TRAIN, TEST[:,:1])], ids=['empty','one block','a list','one token'])
def test_texts_are_blocks(texts):
    with pytest.raises(ValueError, match=r'is \(N, T\) token ids'): convert(llama(), *texts, **SHORT)

OTHER = dict(attention=dict(config='t2r'), form=dict(config=LinearizeConfig(attention_kwargs=dict(form='exp'))),
    layers=dict(config=LinearizeConfig(layers='0')),
    evals=dict(evals=3), steps=dict(distill_steps=5), lr=dict(lr=.1), lengths=dict(long_blocks=2), seed=dict(seed=1), autocast=dict(autocast='bfloat16'))

@pytest.mark.parametrize('change', OTHER.values(), ids=OTHER)
def test_a_folder_keeps_one_run(change, tmp_path):
    "What was measured of another conversion is never taken for this one's."
    go(work=tmp_path/'run')
    with pytest.raises(ValueError, match='keeps another run .*was .* is '): go(work=tmp_path/'run', **change)

def test_a_folder_keeps_one_text(tmp_path):
    go(work=tmp_path/'run')
    for train,test,which in ((TRAIN.flip(0), TEST, 'train'), (TRAIN, TEST.flip(0), 'test')):
        with pytest.raises(ValueError, match=f'keeps another run .{which} was'): convert(llama(), train, test, work=tmp_path/'run', **SHORT)

def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'precious').write_text('x')
    with pytest.raises(ValueError, match='mine exists'): go(finetune_steps=0, trained=tmp_path/'mine', base='x')
    assert (tmp_path/'mine'/'precious').read_text()=='x'

def test_a_damaged_record_names_its_file(tmp_path):
    go(work=tmp_path/'run'); (tmp_path/'run'/'measured.json').write_text('{"wall')
    with pytest.raises(ValueError, match='measured.json is no record of a conversion'): go(work=tmp_path/'run')

@pytest.mark.parametrize('name', RECIPES)
def test_each_recipe_converts(name):
    "With the attention, objective and adapters that it names, from the first row to the last."
    model,r = llama(),RECIPES[name]
    rows = convert(model, TRAIN, TEST, distill_steps=2, finetune_steps=2, recipe=name, batch_size=2)
    assert model.config.hedgehog['attention']==r.attention and model.config.hedgehog['attention_kwargs']==r.maps[r.attention]
    assert [x['stage'] for x in rows if x['metric']=='ppl']==['teacher','swapped','distilled','finetuned'] and all(math.isfinite(x['value']) for x in rows)
    assert {'weights':'kl', 'outputs':'output-error'}[r.objective] in {x['metric'] for x in rows}

def test_what_is_given_wins_over_the_recipe():
    r = get_recipe('best')
    assert r.config('hedgehog', num_maps=3).attention_kwargs==dict(num_maps=3, bias=True)
    assert r.config('elu').attention_kwargs=={} and r.config(window=16, layers='0').attention_kwargs['window']==16
    assert [r.batch_for(t, 512) for t in (1, 512*512, 2*512*512, 10**9)]==[1, 1, 2, 8] and get_recipe('paper').batch_for(1, 512)==1

def test_rates_follow_recipe_attention_and_size(monkeypatch):
    from hedgehog_nb.training import recipe
    seen = []
    monkeypatch.setattr(recipe, 'finetune', lambda m, data, steps, batch, lr, **kw: seen.append(lr) or (_ for _ in ()).throw(InterruptedError))
    def rate(size, **kw):
        model = llama(); model.num_parameters = lambda **_: int(size)
        with pytest.raises(InterruptedError): convert(model, TRAIN, TEST, finetune_steps=1, batch_size=2, **kw)
        return seen.pop()
    heads = LinearizeConfig(softmax_heads='0:0-1')
    assert [rate(1e8, recipe='best', config=c) for c in ('hedgehog','hedgehog-window',heads)]==[3e-4, 1e-4, 1e-4]
    assert [rate(7e9, recipe='best', config=c) for c in ('hedgehog','hedgehog-window')]==[2e-5, 1e-5]
    assert [rate(1e8, recipe='paper'), rate(1e8, recipe='lolcats'), rate(1e8, recipe='paper', finetune_lr=.5)]==[6e-4, 1e-4, .5]

def told(**kw):
    said = []
    model = llama()
    rows = convert(model, TRAIN, TEST, **{**SHORT, **kw}, on_event=lambda event, text=None, **_: said.append(text) if event=='verdict' else None)
    return model, rows, said

def test_a_phase_never_ends_worse_than_it_began():
    "At an absurd rate the best state is the first one, and the run says so."
    _,rows,said = told(valid=TEST, finetune_lr=1e2)
    ppl = {r['stage']:r['value'] for r in rows if r['metric']=='ppl'}
    assert ppl['finetuned']==ppl['distilled'] and 'no step was better than the start' in said[-1]

@pytest.mark.parametrize('phase', [dict(finetune_lr=1e2), dict(align_steps=4, align_lr=1.)], ids=lambda p: [*p][-1])
def test_a_phase_that_raises_the_perplexity_says_so(phase):
    _,rows,said = told(**phase)
    ppl = [r['value'] for r in rows if r['metric']=='ppl' and r['stage']!='teacher']
    rises = [f'perplexity rose from {a:.4g} to {b:.4g}' for a,b in zip(ppl, ppl[1:]) if b>a]
    assert rises and [x.split(':')[0] for x in said if 'rose' in x]==rises

def test_a_rate_that_is_searched_is_told():
    said = [x for x in told(valid=TEST, lr='auto', distill_steps=8)[2] if 'rose' not in x]
    assert len(said)==2 and said[0].startswith('lr ') and said[0].count('the best of')==1 and 'the best of' not in said[1]

def test_the_softmax_model_can_be_finetuned_first():
    _,rows,_ = told(adapt_steps=3, baseline=True)
    ppl = [(r['variant'],r['stage'],r['tokens']) for r in rows if r['metric']=='ppl']
    assert ppl==[('softmax-zero-shot','teacher',0), ('softmax','finetuned',5*4*T), ('softmax','adapted',3*4*T), ('swapped','swapped',3*4*T),
        ('hedgehog-distilled','distilled',7*4*T), ('hedgehog','finetuned',9*4*T)]

def test_finetuning_on_the_teacher_keeps_nearer_to_it():
    "With the same steps, the student's predictions end nearer to the softmax model's than with labels."
    def apart(on):
        model,_,_ = told(finetune_on=on, finetune_steps=40, finetune_lr=3e-3)
        with torch.no_grad(): p,q = (m(input_ids=TEST).logits.log_softmax(-1) for m in (llama(), model))
        return (p.exp()*(p-q)).sum(-1).mean()
    assert apart('teacher')<apart('labels')
