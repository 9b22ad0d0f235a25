"""Window and linear attention against the fp64 oracle: shapes, forms, states, gradients, and what it refuses."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.attention import softmax_attention
from hedgehog_nb.feature_maps import make_attention, make_feature_map
from hedgehog_nb.hedgehog import FORMS
from hedgehog_nb.linear_attention import LinearState, naive_linear_attention
from hedgehog_nb.window import (WindowState, chunk_window_attention, joint_features, linear_share, naive_window_attention, naive_window_weights,
                                window_decode_step, window_max)

def rand(*s, seed=0, dtype=torch.float64): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def inputs(B=1, H=4, Hkv=2, T=17, D=8, form='exp', dtype=torch.float64, seed=0, masked=False, maps=1):
    "Everything that window attention takes, from a disturbed Hedgehog map."
    q,k,v = (rand(B, h, T, D, seed=seed+i, dtype=dtype) for i,h in enumerate((H, Hkv, Hkv)))
    fm = make_feature_map('hedgehog', D, H, Hkv, form=form, num_maps=maps).to(dtype)
    for i,p in enumerate(fm.parameters()): p.data = rand(*p.shape, seed=seed+9+i, dtype=dtype)*D**-.5
    with torch.no_grad(): phi_q,phi_k,log_q,log_k = joint_features(fm, q, k)
    mask = None
    if masked:
        mask = rand(B, T, seed=seed+5) > -1
        if T>3: mask[0,:3] = False
    return (q,k,v,phi_q,phi_k),dict(log_q=log_q, log_k=log_k, log_gamma=rand(H, seed=seed+6, dtype=dtype), mask=mask)

def tokens(args, kw, s): return [x[:,:,s] for x in args],{n: x if x is None or n=='log_gamma' else x[:,s] if n=='mask' else x[:,:,s] for n,x in kw.items()}

def leaves(s): return (*s[:4], *s.linear)

def close(a, r, tol=1e-10):
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
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 3), T=st.integers(1, 70), D=st.integers(1, 20), window=st.integers(0, 80), chunk=st.integers(1, 80), cut=st.integers(0, 69),
       form=st.sampled_from(FORMS), masked=st.booleans(), maps=st.integers(1, 2), dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 99))
def test_drawn(B, Hkv, G, T, D, window, chunk, cut, form, masked, maps, dtype, seed):
    args,kw = inputs(B, Hkv*G, Hkv, T, D, form, dtype, seed, masked, maps)
    tol = 1e-9 if dtype==torch.float64 else 1e-4
    want = naive_window_attention(*(x.double() for x in args), window, **{n: x.double() if x is not None and n!='mask' else x for n,x in kw.items()})
    close(chunk_window_attention(*args, window, **kw, chunk_size=chunk), want, tol)
    cut = min(cut, T-1)
    if cut==0: return
    a,ka = tokens(args, kw, slice(cut)); b,kb = tokens(args, kw, slice(cut, None))
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
        a,ka = tokens(args, kw, slice(t, t+1))
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
    args,kw = inputs(1, 2, 1, 20)
    v = args[2].detach().requires_grad_()
    whole, = torch.autograd.grad(chunk_window_attention(*args[:2], v, *args[3:], 5, **kw)[:,:,9:].sin().sum(), v)
    a,ka = tokens((*args[:2], v, *args[3:]), kw, slice(9)); b,kb = tokens((*args[:2], v, *args[3:]), kw, slice(9, None))
    _,mid = chunk_window_attention(*a, 5, **ka, output_final_state=True)
    part, = torch.autograd.grad(chunk_window_attention(*b, 5, **kb, initial_state=mid).sin().sum(), v)
    close(part, whole)

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

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
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
        close(chunk_window_attention(*steep, 7, **logs), want, 1e-3)

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
    import hedgehog_nb.window
    (q,k,v,*_),_ = inputs(1, T=30, dtype=torch.float32)
    att = make_attention('hedgehog-window', 8, 4, 2, window=5, form=form, relative=relative)
    o = att.attend(q, k, v)
    o.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum()>0 for p in att.parameters())
    close(o, att.weights(q, k) @ v.repeat_interleave(2, 1), 1e-5)
    assert ((att.linear_share(q, k)>=0) & (att.linear_share(q, k)<=1)).all()
    with pytest.raises(ValueError, match='causal only'): att.attend(q, k, v, causal=False)
    with pytest.raises(ValueError, match='window is a number'): make_attention('hedgehog-window', 8, 4, window=-1)

def test_beams_reorder_the_state():
    args,kw = inputs(3, T=20)
    _,s = chunk_window_attention(*args, 4, **kw, output_final_state=True)
    idx = torch.tensor([2,0,0])
    for a,b in zip(leaves(s.apply(lambda x: x[idx])), leaves(s)): assert torch.equal(a, b[idx])

@pytest.mark.parametrize('message,change', [
    ('window is a number of keys, 0 or more; given -1', dict(window=-1)), ('window is', dict(window=2.)), ('window is', dict(window=True)), ('chunk_size must be', dict(chunk_size=0)),
    ('as many queries', lambda a: dict(q=a['q'][:,:,:9], phi_q=a['phi_q'][:,:,:9])), ('phi_q is', lambda a: dict(phi_q=a['phi_q'][:,:2])), ('log_q is', dict(log_q=torch.zeros(1, 4, 3))), ('log_k is', dict(log_k=torch.zeros(1, 4, 17))),
    ('log_gamma is', dict(log_gamma=torch.zeros(2))), ('mask is', dict(mask=torch.ones(1, 3))), ('same channels', lambda a: dict(k=a['k'][...,:4])), ('same heads and tokens', lambda a: dict(phi_k=a['phi_k'][:,:,:3])),
    ('floating point', lambda a: dict(v=a['v'].long())), ('initial_state has shapes', lambda a: dict(initial_state=WindowState.empty(a['k'], a['v'], a['phi_k'], 3))),
])
def test_errors_say_what_was_given(message, change):
    args,_ = inputs()
    a = dict(zip(('q','k','v','phi_q','phi_k'), args)) | dict(window=4)
    with pytest.raises(ValueError, match=message): chunk_window_attention(**(a | (change(a) if callable(change) else change)))

def test_steps_refuse_more_than_a_token():
    args,_ = inputs()
    with pytest.raises(ValueError, match='takes one token'): window_decode_step(*args, WindowState.empty(*args[1:3], args[4], 4))
