"A converted model in company: threads, caches of fixed length, other attentions, tracers, models around it."
import contextvars, copy, pickle, threading, warnings
import accelerate, datasets, peft, pytest, torch, transformers
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache
from hedgehog_nb import linear_attention, make_feature_map
from hedgehog_nb.models.interface import use_attention, capture_attention, own_attention
from hedgehog_nb.ops.softmax import softmax_attention
from hedgehog_nb.training.losses import weight_loss
from hedgehog_nb.models.attention import linear_layers, padding_mask
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.training.finetune import add_lora, finetune, merge_lora
from hedgehog_nb.training.distill import distill, teacher_pass
from hedgehog_nb.training.saving import load_trained, save_trained
from hedgehog_nb.training.evaluate import perplexity
from helpers.tiny_models import VOCAB, bert, corpus, gpt2, llama, shake, tokens, vit
from helpers.training import adapted, finetuned

FREE = dict(do_sample=False, eos_token_id=None, pad_token_id=0)

class OwnLlama(LlamaForCausalLM): "A class that transformers does not know."

def made(f=llama, double=True, layers=2, **kw): return shake(linearize((f(layers=layers).double() if double else f(layers=layers)), **kw)).eval()

@torch.no_grad()
def logits(model, x, **kw): return model(input_ids=x, **kw).logits

def same(a, b, tol=1e-10): torch.testing.assert_close(a, b, atol=tol, rtol=tol)

def at_once(*fs):
    "What each function returns, all of them run at once in threads."
    got,start = [None]*len(fs),threading.Barrier(len(fs))
    def run(i):
        start.wait()
        try: got[i] = fs[i]()
        except Exception as e: got[i] = e
    ts = [threading.Thread(target=run, args=(i,)) for i in range(len(fs))]
    for t in ts: t.start()
    for t in ts: t.join()
    for g in got:
        if isinstance(g, Exception): raise g
    return got

# --- threads

KINDS = dict(linear={}, hybrid=dict(attention='hedgehog-window', window=4), heads=dict(softmax_heads='0:0,1'))

@pytest.mark.parametrize('threads,requests,kw', [(8, 20, KINDS['linear']), (4, 4, KINDS['hybrid']), (4, 4, KINDS['heads'])], ids=KINDS)
def test_threads_that_write_with_one_model(threads, requests, kw):
    model = made(layers=1, **kw)
    prompts = [[tokens(1, 3+(7*i+j)%23, seed=20*i+j) for j in range(requests)] for i in range(threads)]
    write = lambda p: model.generate(p, max_new_tokens=6, **FREE)
    want = [[write(p) for p in ps] for ps in prompts]
    got = at_once(*(lambda ps=ps: [write(p) for p in ps] for ps in prompts))
    assert sum(torch.equal(a, b) for xs,ys in zip(want, got) for a,b in zip(xs, ys))==threads*requests

def replicas(model, n=2):
    "What `torch.nn.DataParallel` hands to its threads: shallow copies of all modules, which share config and hooks, around parameters of their own."
    mods = list(model.modules()); at,made = {m:i for i,m in enumerate(mods)},[]
    for _ in range(n):
        copies = [m._replicate_for_data_parallel() for m in mods]
        for m,c in zip(mods, copies):
            for k,x in m._modules.items(): setattr(c, k, x if x is None else copies[at[x]])
            for k,p in m._parameters.items(): setattr(c, k, p if p is None else p.clone())
            for k,b in m._buffers.items(): c._buffers[k] = b
        made.append(copies[0])
    return made

@pytest.mark.parametrize('kw', KINDS.values(), ids=KINDS)
def test_replicas_in_threads_train_as_one_model(kw):
    "DataParallel itself wants GPUs: the pieces of a batch by replicas, at once, give outputs and gradients of the whole batch."
    model,x = made(**kw),tokens(4, 12); maps = [p for m in linear_layers(model).values() for p in m.parameters()]
    whole = model(input_ids=x, use_cache=False).logits
    want = torch.autograd.grad(whole.square().sum(), maps)
    parts = at_once(*(lambda r=r, x=x: r(input_ids=x, use_cache=False).logits for r,x in zip(replicas(model), x.split(2))))
    same(torch.cat(parts), whole)
    for a,b in zip(torch.autograd.grad(torch.cat(parts).square().sum(), maps), want): same(a, b, 1e-8)

def test_two_distillations_at_once():
    make = lambda: [shake(linearize(llama(seed, layers=2))) for seed in (1, 2)]
    data = list(corpus(40).split(4)); run = lambda m: distill(m, data, steps=10, lr=.02).losses
    want,models = [run(m) for m in make()],make()
    assert at_once(*(lambda m=m: run(m) for m in models))==want

@pytest.mark.parametrize('convert', [True, False], ids=['converted','softmax'])
def test_who_looks_at_a_model_does_not_disturb_who_runs_it(convert):
    model = made() if convert else llama(layers=2).double()
    x,y = tokens(2, 9),tokens(1, 12, seed=3)
    write = lambda: [model.generate(x, max_new_tokens=8, **FREE) for _ in range(6)]
    look = lambda: [capture_attention(model, input_ids=y, use_cache=False) for _ in range(30)]
    text,calls = write(),look()
    a,b,c = at_once(write, look, look)
    assert all(torch.equal(p, q) for p,q in zip(a, text))
    for seen in (b, c): assert all(len(s)==2 and torch.equal(s[1].q, calls[0][1].q) for s in seen)
    assert own_attention(model.config)==model.config._attn_implementation==('hedgehog' if convert else 'sdpa')

