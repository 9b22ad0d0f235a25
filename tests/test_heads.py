"Softmax in single heads of a converted layer: each kind of head by its own definition, in everything that a converted model does."
import copy, json, math
import pytest, torch
from transformers import (AutoModel, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration, DynamicCache,
    GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM)
from hedgehog_nb.models.interface import capture_attention, use_attention
from hedgehog_nb.ops.common import repeat_kv
from hedgehog_nb.ops.softmax import softmax_attention, softmax_weights
from hedgehog_nb.training.losses import layer_loss, LOSSES
from hedgehog_nb.attentions.base import make_attention
from hedgehog_nb.attentions.mixed_heads import MixedHeadAttention, MixedHeadState
from hedgehog_nb.attentions.specs import parse_heads, format_heads
from hedgehog_nb.models.heads import keep_softmax_heads, keep_worst_heads, kl_by_head, select_softmax_heads
from hedgehog_nb.models.hub import model_card
from hedgehog_nb.models.attention import linear_layers, padding_mask, set_implementation
from hedgehog_nb.models.config import LinearizeConfig
from hedgehog_nb.models.linearize import build_attentions, linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.analysis.report import attention_report
from hedgehog_nb.models.cache import cache_bytes, decode_costs
from hedgehog_nb.training.distill import distill, teacher_pass
from hedgehog_nb.training.finetune import finetune
from hedgehog_nb.training.evaluate import perplexity
from hedgehog_nb.attentions.window import WindowAttention
from hedgehog_nb.models.hybrid import linear_weight_share, set_branch
from helpers.decoding import FREE, forward, left_padded
from helpers.tiny_models import MODELS, VOCAB, corpus, gpt2, inputs, llama, shake, tokens
from helpers.training import OnStep

HEADS = '0:0-1;2:2-3'                                # whole groups of the tiny Llama, which has two; the others have none
CAUSAL = 'llama','gpt2'
ids = lambda v: v if isinstance(v, str) else '-'.join(f'{k}={x}' for k,x in v.items()) or 'plain' if isinstance(v, dict) else str(v)

