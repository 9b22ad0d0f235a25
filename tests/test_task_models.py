"Models with a head for labels through the command line: classes, pairs, tags and images; runs that were stopped; what is refused; attention dropout."
import json, os, random, warnings
from pathlib import Path
import pytest
from typer.testing import CliRunner
from hedgehog_nb.cli import app

pytestmark = pytest.mark.processes

torch = pytest.importorskip('torch')
pytest.importorskip('sklearn')
import transformers
from transformers import (AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig,
    BertForSequenceClassification, BertForTokenClassification, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification,
    ViTImageProcessorPil)
from hedgehog_nb import linearize
from hedgehog_nb.models.attention import linear_layers

SIZE = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
FEW = '--distill-steps 2 --finetune-steps 2 --batch-size 8'.split()
WORDS = [f'w{i}' for i in range(20)]

@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path

def hedgehog(*args, code=0, **kw):
    r = CliRunner().invoke(app, [str(a) for a in args], prog_name='hedgehog', **kw)
    assert r.exit_code==code, (r.stdout, r.stderr, r.exception)
    return r

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

# What is refused

@pytest.mark.parametrize('option,fits', [('--distill-tokens 9','--distill-epochs'), ('--finetune-tokens 9','--epochs'), ('--adapt-tokens 9','--adapt-epochs'),
    ('--seq-len 64','--max-length'), ('--align-tokens 9','not aligned'), ('--align-lr 0.1','not aligned'), ('--long-blocks 2','not joined'),
    ('--block-bos','as its tokenizer does'), ('--no-block-bos','as its tokenizer does'), ('--patience 2','--epochs'), ('--last-state','its last state'),
    ('--lora-rank 2','all weights'), ('--lora-targets query','all weights'), ('--grad-accum 2','--batch-size'), ('--eval-tokens 9','all examples'),
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