def test_a_teacher_pass_beside_generation():
    model = made(); x = tokens(2, 9)
    def teach():
        seen = []
        for _ in range(15): teacher_pass(model, dict(input_ids=x), lambda m, q, k, v, causal, scale, mask, o: seen.append(o))
        return seen
    write = lambda: [model.generate(x, max_new_tokens=8, **FREE) for _ in range(6)]
    want = teach(),write()
    for got,w in zip(at_once(teach, write), want): assert len(got)==len(w) and all(torch.equal(p, q) for p,q in zip(got, w))

def test_borrowing_within_borrowing():
    model = llama(layers=2).double(); x = tokens(); want = logits(model, x)
    named = lambda name, to: lambda m, q, k, v, mask, scaling=None, **kw: (to.append(name), (softmax_attention(q, k, v, scale=scaling).transpose(1,2), None))[1]
    seen = []
    with use_attention(model.model, named('body', seen)):
        with use_attention(model, named('whole', seen)): same(logits(model, x), want)
        assert seen==['whole']*2
        same(logits(model, x), want)
    assert seen==['whole']*2+['body']*2 and model.config._attn_implementation=='sdpa' and torch.equal(logits(model, x), want)

# --- masks made before a state has its place

@pytest.mark.parametrize('name', [llama, gpt2])
@pytest.mark.parametrize('kw', [{}, dict(attention='hedgehog-window', window=4), dict(form='exp')], ids=['softmax','window','exp'])
def test_a_cache_of_fixed_length_and_padding(name, kw):
    model = made(name, **kw); short,long = tokens(1, 7),tokens(1, 15, seed=2)
    x = torch.cat([long, torch.cat([torch.zeros(1, 8, dtype=torch.long), short], 1)]); mask = (x>0).long()
    alone = model.generate(short, max_new_tokens=6, use_cache=False, **FREE)[0,-6:]
    for cache in ('dynamic','static'):
        text = model.generate(x, attention_mask=mask, max_new_tokens=6, cache_implementation=cache, disable_compile=True, **FREE)
        assert torch.equal(text[1,-6:], alone)
    pos = (mask.cumsum(-1)-1).clamp_min(0)
    room = lambda: StaticCache(config=model.config, max_cache_len=40)
    def last(pad): return logits(model, x.masked_fill(mask==0, pad), attention_mask=mask, position_ids=pos, past_key_values=room())[1,-1]
    same(last(5), last(9)); same(last(5), logits(model, short)[0,-1])

def test_a_static_cache_read_in_pieces():
    model = made(); x = tokens(2, 12); mask = torch.ones_like(x); mask[1,:3] = 0
    pos = (mask.cumsum(-1)-1).clamp_min(0)
    cache,want = StaticCache(config=model.config, max_cache_len=20),logits(model, x, attention_mask=mask, position_ids=pos, use_cache=False)
    parts = [logits(model, x[:,a:b], attention_mask=mask[:,:b], position_ids=pos[:,a:b], past_key_values=cache) for a,b in ((0,5), (5,6), (6,12))]
    same(torch.cat(parts, 1)[mask.bool()], want[mask.bool()])

# --- another attention

@pytest.mark.parametrize('attention', ['sdpa','eager'])
def test_set_to_another_attention_it_is_the_softmax_model_and_back(attention):
    soft = llama(layers=2).double(); model = linearize(copy.deepcopy(soft)); x = tokens(2, 9)
    linear = logits(model, x)
    model.set_attn_implementation(attention)
    with pytest.warns(RuntimeWarning, match="converted, and is set to '"+attention): same(logits(model, x), logits(soft, x), 1e-5) # eager rounds in fp32
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.equal(model.generate(x, max_new_tokens=8, **FREE), soft.generate(x, max_new_tokens=8, **FREE))
    model.set_attn_implementation('hedgehog')
    assert torch.equal(logits(model, x), linear)

def test_a_cache_of_one_attention_is_none_of_another():
    model = made(); x = tokens(1, 6); states,keys = DynamicCache(),DynamicCache()
    logits(model, x, past_key_values=states)
    model.set_attn_implementation('sdpa')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logits(model, x, past_key_values=keys)
        with pytest.raises(ValueError, match='holds states of linear attention'): logits(model, x, past_key_values=states)
    model.set_attn_implementation('hedgehog')
    with pytest.raises(ValueError, match='as keys and values'): logits(model, x, past_key_values=keys)

def test_attention_that_does_not_hand_down_its_arguments_is_refused(monkeypatch):
    cls = transformers.models.llama.modeling_llama.LlamaAttention; whole = cls.forward
    def narrow(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kw):
        return whole(self, hidden_states, position_embeddings, attention_mask, past_key_values)
    monkeypatch.setattr(cls, 'forward', narrow)
    model = llama()
    with pytest.raises(ValueError, match='does not hand its keyword arguments'): linearize(model)
    assert not linear_layers(model) and not any(m._forward_pre_hooks for m in model.modules())

# --- weights by the config

