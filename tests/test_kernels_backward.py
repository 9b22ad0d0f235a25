"""The gradient of linear attention in Triton against fp64 PyTorch, the operation under autograd, autocast and torch.compile, \
and the way to it from `linear_attention`."""
import pytest, torch
from hypothesis import Phase, given, settings, strategies as st
from hedgehog_nb import linear_attention as attention
from hedgehog_nb import functional
from hedgehog_nb.functional import HAS_TRITON
from hedgehog_nb.ops.linear import bidirectional_linear_attention, LinearState, recurrent_linear_attention
from helpers.chunk_inputs import close, extras, inputs, rand
from helpers.interpreter import DEVICE, HERE, compiles, few, kernel, other_masks, python, quick_and_slow, under_the_interpreter

TOL = {torch.float32:2e-5, torch.float16:4e-3, torch.bfloat16:4e-2} # of the largest reference value; the interpreter cuts bf16 where a GPU rounds
NAMES = 'phi_q','phi_k','v','log_k','S','z','m'

if HERE:
    from hedgehog_nb.kernels.chunk_bwd import triton_linear_attention
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def apart(q, k, v, log_k=None, causal=True, mask=None, initial_state=None, cu=None):
    "The recurrence, whose maxima have gradients too, or the bidirectional form, one packed sequence after the other: outputs and states."
    f,res = recurrent_linear_attention if causal else bidirectional_linear_attention,[]
    for i,(a,b) in enumerate(zip(cu, cu[1:])) if cu else [(slice(None), (None, None))]:
        cut,row = (lambda x: None if x is None else x[:,:,a:b]),slice(i, i+1) if cu else i
        before = initial_state and LinearState(*(x[row] for x in initial_state))
        res.append(f(*map(cut, (q, k, v, log_k)), mask=None if mask is None else mask[:,a:b], initial_state=before, output_final_state=True))
    return torch.cat([o for o,_ in res], 2), LinearState(*map(torch.cat, zip(*(s for _,s in res))))

def grads(f, tensors, dtype, mask=None, use=('o', 's'), **kw):
    "Gradients of a random linear function of the outputs and the final state."
    ins = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    o,after = f(*ins[:4], mask=mask, initial_state=None if ins[4] is None else LinearState(*ins[4:]), **kw)
    weigh = lambda x, i: (x*rand(*x.shape, seed=50+i).to(x.dtype)).sum()
    loss = ('o' in use)*weigh(o, 0) + sum(weigh(x, 1+i) for i,x in enumerate(after) if 's' in use)
    got = torch.autograd.grad(loss, [x for x in ins if x is not None], allow_unused=True)
    it = iter(got)
    return [None if x is None else next(it) for x in ins]

def check(q, k, v, causal=True, schedule=None, tol=None, log_k=None, mask=None, initial_state=None, cu=None, use=('o', 's')):
    "All gradients against those of PyTorch in fp64."
    tensors = q, k, v, log_k, *(initial_state or (None,)*3)
    ours = grads(lambda *a,**kw: triton_linear_attention(*a, causal=causal, cu_seqlens=cu, schedule=schedule, output_final_state=True, **kw),
        tensors, None, mask, use)
    theirs = grads(lambda *a,**kw: apart(*a, causal=causal, cu=cu, **kw), tensors, torch.float64, mask, use)
    # of the differences of larger numbers: exact zeros, e.g. of phi_q where a row sees one token
    least = .1*max(1e-2, *(r.abs().max() for r in theirs if r is not None))
    for name,x,a,r in zip(NAMES, tensors, ours, theirs):
        if x is None: continue
        if a is None or r is None:
            assert all(g is None or not g.any() for g in (a, r)), name
            continue
        assert a.dtype==x.dtype and a.shape==x.shape and torch.isfinite(a).all(), name
        err,allowed = ((a.double() - r).abs().max()/max(r.abs().max(), least)).item(),tol or max(TOL[x.dtype] for x in (q, k, v))
        assert err < allowed, f"{name}: {err:.1e}, allowed {allowed:.0e}"

