"Summaries of dialogues: prompts and labels, ROUGE, greedy decoding in batches, and the experiment that goes on where it was stopped."
import json, random, sys
from copy import deepcopy
from functools import lru_cache
import pytest
from helpers.commands import hedgehog

torch = pytest.importorskip('torch')
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.data.text import DataError
from hedgehog_nb.experiments import summarisation
from hedgehog_nb.experiments.summarisation import (dialogue_data, Prompt, ROUGE, rouge_scores, rouge_table, rows_by_variant, SUMMARIES,
    summaries_experiment, summary_row, SummaryTask, write_summaries)
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.results import PAPER, read_results, write_results

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

def dialogues(n, seed=0, lines=1):
    draw,names = random.Random(seed),'Tom Lily Ben Sue Max'.split()
    def row(i):
        a,b,what = *draw.sample(names, 2),draw.choice('play run swim'.split())
        said = [f'{a}: Let us {what}!\n{b}: Yes {j}.' for j in range(draw.randint(1, lines))]
        return dict(id=f'd{i}', dialogue='\n'.join(said), summary=f'{a} and {b} {what}.')
    return [row(i) for i in range(n)]

@pytest.fixture
def embedded(): return load_embedded()

@pytest.fixture
def data(): return dict(train=dialogues(24), validation=dialogues(4, 1), test=dialogues(5, 2, 3))

def test_data_of_a_folder(tmp_path):
    rows = [dict(id=7, dialogue=' A: hi\r\nB: yes ', summary='They greet. '), dict(id=8, dialogue='', summary='x'), dict(id=9, dialogue='A: no', summary=None)]
    for n in ('train','val','test'): (tmp_path/f'{n}.json').write_text(json.dumps(rows))
    (tmp_path/'README.txt').write_text('no table')
    assert dialogue_data(tmp_path)=={s:[dict(id='7', dialogue='A: hi\nB: yes', summary='They greet.')] for s in ('train','validation','test')}
    (tmp_path/'test.json').write_text(json.dumps([dict(text='a', summary='b')]))
    with pytest.raises(DataError, match="no column dialogue in its split 'test'; given text, summary"): dialogue_data(tmp_path)
    (tmp_path/'test.json').write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="no dialogue with a summary in its split 'test'"): dialogue_data(tmp_path)
    (tmp_path/'test.json').unlink()
    with pytest.raises(DataError, match="in its split 'test'; given no rows"): dialogue_data(tmp_path)

@pytest.mark.parametrize('chat', [False, True])
def test_prompts_and_labels(embedded, data, chat):
    _,tok = embedded
    tok.chat_template = CHAT if chat else None
    x,prompt = data['train'][0],Prompt(tok, 200)
    ids,cut = prompt(x['dialogue'])
    asked = f"Summarize this dialogue:\n{x['dialogue']}"
    whole = [dict(role='user', content=asked)]
    assert not cut and ids==(tok(tok.apply_chat_template(whole, tokenize=False, add_generation_prompt=True), add_special_tokens=False)['input_ids']
        if chat else tok(f'{asked}\n---\nSummary:\n')['input_ids'])
    row = summary_row(prompt, x)
    n = row['labels'].count(-100)
    assert row['input_ids'][:n]==ids and row['labels'][n:]==row['input_ids'][n:] and row['labels'][-1]==tok.eos_token_id
    assert tok.decode(row['labels'][n:-1]).strip()==x['summary'] and len(row['attention_mask'])==len(row['input_ids'])

@pytest.mark.parametrize('chat', [False, True])
def test_the_beginning_of_a_dialogue_is_cut(embedded, chat):
    _,tok = embedded
    tok.chat_template = CHAT if chat else None
    alone,long = Prompt(tok),'\n'.join(f'Tom: 🙂 We saw {i} birds.' for i in range(90))
    for room in (len(alone.ids(''))+1, 70, 120, 333):
        prompt = Prompt(tok, room)
        ids,cut = prompt(long)
        text = tok.decode(ids)
        kept = text.partition('dialogue:\n')[2].rpartition('</s>' if chat else '\n---')[0]
        assert cut and room-5<len(ids)<=room and long.endswith(kept) and text.endswith(prompt.after)
        assert ids==prompt.ids(kept)
    with pytest.raises(ValueError, match='the question alone takes'): Prompt(tok, len(alone.ids('')))
    task = SummaryTask(dict(train=dialogues(2), validation=dialogues(2), test=[dict(id='a', dialogue=long, summary='Birds.'), *dialogues(3)]), tok, 120)
    assert task.cut==1 and tok.padding_side=='left' and task.tok.padding_side=='right'

