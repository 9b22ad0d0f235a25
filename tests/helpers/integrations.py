"""Converted models among the tools that people bring: `PYTHONPATH=tests python -m helpers.integrations` tries each and writes `results/integrations.json`.

A case takes a `Subject`, a model in its two forms, and fails where a tool does not do with the converted one what it does with any model.
What a case returns is what to know of it, or the `Refusal` that it met. Cases whose package is not installed are left out; HEDGEHOG_MODELS adds real models."""
import functools, importlib.metadata, json, os, subprocess, sys, tempfile, time, warnings
from pathlib import Path
import torch, transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification, pipeline
from hedgehog_nb.data.models import load_model
from hedgehog_nb.data.text import load_texts, token_blocks
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import finetune
from hedgehog_nb.training.saving import load_trained, save_trained
from helpers.training import adapted
from helpers.tiny_models import VOCAB, bert, shake, vit

WORDS = [f'w{i}' for i in range(VOCAB-5)]
TEXTS = {'decoder': ['Once upon a time, there was a little girl', 'Lily saw a big dog.', 'Tom'], 'encoder': ['w3 w9 w4', 'w7 w8', 'w1 w2 w3 w4 w5 w6']}

def _bert():
    from transformers import BertTokenizerFast
    return bert(), BertTokenizerFast(vocab={w:i for i,w in enumerate(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]',*WORDS])})

class Subject:
    "A model before and after its conversion, on disk; every call loads anew."
    def __init__(self, name, kind, make, work):
        self.name,self.kind,self.work = name,kind,Path(work)/name
        self.soft,self.lin = self.work/'softmax',self.work/'converted'
        model,self.tok = make()
        model.save_pretrained(self.soft)
        self.texts = ['A small dog runs.', 'Rain', 'The judge read the long letter twice.'] if name=='minilm-l6-v2' else TEXTS.get(kind)
        if self.tok: self.tok.save_pretrained(self.soft)
        soft = run(model, self.inputs())
        save_linearized(shake(linearize(model)), self.lin, self.tok)
        self.want = run(model, self.inputs()) # of the model that was never on disk
        differ(self.want, soft)
        same(run(self.model(), self.inputs()), self.want)
        if kind!='decoder': same(run(AutoModel.from_pretrained(self.lin), self.inputs()), run(model.base_model, self.inputs()))

    def model(self, **kw): return load_linearized(self.lin, **kw)
    def softmax(self, **kw): return AutoModelForCausalLM.from_pretrained(self.soft, **kw)
    def new(self, name):
        "A path where nothing is yet."
        return Path(tempfile.mkdtemp(dir=self.work))/name
    def blocks(self, n=16, T=24): return token_blocks(load_texts('embedded'), self.tok, T, max_tokens=n*T, seed=0)
    def inputs(self):
        if self.kind=='vision': return dict(pixel_values=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
        return dict(self.tok(self.texts, return_tensors='pt', padding=True))

SUBJECTS = {'stories260k': ('decoder', lambda: load_model('embedded')), 'tiny BERT': ('encoder', _bert), 'tiny ViT': ('vision', lambda: (vit(), None))}
REAL = {n: (kind, functools.partial(load_model, Path(os.environ.get('HEDGEHOG_MODELS', ''))/folder))
    for n,kind,folder in (('smollm2-135m','decoder','smollm2-135m-instruct'), ('minilm-l6-v2','encoder','minilm-l6-v2')) if os.environ.get('HEDGEHOG_MODELS')}

CASES,SLOW = {},set()
def case(tool, what, kind, needs='transformers', real=True, slow=False, **kw):
    "Register a case: tool, what is done with it, the models it is for, the package it needs, whether it is tried on real models too, whether it takes minutes."
    def add(f):
        CASES[tool, what, kind] = functools.partial(f, **kw),needs,real
        if slow: SLOW.add((tool, what, kind))
    return add

def installed(package):
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return ''

# --- what is compared

@torch.no_grad()
def run(model, x): return next(o for k,o in model.eval()(**x).items() if k in ('logits','last_hidden_state'))

def same(a, b, tol=1e-4):
    assert a.shape==b.shape, f"{tuple(a.shape)} in place of {tuple(b.shape)}"
    apart = (a.float()-b.float()).abs().max()
    assert apart <= tol*max(1, b.abs().max()), f"{tuple(a.shape)} differs by {apart:.2g}"

def differ(a, b): assert a.shape==b.shape and not torch.allclose(a, b, atol=1e-3), "nothing changed"

def linear(model, like): assert len(linear_layers(model))==len(linear_layers(like))>0, "the maps are gone"

def greedy(model, x, n=8):
    "Ids written one by one, each by a forward pass over all that is there: no cache, no generate."
    ids,ends = x,model.generation_config.eos_token_id
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:,-1:].argmax(-1)], 1)
            if len(ids)==1 and ids[0,-1] in (ends if isinstance(ends, list) else [ends]): break
    return ids

