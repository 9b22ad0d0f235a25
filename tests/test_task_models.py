"Models with a head for labels through the command line: classes, pairs, tags and images; runs that were stopped; what is refused; attention dropout."
import gzip, json, os, random, warnings
from pathlib import Path
import pytest
from helpers.commands import hedgehog

pytestmark = pytest.mark.processes

torch = pytest.importorskip('torch')
pytest.importorskip('sklearn')
datasets = pytest.importorskip('datasets')
import transformers
from transformers import (AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig,
    BertForSequenceClassification, BertForTokenClassification, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification,
    ViTImageProcessorPil)
from hedgehog_nb import linearize
from hedgehog_nb.cli.tasks import _passes
from hedgehog_nb.data.labelled import join_splits, labelled, load_labelled, load_splits, load_task_model
from hedgehog_nb.data.models import ModelError
from hedgehog_nb.data.text import DataError
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.training.tasks import _Encoded, Task

SIZE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
FEW = '--distill-steps 2 --finetune-steps 2 --batch-size 8'.split()
WORDS = [f'w{i}' for i in range(20)]

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def fails(*args):
    "What a command that is refused says, in one line, having written nothing."
    before = sorted(map(str, Path('.').rglob('*')))
    r = hedgehog(*args, code=1)
    assert sorted(map(str, Path('.').rglob('*')))==before and r.stdout=='' and len(r.stderr.splitlines())==1 and len(r.stderr)<500, r.stderr
    return r.stderr

def bert(cls=BertForSequenceClassification, folder='bert', dropout=.1, **kw):
    "A folder with a random BERT and a tokenizer of words."
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    torch.manual_seed(0)
    cls(BertConfig(**SIZE, vocab_size=24, max_position_embeddings=32, initializer_range=.3, attention_probs_dropout_prob=dropout, **kw)).save_pretrained(folder)
    tok = Tokenizer(models.WordLevel({w:i for i,w in enumerate(['[PAD]','[UNK]','[CLS]','[SEP]', *WORDS])}, unk_token='[UNK]'))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', pair='[CLS] $A [SEP] $B [SEP]', special_tokens=[('[CLS]',2),('[SEP]',3)])
    special = dict(pad_token='[PAD]', unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]')
    transformers.PreTrainedTokenizerFast(tokenizer_object=tok, **special).save_pretrained(folder)
    return folder

def text(r): return ' '.join(r.choices(WORDS, k=r.randint(2, 8)))

def reviews(labels=('bad','good')):
    r = random.Random(0)
    Path('reviews.tsv').write_text('text\tstars\n'+''.join(f'{text(r)}\t{r.choice(labels)}\n' for _ in range(80)))
    return 'reviews.tsv'

def rows_of(folder): return json.loads((Path(folder)/'results.json').read_text())['rows']

def same_logits(auto, folder, want, **x):
    "A folder loads again as transformers loads models, converted, with the outputs that were measured."
    model = auto.from_pretrained(folder)
    assert len(linear_layers(model))==2
    with torch.no_grad(): torch.testing.assert_close(model(**x).logits, want, atol=1e-5, rtol=1e-4)

@pytest.fixture
def converted(monkeypatch):
    "What the command saves: the model is kept, to compare with what is loaded."
    from hedgehog_nb.models import loading
    kept,save = [],loading.save_linearized
    def keep(model, *args, **kw): kept.append(model); return save(model, *args, **kw)
    monkeypatch.setattr(loading, 'save_linearized', keep)
    return kept

# The four kinds