@pytest.mark.parametrize('name', [llama, gpt2, bert])
def test_weights_asked_for_by_the_config(name):
    model = made(name); x = tokens(); want = model(input_ids=x, output_attentions=True).attentions
    model.config.__dict__['output_attentions' if 'output_attentions' in model.config.__dict__ else '_output_attentions'] = True
    got = model(input_ids=x).attentions
    assert len(got)==2 and all(torch.equal(a, b) for a,b in zip(got, want))
    assert not model(input_ids=x, output_attentions=False).attentions

# --- tracers: values are not known while they look

@pytest.fixture
def traced():
    "A model, blocks of tokens, positions of one sequence and of two packed ones."
    x = tokens(2, 12); one = torch.arange(12).expand(2, 12).contiguous()
    return made(layers=1), x, one, torch.where(one<7, one, one-7)

class Logits(torch.nn.Module):
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x, pos=None): return self.model(input_ids=x, position_ids=pos, use_cache=False).logits

PACKED = 'linear attention takes a padding mask'

def test_compiled_without_a_mask(traced):
    model,x,one,two = traced; torch._dynamo.reset()
    c = torch.compile(Logits(model), backend='eager', fullgraph=True)
    with torch.no_grad():
        same(c(x), logits(model, x)); same(c(x, one), logits(model, x))
        with pytest.raises(RuntimeError, match=PACKED): c(x, two)
    with pytest.raises(ValueError, match=PACKED): logits(model, x, position_ids=two, use_cache=False)

def test_compiled_with_a_sliding_window():
    torch.manual_seed(0)
    m = transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=5))
    model = linearize(m.double().eval()); x = tokens(2, 12); torch._dynamo.reset()
    with torch.no_grad(): same(torch.compile(Logits(model), backend='eager', fullgraph=True)(x), logits(model, x))

@torch.no_grad()
def test_exported_without_a_mask(traced):
    model,x,one,two = traced
    same(torch.export.export(Logits(model), (x,)).module()(x), logits(model, x))
    ep = torch.export.export(Logits(model), (x, one)).module()
    same(ep(x, one), logits(model, x))
    with pytest.raises(RuntimeError, match=PACKED): ep(x, two)

@torch.no_grad()
@pytest.mark.parametrize('name,kw', [('batch',{}), ('length',{}), ('length',dict(form='softmax_joint'))])
def test_exported_for_any_batch_and_length(name, kw):
    class Masked(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x, mask): return self.model(input_ids=x, attention_mask=mask, use_cache=False).logits
    model,x = made(double=False, **kw),tokens(2, 12); mask = torch.ones_like(x); mask[1,8:] = 0
    open_ = {0 if name=='batch' else 1: torch.export.Dim.AUTO}
    ep = torch.export.export(Masked(model), (x, mask), dynamic_shapes=dict(x=open_, mask=open_)).module()
    for n in (3, 5, 90):
        y = tokens(n if name=='batch' else 2, 12 if name=='batch' else n, seed=n); mask = torch.ones_like(y); mask[1,-1] = 0
        same(ep(y, mask), logits(model, y, attention_mask=mask), 1e-5)
    with pytest.raises(ValueError, match='where the kernel in C serves it'):
        torch.export.export(Masked(made()), (x, torch.ones_like(x)), dynamic_shapes=dict(x=open_, mask=open_))

@torch.no_grad()
@pytest.mark.parametrize('double', [True, False])
def test_traced_without_a_mask(double):
    model,x = made(double=double, layers=1),tokens(2, 12)
    same(torch.jit.trace(Logits(model), (x,), strict=False, check_trace=False)(x), logits(model, x), 1e-10 if double else 1e-5)

@pytest.mark.slow
def test_gradients_compiled_where_the_batch_varies():
    "The last batch of an epoch is smaller, and from then on the batch is a symbol to the compiler."
    fm = make_feature_map('hedgehog', 8, 2).double(); torch._dynamo.reset()
    attend = lambda q: linear_attention(q, q*.5, q, fm, implementation='chunked')
    compiled = torch.compile(attend, backend='eager')
    for B in (8, 4, 2):
        q = torch.randn(B, 2, 40, 8, dtype=torch.float64, requires_grad=True)
        a,b = (torch.autograd.grad(f(q).square().sum(), (q, *fm.parameters())) for f in (attend, compiled))
        for x,y in zip(a, b): same(x, y)

def test_finetuned_and_measured_compiled():
    model,data = made(double=False),corpus(16)
    assert torch.isfinite(torch.tensor(perplexity(torch.compile(model, backend='eager'), data)))
    assert len(linear_layers(finetuned(model, data, steps=2, batch_size=4, torch_compile=True, torch_compile_backend='eager')))==2

def test_fake_tensors_have_shapes_and_no_numbers():
    "The kernel in C would read at address 0."
    with FakeTensorMode():
        q = torch.randn(1, 2, 20, 8)
        fm = make_feature_map('hedgehog', 8, 2)
        with torch.no_grad(): assert linear_attention(q, q, q, fm).shape==q.shape
        assert weight_loss(q, q, fm).shape==()

def test_the_kernel_in_c_takes_no_tensor_without_numbers():
    from hedgehog_nb.kernels.cpu.build import c_args, library
    if library()[0] is None: pytest.skip(library()[1])
    with FakeTensorMode(): x = torch.randn(3)
    with pytest.raises(ValueError, match='holds no numbers'): c_args(x)

# --- models around it

