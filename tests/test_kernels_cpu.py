"The kernel for processors: against the oracle in fp64, under other instruction sets and a memory checker, and what happens without a compiler."
import itertools, os, subprocess, sys, threading
from copy import deepcopy
from pathlib import Path
import pytest
from hypothesis import given, strategies as st

pytestmark = pytest.mark.processes

torch = pytest.importorskip('torch')
from hedgehog_nb.kernels.cpu import build, linear, loss as cpu_loss, maps, window
from hedgehog_nb.training import losses as training_losses
from hedgehog_nb.training.losses import naive_weight_loss, output_loss, weight_loss
from hedgehog_nb.attentions.base import make_attention, make_feature_map
from hedgehog_nb.ops.window import window_max
from hedgehog_nb.ops.linear import LinearState
from hedgehog_nb.functional import linear_attention, window_attention

needs_compiler = pytest.mark.skipif(build._compiler() is None, reason="no C compiler here")

def inputs(B, H, N, T, D, V, form, maps=1, bias=False, masked=False, state=False, dtype=torch.float32, scale=2., seed=0):
    "(q, k, v, map, mask, state): what a call takes, in fp32; the map's matrices are not the identity"
    g = torch.Generator().manual_seed(seed)
    q,k,v = (scale*torch.randn(B, T, h, c, generator=g).transpose(1,2).to(dtype).float() for h,c in ((H,D), (N,D), (N,V)))
    m = make_feature_map('hedgehog', D, H, N, form=form, num_maps=maps, bias=bias) if form else None
    if m: [p.data.add_(.2*torch.randn(p.shape, generator=g)) for p in m.parameters()]
    else: q,k = q.abs(),k.abs()
    f,mask = 2*D*maps if form else D, torch.rand(B, T, generator=g)>.3 if masked else None
    s = LinearState(torch.randn(B, N, f, V, generator=g), 3*torch.rand(B, N, f, generator=g), torch.zeros(B, N)) if state else None
    if s and form=='exp': s.m.copy_(4*torch.randn(B, N, generator=g))
    return q, k, v, m, mask, s

def both(x, causal, dtype, implementation, final=True):
    "{name: outputs, state after them if `final`, gradients}"
    q,k,v,m,mask,state = x
    m = m and deepcopy(m).to(dtype).requires_grad_()
    leaves = dict(q=q, k=k, v=v) | (dict(S=state.S, z=state.z) if state else {})
    leaves = {n: t.to(dtype).detach().requires_grad_() for n,t in leaves.items()}
    s = LinearState(leaves['S'], leaves['z'], state.m.to(dtype)) if state else None
    o = linear_attention(leaves['q'], leaves['k'], leaves['v'], m, causal=causal,
        mask=mask, initial_state=s, output_final_state=final, implementation=implementation)
    o,end = o if final else (o, None)
    res = dict(o=o)
    if final:
        e = (end.m-end.m.detach()).exp() # S·exp(m) is what counts, however m is chosen
        res |= dict(S_after=end.S*e[...,None,None], z_after=end.z*e[...,None])
    loss = sum((t*torch.cos(torch.arange(t.numel(), dtype=dtype)).view_as(t)).sum() for t in res.values())
    if m: leaves |= dict(m.named_parameters())
    return {n:t.detach() for n,t in res.items()} | dict(zip((f'd{n}' for n in leaves), torch.autograd.grad(loss, list(leaves.values()))))

TOL = dict(o=1.5e-5, S_after=1e-5, z_after=5e-6, dv=1.2e-5, dS=2e-5) # of the largest, four times what was measured; 3e-5 for what is not named

def compare(x, causal=True, final=True):
    ("Within `TOL` of the oracle; or, where terms cancel, within 8 times the error of the form in PyTorch. Where they cancel to nothing, as with one key, "
     "PyTorch's may be exact: then within half an ulp of what cancels, values times their gradients, none above 1, times a query or key")
    got,torch32,want = (both(x, causal, *how, final) for how in ((torch.float32, 'c'), (torch.float32, 'chunked'), (torch.float64, 'chunked')))
    half_ulp = 2**-24*x[2].abs().sum(-1).max()*max(1, x[0].abs().max(), x[1].abs().max())
    for n in want:
        err,theirs,largest = *((o[n]-want[n]).abs().max().item() for o in (got, torch32)),want[n].abs().max()
        assert err<TOL.get(n, 3e-5)*largest or err<8*theirs+1e-6 or largest<1e-9 and err<half_ulp, (n, err, theirs)

# Against the oracle

@needs_compiler
def test_one_key_of_many_values(): compare(inputs(1, 1, 1, 1, 1, 66, None), causal=False, final=False) # its gradient is 0, by terms that cancel

@needs_compiler
@pytest.mark.parametrize('T', [1, 17, 64, 100, 257])
@pytest.mark.parametrize('D,form',
    [(8,'softmax_halves'), (32,'softmax_joint'), (60,'softmax_halves'), (64,'softmax_joint'), (64,'softmax_halves'), (128,'softmax_halves'), (64,None),
     (64,'exp'), (60,'exp')])
@pytest.mark.parametrize('N', [4, 2, 1])
@pytest.mark.parametrize('causal', [True, False])
def test_outputs_and_gradients(T, D, form, N, causal):
    odd = (T+D+N)%2==1
    compare(inputs(2, 4, N, T, D, D, form, 1+odd, odd, masked=not odd, state=odd), causal)

@needs_compiler
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 150),
    st.integers(1, 70), st.integers(1, 70), st.sampled_from(['softmax_halves','softmax_joint','exp',None]),
    st.integers(1, 2), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_shape(B, N, G, T, D, V, form, maps, bias, masked, state, causal, final, seed):
    compare(inputs(B, N*G, N, T, D, V, form, maps, bias, masked, state, seed=seed), causal, final)

@needs_compiler
@pytest.mark.parametrize('T', [1, 12, 16, 33, 64, 65, 130])
@pytest.mark.parametrize('form', ['softmax_halves','softmax_joint','exp',None])
@pytest.mark.parametrize('masked,causal,state', [*itertools.product([False,True], repeat=3)])
def test_state_that_nobody_asks_for(T, form, masked, causal, state):
    "Up to one chunk, and with no state given, outputs and gradients come from weights alone; beyond it the first chunk reads no state and the last makes none."
    compare(inputs(2, 4, 2, T, 24, 40, form, bias=True, masked=masked, state=state), causal, final=False)

