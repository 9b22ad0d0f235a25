"The experiments on tasks and on text: GLUE's files, sweeps that go on where they were stopped, and the commands, on models small enough for seconds."
import json, math
import numpy, pytest
from helpers.commands import hedgehog

torch = pytest.importorskip('torch')
from io import BytesIO
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast
from hedgehog_nb.data.labelled import cut_splits, load_labelled, labelled
from hedgehog_nb.data.text import DataError
from hedgehog_nb.experiments import tasks
from hedgehog_nb.experiments.glue import glue_data, glue_experiment
from hedgehog_nb.experiments.language_model import SCRATCH, scratch_experiment, ScratchSize
from hedgehog_nb.experiments.vision import image_data, plot_looks, shift_and_mirror
from hedgehog_nb.results import read_results

WORDS = 'the a cat dog bird sat ran flew on under mat tree house is was'.split()

@pytest.fixture(scope='module')
def bert(tmp_path_factory):
    "A folder with a BERT of one layer, without a head."
    d = tmp_path_factory.mktemp('bert')
    (d/'vocab.txt').write_text('\n'.join(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*WORDS]))
    tok = BertTokenizerFast(str(d/'vocab.txt'))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=.3)).save_pretrained(d)
    tok.save_pretrained(d)
    return d

@pytest.fixture(scope='module')
def glue(tmp_path_factory):
    "CoLA, SST-2, MRPC and STS-B, as their authors write them."
    d,g = tmp_path_factory.mktemp('glue'),numpy.random.default_rng(0)
    def text(): return ' '.join(g.choice(WORDS, g.integers(9, 14)))
    def write(name, lines):
        (d/name).parent.mkdir(exist_ok=True)
        (d/name).write_text('\n'.join(lines)+'\n', encoding='utf-8-sig' if 'MRPC' in name else 'utf-8')
    for n,k in (('in_domain_train',60), ('in_domain_dev',20), ('out_of_domain_dev',10)): write(f'CoLA/{n}.tsv', [f'x\t{i%2}\t\t{text()}' for i in range(k)])
    for n,k in (('train',60), ('dev',20), ('test-labeled',12)): write(f'SST-2/{n}.tsv', ['sentence\tlabel', *(f'{text()} \t{i%2}' for i in range(k))])
    for n,k in (('train',60), ('test',20)):
        write(f'MRPC/msr_paraphrase_{n}.txt', ['Quality\t#1 ID\t#2 ID\t#1 String\t#2 String', *(f'{i%2}\t1\t2\t{text()}\t"{text()}' for i in range(k))])
    for n,k in (('train',60), ('dev',20), ('test',20)): write(f'STS-B/sts-{n}.csv', [f'a\tb\tc\t{i}\t{i%6}.0\t{text()}\t{text()}\textra' for i in range(k)])
    return d

@pytest.mark.parametrize('task,kind,sizes,inputs', [('cola','classes',(54,6,30),('sentence',)), ('sst2','classes',(54,6,32),('sentence',)),
    ('mrpc','classes',(54,6,20),('sentence1','sentence2')), ('stsb','numbers',(60,20,20),('sentence1','sentence2'))])
def test_files_of_the_authors(glue, task, kind, sizes, inputs):
    d = glue_data(task, glue)
    assert (d.kind, d.inputs, (len(d.train), len(d.valid), len(d.test)))==(kind, inputs, sizes)
    row = d.test[1]
    assert d.target(row)==1 and all(2<len(row[c].split())<15 for c in inputs)
    if task=='mrpc': assert row['sentence2'].startswith('"')

def test_tasks_that_have_no_files(glue):
    with pytest.raises(DataError, match='only the files of CoLA, SST-2, MRPC and STS-B'): glue_data('rte', glue)
    with pytest.raises(DataError, match='name the folder that holds CoLA/'): glue_data('cola', glue/'nowhere')

