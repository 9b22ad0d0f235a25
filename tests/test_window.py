"""Window and linear attention against the fp64 oracle: shapes, forms, states, gradients, and what it refuses."""
import pytest, torch
from helpers.tiny_models import MODELS, tokens as token_ids
from hypothesis import given, settings, strategies as st
from transformers import DynamicCache
from hedgehog_nb.ops.softmax import softmax_attention, softmax_weights
from hedgehog_nb.training.losses import layer_loss, weight_loss
from hedgehog_nb.attentions.base import make_attention, make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.ops.linear import naive_linear_attention
from hedgehog_nb.models.attention import linear_layers, set_implementation
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.training.distill import distill
from hedgehog_nb.ops.window import (
    chunk_window_attention, linear_share, naive_window_attention, naive_window_weights, window_decode_step, window_max, WindowState)
from hedgehog_nb.models.hybrid import linear_weight_share, set_branch
from hedgehog_nb.attentions.window import features_with_log_weights

def rand(*s, seed=0, dtype=torch.float64): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def inputs(B=1, H=4, Hkv=2, T=17, D=8, form='exp', dtype=torch.float64, seed=0, masked=False, maps=1):
    "Everything that window attention takes, from a disturbed Hedgehog map."
    q,k,v = (rand(B, h, T, D, seed=seed+i, dtype=dtype) for i,h in enumerate((H, Hkv, Hkv)))
    fm = make_feature_map('hedgehog', D, H, Hkv, form=form, num_maps=maps).to(dtype)
    for i,p in enumerate(fm.parameters()): p.data = rand(*p.shape, seed=seed+9+i, dtype=dtype)*D**-.5
    with torch.no_grad(): phi_q,phi_k,log_q,log_k = features_with_log_weights(fm, q, k)
    mask = None
    if masked:
        mask = rand(B, T, seed=seed+5) > -1
        if T>3: mask[0,:3] = False
    return (q,k,v,phi_q,phi_k),dict(log_q=log_q, log_k=log_k, log_gamma=rand(H, seed=seed+6, dtype=dtype), mask=mask)

def tokens(args, kw, s, window=0):
    "The tokens `s` of everything; after a state of `window` keys, with the features and log weights of the keys that leave while these are read."
    late = lambda x: torch.cat([torch.zeros_like(x[:,:,:1]).expand(-1, -1, window, *x.shape[3:]), x], 2)[:,:,:x.shape[2]]
    kw = kw | dict(log_k=None if kw['log_k'] is None else late(kw['log_k']))
    return [x[:,:,s] for x in (*args[:4], late(args[4]))],{n: x if x is None or n=='log_gamma' else x[:,s] if n=='mask' else x[:,:,s] for n,x in kw.items()}

def leaves(s): return (*s[:3], *s.linear)

def close(a, r, tol=1e-13):
    assert a.shape==r.shape and torch.isfinite(a).all()
    if r.numel(): assert (a.double()-r.double()).abs().max() <= tol*r.abs().max().clamp_min(1), (a.double()-r.double()).abs().max()

@pytest.mark.parametrize('window', [0, 1, 16, 64, 200])
@pytest.mark.parametrize('T', [1, 17, 64, 100])
@pytest.mark.parametrize('D', [8, 32, 60, 64])
def test_shapes(D, T, window): # forms and heads take turns
    args,kw = inputs(1, 4, [4, 2, 1][(D+T) % 3], T, D, FORMS[(T+window) % 3], masked=T%2==1)
    close(chunk_window_attention(*args, window, **kw), naive_window_attention(*args, window, **kw))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('Hkv', [4, 2, 1])
def test_forms_and_heads(Hkv, form):
    args,kw = inputs(2, 4, Hkv, 40, form=form, masked=True)
    for w in (0, 1, 7, 40): close(chunk_window_attention(*args, w, **kw), naive_window_attention(*args, w, **kw))

def test_the_two_ends():
    args,kw = inputs(2, T=30, masked=True)
    q,k,v,phi_q,phi_k = args
    close(chunk_window_attention(*args, 30, **kw), softmax_attention(q, k, v, mask=kw['mask']))
    close(chunk_window_attention(*args, 0, **kw), naive_linear_attention(phi_q, phi_k, v, kw['log_k'], mask=kw['mask']))

