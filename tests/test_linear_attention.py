"Quadratic = recurrent = chunked = the fp64 oracle, in every shape, precision and split."
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.ops.linear import (
    bidirectional_linear_attention, chunk_linear_attention, LinearState, naive_linear_attention, naive_linear_weights, recurrent_linear_attention)
from hedgehog_nb.functional import linear_attention

CAUSAL = dict(recurrent=recurrent_linear_attention, chunked=chunk_linear_attention)

def features(B=2, H=4, Hkv=2, T=17, F=6, D=5, logs=True, dtype=torch.float64, spread=3.):
    "Positive features as maps give them, values, and log weights."
    phi_q,phi_k = torch.rand(B,H,T,F, dtype=dtype)+.05, torch.rand(B,Hkv,T,F, dtype=dtype)+.05
    return phi_q, phi_k, torch.randn(B,Hkv,T,D, dtype=dtype), spread*torch.randn(B,Hkv,T, dtype=dtype) if logs else None

def oracle(phi_q, phi_k, v, log_k=None, causal=True, mask=None):
    "The definition, row by row in fp64; written apart from the library."
    phi_q,phi_k,v = phi_q.double(),phi_k.double(),v.double()
    B,H,Tq,_ = phi_q.shape; Hkv,T = phi_k.shape[1:3]
    o = phi_q.new_zeros(B,H,Tq,v.shape[-1])
    for b in range(B):
        for h in range(H):
            g = h*Hkv//H
            for i in range(Tq):
                ok = torch.arange(T)<=(i+T-Tq if causal else T)
                if mask is not None: ok = ok & mask[b].bool()
                if not ok.any(): continue
                w = phi_k[b,g,ok]@phi_q[b,h,i]
                if log_k is not None: l = log_k[b,g,ok].double(); w = w*(l-l.max()).exp()
                o[b,h,i] = w@v[b,g,ok]/w.sum().clamp_min(1e-300)
    return o

def same(a, b, tol=1e-13): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)

def true_state(s):
    "S and z of a state with the common factor put back."
    f = s.m.double().exp()
    return s.S.double()*f[...,None,None], s.z.double()*f[...,None]

def same_state(a, b, tol=1e-13):
    for x,y in zip(true_state(a), true_state(b)): same(x, y, tol)


shapes = dict(B=st.integers(1,2), Hkv=st.integers(1,3), G=st.integers(1,3), T=st.integers(1,40), F=st.integers(1,7), D=st.integers(1,6), logs=st.booleans())

@settings(max_examples=40)
@given(chunk=st.integers(1,48), masked=st.booleans(), bits=st.integers(0,2**31), **shapes)
def test_all_forms_equal_the_oracle(B, Hkv, G, T, F, D, logs, chunk, masked, bits):
    torch.manual_seed(bits)
    args = features(B, Hkv*G, Hkv, T, F, D, logs)
    mask = torch.rand(B,T)<.6 if masked else None
    want = oracle(*args, mask=mask)
    same(naive_linear_attention(*args, mask=mask), want)
    r,rs = recurrent_linear_attention(*args, mask=mask, output_final_state=True)
    c,cs = chunk_linear_attention(*args, mask=mask, output_final_state=True, chunk_size=chunk)
    same(r, want); same(c, want); same_state(rs, cs)
    same(bidirectional_linear_attention(*args, mask=mask), oracle(*args, causal=False, mask=mask))
    same(naive_linear_attention(*args, causal=False, mask=mask), oracle(*args, causal=False, mask=mask))

@pytest.mark.parametrize('logs', [False,True])
@pytest.mark.parametrize('T', [1,2,17,63,64,65,130])
@pytest.mark.parametrize('head_dim', [8,60])
def test_shapes_that_fit_no_block(T, head_dim, logs):
    args = features(1, 2, 1, T, 2*head_dim, head_dim, logs)
    want = naive_linear_attention(*args)
    for impl in ('recurrent','chunked',None): same(linear_attention(*args[:3], lambda q,k: (q,k,args[3]), implementation=impl), want)
    if T<=17: same(want, oracle(*args))