def test_command_goes_on(bert, glue, tmp_path):
    "Two variants, then a third and another seed: what the file holds is not run again, and the softmax model is not trained again."
    out,quick = tmp_path/'cola.json',('--rows', 40, '--epochs', 1, '--steps', 2, '--distill-steps', 2, '--base-lr', 1e-3)
    run = lambda *more, **kw: hedgehog('experiment', 'glue', 'cola', bert, '--data', glue, '--out', out, *quick, *more, **kw)
    first = run('--variant', 'softmax', '--variant', 'hedgehog')
    assert all(s in first.stderr.replace('\n', '') for s in ('hedgehog, seed 0, rate 2e-05', 'hedgehog, seed 0, rate 0.0001', f'numbers in {out}'))
    was = json.loads(out.read_text())
    assert was['command'].startswith('hedgehog experiment glue cola') and {r['stage'] for r in was['rows']}=={'teacher','swapped','distill','finetune','step'}
    assert not any('commit' in r for r in was['rows'])
    out.write_text(out.read_text().replace(was['commit'], 'earlier'))
    second = run('--variant', 'softmax', '--variant', 'hedgehog', '--variant', 'elu', '--seeds', 2)
    now = json.loads(out.read_text())
    kept = [r for r in was['rows'] if r['metric']!='ms'] # times are measured side by side, so again
    assert [{k:r[k] for k in old} for r,old in zip(now['rows'], kept)]==kept and 'hedgehog, seed 0' not in second.stderr and 'hedgehog, seed 1' in second.stderr
    assert [r.get('commit') for r in now['rows']].count('earlier')==len(kept) and len(now['command'].splitlines())==2 # each row has its own commit
    rate = next(r['lr'] for r in was['rows'] if r['variant']=='hedgehog')
    assert {r['lr'] for r in now['rows'] if r['variant']=='hedgehog' and r['seed']==1}=={rate} # chosen on the first seed
    assert second.stderr.count('seed 1')==3 and {r['variant'] for r in now['rows'] if r['metric']=='ms'}=={'softmax','hedgehog','elu'}
    assert sorted(p.name for p in (tmp_path/'cola.work').iterdir())==['base','running.lock','settings.json']
    rows = read_results(tmp_path)
    assert tasks.finished(rows, 'cola', 'mcc').keys()=={'softmax','hedgehog','elu'}
    assert all(0<=x for by in tasks.recovery(rows, 'cola', 'mcc').values() for x in by.values())

def test_heads_that_stay_softmax(bert, glue, tmp_path):
    "They are those of the largest KL, the same for all variants and seeds, and are not looked for again."
    kw = dict(model=bert, folder=glue, epochs=1, steps=2, distill_steps=5, base_lrs=(1e-3,), lrs=(1e-4,))
    told = []
    def listen(event, label=None, **_): told.append(label)
    glue_experiment(tmp_path/'x.json', 'stsb', variants=['softmax','hedgehog-heads'], on_event=listen, **kw)
    class Stop(Exception): pass
    def stop(event, label=None, **_):
        told.append(label)
        if label=='hedgehog-heads': raise Stop
    with pytest.raises(Stop): glue_experiment(tmp_path/'y.json', 'stsb', variants=['hedgehog-heads'], on_event=stop, **kw)
    glue_experiment(tmp_path/'y.json', 'stsb', variants=['hedgehog-heads'], on_event=listen, **kw)
    assert told.count('the heads that stay softmax')==2 # once a file, also where it was stopped right after
    rows = glue_experiment(tmp_path/'x.json', 'stsb', variants=['softmax','hedgehog-heads','elu-heads'], seeds=(0, 1), on_event=listen, **kw)
    assert told.count('the heads that stay softmax')==2
    found, = (r for r in rows if 'by_head' in r)
    (layer,head,kl),(_,_,less) = found['by_head'] # a layer of two heads, of which one can stay
    assert kl>less>0 and {r['softmax_heads'] for r in rows if 'heads' in r['variant'] and r['metric']!='ms'}=={f'{layer}:{head}'}
    shown = found['shown']
    assert shown['tokens'][0]=='[CLS]' and shown['tokens'].count('[SEP]')==2
    for w in (torch.tensor(shown[k]) for k in ('softmax','hedgehog')):
        assert w.shape==(len(shown['tokens']),)*2 and (w.sum(1)-1).abs().max()<.02
    assert {r['variant'] for r in rows if r['metric']=='ms'}=={'softmax','hedgehog-heads','elu-heads'}

def test_a_model_of_one_head_keeps_none(bert, glue, tmp_path):
    cfg = BertConfig.from_pretrained(bert, num_attention_heads=1)
    BertModel(cfg).save_pretrained(tmp_path/'one')
    BertTokenizerFast.from_pretrained(bert).save_pretrained(tmp_path/'one')
    with pytest.raises(ValueError, match='hedgehog-heads keeps heads beside linear ones, and the model has one head: leave it out'):
        glue_experiment(tmp_path/'x.json', 'stsb', model=tmp_path/'one', folder=glue, variants=['elu','hedgehog-heads'], epochs=1, steps=2, distill_steps=5)
    assert not (tmp_path/'x.json').exists()

