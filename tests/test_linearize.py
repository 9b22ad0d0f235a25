"Conversion of four architectures: equal to its own oracle, trained where it should be, saved whole or not at all."
import copy, json, sys
from pathlib import Path
import pytest, torch, transformers
import hedgehog_nb.models.attention as models_attention
from hedgehog_nb import functional
from transformers import DynamicCache
from hedgehog_nb.models.interface import use_attention
from hedgehog_nb.ops.common import repeat_kv
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.attentions.base import FEATURE_MAPS
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.models.attention import hedgehog_attention, linear_layers, padding_mask, set_implementation
from hedgehog_nb.models.config import LinearizeConfig
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.attentions.specs import parse_layers
from helpers.tiny_models import MODELS, VOCAB, bert, gpt2, inputs, llama, shake, tokens, vit

SETTINGS = [(n,{}) for n in sorted(FEATURE_MAPS) if n!='hedgehog']\
    + [('hedgehog',dict(form=f)) for f in FORMS] + [('hedgehog',dict(form='exp', num_maps=2, bias=True))]
ids = lambda v: v if isinstance(v,str) else '-'.join(f'{k}={x}' for k,x in v.items()) or 'plain'
CAUSAL = 'llama','gpt2'

def oracle(causal):
    "The converted model's attention by definition, T × T and in one line; written apart from the library."
    def fn(module, q, k, v, attention_mask, scaling=None, **kw):
        T = q.shape[2]
        if hasattr(module, 'feature_map'):
            pq,pk,l = module.feature_map(q, k)
            a = pq @ repeat_kv(pk, q.shape[1]).mT
            if l is not None: a = a * repeat_kv(l-l.max(), q.shape[1])[:,:,None].exp()
        else: a = (q @ repeat_kv(k, q.shape[1]).mT * scaling); a = (a-a.amax(-1, keepdim=True)).exp()
        if causal: a = a.tril()
        if attention_mask is not None: a = a*attention_mask[:,None,None]
        a = a/a.sum(-1, keepdim=True).clamp_min(1e-200 if a.dtype==torch.float64 else 1e-30)
        return (a @ repeat_kv(v, q.shape[1]).to(a.dtype)).to(v.dtype).transpose(1,2), None
    return fn

def by_definition(model, name, **x):
    with torch.no_grad(), use_attention(model, oracle(name in CAUSAL), padding_mask):
        return model(**x, **({'use_cache':False} if name in CAUSAL else {})).logits

@torch.no_grad()
def logits(model, **x): return model(**x).logits

def close(a, b):
    "Equal weights give equal outputs up to the order of sums, which some processors choose by the address of the numbers."
    same(a, b, {torch.float64:1e-10, torch.float32:1e-5, torch.bfloat16:3e-2}[a.dtype])

def same(a, b, tol): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)

# --- what it looks at

ASKED = [*((n,{}) for n in ('llama','bert','vit')), ('llama',dict(layers='0,2')), ('bert',dict(layers='1')),
    ('llama',dict(layers='0,1', softmax_heads='1:0-1')), ('llama',dict(attention='hedgehog-window', window=4)), ('llama',dict(attention='elu'))]

@pytest.mark.parametrize('name,settings,padded', [(n,kw,p) for n,kw in ASKED for p in (False,True) if not p or n!='vit'])
def test_weights_are_those_it_uses(name, settings, padded):
    "Each layer's weights times its values are its outputs, in linear layers and in those that stay softmax (GPT-2 does not hand the request down)"
    model = shake(linearize(MODELS[name]().double(), **settings)); x,seen = inputs(model),[]
    if padded: x['attention_mask'] = torch.ones_like(x['input_ids']); x['attention_mask'][1,:5] = 0
    def fn(module, q, k, v, attention_mask, scaling=None, **kw):
        o,w = hedgehog_attention(module, q, k, v, attention_mask, scaling, **kw)
        seen.append((w, (w@repeat_kv(v, q.shape[1])).transpose(1,2), o)); return o,w
    with torch.no_grad(), use_attention(model, fn, padding_mask): asked = model(**x, output_attentions=True).attentions
    real = x['attention_mask'].bool() if padded else torch.ones(seen[0][2].shape[:2], dtype=torch.bool)
    assert len(asked)==len(seen)==3
    for a,(w,by_weights,o) in zip(asked, seen):
        assert torch.equal(a, w)
        same(by_weights[real], o[real], 1e-10)
        same(w.sum(-1).transpose(1,2)[real], torch.ones(1, dtype=torch.float64).expand_as(w.sum(-1).transpose(1,2)[real]), 1e-10)
    with torch.no_grad(): assert model(**x).get('attentions') is None