def test_loss_is_of_the_summary_alone(embedded):
    "A padded batch of dialogues of other lengths has the loss of their summaries' tokens, each row read by itself."
    model,tok = embedded
    task = SummaryTask(dict(train=dialogues(5, 3, 4), validation=dialogues(2), test=dialogues(2)), tok)
    assert len({len(r['input_ids']) for r in task.train})>2
    nll = []
    for x in task.train:
        log_p = model(torch.tensor([x['input_ids']])).logits[0].log_softmax(-1)
        first = len(task.prompt(task.data['train'][len(nll)]['dialogue'])[0])
        nll.append([-log_p[i-1,x['input_ids'][i]] for i in range(first, len(x['input_ids']))])
    flat = torch.stack([y for ys in nll for y in ys])
    with torch.no_grad(): loss = model(**task.training()['collator'](task.train)).loss
    torch.testing.assert_close(loss, flat.mean(), atol=1e-5, rtol=1e-5)

def f1(hits, n, m): return 200*hits/(n+m) if hits else 0.

def naive_rouge(x, y):
    "From the definitions: n-grams that are paired off one by one, and the longest common subsequence by recursion."
    def grams(t, n): return [tuple(t[i:i+n]) for i in range(len(t)-n+1)]
    def paired(a, b):
        b,n = [*b],0
        for g in a:
            if g in b: b.remove(g); n += 1
        return n
    @lru_cache(None)
    def common(i, j):
        if i==len(x) or j==len(y): return 0
        return 1+common(i+1, j+1) if x[i]==y[j] else max(common(i+1, j), common(i, j+1))
    return [*(f1(paired(grams(x, n), grams(y, n)), max(0, len(x)-n+1), max(0, len(y)-n+1)) for n in (1, 2)), f1(common(0, 0), len(x), len(y))]

def test_rouge_is_that_of_the_definitions():
    "Words of three letters or fewer are not stemmed."
    draw = random.Random(0)
    pairs = [[[draw.choice('we eat big red fig pie ham'.split()) for _ in range(draw.randint(0, 9))] for _ in range(2)] for _ in range(60)]
    got = rouge_scores([f"{' '.join(x).upper()}!" for x,_ in pairs], [', '.join(y) for _,y in pairs])
    want = [naive_rouge(tuple(x), tuple(y)) for x,y in pairs]
    for m,ws in zip(ROUGE, zip(*want)): assert got[m]==pytest.approx(ws)
    assert len({*got['rougeL']})>10 and got['rouge1']!=got['rougeL']
    assert rouge_scores(['meetings were moved'], ['meeting were move'])=={m:[pytest.approx(100)] for m in ROUGE} # by their stems

def test_rouge_says_what_is_missing(monkeypatch):
    with pytest.raises(ValueError, match='given 1 and 2'): rouge_scores(['a'], ['a','b'])
    for n in ('rouge_score','rouge_score.rouge_scorer'): monkeypatch.setitem(sys.modules, n, None)
    with pytest.raises(ValueError, match='pip install rouge-score'): rouge_scores(['a'], ['a'])
    with pytest.raises(ValueError, match='pip install rouge-score'): summaries_experiment('x.json', 'embedded', {})

@torch.no_grad()
def naive_greedy(model, tok, prompt, n):
    "No cache, no batch: the whole text is read again for each token."
    ids = list(prompt)
    while len(ids)<len(prompt)+n and (len(ids)==len(prompt) or ids[-1]!=tok.eos_token_id):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0,-1].argmax().item())
    return ids[len(prompt):]