def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def qkv(H=4, Hkv=2, T=23, B=2, D=8, seed=0): return rand(B, H, T, D, seed=seed), rand(B, Hkv, T, D, seed=seed+1), rand(B, Hkv, T, D, seed=seed+2)
def same(a, b, tol=1e-10): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)
def masked(T=23):
    m = torch.ones(2, T, dtype=torch.bool); m[0,:5] = m[1,T//2] = m[1,-1] = False
    return m

@torch.no_grad()
def logits(model, **x): return model(**x).logits

@torch.no_grad()
def pair(name, kept, H=4, Hkv=2, D=8, **kw):
    "An attention with kept heads, and the one that keeps none, with the same parameters, off their start."
    whole,att = make_attention(name, D, H, Hkv, **kw).double(),MixedHeadAttention(name, kept, D, H, Hkv, **kw).double()
    rest = [h for h in range(H) if h not in att.softmax_heads]
    for i,(n,p) in enumerate(whole.named_parameters()):
        p += .2*rand(*p.shape, seed=50+i)
        att.rest.get_parameter(n).copy_(p[rest if len(p)==H else [h//(H//Hkv) for h in rest[::H//Hkv]]])
    return att,whole

# --- the module

SIZES = [(4,4,[0]), (4,4,[1,3]), (4,2,[2,3]), (6,2,[0,1,2]), (8,4,[0,1,6,7]), (2,2,[1])]
INNER = [('hedgehog', dict(form='exp')), ('hedgehog', dict(num_maps=2, bias=True)), ('hedgehog-window', dict(window=4)),
    ('hedgehog-window', dict(window=4, relative=True)), ('elu', {}), ('cosformer', {}), ('t2r', {})]
inner = pytest.mark.parametrize('name,kw', INNER, ids=ids)

def by_hand(att, whole, q, k, v, causal=True, mask=None):
    "The map's heads, and softmax's in their place."
    o = whole.attend(q, k, v, causal, mask).clone()
    o[:,att.softmax_heads] = softmax_attention(q, k, v, causal, whole.scale, mask)[:,att.softmax_heads]
    return o

@inner
@pytest.mark.parametrize('H,Hkv,kept', SIZES)
@pytest.mark.parametrize('causal', [True, False])
@torch.no_grad()
def test_each_head_by_its_own_definition(name, kw, H, Hkv, kept, causal):
    if not causal and False not in make_attention(name, 8, H, Hkv, **kw).directions: return
    (att,whole),x = pair(name, kept, H, Hkv, **kw),qkv(H, Hkv)
    for mask in (None, masked()):
        real,want = (slice(None) if mask is None else mask),by_hand(att, whole, *x, causal, mask).transpose(1,2)
        for impl in (None, 'naive', 'chunked', *(['recurrent'] if name!='hedgehog-window' else [])):
            same(att.attend(*x, causal, mask, implementation=impl).transpose(1,2)[real], want[real])
        w = att.weights(*x[:2], causal, mask)
        same((w @ repeat_kv(x[2], H)).transpose(1,2)[real], want[real]); same(w[:,kept], softmax_weights(*x[:2], causal, mask=mask)[:,kept])

def test_scales_and_odd_sizes():
    for T,D in ((1,8), (17,12), (70,60)):
        q,k,v = qkv(T=T, D=D)
        att = MixedHeadAttention('taylor', '2-3', D, 4, 2, scale=.3)
        o = att.attend(q, k, v)
        same(o[:,2:], softmax_attention(q, k, v, scale=.3)[:,2:]); same(o[:,:2], make_attention('taylor', D, 2, 1, .3).attend(q[:,:2], k[:,:1], v[:,:1]))

def test_gradients_are_those_of_the_definition():
    (att,whole),x = pair('hedgehog', [2,3], form='exp'),[t.requires_grad_() for t in qkv()]
    for a,b in zip(*(torch.autograd.grad(o.square().sum(), x) for o in (att.attend(*x), by_hand(att, whole, *x)))): same(a, b)

@torch.no_grad()
def test_queries_that_see_only_padding_and_what_lies_under_it():
    (att,_),(q,k,v),mask = pair('hedgehog', [0,1]),qkv(),masked()
    a = att.attend(q, k, v, mask=mask); assert a.isfinite().all()
    junk = torch.where(mask[:,None,:,None], 0, 99.)
    same(att.attend(q, k+junk, v+junk, mask=mask).transpose(1,2)[mask], a.transpose(1,2)[mask], 1e-12)

def test_dropout_is_softmax_s_alone():
    (att,_),x = pair('hedgehog', [0,1]),qkv()
    a,b = att.attend(*x),att.attend(*x, dropout=.5)
    assert torch.equal(a[:,2:], b[:,2:]) and not torch.isclose(a[:,:2], b[:,:2]).all(-1).any()

# --- its state

def leaves(s): out = []; s.apply(lambda x: out.append(x) or x); return out

@inner
@pytest.mark.parametrize('cut', [[23], [9,14], [1]*23, [7,1,1,11,3]])
@torch.no_grad()
def test_pieces_with_a_carried_state_are_the_whole(name, kw, cut):
    (att,_),(q,k,v) = pair(name, [2,3], **kw),qkv()
    for mask in (None, masked()):
        want,end = att.attend(q, k, v, mask=mask, output_final_state=True)
        state,got,at = None,[],0
        for n in cut:
            s = slice(at, at+n); at += n
            m = mask[:,s] if mask is not None and not mask[:,s].all() else None      # some calls have no mask
            o,state = att.attend(q[:,:,s], k[:,:,s], v[:,:,s], mask=m, initial_state=state, output_final_state=True, offset=at-n); got.append(o)
        real = slice(None) if mask is None else mask
        same(torch.cat(got, 2).transpose(1,2)[real], want.transpose(1,2)[real])
        assert (torch.equal(state.k, k[:,1:]) and torch.equal(state.v, v[:,1:])
                and torch.equal(state.real, torch.ones(2, 23, dtype=torch.bool) if mask is None else mask))
        for a,b in zip(leaves(state.rest), leaves(end.rest)): same(a, b)

@torch.no_grad()
def test_what_is_kept_is_views_and_what_is_remembered_is_its_own():
    (att,_),(q,k,v) = pair('hedgehog', [2,3]),qkv(B=1)
    inside = lambda x, y: x.untyped_storage().data_ptr()==y.untyped_storage().data_ptr()
    assert all(inside(x, y) for x,y in zip(att._share(True, q, k, v), (q,k,v))) and all(inside(x, y) for x,y in zip(att.linear_part(q, k, v)[1:], (q,k,v)))
    _,state = att.attend(q, k, v, output_final_state=True)
    assert all(x.untyped_storage().nbytes()==x.nbytes for x in state[:3]) # keys of the other heads can go
    x,y,z = att.linear_part(q, k, v, q)[2:]; assert torch.equal(x, k[:,:1]) and torch.equal(y, v[:,:1]) and torch.equal(z, q[:,:2])

@torch.no_grad()
def test_keys_stay_in_their_dtype():
    att,x = MixedHeadAttention('hedgehog', [0,1], 8, 4, 2),[t.bfloat16() for t in qkv()]
    o,s = att.attend(*x, output_final_state=True); o2,s = att.attend(*x, initial_state=s, output_final_state=True)
    assert o.dtype==o2.dtype==s.k.dtype==s.v.dtype==torch.bfloat16 and all(t.dtype==torch.float32 for t in leaves(s.rest)) and s.k.shape[2]==46

@pytest.mark.parametrize('w', [1, 2, 6, 40])
@torch.no_grad()
def test_heads_kept_in_a_layer_with_a_window_keep_it(w):
    (q,k,v),mask = qkv(),masked()
    att = MixedHeadAttention('elu', [0,1], 8, 4, 2, sliding_window=w).double()
    for causal in (True, False):
        near = torch.ones(23, 23).triu(1-w).tril(0 if causal else w-1).bool() & mask[:,None,None]
        a = (q[:,:2] @ k[:,:1].mT*8**-.5).masked_fill(~near, -torch.inf).softmax(-1).nan_to_num(0)
        some = (near.any(-1) & mask[:,None]).squeeze(1)
        for impl in (None, 'naive'): same(att.attend(q, k, v, causal, mask, implementation=impl)[:,:2].transpose(1,2)[some], (a @ v[:,:1]).transpose(1,2)[some])
        same(att.weights(q, k, causal, mask)[:,:2], a)
    whole,state,got,at = att.attend(q, k, v, mask=mask),None,[],0
    for n in (4, 1, 1, 12, 5):
        s = slice(at, at+n); at += n
        o,state = att.attend(q[:,:,s], k[:,:,s], v[:,:,s], mask=mask[:,s], initial_state=state, output_final_state=True); got.append(o)
        assert state.k.shape[2]==state.v.shape[2]==state.real.shape[1]==min(w-1, at)      # what no later query sees is dropped
    same(torch.cat(got, 2).transpose(1,2)[mask], whole.transpose(1,2)[mask])

def test_states_that_do_not_fit():
    (q,k,v),(att,_) = qkv(),pair('hedgehog', [0,1])
    _,s = att.attend(q, k, v, output_final_state=True)
    for bad in (s._replace(k=s.k[:1]), s._replace(k=s.k[...,:4]), s._replace(v=s.v.repeat(1,2,1,1))):
        with pytest.raises(ValueError, match='initial_state holds keys'): att.attend(q, k, v, initial_state=bad)
    for carry in (dict(initial_state=s), dict(output_final_state=True)):
        with pytest.raises(ValueError, match='naive form keeps no state'): att.attend(q, k, v, implementation='naive', **carry)

# --- which heads

SHAPES = [(4,4), (8,4), (6,2), (12,2)]
@pytest.mark.parametrize('given,want', [(None,''), ('',''), ({},''), ('0:2','0:2'), ('1:2-3, 6-7 ; 0:0,1','0:0-1;1:2-3,6-7'), ({2:[5,3,4], 0:1},'0:1;2:3-5'),
    ({'1':'6-7'},'1:6-7'), ('0:0;0:2','0:0,2'), ('0:0-3:2','0:0,2'), ('1:4;1:5','1:4-5'), ({3:range(6)},'3:0-5'), ({0:(3,)},'0:3')])
def test_heads_are_read_and_written_one_way(given, want):
    got = parse_heads(given, SHAPES, [0,1,2,3])
    assert format_heads(got)==want and parse_heads(want, SHAPES, [0,1,2,3])==got

@pytest.mark.parametrize('given,says', [('9:0', 'the model has layers 0 to 3; given .9.'),
    ('2:0-2', r"layer 2 stays softmax as a whole.*converted, 0-1,3; given '2:0-2'"), ('0:4', 'layer 0 has heads 0 to 3; given .4.'),
    ('0:0-3', 'layer 0 would keep softmax in all its 4 heads'), ('0:all', 'layer 0 would keep softmax in all its 4 heads'),
    ('1:2', 'layer 1: head 2 shares its keys with head 3: keep all of them or none; given 2'),
    ('3:1-5', 'layer 3: head 1 shares its keys with heads 0, 2, 3, 4 and 5: keep all of them or none; given 1-5'),
    ('1:0-2', 'head 2 shares its keys with head 3'),
    *((x, "softmax_heads is like '3:0,2;7:4-5'") for x in ('0', ':0', '0:', '0:1;', 'x:0', '-1:0', '1-2:0', {'a':1}, '180')),
    *((x, 'heads is .all., or like') for x in ('0:x', '0:0,,1', '0:1-', {0:[]}, {0:[-1]}, {0:[1.5]}, {0:[None]}))])
def test_what_cannot_be_kept(given, says):
    with pytest.raises(ValueError, match=says): parse_heads(given, SHAPES, [0,1,3])

def test_a_module_checks_its_heads_too():
    for kept,says in (([1], 'this attention: head 1 shares its keys with head 0'),
            ([4], 'this attention has heads 0 to 3'), ([0,1,2,3], 'all its 4 heads'), ('', 'heads')):
        with pytest.raises(ValueError, match=says): MixedHeadAttention('hedgehog', kept, 8, 4, 2)
    with pytest.raises(ValueError, match='takes queries of 4 heads'): MixedHeadAttention('hedgehog', [0,1], 8, 4, 2).attend(*(t.float() for t in qkv(8, 4)))

@pytest.mark.parametrize('kw', [dict(softmax_heads='1:0'), dict(softmax_heads='7:0'), dict(softmax_heads='0:0-1', layers='1-2'), dict(softmax_heads='0:0-3'),
    dict(softmax_heads='0-1'), dict(softmax_heads='0:0-1', form='halves'), dict(softmax_heads='0:0-1', attention='latte')], ids=ids)
def test_a_refused_model_is_as_it_was(kw):
    model = llama(); names,hooks = list(model.state_dict()),[len(m._forward_pre_hooks) for m in model.modules()]
    for f in (linearize, lambda m, **kw: build_attentions(m, LinearizeConfig(**{'attention_kwargs':{k:kw.pop(k) for k in ('form',) if k in kw}, **kw}))):
        with pytest.raises(ValueError) as e: f(model, **kw)
        assert '\n' not in str(e.value)
    assert list(model.state_dict())==names and not hasattr(model.config, 'hedgehog') and [len(m._forward_pre_hooks) for m in model.modules()]==hooks

# --- models

KINDS = [{}, dict(form='exp', num_maps=2, bias=True), dict(attention='hedgehog-window', window=4), dict(attention='elu')]

def model_of(name, seed=0, softmax_heads=HEADS, **kw): return shake(linearize(MODELS[name](seed).double(), softmax_heads=softmax_heads, **kw)).double().eval()

def oracle(causal):
    "Attention by definition, T × T and head by head."
    def fn(module, q, k, v, attention_mask, scaling=None, **kw):
        H,T = q.shape[1:3]; k,v,fm,outs = repeat_kv(k, H),repeat_kv(v, H),getattr(module, 'feature_map', None),[]
        rest = [h for h in range(H) if fm is not None and h not in fm.softmax_heads]
        lin = None if fm is None else (fm.rest if len(fm.softmax_heads) else fm).weights(q[:,rest],
            k[:,rest[::H//module_kv(module, H)]], causal, attention_mask)
        for h in range(H):
            if h in rest: a = lin[:,rest.index(h)]
            else:
                s = q[:,h] @ k[:,h].mT*scaling
                if attention_mask is not None: s = s.masked_fill(~attention_mask[:,None], -torch.inf)
                a = (s.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf) if causal else s).softmax(-1).nan_to_num(0)
            outs.append(a @ v[:,h])
        return torch.stack(outs, 2), None
    return fn

def module_kv(module, H): return getattr(getattr(module, 'config', None), 'num_key_value_heads', None) or H

def by_definition(model, name, **x):
    with torch.no_grad(), use_attention(model, oracle(name in CAUSAL), padding_mask):
        return model(**x, **({'use_cache':False} if name in CAUSAL else {})).logits

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', [*KINDS, dict(layers='0,2', form='exp')], ids=ids)
def test_forward_is_the_definition(name, kw):
    if 'window' in kw and name not in CAUSAL: return
    model = model_of(name, **kw); x = inputs(model)
    want,plain = by_definition(model, name, **x),logits(shake(linearize(MODELS[name]().double(), **kw)), **x)
    same(logits(model, **x), want); assert (want-plain).abs().max()>1e-3
    set_implementation(model, 'naive'); same(logits(model, **x), want)
    if name=='vit': return
    set_implementation(model, None)
    for side in ('left', 'right'):
        mask = torch.ones(2, 19, dtype=torch.long); mask[1, slice(0,7) if side=='left' else slice(12,19)] = 0
        real = mask.bool(); got = logits(model, **x, attention_mask=mask)
        same(got[real], by_definition(model, name, **x, attention_mask=mask)[real])
        y = torch.where(real, x['input_ids'], tokens(seed=9)); same(logits(model, input_ids=y, attention_mask=mask)[real], got[real], 1e-12)

def test_every_head_kept_but_one_group_is_nearly_softmax():
    "With the other group's map exact, the model is the teacher: layer by layer nothing else differs."
    model = linearize(gpt2().double(), softmax_heads={i:[0,1,3] for i in range(3)}); x = inputs(model)
    for m in linear_layers(model).values():
        a = m.feature_map
        a.rest.weights = lambda q, k, causal=True, mask=None, s=a.scale: softmax_weights(q, k, causal, s, mask)
        a.rest.attend = lambda q, k, v, causal=True, mask=None, s=a.scale, **_: softmax_attention(q, k, v, causal, s, mask)
    same(logits(model, **x, use_cache=False), logits(gpt2().double(), **x))

def test_dropout_reaches_the_kept_heads():
    def model(**kw):
        torch.manual_seed(0)
        return linearize(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4,
            vocab_size=VOCAB, n_positions=64, attn_pdrop=.5, resid_pdrop=0, embd_pdrop=0)), **kw)
    for kw,differ in (({}, False), (dict(softmax_heads='0:1'), True)):
        m,x = model(**kw).train(),tokens(); assert torch.equal(m(x).logits, m(x).logits)!=differ
        m.eval(); assert torch.equal(m(x).logits, m(x).logits)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(dtype):
    model = linearize(llama().to(dtype), softmax_heads=HEADS); x = tokens()
    assert all(p.dtype==torch.float32 for m in linear_layers(model).values() for p in m.feature_map.parameters())
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype==torch.float32): out = model.generate(x, max_new_tokens=5, **FREE)
    assert out.shape==(2,24) and logits(model, input_ids=out).isfinite().all()

# --- writing

WRITES = [{}, dict(attention='hedgehog-window', window=4), dict(form='exp', layers='0,2'), dict(attention='cosformer')]
writes = pytest.mark.parametrize('name,kw', [(n,kw) for n in CAUSAL for kw in WRITES], ids=ids)

@writes
def test_greedy_left_padded_and_continued(name, kw):
    model = model_of(name, **kw); x = tokens(2, 11)
    assert torch.equal(model.generate(x, max_new_tokens=12, **FREE), forward(model, x, n=12))
    x,mask = left_padded([9,1,14,5]); out = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=9, **FREE)
    if kw.get('attention')!='cosformer':                 # which counts places, not real tokens
        assert torch.equal(out, forward(model, x, mask, 9))
        for b,n in enumerate((9,1,14,5)): assert torch.equal(out[b,-9:], model.generate(x[b:b+1,-n:], max_new_tokens=9, **FREE)[0,-9:])
    cache,x = DynamicCache(config=model.config),tokens(1, 7)
    for turn in range(3):
        out = model.generate(x, past_key_values=cache, max_new_tokens=5, **FREE)
        assert torch.equal(out, forward(model, x, n=5)) and cache.get_seq_length()==out.shape[1]-1
        x = torch.cat([out, tokens(1, 4, 20+turn)], 1)

@pytest.mark.parametrize('name,kw', [('llama',{}), ('gpt2',WRITES[1])], ids=ids)
def test_beams_samples_and_caches(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([6,9])
    args = dict(FREE, input_ids=x, attention_mask=mask, max_new_tokens=9, num_beams=4, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    a,b = (model.generate(**args, use_cache=c) for c in (True, False))
    assert torch.equal(a.sequences, b.sequences) and (a.beam_indices[:,:9]!=a.beam_indices[:,:1]).any(); same(a.sequences_scores, b.sequences_scores, 1e-5)
    for c in (dict(cache_implementation='static'), dict(prefill_chunk_size=4)):
        if 'layers' not in kw: assert torch.equal(model.generate(tokens(2, 11), max_new_tokens=6, **c, **FREE), forward(model, tokens(2, 11), n=6))
    with pytest.raises(ValueError, match='(?i)assisted'): model.generate(x[:1], max_new_tokens=20, **{**FREE, 'prompt_lookup_num_tokens':2})

@writes
def test_logits_of_any_cut(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([20,31]); pos = (mask.cumsum(-1)-1).clamp_min(0)
    want = logits(model, input_ids=x, attention_mask=mask, position_ids=pos, use_cache=False)
    for cut in ([7,1,1,20,2], [13,18]):
        cache,got,at = DynamicCache(config=model.config),[],0
        for n in cut:
            got.append(logits(model, input_ids=x[:,at:at+n], attention_mask=mask[:,:at+n], position_ids=pos[:,at:at+n], past_key_values=cache))
            at += n
        same(torch.cat(got, 1)[mask.bool()], want[mask.bool()])

def test_an_encoder_decoder_writes():
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCAB, d_model=32, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, init_std=.3, decoder_start_token_id=2, forced_eos_token_id=None)).double().eval()
    linearize(model, softmax_heads='0:1;1:0,3;2:2').double()
    out = [model.generate(tokens(2, 9), max_new_tokens=8, use_cache=c, **FREE) for c in (True, False)]
    assert torch.equal(*out) and len({t.item() for t in out[0][0]})>2

def local_model():
    torch.manual_seed(0)
    cfg = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, initializer_range=.3)
    return shake(linearize(MistralForCausalLM(MistralConfig(**cfg)).double(), softmax_heads='0:0-1;1:0-1')).double().eval()

def test_a_model_of_local_layers():
    "Heads kept where every layer has a window: those see it still, the others everything."
    model,x = local_model(),tokens(2, 15)
    assert {m.feature_map.sliding_window for m in linear_layers(model).values()}=={4}
    assert torch.equal(model.generate(x, max_new_tokens=10, **FREE), forward(model, x, n=10))
    cache = DynamicCache(config=model.config); logits(model, input_ids=x, past_key_values=cache)
    assert [l.state.k.shape[2] for l in cache.layers]==[3,3]

def test_the_target_is_the_teacher_s_within_its_window():
    model,losses = local_model(),[]
    def by_hand(module, q, k, v, causal, scale, mask, o):
        got = module.feature_map.rest.attend(q[:,2:], k[:,1:], v[:,1:])
        losses.append((((got-o[:,2:])**2).sum((0,2,3))/(o[:,2:]**2).sum((0,2,3))).mean().item())
    teacher_pass(model, dict(input_ids=tokens()), by_hand)
    assert distill(model, [dict(input_ids=tokens())], 1, objective='outputs').losses[0]==pytest.approx(sum(losses)/2, rel=1e-9)

def test_the_cache_is_reordered_repeated_selected_and_counted():
    model = linearize(llama(), softmax_heads=HEADS); x,mask = tokens(3, 6),torch.ones(3, 6, dtype=torch.long); mask[1,:4] = 0
    cache = DynamicCache(); logits(model, input_ids=x, attention_mask=mask, past_key_values=cache)
    assert [type(l.state) is MixedHeadState for l in cache.layers]==[True,False,True] and not cache.layers[0].state.real[1,:4].any()
    for f,idx in ((lambda: cache.reorder_cache(torch.tensor([2,0,0])), [2,0,0]),
            (lambda: cache.batch_repeat_interleave(2), [0,0,1,1,2,2]), (lambda: cache.batch_select_indices(torch.tensor([5,1])), [5,1])):
        before = [leaves(l.state) for l in cache.layers]; f()
        for l,s in zip(cache.layers, before): assert all(torch.equal(a, b[idx]) for a,b in zip(leaves(l.state), s))
    cache.layers[0].offload(); cache.layers[0].prefetch()
    sizes = []
    for n in (1, 10, 50): cache = DynamicCache(); logits(model, input_ids=tokens(1, n), past_key_values=cache); sizes.append(cache_bytes(cache))
    per_token = 2*(2*1*8*4+1)        # in two layers: keys and values of one key-value head in fp32, and whether the token is real
    assert [b-sizes[0] for b in sizes]==[0, 9*per_token, 49*per_token]
    rows = decode_costs(dict(kept=model), [7, 50], steps=1); assert rows[1]['bytes']-rows[0]['bytes']==43*per_token==sizes[2]-sizes[0]-6*per_token

def test_a_step_compiles_for_any_context():
    graphs = []
    def backend(gm, _): graphs.append(gm); return gm.forward
    torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    model,x,cache = linearize(llama(layers=2), softmax_heads='0:0-1;1:2-3'),tokens(2, 20),DynamicCache()
    step = torch.compile(model.forward, backend=backend)
    with torch.no_grad():
        parts = [model(input_ids=x[:,:6], past_key_values=cache).logits] + [step(input_ids=x[:,t:t+1], past_key_values=cache).logits for t in range(6, 20)]
        same(torch.cat(parts, 1), model(input_ids=x, use_cache=False).logits, 1e-4)
    assert len(graphs)<=3 and not torch._dynamo.utils.counters['graph_break']

# --- saving

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', [{}, dict(attention='hedgehog-window', window=4)], ids=ids)
def test_saved_and_loaded_bit_for_bit(tmp_path, name, kw):
    if kw and name not in CAUSAL: return
    model = shake(linearize(MODELS[name](), softmax_heads={2:[3,2], 0:'0-1'}, **kw)); x = inputs(model)
    assert model.config.hedgehog['softmax_heads']==HEADS
    path = save_linearized(model, tmp_path/'m'); again = load_linearized(path)
    a,b = model.state_dict(),again.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype==b[n].dtype for n in a) and again.config.hedgehog==model.config.hedgehog
    assert [m.feature_map.softmax_heads for m in linear_layers(again).values()]==[[0,1],(),[2,3]]
    same(logits(again, **x), logits(model, **x), 1e-5)
    second = save_linearized(again, tmp_path/'n')
    for f in path.iterdir(): assert f.read_bytes()==(second/f.name).read_bytes(), f.name
    card = (path/'README.md').read_text(); assert '| heads of these that stay softmax (layer:heads) | 0:0-1;2:2-3 |' in card and 'softmax_heads' not in card
    if name=='llama':
        same(logits(AutoModelForCausalLM.from_pretrained(path), **x), logits(model, **x), 1e-5)
        assert [m.feature_map.softmax_heads for m in linear_layers(AutoModel.from_pretrained(path)).values()]==[[0,1],(),[2,3]]

def test_without_kept_heads_nothing_is_noted():
    for given in (None, {}, ''): assert 'softmax_heads' not in linearize(llama(), softmax_heads=given).config.hedgehog
    assert 'stay softmax' not in model_card(linearize(llama()))

def test_copies_are_their_own():
    model = linearize(llama(), softmax_heads=HEADS); twin = copy.deepcopy(model); x = inputs(model)
    same(logits(twin, **x), logits(model, **x), 1e-6)
    with torch.no_grad(): next(iter(linear_layers(twin).values())).feature_map.rest.w_q.zero_()
    assert not torch.equal(logits(twin, **x), logits(model, **x))

# --- training

def data_of(model, name, n):
    if name=='vit': return [inputs(model, B=4, seed=i) for i in range(n)]
    mask = torch.ones(4, 24, dtype=torch.long); mask[1,15:] = 0
    return [dict(input_ids=corpus(4, seed=i), attention_mask=mask) for i in range(n)]

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('objective', LOSSES)
def test_distillation_teaches_the_other_heads_maps_alone(name, objective):
    model = shake(linearize(MODELS[name](layers=2), softmax_heads='0:0-1')); batches = data_of(model, name, 1)*12
    before,want = {k:v.clone() for k,v in model.state_dict().items()},[]
    def by_hand(module, q, k, v, causal, scale, mask, o): # slices and target of the heads by number
        fm = module.feature_map
        if fm.softmax_heads: q,k,v,o,fm = q[:,2:],k[:,k.shape[1]//2:],v[:,k.shape[1]//2:],o[:,2:],fm.rest
        want.append(layer_loss(objective, fm, q, k, v, causal, scale, mask, o).item())
    teacher_pass(model, batches[0], by_hand)
    history = distill(model, batches, 12, objective=objective).losses
    assert history[0]==pytest.approx(sum(want)/2, rel=1e-5) and history[-1]<.97*history[0]
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])==('.feature_map.' not in k), k