def test_weights_on_what_was_forgotten():
    model = linearize(llama()); cache = DynamicCache()
    with torch.no_grad():
        first = model(input_ids=tokens(1, 7), past_key_values=cache, output_attentions=True)
        assert [w.shape for w in first.attentions]==[(1,4,7,7)]*3
        with pytest.raises(ValueError, match='7 tokens of earlier calls'): model(input_ids=tokens(1, 2), past_key_values=cache, output_attentions=True)

# --- the forward pass

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('feature_map,kw', SETTINGS, ids=ids)
def test_forward_is_its_own_oracle(name, feature_map, kw):
    model = shake(linearize(MODELS[name]().double(), feature_map, **kw))
    assert len(linear_layers(model))==3
    x = inputs(model)
    want = by_definition(model, name, **x)
    got = logits(model, **x)
    same(got, want, 1e-10)
    set_implementation(model, 'naive'); same(logits(model, **x), want, 1e-10)
    set_implementation(model, None)
    same(logits(model.float(), **{k: v.float() if v.is_floating_point() else v for k,v in x.items()}), want, 2e-3) # fp32: order 10, three layers

@pytest.mark.parametrize('name,seed,head_dim', [(n,s,d) for n in MODELS for s,d in ((1,8),(2,12),(3,60))])
def test_forward_for_other_seeds_and_sizes(name, seed, head_dim):
    model = shake(linearize(MODELS[name](seed, head_dim, layers=2).double()))
    for T in (1,17,70):
        x = inputs(model, T=T, seed=seed)
        same(logits(model, **x), by_definition(model, name, **x), 1e-10)

def test_conversion_changes_the_output_and_nothing_else():
    model = llama()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    x = inputs(model); soft = logits(model, **x)
    linearize(model)
    assert (logits(model, **x)-soft).abs().max()>1e-2
    assert all(torch.equal(v, model.state_dict()[k]) for k,v in before.items())
    assert all('.feature_map.' in k for k in model.state_dict().keys()-before.keys())

@pytest.mark.parametrize('name', ['llama','gpt2','bert'])
@pytest.mark.parametrize('side', ['left','right'])
@pytest.mark.parametrize('kw', [{}, dict(form='exp'), dict(layers='0')], ids=ids)
def test_padding(name, side, kw):
    model = shake(linearize(MODELS[name]().double(), **kw))
    mask = torch.ones(3,20, dtype=torch.long)
    for b,n in enumerate((0,5,13)): mask[b, slice(0,n) if side=='left' else slice(20-n,20)] = 0
    real,x = mask.bool(),tokens(3,20)
    want = by_definition(model, name, input_ids=x, attention_mask=mask)
    got = logits(model, input_ids=x, attention_mask=mask)
    same(got[real], want[real], 1e-10)
    y = torch.where(real, x, tokens(3,20,seed=9))                  # other tokens under the padding
    same(logits(model, input_ids=y, attention_mask=mask)[real], got[real], 1e-12)
    if name!='bert' or side=='right':                             # positions as of the sequence alone
        kw = dict(position_ids=(mask.cumsum(-1)-1).clamp_min(0)) if name in CAUSAL else {}
        for b in range(3):
            alone = logits(model, input_ids=x[b:b+1,real[b]])
            same(logits(model, input_ids=x, attention_mask=mask, **kw)[b,real[b]], alone[0], 1e-10)

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('layers', ['0','1-2',[0,2]])
def test_hybrids(name, layers):
    model = shake(linearize(MODELS[name]().double(), layers=layers))
    assert len(linear_layers(model))==len(parse_layers(layers, 3))
    x = inputs(model)
    same(logits(model, **x), by_definition(model, name, **x), 1e-10)

