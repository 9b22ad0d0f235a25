"Finetuning on a teacher's logits: its loss, its teachers, logits on disk."
import copy, math
import pytest, torch, transformers
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForQuestionAnswering, BertForSequenceClassification
from transformers import BertForTokenClassification
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.evaluate import perplexity
from hedgehog_nb.training.finetune import add_lora, finetune
from hedgehog_nb.training.teacher import as_softmax, load_logits, ModelTeacher, store_logits, teacher_kl, top_k, TopK
from helpers.tiny_models import VOCAB, bert, corpus, gpt2, llama, shake, vit
from helpers.training import OnStep

BLOCKS = corpus(8)
LORA = dict(r=2, target_modules='all-linear')

def made(make=llama, **kw): return shake(linearize(make(layers=2), **kw))

def kl(z, t, temperature=1.):
    "Per position, by PyTorch."
    z,t = (x.double()/temperature for x in (z, t))
    return F.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction='none').sum(-1)*temperature**2

@torch.no_grad()
def logits(model, **x): return model(**x).logits

def same(a, b):
    a,b = a.state_dict(),b.state_dict()
    return a.keys()==b.keys() and all(torch.equal(x, b[n]) for n,x in a.items())

def pad(left, extra=0):
    "A collator that pads on one side."
    def collate(batch):
        n = max(len(r['input_ids']) for r in batch)+extra
        put = lambda v: [0]*(n-len(v))+v if left else v+[0]*(n-len(v))
        ids = [r['input_ids'] for r in batch]
        return dict(input_ids=torch.tensor([put(x) for x in ids]), attention_mask=torch.tensor([put([1]*len(x)) for x in ids]))
    return collate

class Stop(Exception): pass

def stop_at(at):
    def stop(step, *_):
        if step==at: raise Stop
    return OnStep(stop)

# --- the loss

@pytest.mark.parametrize('temperature', [.5,1.,3.])
@pytest.mark.parametrize('shape', [(7,VOCAB), (2,5,VOCAB), (1,1,2), (3,700,5000)])
def test_loss_and_gradient_are_pytorchs(shape, temperature):
    "The last shape is more than one chunk."
    z,t = torch.randn(shape, dtype=torch.float64, requires_grad=True),torch.randn(shape, dtype=torch.float64)
    ok = torch.rand(shape[:-1])<.7; ok.view(-1)[0] = True
    got,want = teacher_kl(z, t, ok, temperature),kl(z, t, temperature)[ok].mean()
    for a,b in zip((got, *torch.autograd.grad(got, z)), (want, *torch.autograd.grad(want, z))): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)

def test_gradcheck():
    z,t = torch.randn(3, 5, dtype=torch.float64, requires_grad=True),torch.randn(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: teacher_kl(z, t, temperature=2.), z)
    kept = TopK(*top_k(t, 2), t.shape)
    assert torch.autograd.gradcheck(lambda z: teacher_kl(z, kept), z, atol=1e-4)

def test_tokens_that_the_teacher_rules_out():
    z,t = torch.randn(4, 9, requires_grad=True),torch.randn(4, 9); t[:,:3] = -math.inf
    loss = teacher_kl(z, t); loss.backward()
    p = t.softmax(-1)[:,3:]
    assert loss.item()==pytest.approx((p*(p.log()-z.log_softmax(-1)[:,3:])).sum(-1).mean().item(), rel=1e-5) and z.grad.isfinite().all()

def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r'\(2, 5, 8\), the model.s \(2, 5, 9\): another vocabulary'): teacher_kl(torch.randn(2,5,9), torch.randn(2,5,8))
    with pytest.raises(ValueError, match='other positions'): teacher_kl(torch.randn(2,5,9), torch.randn(2,4,9))

@pytest.mark.parametrize('temperature', [1.,2.])
def test_top_k_of_the_whole_vocabulary_is_the_full_loss(temperature):
    z,t = torch.randn(6, VOCAB, dtype=torch.float64, requires_grad=True),3*torch.randn(6, VOCAB)
    full = teacher_kl(z, t.double(), temperature=temperature)
    got = teacher_kl(z, TopK(*top_k(t, VOCAB, temperature), z.shape), temperature=temperature)
    for a,b in zip((got, *torch.autograd.grad(got, z)), (full, *torch.autograd.grad(full, z))): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize('k', [1,5,40])