@needs_compiler
@pytest.mark.parametrize('T', [12, 100])
@pytest.mark.parametrize('causal', [True,False])
def test_several_sequences_in_a_task(T, causal):
    "Gradients of a head's matrices are summed inside the kernel where there are many sequences."
    x = inputs(131, 2, 2, T, 8, 8, 'softmax_halves', bias=True, masked=True)
    assert linear._each(131*2)==2
    compare(x, causal, final=False)

@needs_compiler
@pytest.mark.parametrize('causal', [True,False])
def test_log_weights_in_short_sequences(causal):
    q,k,v,*_ = inputs(2, 4, 2, 40, 16, 16, None)
    log_k,mask = 5*torch.randn(2, 2, 40),torch.rand(2, 40)>.2
    leaves = [x.requires_grad_() for x in (q, k, v, log_k)]
    def go(dt, implementation):
        *x,l = (t.to(dt) for t in leaves)
        o = linear_attention(*x, lambda q, k: (q, k, l), causal=causal, mask=mask, implementation=implementation)
        return o, *torch.autograd.grad(o.sin().sum(), leaves)
    for a,b in zip(go(torch.float32, 'c'), go(torch.float64, 'naive')): assert (a-b).abs().max()<2e-5*b.abs().max()

@needs_compiler
@pytest.mark.parametrize('form', ['softmax_halves','softmax_joint','exp'])
@pytest.mark.parametrize('scale', [1e-4, 30., 1e4])
def test_small_and_large_scores(form, scale):
    q,k,v,m,*_ = inputs(1, 2, 2, 100, 16, 16, form, scale=scale)
    with torch.no_grad(): o = linear_attention(q, k, v/scale, m, implementation='c')
    want = linear_attention(q.double(), k.double(), v.double()/scale, deepcopy(m).double(), implementation='naive')
    assert o.isfinite().all() and (o-want).abs().max()<2e-4*want.abs().max()

@needs_compiler
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype):
    q,k,v,m,*_ = inputs(2, 4, 2, 300, 64, 64, 'softmax_halves', dtype=dtype)
    with torch.no_grad(): o = linear_attention(*(x.to(dtype) for x in (q, k, v)), m, implementation='c')
    want = linear_attention(q.double(), k.double(), v.double(), deepcopy(m).double(), implementation='naive')
    assert o.dtype==dtype and (o.double()-want).abs().max()/want.abs().max() < torch.finfo(dtype).eps

@needs_compiler
def test_autocast_changes_nothing():
    x = inputs(1, 2, 2, 70, 32, 32, 'softmax_halves')[:4]
    with torch.autocast('cpu', torch.bfloat16): a = linear_attention(*x, implementation='c')
    assert torch.equal(a, linear_attention(*x, implementation='c'))

@needs_compiler
def test_rows_that_see_nothing_are_zero():
    q,k,v,m,*_ = inputs(2, 2, 2, 70, 16, 16, 'softmax_halves')
    mask = torch.ones(2, 70, dtype=torch.bool); mask[0,:30] = False; mask[1] = False
    leaves = [x.requires_grad_() for x in (q,k,v)]
    o = linear_attention(q, k, v, m, mask=mask, implementation='c')
    assert not o[0,:,:30].any() and not o[1].any() and o[0,:,30:].abs().min()>0
    for g in torch.autograd.grad((o*1e10).sum(), leaves): assert g.isfinite().all() and not g[0,:,:30].any() and not g[1].any() and g[0].any()

@needs_compiler
@pytest.mark.parametrize('which', ['q','k','v'])
def test_nan_is_not_swallowed(which):
    x = dict(zip('qkv', inputs(1, 2, 2, 70, 16, 16, None)[:3])); m = make_feature_map('hedgehog', 16, 2)
    x[which][0,1,40,5] = torch.nan
    with torch.no_grad(): o = linear_attention(**x, feature_map=m, implementation='c')
    assert not o[0,0].isnan().any() and not o[0,1,:32].isnan().any() and o[0,1,40].isnan().any()

@needs_compiler
def test_strides():
    "Layouts that a model may hand out: heads after tokens, one tensor for all three, channels apart, gradients that are expanded"
    q,k,v,m,*_ = inputs(2, 2, 2, 70, 16, 16, 'softmax_halves')
    want = linear_attention(q.contiguous(), k.contiguous(), v.contiguous(), m, implementation='c')
    one = torch.cat([q,k,v], -1)
    for a in (tuple(x.transpose(1,2).contiguous().transpose(1,2) for x in (q,k,v)), one.split(16, -1), tuple(x.mT.contiguous().mT for x in (q,k,v))):
        assert torch.equal(linear_attention(*a, m, implementation='c'), want)
    leaves = [x.clone().requires_grad_() for x in (q,k,v)]
    a = torch.autograd.grad(linear_attention(*leaves, m, implementation='c').sum(), leaves)
    b = torch.autograd.grad((linear_attention(*leaves, m, implementation='c')*torch.ones_like(want)).sum(), leaves)
    assert all(map(torch.equal, a, b))

@pytest.fixture
def threads():
    n = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(n)

@needs_compiler
@pytest.mark.parametrize('B,N,n,T,parts', [(1,1,8,1000,3), (1,2,8,1025,4), (2,1,5,530,2), (1,3,6,512,2), (1,1,4,255,1)])
@pytest.mark.parametrize('causal', [True,False])
def test_more_threads_than_heads(B, N, n, T, parts, causal, threads):
    threads(n)
    assert linear._parts(B*N, T)==parts
    for form,bias in (('softmax_halves',True), ('softmax_joint',False), ('exp',True), (None,False)):
        compare(inputs(B, 2*N, N, T, 24, 16, form, bias=bias, masked=True, state=True), causal)
        compare(inputs(B, 2*N, N, T, 24, 16, form, bias=bias, masked=True), causal, final=False)

@needs_compiler
def test_threads_do_not_matter(threads):
    "while there are no more than heads: each head is computed by one"
    x = inputs(3, 4, 2, 150, 32, 32, 'softmax_halves', masked=True, state=True)
    threads(1); a = both(x, True, torch.float32, 'c')
    threads(3); b = both(x, True, torch.float32, 'c')
    assert all(torch.equal(a[i], b[i]) for i in a)

@needs_compiler
def test_called_from_several_threads():
    x = inputs(2, 4, 2, 200, 32, 32, 'softmax_halves')[:4]
    with torch.no_grad(): want,got = linear_attention(*x, implementation='c'),[]
    def work():
        with torch.no_grad(): got.extend(linear_attention(*x, implementation='c') for _ in range(20))
    ts = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert len(got)==80 and all(torch.equal(g, want) for g in got)

