"Faults and edge cases of `hedgehog_nb.data` and `hedgehog_nb.plots`."
import gzip, json, os, subprocess, sys
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from hedgehog_nb.data import models, text as texts
from hedgehog_nb.data.text import batches, block_marks, DataError, load_texts, token_blocks
from hedgehog_nb.data.models import load_embedded, load_model, ModelError

torch = pytest.importorskip('torch')

@pytest.fixture(scope='module')
def embedded(): return load_embedded()

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def one_line(err, f, *args, **kw):
    with pytest.raises(err) as e: f(*args, **kw)
    msg = str(e.value)
    assert msg and '\n' not in msg and len(msg)<500
    return msg

# The embedded model

def test_import_is_light():
    code = ("import sys, hedgehog_nb.data.models, hedgehog_nb.data.text; "
        "print([m for m in ('torch','transformers','datasets','matplotlib') if m in sys.modules])")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(models.__file__).parents[2]).stdout.strip()=='[]'

def test_embedded_model(embedded):
    model,tok = embedded
    assert type(model).__name__=='LlamaForCausalLM' and model.num_parameters()==260032 and not model.training
    assert tok.is_fast and len(tok)==512 and (tok.bos_token_id,tok.eos_token_id,tok.pad_token_id)==(1,2,2)
    losses = []
    for s in load_texts('embedded','test'):
        ids = tok(s, return_tensors='pt').input_ids
        with torch.no_grad(): losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0,:-1], ids[0,1:], reduction='none'))
    losses = torch.cat(losses)
    assert len(losses)==1804 and abs(losses.mean().exp()-3.548)<2e-3

def test_embedded_is_quiet():
    code = "from hedgehog_nb.data.models import load_embedded; load_embedded()"
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(models.__file__).parents[2])
    assert (res.returncode, res.stdout, res.stderr)==(0,'','')

hard = st.text(st.one_of(st.sampled_from("abcdefghinost  the and .,'\n\t<s>/0é€😀▁’\0"), st.characters(exclude_categories=['Cs'])), max_size=60)

@settings(max_examples=200, deadline=None)
@given(text=hard)
def test_tokenizer_gives_the_text_back(embedded, text): assert embedded[1].decode(embedded[1](text).input_ids, skip_special_tokens=True)==text

def test_tokenizer_batch_pads_left(embedded):
    b = embedded[1](['Once', 'Once upon a time'], padding=True, return_tensors='pt')
    assert b.input_ids[0,0]==2 and b.attention_mask[0].tolist()==[0]*(b.input_ids.shape[1]-2)+[1,1]

def test_embedded_text():
    train,valid,test = [load_texts('embedded',s) for s in ('train','val','test')]
    assert load_texts('embedded')==train and len(test)==5 and len(valid)==64 and not set(train)&set(valid) and len(train)>2000
    assert 'DataError' and 'train, validation, test' in one_line(DataError, load_texts, 'embedded', 'eval')

# Text files

@pytest.mark.parametrize('name', ['a.txt','a.txt.gz'])
def test_documents_of_one_file(here, name):
    docs = ['one\ntwo', 'three', '¡ñ€😀!']
    raw = '\n<|endoftext|>\n'.join(docs).encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith('.gz') else raw)
    assert load_texts(name)==docs

def test_one_stream(here):
    text = ' \n = Hedgehog = \n \n It has <unk> spines . \n'
    (here/'a.txt').write_text(text)
    assert load_texts('a.txt')==[text]

def test_bom_and_crlf(here):
    (here/'a.txt').write_bytes(b'\xef\xbb\xbfa\r\nb')
    assert load_texts('a.txt')==['a\r\nb']

bad_files = {'missing.txt':None, 'empty.txt':b'', 'blank.txt':b' \n\t', 'only_sep.txt':b'<|endoftext|>\n<|endoftext|>', 'nul.txt':b'abc\0def',
    'png.txt':b'\x89PNG\r\n', 'plain.txt.gz':b'no gzip', 'cut.txt.gz':gzip.compress(b'hello '*1000)[:20], 'bad.json':b'{"text": ',
    'bad.jsonl':b'{"text": "a"}\n{"text": \n', 'number.json':b'5', 'nulls.jsonl':b'{"text": null}', 'empty.json':b'[]',
    'hole.jsonl':b'{"text": "a"}\n{"other": "b"}', 'mixed.json':b'["a", {"text": "b"}]', 'bad.csv':b'a,b\n1\n',
    'bad.parquet':b'PAR1 no', 'missing.parquet':None, 'missing.csv':None, 'x/y/z':None, './nope':None, '/nope':None}