def test_top_k_is_one_bucket_for_the_rest(k):
    z,t = torch.randn(6, VOCAB, dtype=torch.float64),3*torch.randn(6, VOCAB, dtype=torch.float64)
    p,log_q = t.softmax(-1),z.log_softmax(-1)
    top,ids = p.topk(k); r,R = 1-top.sum(-1),1-log_q.exp().gather(-1, ids).sum(-1)
    want = ((top*(top.log()-log_q.gather(-1, ids))).sum(-1)+r*(r/R).log()).mean()
    assert teacher_kl(z, TopK(*top_k(t, k), z.shape)).item()==pytest.approx(want.item(), rel=1e-4)
    assert want<=teacher_kl(z, t)

def test_peak_memory_is_one_copy_beside_the_logits(monkeypatch):
    from torch.profiler import profile, ProfilerActivity
    from hedgehog_nb.training import teacher
    monkeypatch.setattr(teacher, '_CHUNK', 2**16) # small beside these logits, as the real one is beside a language model's
    z,t,ok = torch.randn(512, 8192, requires_grad=True),torch.randn(512, 8192),torch.ones(512, dtype=torch.bool)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: teacher._kl_sum(z, t, ok, 1., reuse=True).backward()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name()=='[memory]')
    assert torch.tensor([b for _,b in events]).cumsum(0).max()<1.1*4*z.numel()

# --- teachers

@pytest.mark.parametrize('make,kw', [(llama, {}), (gpt2, {}), (bert, {}), (llama, dict(softmax_heads='0:0-1')),
    (llama, dict(attention='hedgehog-window', window=4)), (llama, dict(layers='1'))])
def test_with_adapters_off_it_is_the_original(make, kw):
    x = dict(input_ids=corpus(3), attention_mask=torch.ones(3, 24, dtype=torch.long)); x['attention_mask'][1,15:] = 0
    want = logits(make(layers=2), **x)
    tuned = add_lora(made(make, **kw), **LORA).train()
    with torch.no_grad():
        for n,p in tuned.named_parameters():
            if 'lora_B' in n or 'modules_to_save' in n: p.normal_()
    flags,modes = [p.requires_grad for p in tuned.parameters()],[m.training for m in tuned.modules()]
    got = ModelTeacher(tuned, softmax=True).target(x)
    torch.testing.assert_close(got[x['attention_mask']>0], want[x['attention_mask']>0], atol=1e-6, rtol=1e-6)
    assert flags==[p.requires_grad for p in tuned.parameters()] and modes==[m.training for m in tuned.modules()]
    assert tuned.config._attn_implementation=='hedgehog' and not torch.allclose(logits(tuned, **x), want, atol=1e-2)

def test_sliding_windows_stay():
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, sliding_window=5, initializer_range=.3)).eval()
    want = logits(model, input_ids=BLOCKS)
    with as_softmax(linearize(model)): torch.testing.assert_close(logits(model, input_ids=BLOCKS), want, atol=1e-6, rtol=1e-6)

@pytest.mark.parametrize('lora', [None, LORA])
def test_the_first_loss_is_the_distance_from_the_original(lora):
    original,model = logits(llama(layers=2), input_ids=BLOCKS),made()
    want = kl(logits(model, input_ids=BLOCKS), original)[:,:-1].mean().item()
    h = finetune(model, BLOCKS, 3, 8, lr=1e-3, warmup_ratio=0, lora=lora, objective='teacher')
    assert h.losses[0]==pytest.approx(want, rel=1e-5) and h.losses[-1]<h.losses[0]

@pytest.mark.parametrize('freeze', [True, False])
def test_no_copy_where_the_weights_are_frozen(monkeypatch, freeze):
    import hedgehog_nb.training.teacher as t
    copies = []
    monkeypatch.setattr(t, 'deepcopy', lambda m: copies.append(1) or copy.deepcopy(m))
    model = made()
    if freeze:
        for n,p in model.named_parameters(): p.requires_grad_('feature_map' in n)
    finetune(model, BLOCKS, 2, objective='teacher')
    finetune(made(), BLOCKS, 2, objective='teacher', lora=LORA)
    assert len(copies)==(not freeze)

