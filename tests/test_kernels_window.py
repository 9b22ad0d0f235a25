"""Window and linear in Triton against fp64 PyTorch: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.attentions.base import make_attention, make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.ops.linear import LinearState
from hedgehog_nb.ops.window import chunk_window_attention, naive_window_attention, window_decode_step, WindowState
from hedgehog_nb.attentions.window import features_with_log_weights
from helpers.interpreter import DEVICE, HERE, compiles, few, kernel, other_masks, python, quick_and_slow, under_the_interpreter

TOL = {torch.float32:1e-5, torch.float16:4e-3, torch.bfloat16:4e-2} # of the largest reference value; the interpreter cuts bf16 where a GPU rounds
NAMES = 'q','k','v','phi_q','phi_k'

if HERE:
    from hedgehog_nb.kernels import window as kw, window_states
    from hedgehog_nb.kernels.window import triton_window_attention
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

def inputs(B=1, H=2, Hkv=1, T=20, D=8, Dv=None, form='exp', dtype=torch.float32, seed=0, log=True, gamma=True, masked=False):
    "A dict of what `triton_window_attention` takes, from a disturbed Hedgehog map."
    q,k,v = (rand(B, h, T, d, seed=seed+i) for i,(h,d) in enumerate(((H, D), (Hkv, D), (Hkv, Dv or D))))
    fm = make_feature_map('hedgehog', D, H, Hkv, form=form).to(DEVICE)
    for i,p in enumerate(fm.parameters()): p.data = rand(*p.shape, seed=seed+9+i)*D**-.5
    with torch.no_grad(): phi_q,phi_k,log_q,log_k = features_with_log_weights(fm, q, k)
    mask = None
    if masked:
        mask = rand(B, T, seed=seed+5) > -1
        if T>3: mask[0,:3] = False
    return dict(zip(NAMES, (x.to(dtype) for x in (q, k, v, phi_q, phi_k)))) | dict(log_q=log_q if log else None,
        log_k=log_k if log else None, log_gamma=rand(H, seed=seed+6) if gamma else None, mask=mask)

def close(a, r, tol, name=''):
    assert a.shape==r.shape and torch.isfinite(a).all(), name
    err = ((a.double() - r).abs().max()/r.abs().max().clamp_min(1)).item()
    assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"

def run(f, a, window, dt=None, seed=77):
    "Outputs, and the gradients of all that has one."
    ins = {n: x.to(dt or x.dtype).detach().requires_grad_() for n,x in a.items() if x is not None and n!='mask'}
    o = f(**ins, window=window, mask=a['mask'])
    gs = torch.autograd.grad(o, list(ins.values()), rand(*o.shape, seed=seed).to(a['v'].dtype).to(o.dtype), allow_unused=True)
    return dict(o=o.detach()) | {n: torch.zeros_like(x) if g is None else g for (n,x),g in zip(ins.items(), gs)}

def check(a, window, tol=None):
    got,want = run(triton_window_attention, a, window),run(naive_window_attention, a, window, torch.float64)
    for n in got:
        assert got[n].dtype==(a['v'] if n=='o' else a[n]).dtype, n
        close(got[n], want[n], (tol or TOL[a['v'].dtype])*(1 if n!='log_gamma' else 4), n) # a sum over all tokens

def forward_only(a, window, tol=None):
    close(triton_window_attention(**a, window=window),
        naive_window_attention(**{n: x.double() if x is not None and n!='mask' else x for n,x in a.items()}, window=window), tol or TOL[a['v'].dtype])

@kernel
@pytest.mark.parametrize('D,T', [(8, 1), (60, 1), (64, 1), (8, 17), (32, 17), (128, 17), (32, 64), (64, 64), (8, 100), (60, 100), (8, 257)])
def test_shapes(D, T): # windows, heads and forms take turns; test_windows and test_drawn mix them
    i = D//4 + T
    H,Hkv = [(4,4), (4,2), (4,1)][i % 3] if T<257 else (1,1) # interpreted, time goes by heads and tokens
    forward_only(inputs(1, H, Hkv, T, D, form=FORMS[i % 3], masked=T==17), [0, 1, 16, 64][i % 4])

@kernel
@pytest.mark.parametrize('Hkv,window', [(4,0), (2,1), (1,1), (4,16), (2,16), (1,64), (4,200)])
def test_windows(Hkv, window): check(inputs(1, 4, Hkv, 40 if window==16 else 24, masked=True), window)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('window,T,dtype', [*((w, 40, torch.float32) for w in (14, 15, 17)), *((w, 140, torch.bfloat16) for w in (62, 63, 65, 128))])
@pytest.mark.parametrize('form', ['softmax_halves', 'exp'])
def test_windows_that_end_near_a_block(form, window, T, dtype):
    "Blocks have 16 rows in fp32, 64 in half precision; without log weights or padding fewer masks are made."
    logs = form=='exp'
    check(inputs(1, 1 + logs, 1, T, form=form, dtype=dtype, log=logs, gamma=logs), window)

@kernel
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', TOL)
def test_forms_and_dtypes(dtype, form): check(inputs(1, 2, 1, 40, 16, form=form, dtype=dtype), 7)

@kernel
@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('gamma', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_each_alone(masked, gamma, log): check(inputs(1, 2, 2, 20, log=log, gamma=gamma, masked=masked), 5)

@kernel
@settings(max_examples=8, deadline=None, derandomize=True)
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 2), T=st.integers(1, 40),
       D=st.integers(1, 20), Dv=st.integers(1, 20), window=st.integers(0, 60), form=st.sampled_from(FORMS),
       masked=st.booleans(), bthd=st.booleans(), dtype=st.sampled_from(list(TOL)), seed=st.integers(0, 99))
@pytest.mark.slow
def test_drawn(B, Hkv, G, T, D, Dv, window, form, masked, bthd, dtype, seed):
    a = inputs(B, Hkv*G, Hkv, T, D, Dv, form, dtype, seed, masked=masked)
    if bthd: a |= {n: a[n].transpose(1, 2).contiguous().transpose(1, 2) for n in NAMES}
    check(a, window, 3*TOL[dtype])

@pytest.mark.slow
@kernel
def test_tiles_of_channels_and_features(monkeypatch):
    "Wide heads are cut: channels forward, features backward. Small tiles do the same for small heads."
    whole = window_states._blocks
    monkeypatch.setattr(window_states, '_blocks', lambda *a: whole(*a) | dict(BLOCK_T=16) | (dict(BLOCK_F=16) if a[-1] is True else dict(BLOCK_D=16)))
    check(inputs(1, 2, 1, 40, 24), 7); check(inputs(1, 1, 1, 20, 24, dtype=torch.float16), 3)

@kernel
def test_wide_heads(): check(inputs(1, 1, 1, 18, 128), 5)

@kernel
@pytest.mark.parametrize('window', [0, 5, 30])
def test_the_state_goes_on(window):
    a = inputs(2, 2, 1, 21, Dv=12, masked=True)
    o,state = triton_window_attention(**part(a, slice(20)), window=window, output_final_state=True)
    _,want = chunk_window_attention(**part(a, slice(20)), window=window, output_final_state=True)
    for x,y in zip(flat(state), flat(want)):
        if y.numel(): close(x, y.double(), 1e-5)
    last,_ = window_decode_step(**part(a, slice(20, None), window), state=state)
    close(last, chunk_window_attention(**a, window=window)[:,:,20:].double(), 1e-5)

def part(a, s, window=0):
    "The tokens `s` of everything; after a state of `window` keys, with the features and log weights of the keys that leave while these are read."
    late = lambda x: x if x is None else torch.cat([torch.zeros_like(x[:,:,:1]).expand(-1, -1, window, *x.shape[3:]), x], 2)[:,:,:x.shape[2]]
    a = a | {n: late(a[n]) for n in ('phi_k','log_k')}
    return {n: x if x is None or n=='log_gamma' else x[:,s] if n=='mask' else x[:,:,s] for n,x in a.items()}
def flat(s): return *s[:3], *s.linear

@kernel
@pytest.mark.parametrize('window', [0, 5, 16, 40])
@few(1, 'schedule,form', [('scan', 'softmax_halves'), (3, 'exp')])
def test_a_prompt_in_parts_is_the_whole(schedule, form, window):
    "Three calls, the second of one token, against the PyTorch form over all of it: outputs, states, and gradients within a part."
    a = inputs(2, 2, 1, 44, Dv=12, masked=True, form=form)
    want,end = chunk_window_attention(**a, window=window, output_final_state=True)
    os,state = [],None
    for s in (slice(22), slice(22, 23), slice(23, None)):
        b = part(a, s, window if s.start else 0)
        o,new = triton_window_attention(**b, window=window, initial_state=state, output_final_state=True, schedule=schedule)
        _,ref = chunk_window_attention(**b, window=window, initial_state=state, output_final_state=True)
        for x,y in zip(flat(new), flat(ref)):
            if y.numel(): close(x, y.double(), 1e-5)
        os.append(o); before,state = state,new
    close(torch.cat(os, 2), want.double(), 1e-5)
    f = lambda g, **kw: run(lambda **k: g(**k, **kw, initial_state=before), b, window)
    for n,x in f(triton_window_attention, schedule=schedule).items(): close(x, f(chunk_window_attention)[n].double(), 2e-5, n)

@kernel
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_state_in_fp32_beside_half_precision(dtype):
    "Its keys are rounded as the new ones are; strided views of (B, T, H, D) go on from it as their copies do."
    a = inputs(1, 2, 1, 40, dtype=dtype, masked=True)
    _,state = chunk_window_attention(**part(a, slice(15)), window=6, output_final_state=True)
    b = part(a, slice(15, None), 6)
    want = run(lambda **k: chunk_window_attention(**k, initial_state=state), b, 6, torch.float64)
    views = b | {n: b[n].transpose(1, 2).contiguous().transpose(1, 2) for n in NAMES}
    for x in (b, views):
        for n,y in run(lambda **k: triton_window_attention(**k, initial_state=state), x, 6).items():
            close(y, want[n], TOL[dtype]*(4 if n=='log_gamma' else 1), n)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('window,T,log,masked', [(0, 40, False, True), (7, 60, True, True), (16, 60, False, False), (64, 70, True, False)])
def test_segments_agree(window, T, log, masked):
    a = inputs(1, 2, 1, T, 16, log=log, masked=masked)
    one,*more = (run(lambda **k: triton_window_attention(**k, schedule=s), a, window) for s in ('scan', 'parallel', 4))
    for other in more:
        for n in one: close(other[n], one[n].double(), 1e-5, n)

@kernel
def test_states_that_do_not_fit():
    a = inputs(T=8)
    _,s = chunk_window_attention(**a, window=4, output_final_state=True)
    with pytest.raises(ValueError, match='initial_state has shapes'): triton_window_attention(**a, window=5, initial_state=s)
    with pytest.raises(ValueError, match='takes no gradient of initial_state'):
        triton_window_attention(**a, window=4, initial_state=s._replace(k=s.k.requires_grad_()))
    with pytest.raises(ValueError, match='must lie on'): triton_window_attention(**a, window=4, initial_state=s.apply(lambda x: x.detach().to('meta')))

@kernel
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_rounds_products_and_keeps_states(dtype):
    "q and k in fp32 beside v in half precision, as a rotary embedding leaves them, with features in fp32."
    a = inputs(T=40)
    low = a | {n: a[n].to(dtype) for n in NAMES}
    want,after = triton_window_attention(**low, window=7, output_final_state=True)
    for b in (a, a | dict(v=low['v']), low | dict(phi_q=a['phi_q'], phi_k=a['phi_k'])):
        leaves = {n: b[n].clone().requires_grad_() for n in NAMES}
        with torch.autocast(DEVICE, dtype): o,s = triton_window_attention(**(b | leaves), window=7, output_final_state=True)
        assert (o.dtype==b['v'].dtype and torch.equal(o.to(dtype), want)
                and all(x.dtype==torch.float32 for x in flat(s)) and all(map(torch.equal, flat(s), flat(after))))
        assert all(g.dtype==x.dtype for g,x in zip(torch.autograd.grad(o.float().square().sum(), list(leaves.values())), leaves.values()))
    assert torch.equal(triton_window_attention(**(low | dict(phi_q=a['phi_q'], phi_k=a['phi_k'])), window=7), want) # without autocast: the dtype of q, k and v

def agree(f, *ins):
    "`f` -> (tensor, further tensors) in one graph as without one: results and gradients."
    torch._dynamo.reset()
    outs = []
    for g in (f, torch.compile(f, fullgraph=True, backend='aot_eager')):
        o,*more = g(*ins)
        outs.append((o, *more, *torch.autograd.grad(o.sin().sum(), [x for x in ins if x.requires_grad], allow_unused=True)))
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-6)

@kernel
@pytest.mark.parametrize('state', [False, True])
@few(1, 'given', [(), ('log_q',), ('log_k', 'mask'), ('log_gamma', 'mask'), ('log_q', 'log_k', 'log_gamma', 'mask')])
def test_one_graph(given, state):
    "In torch.compile, with and without what may be there; schedule and window take turns."
    a,window,schedule = inputs(1, 2, 1, 22, masked=True),3 + 2*len(given),(None, 2)[len(given) % 2]
    names = [n for n in a if n in NAMES or n in given]
    before = flat(chunk_window_attention(**part(a, slice(9)), window=window, output_final_state=True)[1]) if state else ()
    def f(*x):
        s = x[len(names):]
        o,after = triton_window_attention(**dict(zip(names, x)), window=window, output_final_state=True,
            schedule=schedule, initial_state=WindowState(*s[:3], LinearState(*s[3:])) if s else None)
        return o, *flat(after)
    agree(f, *(x.requires_grad_() if x.is_floating_point() else x for x in (a[n] for n in names)), *before)

@kernel
@few(1, 'kw', [dict(window=5, form='exp'), dict(window=5, relative=True), dict(window=5, branch='linear')])
def test_the_module_in_one_graph(kw):
    "`WindowAttention.attend` asked for Triton: gradients of inputs and of what it learns; a state and a mask; several tokens and one."
    m = make_attention('hedgehog-window', 8, 4, 2, **kw).to(DEVICE)
    ins = [rand(1, h, 18, 8, seed=i).requires_grad_() for i,h in enumerate((4, 2, 2))]
    def f(q, k, v, mask, *_):
        cut = lambda s: dict(zip(('q','k','v','mask'), (q[:,:,s], k[:,:,s], v[:,:,s], mask[:,s])), implementation='triton', output_final_state=True)
        o,state = m.attend(**cut(slice(11)))
        with torch.no_grad(): more,state = m.attend(**cut(slice(11, None)), initial_state=state)
        return o, more, *flat(state)
    agree(f, *ins, rand(1, 18) > -1, *m.parameters())

@pytest.mark.slow
@kernel
def test_one_graph_for_several_lengths():
    torch._dynamo.reset()
    f = torch.compile(lambda q,k,v,a,b: triton_window_attention(q, k, v, a, b, 5), fullgraph=True, backend='aot_eager', dynamic=True)
    for T in (20, 33, 41):
        ins = [x.requires_grad_() for x in list(inputs(1, 2, 1, T).values())[:5]]
        got,want = ([o, *torch.autograd.grad(o.sin().sum(), ins)] for o in (f(*ins), triton_window_attention(*ins, 5)))
        assert all(map(torch.equal, got, want))
        with torch.compiler.set_stance('fail_on_recompile'): f(*ins)

@kernel
@few(1, 'state,end,schedule', [(False, False, '2'), (True, True, 'scan')])
def test_registered_as_torch_wants_it(state, end, schedule):
    a = inputs(1, 2, 1, 20, masked=True)
    past = [x.contiguous() for x in flat(chunk_window_attention(**a, window=4, output_final_state=True)[1])] if state else []
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in a.values()]
    args = past,4,.3,end,schedule,'ieee'
    torch.library.opcheck(kw._window_op, (*leaves, *args))
    o,L,*_ = kw._window_op(*leaves, *args)
    torch.library.opcheck(kw._window_bwd_op, [x.detach() if isinstance(x, torch.Tensor) else x for x in (o, o, L, *leaves, *args[:3], *args[4:])])

@kernel
def test_second_derivatives_are_refused():
    a = inputs(T=5); a['q'].requires_grad_()
    g, = torch.autograd.grad(triton_window_attention(**a, window=3).sin().sum(), a['q'], create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula'): g.sum().backward()

@kernel
def test_causal():
    a = inputs(T=40)
    changed = a | {n: torch.cat([a[n][:,:,:25], torch.full_like(a[n][:,:,25:], 7)], 2) for n in NAMES}
    assert torch.equal(triton_window_attention(**changed, window=6)[:,:,:25], triton_window_attention(**a, window=6)[:,:,:25])

@kernel
def test_neither_branch_overflows():
    a = inputs(T=40, form='exp')
    for f in (60, 300):
        steep = a | dict(q=f*a['q'], log_q=f*a['log_q'], log_k=f*a['log_k'])
        got,want = run(triton_window_attention, steep, 7),run(naive_window_attention, steep, 7, torch.float64)
        for n in got: close(got[n], want[n], 1e-3, n)

@kernel
def test_rows_that_see_nothing():
    a = inputs(T=20); a['mask'] = torch.zeros(1, 20, dtype=torch.bool, device=DEVICE); a['mask'][0,12:] = True
    got = run(triton_window_attention, a, 5)
    assert not got['o'][:,:,:12].any() and not any(got[n][:,:,:12].any() for n in (*NAMES, 'log_q', 'log_k')); check(a, 5)

@kernel
def test_strides_are_read_in_place():
    a = inputs(1, 2, 2, 20)
    views = a | {n: torch.cat([a[n], a[n]], -1).transpose(1, 2).contiguous().transpose(1, 2)[...,:a[n].shape[-1]] for n in NAMES}
    for x,y in zip(run(triton_window_attention, a, 5).values(), run(triton_window_attention, views, 5).values()): assert torch.equal(x, y)

@kernel
def test_only_some_gradients():
    a = inputs(T=20); a['v'].requires_grad_()
    g, = torch.autograd.grad(triton_window_attention(**a, window=5).sum(), a['v']) # the gradient of a plain sum has stride 0
    r, = torch.autograd.grad(naive_window_attention(**a, window=5).sum(), a['v'])
    close(g, r.double(), 1e-5)

@kernel
@pytest.mark.parametrize('message,change', [
    ('window is a number of keys, 0 or more; given -1', dict(window=-1)), ('window is', dict(window=2.)),
    ('as many queries', lambda a: dict(q=a['q'][:,:,:9], phi_q=a['phi_q'][:,:,:9])), ('phi_q is', lambda a: dict(phi_q=a['phi_q'][:,:1])),
    ('log_q is', dict(log_q=torch.zeros(1, 2, 3))), ('log_k is', dict(log_k=torch.zeros(1, 2, 20))),
    ('log_gamma is', dict(log_gamma=torch.zeros(3))), ('mask is', dict(mask=torch.ones(1, 3))), ('q is float32', lambda a: dict(q=a['q'].double())),
    ('phi_k is float32', lambda a: dict(phi_k=a['phi_k'].double())), ('last stride 1', lambda a: dict(v=a['v'].mT.contiguous().mT)),
    ('precision is', dict(precision='tf16')), ('up to 512', lambda a: dict(phi_q=torch.ones(1, 2, 20, 513), phi_k=torch.ones(1, 1, 20, 513))),
    ('256 channels', lambda a: dict(v=torch.ones(1, 1, 20, 257))), ('must lie on', lambda a: dict(mask=torch.ones(1, 20, device='meta'))),
    ('schedule is', dict(schedule='fast')), ('empty', lambda a: {n: a[n][:0] for n in NAMES}), ('empty', lambda a: {n: a[n][:,:,:0] for n in NAMES}),
    ('do not divide', lambda a: {n: a[n].repeat(1, 3, 1, 1)[:,:h] for n,h in dict(q=3, k=2, v=2, phi_q=3, phi_k=2).items()}),
    ('same heads and tokens', lambda a: dict(v=a['v'][:,:,:3])),
])
def test_errors_say_what_was_given(message, change):
    a = {n: x for n,x in inputs().items() if n in NAMES} | dict(window=4)
    new = change(a) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        triton_window_attention(**(a | {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type!='meta' else x for n,x in new.items()}))

def test_import_without_a_gpu_works_and_cpu_tensors_are_refused():
    pytest.importorskip('triton')
    res = python('-c', 'import torch\nfrom hedgehog_nb.kernels.window import triton_window_attention as f\nf(*[torch.ones(1,1,4,8)]*5, 2)',
        TRITON_INTERPRET='0', CUDA_VISIBLE_DEVICES='')
    assert res.returncode!=0 and 'ValueError: the kernel runs on a GPU; given tensors on cpu' in res.stderr

HOPPER = """
import torch
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.kernels.window import triton_window_attention
from hedgehog_nb.ops.window import WindowState
SM = 227*1024
LIMITS = dict(fwd=(296,30,32), bwd_q=(296,33,39), bwd_kv=(704,43,67))