def test_a_hybrid_s_other_heads_are_distilled():
    model = linearize(llama(), 'hedgehog-window', window=4, softmax_heads=HEADS)
    for objective in ('weights', 'outputs', 'both'):
        h = distill(model, data_of(model, 'llama', 1)*8, 8, objective=objective).losses
        assert all(map(math.isfinite, h)) and h[-1]<h[0]
    with pytest.raises(ValueError, match='window of 4'): distill(model, data_of(model, 'llama', 1), 1, objective='order')

def test_heads_learn_alone():
    "Kept or not, a neighbour changes nothing in what a head's map learns, up to AdamW's epsilon."
    maps = []
    for kw in ({}, dict(softmax_heads='0:0-1')):
        model = linearize(llama(layers=1).double(), **kw).double(); distill(model, [corpus(4)]*10, 10)
        maps.append(next(iter(linear_layers(model).values())).feature_map.linear_part()[0])
    same(maps[1].w_q, maps[0].w_q[2:], 1e-4); same(maps[1].w_k, maps[0].w_k[1:], 1e-4); assert (maps[1].w_q-torch.eye(8)).abs().max()>.01

def test_a_stopped_distillation_goes_on(tmp_path):
    runs = []
    for stop in (None, 5):
        model = linearize(llama(), softmax_heads=HEADS); batches = [corpus(4, seed=i) for i in range(9)]; f = tmp_path/f'{stop}.safetensors'
        def on_step(step, *_):
            if step==stop: raise KeyboardInterrupt
        if stop:
            with pytest.raises(KeyboardInterrupt):
                distill(linearize(llama(), softmax_heads=HEADS), batches, 9, checkpoint=f, save_steps=2, callbacks=[OnStep(on_step)])
            with pytest.raises(ValueError, match='another model'): distill(linearize(llama(), softmax_heads='1:0-1'), batches, 9, checkpoint=f)
        runs.append((distill(model, batches, 9, checkpoint=f, save_steps=2).losses, model.state_dict()))
    assert runs[0][0]==runs[1][0] and all(torch.equal(x, runs[1][1][n]) for n,x in runs[0][1].items())