def test_classes(converted):
    r = hedgehog('linearize', bert(), '--data', reviews(), '--label-column', 'stars', '--metric', 'mcc', '--out', 'out', '--record', 'r.json',
        '--baseline', *FEW)
    rows = [x for x in rows_of('out') if x['metric']=='mcc']
    assert [(x['variant'], x['stage']) for x in rows]==[('softmax-zero-shot','teacher'), ('softmax','finetuned'), ('hedgehog-swapped','swapped'),
        ('hedgehog-distilled','distilled'), ('hedgehog','finetuned')]
    assert {x['unit'] for x in rows_of('out') if x['metric'] in ('agreement','correlation')}=={'%'}
    assert json.loads(Path('r.json').read_text())['rows']==rows_of('out')
    assert all(w in r.stderr for w in ('BertForSequenceClassification', 'attention dropout of 0.1 is lost in 2 layers', 'distill   2 steps of 8 examples',
        'mcc on 4'))
    assert r.stderr.count('dropout')==2 and 'Warning' not in r.stderr and 'evaluate out' in r.stderr # one line says it
    assert all(w in r.stdout for w in ('agreement', 'correlation', 'softmax, the teacher', 'softmax, finetuned', 'Hedgehog, untrained', 'Hedgehog, finetuned'))
    assert {'config.json','model.safetensors','tokenizer.json','results.json','README.md'}<={*os.listdir('out')}
    assert sorted(os.listdir())==['bert','out','r.json','reviews.tsv']
    x = dict(input_ids=torch.tensor([[2,5,9,7,3], [2,8,3,0,0]]), attention_mask=torch.tensor([[1]*5, [1,1,1,0,0]]))
    with torch.no_grad(): want = converted[0](**x).logits
    same_logits(AutoModelForSequenceClassification, 'out', want, **x)
    for model,value in (('out', rows[-1]['value']), ('bert', rows[0]['value'])):
        said = json.loads(hedgehog('evaluate', model, '--data', 'reviews.tsv', '--label-column', 'stars', '--metric', 'mcc', '--json').stdout)
        assert said['value']==pytest.approx(value, abs=1e-3) and said['metric']=='mcc' and said['examples']==4
    assert json.loads(hedgehog('evaluate', 'out', '--data', 'reviews.tsv', '--label-column', 'stars', '--split', 'all', '--json').stdout)['examples']==80
    assert hedgehog('evaluate', 'out', '--data', 'reviews.tsv', '--label-column', 'stars').stdout.startswith('accuracy ')

def test_numbers_for_pairs(converted):
    r = random.Random(0)
    Path('pairs').mkdir()
    for split,n in (('train',40), ('dev',8), ('test',8)):
        Path(f'pairs/{split}.jsonl').write_text(''.join(json.dumps(dict(id=f'n{i}', one=text(r), two=text(r), score=r.random()*5))+'\n' for i in range(n)))
    out = hedgehog('linearize', bert(num_labels=1), '--data', 'pairs', '--text-column', 'one,two', '--out', 'out', '--json', *FEW).stdout
    rows = json.loads(out)['rows'] # the model's class says that it has a head
    assert {x['metric'] for x in rows}=={'spearman','correlation'} and rows[0]['examples']==8
    x = dict(input_ids=torch.tensor([[2,5,3,9,3]]))
    with torch.no_grad(): want = converted[0](**x).logits
    assert want.shape==(1,1)
    same_logits(AutoModelForSequenceClassification, 'out', want, **x)

def test_tags_of_words(converted):
    r = random.Random(0)
    rows = [dict(tokens=(w := r.choices(WORDS, k=r.randint(2, 6))), ner_tags=['even' if int(x[1:])%2==0 else 'odd' for x in w]) for _ in range(60)]
    Path('tags.json').write_text(json.dumps(rows))
    hedgehog('linearize', bert(BertModel), '--data', 'tags.json', '--label-column', 'ner_tags', '--adapt-epochs', .5, '--out', 'out', *FEW)
    got = rows_of('out')
    assert got[0]['stage']=='adapted' and got[0]['metric']=='accuracy' and not any(x['stage']=='teacher' for x in got) # a new head was not measured
    x = dict(input_ids=torch.tensor([[2,5,9,3]]))
    with torch.no_grad(): want = converted[0](**x).logits
    assert converted[0].config.id2label=={0:'even', 1:'odd'} and want.shape==(1,4,2)
    same_logits(AutoModelForTokenClassification, 'out', want, **x)

def test_images(converted):
    from PIL import Image
    r = random.Random(0)
    for c in ('cat','dog'):
        Path(f'pictures/{c}').mkdir(parents=True)
        for i in range(12): Image.frombytes('RGB', (16,16), r.randbytes(768)).save(f'pictures/{c}/{i}.png')
    torch.manual_seed(0)
    names = dict(id2label={0:'dog', 1:'cat'}, label2id=dict(dog=0, cat=1))
    ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4, initializer_range=.3, **names)).save_pretrained('vit')
    ViTImageProcessorPil(size=dict(height=16, width=16)).save_pretrained('vit')
    r = hedgehog('linearize', 'vit', '--data', 'pictures', '--map', 'elu', '--out', 'out', '--eval-data', 'pictures', *FEW)
    rows = rows_of('out')
    assert [x['stage'] for x in rows if x['metric']=='accuracy']==['teacher','swapped','finetuned'] and rows[0]['examples']==24 # elu learns nothing alone
    assert 'dropout' not in r.stderr and (Path('out')/'preprocessor_config.json').exists()
    x = dict(pixel_values=torch.randn(2,3,16,16))
    with torch.no_grad(): want = converted[0](**x).logits
    same_logits(AutoModelForImageClassification, 'out', want, **x)
    assert json.loads(hedgehog('evaluate', 'out', '--data', 'pictures', '--split', 'all', '--json').stdout)['value']==pytest.approx(rows[-1]['value'])