@pytest.mark.parametrize('name', bad_files)
def test_bad_file(here, name):
    if bad_files[name] is not None: (here/name).write_bytes(bad_files[name])
    assert Path(name).name in one_line(DataError, load_texts, name)

def test_bad_jsonl_line(here):
    (here/'a.jsonl').write_text('{"text": "a"}\nnope\n')
    assert 'line 2' in one_line(DataError, load_texts, 'a.jsonl')

def test_empty_spec():
    one_line(DataError, load_texts, '')
    one_line(ModelError, load_model, '')

rows = [dict(id=1, dialogue='A: Hi', summary='x'), dict(id=2, dialogue='B: Ho\n', summary='y'), dict(id=3, dialogue=' ', summary='z')]

def write_rows(kind, path):
    import pyarrow as pa, pyarrow.parquet as pq, pyarrow.csv as pc
    t = pa.Table.from_pylist(rows)
    if kind=='json': path.write_text(json.dumps(rows))
    elif kind=='jsonl': path.write_text('\n'.join(map(json.dumps, rows))+'\n')
    elif kind=='jsonl.gz': path.write_bytes(gzip.compress('\n'.join(map(json.dumps, rows)).encode()))
    elif kind=='parquet': pq.write_table(t, path)
    elif kind=='csv': pc.write_csv(t, path)

@pytest.mark.parametrize('kind', ['json','jsonl','jsonl.gz','parquet','csv'])
def test_tables(here, kind):
    write_rows(kind, here/f'a.{kind}')
    assert load_texts(f'a.{kind}', text_column='summary')==['x','y','z']
    assert [t.strip() for t in load_texts(f'a.{kind}', text_column='dialogue')][:2]==['A: Hi','B: Ho']
    for col in (None,'nope'): assert 'id, dialogue, summary' in one_line(DataError, load_texts, f'a.{kind}', text_column=col)

def test_tsv_is_not_quoted(here):
    (here/'a.tsv').write_text('label\tsentence\n1\tsay "hi\n0\tbye"\n')
    assert load_texts('a.tsv')==['say "hi','bye"']

def test_list_of_strings(here):
    (here/'a.json').write_text('["a","b"]')
    assert load_texts('a.json')==['a','b']

def test_several(here):
    for n in 'ab': (here/f'{n}.txt').write_text(n)
    assert load_texts(['a.txt', here/'b.txt'])==['a','b']

# Splits

@pytest.mark.parametrize('n', [1,7,19,20,21,100])
def test_cut(n):
    docs = [f'{i:03} '*60 for i in range(n)]
    parts = [texts._split_texts(docs, s) for s in ('train','validation','test')]
    if n>=20: assert sum(parts, [])==docs
    else: assert [''.join(p) for p in zip(*parts)]==docs

def test_file_splits(here):
    (here/'a.txt').write_text('hedgehog '*1000)
    assert sum(len(load_texts('a.txt',s)[0]) for s in ('train','val','test'))==len(load_texts('a.txt')[0])==9000
    (here/'b.txt').write_text('a')
    assert 'too short' in one_line(DataError, load_texts, 'b.txt', 'train')
    one_line(DataError, load_texts, 'a.txt', 'eval')

@pytest.mark.parametrize('names', [('train.txt.gz','valid.txt.gz','test.txt.gz'),
    ('train.json','val.json','test.json'), ('wiki.train.tokens','wiki.valid.tokens','wiki.test.tokens'),
    ('train-00000-of-00001.parquet','validation-00000-of-00001.parquet','test-00000-of-00001.parquet'),
    ('train/a.txt','dev/a.txt','test/a.txt'), ('x-train.jsonl','x-dev.jsonl','x-test.jsonl')])