# One token at a time

@needs_compiler
@pytest.mark.parametrize('form,bias,H,N', [('softmax_halves',False,4,2), ('softmax_joint',True,3,3), ('exp',True,4,2), (None,False,4,1)])
def test_steps_are_the_whole(form, bias, H, N):
    q,k,v,m,mask,_ = inputs(2, H, N, 40, 12, 20, form, bias=bias, masked=True)
    with torch.no_grad():
        want,end = linear_attention(q, k, v, m, mask=mask, output_final_state=True, implementation='c')
        s,os = None,[]
        for t in range(40):
            i,kept = slice(t, t+1),s and s.apply(torch.clone)
            o,after = linear_attention(q[:,:,i], k[:,:,i], v[:,:,i], m, mask=mask[:,i], initial_state=s, output_final_state=True, implementation='c')
            assert s is None or all(map(torch.equal, s, kept)) # the state that was given is left alone
            s = after; os.append(o)
    assert (torch.cat(os, 2)-want).abs().max()<2e-5
    for a,b in zip(s, end): assert (a-b).abs().max()<1e-4

@needs_compiler
@pytest.mark.parametrize('far', [30., 1e3])
@pytest.mark.parametrize('causal', [True,False])
def test_log_weights_far_apart(far, causal):
    "A key that outweighs all before it by e^far, in the middle of a chunk: rows before it see the others, rows after it that alone."
    q,k,v,*_ = inputs(2, 4, 2, 150, 16, 16, None)
    log_k = torch.randn(2, 2, 150); log_k[:,:,37] += far; log_k[:,1,101] += 2*far
    f = lambda q, k: (q, k, log_k.to(q.dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    got = linear_attention(*leaves, f, causal=causal, implementation='c')
    want = linear_attention(*(x.double() for x in leaves), f, causal=causal, implementation='naive')
    assert (got-want).abs().max()<1e-5*want.abs().max()
    a,b = (torch.autograd.grad(o.sin().sum(), leaves) for o in (got, want))
    for x,y in zip(a, b): assert (x-y).abs().max()<1e-5*max(g.abs().max() for g in b)

@needs_compiler
def test_states_with_log_weights():
    q,k,v,m,_,s = inputs(1, 2, 2, 30, 8, 8, 'softmax_halves', state=True)
    for m0 in ([[-2., -1e30]], [[1., 80.]]): # a small past, and none; one that outweighs what follows
        a,b = (linear_attention(q, k, v, m, initial_state=s._replace(m=torch.tensor(m0)), output_final_state=True, implementation=i) for i in ('c','chunked'))
        assert (a[0]-b[0]).abs().max()<1e-5 and all((x-y).abs().max()<1e-4 for x,y in zip(a[1], b[1]))

# The loss that distils

def losses(B, H, N, T, D, F, causal, masked, seed=0, sparse=False):
    "(loss, gradients) of `loss_sums`, and of the formula in fp64, as sums"
    g = torch.Generator().manual_seed(seed)
    q,k = 2*torch.randn(B, H, T, D, generator=g),2*torch.randn(B, N, T, D, generator=g)
    fq,fk = torch.rand(B, H, T, F, generator=g)+.1,torch.rand(B, N, T, F, generator=g)+.1
    if sparse: fq,fk = fq*(fq>.8),fk*(fk>.8) # keys that the student cannot see
    real = torch.rand(B, T, generator=g)>.3 if masked else None
    if masked: real[:,-1] = True
    fq,fk = (x.double().requires_grad_() for x in (fq, fk))
    want = naive_weight_loss(q.double(), k.double(), lambda *_: (fq, fk, None), causal, mask=real).sum()*(B*T if real is None else real.sum())
    return cpu_loss.loss_sums(fq.detach(), fk.detach(), q*D**-.5, k, causal, real)[:3], (want, *torch.autograd.grad(want, (fq, fk)))

def same_losses(*a, **kw):
    for got,want in zip(*losses(*a, **kw)): assert (got-want).abs().max()<3e-5*want.abs().max().clamp_min(1)

@needs_compiler
@pytest.mark.parametrize('T', [1, 17, 64, 100, 257])
@pytest.mark.parametrize('D,F', [(8,16), (64,128), (60,7), (5,33)])
@pytest.mark.parametrize('causal', [True,False])
@pytest.mark.parametrize('masked', [True,False])
def test_loss_and_gradients(T, D, F, causal, masked): same_losses(2, 4, (4,2,1)[T%3], T, D, F, causal, masked)

@needs_compiler
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 150),
       st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0, 99))
def test_loss_of_any_shape(B, N, G, T, D, F, causal, masked, seed): same_losses(B, N*G, N, T, D, F, causal, masked, seed)

@needs_compiler
def test_loss_of_keys_that_cannot_be_seen():
    (loss,dq,dk),(want,wq,wk) = losses(1, 2, 2, 60, 8, 5, True, False, sparse=True)
    assert abs(loss-want)<1e-4*want and loss>1000                      # 69 nats for each
    some = dict(rtol=1e-4, atol=1e-4*float(wq.abs().max()))
    assert torch.allclose(dq.double(), wq, **some) and torch.allclose(dk.double(), wk, rtol=1e-4, atol=1e-4*float(wk.abs().max()))

@needs_compiler
def test_loss_of_nan_is_nan():
    q = torch.ones(1, 2, 20, 8); q[0,1,7,3] = torch.nan
    f = torch.ones(1, 2, 20, 4)
    assert cpu_loss.loss_sums(f, f, q, q)[0].isnan() and cpu_loss.loss_sums(f*q[...,:4], f, torch.ones_like(q), torch.ones_like(q))[0].isnan()

@needs_compiler
@pytest.mark.parametrize('change,says', [(dict(q=torch.ones(1,2,19,8)), 'as many queries as keys'),
    (dict(q=torch.ones(1,4,20,8)), 'as many queries as keys'), (dict(k=torch.ones(1,2,20,9)), 'as many queries as keys'),
    (dict(phi_k=torch.ones(1,2,20,5)), 'same channels'), (dict(phi_k=torch.ones(1,1,20,4)), 'same heads'),
    (dict(real=torch.ones(1,19)), 'mask is'), (dict(q=torch.ones(1,2,20,8, device='meta')), 'on a CPU')])