@pytest.mark.parametrize('name', CAUSAL)
def test_causal(name):
    model = shake(linearize(MODELS[name]()))
    x = tokens(1,20); y = x.clone(); y[:,12] = (y[:,12]+1)%VOCAB
    a,b = logits(model, input_ids=x),logits(model, input_ids=y)
    assert torch.equal(a[:,:12], b[:,:12]) and (a[:,12:]!=b[:,12:]).any(-1).all()

@pytest.mark.parametrize('name', MODELS)
def test_bf16_models_have_float_maps(name):
    model = linearize(MODELS[name]().bfloat16())
    assert all(p.dtype==torch.float32 for m in linear_layers(model).values() for p in m.feature_map.parameters())
    x = inputs(model); out = logits(model, **x)
    assert out.dtype==torch.bfloat16 and out.isfinite().all()

def test_layers_are_read():
    assert parse_layers('all', 3)==[0,1,2] and parse_layers('0-2,5', 6)==[0,1,2,5] and parse_layers('1-5:2,0', 6)==[0,1,3,5] and parse_layers([3,1,1], 4)==[1,3]
    for bad in ('', '3', '0-3', 'x', '-1', '1-', [3], [-1], [], '0,,1', '0-2:', '0-2:0', '1:2'):
        with pytest.raises(ValueError, match='layers'): parse_layers(bad, 3)

BAD = [dict(attention='hedghog'), dict(layers='0-9'), dict(layers='first'), dict(form='halves'), dict(attention='elu', form='exp'),
    dict(num_maps=0), dict(inputs=dict(nonsense=1))]

@pytest.mark.parametrize('kw', BAD, ids=ids)
@pytest.mark.parametrize('training', [True,False])
def test_what_cannot_be_converted_is_left_as_it_was(kw, training):
    model = llama().train(training)
    names,impl,hooks = list(model.state_dict()),model.config._attn_implementation,[len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises((ValueError,TypeError)): linearize(model, **kw)
    assert list(model.state_dict())==names and model.config._attn_implementation==impl and not hasattr(model.config, 'hedgehog')
    assert [len(m._forward_pre_hooks) for m in model.modules()]==hooks and all(m.training==training for m in model.modules())

def test_models_that_are_linear_already_or_off_the_interface():
    with pytest.raises(ValueError, match='already'): linearize(linearize(llama()))
    from transformers import XLNetConfig, XLNetLMHeadModel
    model = XLNetLMHeadModel(XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8))
    with pytest.raises(ValueError, match='XLNet'): linearize(model)

# --- gradients

@pytest.mark.parametrize('name', MODELS)
def test_gradients_are_the_oracles(name):
    model = shake(linearize(MODELS[name](layers=2).double())).train(); x = inputs(model)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
    def grads(): return torch.autograd.grad(model(**x).logits.square().mean(), list(model.parameters()), allow_unused=True)
    got = grads()
    with use_attention(model, oracle(name in CAUSAL), padding_mask): want = grads()
    for (n,_),a,b in zip(model.named_parameters(), got, want):
        assert (a is None)==(b is None), n
        if a is not None: same(a, b, 1e-9)