@settings(max_examples=30)
@given(cut=st.integers(0,40), chunk=st.integers(1,20), first=st.sampled_from(list(CAUSAL)),
       then=st.sampled_from(list(CAUSAL)), masked=st.booleans(), bits=st.integers(0,2**31), **shapes)
def test_halves_with_a_carried_state_are_the_whole(B, Hkv, G, T, F, D, logs, cut, chunk, first, then, masked, bits):
    torch.manual_seed(bits)
    T,cut = T+1, 1+cut%T
    args,mask = features(B, Hkv*G, Hkv, T, F, D, logs), torch.rand(B,T)<.7 if masked else None
    def part(f, a, b, state):
        kw = dict(chunk_size=chunk) if f=='chunked' else {}
        return CAUSAL[f](*(None if x is None else x[:,:,a:b] for x in args),
            mask=None if mask is None else mask[:,a:b], initial_state=state, output_final_state=True, **kw)
    whole,end = part(first, 0, T, None)
    o1,mid = part(first, 0, cut, None)
    o2,end2 = part(then, cut, T, mid)
    same(torch.cat([o1,o2], 2), whole); same_state(end2, end)

def test_many_small_steps_are_the_whole():
    args = features(T=33)
    whole,end = chunk_linear_attention(*args, output_final_state=True)
    s,os = None,[]
    for t in range(33):
        o,s = linear_attention(*(x[:,:,t:t+1] for x in args[:3]), lambda q,k: (q,k,args[3][:,:,t:t+1]), initial_state=s, output_final_state=True)
        os.append(o)
    same(torch.cat(os, 2), whole); same_state(s, end)

@pytest.mark.parametrize('f', CAUSAL)
@pytest.mark.parametrize('shift', [-5.,0.,7.])
def test_a_state_with_log_weights_continues_without(f, shift):
    "The factor that was taken out of S and z must meet keys that have no log weight."
    q,k,v,l = features(T=20)
    l = l+shift
    l2 = torch.cat([l[:,:,:11], torch.zeros_like(l[:,:,11:])], 2)
    _,s = CAUSAL[f](q[:,:,:11], k[:,:,:11], v[:,:,:11], l[:,:,:11], output_final_state=True)
    o,s = CAUSAL[f](q[:,:,11:], k[:,:,11:], v[:,:,11:], initial_state=s, output_final_state=True)
    whole,end = naive_linear_attention(q, k, v, l2), recurrent_linear_attention(q, k, v, l2, output_final_state=True)[1]
    same(o, whole[:,:,11:]); same_state(s, end)

@pytest.mark.parametrize('shift', [-5.,0.,7.])
@pytest.mark.parametrize('logs', [False,True])
def test_bidirectional_with_a_state(logs, shift):
    q,k,v,l = features(T=12)
    l = l+shift
    _,s = bidirectional_linear_attention(q[:,:,:5], k[:,:,:5], v[:,:,:5], l[:,:,:5], output_final_state=True)
    l2 = l[:,:,5:] if logs else None
    o,_ = bidirectional_linear_attention(q[:,:,5:], k[:,:,5:], v[:,:,5:], l2, initial_state=s, output_final_state=True)
    l = l if logs else torch.cat([l[:,:,:5], torch.zeros_like(l[:,:,5:])], 2)
    same(o, oracle(q[:,:,5:], k, v, l, causal=False))