def lora(model, where='q_proj'):
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[where], task_type='CAUSAL_LM'))
    with torch.no_grad():
        for n,p in tuned.named_parameters():
            if 'lora_B' in n: p.normal_(0, .1)
    return tuned

def test_what_has_adapters_is_merged_first():
    tuned = lora(llama(layers=2))
    for m in (tuned, tuned.get_base_model()):
        with pytest.raises(ValueError, match='has an adapter of peft: merge it'): linearize(m)
    assert linear_layers(linearize(tuned.merge_and_unload()))

def test_a_peft_model_is_no_converted_model_to_save(tmp_path):
    with pytest.raises(ValueError, match='PeftModel.* around a converted model: merge the adapters first'): save_linearized(lora(made()), tmp_path/'m')

@pytest.mark.parametrize('f', [llama, gpt2, bert])
def test_a_converted_body_is_saved_with_its_head(f, tmp_path):
    whole = f(layers=2); linearize(whole.base_model); shake(whole).eval()
    whole.save_pretrained(tmp_path/'m')
    assert torch.equal(logits(load_linearized(tmp_path/'m'), tokens()), logits(whole, tokens()))
    with pytest.raises(ValueError, match='hedgehog_nb.load_linearized'): type(whole).from_pretrained(tmp_path/'m')

def test_a_body_that_gets_its_head_later_still_says_what_it_is(tmp_path):
    body = shake(linearize(llama(layers=2).model)).eval(); whole = llama(1, layers=2)
    whole.model,whole.config = body,body.config
    whole.save_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match='hedgehog_nb.load_linearized'): LlamaForCausalLM.from_pretrained(tmp_path/'m')
    assert torch.equal(logits(load_linearized(tmp_path/'m'), tokens()), logits(whole, tokens()))

def llava():
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(image_token_index=VOCAB-1,
        text_config=transformers.LlamaConfig(**small, vocab_size=VOCAB), vision_config=transformers.CLIPVisionConfig(**small, image_size=16, patch_size=8)))

def test_a_tower_is_converted_with_its_model():
    model = llava()
    with pytest.raises(ValueError, match='LlamaModel is a part of a LlavaForConditionalGeneration'): linearize(model.model.language_model)
    tower = model.model.language_model; del model
    assert len(linear_layers(linearize(tower)))==2   # it is nobody's part now

def test_a_model_around_a_converted_tower_is_not_saved_as_a_whole(tmp_path):
    model,body = llava(),linearize(llama(layers=2).model); model.model.language_model = body; model.config.text_config = body.config
    with pytest.raises(ValueError, match='a part of this LlavaForConditionalGeneration was converted'): save_linearized(model, tmp_path/'m')
    model.save_pretrained(tmp_path/'m')
    with pytest.raises(ValueError, match='a part, text_config, was converted by itself'): load_linearized(tmp_path/'m')

# --- adapters and maps trained together

def test_checkpoints_of_adapters_hold_the_maps(tmp_path):
    save_linearized(made(double=False), tmp_path/'base')
    tuned = add_lora(load_linearized(tmp_path/'base'), r=2, target_modules=['q_proj']); rows = [dict(input_ids=r, labels=r) for r in corpus(16)]
    args = transformers.TrainingArguments(str(tmp_path/'run'), max_steps=3, save_steps=3, per_device_train_batch_size=4, learning_rate=.05,
        report_to='none', use_cpu=True, disable_tqdm=True)
    transformers.Trainer(tuned, args, train_dataset=rows).train()
    want = logits(tuned.eval(), tokens())
    again = peft.PeftModel.from_pretrained(load_linearized(tmp_path/'base'), tmp_path/'run'/'checkpoint-3')
    assert torch.equal(logits(again, tokens()), want)
    with again.disable_adapter(): assert torch.equal(logits(again, tokens()), logits(load_linearized(tmp_path/'base'), tokens()))
    same(logits(merge_lora(again), tokens()), want, 1e-5)

def test_maps_and_adapters_train_and_nothing_else():
    tuned = add_lora(made(), r=2, target_modules=['q_proj'], modules_to_save=['lm_head'])
    kinds = {k: sum(k in n for n,p in tuned.named_parameters() if p.requires_grad) for k in ('lora_','feature_map.modules_to_save','lm_head.modules_to_save')}
    assert kinds=={'lora_':4, 'feature_map.modules_to_save':4, 'lm_head.modules_to_save':1}
    assert sum(kinds.values())==sum(p.requires_grad for p in tuned.parameters())
    assert not any('feature_map' in n for n,p in add_lora(llama(), r=2, target_modules=['q_proj']).named_parameters())

@pytest.mark.parametrize('kw', KINDS.values(), ids=KINDS)
def test_trained_folders_of_adapted_models(kw, tmp_path):
    tuned = adapted(made(double=False, **kw), corpus(16), steps=3, batch_size=4, lr=.05, lora=dict(r=2, target_modules=['q_proj']))
    want,x = logits(tuned, tokens()),tokens()
    save_trained(tuned, tmp_path/'t')
    same(logits(load_trained(llama(layers=2), tmp_path/'t'), x), want, 1e-5)
    same(logits(merge_lora(tuned), x), want, 1e-5)

# --- folders: what `from_pretrained` and `save_pretrained` of transformers take

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return save_linearized(made(double=False), tmp_path_factory.mktemp('own')/'m')