def use(F, D, dtype=torch.bfloat16, group=1, logs=False, mask=False, state=False, final=False, window=64, schedule='scan', backward=True, T=8192):
    e = lambda h, *d, t=dtype: torch.empty(1, h, T, *d, dtype=t, requires_grad=True)
    qkv,phi = [e(group, D), e(1, D), e(1, D)],[e(group, F), e(1, F)]
    kw = dict(log_q=e(group, t=torch.float32), log_k=e(1, t=torch.float32), log_gamma=torch.empty(group, requires_grad=True)) if logs else {}
    if mask: kw['mask'] = torch.ones(1, T)
    if state: kw['initial_state'] = WindowState.empty(*(x.detach().float() for x in (*qkv[1:], phi[1])), window)
    def f():
        o = triton_window_attention(*qkv, *phi, window, **kw, output_final_state=final, schedule=schedule)
        if backward: (o[0] if final else o).sum().backward()
    return {r['kernel'].removeprefix('window_'): r for r in inspect_kernels(f)}
"""
HOPPER_PARTS = dict(quick="""for kernel,u in use(128, 64).items():
    most,slots,near = LIMITS[kernel]
    assert u['spilled_bytes']<=most and u['slots']<=slots and u['near']<=near\
 and 2*(u['shared_bytes'] + 1024)<=SM and u['registers']*u['warps']*32*2<=65536, u # two programs at a time