# --- saving

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16])
@pytest.mark.parametrize('kw', [{}, dict(form='exp', num_maps=2, bias=True, layers='1-2'), dict(attention='elu')], ids=ids)
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, name, dtype, kw):
    MODELS[name]().save_pretrained(tmp_path/'base')
    model = shake(linearize(type(MODELS[name]()).from_pretrained(tmp_path/'base', dtype=dtype), **kw))
    x = inputs(model); want = logits(model, **x)
    path = save_linearized(model, tmp_path/'deep'/'model')
    again = load_linearized(path, dtype='auto')
    a,b = model.state_dict(),again.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype==b[k].dtype for k in a)
    close(logits(again, **x), want); assert not again.training
    assert all(p.requires_grad for p in again.parameters())
    assert again.config.hedgehog==model.config.hedgehog
    assert model.dtype==dtype; close(logits(load_linearized(path), **x), want)
    assert [p.name for p in path.parent.iterdir()]==['model']     # no scratch folder stays
    for f in path.iterdir():
        assert f.suffix in ('.json','.safetensors','.md'), f
        assert f.read_bytes()[:2] not in (b'\x80\x02',b'\x80\x04',b'PK'), f  # pickles, and torch's zip of pickles

def test_a_second_save_is_the_first(tmp_path):
    a = save_linearized(shake(linearize(llama())), tmp_path/'a')
    b = save_linearized(load_linearized(a), tmp_path/'b')
    for f in a.iterdir(): assert f.read_bytes()==(b/f.name).read_bytes(), f.name

@pytest.mark.parametrize('name', MODELS)
def test_shards(tmp_path, name):
    model = shake(linearize(MODELS[name](), form='exp'))
    model.save_pretrained(tmp_path/'m', max_shard_size='12KB')
    assert len(list((tmp_path/'m').glob('*.safetensors')))>2
    x = inputs(model)
    close(logits(load_linearized(tmp_path/'m'), **x), logits(model, **x))

def test_the_tokenizer_goes_along(tmp_path):
    from transformers import AutoTokenizer
    model,tok = load_embedded()
    path = save_linearized(linearize(model), tmp_path/'m', tokenizer=tok)
    text = 'Once upon a time, Lily saw a hedgehog.'
    assert AutoTokenizer.from_pretrained(path)(text).input_ids==tok(text).input_ids
    x = tok(text, return_tensors='pt').input_ids
    close(logits(load_linearized(path), input_ids=x), logits(model, input_ids=x))

def test_folders_that_exist_are_kept(tmp_path):
    model = linearize(llama())
    (tmp_path/'m').mkdir(); (tmp_path/'m'/'precious').write_text('data')
    with pytest.raises(ValueError, match='exists'): save_linearized(model, tmp_path/'m')
    assert [f.name for f in (tmp_path/'m').iterdir()]==['precious'] and len(list(tmp_path.iterdir()))==1
    save_linearized(model, tmp_path/'m', overwrite=True)
    assert not (tmp_path/'m'/'precious').exists() and (tmp_path/'m'/'config.json').exists()

class Broken:
    def save_pretrained(self, path): raise OSError('no space left')

def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = linearize(llama())
    with pytest.raises(OSError): save_linearized(model, tmp_path/'new', tokenizer=Broken())
    assert not list(tmp_path.iterdir())
    save_linearized(model, tmp_path/'old'); before = (tmp_path/'old'/'model.safetensors').read_bytes()
    with pytest.raises(OSError): save_linearized(model, tmp_path/'old', tokenizer=Broken(), overwrite=True)
    assert [f.name for f in tmp_path.iterdir()]==['old'] and (tmp_path/'old'/'model.safetensors').read_bytes()==before
    def half(path, **kw): (Path(path)/'config.json').write_text('{}'); raise KeyboardInterrupt
    monkeypatch.setattr(model, 'save_pretrained', half)
    with pytest.raises(KeyboardInterrupt): save_linearized(model, tmp_path/'new')
    assert [f.name for f in tmp_path.iterdir()]==['old']

def test_folders_that_hold_no_converted_model(tmp_path):
    with pytest.raises(ValueError, match='not converted'): save_linearized(llama(), tmp_path/'m')
    with pytest.raises(ValueError, match='config.json'): load_linearized(tmp_path/'m')
    llama().save_pretrained(tmp_path/'plain')
    with pytest.raises(ValueError, match='not converted'): load_linearized(tmp_path/'plain')
    path = save_linearized(linearize(llama()), tmp_path/'m')
    from safetensors.torch import load_file, save_file
    w = load_file(path/'model.safetensors')
    save_file({k:v for k,v in w.items() if 'layers.1.self_attn.feature_map' not in k}, path/'model.safetensors', metadata={'format':'pt'})
    with pytest.raises(ValueError, match=r'lacks.*layers\.1\.'): load_linearized(path)