def test_adapters_of_a_converted_model_come_with_it(folder, tmp_path):
    tuned = lora(AutoModelForCausalLM.from_pretrained(folder)); tuned.save_pretrained(tmp_path/'a')
    for load in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM): same(logits(load.from_pretrained(tmp_path/'a'), tokens()), logits(tuned, tokens()), 1e-6)
    with pytest.raises(ValueError, match='holds adapters, not the model'): load_linearized(tmp_path/'a')

@pytest.mark.parametrize('maps', [False, True])
def test_a_whole_folder_with_its_adapter_inside(maps, tmp_path):
    save_linearized(made(double=False), tmp_path/'m'); model = load_linearized(tmp_path/'m')
    tuned = add_lora(model, r=2, target_modules=['q_proj']) if maps else lora(model)
    with torch.no_grad():
        for p in tuned.parameters():
            if p.requires_grad: p.add_(.1*torch.randn_like(p))
    tuned.save_pretrained(tmp_path/'m')
    for load in (AutoModelForCausalLM.from_pretrained, load_linearized):
        try: model = load(tmp_path/'m')
        except ValueError as e: # older versions do not read what adapters save beside themselves
            assert maps and 'peft.PeftModel.from_pretrained' in str(e) and Version(transformers.__version__)<Version('5.24')
        else: same(logits(model, tokens()), logits(tuned, tokens()), 1e-6)

def test_options_are_passed_on(folder, tmp_path):
    x,want = tokens(),logits(load_linearized(folder), tokens())
    model,info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert torch.equal(logits(model, x), want) and not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    model,info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert info['missing_keys']=={'score.weight'} and model.config.num_labels==5
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder.parent, subfolder='m'), x), want)
    for load in (AutoModelForCausalLM.from_pretrained, load_linearized): assert len(load(folder, output_attentions=True)(input_ids=x).attentions)==2
    model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path=folder, attn_implementation='hedgehog', device_map='cpu', low_cpu_mem_usage=True)
    assert torch.equal(logits(model, x), want)

@pytest.mark.parametrize('given,said', [(dict(attn_implementation='sdpa'), "set_attn_implementation"), (dict(state_dict={'a':1}), 'load_state_dict'),
    (dict(use_safetensors=False), 'nothing else is read'), (dict(no_such_thing=1), 'no_such_thing')])
def test_options_that_do_not_fit_are_refused(folder, given, said):
    for load in (AutoModelForCausalLM.from_pretrained, load_linearized):
        with pytest.raises((ValueError,TypeError), match=said): load(folder, **given)
    with pytest.raises(ValueError, match='its folder and its config alone'): AutoModelForCausalLM.from_pretrained(folder, 3)

@pytest.mark.parametrize('f,name', [(gpt2,'hidden_size'), (gpt2,'num_hidden_layers'), (llama,'rms_norm_eps'), (bert,'layer_norm_eps'), (vit,'qkv_bias')])
def test_its_config_knows_what_the_originals_knows(f, name, tmp_path):
    model = linearize(f()); model.save_pretrained(tmp_path/'m'); cfg = AutoConfig.from_pretrained(tmp_path/'m')
    assert getattr(cfg, name)==getattr(model.config, name) and copy.deepcopy(cfg).to_dict()==cfg.to_dict() and not hasattr(cfg, 'no_such_thing')

@pytest.mark.parametrize('save', [lambda m, d: m.save_pretrained(save_directory=d), lambda m, d: m.save_pretrained(d, True, m.state_dict(), False, '1MB'),
    lambda m, d: m.save_pretrained(d, max_shard_size='10KB')])
def test_save_pretrained_takes_what_it_took(save, tmp_path):
    model = made(double=False); save(model, tmp_path/'m')
    assert torch.equal(logits(load_linearized(tmp_path/'m'), tokens()), logits(model, tokens()))
    with pytest.raises(ValueError, match='push_to_hub'): model.save_pretrained(tmp_path/'n', True, None, True)
    with pytest.raises(TypeError, match='save_directory'): model.save_pretrained()

def test_classes_of_the_users_own(tmp_path):
    torch.manual_seed(0); model = shake(linearize(OwnLlama(llama(layers=2).config))).eval()
    save_linearized(model, tmp_path/'m'); x = tokens()
    for kw in ({}, dict(cls=OwnLlama)):
        again = load_linearized(tmp_path/'m', **kw)
        assert type(again) is OwnLlama and torch.equal(logits(again, x), logits(model, x))
    assert type(load_linearized(tmp_path/'m', cls=LlamaForCausalLM)) is LlamaForCausalLM
    cfg = (tmp_path/'m'/'config.json'); cfg.write_text(cfg.read_text().replace('OwnLlama', 'NobodysLlama'))
    with pytest.raises(ValueError, match='import it first, or give it'): load_linearized(tmp_path/'m')
    class OwnLlama2(LlamaForCausalLM): pass
    OwnLlama2.__name__ = 'OwnLlama'; cfg.write_text(cfg.read_text().replace('NobodysLlama', 'OwnLlama'))
    with pytest.raises(ValueError, match='give one, load_linearized'): load_linearized(tmp_path/'m')

# --- what a message says

class Picky(LlamaForCausalLM):
    "Refuses short texts, in words of its own."
    def forward(self, input_ids=None, **kw):
        if input_ids.shape[1]<8: raise ValueError('needs 8 tokens')
        return super().forward(input_ids=input_ids, **kw)

