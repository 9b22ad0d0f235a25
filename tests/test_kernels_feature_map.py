"""The fused feature map against fp64 PyTorch: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.ops.features import per_head
from hedgehog_nb.ops.hedgehog import FORMS, hedgehog_features
from helpers.interpreter import DEVICE, HERE, compiles, few, kernel, python, quick_and_slow, under_the_interpreter

TOL = {torch.float32:1e-5, torch.float16:2e-3, torch.bfloat16:2e-2} # of the largest reference value

if HERE:
    import triton, triton.language as tl
    from hedgehog_nb.kernels.feature_map import fused_feature_map
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def inputs(B, H, T, D, E=None, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    return tuple(a.to(DEVICE, dtype) for a in (r(B, H, T, D), r(H, E or D, D)/D**.5, r(H, E or D)/4))

def check(x, weight, bias, form, tol=None, **kw):
    "Features, log weights and all gradients against fp64 autograd."
    ins = [a for a in (x, weight, bias) if a is not None]
    mine,ref = [a.detach().requires_grad_() for a in ins], [a.detach().double().requires_grad_() for a in ins]
    phi,m = fused_feature_map(*mine, form=form, **kw)
    phi_,m_ = hedgehog_features(per_head(*ref), form)
    tol = tol or TOL[phi.dtype if x.dtype==torch.float32 else x.dtype]
    assert phi.dtype==kw.get('out_dtype', x.dtype) and (m is None)==(form!='exp') and (m is None or m.dtype==torch.float32)
    outs,refs = ([o for o in f if o is not None] for f in ((phi, m), (phi_, m_)))
    gs = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outs]
    grads,grads_ = torch.autograd.grad(outs, mine, gs), torch.autograd.grad(refs, ref, [g.double() for g in gs])
    for name,a,r in zip(['phi','m'][:len(outs)] + ['dx','dW','db'], [*outs, *grads], [*refs, *grads_]):
        assert a.shape==r.shape and torch.isfinite(a).all(), name
        err = ((a.double() - r).abs().max()/r.abs().max().clamp_min(1e-3)).item()
        assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"

@kernel
@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('form', FORMS)
def test_forms_and_dtypes(form, dtype): check(*inputs(2, 3, 70, 64, dtype=dtype), form)

@kernel
@pytest.mark.parametrize('T', [1, 17, 64, 100])
@pytest.mark.parametrize('D', [8, 32, 60, 64, 128])
def test_shapes(D, T): # the forms take turns; test_random_shapes mixes everything
    for form in FORMS if T==17 else [FORMS[(D+T) % 3]]: check(*inputs(1, 2, T, D), form)

@kernel
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('D,E', [(256,256), (1,1), (64,192), (100,3)])
def test_extreme_widths(D, E, form): check(*inputs(1, 1, 5, D, E), form)

@kernel
@settings(max_examples=12, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), H=st.integers(1, 3), T=st.integers(1, 140), D=st.integers(1, 80), E=st.integers(1, 80), form=st.sampled_from(FORMS),
       dtype=st.sampled_from(list(TOL)), bias=st.booleans(), bthd=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.slow
def test_random_shapes(B, H, T, D, E, form, dtype, bias, bthd, seed):
    x,w,b = inputs(B, H, T, D, E, dtype, seed)
    if bthd: x = x.transpose(1, 2).contiguous().transpose(1, 2)
    check(x, w, b if bias else None, form, tol=3*TOL[dtype])

@kernel
def test_strided_views_are_read_in_place():
    x,w,b = inputs(2, 3, 50, 32)
    qkv = torch.randn(2, 50, 3, 96, device=DEVICE) # as a fused projection leaves them
    views = dict(bthd=x.transpose(1, 2).contiguous().transpose(1, 2), part=qkv.transpose(1, 2)[...,32:64], skip=qkv.transpose(1, 2)[:,:,::2,:32],
                 expanded=x[:,:1].expand(-1, 3, -1, -1), flipped_heads=x[:,[2,0,1]])
    for v,form in zip(views.values(), FORMS*2):
        check(v, w, b, form)
        assert torch.equal(fused_feature_map(v, w, b, form)[0], fused_feature_map(v.contiguous(), w, b, form)[0])

@kernel
def test_gradients_arriving_with_any_stride():
    x,w,_ = inputs(1, 2, 20, 16)
    for wrap in (lambda p: p.sum(), lambda p: (p.mT.contiguous()*torch.arange(20., device=DEVICE)).sum(), lambda p: p[...,::2].square().sum()):
        for form in FORMS:
            a,r = x.clone().requires_grad_(), x.double().requires_grad_()
            got,want = (torch.autograd.grad(wrap(fused_feature_map(a, w, form=form)[0]), a)[0],
                torch.autograd.grad(wrap(hedgehog_features(per_head(r, w.double()), form)[0]), r)[0])
            assert (got.double() - want).abs().max() < 1e-4*max(1, want.abs().max()), form

@kernel
def test_only_what_is_needed():
    x,w,b = inputs(1, 2, 20, 16)
    full = [a.clone().requires_grad_() for a in (x, w, b)]
    fused_feature_map(*full)[0].square().sum().backward()
    for i in range(3):
        part = [a.clone().requires_grad_(i==j) for j,a in enumerate((x, w, b))]
        fused_feature_map(*part)[0].square().sum().backward()
        assert torch.equal(part[i].grad, full[i].grad) and all(a.grad is None for j,a in enumerate(part) if j!=i)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('form', FORMS)
def test_repeats_to_the_bit(form):
    x,w,b = inputs(1, 2, 300, 16) # several partial sums
    runs = []
    for _ in range(2):
        ins = [a.clone().requires_grad_() for a in (x, w, b)]
        fused_feature_map(*ins, form=form)[0].square().sum().backward()
        runs.append([a.grad for a in ins])
    assert all(map(torch.equal, *runs))

@kernel
def test_ties_share_the_gradient_as_amax_does():
    x = torch.tensor([[2.,-2,1,0],[0,0,0,0],[3,3,3,-3]], device=DEVICE)[None,None]
    check(x, torch.eye(4, device=DEVICE)[None], None, 'exp')

@kernel
def test_large_inputs_do_not_overflow():
    x,w,b = inputs(1, 1, 20, 16)
    for form in FORMS: assert torch.isfinite(fused_feature_map(1e4*x, w, b, form)[0]).all()
    phi,m = fused_feature_map(1e4*x, w, b, 'exp')
    y = per_head(1e4*x.double(), w.double(), b.double())
    assert (phi.amax(-1)==1).all() and torch.allclose(m.double(), y.abs().amax(-1), rtol=1e-5)

@kernel
def test_mixed_dtypes():
    x,w,b = inputs(1, 2, 20, 32, dtype=torch.bfloat16)
    check(x, w.float(), b.float(), 'exp', out_dtype=torch.float32, tol=1e-2) # only dx is rounded to bf16
    check(x.float(), w, b, 'softmax_halves', out_dtype=torch.bfloat16)
    check(x.half(), w, b.float(), 'softmax_joint', tol=2e-2)

@pytest.mark.slow
@kernel
def test_blocks_that_do_not_divide_among_the_partial_sums(): check(*inputs(1, 512, 130, 8), 'softmax_halves') # three blocks for two sums

@pytest.mark.compiles
@kernel
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('bias', [False, True])
def test_compiles_into_one_graph(bias, form):
    torch._dynamo.reset()
    ins = [a.requires_grad_() for a in inputs(1, 2, 9, 8)][:2+bias]
    def f(*ins): return sum(o.sin().sum() for o in fused_feature_map(*ins, form=form) if o is not None)
    g = torch.compile(f, fullgraph=True, backend='aot_eager')
    for T in (9, 14, 21): # from the second length on one graph serves all
        ins[0] = inputs(1, 2, T, 8)[0].requires_grad_()
        assert all(map(torch.equal, *(torch.autograd.grad(h(*ins), ins) for h in (g, f))))

@kernel
@few(1, 'form', ['exp', 'softmax_joint'])
def test_registered_as_torch_wants_it(form):
    from hedgehog_nb.kernels import feature_map as m
    x,w,b = inputs(1, 2, 9, 8)
    for bias in (None, b.requires_grad_()):
        torch.library.opcheck(m._map_op,
            (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), w.requires_grad_(), bias, form, torch.bfloat16, 'ieee'))
    g,g_m = m._map_op(x.detach(), w.detach(), None, form, torch.float32, 'ieee')
    torch.library.opcheck(m._map_bwd_op, (g, g_m, x.detach(), w.detach(), None, form, 'ieee', True, True))

@kernel
def test_the_log_weights_alone_have_a_gradient():
    x,w,_ = inputs(1, 2, 9, 8)
    a,r = x.clone().requires_grad_(), x.double().requires_grad_()
    got,want = torch.autograd.grad(fused_feature_map(a, w, form='exp')[1].sum(), a)[0], torch.autograd.grad(per_head(r, w.double()).abs().amax(-1).sum(), r)[0]
    assert (got.double() - want).abs().max() < 1e-5

@kernel
@pytest.mark.parametrize('message,change', [
    ('x is \\(B, H, T, D\\)', lambda x,w,b: dict(x=x[0])), ('same H and D', lambda x,w,b: dict(weight=w[:1])),
    ('same H and D', lambda x,w,b: dict(weight=w[...,:8])), ('same H and D', lambda x,w,b: dict(weight=w[0])),
    ('bias is', lambda x,w,b: dict(bias=b[:,:8])), ('from 1 to 256', lambda x,w,b: dict(weight=torch.ones(2, 300, 16), bias=None)),
    ('from 1 to 256', lambda x,w,b: dict(weight=w[:,:0], bias=b[:,:0])), ('x is float32', lambda x,w,b: dict(x=x.double())),
    ('weight is float32', lambda x,w,b: dict(weight=w.long())), ('out_dtype is float32', lambda x,w,b: dict(out_dtype=torch.int32)),
    ('last stride 1', lambda x,w,b: dict(x=x.mT.contiguous().mT)), ('empty', lambda x,w,b: dict(x=x[:0])), ('empty', lambda x,w,b: dict(x=x[:,:,:0])),
    ('form is one of', lambda x,w,b: dict(form='softmax')),
    ('precision is', lambda x,w,b: dict(precision='tf16')), ('one device', lambda x,w,b: dict(weight=w.to('meta'))),
])
def test_errors_say_what_was_given(message, change):
    x,w,b = inputs(1, 2, 5, 16)
    with pytest.raises(ValueError, match=message): fused_feature_map(**(dict(x=x, weight=w, bias=b) | change(x, w, b)))

def test_import_without_triton_says_so():
    res = python('-c', 'import sys; sys.modules["triton"] = None\nimport hedgehog_nb.kernels.feature_map')
    assert res.returncode!=0 and 'ImportError: hedgehog_nb.kernels needs Triton' in res.stderr

def test_import_without_a_gpu_works_and_cpu_tensors_are_refused():
    pytest.importorskip('triton')
    res = python('-c', 'import torch\nfrom hedgehog_nb.kernels.feature_map import fused_feature_map as f\nf(torch.ones(1,1,1,8), torch.ones(1,8,8))',
        TRITON_INTERPRET='0', CUDA_VISIBLE_DEVICES='')
    assert res.returncode!=0 and 'ValueError: the kernel runs on a GPU; given tensors on cpu' in res.stderr

def test_what_an_instruction_keepscycles():
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.inspect import _instruction_cycles
    cycles = _instruction_cycles
    assert cycles('FFMA.FTZ')==('fma',1) and cycles('MUFU.EX2')==('exps',8) and cycles('ISETP.GE.AND')==('alu',2) and cycles('SHFL.BFLY')==('near',4)
    assert [cycles(x) for x in ('LDG.E.LTC128B', 'LDS.64', 'STS.128', 'LDSM.16.M88.4', 'LDL.LU', 'LDGSTS.E.BYPASS.LTC128B.128')]==[('near',n)
        for n in (4, 8, 16, 16, 4, 16)]
    assert cycles('HGMMA.64x64x16.F32.BF16')==('tensor',32) and cycles('HGMMA.64x64x8.F32.TF32')==('tensor',32) # half the products at half the rate
    assert cycles('HMMA.16816.F32.BF16')==('tensor', 4/.63) and cycles('HMMA.1688.F32.TF32')==('tensor', 4/.63)

KERNELS = '''
import torch, triton, triton.language as tl
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.kernels.launch import launch
@triton.jit
def _plain_kernel(x_ptr, o_ptr, mask_ptr, stride_xt, H, BLOCK_T:tl.constexpr):
    t = tl.arange(0, BLOCK_T)
    y = tl.exp2(tl.load(x_ptr + t*stride_xt))
    if mask_ptr is not None:
        for j in tl.static_range(99): y = tl.exp2(y)
        y = tl.where(tl.load(mask_ptr + t) != 0, y, 0.)
    tl.store(o_ptr + t, y*H)
@triton.jit
def _looped_kernel(x_ptr, o_ptr, n, BLOCK_T:tl.constexpr):
    t = tl.arange(0, BLOCK_T)
    for i in range(n):
        y = tl.load(x_ptr + t)
        for j in tl.static_range(200): y = tl.exp2(y) # too long to be unrolled
        tl.store(o_ptr + t, y)
x,config = torch.zeros(1, 1, 512, 1),dict(BLOCK_T=32, num_warps=1, num_stages=1)
def plain(mask=None, x=x): launch(_plain_kernel, 1, config, x=x, o=x, mask=mask, H=3)
def looped(): launch(_looped_kernel, 1, config, x=x, o=x, n=3)
'''

def test_cycles_are_those_of_the_longest_loop(tmp_path):
    pytest.importorskip('triton')
    (tmp_path/'loops.py').write_text(KERNELS + '''
for f,exps in ((plain, 1), (looped, 200)):
    for warps,T in ((1, 32), (4, 256)):
        c, = inspect_kernels(f, BLOCK_T=T, num_warps=warps)
        assert c['exps']==round(exps*8/4/32, 1) and c['slots']>0 and c['near']>0 and c['tensor']==0, c
        assert (c['kernel'], c['block_t'], c['warps'], c['spilled_bytes'])==(f.__name__, T, warps, 0), c
''')
    res = python(str(tmp_path/'loops.py'), TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path))
    assert res.returncode==0, res.stderr

def test_inspection_takes_launches_as_they_are(tmp_path):
    "In their order, each kind once; an absent tensor and a constant of one kind make another kernel. Outside of it CPU tensors are refused as before."
    pytest.importorskip('triton')
    (tmp_path/'launches.py').write_text(KERNELS + '''
def f():
    for g in (plain, looped, plain): g()
    plain(torch.ones(512, dtype=torch.int8))
rows = inspect_kernels(f, BLOCK_T=128)
assert [(r['kernel'], round(r['exps'], 0)) for r in rows]==[('plain', 0), ('looped', 12), ('plain', 6)], rows
assert all(r['block_t']==128 for r in rows)
assert inspect_kernels(plain, capability=80)!=inspect_kernels(plain) and inspect_kernels(lambda: None)==[]
def fails(): plain(); raise KeyError('x')
for g in (fails, plain): # the record ends with its function, also where that fails
    try: inspect_kernels(g) if g is fails else g()
    except KeyError as e: assert g is fails and e.args==('x',)
    except Exception as e: assert g is plain and not isinstance(e, KeyError), e # no GPU
    else: raise AssertionError(g)
''')
    res = python(str(tmp_path/'launches.py'), TRITON_INTERPRET='0', TRITON_CACHE_DIR=str(tmp_path), CUDA_VISIBLE_DEVICES='')
    assert res.returncode==0, res.stderr

class Kernel:
    "Stands for a kernel: keeps what it was started with."
    __name__,arg_names = 'kernel',['x_ptr','mask_ptr','stride_xb','stride_xt','stride_maskb','T','F']
    def __getitem__(self, grid): return lambda *args, **options: setattr(self, 'run', (grid, dict(zip(self.arg_names, args)), options))

CONFIG = dict(F=64, BLOCK_T=32, num_warps=4, num_stages=2)

def test_a_launch_by_keywords():
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.launch import launch
    k,x,mask = Kernel(),torch.zeros(2, 3, 5, 8).transpose(1, 2),torch.ones(2, 5)
    launch(k, 7, CONFIG, x=x, mask=mask, T=5)
    grid,args,options = k.run
    assert grid==(7,) and args['x_ptr'] is x and args['mask_ptr'] is mask and options==dict(num_warps=4, num_stages=2)
    assert [args[n] for n in k.arg_names[2:]]==[x.stride(0), x.stride(2), mask.stride(0), 5, 64]
    launch(k, 7, CONFIG, x=x, mask=None, T=5, F=32) # what is given comes before the configuration
    assert k.run[1]['mask_ptr'] is None and k.run[1]['stride_maskb']==0 and k.run[1]['F']==32
    assert 'F' in CONFIG and set(CONFIG)=={'F','BLOCK_T','num_warps','num_stages'} and CONFIG['F']==64 # shared by calls

@pytest.mark.parametrize('message,given', [('kernel needs mask', dict(T=5)), ('kernel needs T', dict(mask=None)),
    ('kernel takes no bias', dict(T=5, mask=None, bias=None)),
    ('kernel takes no BLOCK_T, stride_xb', dict(T=5, mask=None, stride_xb=1, BLOCK_T=3)), ('kernel takes no x_ptr', dict(T=5, mask=None, x_ptr=None))])
def test_a_launch_with_wrong_keywords(message, given):
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.launch import launch
    with pytest.raises(TypeError, match=f'^{message}$'): launch(Kernel(), 7, CONFIG, x=torch.zeros(2, 3, 5, 8), **given)

@pytest.mark.parametrize('message,config,given', [
    ("takes x as a tensor .*; given torch.Size\\(\\[2, 3\\]\\)", {}, dict(mask=torch.ones(2, 5), x=torch.zeros(2, 3), T=5)),
    ('takes x as a tensor .*; given 3', {}, dict(mask=torch.ones(2, 5), x=3, T=5)),
    ('first keyword of a launch is a tensor.*given None', {}, dict(mask=None, x=None, T=5)),
    ('first keyword of a launch is a tensor.*given 5', {}, dict(T=5, x=torch.zeros(2, 3, 5, 8), mask=None)),
    ('config has num_warps and num_stages; given F, BLOCK_T', dict(F=64, BLOCK_T=32), dict(x=torch.zeros(2, 3, 5, 8), mask=None, T=5))])
def test_a_launch_with_what_is_no_tensor_or_without_its_warps(message, config, given):
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.launch import launch
    with pytest.raises(TypeError, match=message): launch(Kernel(), 7, config or CONFIG, **given)

def test_an_inspection_says_which_names_no_kernel_takes():
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.inspect import inspect_kernels
    from hedgehog_nb.kernels.launch import launch, RECORDER
    f = lambda: launch(Kernel(), 7, CONFIG, x=torch.zeros(2, 3, 5, 8), mask=None, T=5)
    with pytest.raises(ValueError, match='no kernel takes BLOK_T; they take F, T'): inspect_kernels(f, BLOK_T=3)
    with pytest.raises(ValueError, match='by the function that it inspects'): inspect_kernels(lambda: inspect_kernels(f))
    assert RECORDER.get() is None

HOPPER = """
import torch, triton
from hedgehog_nb.kernels.feature_map import fused_feature_map
from hedgehog_nb.kernels.inspect import inspect_kernels