def test_another_model_as_teacher_is_not_changed():
    teacher,model = llama(seed=3, layers=3).train(),made(); before = copy.deepcopy(teacher)
    want = kl(logits(model, input_ids=BLOCKS), logits(before.eval(), input_ids=BLOCKS))[:,:-1].mean().item()
    h = finetune(model, BLOCKS, 6, 8, lr=1e-2, warmup_ratio=0, objective='teacher', teacher=teacher)
    assert h.losses[0]==pytest.approx(want, rel=1e-5) and h.losses[-1]<h.losses[0]
    assert same(teacher, before) and teacher.training and all(p.grad is None and p.requires_grad for p in teacher.parameters())

def test_both_is_the_sum():
    of = lambda **kw: finetune(made(), BLOCKS, 1, 8, lr=1e-3, **kw).losses[0]
    a,b = of(),of(objective='teacher', temperature=2.)
    assert of(objective='both', temperature=2., teacher_weight=.3)==pytest.approx(a+.3*b, rel=1e-6)

def test_what_does_not_fit_is_said():
    other = llama(); other.resize_token_embeddings(VOCAB+3)
    model = made()
    for kw,said in ((dict(objective='logits'), "'labels', 'teacher' or 'both'; given 'logits'"), (dict(teacher=llama()), 'say objective'),
        (dict(objective='teacher', temperature=0.), 'temperature is above 0'), (dict(objective='both', teacher_weight=-1.), 'teacher_weight is above 0'),
        (dict(objective='teacher', teacher=model), 'leave teacher out'), (dict(objective='teacher', teacher='gpt2'), 'given str'),
        (dict(objective='teacher', teacher=other), r'teacher.s logits are \(8, 24, 64\), the model.s \(8, 24, 61\): another vocabulary'),
        (dict(objective='teacher', label_smoothing_factor=.1), 'raise the temperature')):
        with pytest.raises(ValueError, match=said): finetune(model, BLOCKS, 1, **kw)
    with pytest.raises(ValueError, match='not converted'): finetune(llama(), BLOCKS, 1, objective='teacher')
    with pytest.raises(TypeError, match='finetune alone has it'): distill(model, BLOCKS, 1, teacher=other)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB)
    spans = linearize(BertForQuestionAnswering(BertConfig(**small)))
    with pytest.raises(ValueError, match='BertForQuestionAnswering gives .*start_logits'):
        finetune(spans, [dict(input_ids=x, start_positions=1, end_positions=2) for x in BLOCKS], 1, objective='teacher')

# --- heads

def small(cls, **kw):
    torch.manual_seed(0)
    return shake(linearize(cls(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=VOCAB, initializer_range=.3, hidden_dropout_prob=0., attention_probs_dropout_prob=0., **kw))))

def first_loss(model, data, **kw):
    "(loss of the first step, the model's logits before it, the teacher's)"
    x = {k:torch.stack([torch.as_tensor(r[k]) for r in data]) for k in data[0] if k not in ('labels',)}
    z = logits(model.eval(), **x)
    with as_softmax(model): t = logits(model, **x)
    return finetune(model, data, 1, len(data), lr=1e-3, objective='teacher', **kw).losses[0],z,t

@pytest.mark.parametrize('pieces', [1,2])
@pytest.mark.parametrize('labels', [True, False])
def test_tokens_that_have_a_label(labels, pieces):
    y = torch.where(torch.rand(8, 24)<.2, BLOCKS, -100)
    data = [dict(input_ids=x, **(dict(labels=l) if labels else {})) for x,l in zip(BLOCKS, y)]
    for model in (small(BertForTokenClassification, num_labels=VOCAB), made(bert)):
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        loss,z,t = first_loss(model, data, gradient_accumulation_steps=pieces)
        assert loss==pytest.approx((kl(z, t)[y!=-100] if labels else kl(z, t)).mean().item(), rel=1e-5)