def test_window_counts_positions():
    "Each query: softmax over the last w positions and features before, one row by hand."
    (q,k,v,phi_q,phi_k),kw = inputs(1, 1, 1, 12)
    i,w = 10,3
    near = (q[0,0,i] @ k[0,0,i-w+1:i+1].T*8**-.5 + kw['log_gamma']).exp()
    far = (kw['log_q'][0,0,i] + kw['log_k'][0,0,:i-w+1]).exp()*(phi_q[0,0,i] @ phi_k[0,0,:i-w+1].T)
    a = torch.cat([far, near]); close(naive_window_weights(q, k, phi_q, phi_k, w, **kw)[0,0,i,:i+1], a/a.sum())

@settings(max_examples=40, deadline=None, derandomize=True)
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 3), T=st.integers(1, 70), D=st.integers(1, 20),
       window=st.integers(0, 80), chunk=st.integers(1, 80), cut=st.integers(0, 69), form=st.sampled_from(FORMS),
       masked=st.booleans(), maps=st.integers(1, 2), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 99))
def test_drawn(B, Hkv, G, T, D, window, chunk, cut, form, masked, maps, dtype, seed):
    args,kw = inputs(B, Hkv*G, Hkv, T, D, form, dtype, seed, masked, maps)
    tol = 1e-13 if dtype==torch.float64 else 1e-6
    want = naive_window_attention(*(x.double() for x in args), window, **{n: x.double() if x is not None and n!='mask' else x for n,x in kw.items()})
    close(chunk_window_attention(*args, window, **kw, chunk_size=chunk), want, tol)
    cut = min(cut, T-1)
    if cut==0: return
    a,ka = tokens(args, kw, slice(cut)); b,kb = tokens(args, kw, slice(cut, None), window)
    o,mid = chunk_window_attention(*a, window, **ka, output_final_state=True, chunk_size=chunk)
    p,end = chunk_window_attention(*b, window, **kb, initial_state=mid, output_final_state=True)
    close(torch.cat([o, p], 2), want, tol)
    for x,y in zip(leaves(end), leaves(chunk_window_attention(*args, window, **kw, output_final_state=True)[1])): close(x, y, tol)

@pytest.mark.parametrize('window', [0, 1, 5, 64])
@pytest.mark.parametrize('form', FORMS)
def test_decoding_is_the_whole(form, window):
    args,kw = inputs(2, 4, 2, 24, form=form, masked=True)
    whole,end = chunk_window_attention(*args, window, **kw, output_final_state=True)
    state,os = WindowState.empty(*args[1:3], args[4], window),[]
    for t in range(24):
        a,ka = tokens(args, kw, slice(t, t+1), window)
        o,state = window_decode_step(*a, state, **ka); os.append(o)
    close(torch.cat(os, 2), whole)
    for x,y in zip(leaves(state), leaves(end)): close(x, y)

@pytest.mark.parametrize('window', [0, 1, 5, 30])
@pytest.mark.parametrize('form', FORMS)
def test_gradients(form, window):
    args,kw = inputs(1, 4, 2, 20, form=form, masked=True)
    def grads(f):
        ins = {n: x.detach().requires_grad_() for n,x in (*zip(('q','k','v','phi_q','phi_k'), args), *kw.items()) if x is not None and n!='mask'}
        return torch.autograd.grad(f(**ins, window=window, mask=kw['mask']).sin().sum(), list(ins.values()), allow_unused=True)
    for a,r in zip(grads(chunk_window_attention), grads(naive_window_attention)): # None where a window of 0 leaves something unused
        if a is None or r is None: assert all(x is None or x.abs().max()<1e-12 for x in (a, r))
        else: close(a, r)

def test_gradcheck():
    args,kw = inputs(1, 2, 1, 7, 3)
    ins = [x.detach().requires_grad_() for x in (*args, kw['log_q'], kw['log_k'], kw['log_gamma'])]
    assert torch.autograd.gradcheck(lambda *a: chunk_window_attention(*a[:5], 3, *a[5:], chunk_size=4), ins)

def test_gradients_flow_through_a_state():
    args,kw = inputs(1, 2, 1, 20, masked=True)
    of_all = (*args, *(kw[n] for n in ('log_q','log_k','log_gamma')))
    for x in of_all: x.requires_grad_()
    for window in (0, 5, 15): # older and younger than the first part, none at all
        whole = torch.autograd.grad(chunk_window_attention(*args, window, **kw)[:,:,9:].sin().sum(), of_all, materialize_grads=True, allow_unused=True)
        a,ka = tokens(args, kw, slice(9)); b,kb = tokens(args, kw, slice(9, None), window)
        _,mid = chunk_window_attention(*a, window, **ka, output_final_state=True)
        o = chunk_window_attention(*b, window, **kb, initial_state=mid)
        for x,y in zip(torch.autograd.grad(o.sin().sum(), of_all, materialize_grads=True, allow_unused=True), whole): close(x, y)