class Refusal(str): "The words by which a tool, or a use of it, is refused as a whole."

def refused(error, *words, do):
    "The `Refusal` that something meets."
    try: do()
    except error as e:
        assert all(w in str(e) for w in words), str(e)
        return Refusal(' '.join(str(e).split()))
    raise AssertionError("was not refused")

# --- pipelines

@case('pipeline', 'text-generation', 'decoder')
def _(s):
    m = s.model(); pipe,options = pipeline('text-generation', model=str(s.lin)),dict(max_new_tokens=8, do_sample=False, return_full_text=False)
    alone = [pipe(t, **options)[0]['generated_text'] for t in s.texts]
    for t,got in zip(s.texts, alone):
        x = s.tok(t, return_tensors='pt').input_ids
        want = s.tok.decode(greedy(m, x)[0,x.shape[1]:], skip_special_tokens=True)
        assert got==want, (got, want)
    assert [o[0]['generated_text'] for o in pipe(s.texts, batch_size=3, **options)]==alone

@case('pipeline', 'fill-mask', 'encoder', real=False)
def _(s):
    x = s.tok('w3 w9 [MASK] w4', return_tensors='pt'); p = run(s.model(), x)[0,3].softmax(-1)
    best = pipeline('fill-mask', model=str(s.lin))('w3 w9 [MASK] w4', top_k=1)[0]
    assert best['token']==p.argmax() and abs(best['score']-p.max())<1e-5

@case('pipeline', 'feature-extraction', 'encoder')
def _(s):
    got = pipeline('feature-extraction', model=str(s.lin))(s.texts)
    for t,g in zip(s.texts, got): same(torch.tensor(g), run(AutoModel.from_pretrained(s.lin), s.tok(t, return_tensors='pt')))

def _classify(s, task, auto, pick):
    torch.manual_seed(0)
    m = auto.from_pretrained(s.lin, num_labels=3); d = s.new('m')
    same(run(m.base_model, s.inputs()), run(s.model().base_model, s.inputs()))
    m.save_pretrained(d); s.tok.save_pretrained(d)
    for t,got in zip(s.texts, pipeline(task, model=str(d))(s.texts)): pick(run(m, s.tok(t, return_tensors='pt'))[0].softmax(-1), got)
    linear(auto.from_pretrained(d), m)

@case('pipeline', 'text-classification', 'encoder')
def _(s):
    def pick(p, got): assert got['label']==f'LABEL_{p.argmax()}' and abs(got['score']-p.max())<1e-5
    _classify(s, 'text-classification', AutoModelForSequenceClassification, pick)

@case('pipeline', 'token-classification', 'encoder')
def _(s):
    def pick(p, got): assert [g['entity'] for g in got]==[f'LABEL_{i}' for i in p.argmax(-1)[1:-1].tolist()]
    _classify(s, 'token-classification', AutoModelForTokenClassification, pick)

@case('pipeline', 'image-classification', 'vision')
def _(s):
    from PIL import Image
    image = Image.fromarray((torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))*255).byte().numpy())
    read = transformers.ViTImageProcessor(size=dict(height=16, width=16))
    best = pipeline('image-classification', model=s.model(), image_processor=read)(image, top_k=1)[0]
    p = run(s.model(), read(image, return_tensors='pt'))[0].softmax(-1)
    assert best['label']==f'LABEL_{p.argmax()}' and abs(best['score']-p.max())<1e-5

# --- training

def _train(s, model, data, trainer=transformers.Trainer, args=transformers.TrainingArguments, steps=4, resume=None, **kw):
    args = args(output_dir=str(s.new('run')), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=2, report_to='none',
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, seed=0, **kw)
    t = trainer(model=model, args=args, train_dataset=data)
    t.train(resume_from_checkpoint=resume)
    return t