def use(D, dtype=torch.bfloat16, form='softmax_halves', bias=False):
    "Rows of the forward and of the backward."
    x,w,b = (torch.empty(*s, dtype=dtype, requires_grad=True) for s in ((1, 16, 1000, D), (16, D, D), (16, D)))
    f = lambda: sum(o.sum() for o in fused_feature_map(x, w, b if bias else None, form) if o is not None).backward()
    return inspect_kernels(f)
most = 16 if triton.__version__.startswith('3.6.') else 0
"""
HOPPER_PARTS = dict(quick="""for u in use(64, bias=True):
    assert u['spilled_bytes']<=most and u['shared_bytes']<=227*1024 and max(u['slots'], u['near'])<=28, u # memory takes 25
""", slow="""for form in ('exp','softmax_joint'):
    for u in use(64, form=form, bias=True):
        assert u['spilled_bytes']<=most and u['shared_bytes']<=227*1024 and max(u['slots'], u['near'])<=28, u # memory takes 25
for u,most in zip(use(128), (30, 65)): assert u['near']<=most
assert all(u['shared_bytes']<=227*1024 for u in use(128, torch.float32))
""")

@pytest.mark.compiles
@quick_and_slow
def test_compiles_for_hopper_without_spills(which, tmp_path): compiles(HOPPER + HOPPER_PARTS[which], tmp_path)


# ---- Triton's interpreter runs on NumPy, and not each on each

@pytest.mark.parametrize('triton_version,numpy_version,ok', [('3.6.0', '2.3.5', True), ('3.6.0', '2.4.0', False), ('3.4.0', '2.5.5', False),
                                                             ('3.7.0', '2.5.5', True), ('3.10.0', '2.10.0', True), ('3.6.0+git1', '2.2.0rc1', True)])
def test_interpreter_needs_a_numpy_that_it_knows(triton_version, numpy_version, ok):
    pytest.importorskip('triton')
    from hedgehog_nb.kernels.tiles import _check_interpreter
    if ok: return _check_interpreter(triton_version, numpy_version)
    with pytest.raises(ImportError, match=rf"Triton {triton_version} fails on NumPy {numpy_version}: pip install 'numpy<2.4'"):
        _check_interpreter(triton_version, numpy_version)

@pytest.mark.parametrize('interpret', '01')
def test_import_asks_for_the_numpy_only_if_interpreted(interpret):
    pytest.importorskip('triton')
    res = python('-c', "import triton, importlib.metadata as m; triton.__version__, m.version = '3.6.0', lambda name: '2.5.0'; "
        "import hedgehog_nb.kernels.tiles", TRITON_INTERPRET=interpret)
    assert (res.returncode, 'numpy<2.4' in res.stderr) == ((1, True) if interpret=='1' else (0, False)), res.stderr

if HERE and DEVICE=='cpu':
    @triton.jit
    def _times(x_ptr, by, n): tl.store(x_ptr, tl.load(x_ptr)*by - n)

    def test_the_interpreter_notices_integer_overflow():
        for x,by,n in ((2**16, 2**14, 0), (-2**16, 2**15, 0), (2**16, 2**15-1, -9)): # 2**30, -2**31, 2**31 - 2**16 + 9
            _times[(1,)](a := torch.tensor([x], dtype=torch.int32), by, n)
            assert a.item()==x*by-n
        for x,by,n in ((2**16, 2**15, 0), (-2**16, 2**15, 1)):
            with pytest.raises(Exception, match='overflows int32'): _times[(1,)](torch.tensor([x], dtype=torch.int32), by, n)
        _times[(1,)](a := torch.tensor([2**16], dtype=torch.int64), 2**15, 0)
        assert a.item()==2**31

    @triton.jit
    def _twice(x): return x+x

    @triton.jit
    def _between(x_ptr, o_ptr, N:tl.constexpr):
        x = tl.load(x_ptr + tl.arange(0, N))
        tl.store(o_ptr + tl.arange(0, N), _twice(x)*((x>0)*(x<5)))

    def test_the_quick_interpreter_does_what_the_other_does():
        "Products of masks; a kernel in a hook of another; a helper called outside of one; a kernel after one that failed."
        x = torch.arange(8, dtype=torch.int32) - 1
        def between(): _between[(1,)](x, o := torch.zeros(8, dtype=torch.int32), 8); return o.tolist()
        want = [0,0,2,4,6,8,0,0]
        assert between()==want
        _times.pre_run_hooks = [lambda *a, **k: between()]
        try: _times[(1,)](a := torch.tensor([3], dtype=torch.int32), 2, 1)
        finally: _times.pre_run_hooks = []
        assert a.item()==5 and between()==want
        with pytest.raises(Exception): _between[(1,)](x, None, 8)
        assert between()==want