def test_a_recipe_and_what_is_typed_beside_it():
    hedgehog('linearize', bert(dropout=0.), '--data', reviews(), '--label-column', 'stars', '--out', 'out', '--recipe', 'best', '--map', 'hedgehog',
        '--layers', 1, '--objective', 'outputs', '--finetune-on', 'teacher', '--epochs', .1, '--distill-epochs', .1, '--max-length', 6, '--finetune-lr', 1e-4)
    conversion = json.loads(Path('out/config.json').read_text())['hedgehog']
    assert conversion==dict(attention='hedgehog', layers=[1], attention_kwargs=dict(num_maps=4, bias=True))
    assert {x['recipe'] for x in rows_of('out')}=={'best'}

def test_a_causal_classifier_becomes_a_hybrid():
    "Its body comes from a language model, whose settings name no token for padding."
    bert(folder='gpt')
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=24, n_positions=64)).save_pretrained('gpt')
    hedgehog('linearize', 'gpt', '--data', reviews(), '--label-column', 'stars', '--adapt-epochs', .2, '--recipe', 'best', '--out', 'out', *FEW)
    assert json.loads(Path('out/config.json').read_text())['hedgehog']['attention']=='hedgehog-window'
    last = [x['value'] for x in rows_of('out') if x['metric']=='accuracy'][-1]
    assert json.loads(hedgehog('evaluate', 'out', '--data', 'reviews.tsv', '--label-column', 'stars', '--json').stdout)['value']==pytest.approx(last)

def test_classes_of_other_names_are_matched_in_order_and_said():
    names = {0:'negative', 1:'positive'}
    said = lambda: hedgehog('linearize', 'bert', '--data', 'reviews.tsv', '--label-column', 'stars', '--out', 'out', '--overwrite', *FEW).stderr
    bert(id2label=names, label2id={n:i for i,n in names.items()}); reviews()
    assert 'matched in order: bad is negative, good is positive' in said()
    reviews(labels=('positive','negative')); assert 'in order' not in said()
    bert(); reviews(labels=('0','1')); assert 'in order' not in said()

# Heads that stay softmax

def test_heads_are_chosen_by_their_number(converted, monkeypatch):
    "The worst two of four, after distillation; stopped after that, the run ends with the same file."
    from hedgehog_nb.cli.console import Progress
    from hedgehog_nb.cli.options import Terminated
    args = ['linearize', bert(), '--data', reviews(), '--label-column', 'stars', '--softmax-heads', 2, *FEW, '--save-every', 1]
    r = hedgehog(*args, '--out', 'out')
    kept = converted[0].config.hedgehog
    assert kept.get('softmax_heads', '').count(':')+2*(2-len(kept['layers']))==2
    assert 'softmax again in 2 key-value heads once maps are distilled' in r.stderr and 'softmax is back where the maps were furthest from it: ' in r.stderr
    assert 'Hedgehog, some heads softmax' in r.stdout
    assert [x['stage'] for x in rows_of('out') if x['metric']=='accuracy']==['teacher','swapped','distilled','heads','finetuned']
    bar = Progress.bar
    def stop(self, event, **kw):
        bar(self, event, **kw)
        if (kw['phase'], kw['done'])==('finetune', 1): raise Terminated(15)
    with monkeypatch.context() as m:
        m.setattr(Progress, 'bar', stop)
        hedgehog(*args, '--out', 'stopped', code=143)
    hedgehog(*args, '--out', 'stopped')
    assert Path('out/model.safetensors').read_bytes()==Path('stopped/model.safetensors').read_bytes()
    Path('run.yaml').write_text('softmax-heads: 2\n')
    args[6:8] = ['--config', 'run.yaml']
    hedgehog(*args, '--out', 'file')
    assert json.loads(Path('file/config.json').read_text())['hedgehog']==kept
    assert 'of 4 key-value heads up to 3 can stay softmax' in fails(*args, '--softmax-heads', 4, '--out', 'many')

# A run that was stopped