def _rows(s):
    if s.kind=='vision':
        x = s.inputs()['pixel_values']
        return [dict(pixel_values=x[i%2], labels=i%2) for i in range(16)]
    if s.kind=='decoder': return [dict(input_ids=b, labels=b) for b in s.blocks()]
    x = s.tok(s.texts, padding=True)
    return [dict({k:v[i%3] for k,v in x.items()}, labels=i%2) for i in range(16)]

def _trainer(s):
    def made():
        if s.kind!='encoder': return s.model()
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(s.lin, num_labels=2)
    x,m = s.inputs(),made(); before = run(m, x); same(run(m.base_model, x), run(s.model().base_model, x))
    t = _train(s, m, _rows(s)); want = run(m.cpu(), x); differ(want, before)
    end,half = (Path(t.args.output_dir)/f'checkpoint-{i}' for i in (4, 2))
    same(run(load_linearized(end), x), want)
    if s.kind=='vision': return # a softmax ViT does not resume to the same weights either
    again = made(); _train(s, again, _rows(s), resume=str(half)); same(run(again, x), want)
for k in ('decoder','encoder','vision'): case('Trainer', 'train, save, load, resume', k, real=k=='encoder')(_trainer)

@case('Trainer', 'gradient_checkpointing', 'decoder', real=False)
def _(s):
    a,b = s.model(),s.model(); x = s.inputs()
    _train(s, a, _rows(s)); _train(s, b, _rows(s), gradient_checkpointing=True)
    same(run(a, x), run(b, x))

@case('trl', 'SFTTrainer', 'decoder', 'trl', real=False)
def _(s):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    data = Dataset.from_dict(dict(text=load_texts('embedded', 'validation')[:16])); m,x = s.model(),s.inputs(); before = run(m, x)
    t = _train(s, m, data, functools.partial(SFTTrainer, processing_class=s.tok), functools.partial(SFTConfig, max_length=32, bf16=False)); want = run(m, x)
    differ(want, before); same(run(load_linearized(Path(t.args.output_dir)/'checkpoint-4'), x), want)

@case('trl', 'SFTTrainer(packing=True)', 'decoder', 'trl', real=False)
def _(s):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    data = Dataset.from_dict(dict(text=load_texts('embedded', 'validation')[:64]))
    return refused(ValueError, 'sequences', do=lambda: _train(s, s.model(), data, functools.partial(SFTTrainer, processing_class=s.tok),
        functools.partial(SFTConfig, max_length=256, packing=True, bf16=False)))

@case('datasets', 'streaming: distill, finetune', 'decoder', 'datasets')
def _(s):
    from datasets import load_dataset
    (d := s.new('data')).mkdir()
    rows = s.blocks(32)
    (d/'rows.jsonl').write_text('\n'.join(json.dumps(dict(input_ids=b, labels=b)) for b in rows.tolist()))
    stream = lambda: load_dataset('json', data_files=str(d/'rows.jsonl'), split='train', streaming=True, cache_dir=str(d/'cache'))
    a,b = s.model(),s.model()
    assert distill(a, torch.utils.data.DataLoader(stream().with_format('torch'), batch_size=4), 4).losses==distill(b, list(rows.split(4)), 4).losses
    finetune(a, stream(), 2, 4); finetune(b, rows[:8].split(4), 2)
    same(run(a, s.inputs()), run(b, s.inputs()))

# --- peft

def _adapted(s, config, base=None):
    import peft
    m = peft.get_peft_model(base or s.model(), config)
    with torch.no_grad():
        for n,p in m.named_parameters():
            if p.requires_grad: p += .05*torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    return m