def test_loss_of_what_does_not_fit(change, says):
    x = dict(phi_q=torch.ones(1,2,20,4), phi_k=torch.ones(1,2,20,4), q=torch.ones(1,2,20,8), k=torch.ones(1,2,20,8))
    with pytest.raises(ValueError, match=says): cpu_loss.loss_sums(**x | change)

@needs_compiler
@pytest.mark.parametrize('masked', [True,False])
def test_weight_loss_takes_it(masked, monkeypatch):
    q,k,_,m,mask,_ = inputs(2, 4, 2, 90, 16, 16, 'softmax_halves', masked=True)
    mask = mask if masked else None
    def both_ways(m):
        loss = weight_loss(q, k, m, mask=mask)
        return loss, *torch.autograd.grad(3*loss, [*m.parameters()])
    calls = []
    monkeypatch.setattr(training_losses, 'loss_sums', lambda *a: calls.append(1) or cpu_loss.loss_sums(*a))
    a = both_ways(m); assert calls==[1]
    monkeypatch.setattr(training_losses, 'for_all_threads', lambda: False)
    b = both_ways(m); assert calls==[1]
    for x,y in zip(a, b): assert (x-y).abs().max()<1e-5*y.abs().max()

STUDENTS = dict(halves=('hedgehog', {}), exp=('hedgehog', dict(form='exp')), window=('hedgehog-window', dict(window=8)),
    window_exp=('hedgehog-window', dict(window=8, form='exp')), relative=('hedgehog-window', dict(window=8, relative=True)),
    wide=('hedgehog-window', dict(window=300)), none=('hedgehog-window', dict(window=0)))

def student(which, D=16, H=4, N=2, seed=0, **kw):
    name,settings = STUDENTS[which]
    g,m = torch.Generator().manual_seed(seed),make_attention(name, D, H, N, bias=True, **{**settings, **kw})
    for p in m.parameters(): p.data.add_(.2*torch.randn(p.shape, generator=g))
    return m

@needs_compiler
@pytest.mark.parametrize('which', STUDENTS)
@pytest.mark.parametrize('T', [5, 64, 100, 257])
@pytest.mark.parametrize('masked', [True,False])
def test_losses_of_every_student(which, T, masked, monkeypatch):
    "The loss on weights and on outputs, with the gradients of all parameters, in C and in PyTorch, against the latter in fp64."
    q,k,v,_,mask,_ = inputs(2, 4, 2, T, 16, 16, None, masked=masked)
    if masked: mask[:,-1] = True
    m = student(which)
    def go(dt, c):
        monkeypatch.setattr(training_losses, 'for_all_threads', lambda: c)
        x,mm = [t.to(dt) for t in (q, k, v)],deepcopy(m).to(dt)
        if not c: monkeypatch.setattr(maps, 'for_all_threads', lambda: False)
        both = weight_loss(*x[:2], mm, mask=mask)+output_loss(*x, mm, mask=mask).mean()
        monkeypatch.undo()
        return [both.detach(), *(torch.zeros(1) if g is None else g for g in torch.autograd.grad(both, [*mm.parameters()], allow_unused=True))]
    got,plain,want = go(torch.float32, True),go(torch.float32, False),go(torch.float64, False)
    for a,p,b in zip(got, plain, want): assert (a-b).abs().max()<3e-5*b.abs().max() or (a-b).abs().max()<8*(p-b).abs().max()+1e-6

# The hybrid

def hybrid(which, B, H, N, T, D, V, window, masked, split, dtype, implementation, seed=0, **kw):
    "{name: outputs, state after them, gradients} of a hybrid, in one piece or two"
    q,k,v,_,mask,_ = inputs(B, H, N, T, D, V, None, masked=masked, seed=seed)
    m = student(which, D, H, N, seed, **(dict(window=window) | kw)).to(dtype)
    x = [t.to(dtype).detach().requires_grad_() for t in (q-.5, k-.5, v)]
    os,s = [],None
    for i in [slice(0, split), slice(split, T)] if split else [slice(0, T)]:
        o,s = m.attend(*(t[:,:,i] for t in x), mask=None if mask is None else mask[:,i], initial_state=s, output_final_state=True,
            implementation=implementation)
        os.append(o)
    o,L = torch.cat(os, 2),s.linear
    e = (L.m-L.m.detach()).exp()
    res = dict(o=o, k=s.k, v=s.v, real=s.real, S=L.S*e[...,None,None], z=L.z*e[...,None])
    loss = sum((t*torch.cos(torch.arange(t.numel(), dtype=dtype)).view_as(t)).sum() for t in (o, res['S'], res['z']))
    leaves = dict(q=x[0], k=x[1], v=x[2]) | dict(m.named_parameters())
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n:t.detach() for n,t in res.items()} | {f'd{n}': torch.zeros(1, dtype=dtype) if g is None else g for n,g in zip(leaves, grads)}

def same_hybrid(*a, **kw):
    got,plain,want = hybrid(*a, torch.float32, 'c', **kw),hybrid(*a, torch.float32, 'chunked', **kw),hybrid(*a, torch.float64, 'chunked', **kw)
    for n in want:
        if not want[n].numel(): continue
        err,theirs = ((o[n]-want[n]).abs().max().item() for o in (got, plain))
        assert err<3e-5*want[n].abs().max() or err<8*theirs+2e-6, (n, err, theirs)

@needs_compiler
@pytest.mark.parametrize('which', ['window','window_exp','relative'])
@pytest.mark.parametrize('T,window,split', [(1,4,0), (17,5,0), (17,5,6), (64,64,0), (100,16,33), (257,64,0), (257,64,85), (70,200,0), (70,200,23), (130,1,64)])
def test_hybrids(which, T, window, split): same_hybrid(which, 2, 4, (4,2,1)[T%3], T, (16,60)[T%2], (24,16)[T%2], window, T%2==1, split)

@needs_compiler
@given(st.sampled_from(['window','window_exp','relative']), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 200), st.integers(1, 40),
    st.integers(1, 40), st.integers(1, 90), st.booleans(), st.integers(0, 99), st.integers(0, 99))
def test_hybrids_of_any_shape(which, B, N, G, T, D, V, window, masked, split, seed):
    same_hybrid(which, B, N*G, N, T, D, V, window, masked, split%T, seed=seed)

@needs_compiler
@pytest.mark.parametrize('n', [1, 3, 8])
def test_hybrids_on_several_threads(n, threads):
    threads(n)
    same_hybrid('window_exp', 1, 2, 1, 1000, 16, 16, 64, True, 0); same_hybrid('window', 1, 2, 1, 1100, 16, 16, 64, False, 300)