def config(path, **new):
    import json
    f = path/'config.json'; f.write_text(json.dumps({**json.loads(f.read_text()), **new}))

def weights(path, keep):
    from safetensors.torch import load_file, save_file
    f = path/'model.safetensors'
    save_file({k:v for k,v in load_file(f).items() if keep(k)}, f, metadata={'format':'pt'})

def cut(path): f = path/'model.safetensors'; f.write_bytes(f.read_bytes()[:-40])

TAMPERED = dict(
    null=(lambda p: config(p, hedgehog=None), r'config\.json: hedgehog is the settings of the conversion.*given None'),
    a_list=(lambda p: config(p, hedgehog=[1]), r'config\.json: hedgehog is the settings'),
    num_maps=(lambda p: config(p, hedgehog=dict(feature_map='hedgehog', num_maps=3)),
        r'does not fit together: .*feature_map\.w_k is \(2, 8, 8\) in its weights, \(2, 24, 8\) by its config\.json'),
    cut=(cut, r'model\.safetensors is cut off'),
    more_layers=(lambda p: config(p, num_hidden_layers=4), r'does not fit together: model\.layers\.3\..* is missing from its weights'),
    fewer_weights=(lambda p: weights(p, lambda k: 'layers.1.self_attn.q_proj' not in k), r'layers\.1\.self_attn\.q_proj\.weight is missing'),
    fewer_layers=(lambda p: config(p, hedgehog=dict(feature_map='hedgehog', layers=[0])),
    r'does not fit together: model\.layers\.1\.self_attn\.feature_map\.\S+ is in its weights, and in no map'),
    other_map=(lambda p: config(p, hedgehog=dict(feature_map='elu')), r'feature_map\.\S+ is in its weights, and in no map'),
    layers=(lambda p: config(p, hedgehog=dict(feature_map='hedgehog', layers=3)), r'config\.json says hedgehog: .*layers.* 3'),
    model=(lambda p: config(p, hedgehog=dict(model=3)), r'config\.json says hedgehog: .*settings attention.*given model'),
    no_file=(lambda p: (p/'model.safetensors').unlink(), r'holds no weights'),
    no_config=(lambda p: (p/'config.json').write_text('{"a'), r'config\.json is no config'),
    config_list=(lambda p: (p/'config.json').write_text('[]'), r'config\.json is no config'),
    activation=(lambda p: config(p, hidden_act='nope'), r"config\.json describes no LlamaForCausalLM: KeyError, 'nope'"),
    architecture=(lambda p: config(p, architectures='Llama'), r'holds a Llama, which is no model class'),
    wider=(lambda p: config(p, vocab_size=70), r'lm_head\.weight is \(61, 32\) in its weights, \(70, 32\) by'))

@pytest.mark.parametrize('case', TAMPERED)
def test_folders_that_do_not_fit_together(case, tmp_path):
    path = save_linearized(linearize(llama()), tmp_path/'m')
    change,match = TAMPERED[case]
    change(path)
    with pytest.raises(ValueError, match=match) as e: load_linearized(path)
    assert str(path) in str(e.value)

@pytest.mark.parametrize('auto', ['AutoModel','AutoModelForSequenceClassification'])
@pytest.mark.parametrize('gone', ['layers.1.self_attn.q_proj','embed_tokens'])
def test_a_new_head_excuses_no_missing_weight_below_it(auto, gone, tmp_path):
    path = save_linearized(linearize(llama()), tmp_path/'m')
    load_linearized(path, auto=getattr(transformers, auto))
    weights(path, lambda k: gone not in k)
    with pytest.raises(ValueError, match=f'{gone}.weight is missing'): load_linearized(path, auto=getattr(transformers, auto))