def test_a_models_own_error_says_what_to_give():
    model = Picky(llama(layers=1).config)
    with pytest.raises(ValueError, match=r'Picky did not run while its attention was looked at: ValueError, needs 8 tokens. Give `inputs`'): linearize(model)
    assert linear_layers(linearize(model, inputs=dict(input_ids=tokens(1, 9))))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_model_wholly_in_half_precision_distils(dtype):
    model = linearize(llama(layers=2)).to(dtype)
    losses = distill(model, list(corpus(96).split(8)), steps=12, lr=.02).losses
    assert all(p.dtype==torch.float32 for m in linear_layers(model).values() for p in m.feature_map.parameters())
    assert losses[-1]<losses[0] and model.dtype==dtype and logits(model, tokens()).isfinite().all()

def test_weights_in_float16_are_not_finetuned_but_adapters_are():
    model = linearize(llama(layers=2)).half()
    with pytest.raises(ValueError, match='float16 .nan at the second step.: load the model in float32'): finetune(model, corpus(16), steps=2, batch_size=4)
    assert logits(finetuned(model, corpus(16), steps=3, batch_size=4, lora=dict(r=2, target_modules=['q_proj'])), tokens()).isfinite().all()

def test_a_first_loss_that_is_not_finite_is_not_the_learning_rates():
    model = linearize(llama(layers=1))
    with torch.no_grad(): model.model.embed_tokens.weight.fill_(torch.nan)
    for train in (lambda: distill(model, [tokens()], steps=1), lambda: finetune(model, corpus(8), steps=1, batch_size=4)):
        with pytest.raises(FloatingPointError, match="step 1.*nothing was learned yet.*look at its weights"): train()

def test_streams_and_what_is_no_data():
    model,x = linearize(llama(layers=1)),corpus(16); rows = [dict(input_ids=r.tolist(), labels=r.tolist()) for r in x]
    stream = lambda: datasets.Dataset.from_list(rows).to_iterable_dataset()
    a,b = copy.deepcopy(model),copy.deepcopy(model)
    finetune(a, stream(), steps=2, batch_size=4); finetune(b, x[:8].split(4), steps=2)
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    assert len(distill(a, torch.utils.data.DataLoader(stream().with_format('torch'), batch_size=4), steps=3).losses)==3
    for data,said in ((['text'], "given a row 'text'"), (x[:0], 'Tensor. is empty'), (iter(()), 'is empty'), (7, 'given int')):
        with pytest.raises(ValueError, match=said): finetune(a, data, steps=2, batch_size=4)
    lists = torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=lambda b: dict(input_ids=[r['input_ids'] for r in b]))
    for data,said in ((lists, "given {'input_ids': 'list'}"), (['text'], "given a row 'text'"), ([dict(text='a')], 'given rows of text')):
        with pytest.raises(ValueError, match=said): distill(a, data, steps=1)

# --- loans that meet other calls

def doubled(m, q, k, v, mask, scaling=None, **kw): return softmax_attention(q, k, v*2, scale=scaling).transpose(1,2), None

def in_a_thread(f): return at_once(f)[0]

@pytest.mark.parametrize('convert', [True, False])
@pytest.mark.parametrize('twin', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy','pickle'])
def test_a_copy_made_during_a_loan_is_the_model(convert, twin):
    model = made() if convert else llama(layers=2).double(); x = tokens(); want = logits(model, x)
    with use_attention(model, doubled): copied = in_a_thread(lambda: twin(model))
    assert torch.equal(logits(copied, x), want) and torch.equal(logits(copy.deepcopy(copied), x), want)
    assert own_attention(copied.config)==model.config._attn_implementation
    if convert: assert torch.equal(copied.generate(x, max_new_tokens=4, **FREE), model.generate(x, max_new_tokens=4, **FREE))

@pytest.mark.parametrize('change', [lambda m: m.set_attn_implementation('eager'), linearize], ids=['set','linearize'])
def test_an_attention_that_is_set_during_a_loan_stays_and_the_borrower_is_told(change):
    model = llama(layers=2)
    with pytest.raises(RuntimeError, match='was set to .* while it was looked at'):
        with use_attention(model, doubled): in_a_thread(lambda: change(model))
    assert model.config._attn_implementation==('eager' if change is not linearize else 'hedgehog')
    model = made(double=False); hook = model.model.layers[0].register_forward_pre_hook(lambda *a: in_a_thread(lambda: model.set_attn_implementation('sdpa')))
    with pytest.raises(RuntimeError, match='while it was looked at'): distill(model, [tokens()], steps=1)

def test_a_loan_that_ends_elsewhere_ends():
    model = llama(layers=2); x = tokens(); want = logits(model, x)
    def lend():
        with use_attention(model, doubled): yield
    g = lend(); contextvars.copy_context().run(next, g); g.close()
    assert model.config._attn_implementation=='sdpa' and torch.equal(logits(copy.deepcopy(model), x), want)

# --- where weights lie elsewhere, and derivatives forward

@pytest.mark.parametrize('kw', KINDS.values(), ids=KINDS)
def test_offloaded_by_accelerate(kw, tmp_path):
    model,x = made(double=False, **kw),tokens(); want = logits(model, x)
    places = {'model.embed_tokens':'cpu', 'model.layers.0':'cpu', 'model.layers.1':'disk', 'model.norm':'cpu', 'lm_head':'cpu', 'model.rotary_emb':'cpu'}
    same(logits(accelerate.cpu_offload(copy.deepcopy(model), execution_device='cpu'), x), want, 1e-6)
    off = accelerate.dispatch_model(copy.deepcopy(model), places, main_device='cpu', offload_dir=tmp_path)
    same(logits(off, x), want, 1e-6)
    assert torch.equal(off.generate(x, max_new_tokens=4, **FREE), model.generate(x, max_new_tokens=4, **FREE))

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_derivatives_forward_are_not_lost(dtype):
    q,k,v,t = torch.randn(4, 1, 2, 40, 8, dtype=dtype); fm = make_feature_map('hedgehog', 8, 2).to(dtype)
    with torch.no_grad():
        with forward_ad.dual_level(): tangent = forward_ad.unpack_dual(linear_attention(q, k, forward_ad.make_dual(v, t), fm)).tangent
        same(tangent, linear_attention(q, k, t, fm), 1e-5)

# --- parts and folders that cannot say what they are

def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0)).eval()