@pytest.mark.parametrize('logs', [False,True])
@pytest.mark.parametrize('impl', ['naive','recurrent','chunked'])
def test_packed_is_separate(logs, impl):
    q,k,v,l = features(B=1, T=40, logs=logs)
    fm = lambda q,k: (q,k,l if q.shape[2]==40 else None)
    cu = [0,1,18,35,40]
    got = linear_attention(q, k, v, fm, cu_seqlens=torch.tensor(cu), implementation=impl, chunk_size=8)
    for a,b in zip(cu, cu[1:]):
        same(got[:,:,a:b], oracle(*(None if x is None else x[:,:,a:b] for x in (q,k,v,l))))
    both = linear_attention(q, k, v, fm, causal=False, cu_seqlens=cu, implementation=impl)
    same(both[:,:,1:18], oracle(*(None if x is None else x[:,:,1:18] for x in (q,k,v,l)), causal=False))

@pytest.mark.parametrize('causal', [True,False])
@pytest.mark.parametrize('impl', ['recurrent','chunked'])
def test_packed_with_masks_and_states(impl, causal):
    q,k,v,_ = features(B=1, T=40)
    mask,cu = torch.rand(1, 40) > .3,[0,1,18,40]
    before = LinearState(torch.rand(3,2,6,5).double(), torch.rand(3,2,6).double(), torch.randn(3,2).double())
    kw = dict(causal=causal, implementation=impl, output_final_state=True, chunk_size=8)
    o,s = linear_attention(q, k, v, mask=mask, initial_state=before, cu_seqlens=cu, **kw)
    for i,(a,b) in enumerate(zip(cu, cu[1:])):
        o1,s1 = linear_attention(*(x[:,:,a:b] for x in (q,k,v)), mask=mask[:,a:b], initial_state=before.apply(lambda x: x[i:i+1]), **kw)
        same(o[:,:,a:b], o1); same_state(s.apply(lambda x: x[i:i+1]), s1)
    with pytest.raises(ValueError, match='each of the 3'): linear_attention(q, k, v, initial_state=before.apply(lambda x: x[:1]), cu_seqlens=cu, **kw)
    with pytest.raises(ValueError, match='list or a one-dimensional'): linear_attention(q, k, v, cu_seqlens=[0,1.5,40])
    with pytest.raises(ValueError, match='list or a one-dimensional'): linear_attention(q, k, v, cu_seqlens=torch.tensor([[0,40]]))

@pytest.mark.parametrize('where', ['left','right','middle','both'])
@pytest.mark.parametrize('logs', [False,True])
def test_padding_leaves_outputs_and_state(where, logs):
    "Padded keys hold large garbage; the real tokens' outputs and the state must be those of the tokens alone."
    B,T,n = 2,13,5
    args = features(B, T=T, logs=logs)
    at = dict(left=[0,T], right=[T,T], middle=[6,T], both=[0,13])[where]
    real = torch.ones(T+2*n, dtype=torch.bool)
    real[at[0]:at[0]+n] = False
    real[(~real).sum()+at[1]:(~real).sum()+at[1]+n] = False
    def pad(x, big):
        if x is None: return None
        y = big*torch.rand(*x.shape[:2],T+2*n,*x.shape[3:], dtype=x.dtype); y[:,:,real] = x; return y
    padded,mask = [pad(x, 1e4) for x in args], real.expand(B,-1)
    for f in CAUSAL.values():
        o,s = f(*args, output_final_state=True)
        po,ps = f(*padded, mask=mask, output_final_state=True)
        same(po[:,:,real], o); same_state(ps, s)
    same(bidirectional_linear_attention(*padded, mask=mask)[:,:,real], oracle(*args, causal=False))
    same(naive_linear_attention(*padded, mask=mask)[:,:,real], oracle(*args))
    a = naive_linear_weights(padded[0], padded[1], padded[3], mask=mask)
    assert (a[...,~real]==0).all()  # out of the denominator as well
    same(a[:,:,real].sum(-1), torch.ones(B,4,T))

@pytest.mark.parametrize('f', CAUSAL)
def test_nothing_but_padding_gives_nothing(f):
    args = features(T=9)
    o,s = CAUSAL[f](*args, mask=torch.zeros(2,9, dtype=torch.bool), output_final_state=True)
    assert (o==0).all() and (s.S==0).all() and (s.z==0).all()
    o2,s2 = CAUSAL[f](*args, initial_state=s, output_final_state=True)  # and leaves no trace
    w,ws = CAUSAL[f](*args, output_final_state=True)
    same(o2, w); same_state(s2, ws)