@pytest.mark.parametrize('phase,step', [('adapt',2), ('distill',3), ('finetune',2)])
def test_a_stopped_run_ends_as_if_it_had_not_been(phase, step, monkeypatch):
    from hedgehog_nb.cli.console import Progress
    from hedgehog_nb.cli.options import Terminated
    args = ['linearize', bert(BertModel), '--data', reviews(), '--label-column', 'stars', '--adapt-epochs', .4, '--distill-steps', 4, '--finetune-steps', 4,
        '--batch-size', 8, '--save-every', 1]
    hedgehog(*args, '--out', 'whole')
    bar = Progress.bar
    def stop(self, event, **kw):
        bar(self, event, **kw)
        if (kw['phase'], kw['done'])==(phase, step): raise Terminated(15)
    with monkeypatch.context() as m:
        m.setattr(Progress, 'bar', stop)
        r = hedgehog(*args, '--out', 'stopped', code=143)
    assert f'{phase} had done {step} of 4 steps; what was done is kept in .stopped-run' in r.stderr and not Path('stopped').exists()
    assert 'other settings' in fails(*args, '--out', 'stopped', '--epochs', 2)
    done = []
    monkeypatch.setattr(Progress, 'bar', lambda self, event, **kw: (bar(self, event, **kw), done.append((kw['phase'], kw['done']))))
    r = hedgehog(*args, '--out', 'stopped')
    phases = 'adapt','distill','finetune'
    assert not {p for p,_ in done}&{*phases[:phases.index(phase)]} and min(n for p,n in done if p==phase)>=step # nothing is done again
    assert 'going on with what is in .stopped-run' in r.stderr and not Path('.stopped-run').exists()
    assert Path('whole/model.safetensors').read_bytes()==Path('stopped/model.safetensors').read_bytes()
    drop = lambda rows: [{k:v for k,v in x.items() if k not in ('seconds','step_s')} for x in rows]
    assert drop(rows_of('whole'))==drop(rows_of('stopped'))

def test_batches_in_pieces(rows_at_once):
    hedgehog('linearize', bert(), '--data', reviews(), '--label-column', 'stars', '--baseline', '--out', 'out', '--grad-accum', 4, *FEW)
    assert rows_at_once==[2]*24 # two steps of eight rows, of the baseline, the maps and the whole

# What is refused

@pytest.mark.parametrize('option,fits', [('--distill-tokens 9','--distill-epochs'), ('--finetune-tokens 9','--epochs'), ('--adapt-tokens 9','--adapt-epochs'),
    ('--seq-len 64','--max-length'), ('--align-tokens 9','not aligned'), ('--align-lr 0.1','not aligned'), ('--long-blocks 2','not joined'),
    ('--block-bos','as its tokenizer does'), ('--no-block-bos','as its tokenizer does'), ('--patience 2','--epochs'), ('--last-state','its last state'),
    ('--lora-rank 2','all weights'), ('--lora-targets query','all weights'), ('--eval-tokens 9','all examples'),
    ('--evals 2','after each phase'), ('--save trained','the whole model is saved')])
def test_options_of_language_models_are_refused(option, fits):
    said = fails('linearize', bert(), '--data', reviews(), '--out', 'out', *option.split())
    assert option.split()[0].replace('--no-block','--block') in said and fits in said and 'BertForSequenceClassification' in said

@pytest.mark.parametrize('option', ['--seq-len 64', '--eval-tokens 9', '--block-bos', '--base bert'])
def test_options_of_language_models_are_refused_where_labels_are_measured(option):
    assert option.split()[0] in fails('evaluate', bert(), '--data', reviews(), *option.split())

@pytest.mark.parametrize('option,fits', [('--metric f1',''), ('--epochs 2','--finetune-tokens'), ('--distill-epochs 2','--distill-tokens'),
    ('--adapt-epochs 2','--adapt-tokens'), ('--max-length 9','--seq-len')])
def test_options_of_task_models_are_refused_elsewhere(option, fits):
    said = fails('linearize', 'embedded', '--data', 'embedded', '--out', 'out', *option.split())
    assert option.split()[0] in said and '--label-column' in said and fits in said

def test_settings_in_a_file_are_refused_too():
    Path('run.yaml').write_text('seq-len: 64\n')
    assert '--seq-len is for language models' in fails('linearize', bert(), '--data', reviews(), '--out', 'out', '--config', 'run.yaml')

@pytest.mark.parametrize('more,says', [(('--metric','spearman'), 'for classes the metric is accuracy or mcc or f1; given \'spearman\''),
    (('--label-column','rating'), "the examples have columns text, stars; given 'rating' for the labels"),
    (('--text-column','body'), 'the examples have columns text, stars; given body to read'),
    (('--data','other.tsv'), '--data is one table'), (('--max-length', 99), '--max-length 99 is more than the 32 tokens'),
    (('--map','hedgehog-window'), 'causal only'), (('--layers','0-7'), 'layers 0 to 1'), (('--recipe','nope'), 'recipe is one of'),
    (('--finetune-lr', 0), '--finetune-lr is above 0'), (('--finetune-on','stars'), '--finetune-on is one of'), (('--dtype','float16'), '--autocast float16'),
    (('--eval-data','nowhere.tsv'), 'no such file')])