def test_stopped_run_goes_on(bert, glue, tmp_path):
    "A sweep that was stopped in the middle of finetuning ends with the numbers of one that was not."
    class Stop(Exception): pass
    def stop(event, phase=None, done=0, **kw):
        if (event,phase,done)==('progress','finetune',3) and on: raise Stop
    kw = dict(model=bert, folder=glue, variants=['hedgehog'], epochs=.5, steps=4, distill_steps=4, base_lrs=(1e-3,), lrs=(1e-4,), on_event=stop)
    values = lambda rows: [(r['variant'], r['metric'], r['value']) for r in rows if r['metric']!='ms']
    on = False
    whole = glue_experiment(tmp_path/'a.json', 'stsb', **kw)
    on = True
    with pytest.raises(Stop): glue_experiment(tmp_path/'b.json', 'stsb', **kw)
    with pytest.raises(Stop): glue_experiment(tmp_path/'b.json', 'stsb', **kw) # the base is done now, the run is stopped again
    on = False
    assert values(glue_experiment(tmp_path/'b.json', 'stsb', **kw))==values(whole)

def test_another_model_is_refused(bert, glue, tmp_path):
    "Also where it has the same name, and works in another folder."
    other = tmp_path/'other'/bert.name
    BertModel.from_pretrained(bert).save_pretrained(other)
    BertTokenizerFast.from_pretrained(bert).save_pretrained(other)
    kw = dict(folder=glue, variants=['softmax'], epochs=.5, steps=1, base_lrs=(1e-3,), lrs=(1e-4,))
    path = tmp_path/'x.json'
    glue_experiment(path, 'stsb', bert, **kw)
    glue_experiment(path, 'stsb', other, **kw) # a copy
    changed = BertModel.from_pretrained(bert)
    changed.embeddings.word_embeddings.weight.data[7] += 1
    changed.save_pretrained(other)
    for work in (None, tmp_path/'elsewhere'):
        with pytest.raises(ValueError, match='holds runs of other settings .weights'): glue_experiment(path, 'stsb', other, work=work, **kw)
    path.unlink()
    with pytest.raises(ValueError, match='keeps another run .weights'): glue_experiment(path, 'stsb', other, **kw)

def test_one_process_writes_a_file(tmp_path):
    with tasks.only_command(tmp_path/'x.json', tmp_path/'a'):
        for path,work in (('x.json','b'), ('y.json','a')):
            with pytest.raises(ValueError, match='another command writes'):
                with tasks.only_command(tmp_path/path, tmp_path/work): pass
        with tasks.only_command(tmp_path/'y.json', tmp_path/'b'): pass

def test_folder_for_unfinished_runs(tmp_path):
    "It stays as long as something is in it."
    work = tmp_path/'work'
    def run(name):
        with tasks.only_command(tmp_path/'x.json', work):
            tasks.open_work(work, dict(lr=1))
            if name: (work/name).write_text('half a run')
    run('maps')
    assert sorted(p.name for p in work.iterdir())==['maps','running.lock','settings.json']
    (work/'maps').unlink()
    run(None)
    assert not [*tmp_path.iterdir()]

def test_rates_that_diverge(bert, glue, tmp_path):
    "They are left out, of the softmax model's and of a map's; where none is left, another may be tried."
    run = lambda *more, **kw: hedgehog('experiment', 'glue', 'stsb', bert, '--data', glue, '--out', tmp_path/'x.json', '--epochs', 1, '--steps', 3,
        '--variant', 'elu', *more, **kw)
    assert 'the loss is nan' in run('--base-lr', 1e30, '--lr', 1e-4, code=1).stderr
    r = run('--base-lr', 1e30, '--base-lr', 1e-3, '--lr', 1e30, '--lr', 1e-4)
    assert r.stderr.count('rate 1e+30 is left out: ')==2 and {row['lr'] for row in read_results(tmp_path) if 'lr' in row}=={1e-4}
    assert sorted(p.name for p in (tmp_path/'x.work').iterdir())==['base','running.lock','settings.json']
    for rate in (-1, 'nan', 0): assert 'a learning rate is a number above 0' in run('--lr', rate, code=1).stderr