@needs_compiler
@pytest.mark.parametrize('branch', ['window','linear'])
def test_branches_of_a_hybrid(branch): same_hybrid('window', 2, 4, 2, 100, 16, 16, 9, True, 31, branch=branch)

@needs_compiler
@pytest.mark.parametrize('which', ['window','window_exp','relative'])
@pytest.mark.parametrize('size', [0, 1, 5, 64])
def test_steps_of_a_hybrid_are_the_whole(which, size):
    if which=='relative' and not size: pytest.skip("an empty window has no largest score")
    m = student(which, window=size)
    q,k,v,_,mask,_ = inputs(2, 4, 2, 60, 16, 16, None, masked=True)
    with torch.no_grad():
        want,end = m.attend(q, k, v, mask=mask, output_final_state=True, implementation='chunked')
        o,s = m.attend(q[:,:,:7], k[:,:,:7], v[:,:,:7], mask=mask[:,:7], output_final_state=True, implementation='c'); os = [o]
        for t in range(7, 60):
            i,kept = slice(t, t+1),s.apply(torch.clone)
            o,after = m.attend(q[:,:,i], k[:,:,i], v[:,:,i], mask=mask[:,i], initial_state=s, output_final_state=True, implementation='c')
            assert all(map(torch.equal, (*s[:3], *s.linear), (*kept[:3], *kept.linear))) # the state that was given is left alone
            s = after; os.append(o)
    assert (torch.cat(os, 2)-want).abs().max()<2e-5
    for a,b in zip((*s[:3], *s.linear), (*end[:3], *end.linear)): assert not a.numel() or (a-b).abs().max()<1e-4

@needs_compiler
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_hybrids_in_half_precision_are_computed_in_fp32(dtype):
    q,k,v,*_ = inputs(2, 4, 2, 150, 16, 16, None, dtype=dtype); m = student('window')
    with torch.no_grad():
        o = m.attend(*(x.to(dtype) for x in (q, k, v)), implementation='c')
        want = deepcopy(m).double().attend(q.double(), k.double(), v.double(), implementation='naive')
    assert o.dtype==dtype and (o.double()-want).abs().max()/want.abs().max() < torch.finfo(dtype).eps

@needs_compiler
@pytest.mark.parametrize('which', ['q','k','v'])
def test_hybrids_do_not_swallow_nan(which):
    x = dict(zip('qkv', inputs(1, 2, 2, 150, 16, 16, None)[:3]))
    x[which][0,1,40,5] = torch.nan
    m = student('window', H=2, N=2)
    with torch.no_grad(): o = m.attend(**x, implementation='c')
    assert not o[0,0].isnan().any() and not o[0,1,:16].isnan().any() and o[0,1,40].isnan().any() # 16 queries share a product

@needs_compiler
@pytest.mark.parametrize('T,size,masked,split', [(1,3,False,0), (70,9,True,0), (200,64,True,71), (50,90,False,0)])
def test_largest_in_the_window(T, size, masked, split):
    q,k,v,_,mask,_ = inputs(2, 4, 2, T, 16, 16, None, masked=masked); m = student('window', window=size)
    state = m.attend(q[:,:,:split], k[:,:,:split], v[:,:,:split], mask=None if mask is None else mask[:,:split], output_final_state=True)[1] if split else None
    rest = slice(split, None)
    def go(f, dt):
        x = [t[:,:,rest].to(dt).requires_grad_() for t in (q-.5, k-.5)]
        o = f(*x, size, .3, None if mask is None else mask[:,rest], state and state.apply(lambda t: t.detach().to(dt)))
        return o.detach(), *torch.autograd.grad((o*torch.cos(torch.arange(o.numel(), dtype=dt)).view_as(o)).sum(), x)
    for a,b in zip(go(window.largest_in_window, torch.float32), go(window_max, torch.float64)): assert (a-b).abs().max()<1e-5*b.abs().max().clamp_min(1)

# The map by itself

@needs_compiler
@pytest.mark.parametrize('form', ['softmax_halves','softmax_joint','exp'])
@pytest.mark.parametrize('T,D,E', [(1,8,8), (64,64,64), (100,5,33), (130,60,120), (16,16,7)])
@pytest.mark.parametrize('bias', [True,False])
def test_map(form, T, D, E, bias):
    g = torch.Generator().manual_seed(T)
    x,w,b = 2*torch.randn(2, T, 3, D, generator=g).transpose(1,2),torch.randn(3, E, D, generator=g),torch.randn(3, E, generator=g) if bias else None
    def go(f, dt):
        leaves = [t.to(dt).detach().requires_grad_() for t in (x, w, b) if t is not None]
        phi,log = f(*leaves, *(() if bias else (None,)), form)
        loss = sum((t*torch.cos(torch.arange(t.numel(), dtype=dt)).view_as(t)).sum() for t in (phi, log) if t is not None)
        return phi.detach(), torch.zeros(1) if log is None else log.detach(), *torch.autograd.grad(loss, leaves)
    plain = lambda x, w, b, form: maps_in_torch(x@w.mT+(0 if b is None else b[:,None]), form)
    for a,b in zip(go(maps.c_map, torch.float32), go(plain, torch.float64)): assert (a-b).abs().max()<2e-5*b.abs().max().clamp_min(1e-3)

def maps_in_torch(y, form):
    from hedgehog_nb.ops.hedgehog import plain_features
    return plain_features(y, form)

@needs_compiler
def test_opcheck_of_the_others():
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=g).requires_grad_()
    torch.library.opcheck(maps._map_op, (r(2, 4, 70, 16), r(4, 24, 16), r(4, 24), 'exp'))
    torch.library.opcheck(maps._map_op, (r(2, 4, 70, 16), r(4, 24, 16), None, 'softmax_halves'))
    q,k,v,pq,pk = r(2, 4, 70, 16),r(2, 2, 79, 16),r(2, 2, 79, 8),torch.rand(2, 4, 70, 12).requires_grad_(),torch.rand(2, 2, 79, 12).requires_grad_()
    S,z,m = r(2, 2, 12, 8),torch.rand(2, 2, 12).requires_grad_(),torch.zeros(2, 2)
    mask = torch.rand(2, 79, generator=g)>.3
    torch.library.opcheck(window._window_op, (q, k, v, pq, pk, r(2, 4, 70), r(2, 2, 79), r(4), S, z, m, mask, .25, 9, True))
    torch.library.opcheck(window._window_op, (*(x.detach() for x in (q, k[:,:,9:], v[:,:,9:], pq, pk[:,:,9:])), *(None,)*7, .25, 9, False))
    torch.library.opcheck(window._max_op, (q, k, mask, .25, 9))