def test_folder(here, names):
    import pyarrow as pa, pyarrow.parquet as pq
    (here/'.git').mkdir(); (here/'.git'/'train.txt').write_text('hidden')
    (here/'README.txt').write_text('read me')
    for n in names:
        p = here/n
        p.parent.mkdir(exist_ok=True)
        if n.endswith('.gz'): p.write_bytes(gzip.compress(n.encode()))
        elif 'json' in n: p.write_text(json.dumps(dict(dialogue=n)))
        elif n.endswith('parquet'): pq.write_table(pa.Table.from_pylist([dict(dialogue=n)]), p)
        else: p.write_text(n)
    for s,n in zip(('train','validation','test'), names): assert load_texts(here, s)==[n]
    assert load_texts(here)==[names[0]]
    (here/names[2]).unlink()
    assert 'train, validation' in one_line(DataError, load_texts, here, 'test').replace('validation, train','train, validation')

def test_folder_without_splits(here):
    for i in range(40): (here/f'{i:02}.md').write_text(f'page {i}')
    assert len(load_texts(here))==40 and [len(load_texts(here,s)) for s in ('train','validation','test')]==[36,2,2]

def test_empty_folder(here):
    (here/'a.bin').write_bytes(b'x')
    assert 'no text files' in one_line(DataError, load_texts, here)

def test_saved_dataset(here):
    import datasets
    ds = datasets.Dataset.from_dict(dict(text=['a','b']))
    datasets.DatasetDict(train=ds, validation=ds.select([1])).save_to_disk('d'); ds.save_to_disk('s')
    assert load_texts('d')==['a','b'] and load_texts('d','val')==['b'] and load_texts('s')==['a','b']
    assert 'train, validation' in one_line(DataError, load_texts, 'd', 'test')

def test_hub_name(monkeypatch):
    import datasets
    seen = []
    def load_dataset(*args):
        seen.append(args)
        return datasets.DatasetDict(train=datasets.Dataset.from_dict(dict(text=['', ' = A = \n', '', ' b \n'])),
            test=datasets.Dataset.from_dict(dict(text=['c'])))
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert load_texts('some/wiki:raw')==['\n = A = \n\n b \n'] and load_texts('wiki','test')==['c'] and seen==[('some/wiki','raw'),('wiki',None)]
    assert 'train, test' in one_line(DataError, load_texts, 'wiki', 'validation')

# Offline

@pytest.mark.parametrize('how', ['flag','no network'])
def test_offline(here, monkeypatch, how):
    import huggingface_hub.constants as c, datasets.config as d
    if how=='flag': [monkeypatch.setattr(m, 'HF_HUB_OFFLINE', True) for m in (c,d)]
    else: monkeypatch.setattr(models, '_reachable', lambda url: False)
    old = c.HF_HUB_OFFLINE, d.HF_HUB_OFFLINE
    for f,err in ((load_texts,DataError),(load_model,ModelError)):
        msg = one_line(err, f, 'nobody/nothing-at-all')
        assert 'nobody/nothing-at-all' in msg and 'local folder' in msg and 'embedded' in msg
    assert (c.HF_HUB_OFFLINE, d.HF_HUB_OFFLINE)==old

# Models

def test_bad_models(here, monkeypatch):
    (here/'empty').mkdir(); (here/'two').mkdir(); (here/'cfg').mkdir(); (here/'a.bin').write_bytes(b'x'); (here/'bad.gguf').write_bytes(b'no gguf at all')
    for n in 'ab': (here/'two'/f'{n}.gguf').write_bytes(b'')
    (here/'cfg'/'config.json').write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    for spec,word in {'./nope':'no such folder', '/nope':'no such folder', 'a/b/c':'no such folder', 'nope.gguf':'no such GGUF',
            'empty':'config.json', 'two':'a.gguf, b.gguf', 'a.bin':'is a file', 'cfg':'cannot be loaded', 'bad.gguf':'bad.gguf'}.items():
        assert word in one_line(ModelError, load_model, spec)
    monkeypatch.setattr(models, 'find_spec', lambda n: None)
    assert 'pip install gguf' in one_line(ModelError, load_model, 'bad.gguf')

def test_foreign_code_is_not_run(here):
    (here/'m').mkdir()
    (here/'m'/'evil.py').write_text('raise SystemExit("ran")')
    for cfg in (dict(model_type='evil', auto_map=dict(AutoConfig='evil.C', AutoModelForCausalLM='evil.M')),
            dict(model_type='llama', architectures=['EvilForCausalLM'])):
        (here/'m'/'config.json').write_text(json.dumps(cfg))
        one_line(ModelError, load_model, 'm')