@kernel
@few(2, 'T', [1, 17, 64, 100, 257])
@pytest.mark.parametrize('D', [8, 32, 60, 64, 128])
def test_shapes(D, T):
    H,Hkv = [(4,4), (4,2), (4,1)][(D//4 + T) % 3]
    if T>17: H,Hkv = (2 if Hkv<H else 1), 1 # interpreted, time goes by heads and tokens
    dtype = torch.float32 if T<=64 else torch.float16 if T==100 else torch.bfloat16
    check(*inputs(1, H, Hkv, T, min(2*D, 128), D, dtype=dtype), causal=T!=64, schedule=('scan', 2)[T % 2])

@kernel
@pytest.mark.parametrize('causal,schedule', [(True, 'scan'), (True, 2), (False, 2)])
@pytest.mark.parametrize('heads', [(4,4), (4,2), (4,1)])
def test_everything_at_once(heads, causal, schedule): check(*inputs(2, *heads, 24, 24, 20), causal, schedule, **extras(2, heads[1], 24, 24, 20))

@kernel
def test_padded_keys_without_log_weights_get_no_gradient(): check(*inputs(1, 2, 1, 20), True, 'scan', **extras(1, 1, 20, log=False, state=False))

@kernel
@pytest.mark.parametrize('masked', [False, True])
def test_log_weights_with_several_tiles_and_segments(masked): # each tile of features writes its part of their gradient, each segment its tokens
    check(*inputs(1, 2, 2, 40, 300, 130), True, 2, **extras(1, 2, 40, 300, 130, masked=masked, state=False))

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('state', [False, True])
def test_each_alone(log, masked, state):
    for use,causal,schedule in (('o', True, 'scan'), ('s', True, 2), (('o', 's'), False, 2)):
        check(*inputs(1, 2, 1, 20), causal, schedule, use=use, **extras(1, 1, 20, log=log, masked=masked, state=state))

@kernel
@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('causal', [True, False])
def test_dtypes_keep_states_in_fp32(causal, dtype):
    kw = extras(1, 1, 100, 64, 32)
    kw['log_k'] /= 5 # where one key outweighs all others, o is its v, and their difference is what rounding o leaves
    check(*inputs(1, 1, 1, 100, 64, 32, dtype=dtype), causal, 2, **kw)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('F,D', [(512,256), (1,1), (17,130)])
def test_widths_where_the_state_is_cut(F, D):
    check(*inputs(1, 1, 1, 9, F, D), F<512, **extras(1, 1, 9, F, D))

def packed(cu, Hkv, F, D, seed=3): # one state for each sequence
    n = len(cu)-1
    return LinearState(rand(n, Hkv, F, D, seed=seed), rand(n, Hkv, F, seed=seed+1).abs(), 3*rand(n, Hkv, seed=seed+2))

@kernel
@pytest.mark.parametrize('cu', [[0,50], [0,20,21,37,50]])
@pytest.mark.parametrize('causal', [True, False])
def test_packed_is_separate(causal, cu):
    q,k,v = inputs(1, 2, 1, 50)
    kw = extras(1, 1, 50, state=False)
    for schedule,before in (('scan', None), (3, packed(cu, 1, 16, 8))):
        check(q, k, v, causal, schedule, cu=cu, **kw | dict(initial_state=before))
        o,s = triton_linear_attention(q, k, v, **kw | dict(initial_state=before), causal=causal,
            cu_seqlens=torch.tensor(cu, device=DEVICE), schedule=schedule, output_final_state=True)
        ref = apart(*(x.double() for x in (q, k, v, kw['log_k'])), causal, kw['mask'], before and before.apply(torch.Tensor.double), cu)
        for a,r in zip((o, *s), (ref[0], *ref[1])): close(a, r, 1e-5)
    if not causal: return
    v2 = v.clone(); v2[:,:,cu[1]-1] += 9 # seen by no later sequence
    a,b = (triton_linear_attention(q, k, x, cu_seqlens=cu) for x in (v, v2))
    assert torch.equal(a[:,:,cu[1]:], b[:,:,cu[1]:]) and not torch.equal(a, b)

@kernel
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]) # interpreted, shrinking would take minutes
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 3), T=st.integers(1, 70),
       Tq=st.integers(1, 50), F=st.integers(1, 40), D=st.integers(1, 40), causal=st.booleans(),
       log=st.booleans(), masked=st.booleans(), state=st.booleans(), bthd=st.booleans(), cuts=st.lists(st.integers(1, 69), max_size=3),
       dtype=st.sampled_from(list(TOL)), schedule=st.sampled_from([None, 'scan', 'parallel', 3]), seed=st.integers(0, 99))