@pytest.mark.parametrize('impl', ['naive','recurrent','chunked'])
def test_causal(impl):
    q,k,v,l = features(T=21)
    f = lambda: linear_attention(q, k, v, lambda q,k: (q,k,l), implementation=impl, chunk_size=4)
    before = f()
    t = 10
    k[:,:,t] += 1; v[:,:,t] -= 3; l[:,:,t] += 2
    after = f()
    assert torch.equal(before[:,:,:t], after[:,:,:t])
    assert (before[:,:,t:]!=after[:,:,t:]).any(-1).all()

def test_sums_run_over_time_not_heads():
    "A key-value head that holds zeros must leave the others alone; heads and time are exchanged by a wrong cumsum."
    q,k,v,l = features(H=6, Hkv=3, T=8)
    o,s = chunk_linear_attention(q, k, v, l, output_final_state=True)
    for g in range(3):
        og,sg = chunk_linear_attention(q[:,2*g:2*g+2], k[:,g:g+1], v[:,g:g+1], l[:,g:g+1], output_final_state=True)
        same(o[:,2*g:2*g+2], og); same_state(LinearState(*(x[:,g:g+1] for x in s)), sg)

def test_scalars_on_queries_cancel_and_on_keys_weigh():
    q,k,v,_ = features(T=14, logs=False)
    c = torch.rand(2,4,14, dtype=q.dtype)+.1
    want = naive_linear_attention(q, k, v)
    same(naive_linear_attention(q*c[...,None], k, v), want)
    ck = c[:,:2]
    other = naive_linear_attention(q, k*ck[...,None], v)
    assert (other-want).abs().max()>1e-2
    same(naive_linear_attention(q, k, v, ck.log()), other)  # which is what a log weight says
    same(chunk_linear_attention(q, k, v, ck.log()), other)

def test_weights_are_the_outputs_of_unit_values():
    q,k,_,l = features(T=11)
    eye = torch.eye(11, dtype=q.dtype).expand(2,2,11,11)
    a = naive_linear_weights(q, k, l)
    same(chunk_linear_attention(q, k, eye, l), a)
    same(a.sum(-1), torch.ones(2,4,11))
    assert (a>=0).all() and (a.triu(1)==0).all()

@pytest.mark.parametrize('logs', [False,True])
@pytest.mark.parametrize('impl', ['recurrent','chunked','bidirectional'])
def test_gradients_are_the_oracles(logs, impl):
    args = features(1, 4, 2, 11, 3, 2, logs)
    mask,causal = torch.rand(1,11)<.7, impl!='bidirectional'
    args = [x if x is None else x.requires_grad_() for x in args]
    leaves = [x for x in args if x is not None]
    g = torch.randn(1,4,11,2, dtype=torch.float64)
    want = torch.autograd.grad(oracle(*args, causal=causal, mask=mask), leaves, g)
    f = dict(recurrent=recurrent_linear_attention, chunked=lambda *a, **k: chunk_linear_attention(*a, chunk_size=4, **k),
        bidirectional=bidirectional_linear_attention)[impl]
    got = torch.autograd.grad(f(*args, mask=mask), leaves, g)
    for a,b in zip(got, want): same(a, b, 1e-9)

@pytest.mark.parametrize('logs', [False,True])
def test_gradcheck_through_the_state(logs):
    q,k,v,l = (x if x is None else x.requires_grad_() for x in features(1, 2, 1, 5, 2, 2, logs))
    leaves = [x for x in (q,k,v,l) if x is not None]
    s = [torch.rand(1,1,2,2, dtype=torch.float64).requires_grad_(), (torch.rand(1,1,2, dtype=torch.float64)+.1).requires_grad_()]
    m = torch.zeros(1,1, dtype=torch.float64)
    for f in (recurrent_linear_attention, lambda *a, **k: chunk_linear_attention(*a, chunk_size=2, **k)):
        def run(S, z, q, k, v, l=None):
            o,e = f(q, k, v, l, initial_state=LinearState(S,z,m), output_final_state=True)
            return o, *true_state(e)
        assert torch.autograd.gradcheck(run, (*s,*leaves))