def test_a_damaged_file_is_named(bert, glue, tmp_path):
    for text in ('', '[]', '{}', '{"rows": [', '{"command": "", "commit": "", "date": "", "device": "", "rows": []}'):
        (tmp_path/'x.json').write_text(text)
        r = hedgehog('experiment', 'glue', 'stsb', bert, '--data', glue, '--out', tmp_path/'x.json', code=1)
        assert 'x.json is no file of results' in r.stderr.replace('\n', '') and 'unexpected' not in r.stderr, (text, r.stderr)

def test_wrong_names(bert, glue, tmp_path):
    for args,says in ((('wnli', bert), 'the task is one of cola, sst2'), (('cola', bert, '--variant', 'linear'), 'no variant is called'),
        (('cola', tmp_path/'none'), 'no such folder'), (('cola', bert, '--data', tmp_path), 'name the folder that holds CoLA/')):
        r = hedgehog('experiment', 'glue', *args, *(() if '--data' in args else ('--data', glue)), '--out', tmp_path/'x.json', code=1)
        assert says in ' '.join(r.stderr.split()) and 'Traceback' not in r.stderr and not (tmp_path/'x.json').exists(), (args, r.stderr)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "CIFAR-10's two files, of a few images."
    d,g = tmp_path_factory.mktemp('cifar10'),numpy.random.default_rng(0)
    for split,n in (('train',60), ('test',40)):
        parts = []
        for i in range(n):
            Image.fromarray(g.integers(0, 255, (32,32,3), dtype=numpy.uint8)).save(b := BytesIO(), 'JPEG')
            parts.append(b.getvalue())
        numpy.savez(d/f'{split}_jpeg.npz', jpeg=numpy.frombuffer(b''.join(parts), numpy.uint8), labels=numpy.arange(n)%10,
            offsets=numpy.cumsum([0, *map(len, parts)]))
    return d

def test_images(pictures):
    d = image_data(pictures)
    assert (d.kind, len(d.names), len(d.train), len(d.valid), len(d.test))==('images', 10, 54, 6, 40)
    assert d.test[3]['image'].size==(32,32) and d.target(d.test[3])==d.names.index('cat')

def test_shifts_are_of_four_pixels_at_most():
    x = torch.zeros(1, 32, 32); x[0,16,16] = 1
    torch.manual_seed(0)
    at = {tuple(y[0].nonzero()[0].tolist()) for y in (shift_and_mirror(x) for _ in range(500))}
    assert min(a for a,_ in at)==12 and max(a for a,_ in at)==20 and {b for _,b in at}<={*range(11, 21)} and len(at)>80

def test_vision_command(pictures, tmp_path):
    out = tmp_path/'vit.json'
    hedgehog('experiment', 'vision', '--data', pictures, '--out', out, '--rows', 40, '--epochs', 1, '--steps', 1, '--batch-size', 20,
        '--variant', 'softmax', '--variant', 'hedgehog', '--lr', 1e-4)
    rows = read_results(tmp_path)
    assert {r['variant'] for r in rows}=={'softmax-zero-shot','softmax','hedgehog-swapped','hedgehog-distilled','hedgehog'}
    assert {r['metric'] for r in rows}=={'accuracy','agreement','correlation','entropy-gap','rank-correlation','ms'}
    seen, = (r['looks'] for r in rows if 'looks' in r)
    assert len(seen['images'])==4 and all(numpy.array(seen[k]).shape==(4,8,8) and 0<numpy.array(seen[k]).sum()<4 for k in ('softmax','hedgehog'))
    assert len(plot_looks(seen).axes)==12

def test_from_scratch(tmp_path):
    "Every attention learns, and seeds differ; a rate is chosen on the first of them, by validation text."
    kw = dict(data='embedded', size=ScratchSize(1, 32, 2, 96, 4, 6000, 1e-2, 'bpe:300'), evals=2)
    rows = scratch_experiment(tmp_path/'x.json', **kw)
    last = {r['variant']:r['value'] for r in rows if (r['metric'],r['stage'])==('ppl','trained')}
    assert last.keys()==SCRATCH.keys() and all(60<x<80 for x in last.values()) and len({*last.values()})==len(last)
    told = []
    def listen(event, label=None, seed=None, lr=None, **_): told.extend([(label, seed, lr)] if event=='run' else ())
    two = scratch_experiment(tmp_path/'y.json', variants=['elu'], seeds=(0, 1), lrs=(1e-2, 1e-4), on_event=listen, **kw)
    assert told==[('elu',0,1e-2), ('elu',0,1e-4), ('elu',1,1e-2)]
    assert {r['value'] for r in two if r['seed']==0}=={r['value'] for r in rows if r['variant']=='elu'} and {r['lr'] for r in two}=={1e-2}