def test_what_does_not_fit_the_examples_or_the_model(more, says):
    column = () if '--label-column' in more else ('--label-column','stars')
    assert says in fails('linearize', bert(), '--data', reviews(), '--out', 'out', *column, *more, *FEW)

def test_a_head_for_other_labels():
    args = '--data', reviews(labels=('bad','fair','good')), '--label-column', 'stars'
    assert 'has a head for 2 labels; the examples have 3: name a model without a head' in fails('linearize', bert(), *args, '--out', 'out')
    assert 'has a head for 2 labels' in fails('evaluate', 'bert', *args)

def test_a_new_head_must_learn_first():
    args = bert(BertModel), '--data', reviews(), '--label-column', 'stars'
    assert 'no head for these labels, and a new one knows nothing: say --adapt-epochs 3' in fails('linearize', *args, '--out', 'out', *FEW)
    assert 'nothing to measure yet' in fails('evaluate', *args)

def test_a_file_without_one_of_the_classes():
    "What was learned from three classes is measured on two."
    names = {0:'bad', 1:'fair', 2:'good'}
    bert(id2label=names, label2id={n:i for i,n in names.items()})
    assert json.loads(hedgehog('evaluate', 'bert', '--data', reviews(), '--label-column', 'stars', '--split', 'all', '--json').stdout)['examples']==80

def test_commands_that_write_text_say_what_a_classifier_is():
    bert(); hedgehog('linearize', 'bert', '--data', reviews(), '--label-column', 'stars', '--out', 'out', *FEW)
    for model in ('bert','out'):
        for cmd in (('generate', model, '-p', 'Once'), ('properties', model, '--data', 'embedded')):
            said = fails(*cmd)
            assert f'{model} is a BertForSequenceClassification, no language model: it gives labels and writes no text' in said and 'hedgehog evaluate' in said
    assert 'converted already' in fails('linearize', 'out', '--data', 'reviews.tsv', '--label-column', 'stars', '--out', 'again')
    assert 'exists already' in fails('linearize', 'bert', '--data', 'reviews.tsv', '--label-column', 'stars', '--out', 'out')

# What a split, a row and a label are

def split(n=40, labels=('bad','good'), **kw): return [dict(text=f'w{i%20} w{i*7%20}', label=labels[i%len(labels)], **kw) for i in range(n)]

def test_minus_one_is_a_class_or_no_label():
    d = labelled(dict(train=split(labels=(-1,1)), validation=split(10, (1,-1)), test=split(6, (-1,1))))
    assert (d.names, len(d.test), len(d.valid))==(['-1','1'], 6, 10) # its first label is -1
    assert len(labelled(dict(train=split(labels=(-1,1)), test=split(1, (-1,)))).test)==1
    assert len(labelled(dict(train=split(), validation=split(10), test=split(6, (-1,None)))).test)==10
    named = lambda rows: datasets.Dataset.from_list(rows).cast_column('label', datasets.ClassLabel(names=['no','yes']))
    d = labelled(dict(train=named(split(labels=(0,1,-1))), test=named(split(9, (-1,0,1)))))
    assert (len(d.train)+len(d.valid), len(d.test), d.names)==(27, 6, ['no','yes']) and {d.target(r) for r in d.train}=={0,1}
    for rows in (split(labels=('a','b',None)), [*split(), dict(text='w1')]):
        with pytest.raises(DataError, match="column 'label' has no label in the row"): labelled(dict(train=rows, test=split()))

def test_splits_are_joined_with_the_names_of_their_classes(here):
    named = lambda labels: datasets.Dataset.from_list(split(12, labels)).cast_column('label', datasets.ClassLabel(names=['yes','no']))
    parts = datasets.DatasetDict(train=named((0,1)), test=named((1,0)), unsupervised=named((-1,)))
    rows = join_splits(dict(parts))
    assert len(rows)==24 and rows.features['label'].names==['yes','no']
    parts.save_to_disk('ds')
    bert(id2label={0:'no', 1:'yes'}, label2id=dict(no=0, yes=1))
    said = hedgehog('evaluate', 'bert', '--data', 'ds', '--split', 'all', '--json')
    assert json.loads(said.stdout)['examples']==24 and 'in order' not in said.stderr
    with pytest.raises(DataError, match="column 'label' holds no labels"): join_splits(dict(test=named((-1,))))
    with pytest.raises(DataError, match='cannot be joined'):
        join_splits(dict(train=named((0,1)), test=named((0,1)).cast_column('label', datasets.ClassLabel(names=['a','b']))))