def test_causal():
    args,kw = inputs(1, T=40)
    late = [x.clone() for x in args]
    for x in late: x[:,:,25:] = 7
    close(chunk_window_attention(*late, 6, **kw)[:,:,:25], chunk_window_attention(*args, 6, **kw)[:,:,:25], 1e-12)

def test_padding_on_the_left_is_the_sequence_alone():
    args,kw = inputs(1, T=30)
    kw['mask'] = torch.arange(30)[None]>=11
    alone,ka = tokens(args, kw | dict(mask=None), slice(11, None))
    close(chunk_window_attention(*args, 6, **kw)[:,:,11:], chunk_window_attention(*alone, 6, **ka))
    assert not chunk_window_attention(*args, 6, **kw)[:,:,:11].any() # rows that see no key give 0

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_keeps_its_state_in_fp32(dtype, tol):
    args,kw = inputs(1, T=100, D=16)
    half = [x.to(dtype) for x in args]
    o,s = chunk_window_attention(*half, 16, **kw, output_final_state=True)
    assert o.dtype==dtype
    f32,s32 = chunk_window_attention(*(x.float() for x in half), 16, **{n: x.float() if x is not None else x for n,x in kw.items()}, output_final_state=True)
    close(o, f32, tol); assert all(x.dtype==torch.float32 for x in leaves(s32))

def test_neither_branch_overflows():
    args,kw = inputs(1, T=40, dtype=torch.float32)
    q,k,*rest = args
    for f in (60, 600):
        steep = (f*q, k, *rest); logs = dict(log_q=f*kw['log_q'], log_k=kw['log_k'])
        want = naive_window_attention(*(x.double() for x in steep), 7, **{n: x.double() for n,x in logs.items()})
        close(chunk_window_attention(*steep, 7, **logs), want, 1.5e-5)

def test_share():
    args,kw = inputs(2, T=40, masked=True)
    q,k,_,phi_q,phi_k = args
    for w in (0, 5, 40):
        near,far = naive_window_weights(q, k, phi_q, phi_k, w, **kw, branches=True)
        close(linear_share(q, k, phi_q, phi_k, w, **kw), far.sum(-1)); close(near+far, naive_window_weights(q, k, phi_q, phi_k, w, **kw))

def test_window_max():
    args,kw = inputs(2, T=40, masked=True)
    q,k = args[:2]
    s = q @ k.repeat_interleave(2, 1).mT*8**-.5
    for w in (1, 6, 99):
        near = torch.ones(40, 40, dtype=torch.bool).tril() & ~torch.ones(40, 40, dtype=torch.bool).tril(-w) & kw['mask'][:,None,None]
        r = s.masked_fill(~near, -torch.inf).amax(-1); close(window_max(q, k, w, mask=kw['mask'], chunk_size=13), r.masked_fill(r.isinf(), 0))

@pytest.mark.parametrize('relative', [False, True])
@pytest.mark.parametrize('form', FORMS)
def test_as_an_attention(form, relative):
    (q,k,v,*_),_ = inputs(1, T=30, dtype=torch.float32)
    att = make_attention('hedgehog-window', 8, 4, 2, window=5, form=form, relative=relative)
    o = att.attend(q, k, v)
    o.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum()>0 for p in att.parameters())
    close(o, att.weights(q, k) @ v.repeat_interleave(2, 1), 5e-7)
    assert ((att.linear_share(q, k)>=0) & (att.linear_share(q, k)<=1)).all()
    with pytest.raises(ValueError, match='causal only'): att.attend(q, k, v, causal=False)
    with pytest.raises(ValueError, match='window is a number'): make_attention('hedgehog-window', 8, 4, window=-1)

def test_beams_reorder_the_state():
    args,kw = inputs(3, T=20)
    _,s = chunk_window_attention(*args, 4, **kw, output_final_state=True)
    idx = torch.tensor([2,0,0])
    for a,b in zip(leaves(s.apply(lambda x: x[idx])), leaves(s)): assert torch.equal(a, b[idx])

