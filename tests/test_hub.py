"Converted models among the tools of Hugging Face: Auto classes, pipelines, Trainer, peft, the hub, an evaluation harness."
import copy, json, pickle, shutil, subprocess, sys
from pathlib import Path
import pytest, torch, transformers
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline
import hedgehog_nb.models.hub as hub
import hedgehog_nb.models.loading as lin
from hedgehog_nb.data.models import load_model
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from helpers.tiny_models import VOCAB, bert, llama, shake, tokens, vit

pytestmark = pytest.mark.processes


@torch.no_grad()
def scores(model, x): return model(input_ids=x)[0]

def same(a, b): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

@pytest.fixture(scope='module')
def stories():
    model,tok = load_model('embedded')
    return shake(linearize(model)),tok

@pytest.fixture(scope='module')
def words(tmp_path_factory):
    "A tokenizer of words for the tiny BERT."
    (d := tmp_path_factory.mktemp('words')/'vocab.txt').write_text('\n'.join(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*(f'w{i}' for i in range(VOCAB-5))]))
    return transformers.BertTokenizerFast(vocab={w:i for i,w in enumerate(d.read_text().split())})

@pytest.fixture(scope='module')
def folders(stories, words, tmp_path_factory):
    "Converted models on disk: a decoder, an encoder, an image classifier."
    d = tmp_path_factory.mktemp('saved')
    return dict(stories=save_linearized(stories[0], d/'stories', stories[1], card=dict(license='mit', data='TinyStories')),
        bert=save_linearized(shake(linearize(bert())), d/'bert', words), vit=save_linearized(shake(linearize(vit())), d/'vit'))

# --- without this package

ALONE = '''
import json, sys, transformers
from transformers import AutoConfig, AutoModel, pipeline
transformers.logging.set_verbosity_error()
said = {}
for folder,cls,task in json.loads(sys.argv[1]):
    loads = dict(config=lambda: AutoConfig.from_pretrained(folder), auto=lambda: AutoModel.from_pretrained(folder),
        own=lambda: getattr(transformers, cls).from_pretrained(folder),
        pipe=lambda: pipeline(task, model=folder))
    for name,load in loads.items():
        try: load(); said[f'{cls}, {name}'] = 'loaded'
        except Exception as e: said[f'{cls}, {name}'] = f'{type(e).__name__}: {e}'
print(json.dumps([any(m.startswith('hedgehog_nb') for m in sys.modules), said]))
'''

def test_transformers_alone_refuses_and_names_the_package(folders):
    what = [(str(folders[n]),c,t) for n,c,t in (('stories','LlamaForCausalLM','text-generation'), ('bert','BertForMaskedLM','fill-mask'),
        ('vit','ViTForImageClassification','image-classification'))]
    out = subprocess.run([sys.executable, '-c', ALONE, json.dumps(what)], capture_output=True, text=True, check=True)
    here,said = json.loads(out.stdout.splitlines()[-1])
    assert not here and len(said)==12 and all(v.startswith('ValueError') and 'hedgehog_nb' in v for v in said.values()), said

def test_its_own_class_stops_with_the_package_too(folders):
    with pytest.raises(ValueError, match='hedgehog_nb.load_linearized'): transformers.LlamaForCausalLM.from_pretrained(folders['stories'])

# --- Auto classes

@pytest.mark.parametrize('name,auto', [('stories',AutoModelForCausalLM), ('bert',AutoModelForMaskedLM)])
def test_auto_classes_load_what_was_saved(folders, name, auto):
    want,got = load_linearized(folders[name]),auto.from_pretrained(folders[name])
    a,b = want.state_dict(),got.state_dict()
    assert type(got) is type(want) and a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a) and linear_layers(got).keys()==linear_layers(want).keys()
    same(scores(got, tokens()), scores(want, tokens()))
    assert AutoConfig.from_pretrained(folders[name]).hedgehog==want.config.hedgehog==got.config.hedgehog

@pytest.mark.parametrize('name', ['stories','bert'])
def test_heads_come_and_go(folders, name, tmp_path):
    whole,body = load_linearized(folders[name]),AutoModel.from_pretrained(folders[name])
    same(scores(body, tokens()), scores(whole.base_model, tokens()))
    new = AutoModelForSequenceClassification.from_pretrained(folders[name], num_labels=3)
    assert new.config.num_labels==3 and len(linear_layers(new))==len(linear_layers(whole))
    for m in linear_layers(new).values(): assert not torch.equal(m.feature_map.w_q[0], m.feature_map.w_q[1])      # the saved maps, not new ones
    save_linearized(body, tmp_path/'body')
    again = {'stories':AutoModelForCausalLM, 'bert':AutoModelForMaskedLM}[name].from_pretrained(tmp_path/'body')  # a head over a body saved without one
    same(scores(again.base_model, tokens()), scores(body, tokens()))