def test_an_encoder_or_a_decoder_is_converted_with_its_model():
    model = bart()
    for part in (model.get_decoder(), model.get_encoder()):
        with pytest.raises(ValueError, match='is a part of a BartForConditionalGeneration|is a part of a BartModel'): linearize(part)
    assert len(linear_layers(linearize(model.model)))==4

def test_the_folder_that_one_is_in_and_links(tmp_path, monkeypatch):
    model = made(double=False, layers=1); save_linearized(model, tmp_path/'w'/'m')
    monkeypatch.chdir(tmp_path/'w'/'m')
    for path in ('.', tmp_path/'w'/'m', '../../w/m', tmp_path/'w'):
        with pytest.raises(ValueError, match='is where you are now'): save_linearized(model, path, overwrite=True)
    assert len(linear_layers(load_linearized('.')))==1
    monkeypatch.chdir(tmp_path); (tmp_path/'link').symlink_to(tmp_path/'w'/'m')
    before = (tmp_path/'w'/'m').stat().st_ino
    save_linearized(model, 'link', overwrite=True)
    assert (tmp_path/'link').is_symlink() and (tmp_path/'w'/'m').stat().st_ino!=before and linear_layers(load_linearized(tmp_path/'w'/'m'))
    monkeypatch.setenv('HOME', str(tmp_path/'home')); save_linearized(model, '~/m')
    assert linear_layers(load_linearized('~/m')) and sorted(p.name for p in tmp_path.iterdir())==['home','link','w']

def test_one_adapter_named_default_is_kept(tmp_path):
    tuned = peft.get_peft_model(made(), peft.LoraConfig(r=2, target_modules=['q_proj']), adapter_name='mine')
    with pytest.raises(ValueError, match="named 'default'; this model has mine"): save_trained(tuned, tmp_path/'t')
    tuned = add_lora(made(), r=2, target_modules=['q_proj']); tuned.add_adapter('b', peft.LoraConfig(r=2, target_modules=['q_proj']))
    with pytest.raises(ValueError, match="this model has default, b"): save_trained(tuned, tmp_path/'t')
    assert not (tmp_path/'t').exists()

def test_adapters_loaded_by_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations.peft, 'MIN_PEFT_VERSION', '0.18.0', raising=False) # 5.24 asks for one that is not out yet
    save_linearized(made(gpt2, double=False), tmp_path/'m')
    lora(load_linearized(tmp_path/'m'), 'c_attn').save_pretrained(tmp_path/'m')
    model = load_linearized(tmp_path/'m')
    with pytest.raises(ValueError, match='has adapters of peft loaded'): save_linearized(model, tmp_path/'s')
    model.save_pretrained(tmp_path/'m')
    assert AutoConfig.from_pretrained(tmp_path/'m').hidden_size==32
    same(logits(load_linearized(tmp_path/'m'), tokens()), logits(model, tokens()), 1e-6)

def test_heads_by_class_and_by_settings(folder):
    for kw in (dict(cls=transformers.LlamaForSequenceClassification), dict(auto=transformers.AutoModelForSequenceClassification)):
        assert load_linearized(folder, num_labels=4, **kw).score.weight.shape==(4, 32)
    body = load_linearized(folder, auto=transformers.AutoModel)
    with pytest.raises(RuntimeError, match='does not fit together'): AutoModelForCausalLM.from_pretrained(folder, vocab_size=9)
    assert type(body).__name__=='LlamaModel'

def test_a_model_is_loaded_from_a_folder():
    with pytest.raises(ValueError, match='from its folder'): load_linearized(None)

@pytest.mark.parametrize('holes', [slice(0, 4), slice(7, 11), slice(16, 20)], ids=['left','middle','right'])
def test_padding_anywhere_takes_places_in_a_window(holes):
    "Padded tokens take places: a window that reaches over everything is softmax, a short one sees as much less as there is padding in it."
    x = tokens(2, 20); mask = torch.ones_like(x); mask[:,holes] = 0; real = mask.bool()
    (wide,narrow),soft = (made(attention='hedgehog-window', window=w) for w in (20, 5)),llama(layers=2).double()
    at = lambda m: logits(m, x, attention_mask=mask, use_cache=False)
    same(at(wide)[real], at(soft)[real])
    other = torch.where(real, x, 5)
    same(at(narrow)[real], logits(narrow, other, attention_mask=mask, use_cache=False)[real])
    def oracle(module, q, k, v, m, scaling=None, **kw): # the weights themselves
        w = module.feature_map.weights(q, k, True, m)
        return (w@v.repeat_interleave(2, 1)).transpose(1,2), None
    with use_attention(narrow, oracle, padding_mask): want = at(narrow)
    same(at(narrow)[real], want[real])