# Which way is taken

@needs_compiler
def test_chosen_where_it_fits(monkeypatch):
    calls = []
    monkeypatch.setattr(linear, 'call', lambda *a: calls.append(a[0]) or build.call(*a))
    def taken(*a, **kw):
        calls.clear(); linear_attention(*a, **kw); return bool(calls)
    q,k,v,m,*_ = inputs(1, 2, 2, 30, 8, 8, 'softmax_halves')
    assert taken(q, k, v, m) and taken(q, k, v) and taken(q, k, v, m, causal=False) and taken(q.bfloat16(), k, v, m)
    assert not taken(q.double(), k.double(), v.double(), m) and not taken(q, k, v, m, cu_seqlens=[0,10,30]) and not taken(q[:,:,:5], k, v, m, causal=False)
    assert taken(q, k, v, make_feature_map('hedgehog', 8, 2, form='exp'))
    assert not taken(q, k, v, make_feature_map('elu', 8, 2)) and not taken(q, k, v, m, chunk_size=16)
    seen = m.register_forward_hook(lambda *a: None)
    assert not taken(q, k, v, m) # a hook wants to see the features
    seen.remove(); assert taken(q, k, v, m)
    class Mine(type(m)):
        def map_q(self, q): return super().map_q(q)*2
    assert not taken(q, k, v, Mine(8, 2))

@needs_compiler
def test_any_other_map_when_asked():
    q,k,v,m,*_ = inputs(1, 2, 2, 30, 8, 8, None)
    elu = make_feature_map('elu', 8, 2)
    assert (linear_attention(q, k, v, elu, implementation='c')-linear_attention(q, k, v, elu, implementation='naive')).abs().max()<1e-5

@needs_compiler
@pytest.mark.parametrize('change,says', [(dict(q=torch.ones(1,2,30,8).double()), 'float64'), (dict(q=torch.ones(1,2,3,8)), 'as many queries'),
    (dict(cu_seqlens=[0,10,30]), 'cu_seqlens'),
    (dict(v=torch.ones(1,2,29,8)), 'same heads and tokens'), (dict(q=torch.ones(1,2,30,8, dtype=torch.int)), 'floating point')])
def test_errors(change, says):
    q,k,v,m,*_ = inputs(1, 2, 2, 30, 8, 8, 'softmax_halves')
    with pytest.raises(ValueError, match=says): linear_attention(**dict(q=q, k=k, v=v, feature_map=m, implementation='c') | change)

@needs_compiler
@pytest.mark.parametrize('implementation', [None,'c'])
@pytest.mark.parametrize('change,says', [(dict(feature_map=make_feature_map('hedgehog', 8, 4)), 'queries of 4 heads'),
    (dict(feature_map=make_feature_map('hedgehog', 16, 2)), 'head_dim 16'), (dict(feature_map=make_feature_map('hedgehog', 8, 2, 1)), 'keys of 1 heads'),
    (dict(feature_map=make_feature_map('hedgehog', 8, 2).to('meta')), 'meta'), (dict(mask=torch.ones(1, 30, device='meta')), 'meta'),
    *((dict(initial_state=LinearState(torch.zeros(s), torch.zeros(z), torch.zeros(m))), 'these inputs need') for s,z,m in (((1,2,8,8),(1,2,16),(1,2)),
        ((1,2,16,4),(1,2,16),(1,2)), ((2,2,16,8),(2,2,16),(2,2)), ((1,2,16,8),(1,2,8),(1,2)), ((1,2,16,8),(1,2,16),(1,1)))),
    (dict(feature_map=None, initial_state=LinearState(torch.zeros(1,2,16,8), torch.zeros(1,2,16), torch.zeros(1,2))), 'these inputs need')])
def test_what_was_made_for_other_inputs(change, says, implementation):
    "The kernel itself would read beyond their ends"
    q,k,v,m,*_ = inputs(1, 2, 2, 30, 8, 8, 'softmax_halves')
    with pytest.raises(ValueError, match=says): linear_attention(**dict(q=q, k=k, v=v, feature_map=m, implementation=implementation) | change)

# As an operation of PyTorch