def test_a_pooler_is_a_part_of_a_new_head(tmp_path):
    path = save_linearized(linearize(MODELS['bert']()), tmp_path/'m')
    load_linearized(path, auto=transformers.AutoModel)

def test_maps_come_from_the_file_that_the_others_come_from(tmp_path):
    a,b = shake(linearize(llama())),shake(linearize(llama(seed=1)), by=.9); x = inputs(a)
    a.save_pretrained(tmp_path/'m'); b.save_pretrained(tmp_path/'m', variant='half')
    (tmp_path/'m'/'old.safetensors').write_bytes(b'damaged, and of no interest')
    assert torch.equal(logits(load_linearized(tmp_path/'m'), **x), logits(a, **x))
    assert torch.equal(logits(load_linearized(tmp_path/'m', variant='half'), **x), logits(b, **x))

@pytest.mark.parametrize('index', ['{}', '[]', '{"weight_map": null}', '{"weight', '{"metadata": {}, "weight_map": {"a": 3}}'])
def test_damaged_lists_of_files(index, tmp_path):
    linearize(llama()).save_pretrained(tmp_path/'m', max_shard_size='20KB')
    f = tmp_path/'m'/'model.safetensors.index.json'; load_linearized(tmp_path/'m')
    shard = next((tmp_path/'m').glob('model-*.safetensors')); shard.rename(tmp_path/'away')
    with pytest.raises(ValueError, match=f'lacks {shard.name}'): load_linearized(tmp_path/'m')
    f.write_text(index)
    with pytest.raises(ValueError, match='index.json does not say'): load_linearized(tmp_path/'m')

def test_each_map_stays_on_the_device_of_its_layer(tmp_path, monkeypatch):
    "A stand-in for a model over several devices: the second layer's map is made on another one than the model's first weight."
    m = sys.modules['hedgehog_nb.models.linearize']; make = m._make
    save_linearized(shake(linearize(llama())), tmp_path/'m')
    monkeypatch.setattr(m, '_make', lambda name, call, *a: make(name, call, *a).to('meta' if call.name.split('.')[2]=='1' else 'cpu'))
    maps = [l.feature_map for l in linear_layers(load_linearized(tmp_path/'m')).values()]
    assert [{p.device.type for p in f.parameters()} for f in maps]==[{'cpu'},{'meta'},{'cpu'}] and all(p.requires_grad for f in maps for p in f.parameters())

def test_copies_are_their_own():
    model = shake(linearize(llama())); twin = copy.deepcopy(model); x = inputs(model)
    close(logits(twin, **x), logits(model, **x))
    with torch.no_grad(): next(iter(linear_layers(twin).values())).feature_map.w_q.zero_()
    assert not torch.equal(logits(twin, **x), logits(model, **x))

def test_conversion_under_autocast():
    "What `hedgehog linearize --autocast` does: the look at the model's attention is not rounded, so it is recognised, and the maps stay fp32."
    model = load_embedded()[0]
    with torch.autocast('cpu', torch.bfloat16): linearize(model)
    assert len(linear_layers(model))==5 and all(p.dtype==torch.float32 for m in linear_layers(model).values() for p in m.feature_map.parameters())

# --- the implementation as a setting

def used(model): return {m._implementation for m in linear_layers(model).values()}

@pytest.mark.parametrize('name', ['llama', 'bert'])
def test_the_implementation_is_kept_with_the_model(name, tmp_path):
    model = shake(linearize(MODELS[name]().double(), implementation='recurrent', num_maps=2))
    x = inputs(model); want = logits(model, **x)
    assert used(model)=={'recurrent'} and model.config.hedgehog['implementation']=='recurrent'
    again = load_linearized(save_linearized(model, tmp_path/'m')); close(logits(again, **x), want)
    assert used(again)=={'recurrent'} and again.config.hedgehog==model.config.hedgehog
    for impl in ('naive', None): # another at loading, saved again
        other = load_linearized(tmp_path/'m', implementation=impl); close(logits(other, **x), want)
        assert used(other)=={impl} and other.config.hedgehog.get('implementation')==impl and ('implementation' in other.config.hedgehog)==(impl is not None)
        assert used(load_linearized(save_linearized(other, tmp_path/'n', overwrite=True)))=={impl}
    set_implementation(again, 'chunked'); assert used(load_linearized(save_linearized(again, tmp_path/'o')))=={'chunked'}