# --- quantised bodies (with the quantisers themselves: test_integrations.py)

def test_adapters_stay_beside_quantised_weights(tmp_path):
    model,data = linearize(llama(layers=1)),corpus(8); model.is_quantized = True
    with pytest.raises(ValueError, match='quantised weights are not trained: finetune adapters'): finetune(model, data, steps=1)
    with pytest.raises(ValueError, match='rounded again'): finetune(model, data, steps=1, lora=dict(r=2, target_modules=['q_proj']))
    assert not any('lora_' in n for n,_ in model.named_parameters())
    model.is_quantized = False
    tuned = adapted(model, data, steps=1, batch_size=4, lora=dict(r=2, target_modules=['q_proj']))
    model.is_quantized = True
    with pytest.raises(ValueError, match='rounded again'): merge_lora(tuned)
    save_trained(tuned, tmp_path/'t')
    other = llama(layers=1); other.is_quantized = True
    with pytest.raises(ValueError, match='rounded again'): load_trained(other, tmp_path/'t')
    assert not linear_layers(other) # left as it was
    same(logits(load_trained(other, tmp_path/'t', merge=False), tokens()), logits(tuned.eval(), tokens()), 1e-6)
    same(logits(load_trained(llama(layers=1), tmp_path/'t'), tokens()), logits(tuned, tokens()), 1e-5) # the original in full precision takes them in

def test_what_was_read_in_one_direction_is_saved_as_it_is(tmp_path):
    "transformers knows no way back from the form that quantised weights are read in."
    from transformers.core_model_loading import ConversionOps, WeightConverter
    class OneWay(ConversionOps):
        def convert(self, input_dict, *args, **kw): return input_dict
    class BothWays(OneWay):
        @property
        def reverse_op(self): return BothWays()
    def read(*ops):
        model = made(); model._weight_conversions = [WeightConverter('q_proj.weight', 'q_proj.weight', operations=[*ops])]
        return model
    for i,model in enumerate((read(OneWay()), read(BothWays()))):
        was = model._weight_conversions
        save_linearized(model, tmp_path/f'{i}')
        assert model._weight_conversions is was
        same(logits(load_linearized(tmp_path/f'{i}'), tokens()), logits(model, tokens()))
    with pytest.raises(ValueError, match='cannot turn the weights'): save_linearized(read(OneWay(), BothWays()), tmp_path/'mixed')
    assert not (tmp_path/'mixed').exists()

# --- heads of other tasks

@pytest.mark.parametrize('kind,config', [('Bart',{}), ('MBart',{})])
def test_classifiers_with_a_decoder(kind, config, tmp_path):
    "Their head wants the same text in encoder and decoder, with an eos: their body is looked at, in which cross-attention can be told by its length."
    made = lambda what: getattr(transformers, kind+what)(getattr(transformers, f'{kind}Config')(vocab_size=VOCAB,
        d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    writes = linearize(made('ForConditionalGeneration')); want = list(linear_layers(writes))
    assert list(linear_layers(linearize(made('ForSequenceClassification'))))==want and len(want)==3
    save_linearized(writes, tmp_path/'m')
    judges = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path/'m')
    x = tokens(2, 6); x[:,-1] = 2
    assert list(linear_layers(judges))==want and judges(input_ids=x).logits.isfinite().all()
    same(judges.model(input_ids=x).last_hidden_state, writes.model(input_ids=x).last_hidden_state, 1e-6)

# --- adapters, and who reads them

def test_adapters_of_finetune_come_back_by_autopeft(tmp_path):
    made().float().save_pretrained(tmp_path/'m')
    tuned = adapted(load_linearized(tmp_path/'m'), corpus(8), steps=1, batch_size=4, lora=dict(r=2, target_modules=['q_proj']))
    tuned.save_pretrained(tmp_path/'a')
    same(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'a'), tokens()), logits(tuned, tokens()), 1e-5)

def test_adapters_of_experts_are_kept_beside_the_original(tmp_path):
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)).save_pretrained(tmp_path/'m')
    fresh = lambda: AutoModelForCausalLM.from_pretrained(tmp_path/'m')
    try: peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules='all-linear'))
    except ValueError: pytest.skip(f"peft {peft.__version__} adapts no mixture of experts, of softmax either")
    tuned = adapted(linearize(fresh()), corpus(8), steps=1, batch_size=4, lora=dict(r=2, target_modules='all-linear'))
    save_trained(tuned, tmp_path/'t')
    same(logits(load_trained(fresh(), tmp_path/'t'), tokens()), logits(tuned, tokens()), 1e-5)

def test_a_teacher_at_another_precision_is_told(tmp_path):
    model = linearize(llama(layers=1)); model.is_quantized = True
    save_trained(model, tmp_path/'t')
    with pytest.warns(UserWarning, match='was trained beside quantised weights'): load_trained(llama(layers=1), tmp_path/'t')