@pytest.mark.parametrize('lora', [None, dict(r=2, target_modules=['q_proj','v_proj'])], ids=['full','lora'])
def test_finetuning_reaches_both_kinds_of_heads(lora):
    model = linearize(llama(layers=2), softmax_heads='0:0-1;1:2-3'); blocks = corpus(32)
    before,ppl = {k:v.clone() for k,v in model.named_parameters()},perplexity(model, blocks)
    finetune(model, blocks, 15, batch_size=8, lr=2e-2 if lora else 1e-2, lora=lora)
    moved = {k for k,v in model.named_parameters() if not torch.equal(v, before[k])}
    assert (perplexity(model, blocks)<(.99 if lora else .8)*ppl
            and moved==({k for k in before if 'feature_map' in k or 'q_proj' in k or 'v_proj' in k} if lora else before.keys()))
    q = model.model.layers[0].self_attn.q_proj.weight; assert (q[:16]!=before['model.layers.0.self_attn.q_proj.weight'][:16]).any() # rows of the kept heads

# --- looking at it

def test_shares_and_branches_count_heads_as_the_model_does():
    x,mask = tokens(2, 30),torch.ones(2, 30, dtype=torch.long); mask[1,:20] = 0
    kw = dict(attention='hedgehog-window', window=6, layers='1-2')
    kept,whole = linearize(llama().double(), softmax_heads='1:0-1', **kw),linearize(llama().double(), **kw)
    rows,want = ({(r['layer'],r['head']):r for r in linear_weight_share(m, input_ids=x, attention_mask=mask)} for m in (kept, whole))
    assert [*rows]==[(0,2),(0,3),*((1,h) for h in range(4))]
    for h in (2,3): assert rows[0,h]==pytest.approx(want[0,h], rel=1e-6)      # the first converted layer sees the same in both
    both = logits(kept, input_ids=x)
    set_branch(kept, 'window')
    alone = logits(kept, input_ids=x)
    assert (alone-both).abs().max()>1e-3 and all(r['share']<1e-6 for r in linear_weight_share(kept, input_ids=x))
    assert {m.branch for m in kept.modules() if isinstance(m, WindowAttention)}=={'window'}
    set_branch(kept); assert torch.equal(logits(kept, input_ids=x), both)