def test_options_of_from_pretrained(folders):
    model = AutoModelForCausalLM.from_pretrained(folders['stories'], dtype=torch.bfloat16, device_map='cpu')
    assert model.dtype==torch.bfloat16 and all(p.dtype==torch.float32 for m in linear_layers(model).values() for p in m.feature_map.parameters())
    with pytest.raises(ValueError, match='loaded from its folder'): AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folders['stories']))
    with pytest.raises(ValueError, match='AutoModelForMaskedLM cannot load'): AutoModelForMaskedLM.from_pretrained(folders['stories'])

def test_other_models_load_as_ever(tmp_path):
    llama().save_pretrained(tmp_path/'plain')
    assert not linear_layers(AutoModelForCausalLM.from_pretrained(tmp_path/'plain'))

def test_folders_of_before_still_load(folders, tmp_path):
    "Without a type and a lock of their own, as `save_pretrained` wrote them."
    shutil.copytree(folders['stories'], tmp_path/'old')
    cfg = json.loads((tmp_path/'old'/'config.json').read_text())
    (tmp_path/'old'/'config.json').write_text(json.dumps({**{k:v for k,v in cfg.items() if k not in ('attn_implementation','base_model_type')},
        'model_type':cfg['base_model_type']}))
    same(scores(load_linearized(tmp_path/'old'), tokens()), scores(load_linearized(folders['stories']), tokens()))

# --- saving, whoever does it

def test_save_pretrained_writes_what_save_linearized_writes(folders, stories, tmp_path):
    model,tok = stories
    model.save_pretrained(tmp_path/'m'); tok.save_pretrained(tmp_path/'m')
    for f in folders['stories'].iterdir(): assert f.read_bytes()==(tmp_path/'m'/f.name).read_bytes(), f.name
    assert len(list((tmp_path/'m').iterdir()))==len(list(folders['stories'].iterdir()))
    with pytest.raises(ValueError, match='push_to_hub'): model.save_pretrained(tmp_path/'n', push_to_hub=True)