def test_scratch_map_rates(tmp_path):
    "The rate of the maps is chosen by validation text on the first seed, where there are maps; it changes nothing else."
    kw = dict(data='embedded', size=ScratchSize(1, 32, 2, 96, 4, 20_000, 1e-2, 'bpe:300'), evals=2, map_lrs=(1e-6, .3))
    rows = scratch_experiment(tmp_path/'x.json', variants=['hedgehog','elu'], seeds=(0, 1), **kw)
    hedgehog,elu = ([r for r in rows if r['variant']==v] for v in ('hedgehog','elu'))
    tried, = {tuple(r['tried_maps'].items()) for r in hedgehog if r['seed']==0}
    best = min(tried, key=lambda x: x[1])
    assert [k for k,_ in tried]==['1e-06','0.3'] and tried[0][1]!=tried[1][1] and {f"{r['map_lr']:g}" for r in hedgehog}=={best[0]}
    assert {tuple(r['tried_maps']) for r in hedgehog if r['seed']==1}=={(best[0],)} and not any('map_lr' in r for r in elu)
    alone = scratch_experiment(tmp_path/'y.json', variants=['hedgehog'], **{**kw, 'map_lrs':(float(best[0]),)})
    values = lambda rows: [(r['tokens'], r['metric'], r['value']) for r in rows if r['seed']==0]
    assert values(alone)==values(hedgehog)
    with pytest.raises(ValueError, match='a number above 0; given -1'): scratch_experiment(tmp_path/'z.json', **{**kw, 'map_lrs':(-1,)})
    with pytest.raises(ValueError, match='batch_size is above 0'):
        scratch_experiment(tmp_path/'z.json', **{**kw, 'size':ScratchSize(1, 32, 2, 96, 0, 20_000, 1e-2, 'bpe:300')})

@pytest.mark.parametrize('name', ['glue','vision','scratch','summaries','lra'])
def test_batches_in_pieces(name, bert, glue, pictures, tmp_path, rows_at_once):
    "--grad-accum computes no more rows at once than asked, in every phase; where no dropout draws anew, results are the same."
    text = tmp_path/'text'
    text.mkdir()
    for s in ('train','validation','test'):
        (text/f'{s}.jsonl').write_text(''.join(json.dumps(dict(dialogue=f'Tom: Let us {w}.', summary=f'Tom {w}s.'))+'\n' for w in WORDS))
    few = ('--steps', 2, '--variant', 'hedgehog', '--lr', 1e-3)
    args,rows = dict(glue=(('cola', bert, '--data', glue, '--epochs', .5, '--base-lr', 1e-3, '--distill-steps', 2, *few), 32),
        vision=(('--data', pictures, '--rows', 20, '--epochs', 1, '--batch-size', 8, *few), 8),
        scratch=(('--data', 'embedded', '--tokens', 2000, '--batch-size', 4, '--tokenizer', 'bpe:300', *few[2:]), 4),
        summaries=(('embedded', '--data', text, '--distill-steps', 2, '--batch-size', 8, '--new-tokens', 4, *few), 8),
        lra=(('listops', '--seq-len', 24, '--train', 40, '--held-out', 10, '--batch-size', 8, *few), 8))[name]
    def run(n):
        rows_at_once.clear()
        hedgehog('experiment', name, *args, '--grad-accum', n, '--device', 'cpu', '--out', tmp_path/f'{n}.json')
        return [r['value'] for r in json.loads((tmp_path/f'{n}.json').read_text())['rows'] if r['metric'] in ('ppl','rouge1')],[*rows_at_once]
    (whole,one),(parts,four) = run(1),run(4)
    assert max(one)==rows and max(four)==rows//4 and len(four)>3*len(one) and (name not in ('scratch','summaries') or parts==pytest.approx(whole, rel=1e-4))