@pytest.mark.parametrize('labels', [True, False])
def test_rows_of_a_classifier(labels):
    data = [dict(input_ids=x, **(dict(labels=i%3) if labels else {})) for i,x in enumerate(BLOCKS)]
    loss,z,t = first_loss(small(BertForSequenceClassification, num_labels=3), data, gradient_accumulation_steps=3)
    assert loss==pytest.approx(kl(z, t).mean().item(), rel=1e-5)

def test_regression_and_several_labels():
    loss,z,t = first_loss(small(BertForSequenceClassification, num_labels=1), [dict(input_ids=x, labels=.5) for x in BLOCKS], gradient_accumulation_steps=2)
    assert loss==pytest.approx((z-t).square().mean().item(), rel=1e-5)
    data = [dict(input_ids=x, labels=torch.tensor([1.,0.,1.,0.])) for x in BLOCKS]
    model = small(BertForSequenceClassification, num_labels=4, problem_type='multi_label_classification')
    loss,z,t = first_loss(model, data, gradient_accumulation_steps=2, temperature=2.)
    two = lambda x: torch.stack([x, torch.zeros_like(x)], -1)
    assert loss==pytest.approx(kl(two(z), two(t), 2.).mean().item(), rel=1e-4)

def test_images():
    data = [dict(pixel_values=torch.randn(3,16,16), labels=i%2) for i in range(6)]
    model = made(vit)
    loss,z,t = first_loss(model, data)
    assert loss==pytest.approx(kl(z, t).mean().item(), rel=1e-5)

def test_labels_of_a_decoder():
    torch.manual_seed(0)
    make = lambda: BartForConditionalGeneration(BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCAB, max_position_embeddings=64, init_std=.3, dropout=0.,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2)).eval()
    model,teacher = make(),make()
    y = corpus(8, T=10, seed=3); y[:,7:] = -100
    data = [dict(input_ids=x, labels=l) for x,l in zip(BLOCKS, y)]
    want = kl(logits(model, input_ids=BLOCKS, labels=y), logits(teacher, input_ids=BLOCKS, labels=y))[y!=-100].mean().item()
    assert finetune(model, data, 1, 8, objective='teacher', teacher=teacher, gradient_accumulation_steps=2).losses[0]==pytest.approx(want, rel=1e-5)

# --- with everything else

