"""One entry point for all kernels: which one it takes, that it agrees, and what autocast changes: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hedgehog_nb import linear_attention as attention
from hedgehog_nb import functional
from hedgehog_nb.attentions.base import FEATURE_MAPS, make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.ops.linear import LinearState
from helpers.interpreter import DEVICE, HERE, kernel, under_the_interpreter

TOL = {torch.float32:1e-5, torch.float16:4e-3, torch.bfloat16:3e-2} # of the largest reference value; the interpreter cuts bf16 where a GPU rounds

if HERE: from hedgehog_nb.kernels import chunk_bwd, decode, dispatch, fused
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
def inputs(B=1, H=2, Hkv=1, T=20, D=8, dtype=torch.float32): return tuple(rand(B, h, T, D, seed=i).to(dtype) for i,h in enumerate((H, Hkv, Hkv)))

def make(name='hedgehog', D=8, H=2, Hkv=1, **kw):
    m = make_feature_map(name, D, H, Hkv, **kw).to(DEVICE)
    for i,p in enumerate(m.parameters()): p.data += rand(*p.shape, seed=5+i)*D**-.5/2
    return m

def close(a, r, tol, name=''):
    assert a.shape==r.shape and torch.isfinite(a).all(), name
    err = ((a.double() - r.double()).abs().max()/r.abs().max().clamp_min(1e-3)).item()
    assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"

def whole(s): return s.S*s.m[...,None,None].exp(), s.z*s.m[...,None].exp()

def taken(monkeypatch):
    "Names of the kernels' functions as they are called."
    seen = []
    for m,n in ((decode, 'decode_step'), (fused, 'fused_hedgehog_attention'), (chunk_bwd, 'triton_linear_attention')):
        def f(*a, _n=n, _f=getattr(m, n), **kw): seen.append(_n); return _f(*a, **kw)
        monkeypatch.setattr(m, n, f)
    return seen

@kernel
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', [n for n in FEATURE_MAPS if n!='rfa'])
def test_every_map(name, causal):
    fm,(q,k,v) = make(name, **dict(order=2) if name in ('taylor','fast') else {}),inputs()
    if not fm.positive: pytest.fail(f'{name} has weights below zero')
    leaves = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    (o,s),(r,t) = (attention(*x, fm, causal, output_final_state=True, implementation=i) for x,i in zip(leaves, ('triton','chunked')))
    close(o, r.detach(), TOL[torch.float32], 'o')
    for a,b in zip(whole(s), whole(t)): close(a, b.detach(), TOL[torch.float32], 'state')
    w = [*fm.parameters()]
    grads = [torch.autograd.grad((x*x.detach().cos()).sum(), [*l, *w]) for x,l in ((o, leaves[0]), (r, leaves[1]))]
    for a,b in zip(*grads): close(a, b, 2e-4, 'gradient')

@kernel
def test_which_kernel_serves(monkeypatch):
    seen,(q,k,v) = taken(monkeypatch),inputs()
    one = [x[:,:,:1] for x in (q, k, v)]
    fm,elu = make(),make('elu')
    def kernel_of(*qkv, fm=fm, **kw): seen.clear(); attention(*qkv, fm, implementation='triton', **kw); return seen[-1]
    with torch.no_grad():
        _,s = attention(q, k, v, fm, output_final_state=True)
        _,e = attention(q, k, v, elu, output_final_state=True)
        assert kernel_of(q, k, v)=='fused_hedgehog_attention' and kernel_of(q, k, v, fm=elu)=='triton_linear_attention'
        assert (kernel_of(*one)=='fused_hedgehog_attention' and kernel_of(*one, initial_state=s)=='decode_step'
                and kernel_of(*one, fm=elu, initial_state=e)=='decode_step')
        assert kernel_of(*one, fm=make('cosformer'), initial_state=LinearState(rand(1,1,16,8).abs(), rand(1,1,16).abs(), rand(1,1)),
            offset=4)=='triton_linear_attention'
        assert kernel_of(q, k, v, initial_state=s)=='fused_hedgehog_attention'
        assert kernel_of(*inputs(D=8)[:2], rand(1, 1, 20, 8, seed=2).half())=='fused_hedgehog_attention' # of two dtypes
    assert kernel_of(*one, initial_state=s)=='fused_hedgehog_attention' # the matrices want a gradient
    assert (kernel_of(*one, fm=elu, initial_state=e)=='decode_step'
            and kernel_of(one[0].clone().requires_grad_(), *one[1:], fm=elu, initial_state=e)=='triton_linear_attention')
    assert kernel_of(*one[:2], one[2].clone().requires_grad_(), fm=elu, initial_state=e)=='triton_linear_attention'

@kernel
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', ['hedgehog', 'elu'])
def test_packed(monkeypatch, name, causal):
    seen,(q,k,v),fm = taken(monkeypatch),inputs(T=30),make(name)
    (o,s),(r,t) = (attention(q, k, v, fm, causal, cu_seqlens=[0,11,12,30], output_final_state=True, implementation=i) for i in ('triton','chunked'))
    assert seen==['fused_hedgehog_attention' if name=='hedgehog' else 'triton_linear_attention']
    close(o, r.detach(), TOL[torch.float32])
    for a,b in zip(whole(s), whole(t)): close(a, b.detach(), TOL[torch.float32])

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('form', FORMS)
def test_prompt_then_token_by_token(form):
    "Prefill, then the decode step, as generation does it: equal to the whole, the states handed on untouched."
    (q,k,v),fm = inputs(2, 4, 2, 24),make(H=4, Hkv=2, form=form)
    mask = torch.ones(2, 24, dtype=torch.bool, device=DEVICE); mask[0,:5] = False
    with torch.no_grad():
        r = attention(q, k, v, fm, mask=mask, implementation='chunked')
        o,s = attention(q[:,:,:20], k[:,:,:20], v[:,:,:20], fm, mask=mask[:,:20], output_final_state=True, implementation='triton')
        os,start = [o],s.apply(torch.clone)
        first = s
        for t in range(20, 24):
            o,s = attention(*(x[:,:,t:t+1] for x in (q, k, v)), fm, mask=mask[:,t:t+1], initial_state=s, output_final_state=True, implementation='triton')
            os.append(o)
    close(torch.cat(os, 2)[:,:,5:], r[:,:,5:], TOL[torch.float32]); assert all(map(torch.equal, first, start))

@kernel
@pytest.mark.parametrize('name', ['hedgehog', 'elu'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_rounds_products_and_keeps_states(name, dtype):
    (q,k,v),fm = inputs(T=40),make(name)
    low = [x.to(dtype) for x in (q, k, v)]
    want,after = attention(*low, fm, output_final_state=True, implementation='triton')
    for qkv in ((q, k, v), (q, k, low[2]), low):
        leaves = [x.detach().clone().requires_grad_() for x in qkv]
        with torch.autocast(DEVICE, dtype): o,s = attention(*leaves, fm, output_final_state=True, implementation='triton')
        assert o.dtype==qkv[2].dtype and torch.equal(o.to(dtype), want) and all(x.dtype==torch.float32 for x in s) and all(map(torch.equal, s, after))
        grads = torch.autograd.grad(o.float().square().sum(), [*leaves, *fm.parameters()])
        assert all(g.dtype==x.dtype and torch.isfinite(g).all() for g,x in zip(grads, [*leaves, *fm.parameters()]))
    with torch.autocast(DEVICE, dtype), torch.no_grad(): # one token more
        o,s = attention(*(x[:,:,:1] for x in (q, k, v)), fm, initial_state=after, output_final_state=True, implementation='triton')
    assert o.dtype==torch.float32 and s.S.dtype==torch.float32

@kernel
def test_by_default_the_same_way(monkeypatch):
    "What `implementation=None` takes on a GPU, for which the CPU stands, once a kernel has passed its self-check."
    from hedgehog_nb.kernels import self_check
    from hedgehog_nb import functional as m
    seen,(q,k,v),fm = taken(monkeypatch),inputs(),make()
    monkeypatch.setattr(m, '_runs_kernels', lambda x: False); attention(q, k, v, fm); assert not seen
    monkeypatch.setattr(m, '_runs_kernels', lambda x: True); monkeypatch.setattr(self_check, 'trusts', lambda *a, **kw: True)
    attention(q, k, v, fm); assert seen==['fused_hedgehog_attention']

@kernel
@pytest.mark.parametrize('schedule', ['scan', 'parallel', 3])
def test_the_schedule_is_handed_on(schedule):
    (q,k,v),fm = inputs(T=130),make()
    for m in (fm, make('elu')):
        close(functional._triton(functional.LinearCall(q, k, v, m), schedule=schedule), attention(q, k, v, m, implementation='chunked'), TOL[torch.float32])

@pytest.mark.compiles
@kernel
def test_compiles_into_one_graph():
    torch._dynamo.reset()
    (q,k,v),fm = inputs(),make()
    f = lambda q,k,v: attention(q, k, v, fm, implementation='triton')
    with torch.no_grad(): assert torch.equal(f(q, k, v), torch.compile(f, backend='aot_eager', fullgraph=True)(q, k, v))
    _,s = attention(q, k, v, fm, output_final_state=True)
    g = lambda q,k,v,S,z,m: attention(q, k, v, fm, initial_state=LinearState(S, z, m), implementation='triton')
    one = [x[:,:,:1] for x in (q, k, v)]
    with torch.no_grad(): assert torch.equal(g(*one, *s), torch.compile(g, backend='aot_eager', fullgraph=True)(*one, *s))

@kernel
def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match="RFA's weights may be"): attention(*inputs(), make('rfa'), implementation='triton')

@kernel
@pytest.mark.parametrize('T', [1, 20])
def test_what_is_more_than_a_hedgehog_map_is_not_taken_for_one(T):
    "A subclass may map otherwise, and a hook wants to see the map at work"
    from hedgehog_nb.attentions.hedgehog import Hedgehog
    class Other(Hedgehog):
        def map_k(self, k):
            phi,log = super().map_k(k)
            return phi*torch.arange(1., phi.shape[-1]+1).to(phi), log
    q,k,v = inputs(T=T)
    state = LinearState(rand(1, 1, 16, 8).abs(), rand(1, 1, 16).abs(), torch.zeros(1, 1, device=DEVICE))
    run = lambda m, how: attention(q, k, v, m, initial_state=state, output_final_state=True, implementation=how)[0]
    other = Other(8, 2, 1).to(DEVICE).requires_grad_(False)
    close(run(other, 'triton'), run(other, 'chunked'), TOL[torch.float32])
    m,seen = make().requires_grad_(False),[]
    m.register_forward_hook(lambda *a: seen.append(1))
    close(run(m, 'triton'), run(m, 'chunked'), TOL[torch.float32])
    assert len(seen)==2