def test_auto_classes_take_the_implementation(tmp_path):
    from transformers import AutoModelForCausalLM
    save_linearized(linearize(llama(), implementation='recurrent'), tmp_path/'m')
    load = AutoModelForCausalLM.from_pretrained
    assert used(load(tmp_path/'m'))=={'recurrent'} and used(load(tmp_path/'m', implementation='chunked'))=={'chunked'}

def test_the_implementation_is_used(monkeypatch):
    m,seen = functional,[]
    f = m.linear_attention_in_torch
    monkeypatch.setattr(m, 'linear_attention_in_torch', lambda *a: seen.append(a[-2]) or f(*a))
    model = linearize(llama(), implementation='chunked', layers='0,2'); logits(model, input_ids=tokens())
    assert seen==['chunked']*2

@pytest.mark.parametrize('feature_map,impl,names', [('hedgehog', 'cuda', 'naive, recurrent, chunked, scores, c, triton'), ('hedgehog', True, 'naive'),
    ('hedgehog-window', 'recurrent', 'naive, chunked, c, triton')])
def test_an_implementation_that_there_is_not(feature_map, impl, names, tmp_path):
    model = llama()
    with pytest.raises(ValueError, match=f'implementation is one of {names}.*or None.*given {impl!r}'): linearize(model, feature_map, implementation=impl)
    assert not linear_layers(model) and not hasattr(model.config, 'hedgehog')
    with pytest.raises(ValueError, match='has no linear attention: convert it'): set_implementation(model, 'chunked')
    linearize(model, feature_map)
    with pytest.raises(ValueError, match=f'given {impl!r}'): set_implementation(model, impl)
    save_linearized(model, tmp_path/'m')
    with pytest.raises(ValueError, match=f'given {impl!r}'): load_linearized(tmp_path/'m', implementation=impl)

@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
@pytest.mark.parametrize('feature_map', ['hedgehog', 'hedgehog-window'])
def test_a_model_saved_for_triton_runs_on_a_cpu(feature_map, tmp_path, monkeypatch):
    "One warning, the choice by the input, and the setting stays for a GPU."
    import warnings
    monkeypatch.delenv('TRITON_INTERPRET', raising=False); models_attention._warn_once.cache_clear()
    model = linearize(llama(), feature_map); x = inputs(model); want = logits(model, **x)
    set_implementation(model, 'triton'); save_linearized(model, tmp_path/'m')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        again = load_linearized(tmp_path/'m'); got = [logits(again, **x) for _ in range(2)]
        out = again.generate(x['input_ids'], max_new_tokens=3, do_sample=False, pad_token_id=0)
    said = [str(w.message) for w in said if 'implementation' in str(w.message)]
    assert len(said)==1 and "implementation='triton', which cannot run on cpu" in said[0]
    close(got[0], want); close(got[1], want); assert out.shape[1]==x['input_ids'].shape[1]+3 and used(again)=={'triton'}

OLD = dict(plain=dict(feature_map='hedgehog', layers=[0,1,2]), window=dict(feature_map='hedgehog-window', layers=[0,2], window=4, relative=True),
           heads=dict(feature_map='hedgehog', layers=[0,1,2], softmax_heads='0:0-1', form='exp'),
           elu=dict(feature_map='elu', layers=[1], implementation='recurrent'))