def test_a_folder_of_tables():
    Path('d').mkdir()
    table = lambda n: 'text,label\n'+''.join(f'w{i},{"ab"[i%2]}\n' for i in range(n))
    for name,n in (('all',70), ('train',40), ('dev',20)): Path(f'd/{name}.csv').write_text(table(n))
    Path('d/README.md').write_text('# About\n'); Path('d/test.TSV.gz').write_bytes(gzip.compress(table(10).replace(',','\t').encode()))
    assert {k:len(v) for k,v in load_splits('d').items()}==dict(train=40, validation=20, test=10)
    for name in ('train','dev'): Path(f'd/{name}.csv').unlink()
    Path('d/test.TSV.gz').unlink()
    assert sum(len(v) for v in load_splits('d').values())==70

@pytest.mark.parametrize('kind', [list, datasets.Dataset.from_list])
def test_random_rows_of_each_split(kind):
    d = labelled(dict(train=kind(split(60)), test=kind(split(30))))
    few = d.sample(5)
    assert [len(r) for r in (few.train, few.valid, few.test)]==[5,5,5] and len(d.train)==54 and type(few.train) is type(d.train)
    assert [*few.train]==[*d.sample(5).train]!=[*d.sample(5, seed=1).train] and [*few.train]!=[*d.train][:5]
    assert len(d.sample(1000).test)==30

def test_digits_are_sorted_as_numbers():
    assert labelled(dict(train=split(labels=('1','10','2')), test=split(labels=('2',)))).names==['1','2','10']

@pytest.mark.parametrize('rows,says', [
    (split(labels=('a', 1)), "holds names, such as 'a', and numbers, such as 1"),
    (split(labels=(['a','b'],)), "holds a list, where an example has one label, in the row"),
    (split(labels=({'a':1},)), "neither a name nor a number"),
    ([*split(), dict(text=None, label='bad')], "column 'text' holds no text in the row {'text': None"),
    ([*split(), dict(text=7, label='bad')], "column 'text' holds 7, where the model reads text, in the row {'text': 7"),
    ([*split(), dict(label='bad')], "column 'text' holds no text in the row {'label': 'bad'}"),
    ([dict(tokens=['a','b'], tags=['X'])]*20, "column 'tokens' holds 2 words for 1 tags in the row {'tokens': ['a', 'b']"),
    ([dict(tokens=['a','b'], label='XY')]*20, "holds one label for a list of words in the row"),
    ([dict(tokens=['a'], pos=['b'], tags=['X'])]*20, "have columns tokens, pos, tags; name the one"),
    (split(9), "9 rows to train on are too few to hold some out")])
def test_rows_that_cannot_be_used(rows, says):
    with pytest.raises(DataError) as e: labelled(dict(train=rows, test=rows))
    assert says in str(e.value) and '\n' not in str(e.value) and len(str(e.value))<400

def test_a_class_that_the_training_rows_do_not_name():
    named = datasets.Dataset.from_list(split(labels=(0,1))).cast_column('label', datasets.ClassLabel(names=['no','yes']))
    with pytest.raises(DataError, match="holds a label that is none of the 2 classes in the row"): labelled(dict(train=named, test=split()))

def test_the_first_row_may_be_empty():
    d = labelled(dict(train=[dict(tokens=[], tags=[]), *[dict(tokens=['a'], tags=['X'])]*20], test=[dict(tokens=['a'], tags=['Y'])]))
    assert (d.kind, d.inputs, d.names)==('tags', ('tokens',), ['X','Y'])
    rows = [dict(a=None, label=0), *[dict(a='x', label=1)]*20]
    with pytest.raises(DataError, match='holds no text'): labelled(dict(train=rows, test=rows))

def test_an_index_error_in_a_row_is_no_end():
    def encode(x): raise IndexError(x)
    for keep in (True, False):
        with pytest.raises(IndexError): list(_Encoded([1,2], encode, keep))

# Which class is which