@needs_compiler
@pytest.mark.parametrize('causal,form', [(True,'softmax_halves'), (True,'exp'), (False,'features')])
def test_opcheck(causal, form):
    q,k,v,m,mask,s = inputs(2, 4, 2, 70, 16, 24, form if form!='features' else None, bias=True, masked=True, state=True)
    log_k = torch.randn(2, 2, 70) if form=='features' else None
    held = [getattr(m, n).detach().requires_grad_() for n in ('w_q','w_k','b_q','b_k')] if m else [None]*4
    x = [t.contiguous().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(linear.c_op, (*x, *held, log_k, s.S.requires_grad_(), s.z.requires_grad_(), s.m, mask, form, causal, True, True, False))
    torch.library.opcheck(linear.c_op, (*x, *held, log_k, *[None]*3, mask, form, causal, True, False, False))
    torch.library.opcheck(linear.c_op, (*(t[:,:,:20] for t in x), *held, log_k[:,:,:20] if log_k is not None else None, *[None]*3, mask[:,:20], form, causal,
        True, False, True))
    torch.library.opcheck(linear.c_op, (*[t.detach() for t in x], *[h if h is None else h.detach() for h in held], *[None]*5, form, causal, False, True, False))

@needs_compiler
def test_a_page_does_not_take_the_name_of_its_module():
    "A notebook defines the operation once more, in the same process: the library's goes on working"
    x = inputs(1, 2, 2, 70, 16, 16, 'softmax_halves')
    before,page = both(x, True, torch.float32, 'c'),dict(__name__='__main__')
    exec("""from torch import Tensor
from hedgehog_nb.kernels.common import custom_op
@custom_op('c_attention')
def op(x:Tensor)->Tensor: return x+1""", page)
    assert torch.equal(page['op'](torch.ones(2)), torch.full((2,), 2.)) and page['op']._qualname!=linear.c_op._qualname
    after = both(x, True, torch.float32, 'c')
    assert all(torch.equal(before[n], after[n]) for n in before)

@needs_compiler
def test_compiled_models_trace_the_form_in_pytorch():
    q,k,v,m,*_ = inputs(1, 2, 2, 40, 8, 8, 'softmax_halves')
    f = torch.compile(lambda q, k, v: linear_attention(q, k, v, m), fullgraph=True, backend='eager')
    with torch.no_grad(): assert (f(q, k, v)-linear_attention(q, k, v, m)).abs().max()<1e-5

# Other processors, and memory

@needs_compiler
@pytest.mark.parametrize('flags', [(), ('-mavx2','-mfma'), ('-march=native','-O1')], ids=['plain','avx2','O1'])
def test_other_instructions(flags, monkeypatch, tmp_path):
    if '-mavx2' in flags and not any('avx2' in l for l in build._processor()): pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(build, 'FLAGS', (flags,)); monkeypatch.setattr(build, 'cache_folder', lambda: tmp_path)
    lib = build.compile_c(build.SOURCE.read_text())
    monkeypatch.setattr(build, 'library', lambda: (lib, ''))
    for x in (inputs(1, 4, 2, 100, 60, 20, 'softmax_halves', 2, True, True, True), inputs(2, 2, 2, 70, 64, 64, 'softmax_joint')):
        compare(x); compare(x, causal=False)
    same_losses(2, 4, 2, 100, 24, 40, True, True)
    compare(inputs(2, 4, 2, 100, 60, 20, 'exp', 2, True, True, True)); same_hybrid('window_exp', 2, 4, 2, 100, 60, 20, 33, True, 41)

SANITIZED = """
import sys, itertools, torch
from pathlib import Path
from types import SimpleNamespace
from hedgehog_nb.kernels.cpu import build
_,fault,runtime,folder,*flags = sys.argv
build.FLAGS,build.cache_folder = (flags,),lambda: Path(folder)
text = build.SOURCE.read_text()
if fault: was,now = fault.split(' -> '); assert text.count(was)==1; text = text.replace(was, now)
if runtime: text = Path(runtime).read_text()+text
build.SOURCE = SimpleNamespace(read_text=lambda **kw: text)
torch.set_num_threads(4)
from test_kernels_cpu import inputs, both, same_losses, hybrid, student
from hedgehog_nb.training.losses import weight_loss
for T,D,F in ((1,3,5),(70,16,7),(130,5,33)): same_losses(2, 4, 2, T, D, F, True, True), same_losses(1, 2, 2, T, D, F, False, False)
for T,D,V,form,causal,state in itertools.product((1,17,70,530),(3,16,60),(5,16),('softmax_halves','exp',None),(True,False),(True,False)):\
 both(inputs(1, 2, 1, T, D, V, form, state=state, masked=True), causal, torch.float32, 'c', final=state)
for causal in (True,False): both(inputs(131, 2, 2, 12, 8, 8, 'softmax_halves', bias=True), causal, torch.float32, 'c', final=False)
for T,D,V,w,split in itertools.product((1,17,70,530),(3,16),(5,16),(1,9,100),(0,1)):
    for which in ('window_exp','relative'):
        hybrid(which, 1, 4, 2, T, D, V, w, True, split*T//3, torch.float32, 'c')
        weight_loss(torch.randn(1, 2, T, D), torch.randn(1, 1, T, D), student(which, D, 2, 1, window=w)).backward()
        x,m = torch.randn(1, 2, T, D),student(which, D, 2, 1, window=w)
        with torch.no_grad():
            o,s = m.attend(x, x[:,:1], x[:,:1], output_final_state=True, implementation='c')
            m.attend(x[:,:,:1], x[:,:1,:1], x[:,:1,:1], initial_state=s, output_final_state=True, implementation='c')
print('clean')"""

def under_sanitizer(name, fault, root, folder, flags, runtime='', **options):
    "A grid of shapes that fit nothing, under a sanitizer of the compiler: as it is, and with a planted fault"
    preload = subprocess.run([build._compiler(), f'-print-file-name=lib{name}.so'], capture_output=True, text=True).stdout.strip()
    if not Path(preload).is_absolute(): pytest.skip(f"this compiler has no lib{name}")
    env = {**os.environ, 'LD_PRELOAD':preload, 'PYTHONPATH':f"{root}{os.pathsep}{root/'tests'}", 'OMP_NUM_THREADS':'1', **options}
    run = lambda f: subprocess.run([sys.executable, '-c', SANITIZED, f, str(runtime), str(folder), *flags], env=env, capture_output=True, text=True)
    return map(run, ('', fault))

@pytest.mark.slow
@needs_compiler
def test_no_access_outside_of_what_was_given(tmp_path, root):
    "Under the address sanitizer and that for undefined behaviour, where the compiler has them"
    flags = '-fsanitize=address,undefined','-fno-sanitize-recover','-g','-march=native'
    real,planted = under_sanitizer('asan', '*n->T+t+i] = x; -> *n->T+t+i+1] = x;', root, tmp_path, flags, ASAN_OPTIONS='detect_leaks=0')
    assert real.returncode==0 and real.stdout=='clean\n', real.stderr[-2000:]
    assert planted.returncode!=0 and 'heap-buffer-overflow' in planted.stderr, planted.stderr[-2000:]

@pytest.mark.slow
@needs_compiler
def test_no_races(tmp_path, root):
    "Under the thread sanitizer, four threads, with a runtime for OpenMP that it can see into"
    flags,runtime = ('-fsanitize=thread','-g','-O1','-march=native','-fopenmp','-Wl,-Bsymbolic'),root/'tests'/'helpers'/'openmp_in_threads.c'
    real,planted = under_sanitizer('tsan', 'd->sums+(head*n->parts+p)*SAVED -> d->sums+head*n->parts*SAVED', root, tmp_path, flags, runtime,
        TSAN_OPTIONS='ignore_noninstrumented_modules=1:halt_on_error=1')
    if 'unexpected memory mapping' in real.stderr: pytest.skip("this system places memory where the thread sanitizer does not expect it")
    assert real.returncode==0 and real.stdout=='clean\n', real.stderr[-2000:]
    assert planted.returncode!=0 and 'data race' in planted.stderr, planted.stderr[-2000:]

# Compiling

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "As on a machine where nothing has been compiled yet"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); build.library.cache_clear()
    yield tmp_path/'hedgehog_nb'/'c'
    build.library.cache_clear()

def same_without():
    "Without a compiler: the reason is told to who asks by name, and all others get the same from PyTorch"
    q,k,v,m,*_ = inputs(1, 2, 2, 30, 8, 8, 'softmax_halves')
    assert build.library()[0] is None
    with pytest.raises(ValueError) as e: linear_attention(q, k, v, m, implementation='c')
    assert torch.equal(linear_attention(q, k, v, m), linear_attention(q, k, v, m, implementation='chunked'))
    return str(e.value)