@pytest.mark.parametrize('twin', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
def test_copies_save_themselves(twin, tmp_path):
    model = shake(linearize(llama())); other = twin(model)
    with torch.no_grad():
        for m in linear_layers(other).values(): m.feature_map.w_q += 1
    other.save_pretrained(tmp_path/'other')
    same(scores(load_linearized(tmp_path/'other'), tokens()), scores(other, tokens()))
    assert not torch.allclose(scores(other, tokens()), scores(model, tokens()))

def test_other_processes_leave_the_files_to_the_first(tmp_path):
    model = linearize(llama()); model.save_pretrained(tmp_path/'m')
    before = {f.name:f.read_bytes() for f in (tmp_path/'m').iterdir()}
    model.save_pretrained(tmp_path/'m', is_main_process=False)
    assert json.loads((tmp_path/'m'/'config.json').read_text())==json.loads(before['config.json'])

# --- the card

def test_the_card_says_what_was_done(folders, tmp_path):
    card = ModelCard.load(folders['stories']/'README.md')
    assert card.data.license=='mit' and card.data.library_name=='hedgehog_nb'
    assert card.data.pipeline_tag=='text-generation' and 'linear-attention' in card.data.tags
    for part in ('| data | TinyStories |', '| linear layers | 0, 1, 2, 3, 4 |', 'load_linearized', 'transformers alone cannot load it'):
        assert part in card.text
    assert ModelCard.load(folders['vit']/'README.md').data.pipeline_tag is None
    again = save_linearized(load_linearized(folders['stories']), tmp_path/'m', card=dict(steps=7))
    assert (again/'README.md').read_text()==(folders['stories']/'README.md').read_text().replace('| data | TinyStories |',
        '| data | TinyStories |\n| steps | 7 |')

@pytest.mark.parametrize('name,known', [('EleutherAI/pythia-14m',True), ('/home/someone/models/pythia',False), ('./pythia',False), ('',False)])
def test_the_card_names_models_of_the_hub_alone(name, known, tmp_path):
    model = llama(); model.config._name_or_path = model.name_or_path = name
    save_linearized(linearize(model, form='exp'), tmp_path/'m')
    card = ModelCard.load(tmp_path/'m'/'README.md')
    assert card.data.base_model==(name if known else None) and ('someone' in str(card))==False and '| attention | hedgehog, form=exp |' in card.text
    save_linearized(load_linearized(tmp_path/'m'), tmp_path/'n')                                                  # known still, though loaded from a folder
    assert ModelCard.load(tmp_path/'n'/'README.md').data.base_model==card.data.base_model

def test_a_card_written_by_hand_stays(tmp_path):
    model = linearize(llama()); model.save_pretrained(tmp_path/'m')
    (tmp_path/'m'/'README.md').write_text('# Mine')
    model.save_pretrained(tmp_path/'m')
    assert (tmp_path/'m'/'README.md').read_text()=='# Mine'

# --- the hub

def test_push_to_hub_sends_the_folder_with_its_card(monkeypatch, stories):
    sent = {}
    class Api:
        def __init__(self, token=None): sent['token'] = token
        def create_repo(self, repo_id, **kw): sent.update(kw); return type('Url', (), dict(repo_id=f'someone/{repo_id}'))
        def upload_folder(self, repo_id, folder_path, **kw):
            folder = Path(folder_path)
            sent.update(kw, repo_id=repo_id, files={f.name for f in folder.iterdir()}, type=json.loads((folder/'config.json').read_text())['model_type'],
                card=(folder/'README.md').read_text())
            return 'done'
    monkeypatch.setattr(hub, 'HfApi', Api)
    assert stories[0].push_to_hub('stories', private=True, token='t')=='done'
    assert sent['repo_id']=='someone/stories' and sent['private'] and sent['token']=='t' and sent['type']=='hedgehog_nb' and 'load_linearized' in sent['card']
    assert sent['files']=={'config.json','generation_config.json','model.safetensors','README.md'}

def test_models_of_the_hub_load_by_name(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(lin, 'snapshot_download', lambda name, **kw: asked.append((name,kw)) or str(folders['stories']))
    assert linear_layers(load_linearized('someone/stories', revision='main')) and asked==[('someone/stories',dict(revision='main'))]
    monkeypatch.undo()
    with pytest.raises(ValueError, match='no model of the hub that can be reached'): load_linearized('someone/stories')

# --- pipelines

def test_text_generation(folders, stories):
    model,tok = stories
    x = tok('Once upon a time', return_tensors='pt')
    want = tok.decode(model.generate(**x, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True)
    for m in (dict(model=model, tokenizer=tok), dict(model=str(folders['stories']))):
        pipe = pipeline('text-generation', **m)
        assert pipe('Once upon a time', max_new_tokens=12, do_sample=False)[0]['generated_text']==want
        assert [o[0]['generated_text'] for o in pipe(['Once upon a time','Lily'], max_new_tokens=12, do_sample=False, batch_size=2)][0]==want

def test_fill_mask_and_features(folders, words):
    model = load_linearized(folders['bert'])
    text = 'w3 w9 [MASK] w4'; x = words(text, return_tensors='pt')
    with torch.no_grad(): p = model(**x).logits[0,3].softmax(-1)
    for m in (dict(model=model, tokenizer=words), dict(model=str(folders['bert']))):
        best = pipeline('fill-mask', **m)(text, top_k=1)[0]
        assert best['token']==p.argmax() and best['score']==pytest.approx(p.max().item(), rel=1e-4)
    features = torch.tensor(pipeline('feature-extraction', model=str(folders['bert']))(text))
    with torch.no_grad(): same(features, model.bert(**x)[0])

# --- Trainer

def trainer(model, folder, steps, **kw):
    data = [dict(input_ids=x, labels=x) for x in tokens(16, 12)]
    args = transformers.TrainingArguments(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=2,
        report_to='none', disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False, seed=0, **kw)
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data)

@pytest.mark.parametrize('make', [llama,bert])
def test_trainer_saves_and_resumes(make, tmp_path):
    model = shake(linearize(make()))
    t = trainer(model, tmp_path/'run', 4); t.train()
    half,end = tmp_path/'run'/'checkpoint-2',tmp_path/'run'/'checkpoint-4'
    for d in (half, end):
        assert {'config.json','model.safetensors','README.md'} <= {f.name for f in d.iterdir()}
        assert json.loads((d/'config.json').read_text())['model_type']=='hedgehog_nb'
    same(scores(load_linearized(end), tokens()), scores(model.eval(), tokens()))
    other = shake(linearize(make()))
    trainer(other, tmp_path/'again', 4).train(resume_from_checkpoint=str(half))
    same(scores(other.eval(), tokens()), scores(model, tokens()))

def test_trainer_brings_back_the_best(tmp_path):
    model = shake(linearize(llama()))
    t = trainer(model, tmp_path, 4, eval_strategy='steps', eval_steps=2, load_best_model_at_end=True, metric_for_best_model='loss')
    t.train()
    same(scores(model.eval(), tokens()), scores(load_linearized(t.state.best_model_checkpoint), tokens()))

# --- peft

@pytest.fixture
def adapted(folders):
    peft = pytest.importorskip('peft')
    return peft.get_peft_model(load_linearized(folders['stories']), peft.LoraConfig(r=4, target_modules=['q_proj','v_proj'], task_type='CAUSAL_LM'))

def test_lora_wraps_trains_and_merges(adapted, folders, tmp_path):
    x = tokens(); before = scores(load_linearized(folders['stories']), x)
    same(scores(adapted.eval(), x), before)
    assert {n.split('.')[-3] for n,p in adapted.named_parameters() if p.requires_grad}=={'lora_A','lora_B'}
    opt = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        opt.zero_grad(); loss = adapted(input_ids=x, labels=x).loss; loss.backward(); opt.step(); losses.append(loss.item())
    assert losses[-1]<losses[0]
    want = scores(adapted, x); assert not torch.allclose(want, before)
    writes = lambda m: m.generate(input_ids=x[:1], max_new_tokens=5, do_sample=False, use_cache=True)
    text = writes(adapted)
    merged = adapted.merge_and_unload()
    same(scores(merged, x), want); assert torch.equal(writes(merged), text) and len(linear_layers(merged))==5
    merged.save_pretrained(tmp_path/'merged')
    assert json.loads((tmp_path/'merged'/'config.json').read_text())['model_type']=='hedgehog_nb'
    same(scores(load_linearized(tmp_path/'merged'), x), want)

def test_adapters_are_saved_alone_and_found_again(adapted, folders, tmp_path):
    import peft
    with torch.no_grad():
        for n,p in adapted.named_parameters():
            if 'lora_B' in n: p.normal_(0, .1)
    adapted.save_pretrained(tmp_path/'adapter')
    assert 'model.safetensors' not in {f.name for f in (tmp_path/'adapter').iterdir()}
    want = scores(adapted.eval(), tokens())
    same(scores(peft.PeftModel.from_pretrained(load_linearized(folders['stories']), tmp_path/'adapter').eval(), tokens()), want)
    same(scores(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval(), tokens()), want)

# --- lm-evaluation-harness

TEXTS = [('Once upon a time', ', there was a little girl'), ('Lily saw', ' a big dog.'), ('Tom', ' and Lily went to the park to play with a ball')]

def by_hand(model, tok, context, continuation):
    "The log likelihood of a continuation, and whether greedy decoding gives it; one text at a time."
    c = tok(context, add_special_tokens=False).input_ids; x = torch.tensor([c + tok(context+continuation, add_special_tokens=False).input_ids[len(c):]])
    p = scores(model, x)[0].log_softmax(-1)[len(c)-1:-1]; y = x[0,len(c):]
    return p.gather(-1, y[:,None]).sum().item(), bool((p.argmax(-1)==y).all())

def test_likelihoods_in_a_batch_as_harnesses_ask_for_them(stories):
    "Padded at the right, without a mask: a causal model owes nothing to what comes later."
    model,tok = stories
    xs = [tok(c+d, add_special_tokens=False).input_ids for c,d in TEXTS]; T = max(map(len, xs))
    p = scores(model, torch.tensor([x+[0]*(T-len(x)) for x in xs])).log_softmax(-1)
    for row,x,(c,d) in zip(p, xs, TEXTS):
        n = len(tok(c, add_special_tokens=False).input_ids)
        got = row[n-1:len(x)-1].gather(-1, torch.tensor(x[n:])[:,None]).sum().item()
        assert got==pytest.approx(by_hand(model, tok, c, d)[0], abs=1e-3)

@pytest.mark.parametrize('given', ['model','folder'])
def test_lm_evaluation_harness(given, stories, folders):
    hf = pytest.importorskip('lm_eval.models.huggingface', reason='lm_eval is not installed')
    from lm_eval.api.instance import Instance
    model,tok = stories
    lm = hf.HFLM(pretrained=model if given=='model' else str(folders['stories']), tokenizer=tok, backend='causal',
        device='cpu', batch_size=3, add_bos_token=False)
    got = lm.loglikelihood([Instance('loglikelihood', {}, a, i) for i,a in enumerate(TEXTS)])
    for (ll,greedy),(c,d) in zip(got, TEXTS):
        want = by_hand(model, tok, c, d)
        assert ll==pytest.approx(want[0], abs=1e-3) and bool(greedy)==want[1]
    text = lm.generate_until([Instance('generate_until', {}, ('Once upon a time', dict(until=['.'], max_gen_toks=12, do_sample=False)), 0)])[0]
    x = tok('Once upon a time', add_special_tokens=False, return_tensors='pt').input_ids
    want = tok.decode(model.generate(input_ids=x, max_new_tokens=12, do_sample=False)[0,x.shape[1]:], skip_special_tokens=True)
    assert text==want.split('.')[0]