def test_dtype_device(embedded):
    for n in ('bf16','bfloat16',torch.bfloat16): assert load_model('embedded', n)[0].dtype==torch.bfloat16
    for n in ('int8','float','no_such','nn'): 
        if n!='float': assert 'float32' in one_line(ModelError, load_model, 'embedded', n)
    assert load_model('embedded', device='cpu')[0].device.type=='cpu'
    one_line(ModelError, load_model, 'embedded', None, 'no-such-device')

@pytest.mark.parametrize('arch', ['BertForSequenceClassification','BertModel','GPT2LMHeadModel','ViTForImageClassification'])
def test_architecture_is_kept(here, embedded, arch):
    import transformers as tf
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    cfg = {'B': lambda: tf.BertConfig(vocab_size=512, num_labels=3, **small), 'G': lambda: tf.GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2),
        'V': lambda: tf.ViTConfig(image_size=8, patch_size=4, **small)}[arch[0]]()
    getattr(tf, arch)(cfg).save_pretrained('m')
    if arch[0]!='V': embedded[1].save_pretrained('m')
    model,tok = load_model('m')
    assert type(model).__name__==arch and (tok is None)==(arch[0]=='V') and not model.training

def test_model_without_tokenizer(here, embedded):
    embedded[0].save_pretrained('m')
    one_line(ModelError, load_model, 'm')

real = os.environ.get('HEDGEHOG_MODELS')

@pytest.mark.skipif(not real, reason="HEDGEHOG_MODELS names no folder with real models")
def test_real_models():
    model,tok = load_model(f'{real}/minilm-l6-v2')
    assert type(model).__name__=='BertModel' and tok('hello').input_ids==[101,7592,102]
    model,tok = load_model(f'{real}/smollm2-135m-instruct')
    ids = token_blocks(['The capital of France is']*9, tok, 6)
    assert model.num_parameters()==134515008 and ids.shape==(9,6) and ids[0,-1]==tok.eos_token_id
    assert tok.decode(model(ids[:1,:-1]).logits[0,-1].argmax())==' Paris'

# Blocks and batches