def test_turned_off(fresh, monkeypatch):
    monkeypatch.setenv('HEDGEHOG_C', '0')
    assert 'HEDGEHOG_C=0 is set' in same_without() and not fresh.exists()

def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv('PATH', ''); monkeypatch.delenv('CC', raising=False)
    assert 'install gcc or clang' in same_without()

@pytest.mark.skipif(os.name=='nt', reason="no false")
def test_broken_compiler(fresh, monkeypatch):
    monkeypatch.setenv('CC', 'false')
    assert 'does not compile it' in same_without()

@needs_compiler
def test_kept_for_next_time(fresh, monkeypatch):
    assert build.library()[0] is not None
    f, = fresh.iterdir(); when = f.stat().st_mtime_ns
    assert f.suffix=='.so' and fresh.stat().st_mode & 0o077==0
    monkeypatch.setattr(build, '_compile', None); build.library.cache_clear()
    assert build.library()[0] is not None and f.stat().st_mtime_ns==when

@needs_compiler
def test_a_folder_of_others_is_not_trusted(fresh, monkeypatch):
    fresh.mkdir(parents=True); fresh.chmod(0o777)
    assert build.library()[0] is not None and not [*fresh.iterdir()] # compiled, used, not kept

@needs_compiler
@pytest.mark.parametrize('what', [b'', b'not a library'])
def test_a_broken_file_is_replaced(fresh, what):
    assert build.library()[0] is not None
    f, = fresh.iterdir(); whole = f.read_bytes()
    f.unlink(); f.write_bytes(what); build.library.cache_clear()
    assert build.library()[0] is not None and len(f.read_bytes())==len(whole)

@needs_compiler
def test_a_home_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path/'file').write_text(''); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    assert build.library()[0] is not None

# The page

def test_the_page_shows_the_text_as_it_is(root):
    "Every region of the C text stands on the page, in its stored outputs."
    import json
    cells = json.loads((root/'kernels'/'10_cpu.ipynb').read_text(encoding='utf-8'))['cells']
    shown = ''.join(''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {}))
    names = [l.removeprefix('// region: ') for l in build.SOURCE.read_text(encoding='utf-8').splitlines() if l.startswith('// region: ')]
    assert len(names)>10 and not [n for n in names if build.region(n) not in shown]

def test_a_region_that_there_is_not():
    with pytest.raises(ValueError, match="no region 'tiles'; it has vectors, product"): build.region('tiles')

def misfits(x):
    "Tensors of other shapes than x: one entry, one fewer and one more along each axis, an axis fewer and one more."
    for d,size in enumerate(x.shape):
        for n in {1, size-1, size+1} - {0, size}: yield x.new_ones((*x.shape[:d], n, *x.shape[d+1:]))
    yield from (x[0], x[None])

def states_unlike(state):
    "The state with one tensor, of its own or within it, of another shape."
    for n,x in state._asdict().items():
        yield from (state._replace(**{n:y}) for y in (states_unlike(x) if isinstance(x, tuple) else misfits(x)))

@needs_compiler
@pytest.mark.parametrize('step', [False, True])
def test_no_shape_is_read_past_its_end(step):
    "Whatever its implementation, a call refuses what does not fit: C would read another tensor's memory."
    B,H,N,T,D,V = 2,4,2,1 if step else 40,8,6
    rand = lambda *s: torch.rand(*s)
    fits = dict(q=rand(B,H,T,D), k=rand(B,N,T,D), v=rand(B,N,T,V), phi_q=rand(B,H,T,D), phi_k=rand(B,N,T,D), window=4, log_q=rand(B,H,T),
        log_k=rand(B,N,T), log_gamma=rand(H), mask=torch.ones(B,T).bool(), output_final_state=step)
    past = window_attention(rand(B,H,9,D), rand(B,N,9,D), rand(B,N,9,V), rand(B,H,9,D), rand(B,N,9,D), 4, output_final_state=True)[1]
    for start in (None, past):
        window_attention(**fits, initial_state=start)
        for n,x in fits.items():
            for y in misfits(x) if isinstance(x, torch.Tensor) and (n!='v' or start) else ():
                with pytest.raises(ValueError): window_attention(**fits | {n:y}, initial_state=start)
    for bad in states_unlike(past):
        with pytest.raises(ValueError): window_attention(**fits, initial_state=bad)
    with pytest.raises(ValueError, match='given -1'): window_attention(**fits | dict(window=-1))

@needs_compiler
def test_what_a_map_returns_is_checked():
    q,k,v = torch.rand(2, 4, 40, 8),torch.rand(2, 2, 40, 8),torch.rand(2, 2, 40, 6)
    good = dict(phi_q=q, phi_k=k, log_k=torch.zeros(2, 2, 40))
    linear_attention(q, k, v, lambda *_: (*good.values(),))
    for n,x in good.items():
        for y in misfits(x):
            with pytest.raises(ValueError): linear_attention(q, k, v, lambda *_: (*(good | {n:y}).values(),))
    for m in (None, make_feature_map('hedgehog', 8, 4, 2)):
        for bad in states_unlike(linear_attention(q, k, v, m, output_final_state=True)[1]):
            with pytest.raises(ValueError, match='initial_state'): linear_attention(q, k, v, m, initial_state=bad)

@needs_compiler
def test_matrices_of_other_shapes_are_left_to_pytorch():
    x = torch.rand(2, 4, 10, 8)
    assert maps.suits_map(x, torch.rand(4, 16, 8)) and not any(maps.suits_map(x, torch.rand(s)) for s in ((3, 16, 8), (4, 16, 7), (8, 8)))

@needs_compiler
def test_forward_derivatives_are_refused_by_name():
    "Its gradients go backward: forward it would give zeros. Without a name PyTorch does it."
    q,k,v = torch.rand(1, 2, 9, 4),torch.rand(1, 1, 9, 4),torch.rand(1, 1, 9, 4)
    for f in (linear_attention, lambda q, k, v, **kw: window_attention(q, k, v, q, k, 3, **kw)):
        tangent = lambda name: torch.func.jvp(lambda x: f(x, k, v, implementation=name), (q,), (torch.ones_like(q),))[1]
        with pytest.raises(ValueError, match='gradients backward alone'): tangent('c')
        assert torch.allclose(tangent(None), tangent('naive'), atol=1e-5)