@pytest.mark.parametrize('message,change', [
    ('window is a number of keys, 0 or more; given -1', dict(window=-1)), ('window is', dict(window=2.)), ('window is', dict(window=True)),
    ('chunk_size must be', dict(chunk_size=0)), ('as many queries', lambda a: dict(q=a['q'][:,:,:9], phi_q=a['phi_q'][:,:,:9])),
    ('phi_q is', lambda a: dict(phi_q=a['phi_q'][:,:2])), ('log_q is', dict(log_q=torch.zeros(1, 4, 3))), ('log_k is', dict(log_k=torch.zeros(1, 4, 17))),
    ('log_gamma is', dict(log_gamma=torch.zeros(2))), ('mask is', dict(mask=torch.ones(1, 3))),
    ('same channels', lambda a: dict(k=a['k'][...,:4])), ('same heads and tokens', lambda a: dict(phi_k=a['phi_k'][:,:,:3])),
    ('floating point', lambda a: dict(v=a['v'].long())),
    ('initial_state has shapes', lambda a: dict(initial_state=WindowState.empty(a['k'], a['v'], a['phi_k'], 3))),
])
def test_errors_say_what_was_given(message, change):
    args,_ = inputs()
    a = dict(zip(('q','k','v','phi_q','phi_k'), args)) | dict(window=4)
    with pytest.raises(ValueError, match=message): chunk_window_attention(**(a | (change(a) if callable(change) else change)))

def test_steps_refuse_more_than_a_token():
    args,_ = inputs()
    with pytest.raises(ValueError, match='takes one token'): window_decode_step(*args, WindowState.empty(*args[1:3], args[4], 4))

# --- the loss, and converted models

KINDS = [dict(window=7, form='exp'), dict(window=7), dict(window=7, relative=True), dict(window=1, bias=True),
    dict(window=90), dict(window=0), dict(window=7, branch='window'), dict(window=7, branch='linear')]
kind = pytest.mark.parametrize('kw', KINDS)

def hybrid(D=8, H=4, Hkv=2, by=.2, **kw):
    "A hybrid in fp64, moved off its start."
    a = make_attention('hedgehog-window', D, H, Hkv, **kw).double()
    for i,p in enumerate(a.parameters()): p.data += by*rand(*p.shape, seed=50+i)
    return a

@kind
@pytest.mark.parametrize('masked', [False, True])
def test_weight_loss_is_the_divergence_of_its_weights(kw, masked):
    a,q,k = hybrid(**kw),rand(2, 4, 40, 8),rand(2, 2, 40, 8, seed=1)
    mask = rand(2, 40, seed=5)>-1 if masked else None
    if masked: mask[:,0] = True
    rows = torch.ones(2, 40, dtype=torch.bool) if mask is None else mask
    def naive():
        p,w = softmax_weights(q, k, mask=mask),a.weights(q, k, mask=mask)
        kl = (torch.special.xlogy(p, p) - torch.where(p>0, p*w.clamp_min(1e-300).log(), 0)).sum(-1)
        return (kl*rows[:,None]).sum()/rows.sum()/4
    # older keys have no weight: a floor stands in
    if kw.get('branch')=='window': return close(weight_loss(q, k, a, mask=mask, rows=13).isfinite().double(), torch.ones((), dtype=torch.float64))
    want,got = naive(),weight_loss(q, k, a, mask=mask, rows=13)
    close(got, want)
    for x,y in zip(*(torch.autograd.grad(l, list(a.parameters()), allow_unused=True) for l in (got, want))):
        if x is not None or y is not None: close(x, y)

def test_other_losses():
    a,q,k,v = hybrid(window=7),rand(2, 4, 40, 8),rand(2, 2, 40, 8, seed=1),rand(2, 2, 40, 8, seed=2)
    t,o = softmax_attention(q, k, v),a.attend(q, k, v)
    close(layer_loss('outputs', a, q, k, v), ((o-t).square().sum((0,2,3))/t.square().sum((0,2,3))).mean())
    close(layer_loss('both', a, q, k, v), layer_loss('weights', a, q, k)+layer_loss('outputs', a, q, k, v))
    with pytest.raises(ValueError, match='window of 7'): layer_loss('order', a, q, k, v)