def _lora(s, **kw):
    import peft
    x = s.inputs(); m = _adapted(s, peft.LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM', **kw)); want = run(m, x)
    differ(want, run(s.model(), x))
    loss = m(**x, labels=x['input_ids']).loss; loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    m.save_pretrained(d := s.new('adapters'))
    if not kw: same(run(AutoModelForCausalLM.from_pretrained(d), x), want) # transformers does not read the magnitudes of DoRA, of no model
    same(run(peft.PeftModel.from_pretrained(s.model(), d), x), want)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(d)
    same(run(again, x), want); linear(again.get_base_model(), s.model())
    whole = m.merge_and_unload(); same(run(whole, x), want)
    whole.save_pretrained(d := s.new('merged')); same(run(load_linearized(d), x), want)
    if not kw: return
    m = _adapted(s, peft.LoraConfig(r=4, target_modules='all-linear', task_type='CAUSAL_LM', **kw), s.softmax()); m.save_pretrained(d := s.new('softmax'))
    if not torch.allclose(run(AutoModelForCausalLM.from_pretrained(d), x), run(m, x), atol=1e-2):
        return "through peft; transformers' own from_pretrained does not read DoRA's magnitudes, of a softmax model either"
case('peft', 'LoRA: train, save, AutoPeft, merge', 'decoder', 'peft')(_lora)
case('peft', 'DoRA: train, save, AutoPeft, merge', 'decoder', 'peft', use_dora=True)(_lora)
case('peft', 'rsLoRA, PiSSA', 'decoder', 'peft', real=False, use_rslora=True, init_lora_weights='pissa')(lambda s, **kw: _pissa(s, **kw))

def _pissa(s, **kw):
    import peft
    x = s.inputs(); m = peft.get_peft_model(s.model(), peft.LoraConfig(r=4, target_modules=['q_proj'], task_type='CAUSAL_LM', **kw))
    same(run(m, x), run(s.model(), x), 1e-3); same(run(m.merge_and_unload(), x), run(s.model(), x), 1e-3)

@case('peft', 'add_lora: adapters and maps', 'decoder', 'peft', real=False)
def _(s):
    m = adapted(s.model(), s.blocks(), 2, 4, lora=dict(r=4, target_modules='all-linear')); want = run(m, s.inputs())
    save_trained(m, d := s.new('trained')); same(run(load_trained(s.softmax(), d), s.inputs()), want)

@case('peft', 'prompt tuning', 'decoder', 'peft', real=False)
def _(s):
    import peft
    x = s.inputs(); m = _adapted(s, peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4))
    with torch.no_grad():
        soft,own = m.get_prompt(len(x['input_ids'])),m.get_base_model()
        embedded = torch.cat([soft, own.get_input_embeddings()(x['input_ids'])], 1)
        want = own(inputs_embeds=embedded, attention_mask=nn.functional.pad(x['attention_mask'], (4,0), value=1)).logits
    same(run(m, x), want)

@case('peft', 'prefix tuning', 'decoder', 'peft', real=False)
def _(s):
    import peft
    m = _adapted(s, peft.PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4))
    return refused(ValueError, 'as keys and values', do=lambda: run(m, s.inputs()))

@case('peft', 'adapters before linearize', 'decoder', 'peft', real=False)
def _(s):
    import peft
    return refused(ValueError, 'merge', do=lambda: linearize(peft.get_peft_model(s.softmax(), peft.LoraConfig(r=2, target_modules=['q_proj']))))

# --- accelerate

@case('accelerate', 'prepare, backward, save_model', 'decoder', 'accelerate', real=False)
def _(s):
    from accelerate import Accelerator
    acc = Accelerator(cpu=True); m,data = s.model(),s.blocks(8); opt = torch.optim.AdamW(m.parameters(), 1e-3)
    wrapped,opt,load = acc.prepare(m, opt, torch.utils.data.DataLoader(data, batch_size=4)); before = run(s.model(), s.inputs())
    for b in load:
        loss = wrapped(input_ids=b, labels=b).loss; acc.backward(loss); opt.step(); opt.zero_grad()
    want = run(acc.unwrap_model(wrapped), s.inputs()); differ(want, before)
    acc.unwrap_model(wrapped).save_pretrained(d := s.new('m'), is_main_process=acc.is_main_process, save_function=acc.save)
    same(run(load_linearized(d), s.inputs()), want)

@case('accelerate', 'cpu_offload', 'decoder', 'accelerate')
def _(s):
    from accelerate import cpu_offload
    m = cpu_offload(s.model(), execution_device=torch.device('cpu')); same(run(m, s.inputs()), run(s.model(), s.inputs()))
    x = s.tok(s.texts[0], return_tensors='pt').input_ids; write = lambda m: m.generate(x, max_new_tokens=4, do_sample=False)
    assert torch.equal(write(m), write(s.model()))