def floats(labels): Path('r.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in split(40, labels))); return 'r.jsonl'

def heads(*names): return bert(id2label=dict(enumerate(names)), label2id={n:i for i,n in enumerate(names)})

def classes(names, labels):
    "(labels in the column, names, note) after a head with these names was loaded."
    d = labelled(dict(train=split(labels=labels), test=split(labels=labels)))
    load_task_model(heads(*names), d)
    return d.values,d.names,d.note

def test_names_are_matched_whatever_their_case():
    assert classes(('POSITIVE','Not_Sure','NEGATIVE'), ('negative','not sure','positive'))==(
        ['positive','not sure','negative'], ['POSITIVE','Not_Sure','NEGATIVE'], '')
    assert classes(('10','9'), ('9','10'))[0]==['10','9']
    assert classes(('A','a'), ('A','a'))[0]==['A','a'] # they differ by case alone

@pytest.mark.parametrize('labels', [('positive','negative'), ('pos','negative'), ('pos','other')])
def test_names_of_which_some_agree_are_refused(labels):
    with pytest.raises(ModelError, match='which is which cannot be told') as e: classes(('pos','neg'), labels)
    assert 'pos, neg' in str(e.value) and '\n' not in str(e.value)

def test_numbers_stand_for_the_labels_of_a_head_without_names():
    three = 'LABEL_0','LABEL_1','LABEL_2'
    values,names,note = classes(three, (2,1))
    assert values[1:]==[1,2] and names==['0','1','2'] and note=='classes are taken by number: 1 is LABEL_1, 2 is LABEL_2'
    assert classes(three, (0,1,2))==([0,1,2], ['0','1','2'], '')
    assert 'in order: 1 is LABEL_0, 2 is LABEL_1, 3 is LABEL_2' in classes(three, (1,2,3))[2]
    with pytest.raises(ModelError, match='has a head for 3 labels; the examples have 2'): classes(three, (2,3))

def test_whole_numbers_are_classes_where_the_head_has_classes():
    args = '--data', floats((0.,1.)), '--split', 'all'
    said = hedgehog('evaluate', bert(), *args)
    assert said.stdout.startswith('accuracy ') and "accuracy on 40 examples, 2 classes in 'label' from 'text'" in said.stderr
    assert hedgehog('evaluate', bert(num_labels=1), *args).stdout.startswith('spearman ')
    floats((0.,.5)); assert "column 'label' holds fractions, such as 0.5" in fails('evaluate', bert(), *args)
    floats([float(i) for i in range(30)]); assert '30 different numbers' in fails('evaluate', bert(), *args)
    floats((0.,1.))
    args = '--data', 'r.jsonl', '--label-column', 'label', '--metric', 'accuracy', '--adapt-epochs', .1
    assert 'accuracy on 2' in hedgehog('linearize', bert(BertModel), *args, '--out', 'out', *FEW).stderr

def test_a_head_of_several_labels_at_once_is_refused():
    assert 'multi_label_classification' in fails('evaluate', bert(problem_type='multi_label_classification'), '--data', reviews(), '--label-column', 'stars')

def test_evaluate_says_which_columns_and_classes_it_reads():
    said = hedgehog('evaluate', heads('negative','positive'), '--data', reviews(), '--label-column', 'stars', '--metric', 'f1')
    assert "f1 of 'good' on 4 examples, 2 classes in 'stars' from 'text'" in said.stderr and said.stdout.startswith("f1 of 'good' ")
    assert 'matched in order: bad is negative, good is positive' in said.stderr

def test_words_that_are_cut_are_counted():
    rows = [dict(tokens=WORDS[:10], tags=['X','Y']*5)]*30
    Path('t.json').write_text(json.dumps(rows))
    bert(BertForTokenClassification, id2label={0:'X', 1:'Y'}, label2id=dict(X=0, Y=1))
    said = hedgehog('evaluate', 'bert', '--data', 't.json', '--split', 'all', '--max-length', 6)
    assert '180 words have no token among the first 6' in said.stderr # two of the six are special
    assert 'no token' not in hedgehog('evaluate', 'bert', '--data', 't.json', '--split', 'all').stderr

def test_the_command_that_measures_again_names_what_was_measured():
    Path('new.tsv').write_text(Path(reviews()).read_text())
    said = hedgehog('linearize', bert(), '--data', 'reviews.tsv', '--eval-data', 'new.tsv', '--label-column', 'stars', '--out', 'out', *FEW).stderr
    use = next(l for l in said.splitlines() if 'evaluate out' in l).split()[1:]
    assert use[:6]==['evaluate','out','--data','new.tsv','--split','all']
    assert json.loads(hedgehog(*use, '--json').stdout)['value']==pytest.approx([r for r in rows_of('out') if r['metric']=='accuracy'][-1]['value'])

@pytest.mark.parametrize('rows,b,steps,passes', [(81,32,3,1), (81,32,6,2), (81,32,4,1+32/81), (8,8,1,1), (72,8,2,16/72)])
def test_passes_are_counted_in_rows(rows, b, steps, passes):
    assert _passes(rows, b, steps)==pytest.approx(passes)

def test_the_column_of_labels_may_have_any_name():
    from PIL import Image
    picture = lambda i: Image.frombytes('RGB', (16,16), random.Random(i).randbytes(768))
    ds = datasets.Dataset.from_list([dict(img=picture(i), coarse_label=0, fine_label=i%2) for i in range(24)])
    for c,names in (('fine_label',['ant','bee']), ('coarse_label',['insect'])): ds = ds.cast_column(c, datasets.ClassLabel(names=names))
    datasets.DatasetDict(train=ds, test=ds).save_to_disk('insects')
    ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4, id2label={0:'bee', 1:'ant'}, label2id=dict(bee=0, ant=1))).save_pretrained('vit')
    ViTImageProcessorPil(size=dict(height=16, width=16)).save_pretrained('vit')
    assert 'columns img, coarse_label, fine_label; name the one that holds the labels (--label-column)' in fails('evaluate', 'vit', '--data', 'insects')
    args = '--data', 'insects', '--label-column', 'fine_label'
    hedgehog('linearize', 'vit', *args, '--eval-data', 'insects', '--map', 'elu', '--out', 'out', *FEW)
    for split,n in (('test',24), ('all',48)):
        assert json.loads(hedgehog('evaluate', 'out', *args, '--split', split, '--json').stdout)['examples']==n