@pytest.mark.parametrize('dtype,tol', [(torch.float32,1e-6), (torch.float16,1.3e-3), (torch.bfloat16,1e-2)]) # four times what was measured
@pytest.mark.parametrize('logs', [False,True])
def test_low_precision_inputs_keep_a_float_state(dtype, tol, logs):
    "fp16 and bf16 round inputs and outputs only: half a unit in the last place of outputs of order 1."
    args = [x if x is None else x.to(dtype) for x in features(T=100, logs=logs, dtype=torch.float32)]
    want = oracle(*args)
    _,ws = recurrent_linear_attention(*(x if x is None else x.double() for x in args), output_final_state=True)
    for f in CAUSAL.values():
        o,s = f(*args, output_final_state=True)
        assert o.dtype==dtype and all(x.dtype==torch.float32 for x in s)
        same(o, want, tol)
        for x,y in zip(s, ws): same(x, y, 3e-6)
    for o in (bidirectional_linear_attention(*args), naive_linear_attention(*args)): assert o.dtype==dtype
    assert recurrent_linear_attention(*(x if x is None else x.double() for x in args), output_final_state=True)[1].S.dtype==torch.float64

def test_the_normaliser_does_not_stall_over_8192_tokens():
    T = 8192
    q,k,v = (x.to(torch.bfloat16) for x in (torch.rand(1,1,T,4), torch.rand(1,1,T,4), torch.randn(1,1,T,2)+1))
    z = k.double().cumsum(2)
    want = (torch.einsum('bhtf,bhtfd->bhtd', q.double(), (k.double()[...,None]*v.double()[...,None,:]).cumsum(2))/(q.double()*z).sum(-1, keepdim=True))
    for f in CAUSAL.values():
        o,s = f(q, k, v, output_final_state=True)
        same(s.z, z[:,:,-1], 1e-6)
        same(o, want, 8e-3)                       # half a bf16 step of outputs near 1
        assert (f(q.float(), k.float(), v.float())-want).abs().max()<1e-4
    stalled = torch.zeros(1,1,4, dtype=torch.bfloat16)
    for kt in k.unbind(2): stalled = stalled+kt   # what a bf16 z would do
    assert (stalled.double()/z[:,:,-1]).max()<.5

@pytest.mark.parametrize('dtype,tol', [(torch.float32,1e-6), (torch.float64,1e-13)])
@pytest.mark.parametrize('shape', ['rising','falling','mixed','constant'])
def test_log_weights_of_ten_thousand(shape, dtype, tol):
    q,k,v,_ = features(T=40, dtype=dtype)
    t = torch.linspace(-1e4, 1e4, 40, dtype=dtype)
    l = dict(rising=t, falling=-t, mixed=t[torch.randperm(40)], constant=torch.full_like(t, 1e4))[shape].expand(2,2,40)
    want = oracle(q, k, v, l)
    for f in (recurrent_linear_attention, lambda *a, **kw: chunk_linear_attention(*a, chunk_size=7, **kw)):
        o,s = f(q, k, v, l, output_final_state=True)
        assert all(x.isfinite().all() for x in s)
        same(o, want, tol)
    same(naive_linear_attention(q, k, v, l), want, tol)
    same(bidirectional_linear_attention(q, k, v, l), oracle(q, k, v, l, causal=False), tol)