def test_heads_are_picked_by_what_was_measured():
    # pairs of a layer measure 4l+3.5 and 4l+3
    report = [dict(variant=v, layer=l, head=h, kl=(1 if v=='softmax' else -1)*(l*4+(0,7,3,3)[h]))
        for v in ('hedgehog','softmax') for l in range(3) for h in range(4)]
    for n,want in ((0, ([0,1,2], '')), (1, ([0,1,2], '2:0-1')), (2, ([0,1], '')), (3, ([0,1], '1:0-1')), (5, ([0], '0:0-1'))):
        assert select_softmax_heads(report, n, 2, variant='softmax')==dict(zip(('layers','softmax_heads'), want))
    assert (select_softmax_heads(report, 3, 2)==dict(layers=[1,2], softmax_heads='1:2-3')
            and select_softmax_heads(report, 3, 2, largest=False)==select_softmax_heads(report, 3, 2, variant='softmax'))
    assert select_softmax_heads(report, 2, 4, variant='softmax')==dict(layers=[0,1,2], softmax_heads='1:1;2:1')
    for n in (-1, 6):
        with pytest.raises(ValueError, match=f'of 6 key-value heads 0 to 5 can be kept; given {n}'): select_softmax_heads(report, n, 2)
    for kw in (dict(variant='elu'), dict(by='entropy')):
        with pytest.raises(ValueError, match='there are hedgehog, softmax'): select_softmax_heads(report, 1, 2, **kw)
    model,x = llama(),tokens(2, 24); choice = select_softmax_heads(attention_report(linearize(llama()), x, min_keys=4), 3, 2)
    assert sum(len(m.feature_map.softmax_heads)//2 for m in linear_layers(linearize(model, **choice)).values())+2*(3-len(choice['layers']))==3

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', [*KINDS, dict(attention='performer'), dict(attention='rfa'), dict(layers='0,2')], ids=ids)
@pytest.mark.parametrize('layers,heads', [(None, '0:0-1;2:2-3'), ('0', '0:2-3'), ('0,2', None)])
def test_heads_that_get_softmax_back(name, kw, layers, heads):
    "The others keep their maps, buffers included: each head gives what it gave, on the queries and keys of the softmax model."
    if 'window' in kw and name not in CAUSAL: return
    model = shake(linearize(MODELS[name]().double(), **kw)).double().eval()
    x,was = inputs(model),linear_layers(model)
    maps = {n:m.feature_map for n,m in was.items()}
    seen = {c.name:c for c in capture_attention(model, **x)}
    assert keep_softmax_heads(model, layers, heads) is model
    numbers,kept = model.config.hedgehog['layers'],parse_heads(heads, [(4, module_kv(m, 4)) for m in was.values()]*3, [0,1,2])
    assert [*linear_layers(model)]==[n for i,n in zip([0,2] if 'layers' in kw else [0,1,2], was) if i in numbers]
    assert model.config.hedgehog.get('softmax_heads')==heads
    for i,(n,m) in zip(numbers, linear_layers(model).items()):
        c,att = seen[n],m.feature_map
        want = maps[n].weights(c.q, c.k, c.causal)
        if i in kept: want[:,kept[i]] = softmax_weights(c.q, c.k, c.causal, c.scale)[:,kept[i]]
        same(att.weights(c.q, c.k, c.causal), want)
        assert att.softmax_heads==kept.get(i, ()) and not att.training
    same(logits(model, **x), by_definition(model, name, **x))

@pytest.mark.parametrize('n', [1, 3, 5])
def test_a_model_with_heads_given_back_is_saved_and_writes(n, tmp_path):
    model,x,mask = shake(linearize(llama())).eval(),tokens(2, 12),torch.ones(2, 12, dtype=torch.long); mask[0,:5] = 0
    rows = kl_by_head(model, input_ids=x, attention_mask=mask)
    report = {(r['layer'],r['head']):r['kl'] for r in attention_report(model, dict(input_ids=x, attention_mask=mask)) if r['variant']=='hedgehog'}
    assert {(r['layer'],r['head']):r['kl'] for r in rows}==pytest.approx(report, rel=1e-6) and len(rows)==12
    choice = keep_worst_heads(model, n, input_ids=x, attention_mask=mask)
    assert choice==select_softmax_heads(rows, n, 2) and model.config.hedgehog['layers']==choice['layers']
    again,kw = load_linearized(save_linearized(model, tmp_path/'x')),dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, attention_mask=mask)
    outs = model.generate(x, **kw)
    for m in (model, again, copy.deepcopy(model)): assert torch.equal(m.generate(x, **kw, use_cache=False), outs) and torch.equal(m.generate(x, **kw), outs)
    cache = DynamicCache(config=model.config)
    model(x, past_key_values=cache)
    assert [type(l).__name__=='RecurrentLayer' for l in cache.layers]==[i in choice['layers'] for i in range(3)]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_maps_of_other_heads_stay_as_they_are(dtype):
    "Their dtype, and whether they are trained."
    model = shake(linearize(llama())).to(dtype)
    for n,p in model.named_parameters(): p.requires_grad_(n.endswith('w_q'))
    keep_softmax_heads(model, softmax_heads='0:0-1')
    assert {p.dtype for p in model.parameters()}=={dtype}
    assert all(p.requires_grad==n.endswith('w_q') for n,p in model.named_parameters())
    x = tokens(2, 12)
    assert logits(model, input_ids=x).isfinite().all()