@pytest.mark.parametrize('name,settings', [(None, {}), ('t2r', {}), ('hedgehog', dict(form='exp', bias=True)), ('hedgehog-window', dict(window=8, form='exp'))])
def test_summaries_are_greedy(embedded, data, tmp_path, name, settings):
    "Batches, padding and cache give the tokens of a plain loop; a stopped call goes on with the next batch."
    model,tok = embedded
    if name: linearize(model, name, **settings)
    task = SummaryTask(data, tok)
    task.tok.eos_token = tok.convert_ids_to_tokens(naive_greedy(model, task.tok, task.prompts[0], 6)[-1]) # a token that is written
    want = [naive_greedy(model, task.tok, p, 12) for p in task.prompts]
    texts,cost = write_summaries(model, task.tok, task.prompts, 12, 2)
    assert texts==[task.tok.decode(y, skip_special_tokens=True).strip() for y in want] and len({len(y) for y in want})>1
    assert cost['ended']==100*sum(task.tok.eos_token_id in y for y in want)/5>0 and cost['tokens_per_s']>0
    class Stop(Exception): pass
    told = []
    def stop(n, s):
        told.append(n)
        if len(told)==2: raise Stop
    with pytest.raises(Stop): write_summaries(model, task.tok, task.prompts, 12, 2, tmp_path/'x.json', stop)
    assert write_summaries(model, task.tok, task.prompts, 12, 2, tmp_path/'x.json', lambda n, s: told.append(n))[0]==texts and told==[2,2,1]