# Padding

@pytest.mark.parametrize('config', [GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=24, n_positions=64, initializer_range=.3, pad_token_id=5),
    transformers.LlamaConfig(**SIZE, vocab_size=24, initializer_range=.3, pad_token_id=5)], ids=['gpt2','llama'])
def test_logits_of_a_text_do_not_depend_on_its_batch(config):
    bert(folder='gpt')
    f = Path('gpt/tokenizer_config.json')
    f.write_text(json.dumps({**json.loads(f.read_text()), 'padding_side':'left', 'pad_token':None, 'eos_token':'[SEP]'}))
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained('gpt')
    reviews()
    d = load_labelled('reviews.tsv', label='stars')
    model,tok,_ = load_task_model('gpt', d)
    assert (tok.pad_token, tok.padding_side, model.config.pad_token_id)==('[SEP]', 'right', tok.pad_token_id)
    task = Task(d, tok)
    for convert in (False, True):
        if convert: said_of(model)
        (one,_),(many,_) = (task.predict(model, task.train, b) for b in (1,60))
        torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-4)

# Attention dropout

def said_of(model, **kw):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        linearize(model, **kw)
    return [str(w.message) for w in said if 'hedgehog_nb' in str(w.message)]

def test_attention_dropout_that_is_lost_is_said_once(tmp_path):
    from hedgehog_nb.models.loading import load_linearized, save_linearized
    said = said_of(model := BertModel(BertConfig(**SIZE, vocab_size=9, attention_probs_dropout_prob=.25)))
    assert len(said)==1 and said[0].startswith('hedgehog_nb: attention dropout of 0.25 is lost in 2 layers') and '\n' not in said[0]
    assert 'lost in 1 layer,' in said_of(BertModel(BertConfig(**SIZE, vocab_size=9)), layers='1')[0]
    save_linearized(model, tmp_path/'m')
    with warnings.catch_warnings(record=True) as said: warnings.simplefilter('always'); load_linearized(tmp_path/'m')
    assert not [w for w in said if 'dropout' in str(w.message)] # nothing is lost again

@pytest.mark.parametrize('make,lost', [(lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=9, attn_pdrop=.3)), .3),
    (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=9, attn_pdrop=0., resid_pdrop=.2)), 0),
    (lambda: BertModel(BertConfig(**SIZE, vocab_size=9, attention_probs_dropout_prob=0., hidden_dropout_prob=.2)), 0),
    (lambda: ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4)), 0),
    (lambda: ViTForImageClassification(ViTConfig(**SIZE, image_size=16, patch_size=4, attention_probs_dropout_prob=.15)), .15),
    (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE, vocab_size=9, attention_dropout=.4)), .4)],
    ids=['gpt2','gpt2 without','bert without','vit','vit with','llama with'])
def test_attention_dropout_by_architecture(make, lost):
    said = said_of(make())
    assert [f'dropout of {lost:g} is' in s for s in said]==([True] if lost else [])

def test_the_plan_of_a_language_model_says_it_too(recwarn):
    from hedgehog_nb.data.models import load_embedded
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=512, n_positions=64)).save_pretrained('gpt2')
    load_embedded()[1].save_pretrained('gpt2')
    r = hedgehog('linearize', 'gpt2', '--data', 'embedded', '--out', 'out', '--seq-len', 32, '--distill-steps', 1, '--finetune-steps', 0, '--eval-tokens', 64,
        '--recipe', 'paper')
    assert r.stderr.count('attention dropout of 0.1 is lost in 2 layers')==1 and not [w for w in recwarn if 'dropout' in str(w.message)]