def test_a_number_or_a_model_that_is_none():
    for call in (lambda: kl_by_head(llama(), input_ids=tokens()), lambda: keep_worst_heads(llama(), 1, input_ids=tokens())):
        with pytest.raises(ValueError, match='this model is not converted'): call()
    for n in (6, -1, 2.5):
        with pytest.raises(ValueError, match=f'of 6 key-value heads 0 to 5 can be kept; given {n}'): keep_worst_heads(linearize(llama()), n, input_ids=tokens())
    with pytest.raises(ValueError, match='how many, such as 4; given .2.5.'): LinearizeConfig(softmax_heads='2.5')

def test_short_and_shared_layers_are_measured():
    assert all(math.isfinite(r['kl']) for r in kl_by_head(linearize(llama()), input_ids=tokens(2, 3)))
    from transformers import AlbertConfig, AlbertModel
    torch.manual_seed(0)
    model = linearize(AlbertModel(AlbertConfig(hidden_size=32, embedding_size=16, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        vocab_size=VOCAB)).eval())
    rows = kl_by_head(model, input_ids=tokens())
    assert [(r['layer'], r['head']) for r in rows]==[(0, h) for h in range(4)] # one module, three times
    keep_worst_heads(model, 2, input_ids=tokens())
    assert len(next(iter(linear_layers(model).values())).feature_map.softmax_heads)==2

