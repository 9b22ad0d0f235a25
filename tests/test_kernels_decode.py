"""One decode step in Triton against fp64 PyTorch: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.ops.linear import LinearState, recurrent_linear_attention
from helpers.interpreter import DEVICE, HERE, compiles, kernel, other_masks, python, quick_and_slow, under_the_interpreter

TOL = {torch.float32:1e-5, torch.float16:2e-3, torch.bfloat16:2e-2} # of the largest reference value; the interpreter cuts bf16 where a GPU rounds

if HERE:
    from hedgehog_nb.kernels import decode
    from hedgehog_nb.kernels.decode import decode_step
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

def inputs(B=1, H=2, Hkv=1, T=2, D=8, Dv=None, dtype=torch.float32, seed=0):
    return tuple(rand(B, h, T, d, seed=seed+i).to(dtype) for i,(h,d) in enumerate(((H, D), (Hkv, D), (Hkv, Dv or D))))

def hedgehog(D=8, H=2, Hkv=1, form='exp', bias=True, seed=5, **kw):
    m = make_feature_map('hedgehog', D, H, Hkv, form=form, bias=bias, **kw).to(DEVICE)
    for i,p in enumerate(m.parameters()): p.data = rand(*p.shape, seed=seed+i)*D**-.5
    return m

def before(B, Hkv, F, D, seed=9): return LinearState(rand(B, Hkv, F, D, seed=seed), rand(B, Hkv, F, seed=seed+1).abs() + 1, 3*rand(B, Hkv, seed=seed+2))

def close(a, r, tol, name=''):
    assert a.shape==r.shape and torch.isfinite(a).all(), name
    err = ((a.double() - r).abs().max()/r.abs().max().clamp_min(1e-3)).item()
    assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"

def cut(x, t): return None if x is None else x[:,t:t+1] if x.dim()==2 else x[:,:,t:t+1]

def check(q, k, v, fm=None, log_k=None, mask=None, state=None, tol=None, **kw):
    "All tokens, one by one, against the fp64 recurrence over the whole: outputs, state, and its dtype."
    double = lambda x: None if x is None else x.double()
    phi_q,phi_k,ref_log = (double(q), double(k), double(log_k)) if fm is None else fm.double()(double(q), double(k))
    if fm is not None: fm.float()
    F = phi_k.shape[-1]
    state = state or LinearState.empty(torch.empty(*k.shape[:3], F, device=DEVICE), v.float())
    start,mine = state.apply(lambda x: x.double().clone()),state.apply(torch.clone)
    ref_log = torch.zeros_like(phi_k[...,0]) if ref_log is None else ref_log # so that a padded token keeps m
    ro,rs = recurrent_linear_attention(phi_q, phi_k, double(v), ref_log.masked_fill(~mask[:,None], -1e30) if mask is not None else ref_log, mask, start, True)
    o = torch.cat([decode_step(cut(q, t), cut(k, t), cut(v, t), mine, fm, cut(log_k, t), cut(mask, t), **kw) for t in range(q.shape[2])], 2)
    tol = tol or TOL[v.dtype]
    assert o.dtype==v.dtype and all(x.dtype==torch.float32 for x in mine)
    close(o, ro, tol, 'o'); close(mine.S, rs.S, 1e-5, 'S'); close(mine.z, rs.z, 1e-5, 'z'); close(mine.m, rs.m, 1e-5, 'm')
    return o,mine

@kernel
def test_an_odd_number_of_features(): # the second half is one shorter: what lies behind it belongs to the next head
    q,k,v = inputs(2, 4, 2, 3, 9, 8)
    o,state = check(q.abs(), k.abs(), v, state=before(2, 2, 9, 8))

@kernel
@pytest.mark.parametrize('D', [8, 32, 60, 64])
@pytest.mark.parametrize('H,Hkv', [(4,4), (4,2), (4,1)])
def test_heads_and_widths(H, Hkv, D): # the forms take turns
    form = FORMS[(D//4 + Hkv) % 3]
    check(*inputs(1, H, Hkv, 1, D), hedgehog(D, H, Hkv, form), state=before(1, Hkv, 2*D, D))

@kernel
@pytest.mark.parametrize('form,T', [*zip(FORMS, (64, 17, 100))])
def test_many_tokens(form, T): check(*inputs(1, 1, 1, T), hedgehog(H=1, form=form))

@kernel
@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('form', FORMS)
def test_dtypes(form, dtype):
    fm = hedgehog(form=form)
    check(*inputs(T=4, dtype=dtype), fm)

@kernel
def test_half_precision_maps_and_no_bias():
    q,k,v = inputs(dtype=torch.bfloat16)
    fm = hedgehog(bias=False).to(torch.bfloat16)
    s = before(1, 1, 16, 8); mine = s.apply(torch.clone)
    o = decode_step(*(cut(x, 0) for x in (q, k, v)), mine, fm)
    fm = fm.double()
    ro,_ = recurrent_linear_attention(*fm(cut(q, 0).double(), cut(k, 0).double())[:2], cut(v, 0).double(),
        fm.map_k(cut(k, 0).double())[1], initial_state=s.apply(torch.Tensor.double), output_final_state=True)
    close(o, ro, TOL[torch.bfloat16])

@kernel
@settings(max_examples=12, deadline=None, derandomize=True)
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 2), D=st.integers(1, 40), Dv=st.integers(1, 40),
       maps=st.integers(1, 2), kind=st.sampled_from([*FORMS, 'given']), log=st.booleans(), masked=st.booleans(),
       state=st.booleans(), bias=st.booleans(), bthd=st.booleans(), dtype=st.sampled_from(list(TOL)), seed=st.integers(0, 99))
@pytest.mark.slow
def test_random_shapes(B, Hkv, G, D, Dv, maps, kind, log, masked, state, bias, bthd, dtype, seed):
    q,k,v = inputs(B, Hkv*G, Hkv, 2, D, Dv, dtype, seed)
    if bthd: q,k,v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    mask = rand(B, 2, seed=seed) > -.5 if masked else None
    if kind=='given': q,k,fm,log_k = q.abs(),k.abs(),None,5*rand(B, Hkv, 2, seed=seed+3) if log else None
    else: fm,log_k = hedgehog(D, Hkv*G, Hkv, kind, bias, seed, num_maps=maps),None
    F = D if fm is None else fm.feature_dim
    # a state of random signs makes sums that cancel: o is then as large as it is uncertain
    check(q, k, v, fm, log_k, mask, before(B, Hkv, F, Dv, seed) if state else None, tol=3*TOL[dtype])

def cut_into(monkeypatch, width):
    "Tiles of this many columns."
    monkeypatch.setattr(decode, '_block_v', lambda *a: width)
    monkeypatch.setattr(decode, '_config', decode._config.__wrapped__) # which else remembers another width

@kernel
@pytest.mark.parametrize('tile', [16, 32, 64])
def test_tiles_agree_and_semaphores_return(monkeypatch, tile):
    cut_into(monkeypatch, tile)
    semaphores = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    mask = torch.tensor([[True,False,True],[True,True,True]], device=DEVICE)
    check(*inputs(2, 2, 2, 3, 6, 60), hedgehog(6, 2, 2), mask=mask, state=before(2, 2, 12, 60), semaphores=semaphores)
    assert not semaphores.any()

@kernel
def test_the_order_of_tiles_does_not_matter(monkeypatch):
    "The last tile to arrive writes z, whichever it is: a count that begins in the middle of a round makes another tile the last."
    cut_into(monkeypatch, 16)
    q,k,v = inputs(1, 1, 1, 1, 6, 48)
    states = [before(1, 1, 12, 48) for _ in range(2)]
    for s,n in zip(states, (0, 1)): # with one counted already, the second of three tiles closes the round; the third opens the next
        semaphores = torch.tensor([n], dtype=torch.int32, device=DEVICE)
        decode_step(q, k, v, s, hedgehog(6, 1, 1), semaphores=semaphores)
        assert semaphores.item()==n
    assert torch.equal(states[0].m, states[1].m) and torch.equal(states[0].z, states[1].z)

@kernel
def test_padding_leaves_every_bit():
    q,k,v = inputs(2, 2, 1, 1)
    s = before(2, 1, 16, 8); mine = s.apply(torch.clone)
    decode_step(q, k, v, mine, hedgehog(), mask=torch.tensor([[False],[True]], device=DEVICE))
    for a,b in zip(mine, s): assert torch.equal(a[0], b[0])
    assert not torch.equal(mine.S[1], s.S[1])

@kernel
def test_extreme_widths():
    check(rand(1, 1, 1, 512).abs(), rand(1, 1, 1, 512).abs(), rand(1, 1, 1, 256), log_k=rand(1, 1, 1))
    check(*inputs(1, 1, 1, 1, 256, 8), hedgehog(256, 1, 1)); check(*inputs(1, 1, 1, 2, 1), hedgehog(1, 1, 1))

@kernel
def test_large_log_weights_do_not_overflow():
    q,k,v = inputs(T=6)
    check(q.abs(), k.abs(), v, log_k=300*rand(1, 1, 6)); check(300*q, 300*k, v, hedgehog(), tol=1e-4)

@kernel
def test_other_maps_and_states_of_other_forms():
    q,k,v = inputs(T=5)
    fm = make_feature_map('elu', 8, 2, 1)
    whole = recurrent_linear_attention(*(x.double() for x in fm(q, k)[:2]), v.double())
    _,s = recurrent_linear_attention(*(x[:,:,:4] for x in (*fm(q, k)[:2], v)), output_final_state=True)
    close(decode_step(*(cut(x, 4) for x in (q, k, v)), s.apply(torch.Tensor.contiguous), fm), whole[:,:,4:], 1e-5)

@kernel
def test_normalisers_may_be_negative(): # as with a Taylor map of low order
    q,k,v = inputs(T=4)
    check(q, k, v, tol=1e-4)

@kernel
def test_out_is_written_in_place():
    q,k,v = inputs(T=1)
    out = torch.empty(1, 1, 2, 8, device=DEVICE).transpose(1, 2)
    s = before(1, 1, 16, 8)
    want = decode_step(q, k, v, s.apply(torch.clone), hedgehog())
    assert decode_step(q, k, v, s, hedgehog(), out=out) is out and torch.equal(out, want)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('form', [*FORMS, 'given'])
def test_not_in_place_is_the_same_to_the_bit(form):
    "The state before stays as it was; a padded token, whatever it holds, hands it on."
    q,k,v = inputs(2, 2, 1, 1, 8, 40)
    fm = None if form=='given' else hedgehog(form=form)
    k[0], v[0] = float('nan'), float('inf')
    s,mask = before(2, 1, 8 if fm is None else 16, 40),torch.tensor([[False],[True]], device=DEVICE)
    start = s.apply(torch.clone)
    o,after = decode_step(q, k, v, s, fm, mask=mask, inplace=False)
    assert all(map(torch.equal, s, start)) and all(torch.equal(a[0], b[0]) for a,b in zip(after, s)) and not torch.equal(after.S[1], s.S[1])
    assert torch.equal(o, decode_step(q, k, v, s, fm, mask=mask)) and all(map(torch.equal, s, after))

@pytest.mark.compiles
@kernel
def test_compiles_into_one_graph():
    torch._dynamo.reset()
    q,k,v = inputs(1, 2, 1, 1)
    s,fm = before(1, 1, 16, 8),hedgehog()
    f = lambda q,k,v,S,z,m: decode_step(q, k, v, LinearState(S, z, m), fm, inplace=False)
    (o,after),(o2,after2) = f(q, k, v, *s),torch.compile(f, fullgraph=True, backend='aot_eager')(q, k, v, *s)
    assert torch.equal(o, o2) and all(map(torch.equal, after, after2))

@kernel
@pytest.mark.parametrize('message,change', [
    ('belong to a step in place', lambda a: dict(inplace=False, out=torch.empty(1, 2, 1, 8))),
    ('empty', lambda a: {n: a[n][:0] for n in 'qkv'}), ('takes one token', lambda a: {n: a[n].expand(-1, -1, 2, -1) for n in 'qkv'}),
    ('4|batch, heads', lambda a: dict(q=a['q'][0])), ('same channels', lambda a: dict(q=a['q'][...,:4])),
    ('do not divide', lambda a: dict(q=a['q'][:,[0,0,0]], k=a['k'].expand(1, 2, 1, 8), v=a['v'].expand(1, 2, 1, 8), feature_map=None)),
    ('heads with head_dim', lambda a: dict(q=a['q'][:,:1])),
    ('q is float32', lambda a: dict(q=a['q'].double())), ('last stride 1', lambda a: dict(v=rand(1, 1, 8, 8).mT[:,:,:1])),
    ('S of the state', lambda a: dict(state=a['state']._replace(S=a['state'].S.mT))),
    ('z of the state is contiguous float32', lambda a: dict(state=a['state']._replace(z=a['state'].z.bfloat16()))),
    ('m of the state', lambda a: dict(state=a['state']._replace(m=a['state'].m[:,:0]))),
    ('log_k only with features', lambda a: dict(log_k=torch.zeros(1, 1, 1))),
    ('log_k is', lambda a: dict(feature_map=None, log_k=torch.zeros(1, 2, 1), state=before(1, 1, 8, 8))), ('mask is', lambda a: dict(mask=torch.ones(1, 2))),
    ('out is', lambda a: dict(out=torch.empty(1, 2, 1, 9))),
    ('out is float32', lambda a: dict(out=torch.empty(1, 2, 1, 8).long())), ('semaphores are', lambda a: dict(semaphores=torch.zeros(1))),
    ('up to 512', lambda a: dict(q=torch.ones(1, 2, 1, 513), k=torch.ones(1, 1, 1, 513), feature_map=None)),
    ('must lie on', lambda a: dict(mask=torch.ones(1, 1, device='meta'))),
    ('looks at positions', lambda a: dict(feature_map=type('Rotary', (torch.nn.Module,), dict(uses_positions=True))())),
])
def test_errors_say_what_was_given(message, change):
    q,k,v = inputs(T=1)
    a = dict(q=q, k=k, v=v, state=before(1, 1, 16, 8), feature_map=hedgehog())
    with pytest.raises(ValueError, match=message):
        decode_step(**(a | {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type!='meta' else x for n,x in change(a).items()}))

def test_import_without_a_gpu_works_and_cpu_tensors_are_refused():
    pytest.importorskip('triton')
    code = '''import torch
from hedgehog_nb.kernels.decode import decode_step
from hedgehog_nb.ops.linear import LinearState
x = torch.ones(1,1,1,8); decode_step(x, x, x, LinearState.empty(x, x))'''
    res = python('-c', code, TRITON_INTERPRET='0', CUDA_VISIBLE_DEVICES='')
    assert res.returncode!=0 and 'ValueError: the kernel runs on a GPU; given tensors on cpu' in res.stderr

HOPPER = """
import re, torch, triton
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.kernels.decode import decode_step
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.ops.linear import LinearState