@case('accelerate', 'disk_offload', 'decoder', 'accelerate')
def _(s):
    from accelerate import disk_offload
    m = s.model(); d = s.new('offloaded'); d.mkdir(); disk_offload(m, str(d), execution_device=torch.device('cpu'))
    same(run(m, s.inputs()), run(s.model(), s.inputs()))

@case('accelerate', "from_pretrained(device_map='auto')", 'decoder', 'accelerate')
def _(s): same(run(AutoModelForCausalLM.from_pretrained(s.lin, device_map='auto').cpu(), s.inputs()), run(s.model(), s.inputs()))

# --- sentence-transformers

ENCODE = '''
import sys, torch
{}
from sentence_transformers import SentenceTransformer
try: print('loaded', len(SentenceTransformer(sys.argv[1], device='cpu', local_files_only=True).encode(['w1 w2'])))
except Exception as e: print(type(e).__name__, ' '.join(str(e).split()))
'''

@case('sentence-transformers', 'encode, save, load', 'encoder', 'sentence-transformers')
def _(s):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    body = Transformer(str(s.lin)); st = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device='cpu')
    got = torch.tensor(st.encode(s.texts)); m = AutoModel.from_pretrained(s.lin)
    for t,g in zip(s.texts, got): same(g, run(m, s.tok(t, return_tensors='pt'))[0].mean(0))
    st.save_pretrained(str(d := s.new('st'))); same(torch.tensor(SentenceTransformer(str(d), device='cpu').encode(s.texts)), got)
    def tell(first):
        p = subprocess.run([sys.executable, '-W', 'ignore', '-c', ENCODE.format(first), str(d)], capture_output=True, text=True, env=os.environ)
        return p.stdout.strip().splitlines()[-1]
    assert tell('import hedgehog_nb.models').startswith('loaded')
    alone = tell(''); assert alone.startswith('ValueError') and 'hedgehog_nb' in alone, alone
    return 'without the import: ' + alone.split(' This could')[0]

@case('sentence-transformers', 'train', 'encoder', 'sentence-transformers', real=False)
def _(s):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    body = Transformer(str(s.lin)); st = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())], device='cpu')
    before = torch.tensor(st.encode(s.texts))
    data = Dataset.from_dict(dict(a=s.texts*4, b=s.texts[::-1]*4, score=[.1,.9,.5]*4))
    args = SentenceTransformerTrainingArguments(str(s.new('run')), max_steps=3, per_device_train_batch_size=4, report_to='none', use_cpu=True, save_steps=3,
        learning_rate=1e-3, disable_tqdm=True)
    SentenceTransformerTrainer(st, args, data, loss=CosineSimilarityLoss(st)).train()
    after = torch.tensor(st.encode(s.texts)); differ(after, before)
    same(torch.tensor(SentenceTransformer(str(Path(args.output_dir)/'checkpoint-3'), device='cpu').encode(s.texts)), after)

# --- evaluation

@case('lm-eval', 'loglikelihood, rolling, generate_until', 'decoder', 'lm_eval')
def _(s):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    m,ask = s.model(),[('Once upon a time', ', there was a little girl'), ('Lily saw', ' a big dog.'), ('Tom', ' and Lily went to the park')]
    for given in (m, str(s.lin)):
        lm = HFLM(pretrained=given, tokenizer=s.tok, backend='causal', device='cpu', batch_size=3, add_bos_token=False)
        plain = lambda t: s.tok(t, add_special_tokens=False).input_ids
        for (ll,best),(a,b) in zip(lm.loglikelihood([Instance('loglikelihood', {}, a, i) for i,a in enumerate(ask)]), ask):
            n,x = len(plain(a)),torch.tensor([plain(a+b)]); p = run(m, dict(input_ids=x))[0,n-1:-1].log_softmax(-1)
            want = p.gather(-1, x[0,n:,None]).sum().item()
            assert abs(ll-want)<1e-2 and bool(best)==bool((p.argmax(-1)==x[0,n:]).all()), (ll, want)
        wanted = [Instance('generate_until', {}, (a, dict(until=['.'], max_gen_toks=8, do_sample=False)), i) for i,(a,_) in enumerate(ask)]
        for text,(a,_) in zip(lm.generate_until(wanted), ask):
            x = torch.tensor([plain(a)])
            assert text==s.tok.decode(greedy(m, x)[0,x.shape[1]:], skip_special_tokens=True).split('.')[0], text
        rolling = lm.loglikelihood_rolling([Instance('loglikelihood_rolling', {}, ('Lily saw a big dog.',), 0)])[0]
        x = torch.tensor([[lm.prefix_token_id, *lm.tok_encode('Lily saw a big dog.')]])
        want = run(m, dict(input_ids=x))[0,:-1].log_softmax(-1).gather(-1, x[0,1:,None]).sum().item()
        assert abs(rolling-want)<1e-2, (rolling, want)