def test_features_far_below_one_are_still_weights():
    "exp(−30) as features on both sides: the weights are ratios, whatever the size."
    q,k,v,_ = features(T=9, logs=False, dtype=torch.float32)
    want = oracle(q, k, v)
    for e in (-10,-20,-30):
        for f in (naive_linear_attention, *CAUSAL.values(), bidirectional_linear_attention):
            same(f(q*2.718281828**e, k*2.718281828**e, v), want if f is not bidirectional_linear_attention else oracle(q, k, v, causal=False), 1e-6)

def test_channels_of_values_and_features_may_differ():
    q,k,v,l = features(T=5, F=3, D=11)
    o,s = linear_attention(q, k, v, lambda q,k: (q,k,l), output_final_state=True)
    assert o.shape==(2,4,5,11) and s.S.shape==(2,2,3,11) and s.z.shape==(2,2,3) and s.m.shape==(2,2)

def test_fewer_queries_than_keys_are_the_last_ones():
    q,k,v,l = features(T=9)
    same(naive_linear_attention(q[:,:,-4:], k, v, l), naive_linear_attention(q, k, v, l)[:,:,-4:])
    same(linear_attention(q[:,:,:3], k, v, causal=False), oracle(q[:,:,:3], k, v, causal=False))
    for f in CAUSAL.values():
        with pytest.raises(ValueError, match='4.*9'): f(q[:,:,-4:], k, v, l)

def test_inputs_are_left_alone():
    args = features(T=20)
    before = [x.clone() for x in args]
    s = LinearState(torch.rand(2,2,6,5).double(), torch.rand(2,2,6).double(), torch.zeros(2,2).double())
    sb = s.apply(torch.clone)
    for f in CAUSAL.values(): f(*args, mask=torch.rand(2,20)<.5, initial_state=s, output_final_state=True)
    assert all(torch.equal(a,b) for a,b in zip([*args,*s], [*before,*sb]))

REFUSED = dict(chunk_size=dict(chunk_size=0), implementation=dict(implementation='fast'), naive_state=dict(implementation='naive', output_final_state=True),
    state_shape=dict(initial_state=LinearState(torch.zeros(2,2,6,4), torch.zeros(2,2,6), torch.zeros(2,2))), mask=dict(mask=torch.ones(2,4)),
    packed_batch=dict(cu_seqlens=[0,17]))

@pytest.mark.parametrize('what', REFUSED)
def test_what_does_not_fit_is_refused(what):
    q,k,v,_ = features()
    with pytest.raises(ValueError) as e: linear_attention(q, k, v, **REFUSED[what])
    assert len(str(e.value))>20

@pytest.mark.parametrize('cu', [[0,5], [1,17], [0,9,9,17], [0,12,6,17], [0], []])
def test_borders_that_do_not_fit_are_refused(cu):
    q,k,v,_ = features(B=1)
    with pytest.raises(ValueError, match='cu_seqlens'): linear_attention(q, k, v, cu_seqlens=cu)

def test_log_weights_that_do_not_fit_are_refused():
    q,k,v,l = features()
    for f in (naive_linear_attention, bidirectional_linear_attention, *CAUSAL.values()):
        with pytest.raises(ValueError, match='log_k'): f(q, k, v, l[:,:1])

@pytest.mark.parametrize('logs', [False,True])
def test_autocast_does_not_reach_the_sums(logs):
    args = [x if x is None else x.float() for x in features(T=80, logs=logs)]
    forms = [naive_linear_attention, bidirectional_linear_attention, *CAUSAL.values(), lambda q, k, v, l: linear_attention(q, k, v, lambda q,k: (q,k,l))]
    want = [f(*args) for f in forms]
    with torch.autocast('cpu', torch.bfloat16):
        for f,w in zip(forms, want): assert torch.equal(f(*args), w)

def test_arguments_may_be_named():
    q,k,v,l = features()
    for f in (naive_linear_attention, bidirectional_linear_attention, *CAUSAL.values()): assert torch.equal(f(v=v, log_k=l, phi_k=k, phi_q=q), f(q, k, v, l))
    assert torch.equal(linear_attention(v=v, k=k, q=q), linear_attention(q, k, v))