@kind
def test_one_branch_alone(kw):
    "Each switch against its own definition."
    a,q,k,v = hybrid(**kw),rand(2, 4, 40, 8),rand(2, 2, 40, 8, seed=1),rand(2, 2, 40, 8, seed=2)
    a.branch = 'linear'; close(a.attend(q, k, v), a.map.attend(q, k, v))
    if a.window==0: return
    a.branch = 'window'
    s = (q @ k.repeat_interleave(2, 1).mT*a.scale).masked_fill(torch.ones(40, 40).tril().triu(1-a.window)==0, -torch.inf)
    close(a.attend(q, k, v), s.softmax(-1) @ v.repeat_interleave(2, 1))

@kind
def test_attending_in_pieces(kw):
    "Prompts cut anywhere, then steps: the relative form looks into the ring too."
    a,q,k,v = hybrid(**kw),rand(2, 4, 40, 8),rand(2, 2, 40, 8, seed=1),rand(2, 2, 40, 8, seed=2)
    mask = torch.ones(2, 40, dtype=torch.bool); mask[1,:5] = False
    state,os,i = None,[],0
    for n in (3, 9, 1, 1, 20, 1, 5):
        s = slice(i, i+n); i += n
        o,state = a.attend(q[:,:,s], k[:,:,s], v[:,:,s], mask=mask[:,s], initial_state=state, output_final_state=True); os.append(o)
    close(torch.cat(os, 2)[mask[:,None].expand(2, 4, 40)], a.attend(q, k, v, mask=mask)[mask[:,None].expand(2, 4, 40)])

@kind
def test_gradients_in_pieces(kw):
    "What a module learns from a prompt in pieces, whose keys are mapped when they leave, is what it learns from the whole."
    a,xs = hybrid(**kw),[rand(2, h, 40, 8, seed=i).requires_grad_() for i,h in enumerate((4, 2, 2))]
    mask = torch.ones(2, 40, dtype=torch.bool); mask[1,:5] = False
    def grads(*sizes):
        state,os = None,[]
        for s in torch.arange(40).split(sizes):
            s = slice(s[0], s[-1]+1)
            o,state = a.attend(*(x[:,:,s] for x in xs), mask=mask[:,s], initial_state=state, output_final_state=True); os.append(o)
        return torch.autograd.grad(torch.cat(os, 2).sin().sum(), (*xs, *a.parameters()), allow_unused=True, materialize_grads=True)
    for x,y in zip(grads(3, 9, 1, 20, 7), grads(40)): close(x, y)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_keys_are_mapped_when_they_leave_as_they_came(dtype):
    "The state keeps raw keys in fp32: their features are bit by bit those of the keys that were given."
    a = make_attention('hedgehog-window', 8, 4, 2, window=7, form='exp').to(dtype)
    q,k,v = (rand(1, h, 30, 8, seed=i, dtype=dtype) for i,h in enumerate((4, 2, 2)))
    with torch.no_grad():
        _,phi,_,_,log,*_ = a.inputs(q, k)
        for cut in (3, 7, 20):
            _,s = a.attend(q[:,:,:cut], k[:,:,:cut], v[:,:,:cut], output_final_state=True)
            _,late,_,_,late_log,*_ = a.inputs(q[:,:,cut:], k[:,:,cut:], state=s)
            n = max(0, 7-cut) # places before the first token
            assert torch.equal(late[:,:,n:], phi[:,:,max(0, cut-7):23]) and torch.equal(late_log[:,:,n:], log[:,:,max(0, cut-7):23])
            assert s.real[0].tolist()==[0.]*n + [1.]*(7-n)

def test_a_state_holds_no_features():
    args,kw = inputs(2, 4, 2, 30)
    _,s = chunk_window_attention(*args, 9, **kw, output_final_state=True)
    assert [x.numel() for x in s[:3]]==[2*2*9*8, 2*2*9*8, 2*9]

def greedy(model, ids, n, mask):
    for _ in range(n):
        pos = (mask.cumsum(-1)-1).clamp_min(0)
        nxt = model(input_ids=ids, attention_mask=mask, position_ids=pos, use_cache=False).logits[:,-1].argmax(-1, keepdim=True)
        ids,mask = torch.cat([ids, nxt], 1),torch.cat([mask, torch.ones_like(nxt)], 1)
    return ids