# --- compilers

@case('torch', 'compile: forward, backward', 'decoder', 'torch', real=False, slow=True)
def _(s):
    a,b,x = s.model(),s.model(),dict(input_ids=s.blocks(2), use_cache=False); fast = torch.compile(b)
    with torch.no_grad(): same(fast(**x).logits, a(**x).logits)
    for m,f in ((a,a),(b,fast)): f(**x, labels=x['input_ids']).loss.backward()
    for (n,p),q in zip(a.named_parameters(), b.parameters()): same(q.grad, p.grad, 1e-3)

@case('torch', 'compile: generate', 'decoder', 'torch', real=False, slow=True)
def _(s):
    m = s.model(); x = s.tok(s.texts[0], return_tensors='pt').input_ids; want = greedy(m, x)
    m.forward = torch.compile(m.forward, dynamic=True)
    assert torch.equal(m.generate(x, max_new_tokens=8, do_sample=False, eos_token_id=None), want)

@case('torch', 'export, any batch and length', 'decoder', 'torch', real=False)
def _(s):
    class Logits(nn.Module):
        def __init__(self, m): super().__init__(); self.m = m
        def forward(self, x): return self.m(input_ids=x, use_cache=False).logits
    m = s.model(); D = torch.export.Dim.AUTO
    program = torch.export.export(Logits(m), (s.blocks(2, 24),), dynamic_shapes=({0:D, 1:D},))
    torch.export.save(program, d := s.new('m.pt2')); program = torch.export.load(d).module()
    for shape in ((2,24), (5,40), (3,7)): x = s.blocks(*shape); same(program(x), run(m, dict(input_ids=x)))

# --- weights that come in another form

def _gguf(model, tok, path):
    "The embedded model as a GGUF file, in float32, as llama.cpp writes a Llama."
    import gguf
    c,w = model.config,gguf.GGUFWriter(str(path), 'llama')
    w.add_context_length(c.max_position_embeddings); w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers); w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads); w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps); w.add_rope_freq_base(10000.); w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model('llama'); w.add_token_list(tok.convert_ids_to_tokens(range(len(tok))))
    w.add_token_scores([0.]*len(tok)); w.add_token_types([1]*len(tok))
    w.add_bos_token_id(1); w.add_eos_token_id(2)
    names = {'model.embed_tokens':'token_embd', 'model.norm':'output_norm', 'lm_head':'output'}
    part = dict(q_proj='attn_q', k_proj='attn_k', v_proj='attn_v', o_proj='attn_output',
        gate_proj='ffn_gate', up_proj='ffn_up', down_proj='ffn_down', input_layernorm='attn_norm', post_attention_layernorm='ffn_norm')
    for n,p in model.named_parameters():
        n = n.removesuffix('.weight'); *_,last = n.split('.')
        if last in ('q_proj','k_proj'): # llama.cpp rotates neighbouring pairs
            heads = c.num_attention_heads if last=='q_proj' else c.num_key_value_heads
            p = p.view(heads, 2, -1, p.shape[-1]).transpose(1, 2).reshape(p.shape)
        w.add_tensor(f"{names[n] if n in names else f'blk.{n.split(chr(46))[2]}.{part[last]}'}.weight", p.detach().numpy())
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

@case('gguf', 'from a .gguf file', 'decoder', 'gguf')
def _(s):
    x,file = s.inputs(),s.new('m.gguf')
    if s.name in REAL: file = REAL[s.name][1].args[0] # it is a GGUF file
    else: _gguf(s.softmax(), s.tok, file)
    m = load_model(file)[0]; same(run(m, x), run(s.softmax(), x))
    shake(linearize(m)); same(run(m, x), run(s.model(), x))
    save_linearized(m, s.work/'from-gguf', overwrite=True); same(run(load_linearized(s.work/'from-gguf'), x), run(s.model(), x))