@pytest.mark.slow
def test_drawn(B, Hkv, G, T, Tq, F, D, causal, log, masked, state, bthd, cuts, dtype, schedule, seed):
    cu = sorted({0, T, *(c for c in cuts if c<T)}) if cuts else None
    if cu: B,Tq = 1,None
    qkv = inputs(B, Hkv*G, Hkv, T, F, D, dtype, None if causal else Tq, seed)
    if bthd: qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    kw = extras(B, Hkv, T, F, D, seed, log, masked, state)
    if kw['initial_state'] is not None: # of one sign, for sums that do not cancel
        kw['initial_state'] = LinearState(*(x.abs() if i<2 else x for i,x in enumerate(packed(cu, Hkv, F, D) if cu else kw['initial_state'])))
    check(*qkv, causal, schedule, 4*TOL[dtype], cu=cu, **kw)

@pytest.mark.slow
@kernel
def test_strided_views_and_cotangents():
    q,k,v = inputs(2, 2, 1, 20, 16, 16)
    g = rand(2, 2, 20, 16)
    qkv = rand(2, 20, 4, 48).abs().transpose(1, 2) # as a fused projection leaves them
    views = ([x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)],
        (qkv[:,:2,:,:16], qkv[:,2:3,:,16:32], qkv[:,3:,:,32:]), (q[:,:1].expand(-1, 2, -1, -1), k[:1].expand(2, -1, -1, -1), v))
    for x,g in zip(views, (g, g.mT.contiguous().mT, g[...,:1].expand(-1, -1, -1, 16))): # views of inputs, and of what arrives from above
        a,b = (torch.autograd.grad(triton_linear_attention(*ins), ins, c)
            for ins,c in (([y.detach().requires_grad_() for y in x], g), ([y.contiguous().detach().requires_grad_() for y in x], g.contiguous())))
        assert all(map(torch.equal, a, b))