@pytest.mark.parametrize('kw,given,says', [({}, dict(softmax_heads='0:0'), 'head 0 shares its keys with head 1'),
    ({}, dict(layers='0,7'), 'layer 7 has no maps'),
    (dict(layers='0-1'), dict(layers='2', softmax_heads='2:0-1'), 'layer 2 has no maps; linear are the layers 0, 1'),
    (dict(softmax_heads='0:0-1'), dict(softmax_heads='1:0-1'), 'keeps softmax in heads 0:0-1 already'), ({}, dict(softmax_heads=2), 'is a number')], ids=ids)
def test_a_model_whose_heads_are_refused_is_as_it_was(kw, given, says):
    model = shake(linearize(llama(), **kw)); before,x = copy.deepcopy(model),tokens()
    with pytest.raises(ValueError, match=says): keep_softmax_heads(model, **given)
    assert torch.equal(logits(model, input_ids=x), logits(before, input_ids=x)) and model.config.hedgehog==before.config.hedgehog
    with pytest.raises(ValueError, match='this model is not converted'): keep_softmax_heads(llama(), softmax_heads='0:0-1')

@pytest.mark.parametrize('given,n', [(2,2), ('2',2), (' 12 ',12), (0,0), ('0',0), ('0:1',0), (None,0)])
def test_heads_are_named_or_counted(given, n):
    config = LinearizeConfig(softmax_heads=given)
    assert config.heads_to_choose==n and LinearizeConfig.from_dict(json.loads(json.dumps(config.to_dict())))==config
    assert (config.all_linear().softmax_heads is None)==(given!='0:1')
    if n:
        with pytest.raises(ValueError, match='is a number, for convert'): linearize(llama(), config)
    for bad in (-1, True, 1.5, '-1', '1.5'):
        with pytest.raises(ValueError): LinearizeConfig(softmax_heads=bad)