def test_bytes_of_a_cache(embedded):
    "Softmax keeps a key and a value of each token but the last; a state does not grow."
    model,tok = embedded
    prompts,c = [Prompt(tok)(d['dialogue'])[0] for d in (dialogues(1)[0], dialogues(9, 5, 30)[0])],model.config
    size = lambda m, p: write_summaries(m, tok, [p], 4)[1]['bytes']
    per_token = 2*4*c.num_hidden_layers*c.num_key_value_heads*(c.hidden_size//c.num_attention_heads)
    assert len(prompts[0])!=len(prompts[1]) and [size(model, p) for p in prompts]==[per_token*(len(p)+3) for p in prompts]
    linearize(model, 'hedgehog', form='exp', bias=True)
    assert len({size(model, p) for p in prompts})==1

QUICK = dict(model='embedded', steps=2, distill_steps=2, batch_size=4, lrs=(1e-2,), max_prompt=200, new_tokens=6)

def test_all_variants(data, tmp_path):
    "Adapters and maps learn, all other weights stay; rows say how it was done."
    base,models,told = load_embedded()[0].state_dict(),{},[]
    def listen(event, row=None, model=None, label=None, seed=None, lr=None, **kw):
        if event=='row': models[row['variant']] = model
        if event=='run': told.append((label, seed, lr))
    rows = summaries_experiment(tmp_path/'x.json', data=data, on_event=listen, **QUICK)
    assert [v for v,*_ in told]==[*SUMMARIES] and [r['metric'] for r in rows]==[*ROUGE,'tokens_per_s','bytes']*len(SUMMARIES)
    assert {r['experiment'] for r in rows}=={'summaries'} and all(r['dialogues']==5 and 0<=r['value'] for r in rows)
    for v,m in models.items():
        now = {k:x for k,x in m.state_dict().items() if k in base}
        changed = {k.split('.')[-2] for k,x in now.items() if not x.equal(base[k])}
        assert now.keys()==base.keys() and changed==(set() if v=='softmax-zero-shot' else {'q_proj','k_proj','v_proj','o_proj'}), v
        assert bool(linear_layers(m))==(not v.startswith('softmax'))
    last = {r['variant']:r for r in rows if r['metric']=='rouge1'}
    assert {v for v,r in last.items() if 'kl' in r}=={'t2r-hh','hedgehog','hedgehog-window'} and last['softmax-zero-shot']['tokens']==0
    per_row = sum(len(r['input_ids']) for r in SummaryTask(data, load_embedded()[1], 200).train)/24
    assert (last['t2r']['tokens'], last['hedgehog']['tokens'])==(round(8*per_row), round(16*per_row))
    assert all(list(r['written'])==[x['id'] for x in data['test']] for v,r in last.items() if v!='softmax-zero-shot')
    scores = rouge_scores([*last['softmax']['written'].values()], [x['summary'] for x in data['test']])['rouge1']
    assert last['softmax']['value']==pytest.approx(sum(scores)/5, abs=1e-3)
    assert last['softmax']['stderr']==pytest.approx(torch.tensor(scores).std().item()/5**.5, abs=1e-3)

def test_rates_and_seeds(data, tmp_path):
    told = []
    def listen(event, label=None, seed=None, lr=None, **_): told.extend([(label, seed, lr)] if event=='run' else ())
    kw = {**QUICK, 'data':data, 'lrs':(1e-7, 2e-2, 1e40)} # the last one diverges
    rows = summaries_experiment(tmp_path/'x.json', variants=['softmax-zero-shot','t2r'], seeds=(0, 1), on_event=listen, **kw)
    assert told==[('softmax-zero-shot',0,None), ('t2r',0,1e-7), ('t2r',0,2e-2), ('t2r',0,1e40), ('t2r',1,2e-2)]
    tried = next(r['tried'] for r in rows if r['variant']=='t2r')
    assert tried['0.02']<tried['1e-07'] and {r['lr'] for r in rows if r['variant']=='t2r'}=={2e-2} and {r['seed'] for r in rows}=={0, 1}

def test_stopped_run_goes_on(data, tmp_path):
    "Killed in each phase, the rows are those of a run that was not; what was done is not done again."
    class Stop(Exception): pass
    def at(where):
        def stop(event, phase=None, **_):
            if (event,phase)==('progress',where): raise Stop
        return stop
    kw = dict(data=data, variants=['hedgehog'], save_steps=1, recipe='best', **QUICK)
    values = lambda rows: [(r['metric'], r['value'], r['tokens'], r['valid_loss'], r['kl'], r.get('written')) for r in rows if r['metric']!='tokens_per_s']
    whole = summaries_experiment(tmp_path/'a.json', **kw)
    for where in ('distill','align','finetune','evaluate'):
        with pytest.raises(Stop): summaries_experiment(tmp_path/'b.json', on_event=at(where), **kw)
    told = []
    assert values(summaries_experiment(tmp_path/'b.json', on_event=lambda event, **_: told.append(event), **kw))==values(whole) and told==['run','row']
    def never(event, **_): raise AssertionError(event)
    assert values(summaries_experiment(tmp_path/'b.json', on_event=never, **kw))==values(whole)
    with pytest.raises(ValueError, match='runs of other settings .steps 2 there, 3 here'): summaries_experiment(tmp_path/'b.json', **{**kw, 'steps':3})

def test_adapted_first(data, tmp_path):
    "Softmax learns the task once for a seed, and all rows start from there: the control, and the maps, which are distilled from what it has become."
    told = []
    def listen(event, phase=None, done=0, total=0, **_): told.extend([phase] if event=='progress' and done==total else ())
    kw = {**QUICK, 'data':data, 'steps':3, 'adapt_steps':6}
    def run(name, variants=('softmax','hedgehog'), **more): # {variant: [ROUGE-1, …]}
        rows = summaries_experiment(tmp_path/f'{name}.json', variants=variants, **{**kw, **more})
        return {v:[r for r in rows if r['variant']==v and r['metric'] in ROUGE] for v in variants}
    rows,plain = run('x', on_event=listen),run('y', adapt_steps=0)
    assert told==['adapt','finetune','evaluate','distill','finetune','evaluate']
    for v,(r,*_) in rows.items():
        was = plain[v][0]
        assert r['adapt_steps']==6 and 'adapt_steps' not in was and r['valid_loss']<was['valid_loss']-.1 and r['seconds']>was['seconds'], (v, r, was)
    per_row = sum(len(r['input_ids']) for r in SummaryTask(data, load_embedded()[1], 200).train)/24
    assert abs(rows['softmax'][0]['tokens']-plain['softmax'][0]['tokens']-24*per_row)<=1 # six steps of four
    alone = run('z', ['hedgehog'])['hedgehog'] # without a row before it
    assert [r['value'] for r in alone]==[r['value'] for r in rows['hedgehog']]
    assert [*rows_by_variant(read_results(tmp_path), 'summaries')][-4:-2]==['hedgehog','hedgehog, adapted first']

def test_summaries_of_another_rate_are_not_taken_over(data, tmp_path):
    "Stopped while it writes, another rate writes its own."
    class Stop(Exception): pass
    def stop(event, phase=None, **_):
        if phase=='evaluate': raise Stop
    kw = {**QUICK, 'data':data, 'variants':['softmax'], 'steps':12, 'new_tokens':8}
    with pytest.raises(Stop): summaries_experiment(tmp_path/'x.json', on_event=stop, **{**kw, 'lrs':(1e-7,)})
    rows,fresh = (summaries_experiment(tmp_path/f, **{**kw, 'lrs':(3e-2,)}) for f in ('x.json','y.json'))
    old = summaries_experiment(tmp_path/'z.json', **{**kw, 'lrs':(1e-7,)})
    assert rows[0]['written']==fresh[0]['written']!=old[0]['written']

def test_files_of_other_experiments_are_refused(data, tmp_path):
    rows = [dict(experiment='recall', model='m', data='d', variant='softmax', metric='accuracy', value=1., tokens=1, seed=0, stage='trained')]
    write_results(tmp_path/'x.json', rows, 'hedgehog')
    before = (tmp_path/'x.json').read_text()
    with pytest.raises(ValueError, match='x.json holds runs of recall, not of summaries'):
        summaries_experiment(tmp_path/'x.json', data=data, variants=['softmax'], **QUICK)
    assert (tmp_path/'x.json').read_text()==before

def test_a_summary_ends(embedded):
    "An end of text that a tokenizer puts behind a prompt is left out; without one there is no summary."
    from tokenizers.processors import TemplateProcessing
    tok = deepcopy(embedded[1])
    tok.chat_template = None
    plain = Prompt(tok)('Tom: Hi')[0]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='$A </s>', special_tokens=[('</s>', tok.eos_token_id)])
    assert tok('x')['input_ids'][-1]==tok.eos_token_id and Prompt(tok)('Tom: Hi')[0][-5:]==plain[-5:]
    tok.eos_token = None
    with pytest.raises(ValueError, match='no token for the end of a text'): Prompt(tok)