@pytest.mark.parametrize('name', ['llama', 'gpt2'])
@kind
@torch.no_grad()
def test_converted_models_write(name, kw):
    "Left-padded prompts, greedy and in pieces, as full forward passes do; one size of state at any length."
    model = linearize(MODELS[name]().double(), 'hedgehog-window', **kw)
    for i,m in enumerate(linear_layers(model).values()):
        for j,p in enumerate(m.feature_map.parameters()): p += .1*rand(*p.shape, seed=9*i+j)
    x,mask = token_ids(2, 10),torch.ones(2, 10, dtype=torch.long); mask[1,:4] = 0
    out = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=25, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(out, greedy(model, x, 25, mask))
    whole,cache,sizes = model(input_ids=out, use_cache=False).logits,DynamicCache(),set()
    parts = []
    for p in out.split([4, 1, 20, 10], 1): parts.append(model(input_ids=p, past_key_values=cache).logits); sizes.add(sum(l.nbytes for l in cache.layers))
    close(torch.cat(parts, 1), whole, 1e-9); assert len(sizes)==1
    set_implementation(model, 'naive'); close(model(input_ids=out, use_cache=False).logits, whole, 1e-9)

def test_a_converted_hybrid_trains_saves_and_loads(tmp_path):
    model = linearize(MODELS['llama'](), 'hedgehog-window', window=4, relative=True, layers='0,2')
    before = {n:p.clone() for n,p in model.named_parameters()}
    h = distill(model, [dict(input_ids=token_ids(4, 24))]*30, 30, lr=.05).losses
    assert h[-1]<.9*h[0] and all(torch.equal(p, before[n])==('.feature_map.' not in n) for n,p in model.named_parameters())
    again = load_linearized(save_linearized(model, tmp_path/'m'))
    a,b = model.state_dict(),again.state_dict()
    assert a.keys()==b.keys() and all(torch.equal(a[n], b[n]) for n in a) and again.config.hedgehog==model.config.hedgehog

@pytest.mark.parametrize('name,kw,says', [('bert', {}, 'causal only'), ('llama', dict(window=-1), 'window'),
    ('llama', dict(window=0, relative=True), 'window'), ('llama', dict(branch='left'), "both, window, linear"), ('llama', dict(rank=3), 'rank')])
def test_what_cannot_be_a_hybrid(name, kw, says):
    model = MODELS[name]()
    with pytest.raises(ValueError, match=says): linearize(model, 'hedgehog-window', **kw)
    assert not linear_layers(model) and not hasattr(model.config, 'hedgehog')

def test_shares_and_branches_of_a_model():
    model = linearize(MODELS['llama'](), 'hedgehog-window', window=6, layers='0,2')
    x,mask = token_ids(2, 30),torch.ones(2, 30, dtype=torch.long); mask[1,:20] = 0
    rows = linear_weight_share(model, input_ids=x, attention_mask=mask)
    assert [(r['layer'], r['head']) for r in rows]==[(i, h) for i in (0, 1) for h in range(4)] and all(0<r[n]<1 for r in rows for n in ('share','softmax'))
    whole = model(input_ids=x).logits
    set_branch(model, 'window'); assert not torch.allclose(model(input_ids=x).logits, whole)
    assert all(r['share']<1e-6 for r in linear_weight_share(model, input_ids=x))
    set_branch(model); assert torch.equal(model(input_ids=x).logits, whole)
    for f,says in ((lambda: set_branch(model, 'left'), 'both, window, linear'),
                   (lambda: linear_weight_share(model, input_ids=x[:,:6]), 'no token .* window of 6'),
                   (lambda: set_branch(linearize(MODELS['llama']())), 'no hybrid layers'),
                   (lambda: linear_weight_share(MODELS['llama'](), input_ids=x), 'no hybrid layers')):
        with pytest.raises(ValueError, match=says): f()

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_an_empty_state_holds_sums_in_fp32_or_more(dtype):
    k,v,phi = (torch.rand(2, 2, 5, 8).to(dtype) for _ in range(3))
    state = WindowState.empty(k, v, phi, 3)
    assert all(x.dtype==torch.promote_types(dtype, torch.float32) for x in state.linear) # log weights of -1e30 do not fit fp16
    q = torch.rand(2, 4, 5, 8).to(dtype)
    late = torch.cat([torch.zeros_like(phi[:,:,:3]), phi[:,:,:2]], 2)
    a,b = (chunk_window_attention(q, k, v, q, p, 3, initial_state=s) for p,s in ((late, state), (phi, None)))
    assert torch.allclose(a, b, atol=1e-2 if dtype!=torch.float64 else 1e-12)