@pytest.mark.parametrize('old', OLD.values(), ids=OLD)
def test_settings_stored_side_by_side_are_read(old, tmp_path):
    "As config.json held them before there was a `LinearizeConfig`: the same model, which stores them as one from then on."
    config = LinearizeConfig.from_dict(old)
    model = shake(linearize(llama(), config)); save_linearized(model, tmp_path/'m')
    f = tmp_path/'m'/'config.json'
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(hedgehog=old)))
    again = load_linearized(tmp_path/'m')
    assert torch.equal(logits(again, input_ids=tokens()), logits(model, input_ids=tokens())) and again.config.hedgehog==model.config.hedgehog==config.to_dict()

def test_a_config_says_all():
    config = LinearizeConfig('hedgehog-window', '0,2', attention_kwargs=dict(window=4))
    assert linearize(llama(), config).config.hedgehog==linearize(llama(), 'hedgehog-window', layers='0,2', window=4).config.hedgehog
    with pytest.raises(ValueError, match='dataclasses.replace'): linearize(llama(), config, layers='1')
    with pytest.raises(ValueError, match="settings attention, .*given maps"): LinearizeConfig.from_dict(dict(attention='elu', maps=2))

@pytest.mark.parametrize('bad,says', [
    (dict(attention='elo'), "called 'elo'; there are .*hedgehog"),
    (dict(attention=3), 'called 3; there are'),
    (dict(attention='linformer'), 'keeps no state.*there are cosformer, elu, (?!.*linformer)'),
    (dict(attention_kwargs=dict(nums=2)), 'nums.*takes .*num_maps'),
    (dict(attention=['elu']), 'there are'),
    (dict(attention_kwargs=3), 'attention_kwargs is a dict'),
    (dict(attention_kwargs={1:2}), 'does not take 1'),
    (dict(attention_kwargs=dict(num_maps='2')), "num_maps is a whole number.*given '2'"),
    (dict(attention='hedgehog-window', attention_kwargs=dict(window=-4)), 'window is a number of keys.*given -4'),
    (dict(layers=3), 'layers is .*given 3'),
    (dict(layers=None), 'layers is .*given None'),
    (dict(layers=[]), r'given \[\]'),
    (dict(layers=[0,'a']), 'layers is .*list of integers'),
    (dict(layers=[1.]), 'layers is'),
    (dict(layers=[True]), 'layers is'),
    (dict(layers='0-'), "given '0-'"),
    (dict(layers='9-2'), "given '9-2'"),
    (dict(layers='0-99999999999'), 'layers is'),
    (dict(implementation='tritn'), 'c, triton, or None.*tritn'),
    *((dict(softmax_heads=h), 'softmax_heads is like') for h in ('x', -3, {'x':1}, '0:')),
    (dict(softmax_heads={0:'a'}), "heads is .*given 'a'")], ids=str)
def test_a_config_is_checked_where_it_is_made(bad, says):
    "Whatever needs no model to be seen."
    with pytest.raises(ValueError, match=says): LinearizeConfig(**bad)

@pytest.mark.parametrize('settings', [None, 'hedgehog', [], 3])
def test_a_config_is_read_from_a_dict(settings):
    with pytest.raises(ValueError, match='is a dict of its settings'): LinearizeConfig.from_dict(settings)
    with pytest.raises(ValueError, match='given 1'): LinearizeConfig.from_dict({1:2})
    with pytest.raises(ValueError, match='as it was once called'): LinearizeConfig.from_dict(dict(feature_map='hedgehog', attention_kwargs={}))

@pytest.mark.parametrize('given,stored', [
    (dict(layers=range(2)), dict(layers=[0,1])),
    (dict(layers=(2,0,0)), dict(layers=[0,2])),
    (dict(layers='0-1'), dict(layers='0-1')),
    (dict(softmax_heads={1:[1,0], '0':2}), dict(softmax_heads='0:2;1:0-1')),
    (dict(softmax_heads='1: 0,1'), dict(softmax_heads='1: 0,1')),
    (dict(softmax_heads={}), {})])
def test_a_config_survives_json(given, stored):
    config = LinearizeConfig(**given)
    assert config.to_dict()==dict(attention='hedgehog', layers='all') | stored
    assert LinearizeConfig.from_dict(json.loads(json.dumps(config.to_dict())))==config