def test_reports_and_pictures():
    from hedgehog_nb.models.attention import attention_weights
    kept,whole,x = linearize(llama(), softmax_heads='0:0-1'),linearize(llama()),tokens(2, 24)
    rows,want = ({(r['variant'],r['layer'],r['head']):r for r in attention_report(m, x, min_keys=4)} for m in (kept, whole))
    assert want.keys()-rows.keys()=={('hedgehog',0,0),('hedgehog',0,1)} and rows.keys()<want.keys()
    for h in (2,3): assert rows['hedgehog',0,h]['kl']==pytest.approx(want['hedgehog',0,h]['kl'], rel=1e-6)
    a,b,c = (attention_weights(m, input_ids=x[:1])[0][0] for m in (kept, whole, llama()))
    same(a[:2], c[:2], 1e-6); same(a[2:], b[2:], 1e-6); assert (a[2:]-c[2:]).abs().max()>1e-2

def test_the_command_line(tmp_path, monkeypatch):
    from typer.testing import CliRunner
    from hedgehog_nb.cli import app
    def hedgehog(*args, code=0):
        r = CliRunner().invoke(app, [str(a) for a in args], prog_name='hedgehog'); assert r.exit_code==code, (r.stdout, r.stderr, r.exception)
        return r
    monkeypatch.chdir(tmp_path)
    (tmp_path/'run.yaml').write_text('map: hedgehog\nsoftmax-heads: "2:2-3"\nseq_len: 64\n'
        'batch-size: 4\neval-tokens: 256\ndistill-steps: 2\nfinetune-steps: 1\n')
    args = 'linearize','embedded','--data','embedded','--out','tales','--config','run.yaml'
    r = hedgehog(*args, '--record', 'run.json')
    assert 'in 5 layers but for heads 2:2-3' in r.stderr and '--softmax-heads 2:2-3' in json.loads((tmp_path/'run.json').read_text())['command']
    model = load_linearized('tales')
    assert model.config.hedgehog['softmax_heads']=='2:2-3' and model.model.layers[2].self_attn.feature_map.softmax_heads==[2,3]
    j = json.loads(hedgehog('generate', 'tales', '-p', 'Lily', '-n', 6, '--json').stdout); assert j['last_bytes']-j['first_bytes']==5*(2*8*4+1)
    rows = json.loads(hedgehog('properties', 'tales', '--data', 'embedded', '--by', 'head', '--tokens', 64, '--seq-len', 64, '--json').stdout)['rows']
    assert ({r['head'] for r in rows if r['variant']=='hedgehog' and r['layer']==2}=={0,1,4,5,6,7}
            and {r['head'] for r in rows if r['variant']=='softmax'}==set(range(8)))
    r = hedgehog(*args[:5], 'other', '--softmax-heads', '2:2', '--distill-steps', 1, code=1)
    assert r.stderr.count('\n')==1 and 'head 2 shares its keys with head 3' in r.stderr
    from hedgehog_nb.training import recipe as training
    def stop(*a, **k): raise OSError(28, 'No space left on device', 'x')
    monkeypatch.setattr(training, 'distill', stop); hedgehog(*args[:5], 'third', '--config', 'run.yaml', code=1)
    r = hedgehog(*args[:5], 'third', '--config', 'run.yaml', '--softmax-heads', '2:4-5', code=1)
    assert 'other settings (--softmax-heads 2:2-3 there, 2:4-5 here)' in r.stderr