@pytest.mark.parametrize('objective', ['teacher','both'])
@pytest.mark.parametrize('lora', [None, LORA])
def test_in_pieces_it_is_the_same_step(objective, lora):
    y = [torch.where(torch.arange(24)<24-5*(i%4), x, -100) for i,x in enumerate(BLOCKS)]
    runs = []
    for n in (1,3):
        model = made().double()
        runs.append((finetune(model, [dict(input_ids=x, labels=l) for x,l in zip(BLOCKS, y)], 3, 8, lr=1e-3, lora=lora, objective=objective,
            gradient_accumulation_steps=n).losses, [*model.parameters()]))
    (a,p),(b,q) = runs
    assert a==pytest.approx(b, rel=1e-6)
    for x,z in zip(p, q): torch.testing.assert_close(x, z, atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('kw', [dict(bf16=True), dict(gradient_checkpointing=True), dict(gradient_checkpointing=True, lora=LORA), dict(bf16=True, lora=LORA),
    dict(weight_decay=.1, max_grad_norm=.5)], ids=str)
def test_precision_and_checkpointing(kw):
    plain = finetune(made(), BLOCKS, 4, 8, lr=1e-3, objective='both', **{k:v for k,v in kw.items() if k not in ('bf16','gradient_checkpointing')}).losses
    got = finetune(made(), BLOCKS, 4, 8, lr=1e-3, objective='both', **kw).losses
    assert got==pytest.approx(plain, rel=.03 if 'bf16' in kw else 1e-6)

def test_padding_changes_nothing():
    rows = [dict(input_ids=x[:10+3*(i%4)].tolist()) for i,x in enumerate(BLOCKS)]
    a,*rest = (finetune(made().double(), rows, 3, 4, lr=1e-3, objective='teacher', collator=pad(*p)).losses for p in ((False,0), (False,7), (True,0), (True,5)))
    for b in rest: assert a==pytest.approx(b, rel=1e-6)

def test_evaluations_report_both_losses():
    held = corpus(5, seed=9)
    for objective in ('teacher','both'):
        model = made()
        h = finetune(model, BLOCKS, 3, 8, lr=1e-3, eval_data=held, eval_steps=3, objective=objective, keep_best=False)
        e = h.evaluations[-1]
        assert math.exp(e['label_loss'])==pytest.approx(perplexity(model, held), rel=1e-4)
        want = kl(logits(model, input_ids=held), logits(llama(layers=2), input_ids=held))[:,:-1].mean().item()
        assert e['teacher_loss']==pytest.approx(want, rel=1e-4) and e['loss']==pytest.approx(want+e['label_loss']*(objective=='both'), rel=1e-4)

def test_evaluations_without_labels():
    data = [dict(input_ids=x) for x in BLOCKS]
    seen = []
    h = finetune(small(BertForSequenceClassification, num_labels=3), data, 2, 4, eval_data=data, objective='teacher',
        compute_metrics=lambda p: seen.append(p.predictions.shape) or dict(n=len(p.predictions)))
    assert all({'loss','teacher_loss'}<=e.keys() and 'label_loss' not in e for e in h.evaluations)

@pytest.mark.parametrize('objective', ['teacher','both'])
@pytest.mark.parametrize('lora', [None, dict(LORA, lora_dropout=.1)])
@pytest.mark.parametrize('at', [2,5])
def test_killed_and_resumed_it_is_the_same(tmp_path, objective, lora, at):
    "Also where the teacher is a copy of weights that have moved on since."
    kw = dict(lr=1e-2, lora=lora, objective=objective, temperature=1.5, save_steps=2, eval_data=BLOCKS[:3], eval_steps=2)
    with pytest.raises(Stop): finetune(made(gpt2), BLOCKS, 7, 4, checkpoint=tmp_path/'a', callbacks=[stop_at(at)], **kw)
    a,b = made(gpt2),made(gpt2)
    x,y = finetune(a, BLOCKS, 7, 4, checkpoint=tmp_path/'a', **kw),finetune(b, BLOCKS, 7, 4, **kw)
    assert x.losses==y.losses and x.evaluations==y.evaluations and x.best_step==y.best_step and same(a, b)
    assert [p.name for p in tmp_path.iterdir()]==['a']

def test_another_objective_or_teacher_is_another_run(tmp_path):
    kw = dict(checkpoint=tmp_path/'a', objective='teacher', temperature=2.)
    finetune(made(), BLOCKS, 2, **kw)
    for more,said in ((dict(objective='both'), 'objective is teacher there, both here'), (dict(temperature=1.), 'temperature is 2.0 there'),
        (dict(teacher=llama(seed=5)), 'teacher is')):
        with pytest.raises(ValueError, match=said): finetune(made(), BLOCKS, 2, **{**kw, **more})
    moved = made()
    with torch.no_grad(): moved.model.norm.weight.mul_(1.5)
    with pytest.raises(ValueError, match='keeps another run: teacher is'): finetune(moved, BLOCKS, 2, **kw)

# --- stored logits

def test_stored_logits_teach_the_same(tmp_path):
    teacher = llama(seed=3)
    stored = store_logits(teacher, BLOCKS, tmp_path/'t', k=VOCAB, dtype=torch.float32, batch_size=3)
    run = lambda t: finetune(made(), BLOCKS, 6, 4, lr=1e-3, objective='teacher', teacher=t, eval_data=BLOCKS[:3]).losses
    assert run(stored)==pytest.approx(run(teacher), rel=1e-4)
    half = store_logits(teacher, BLOCKS, tmp_path/'h', k=16)
    assert (len(half), half.bytes_per_token, stored.bytes_per_token)==(8, 16*4+4, VOCAB*6+4)
    assert all(b<a*(1+1e-3) for a,b in zip(run(teacher), run(half)))
    assert all(p.suffix in ('.safetensors','.json') for p in (tmp_path/'h').iterdir())

def test_rows_are_known_by_their_tokens(tmp_path):
    stored = store_logits(llama(), BLOCKS, tmp_path/'t', k=8)
    assert finetune(made(), BLOCKS.flip(0), 2, objective='teacher', teacher=load_logits(tmp_path/'t')).losses
    with pytest.raises(ValueError, match='none of the 8 rows.*cut in the same way'): finetune(made(), corpus(4, seed=8), 2, objective='teacher', teacher=stored)
    with pytest.raises(ValueError, match='none of the'): finetune(made(), BLOCKS[:,:20], 2, objective='teacher', teacher=stored)
    with pytest.raises(ValueError, match='stored at temperature 1.0; given temperature=2'):
        finetune(made(), BLOCKS, 2, objective='teacher', teacher=stored, temperature=2.)
    big = llama(); big.resize_token_embeddings(VOCAB+3)
    with pytest.raises(ValueError, match='another vocabulary'): finetune(linearize(big), BLOCKS, 2, objective='teacher', teacher=stored)
    with pytest.raises(ValueError, match='holds no logits'): load_logits(tmp_path)

def test_stored_with_padding_and_in_pieces(tmp_path):
    rows = [dict(input_ids=x[:10+3*(i%4)].tolist()) for i,x in enumerate(BLOCKS)]
    teacher = llama(seed=3)
    stored = store_logits(teacher, rows, tmp_path/'t', k=VOCAB, dtype=torch.float32, batch_size=4, collator=pad(False))
    run = lambda t, left, n: finetune(made(), rows, 3, 4, lr=1e-3, objective='teacher', teacher=t, collator=pad(left), gradient_accumulation_steps=n).losses
    want = run(teacher, False, 1)
    for left,n in ((False,1), (True,1), (False,2)): assert run(stored, left, n)==pytest.approx(want, rel=1e-4)

def test_stored_for_classifiers(tmp_path):
    data = [dict(input_ids=x) for x in BLOCKS]
    teacher,model = (small(BertForSequenceClassification, num_labels=3) for _ in range(2))
    with torch.no_grad(): teacher.classifier.weight.mul_(2)
    stored = store_logits(teacher, data, tmp_path/'t', dtype=torch.float32)
    a,b = (finetune(copy.deepcopy(model), data, 2, objective='teacher', teacher=t).losses for t in (teacher, stored))
    assert a==pytest.approx(b, rel=1e-4)
    with pytest.raises(ValueError, match='softmax over tokens or classes'): store_logits(small(BertForSequenceClassification, num_labels=1), data, tmp_path/'r')
    pictures = [dict(pixel_values=torch.randn(3,16,16)) for _ in range(4)]
    assert finetune(made(vit), pictures, 2, objective='teacher', teacher=store_logits(vit(layers=2), pictures, tmp_path/'v')).losses

def test_storing_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    import hedgehog_nb.training.teacher as t
    teacher,calls,real = llama(),[],t.ModelTeacher.target
    def count(self, batch):
        calls.append(1)
        if len(calls)==6: raise Stop
        return real(self, batch)
    monkeypatch.setattr(t.ModelTeacher, 'target', count)
    store = lambda p, data=BLOCKS, **kw: store_logits(teacher, data, p, k=4, batch_size=1, shard_rows=2, **kw)
    with pytest.raises(Stop): store(tmp_path/'a')
    assert len([*(tmp_path/'a').glob('*.safetensors')])==2
    with pytest.raises(ValueError, match='not complete'): load_logits(tmp_path/'a')
    with pytest.raises(ValueError, match='temperature is 1.0 there, 2.0 here'): store(tmp_path/'a', temperature=2.)
    with pytest.raises(ValueError, match='other rows'): store(tmp_path/'a', data=BLOCKS.flip(0))
    before = len(calls); store(tmp_path/'a')
    assert len(calls)-before==4 # of eight rows, those that were not there
    store(tmp_path/'b')
    read = lambda p: {f.name:f.read_bytes() for f in p.iterdir()}
    assert read(tmp_path/'a')==read(tmp_path/'b')
    before = len(calls); store(tmp_path/'a'); assert len(calls)==before