def _quantised(s, config, saves=True):
    "Convert a quantised model, distil its maps, finetune adapters beside it, save and load; its body stays quantised throughout."
    config = config(); x,made = s.inputs(),lambda: s.softmax(quantization_config=config)
    m,forms = linearize(made()),lambda m: {n:(type(l), type(l.weight), l.weight.dtype) for n,l in m.named_modules() if n.endswith('_proj')}
    kept = forms(m); assert all(nn.Linear is not a or b is not nn.Parameter for a,b,_ in kept.values())
    losses = distill(m, list(s.blocks(32).split(8)), 4, lr=.02).losses; assert losses[-1]<losses[0]
    want = run(m, x); assert want.isfinite().all()
    if saves:
        save_linearized(m, d := s.new('m')); again = load_linearized(d); same(run(again, x), want)
        assert forms(again)==kept
        save_linearized(again, d := s.new('again')); same(run(load_linearized(d), x), want)
    words = refused(ValueError, 'quantised weights are not trained', do=lambda: finetune(m, s.blocks(), 2, 4))
    tuned = adapted(m, s.blocks(), 2, 4, lora=dict(r=4, target_modules='all-linear')); want = run(tuned, x)
    save_trained(tuned, d := s.new('trained')); same(run(tuned, x), want); same(run(load_trained(made(), d, merge=False), x), want)
    refused(ValueError, 'rounded again', do=lambda: load_trained(made(), d))
    return '' if saves else 'save_linearized is refused: '+refused(ValueError, 'not serializable', do=lambda: save_linearized(m, s.new('m'))).split(' - ')[0]

def _ao():
    from torchao.quantization import Int8WeightOnlyConfig
    return transformers.TorchAoConfig(Int8WeightOnlyConfig())

def _nf4(): return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)
def _int8(): return transformers.BitsAndBytesConfig(load_in_8bit=True)
def _quanto(): return transformers.QuantoConfig(weights='int8')

case('bitsandbytes', '4 bits, QLoRA', 'decoder', 'bitsandbytes', config=_nf4)(_quantised)
case('bitsandbytes', '8 bits, LoRA', 'decoder', 'bitsandbytes', real=False, config=_int8)(_quantised)
case('torchao', 'int8 weights, LoRA', 'decoder', 'torchao', real=False, config=_ao)(_quantised)
case('optimum-quanto', 'int8 weights, LoRA', 'decoder', 'optimum-quanto', real=False, config=_quanto, saves=False)(_quantised)

# --- all of it

def examine(key, subject):
    "The row of results of one case on one model."
    f,needs,_ = CASES[key]; tool,what,kind = key
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        note = f(subject) or ''
    return dict(experiment='integrations', model=subject.name, data='few rows', variant='hedgehog', metric='works', value=int(not isinstance(note, Refusal)),
        tool=tool, what=what, package=needs, version=installed(needs), note=note.replace(str(subject.work), 'folder'))

def planned(kind, real):
    "The cases for one model."
    return [k for k,(_,needs,big) in CASES.items() if k[2]==kind and (big or not real) and installed(needs)]

def main():
    from hedgehog_nb.results import results_folder, write_results
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    start,rows,bad = time.time(),[],[]
    with tempfile.TemporaryDirectory() as work:
        for subjects,real in ((SUBJECTS, False), (REAL, True)):
            for name in subjects:
                keys = planned(subjects[name][0], real)
                s = Subject(name, *subjects[name], work) if keys else None
                for k in keys:
                    if len(sys.argv)>1 and not any(a in ' '.join([*k, name]) for a in sys.argv[1:]): continue
                    t = time.time()
                    try: rows.append(examine(k, s)); said = rows[-1]['note']
                    except Exception as e:
                        bad.append(k); said = f"FAILED {type(e).__name__}: {' '.join(str(e).split())[:300]}"
                        if len(sys.argv)>1: import traceback; traceback.print_exc()
                    print(f"{time.time()-t:6.1f} s  {name:<14} {k[0]:<22} {k[1]:<40} {said}", flush=True)
    if bad: sys.exit(f"{len(bad)} failed")
    if len(sys.argv)>1: return
    write_results(results_folder()/'integrations.json', rows, command='PYTHONPATH=tests python -m helpers.integrations', wall_s=time.time()-start, device='cpu')

if __name__=='__main__': main()