def test_scratch_knows_its_text(tmp_path):
    "The same text under another name of its folder goes on; another text is refused."
    def put(folder, words):
        folder.mkdir(exist_ok=True)
        for s,n in (('train',4000), ('validation',600), ('test',600)): (folder/f'{s}.txt').write_text(' '.join(words[i*i%len(words)] for i in range(n)))
    kw = dict(size=ScratchSize(1, 32, 2, 32, 4, 500, 1e-2, 'bpe:300'), evals=1)
    put(tmp_path/'text', ['a cat sat','on','the red mat','today'])
    scratch_experiment(tmp_path/'x.json', str(tmp_path/'text'), ['softmax'], **kw)
    assert len(scratch_experiment(tmp_path/'x.json', f"{tmp_path/'text'}/", ['softmax','elu'], **kw))>2
    put(tmp_path/'text', ['one dog ran','up','the green hill'])
    with pytest.raises(ValueError, match='runs of other settings .text '): scratch_experiment(tmp_path/'x.json', str(tmp_path/'text'), ['taylor'], **kw)

def test_scratch_command(tmp_path):
    run = lambda *more, **kw: hedgehog('experiment', 'scratch', '--data', 'embedded', '--out', tmp_path/'x.json', *more, **kw)
    for more,says in ((('--variant','linear'), 'no variant is called'), (('--size','tpu'), 'one of cpu, gpu'), (('--tokenizer','bpe:12'), '300 or more'),
        (('--lr',-1,'--tokenizer','bpe:300'), 'a number above 0; given -1'),
        (('--data',tmp_path/'none.txt'), 'no such file')):
        r = run(*more, code=1)
        assert says in ' '.join(r.stderr.split()) and 'goes on from there' not in r.stderr, r.stderr
    r = run('--variant', 'hedgehog', '--tokens', 2000, '--batch-size', 2, '--tokenizer', 'bpe:300')
    assert 'hedgehog, seed 0, rate 0.001' in r.stderr and {r['variant'] for r in read_results(tmp_path)}=={'hedgehog'}
    r = run('--variant', 'elu', '--tokens', 3000, '--batch-size', 2, '--tokenizer', 'bpe:300', code=1)
    assert 'runs of other settings (tokens 2000 there, 3000 here)' in ' '.join(r.stderr.split())

def test_vision_refuses_early(pictures, tmp_path):
    r = hedgehog('experiment', 'vision', '--data', pictures, '--out', tmp_path/'x.json', '--variant', 'cosformer', code=1)
    assert 'cosformer' in r.stderr and 'images' in r.stderr and 'steps' not in r.stderr and not (tmp_path/'x.work').exists()
    (pictures/'x').mkdir(); (pictures/'x'/'train_jpeg.npz').write_bytes(b'x'*99)
    with pytest.raises(DataError, match='train_jpeg.npz is no file of jpeg bytes'): image_data(pictures/'x')

def test_labelled_columns(tmp_path):
    (tmp_path/'x.tsv').write_text('id\tquestion\tanswer\tlabel\n'+''.join(f'{i}\tq{i}\ta{i}\t{"yes" if i%3 else "no"}\n' for i in range(60)))
    d = load_labelled(tmp_path/'x.tsv')
    assert d.inputs==('question','answer') and d.names==['no','yes'] and len(d.train)+len(d.valid)+len(d.test)==60
    for kw,says in ((dict(label='class'), "given 'class' for the labels"), (dict(inputs=['text']), 'given text to read')):
        with pytest.raises(DataError, match=says): load_labelled(tmp_path/'x.tsv', **kw)
    with pytest.raises(DataError, match='one or two'): load_labelled(tmp_path/'x.tsv', inputs=['id','question','answer'])
    with pytest.raises(DataError, match='one or two'): load_labelled(tmp_path/'x.tsv', inputs=['question','question'])
    with pytest.raises(DataError, match="holds .a. alone"): labelled(cut_splits([dict(text=f't{i}', label='a') for i in range(60)]))
    with pytest.raises(DataError, match='holds 2.0 alone'): labelled(cut_splits([dict(text=f't{i}', label=2.) for i in range(60)]))
    infinite = [dict(text=f't{i}', label=i/2 if i else math.inf) for i in range(60)]
    with pytest.raises(DataError, match='no number that can be learned'): labelled(cut_splits(infinite))
    with pytest.raises(DataError, match='too few to be cut'): labelled(cut_splits([dict(text='a', label=0)]))