""", slow="""for kernel,u in use(128, 64, window=0).items(): assert u['near']<=.7*LIMITS[kernel][2], u
for kernel,u in use(128, 64, logs=True, mask=True).items():
    most,_,near = LIMITS[kernel]
    assert u['spilled_bytes']<=2*most + 64 and u['near']<=1.75*near, u
res = use(128, 64, group=4, logs=True, mask=True, schedule=4)
for kernel,(most,near) in dict(fwd=(656,52), bwd_q=(720,62), bwd_kv=(1776,128)).items():
    assert res[kernel]['spilled_bytes']<=most and res[kernel]['near']<=near, res[kernel]
res = use(256, 128)
for kernel,near in dict(fwd=50, bwd_q=65, bwd_kv=180).items(): assert res[kernel]['near']<=near, res[kernel]
res = use(128, 64, logs=True, schedule=4)
for kernel in ('states', 'dstates'): assert res[kernel]['near']<=11, res[kernel]
for dtype,backward in ((torch.float16, False), (torch.bfloat16, True)): # the largest
    res = use(512, 256, dtype, group=4, logs=True, mask=True, state=True, final=True, schedule=4, backward=backward)
    assert all(u['shared_bytes']<=SM for u in res.values()), res
""")

@pytest.mark.compiles
@quick_and_slow
def test_compiles_for_hopper(which, tmp_path): compiles(HOPPER + HOPPER_PARTS[which], tmp_path)

@kernel
@pytest.mark.parametrize('kw', [dict(window=5), dict(window=16, form='exp'), dict(window=5, relative=True),
    dict(window=5, branch='window'), dict(window=5, branch='linear')])
def test_the_module_on_the_kernel(kw):
    "`WindowAttention.attend` asked for Triton: a prompt, its continuation and single tokens as in PyTorch."
    a = make_attention('hedgehog-window', 16, 4, 2, **kw).to(DEVICE)
    q,k,v = (torch.randn(1, h, 40, 16, generator=torch.Generator().manual_seed(h+i)).to(DEVICE) for i,h in enumerate((4, 2, 2)))
    with torch.no_grad():
        want,state,os,i = a.attend(q, k, v),None,[],0
        for n in (21, 17, 1, 1):
            s = slice(i, i+n); i += n
            o,state = a.attend(q[:,:,s], k[:,:,s], v[:,:,s], initial_state=state, output_final_state=True, implementation='triton'); os.append(o)
    torch.testing.assert_close(torch.cat(os, 2), want, atol=1e-4, rtol=1e-4)

@kernel
def test_masks_of_any_dtype():
    a = inputs(masked=True)
    want = run(triton_window_attention, a, 5)
    after = lambda mask: triton_window_attention(**a | dict(mask=mask), window=5, output_final_state=True)[1]
    state = after(a['mask'])
    for mask in other_masks(a['mask']):
        got = run(triton_window_attention, a | dict(mask=mask), 5)
        assert all(torch.equal(got[n], want[n]) for n in want), (mask.dtype, mask.unique())
        assert all(torch.equal(x, y) for x,y in zip(after(mask), state) if isinstance(x, torch.Tensor)), (mask.dtype, mask.unique())