def test_a_text_that_repeats_its_dialogue_is_not_kept(data, tmp_path, monkeypatch):
    data['test'] = [dict(id=str(i), dialogue='Tom: one two three four five six seven eight nine', summary='Tom counts.') for i in range(3)]
    texts = ['He said one two three four five six seven, eight', 'then: two three four five six seven eight nine', 'Tom counts.']
    monkeypatch.setattr(summarisation, 'write_summaries', lambda *a: (texts, dict(tokens_per_s=1., bytes=1., ended=100.)))
    rows = summaries_experiment(tmp_path/'x.json', data=data, variants=['softmax-zero-shot','t2r'], **QUICK)
    assert 'written' not in rows[0] and rows[5]['written']=={'0':texts[0], '1':'(repeats the dialogue)', '2':texts[2]}
    assert rows[0]['value']==pytest.approx(sum(rouge_scores(texts, ['Tom counts.']*3)['rouge1'])/3, abs=1e-3) # and is judged all the same

def test_recipe_of_the_maps(data, tmp_path):
    "What a recipe changes: maps, rows a step, alignment of a model without a window."
    def run(recipe):
        models,phases = {},{}
        def listen(event, row=None, model=None, phase=None, done=None, label=None, **_):
            if event=='run': phases[label] = {}
            if event=='progress': phases[[*phases][-1]][phase] = done
            if event=='row': models[row['variant']] = model
        names = ['softmax','hedgehog','hedgehog-window']
        rows = summaries_experiment(tmp_path/f'{recipe}.json', data=data, variants=names, recipe=recipe, on_event=listen, **QUICK)
        return models, phases, {r['variant']:r for r in rows if r['metric']=='rouge1'}
    for recipe,features,steps,align in (('paper', (2,2), 2, {}), ('best', (8,4), 8, {'align':8})):
        models,phases,rows = run(recipe)
        maps = [next(iter(linear_layers(models[v]).values())).feature_map for v in ('hedgehog','hedgehog-window')]
        assert tuple(m.feature_dim//m.head_dim for m in maps)==features
        after = {'finetune':2, 'evaluate':5}
        assert phases['hedgehog']=={'distill':steps, **align, **after} and phases['hedgehog-window']=={'distill':steps, **after}
        assert [r.get('recipe') for r in rows.values()]==[None, recipe, recipe]
        seen = {v:round(r['tokens']/rows['softmax']['tokens']) for v,r in rows.items()}
        assert seen=={'softmax':1, 'hedgehog':2+len(align), 'hedgehog-window':2}

def test_what_does_not_fit_is_said_first(data, tmp_path):
    for more,says in ((dict(variants=['linear']), "no variant is called 'linear'; there are softmax-zero-shot"),
        (dict(lora=dict(r=4, target_modules=['c_attn'])), 'modules called c_attn'), (dict(max_prompt=5), 'the question alone takes'),
        (dict(lrs=()), 'one learning rate or more'), (dict(test_rows=0), 'test_rows is above 0'), (dict(seeds=()), 'seeds is above 0'),
        (dict(autocast='half a bit'), 'is unknown'), (dict(recipe='worst'), "recipe is one of paper, lolcats, best")):
        with pytest.raises(ValueError, match=says): summaries_experiment(tmp_path/'x.json', **{**QUICK, 'data':data, **more})
    assert not [*tmp_path.iterdir()]

def test_table_beside_the_paper():
    rows = [dict(experiment='samsum', model='m', data='SAMSum', variant=v, metric=m, value=x, tokens=1, seed=0)
        for v,x in (('softmax',40.), ('hedgehog',30.)) for m in ROUGE]
    cells = {r[0]:r[1:] for r in rouge_table(rows).rows}
    p = PAPER['samsum']['metrics']['rouge1']
    assert cells['hedgehog'][:2]==['30.0 / 30.0 / 30.0','75'] and cells['hedgehog'][3]==f"{100*p['hedgehog']/p['softmax']:.0f}"
    more = [{**rows[-1], 'metric':m, 'value':36., 'recipe':c} for c in ('best',) for m in ROUGE]
    assert {r[0]:r[1:3] for r in rouge_table(rows+more).rows}=={v:c[:2] for v,c in cells.items()} | {'hedgehog, best':['36.0 / 36.0 / 36.0','90']}
    assert cells['t2r'][:2]==['not run yet','–'] and cells['window'][2:]==['–','–'] and [*cells]==[*SUMMARIES]

def test_summaries_command(tmp_path):
    d = tmp_path/'samsum'
    d.mkdir()
    for s,n in (('train',12), ('val',3), ('test',5)):
        (d/f'{s}.json').write_text(json.dumps([dict(id=str(i), dialogue='\n'.join(['Tom: Let us run!']*(i+20)), summary='Tom runs.') for i in range(n)]))
    run = lambda *more, **kw: hedgehog('experiment', 'summaries', 'embedded', '--data', d, '--out', tmp_path/'x.json', *more, **kw)
    for more,says in ((('--variant','linear'), 'no variant is called'), (('--data',tmp_path/'none.json'), 'no such file'), (('--max-prompt','3'), 'takes')):
        r = run(*more, code=1)
        assert says in ' '.join(r.stderr.split()) and 'goes on from there' not in r.stderr, r.stderr
    quick = '--steps', 1, '--distill-steps', 1, '--batch-size', 2, '--lr', 1e-3, '--test-rows', 4, '--max-prompt', 200, '--new-tokens', 4
    r = run('--variant', 'softmax-zero-shot', '--variant', 'hedgehog', *quick)
    assert 'hedgehog, seed 0, rate 0.001' in r.stderr and 'of 4 dialogues lost their beginning' in r.stderr, r.stderr
    got = json.loads((tmp_path/'x.json').read_text())
    assert {r['variant'] for r in got['rows']}=={'softmax-zero-shot','hedgehog'} and {r['dialogues'] for r in got['rows']}=={4}
    assert got['command'].startswith('hedgehog experiment summaries embedded')
    assert 'nothing was left to run' in run('--variant', 'hedgehog', *quick).stderr
    for targets,code in (('v_proj,o_proj', 0), ('c_attn', 1)):
        r = run('--variant', 'softmax', '--lora-targets', targets, *quick[:-2], '--new-tokens', 4, '--out', tmp_path/f'{targets}.json', code=code)
        assert code==0 or 'adapters go to modules called c_attn' in ' '.join(r.stderr.split())
    assert json.loads((tmp_path/'v_proj,o_proj.json').read_text())['rows'][0]['settings']['lora']['target_modules']==['v_proj','o_proj']