def test_blocks_are_the_stream(embedded):
    tok, docs = embedded[1], ['One day.', 'Two days, and more.', 'Three']
    stream = [i for d in docs for i in tok(d).input_ids]
    for T in (1,2,7,len(stream)):
        b = token_blocks(docs, tok, T, block_bos=False)
        assert b.dtype==torch.long and b.shape==(len(stream)//T,T) and b.flatten().tolist()==stream[:b.numel()]
    assert str(len(stream)) in one_line(DataError, token_blocks, docs, tok, len(stream)+1)

def test_blocks_max_tokens_and_seed(embedded):
    tok, docs = embedded[1], load_texts('embedded','validation')
    full = token_blocks(docs, tok, 64)
    for m in (64,65,1000): assert torch.equal(token_blocks(docs, tok, 64, max_tokens=m), full[:m//64])
    assert torch.equal(token_blocks(docs, tok, 64, max_tokens=10**9), full)
    one_line(DataError, token_blocks, docs, tok, 64, max_tokens=63)
    a,b,c = [token_blocks(docs, tok, 64, seed=s) for s in (0,0,1)]
    assert torch.equal(a,b) and not torch.equal(a,c) and abs(len(a)-len(full))<=1
    assert torch.equal(token_blocks(' '.join(docs), tok, 64, max_tokens=640), token_blocks([' '.join(docs)], tok, 64)[:10])

def _words(begin, end, **kw):
    "A tokenizer of the words w0 to w99 that puts `begin` and `end` around a text."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    special = {'<s>':100, '</s>':101, '[CLS]':102, '[SEP]':103, 'xx':104}
    tok = Tokenizer(models.WordLevel({**{f'w{i}':i for i in range(100)}, **special, '[UNK]':105}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin or end:
        tok.post_processor = processors.TemplateProcessing(single=' '.join([*begin, '$A', *end]), special_tokens=[(x,special[x]) for x in {*begin,*end}])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>', unk_token='[UNK]', **kw), [special[x] for x in begin], [special[x] for x in end]

MARKS = {'none':([],[],{}), 'bos':(['<s>'],[],dict(bos_token='<s>')),
    'bos and eos':(['<s>'],['</s>'],dict(bos_token='<s>')), 'two in front':(['<s>','xx'],[],dict(bos_token='<s>')),
    'encoder':(['[CLS]'],['[SEP]'],dict(cls_token='[CLS]', sep_token='[SEP]')), 'end only':([],['</s>'],{})}

@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(MARKS)), sizes=st.lists(st.integers(1,30), min_size=1, max_size=12), seq_len=st.integers(1,17))
def test_blocks_begin_as_a_text_does(kind, sizes, seq_len):
    begin,end,kw = MARKS[kind]
    tok,begin,end = _words(begin, end, **kw)
    docs = [' '.join(f'w{i%90}' for i in range(n)) for n in sizes]
    framed = end if kind=='encoder' else []
    if seq_len<=len(begin)+len(framed):
        one_line(DataError, token_blocks, docs, tok, seq_len)
        return
    try: blocks = token_blocks(docs, tok, seq_len).tolist()
    except DataError: blocks = []
    words = [i for d in docs for i in tok(d, add_special_tokens=False).input_ids]
    found = [i for b in blocks for i in b if i<100]
    assert found==words[:len(found)]   # none lost, none twice
    marked = [tok(d).input_ids + ([] if begin or end else [101]) for d in docs]
    left, doc = len(found), 0
    while doc<len(marked) and (n := len(docs[doc].split()))<=left: left, doc = left-n, doc+1
    assert sum(map(len, marked[doc:]))-left < seq_len+len(begin)+len(end)   # what is left does not fill a block
    for b in blocks:
        assert len(b)==seq_len and b[:len(begin)]==begin and (not framed or b[-1:]==framed)
        assert not begin or all(b[i:i+2*len(begin)]!=begin*2 and b[i:i+1+len(begin)]!=[begin[0],*begin] for i in range(len(b)))

@pytest.mark.parametrize('single,kw,begin,end', [('[CLS] $A [SEP]', dict(cls_token='[CLS]', sep_token='[SEP]'), [0], [1]), ('$A', {}, [], []),
    ('[CLS] $A', {}, [0], []), ('[CLS] $A [SEP]', dict(cls_token='[CLS]', bos_token='[CLS]', eos_token='[SEP]'), [0], [])],
    ids=['encoder','none','front','a decoder with cls'])
def test_marks_of_a_tokenizer_of_few_letters(single, kw, begin, end):
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.BPE({'[CLS]':0, '[SEP]':1, 'A':2, 'C':3, 'G':4, 'T':5}, []))
    tok.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(x,i) for i,x in enumerate(('[CLS]','[SEP]')) if x in single])
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, **kw)
    assert block_marks(tok)==(begin,end) and token_blocks(['ACGT'*9], tok, 4)[0].tolist()[:3]==[*begin,2,3,4][:3]
    tok.init_kwargs['block_bos'] = 'false'
    assert "given 'false'" in one_line(DataError, token_blocks, ['ACGT'*9], tok, 4)

def test_cuts_on_the_marks_of_documents():
    "A cut through a document's marks, or just before its end mark: they are not written twice."
    tok,_,_ = _words(['<s>','xx'], [], bos_token='<s>')
    assert token_blocks(['w1','w2 w3 w4'], tok, 4).tolist()==[[100,104,1,100],[100,104,2,3]]
    tok,_,_ = _words(['[CLS]'], ['[SEP]'], cls_token='[CLS]', sep_token='[SEP]')
    assert token_blocks(['w1 w2','w3 w4 w5'], tok, 4).tolist()==[[102,1,2,103],[102,3,4,103]]
    assert token_blocks(['w1 w2 w3','w4 w5'], tok, 3).tolist()==[[102,1,103],[102,2,103],[102,3,103],[102,4,103],[102,5,103]]

def test_block_marks_are_a_setting_of_the_tokenizer(tmp_path):
    tok,_,_ = _words(['<s>'], [], bos_token='<s>', block_bos=False)
    docs = ['w1 w2 w3 w4 w5']
    assert token_blocks(docs, tok, 3).tolist()==[[100,1,2],[3,4,5]] and token_blocks(docs, tok, 3, block_bos=True).tolist()==[[100,1,2],[100,3,4]]
    tok.save_pretrained(tmp_path)
    from transformers import AutoTokenizer
    assert token_blocks(docs, AutoTokenizer.from_pretrained(tmp_path), 3).tolist()==[[100,1,2],[3,4,5]]