@kernel
def test_repeats_to_the_bit():
    for causal in (True, False):
        ins = [x.requires_grad_() for x in inputs(1, 2, 1, 40, dtype=torch.bfloat16)]
        a,b = (torch.autograd.grad(triton_linear_attention(*ins, causal=causal, schedule=2),
            ins, torch.ones(1, 2, 40, 8, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2))
        assert all(map(torch.equal, a, b))

@kernel
def test_only_what_is_asked_for():
    full = inputs(T=20)
    want = torch.autograd.grad(triton_linear_attention(*(x.requires_grad_() for x in full)).sin().sum(), full)
    for i in range(3):
        ins = [x.detach().requires_grad_(i==j) for j,x in enumerate(full)]
        g, = torch.autograd.grad(triton_linear_attention(*ins).sin().sum(), ins[i])
        assert torch.equal(g, want[i])
    assert not triton_linear_attention(*(x.detach() for x in full)).requires_grad
    S = rand(1, 2, 16, 8).requires_grad_()
    triton_linear_attention(*(x.detach() for x in full), initial_state=LinearState(S, rand(1, 2, 16).abs(), torch.zeros(1, 2, device=DEVICE))).sum().backward()
    assert S.grad.any()

@kernel
@pytest.mark.parametrize('causal', [True, False])
def test_padding_takes_and_gives_nothing(causal):
    q,k,v = inputs(2, 2, 2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE); mask[0,:9] = False; mask[1,30:] = False
    k[0,:,:9], v[0,:,:9], v[1,:,30:] = float('inf'), float('nan'), float('nan')
    ins = [x.requires_grad_() for x in (q, k, v, rand(2, 2, 40))]
    out = triton_linear_attention(*ins, causal=causal, mask=mask, schedule=2)
    gq,*gk = torch.autograd.grad(out.square().sum(), ins)
    assert all(torch.isfinite(g).all() for g in (gq, *gk))
    for g in gk: assert not g[0,:,:9].any() and not g[1,:,30:].any() and g[0,:,9:].any()
    if causal: assert not gq[0,:,:9].any() # these queries see no key

@kernel
def test_rows_that_see_nothing_are_quiet():
    q,k,v = (x.requires_grad_() for x in inputs(T=20))
    empty = LinearState(*(x.requires_grad_() for x in LinearState.empty(k.detach(), v.detach())))
    for causal in (True, False):
        o = triton_linear_attention(q, k, v, causal=causal, mask=torch.zeros(1, 20, dtype=torch.bool, device=DEVICE), initial_state=empty)
        assert not o.any() and not any(g.any() for g in torch.autograd.grad(o.sum(), (q, k, v, *empty)))

@kernel
def test_large_log_weights_and_gradients_beyond_fp16():
    q,k,v = inputs(T=100)
    check(q, k, v, schedule=2, log_k=200*rand(1, 2, 100), tol=1e-4)
    q,k,v = inputs(1, 1, 1, 150, dtype=torch.float16)
    check(60*q, 10_000*k, 30*v, schedule='scan', tol=8e-3, use='o') # sums of 1e5 and more

@kernel
def test_numbers_of_the_gradient_itself():
    "Directional derivatives by central differences, no reference form involved."
    q,k,v = (x.double() for x in inputs(T=30))
    l = rand(1, 2, 30).double()
    ins = [x.float().requires_grad_() for x in (q, k, v, l)]
    f = lambda *a: triton_linear_attention(*a).double().square().sum()
    got = torch.autograd.grad(f(*ins), ins)
    for i,g in enumerate(got):
        way = rand(*g.shape, seed=7+i)*ins[i].detach().abs()
        a,b = (f(*(x.detach() + s*1e-2*way if i==j else x.detach() for j,x in enumerate(ins))) for s in (1, -1))
        num,ana = ((a - b)/2e-2).item(),(g.double()*way).sum().item()
        assert abs(num - ana) < 5e-3*abs(ana) + 2e-3, (i, num, ana)

@kernel
def test_autocast_changes_nothing():
    ins = [x.requires_grad_() for x in inputs(T=20)]
    for dtype in (torch.float32, torch.bfloat16):
        args = [x.detach().to(dtype).requires_grad_() for x in ins]
        o,s = triton_linear_attention(*args, output_final_state=True)
        with torch.autocast(DEVICE, torch.bfloat16): o2,s2 = triton_linear_attention(*args, output_final_state=True)
        assert torch.equal(o, o2) and o2.dtype==dtype and s2.S.dtype==s2.z.dtype==torch.float32 and torch.equal(s.z, s2.z)
        assert all(g.dtype==dtype for g in torch.autograd.grad(o2.sum(), args))

@pytest.mark.compiles
@kernel
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    kw = extras(1, 1, 20)
    f = lambda q,k,v,l,S,z,m,mask: triton_linear_attention(q, k, v, l, mask=mask, initial_state=LinearState(S, z, m), output_final_state=True)
    ins = [x.requires_grad_() for x in (*inputs(1, 2, 1, 20), kw['log_k'], *kw['initial_state'])]
    res = [fn(*ins, kw['mask']) for fn in (f, torch.compile(f, backend=backend, fullgraph=True))]
    gs = [torch.autograd.grad(o.sin().sum() + s.S.sum() + s.m.sum(), ins) for o,s in res]
    assert all(map(torch.equal, (res[0][0], *res[0][1], *gs[0]), (res[1][0], *res[1][1], *gs[1])))

@pytest.mark.compiles
@kernel
def test_the_entry_point_compiles_too():
    torch._dynamo.reset()
    q,k,v = inputs(1, 2, 1, 20)
    fm = lambda q,k: (q.exp(), k.exp(), None)
    f = lambda q,k,v,cu: attention(q, k, v, fm, cu_seqlens=cu, implementation='triton')
    g = torch.compile(f, backend='eager', fullgraph=True)
    for cu in (None, torch.tensor([0,3,20])): assert torch.equal(f(q, k, v, cu), g(q, k, v, cu))
    with pytest.raises(ValueError, match='rise from 0'): g(q, k, v, torch.tensor([0,20,10])) # checked when it runs

@kernel
def test_registered_as_torch_wants_it():
    from hedgehog_nb.kernels import chunk_bwd as m
    q,k,v = inputs(1, 2, 1, 20)
    none = [None]*4
    for cu,end in ((None, True), (torch.tensor([0,5,20]), False)):
        torch.library.opcheck(m._attention_op, (*(x.requires_grad_() for x in (q, k, v)), *none, None, cu, True, end, '', 'ieee'),
                              test_utils=('test_schema', 'test_autograd_registration', 'test_faketensor'))

@kernel
def test_second_derivatives_are_refused():
    q,k,v = (x.requires_grad_() for x in inputs(T=5))
    g, = torch.autograd.grad(triton_linear_attention(q, k, v).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'): g.sum().backward()

@kernel
def test_the_entry_point_leads_here():
    q,k,v = inputs(1, 2, 1, 60)
    fm,kw = (lambda q,k: (q.exp(), k.exp(), None)),extras(1, 1, 60, log=False)
    for causal in (True, False):
        a,s = attention(q, k, v[...,:7], fm, causal, kw['mask'], None, True, implementation='triton')
        b,r = attention(q, k, v[...,:7], fm, causal, kw['mask'], None, True, implementation='chunked')
        for x,y in zip((a, *s), (b, *r)): assert torch.allclose(x, y, atol=1e-5)
    # copied where channels lie apart
    assert torch.equal(attention(q, k.mT.contiguous().mT, v, implementation='triton'), attention(q, k, v, implementation='triton'))
    with pytest.raises(ValueError, match='float32, float16 or bfloat16'): attention(q.double(), k.double(), v.double(), implementation='triton')

@kernel
@pytest.mark.parametrize('cu', [[0,5], [1,20], [0,9,9,20], [0,12,6,20], [0], [], [0,1.5,20], torch.ones(2,2)])
def test_borders_that_do_not_fit(cu):
    with pytest.raises(ValueError, match='cu_seqlens'): triton_linear_attention(*inputs(), cu_seqlens=cu)

@kernel
@pytest.mark.parametrize('message,change', [
    ('batch must be 1', lambda q,k,v: dict(phi_q=q.expand(2, -1, -1, -1), phi_k=k.expand(2, -1, -1, -1), v=v.expand(2, -1, -1, -1), cu_seqlens=[0,20])),
    ('cu_seqlens needs as many', lambda q,k,v: dict(phi_q=q[:,:,:9], causal=False, cu_seqlens=[0,9])),
    ('as many queries as keys', lambda q,k,v: dict(phi_q=q[:,:,:9])),
    ('initial_state has shapes', lambda q,k,v: dict(cu_seqlens=[0,5,20], initial_state=packed([0,20], 2, 16, 8))),
    ('empty', lambda q,k,v: dict(phi_q=q[:,:,:0], phi_k=k[:,:,:0], v=v[:,:,:0])), ('empty', lambda q,k,v: dict(phi_q=q[:0], phi_k=k[:0], v=v[:0])),
    ('last stride 1', lambda q,k,v: dict(v=v.mT.contiguous().mT)), ('different devices', lambda q,k,v: dict(v=v.to('meta'))),
    ('phi_k is float32', lambda q,k,v: dict(phi_k=k.double())),
    ('up to 512', lambda q,k,v: dict(phi_q=torch.ones(1,2,20,513), phi_k=torch.ones(1,2,20,513))), ('schedule is', lambda q,k,v: dict(schedule=-1)),
])
def test_errors_say_what_was_given(message, change):
    q,k,v = inputs()
    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type!='meta' else x
    with pytest.raises(ValueError, match=message): triton_linear_attention(**dict(phi_q=q, phi_k=k, v=v) | {n: move(x) for n,x in change(q, k, v).items()})

def test_what_triton_takes_and_import_of_the_entry_point():
    "What is chosen on a GPU, asked of tensors that only claim to lie there; and the library needs no Triton."
    from torch._subclasses.fake_tensor import FakeTensorMode
    fits = lambda *args: functional._triton_fits(functional.LinearCall(*args))
    with FakeTensorMode():
        x = lambda F, dtype=torch.bfloat16, device='cuda': torch.empty(1, 2, 8, F, dtype=dtype, device=device)
        assert fits(x(512), x(512), x(256))==HAS_TRITON and fits(x(16, torch.float32), x(16), x(16, torch.float16))==HAS_TRITON
        for q,k,v in ((x(513), x(513), x(8)), (x(8), x(8), x(257)), (x(8, torch.float64), x(8), x(8)),
                (x(8), x(8), x(8, torch.float64)), [x(8, device='cpu')]*3):
            assert not fits(q, k, v)
        map = lambda **kw: type('Map', (), kw)()
        assert fits(x(64), x(64), x(64), map(feature_dim=512, positive=True))==HAS_TRITON
        for fm in (map(feature_dim=513), map(feature_dim=8, positive=False), map(feature_dim=None), lambda q,k: (q, k, None)):
            assert not fits(x(8), x(8), x(8), fm)
    res = python('-c', 'import sys, torch; sys.modules["triton"] = None\nfrom hedgehog_nb import linear_attention as f\nx = torch.rand(1,1,4,8); f(x, x, x)\n'
                 'import hedgehog_nb.functional\nhedgehog_nb.functional.HAS_TRITON = False\nf(x, x, x, implementation="triton")')
    assert res.returncode!=0 and "ValueError: implementation='triton' needs Triton" in res.stderr, res.stderr

def test_import_is_lazy_and_cpu_tensors_are_refused():
    pytest.importorskip('triton')
    res = python('-c', 'import sys, torch\nfrom hedgehog_nb import linear_attention as f\nx = torch.rand(1,1,4,8); '
                 'f(x, x, x); assert "triton" not in sys.modules and not any(m.startswith("hedgehog_nb.kernels.") and '
                 'not m.startswith(("hedgehog_nb.kernels.cpu", "hedgehog_nb.kernels.common")) for m in sys.modules)\nf(x, x, x, implementation="triton")',
                 TRITON_INTERPRET='0', CUDA_VISIBLE_DEVICES='')
    assert res.returncode!=0 and 'ValueError: the kernel runs on a GPU; given tensors on cpu' in res.stderr, res.stderr

HOPPER = """
import torch
from hedgehog_nb.kernels.chunk_bwd import triton_linear_attention
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.ops.linear import LinearState

def use(F, D, kernel, dtype=torch.bfloat16, group=1, log_k=False, packed=False, mask=False, state=False, T=8192, **config):
    e = lambda h, *d, t=dtype: torch.empty(1, h, T, *d, dtype=t).requires_grad_()
    n = 2 if packed else 1
    q,k,v,log = e(group, F),e(1, F),e(1, D),e(1, t=torch.float32) if log_k else None
    s = LinearState(*(torch.empty(n, 1, *d).requires_grad_() for d in ((F, D), (F,), ()))) if state else None
    def f():
        o = triton_linear_attention(q, k, v, log, True, torch.ones(1, T) if mask else None, s, cu_seqlens=[0, T//2, T] if packed else None, schedule=4)
        torch.autograd.grad(o.sum(), [x for x in (q, k, v, log, *(s or ())) if x is not None])
    rows = [r for r in inspect_kernels(f, **config) if r['kernel']==kernel.split(',')[0]]
    return rows[-1 if 'values' in kernel else 0]

def check(F, D, kernel, spilled, near, slots, tensor, programs=2, **kw): # cycles of an SM for a token
    u = use(F, D, kernel, **kw)
    fit = min(65536//(u['registers']*32*u['warps']), 227*1024//(u['shared_bytes'] + 1024))
    assert u['spilled_bytes']<=spilled and u['near']<=1.15*near and u['slots']<=1.15*slots and u['alu']<=1.5*slots\
 and u['tensor']<=tensor and fit>=programs, u # other versions differ by as much
"""
HOPPER_PARTS = dict(quick="""check(128, 64, 'chunk_dq', 64, 21.2, 18.4, 16)
check(128, 64, 'chunk_dkv', 400, 29.8, 19.4, 26.5)
check(128, 64, 'segment_dstates', 0, 6.9, 6.4, 5, 3)
""", slow="""keys, values = 'chunk_dkv, of keys', 'chunk_dkv, of values' # two launches where the state does not fit
check(128, 64, 'chunk_dq', 160, 24.4, 20.8, 16, group=4)
check(128, 64, 'chunk_dkv', 400, 35.4, 22.7, 26.5, group=4)
check(128, 64, 'chunk_dq', 240, 27.9, 31.2, 16, log_k=True)
check(128, 64, 'chunk_dkv', 800, 48.2, 39.6, 26.5, log_k=True)
check(64, 64, 'chunk_dq', 0, 15.2, 15.4, 9)
check(64, 64, 'chunk_dkv', 0, 17.2, 13.7, 15.5)
for kernel,limits in {'chunk_dq': (64,25.5,25.2,15), keys: (0,16.6,14.5,15.5), values: (200,22.9,12.2,17), 'segment_dstates': (0,11.1,7.1,6)}.items():\
 check(256, 128, kernel, *limits)
for kernel,limits in {'chunk_dq': (400,41,23,25), keys: (560,50,23,28), values: (280,25,15,24)}.items(): check(128, 64, kernel, *limits, dtype=torch.float16)
check(128, 64, keys, 64, 164, 134, 91, 1, dtype=torch.float32)
check(128, 64, 'chunk_dkv', 1024, 59, 46.3, 26.5, log_k=True, packed=True, mask=True, state=True, group=4)
for kernel,dtype in (('chunk_dq',torch.float32), (keys,torch.float16), (values,torch.float16)):\
 assert use(512, 256, kernel, dtype)['shared_bytes']<=227*1024 # the largest
""")

@pytest.mark.compiles
@quick_and_slow
def test_compiles_for_hopper(which, tmp_path): compiles(HOPPER + HOPPER_PARTS[which], tmp_path)

@kernel
@pytest.mark.parametrize('causal', [True, False])
def test_masks_of_any_dtype(causal):
    (q,k,v),kw = inputs(1, 2, 1),extras(1, 1, state=False)
    def run(mask):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, kw['log_k'])]
        o,s = triton_linear_attention(*leaves, causal=causal, mask=mask, output_final_state=True, schedule=2)
        return [o, *s, *torch.autograd.grad(o.sin().sum() + s.S.sin().sum(), leaves)]
    want = run(kw['mask'])
    for mask in other_masks(kw['mask']): assert all(map(torch.equal, want, run(mask))), (mask.dtype, mask.unique())