def use(D, form='softmax_halves', batch=1, Hkv=16, bias=False, log_k=False, mask=False):
    e = lambda h, d, dtype=torch.bfloat16: torch.empty(batch, h, 1, d, dtype=dtype)
    fm,width = (None, 2*D) if form=='given' else (make_feature_map('hedgehog', D, 16, Hkv, form=form, bias=bias).bfloat16(), D)
    state = LinearState.empty(e(Hkv, 2*D, torch.float32), e(Hkv, D, torch.float32))
    kw = dict(log_k=torch.empty(batch, Hkv, 1) if log_k else None, mask=torch.ones(batch, 1) if mask else None)
    row, = inspect_kernels(lambda: decode_step(e(16, width), e(Hkv, width), e(Hkv, D), state, fm, **kw))
    return row
"""
HOPPER_PARTS = dict(quick="""compile,ptx = triton.compile,[]
def keep(*args, **kw): ptx.append(res := compile(*args, **kw)); return res
triton.compile = keep
use(64, Hkv=4, mask=True); use(64, batch=64)
tiled,whole = (re.findall(r'ld\\.global|bar\\.sync|atom\\.global\\.gpu\\.acq_rel|st\\.global', p.asm['ptx']) for p in ptx)
count = tiled.index('atom.global.gpu.acq_rel')
assert 'ld.global' in tiled[:count] and tiled[count-1]=='bar.sync' and 'ld.global' not in tiled[count:] and tiled[count:].count('st.global')>=4, tiled
assert 'atom.global.gpu.acq_rel' not in whole
""", slow="""for kw in (dict(), dict(batch=64, form='exp', bias=True, mask=True), dict(Hkv=4, batch=64), dict(form='given', log_k=True)):
    assert use(64, **kw)['spilled_bytes']==0, kw
assert use(128, batch=64)['spilled_bytes']==0
""")

@pytest.mark.compiles
@quick_and_slow
def test_compiles_for_hopper(which, tmp_path):
    ("Nothing spills, and where tiles share z the machine code reads it before the count and writes it after: "
     "the interpreter, one program at a time, cannot tell.")
    compiles(HOPPER + HOPPER_PARTS[which], tmp_path)

@kernel
def test_masks_of_any_dtype():
    (q,k,v),state = inputs(2, T=1),before(2, 1, 8, 8)
    step = lambda mask: decode_step(q, k, v, state, mask=mask, inplace=False)
    real = torch.tensor([[True], [False]], device=DEVICE)
    o,s = step(real)
    for mask in other_masks(real):
        o2,s2 = step(mask)
        assert torch.equal(o, o2) and all(map(torch.equal, s, s2)), (mask.dtype, mask.unique())