def test_embedded_blocks_lie_anywhere(embedded):
    "The embedded model was trained on windows cut anywhere, and is better there: its tokenizer says so."
    from hedgehog_nb.training.evaluate import perplexity
    model,tok = embedded
    ppl = {b:perplexity(model, token_blocks(load_texts('embedded','test'), tok, 128, block_bos=b)) for b in (None,False,True)}
    assert ppl[None]==ppl[False]<ppl[True]-.5

def test_blocks_no_text(embedded): one_line(DataError, token_blocks, [], embedded[1], 8)

def test_eos_where_nothing_is_added():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    tok = Tokenizer(models.WordLevel({'a':0,'b':1,'</s>':2}, unk_token='a'))
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>')
    assert token_blocks(['a','b'], tok, 4).tolist()==[[0,2,1,2]]

@settings(max_examples=50, deadline=None)
@given(n=st.integers(1,20), size=st.integers(1,25), epochs=st.integers(1,3), seed=st.one_of(st.none(), st.integers(0,9)), skip=st.integers(0,5))
def test_batches(n, size, epochs, seed, skip):
    blocks = torch.arange(n*2).view(n,2)
    full = list(batches(blocks, size, seed, epochs))
    assert len(full)==len(batches(blocks, size, seed, epochs)) and sorted(torch.cat(full)[:,0].tolist())==sorted(list(range(0,2*n,2))*epochs)
    it = batches(blocks, size, seed, epochs, skip=min(skip,len(full)))
    rest = list(it)
    assert len(rest)==len(it) and all(torch.equal(a,b) for a,b in zip(rest, full[min(skip,len(full)):])) and it.tokens==sum(b.numel() for b in rest)

def test_bad_batches():
    one_line(DataError, batches, torch.zeros(0,4), 2)
    one_line(DataError, batches, torch.zeros(3,4), 0)

# Plots

plots = pytest.importorskip('hedgehog_nb.plots')

def test_colors():
    assert plots.color('T2R-HH')==plots.color('t2r_hh')==plots.color(' t2r hh') and plots.color('1+ELU')==plots.color('elu')
    assert plots.color('no such map')==plots.color('no such map')!=plots.color('another') and len(set(plots._colors.values()))==len(plots._colors)

def test_style_restores():
    import matplotlib as mpl
    old = dict(mpl.rcParams)
    with pytest.raises(KeyError):
        with plots.use_style(): raise KeyError
    assert dict(mpl.rcParams)==old

@pytest.mark.parametrize('shape', [(1,1),(1,1,1),(5,5),(3,5,5)])
def test_maps(tmp_path, shape):
    w = torch.rand(shape, dtype=torch.bfloat16, requires_grad=True).tril()
    fig = plots.plot_attention_maps(dict(softmax=w, hedgehog=w), tokens=list('a$_%^'[:shape[-1]]))
    assert len(fig.axes)==2*(shape[0] if len(shape)==3 else 1)+1
    a,b = [plots.save_figure(fig, tmp_path/n/'m.png').read_bytes() for n in 'ab']
    assert a==b and a[:4]==b'\x89PNG'
    plots.plt.close(fig)

@pytest.mark.parametrize('maps', [{}, dict(a=torch.rand(3,4)), dict(a=torch.rand(3,3), b=torch.rand(4,4)), dict(a=torch.rand(3))])
def test_bad_maps(maps): one_line(ValueError, plots.plot_attention_maps, maps)

def test_curves():
    ax = plots.plot_curves([dict(variant='elu', s=2, y=1.), dict(variant='elu', s=1, y=2.),
        dict(variant='elu', s=1, y=4.), dict(variant='relu', s=1), dict(other=1)], 's', 'y')
    assert [l.get_xydata().tolist() for l in ax.lines]==[[[1,3],[2,1]]] and len(ax.collections)==1
    one_line(ValueError, plots.plot_curves, [dict(s=1)], 's', 'y')
    plots.plt.close('all')

@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from('ab. \n\n\t='), max_size=200), size=st.integers(1,60))
def test_pieces_join(text, size):
    ps = list(texts._pieces(text, size))
    assert ''.join(ps)==text and all(p.endswith('\n') for p in ps[:-1])

def test_marks(embedded):
    assert texts._marks(embedded[1])==([1],[])
    long = 'One day, Tim ran.\n'*5000
    ids = sum(texts._token_ids([long,'x'], embedded[1]), [])
    assert ids.count(1)==2 and embedded[1].decode(ids[:20], skip_special_tokens=True)==long[:len(embedded[1].decode(ids[:20], skip_special_tokens=True))]
