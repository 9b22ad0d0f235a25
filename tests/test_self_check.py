"""Kernels that are compared with PyTorch before they serve a GPU: who is asked, what is remembered, and kernels made wrong on purpose.

The CPU stands for a GPU: `_runs_kernels` is the one place that says where kernels serve. What needs no kernel runs with a stand-in
for the comparison (`_run`); the comparison itself runs in Triton's interpreter."""
import json, sys, threading, warnings
import pytest, torch
pytest.importorskip('triton')
from triton.runtime.errors import OutOfResources
from hedgehog_nb import linear_attention as attention
from hedgehog_nb.attentions.base import make_attention, make_feature_map
from hedgehog_nb import functional as linear
from hedgehog_nb.kernels import decode, fused, self_check as sc, window as windows
from hedgehog_nb.kernels.self_check import Case, trusts, verdict_file
from helpers.interpreter import HERE, kernel, python, under_the_interpreter

if not HERE:
    test_under_the_interpreter = under_the_interpreter(__file__)

CPU,KIND = torch.device('cpu'),dict(dtype=torch.float32, head_dim=8, value_dim=8, feature_dim=16)

@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    "The CPU taken for a GPU, small checks, and an empty cache folder."
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path)); monkeypatch.delenv('HEDGEHOG_TRITON', raising=False)
    monkeypatch.setattr(linear, '_runs_kernels', lambda x: True)
    monkeypatch.setitem(linear.LINEAR, 'c', linear.LINEAR['c']._replace(auto=lambda c: False))
    monkeypatch.setattr(sc, 'TOKENS', 17)
    next_process()
    yield
    next_process()

def next_process(): sc.VERDICTS.clear(); sc.WARNED.clear()

class Runs(list):
    "Stands for the comparison: remembers the cases, and finds what it is told."
    def __init__(self, found=('', .001)): self.found = found
    def __call__(self, c, device):
        self.append(c)
        if isinstance(self.found, Exception): raise self.found
        return self.found

def runs(monkeypatch, *found):
    r = Runs(*found)
    monkeypatch.setattr(sc, '_run', r)
    return r

WRONG = 'gradient of v is off by 0.3 of its size, allowed 0.001', .3

def test_checked_once_for_each_kind(monkeypatch):
    r = runs(monkeypatch)
    assert all(trusts(CPU, 'fused', **KIND) for _ in range(3)) and r==[Case('fused', **KIND)]
    for other in (dict(head_dim=16), dict(dtype=torch.float16), dict(group=2), dict(form='exp'), dict(mask=True), dict(stride_q=32)):
        trusts(CPU, 'fused', **(KIND | other))
    trusts(CPU, 'chunked', **KIND); assert len(r)==8

def test_the_next_process_does_not_check_again(monkeypatch):
    r = runs(monkeypatch)
    trusts(CPU, 'fused', **KIND); next_process()
    assert trusts(CPU, 'fused', **KIND) and len(r)==1
    assert [v['ok'] for v in json.loads(verdict_file().read_text()).values()]==[True]

@pytest.mark.parametrize('what', ['card', 'driver', 'torch', 'triton', 'ptxas', 'ptxas_path', 'hedgehog_nb', 'source'])
def test_another_card_or_version_is_checked_anew(monkeypatch, what):
    r,now = runs(monkeypatch),sc.surroundings(CPU)
    trusts(CPU, 'fused', **KIND); next_process()
    monkeypatch.setattr(sc, 'surroundings', lambda device: now | {what:'another'})
    assert trusts(CPU, 'fused', **KIND) and len(r)==2

@pytest.mark.parametrize('text', ['', '{', '[1]', 'null', b'\xff\xfe\x00', '{"KEY": 3}', '{"KEY": {"ok": true}}',
    '{"KEY": {"ok": "yes", "why": "", "error": 0, "seconds": 1, "keep": true}}'])
def test_a_file_that_makes_no_sense_is_survived(monkeypatch, text):
    r,key = runs(monkeypatch),json.dumps(sc._key(Case('fused', **KIND), CPU))
    verdict_file().parent.mkdir(parents=True)
    verdict_file().write_bytes(text if isinstance(text, bytes) else text.replace('"KEY"', key).encode())
    assert trusts(CPU, 'fused', **KIND) and len(r)==1 and json.loads(verdict_file().read_text())[json.loads(key)]['ok'] is True

def test_a_folder_that_cannot_be_written_changes_nothing(monkeypatch, tmp_path):
    r = runs(monkeypatch)
    (tmp_path/'file').write_text(''); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    assert trusts(CPU, 'fused', **KIND) and trusts(CPU, 'fused', **KIND) and len(r)==1

@pytest.mark.parametrize('value,runs_it,answer', [('0', 0, False), ('1', 0, True), ('check', 1, True), ('', 1, True)])
def test_the_environment_decides(monkeypatch, value, runs_it, answer):
    r = runs(monkeypatch)
    monkeypatch.setenv('HEDGEHOG_TRITON', value)
    assert trusts(CPU, 'fused', **KIND) is answer and len(r)==runs_it

def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv('HEDGEHOG_TRITON', 'yes')
    q = torch.rand(1, 1, 4, 8)
    with pytest.raises(ValueError, match="HEDGEHOG_TRITON is 0 .* 1 .* or check .*; given 'yes'"): attention(q, q, q)

def test_one_warning_for_each_family_and_process(monkeypatch):
    r = runs(monkeypatch, WRONG)
    def said(*families):
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            assert not any(trusts(CPU, f, **(KIND | dict(head_dim=d))) for f in families for d in (8, 16) for _ in range(2))
        return [str(x.message) for x in w]
    first = said('fused', 'window')
    assert len(first)==2 and len(r)==4
    for part in ('fused kernel', "Triton's interpreter", f'torch {torch.__version__}', 'triton', 'ptxas', 'driver',
            WRONG[0], 'float32, head_dim=8', 'PyTorch takes its place', 'hedgehog_nb/issues', 'hedgehog bench --self-check'):
        assert part in first[0]
    assert 'window kernel' in first[1] and '/bin/' not in first[0]
    next_process()
    again = said('fused')
    assert len(again)==1 and len(r)==4 and WRONG[0] in again[0] # from the file

@pytest.mark.parametrize('error,kept', [(OutOfResources(300_000, 232_448, 'shared memory'), True),
                                        (RuntimeError('CUDA error: an illegal memory access was encountered'), True),
                                        (OSError(28, 'No space left on device'), False), (RuntimeError('Failed to find C compiler'), False)])
def test_errors_are_bad_verdicts(monkeypatch, error, kept):
    r = runs(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=type(error).__name__): assert not trusts(CPU, 'fused', **KIND)
    assert not trusts(CPU, 'fused', **KIND) and len(r)==1
    assert len(json.loads(verdict_file().read_text()) if verdict_file().exists() else {})==kept

def test_too_little_memory_is_no_verdict(monkeypatch):
    r = runs(monkeypatch, torch.OutOfMemoryError('no'))
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert not trusts(CPU, 'fused', **KIND) and not trusts(CPU, 'fused', **KIND)
    assert len(r)==2 and not verdict_file().exists()
    r.found = '', .001; assert trusts(CPU, 'fused', **KIND)

def test_two_threads_check_once(monkeypatch):
    r,start,answers = runs(monkeypatch),threading.Barrier(4),[]
    inner = r.__call__
    def slow(c, device): threading.Event().wait(.2); return inner(c, device)
    monkeypatch.setattr(sc, '_run', slow)
    def ask(): start.wait(); answers.append(trusts(CPU, 'fused', **KIND))
    ts = [threading.Thread(target=ask) for _ in range(4)]
    for t in ts: t.start()
    for t in ts: t.join(30)
    assert answers==[True]*4 and len(r)==1

def test_no_check_while_a_graph_is_captured(monkeypatch):
    r = runs(monkeypatch)
    gpu = torch.device('cuda', 0)
    monkeypatch.setattr(sc, 'surroundings', lambda device: dict(card=str(device)))
    monkeypatch.setattr(sc, 'check_case', lambda c, device: sc._judge(c, device))
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with pytest.warns(RuntimeWarning, match='Make the same call once before the recording'): assert not trusts(gpu, 'fused', **KIND)
    with warnings.catch_warnings(): warnings.simplefilter('error'); assert not trusts(gpu, 'fused', **KIND) # said once
    assert not r and not sc.VERDICTS
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False); assert trusts(gpu, 'fused', **KIND) and len(r)==1
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True); assert trusts(gpu, 'fused', **KIND) # known in this process
    next_process(); assert trusts(gpu, 'fused', **KIND) and len(r)==1                                          # and on file

def test_no_check_inside_a_backward_pass(monkeypatch):
    r,answers = runs(monkeypatch),[]
    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): answers.append(trusts(CPU, 'fused', **KIND)); return g
    def back(): Asks.apply(torch.ones(1, requires_grad=True)).sum().backward()
    back(); assert answers==[False] and not r
    assert trusts(CPU, 'fused', **KIND); back(); assert answers==[False, True] and len(r)==1

def test_nothing_of_the_caller_reaches_the_check(monkeypatch):
    seen = {}
    def look(c, device):
        x = torch.ones(2, requires_grad=True)
        seen.update(grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
                    auto=torch.is_autocast_enabled('cpu'), strict=torch.are_deterministic_algorithms_enabled(),
                    where=torch.empty(1).device.type, tune=sc.os.environ['HEDGEHOG_TUNE'], back=torch.autograd.grad((x*x).sum(), x)[0].tolist())
        return '', 0.
    monkeypatch.setattr(sc, '_run', look); monkeypatch.setenv('HEDGEHOG_TUNE', '1')
    hooked,state = [],torch.get_rng_state()
    torch.use_deterministic_algorithms(True, warn_only=True); torch.set_default_device('meta')
    try:
        with (torch.inference_mode(), torch.autocast('cpu', torch.bfloat16),
              torch.autograd.graph.saved_tensors_hooks(lambda x: hooked.append(x) or x, lambda x: x)):
            assert trusts(CPU, 'fused', **KIND)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled() and sc.os.environ['HEDGEHOG_TUNE']=='1'
    finally: torch.use_deterministic_algorithms(False); torch.set_default_device(None)
    assert (seen==dict(grad=True, inference=False, auto=False, strict=False, where='cpu', tune='0', back=[2., 2.])
            and not hooked and torch.equal(torch.get_rng_state(), state))

@pytest.mark.parametrize('dynamic', [None, True])
@pytest.mark.parametrize('found', [('', .001), WRONG], ids=['right', 'wrong'])
def test_asked_when_a_graph_is_traced_by_the_compiler(monkeypatch, found, dynamic):
    "One graph, and the answer is a constant of it; on the CPU with a stand-in for the kernel."
    torch._dynamo.reset()
    r = runs(monkeypatch, found)
    monkeypatch.setitem(linear.LINEAR, 'triton', linear.LINEAR['triton']._replace(run=lambda c: c.v+100))
    monkeypatch.setattr(linear, 'linear_attention_in_torch', lambda q, k, v, *a, **kw: v-100)
    monkeypatch.setitem(linear.LINEAR, 'c', linear.LINEAR['c']._replace(auto=lambda c: False))
    q,k,v = (torch.rand(1, h, 12, 8) for h in (4, 2, 2))
    f = torch.compile(lambda q, k, v: attention(q, k, v), backend='aot_eager', fullgraph=True, dynamic=dynamic)
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter('always')
        os = [f(q, k, v), f(q, k, v), f(*(x[:,:,:9] for x in (q, k, v)))]
    assert all((o>0).all()==(found[0]=='') for o in os) and len(set(r))==1 and sum('self-check' in str(w.message) for w in said)==(found[0]!='')

def kinds(monkeypatch):
    "Cases that `linear_attention` asks for; the kernels' place is taken."
    seen = []
    monkeypatch.setattr(sc, 'trusts', lambda device, family, **kind: seen.append(Case(family, **kind)) or True)
    monkeypatch.setitem(linear.LINEAR, 'triton', linear.LINEAR['triton']._replace(run=lambda c: 'kernel'))
    return seen

def qkv(T=12, H=4, Hkv=2, D=8, B=1, dtype=torch.float32):
    "As a model has them: (B, T, H, D) in memory."
    return [torch.rand(B, T, h, D, dtype=dtype).transpose(1, 2) for h in (H, Hkv, Hkv)]

def test_the_case_is_that_of_the_call(monkeypatch):
    seen,(q,k,v),hedgehog = kinds(monkeypatch),qkv(),make_feature_map('hedgehog', 8, 4, 2, form='exp', bias=True)
    base = dict(dtype=torch.float32, head_dim=8, value_dim=8, feature_dim=16, group=2, stride_q=32, stride_k=16, stride_v=16)
    inside = base | dict(form='exp', bias=True, weights=torch.float32)
    assert attention(q, k, v, hedgehog)=='kernel' and seen.pop()==Case('fused', **inside) and not seen
    attention(q, k, v, hedgehog, causal=False, mask=torch.ones(1, 12), output_final_state=True)
    assert seen.pop()==Case('fused', **inside, causal=False, mask=True, final=True)
    attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), hedgehog, cu_seqlens=[0, 12])
    assert seen.pop()==Case('fused', **(inside | dict(dtype=torch.bfloat16, weights=torch.bfloat16)), packed=True)
    attention(q, k, v); assert seen.pop()==Case('chunked', **(base | dict(feature_dim=8))) and not seen
    attention(q, k, v, make_feature_map('elu', 8, 4, 2)); given = base | dict(feature_dim=8, stride_q=0, stride_k=0)
    assert seen==[Case('chunked', **given), Case('chunked', **given, logs=True)]; seen.clear()
    state = linear.LinearState(torch.rand(1, 2, 16, 8), torch.rand(1, 2, 16), torch.zeros(1, 2))
    one = [x[:,:,:1] for x in (q, k, v)]
    with torch.no_grad(): attention(*one, hedgehog.bfloat16(), initial_state=state, output_final_state=True)
    assert seen.pop()==Case('decode', **{n:x for n,x in inside.items() if 'stride' not in n} | dict(weights=torch.bfloat16), state=True, final=True)

def test_what_the_kernels_do_not_take_is_not_asked(monkeypatch):
    seen,(q,k,v) = kinds(monkeypatch),qkv()
    for args,kw in (((q.double(), k.double(), v.double()), {}), ((q, k, v), dict(chunk_size=4)),
            ((q, k, v, make_feature_map('rfa', 8, 4, 2)), {}), ((q, k, v, lambda q, k: (q, k, None)), {})):
        assert attention(*args, **kw)!='kernel' and not seen
    assert attention(q, k, v, implementation='triton')=='kernel' and not seen                    # the user's own choice
    monkeypatch.setattr(linear, '_runs_kernels', lambda x: False); assert attention(q, k, v)!='kernel' and not seen

def test_the_window_asks_too(monkeypatch):
    seen,(q,k,v) = kinds(monkeypatch),qkv()
    monkeypatch.setattr(windows, 'triton_window_attention', lambda *a, **kw: 'kernel')
    a = make_attention('hedgehog-window', 8, 4, 2, window=5, form='exp')
    assert a.attend(q, k, v)=='kernel'
    assert seen.pop()==Case('window', torch.float32, 8, 8, 16, logs=True, log_q=True, group=2, window=5, stride_q=32, stride_k=16, stride_v=16)
    monkeypatch.setattr(sc, 'trusts', lambda *a, **kw: False); assert a.attend(q, k, v)!='kernel'
    monkeypatch.setattr(sc, 'trusts', lambda *a, **kw: True)
    _,state = make_attention('hedgehog-window', 8, 4, 2, window=5, form='exp').attend(q, k, v, output_final_state=True, implementation='chunked')
    assert a.attend(q, k, v, initial_state=state.apply(lambda x: x.detach()))=='kernel'
    assert a.attend(q, k, v, initial_state=state.apply(lambda x: x.detach().requires_grad_()))!='kernel'  # the kernel gives a state no gradient
    assert a.attend(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)!='kernel'                     # channels that do not lie side by side
    with pytest.raises(ValueError, match="naive, chunked, c, triton, or None; given 'cuda'"): a.attend(q, k, v, implementation='cuda')

def test_a_triton_that_does_not_import_leaves_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, 'hedgehog_nb.kernels.self_check', None) # import raises ImportError
    q,k,v = qkv()
    assert torch.equal(attention(q, k, v), attention(q, k, v, implementation='chunked'))
    make_attention('hedgehog-window', 8, 4, 2, window=5).attend(q, k, v)

def test_cpu_calls_import_no_triton():
    code = ("import sys, torch, hedgehog_nb as h; q = torch.rand(1, 1, 9, 8); h.linear_attention(q, q, q); "
        "h.make_attention('hedgehog-window', 8).requires_grad_(False).attend(q, q, q); print('triton' in sys.modules)") # with gradients PyTorch imports it
    assert python('-c', code).stdout.strip()=='False'

def test_strides_of_the_call(monkeypatch):
    x = torch.rand(2, 3, 7, 4)
    for stride,strides in ((0, x.stride()), (4, x.stride()), (12, (84, 4, 12, 1)), (20, (140, 4, 20, 1)), (9, (189, 63, 9, 1))):
        y = sc._strided(x, stride)
        assert y.stride()==strides and torch.equal(x, y)

def test_where_the_list_runs(monkeypatch):
    monkeypatch.setattr(sc.triton.knobs.runtime, 'interpret', False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='sees none here; TRITON_INTERPRET=1'): sc.self_check()
    monkeypatch.setattr(sc.triton.knobs.runtime, 'interpret', True)
    r = runs(monkeypatch)
    rows = sc.self_check(device='cpu')
    assert (len(rows)==len(r)==len(set(r))==28 and {x['kernel'] for x in rows}==set(sc.FAMILIES)
            and all(x['verdict']=='good' for x in rows) and len(json.loads(verdict_file().read_text()))==28)
    r.found = WRONG; assert {x['verdict'] for x in sc.self_check(device='cpu')}=={WRONG[0]} # whatever was found before

def test_the_error_looks_at_blocks_of_rows():
    r = torch.randn(2, 1, 40, 8).double()*torch.cat([torch.full((16,), 10.), torch.ones(24)])[:,None]
    a = r.clone(); a[1,0,20:24] *= 1.5
    assert sc._error(a, r)==pytest.approx((a-r)[1,0,16:32].norm().item()/r[1,0,16:32].norm().item()) and (a-r).norm()/r.norm()<.05
    assert sc._error(r, r)==0 and sc._error(torch.zeros(3, 4), torch.zeros(3, 4))==0 and sc._error(torch.ones(3), torch.full((3,), 2.))==.5

# --- the comparison itself, and kernels made wrong on purpose

CASES = [Case('feature_map', form='exp', bias=True, weights=torch.float32, **KIND),
         Case('feature_map', form='softmax_halves', weights=torch.float32, stride_q=32, **KIND),
         Case('chunked', logs=True, mask=True, final=True, single=True, **KIND), Case('chunked', causal=False, group=2, single=True, **KIND),
         Case('chunked', packed=True, state=True, final=True, mask=True, **KIND),
         Case('fused', form='exp', weights=torch.float32, mask=True, state=True, final=True, bias=True, single=True, **KIND),
         Case('fused', form='softmax_joint', weights=torch.float32, packed=True, final=True, stride_q=64, stride_k=32, stride_v=20,
              group=2, single=True, **KIND),
         Case('decode', form='exp', weights=torch.float32, state=True, final=True, mask=True, **KIND),
         Case('decode', logs=True, state=True, final=True, single=True, **KIND),
         Case('window', window=4, logs=True, log_q=True, mask=True, single=True, **KIND),
         Case('window', window=3, state=True, final=True, single=True, **KIND),
         Case('weight_loss', weights=torch.float32, logs=True, mask=True, group=2, single=True, **KIND),
         Case('weight_loss', weights=torch.float32, window=4, log_q=True, stride_q=32, **KIND)]

@kernel
@pytest.mark.parametrize('c', CASES, ids=lambda c: f'{c.family} {sc._describe(c)}')
def test_right_kernels_pass(c):
    v = sc.check_case(c, CPU)
    assert v.ok and v.error<1e-4, v

@kernel
def test_the_caller_s_default_dtype_changes_nothing(monkeypatch):
    monkeypatch.setattr(sc, 'TOKENS', 20)
    try:
        torch.set_default_dtype(torch.bfloat16)
        v = sc.check_case(Case('fused', form='softmax_halves', feature_dim=64, **{n:x for n,x in KIND.items() if n!='feature_dim'}), CPU)
    finally: kept = torch.get_default_dtype(); torch.set_default_dtype(torch.float32)
    assert v.ok and kept==torch.bfloat16, v

class Tenth(torch.autograd.Function):
    "The same values; gradients of some rows a tenth too large."
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): g = g.clone(); g[:,:,::4] *= 1.1; return g

def off(f, q, k, v, *a, **kw): o = f(q, k, v, *a, **kw); return (o[0]+.1, o[1]) if isinstance(o, tuple) else o+.1
def nan(f, q, k, v, *a, **kw): o = f(q, k, v, *a, **kw); return (o[0]*torch.nan, o[1]) if isinstance(o, tuple) else o*torch.nan
def raises(f, *a, **kw): raise OutOfResources(300_000, 232_448, 'shared memory')
def gradient(f, q, k, v, *a, **kw): return f(q, Tenth.apply(k), v, *a, **kw)
def bits(f, q, k, v, *a, **kw):
    o = f(q, k, v, *a, **kw); bits.n = -getattr(bits, 'n', 1)
    return (o[0]*(1 + bits.n*1e-6), o[1]) if isinstance(o, tuple) else o*(1 + bits.n*1e-6)
FAULTS = {off:'output is off by', nan:'output is not finite', raises:'OutOfResources',
    gradient:'gradient of k is off by', bits:'output differs from run to run'}

def spoil(monkeypatch, module, name, fault):
    "Put `fault` around a kernel; the number of its calls."
    f,n = getattr(module, name),[]
    monkeypatch.setattr(module, name, lambda *a, **kw: n.append(1) or fault(f, *a, **kw))
    return n

@kernel
@pytest.mark.parametrize('fault', FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_found_and_pytorch_takes_its_place(monkeypatch, fault):
    calls = spoil(monkeypatch, fused, 'fused_hedgehog_attention', fault)
    (q,k,v),fm = qkv(H=1, Hkv=1),make_feature_map('hedgehog', 8)
    def both(**kw): # output, and a gradient
        o = attention(q, k, v, fm, **kw)
        return o, torch.autograd.grad(o.square().sum(), fm.w_k)[0]
    with pytest.warns(RuntimeWarning, match=f'fused kernel failed its self-check .*{FAULTS[fault]}') as said: got = both()
    used = len(calls)
    for a,b in zip(got, both(implementation='chunked')): assert torch.equal(a, b)
    with warnings.catch_warnings(): warnings.simplefilter('error', RuntimeWarning); both() # silent, and not checked again
    assert len(said)==1 and len(calls)==used>0
    next_process()
    with pytest.warns(RuntimeWarning, match=FAULTS[fault]): both()
    assert len(calls)==used

@kernel
def test_a_right_kernel_serves_the_next_calls(monkeypatch):
    calls = spoil(monkeypatch, fused, 'fused_hedgehog_attention', lambda f, *a, **kw: f(*a, **kw))
    (q,k,v),fm = qkv(H=1, Hkv=1),make_feature_map('hedgehog', 8).requires_grad_(False)
    with warnings.catch_warnings(): warnings.simplefilter('error', RuntimeWarning); os = [attention(q, k, v, fm) for _ in range(2)]
    assert len(calls)==4+2 and torch.equal(*os) and torch.allclose(os[0], attention(q, k, v, fm, implementation='chunked'), atol=1e-5)

@kernel
def test_a_wrong_decode_step_and_a_wrong_window(monkeypatch):
    spoil(monkeypatch, decode, 'decode_step', off); spoil(monkeypatch, windows, 'triton_window_attention', off)
    (q,k,v),fm = qkv(T=1),make_feature_map('hedgehog', 8, 4, 2)
    state = linear.LinearState(torch.rand(1, 2, 16, 8), torch.rand(1, 2, 16), torch.zeros(1, 2))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match='decode kernel'): o = attention(q, k, v, fm, initial_state=state)
    with torch.no_grad(): assert torch.equal(o, attention(q, k, v, fm, initial_state=state, implementation='chunked'))
    q,k,v = qkv(H=1, Hkv=1)
    a = make_attention('hedgehog-window', 8, window=5)
    with pytest.warns(RuntimeWarning, match='window kernel'): o = a.attend(q, k, v)
    assert (o-a.attend(q, k, v, implementation='chunked')).abs().max()<1e-5 # in C, where there is a compiler

@kernel
@pytest.mark.parametrize('fault', [off, nan, raises])
def test_a_wrong_distillation_loss(monkeypatch, fault):
    from hedgehog_nb.kernels import weight_loss as kernels
    from hedgehog_nb.training import losses
    calls = spoil(monkeypatch, kernels, 'triton_weight_loss', fault)
    monkeypatch.setattr(losses, '_on_gpu', lambda x: True)
    (q,k,_),fm = qkv(H=1, Hkv=1),make_feature_map('hedgehog', 8)
    with pytest.warns(RuntimeWarning, match='weight_loss kernel failed its self-check'): loss = losses.weight_loss(q, k, fm)
    used = len(calls)
    assert (loss-losses.weight_loss(q, k, fm, implementation='torch')).abs()<1e-6 and len(calls)==used
    assert losses.weight_loss(q, k, fm).isfinite() and len(calls)==used

@kernel
def test_the_distillation_loss_asks_for_its_case(monkeypatch):
    from hedgehog_nb.kernels import weight_loss as kernels
    from hedgehog_nb.training import losses
    seen = []
    monkeypatch.setattr(sc, 'trusts', lambda device, family, **kind: seen.append(Case(family, **kind)) or True)
    monkeypatch.setattr(kernels, 'triton_weight_loss', lambda q, *a: torch.ones(q.shape[:3]))
    q,k,_ = qkv()
    losses.weight_loss(q, k, make_feature_map('hedgehog', 8, 4, 2)); assert not seen # on a CPU
    monkeypatch.setattr(losses, '_on_gpu', lambda x: True)
    kind = KIND | dict(weights=torch.float32, group=2, stride_q=32, stride_k=16)
    assert losses.weight_loss(q, k, make_feature_map('hedgehog', 8, 4, 2, form='exp'), mask=torch.ones(1, 12))==1
    assert seen.pop()==Case('weight_loss', logs=True, mask=True, **kind)
    losses.weight_loss(q.bfloat16(), k.bfloat16(), make_attention('hedgehog-window', 8, 4, 2, window=5))
    assert seen.pop()==Case('weight_loss', window=5, log_q=True, **kind | dict(dtype=torch.bfloat16))
    losses.weight_loss(q, k, make_feature_map('hedgehog', 8, 4, 2), False); assert seen.pop()==Case('weight_loss', causal=False, **kind)
    with torch.autocast('cpu', torch.bfloat16): losses.weight_loss(q, k, make_feature_map('hedgehog', 8, 4, 2))
    assert seen.pop()==Case('weight_loss', **kind | dict(dtype=torch.bfloat16))
    for other in (dict(implementation='c'), dict(implementation='torch')): losses.weight_loss(q, k, make_feature_map('hedgehog', 8, 4, 2), **other)
    losses.weight_loss(q.double(), k.double(), make_feature_map('hedgehog', 8, 4, 2).double()); assert not seen

@kernel
def test_no_kernel_of_one_family_speaks_for_another(monkeypatch):
    spoil(monkeypatch, decode, 'decode_step', nan)
    q,k,v = qkv(D=4, H=1, Hkv=1)
    with warnings.catch_warnings(): warnings.simplefilter('error', RuntimeWarning); attention(q, k, v)
    assert {c.family:v.ok for (_,c),v in sc.VERDICTS.items()}=={'chunked':True}

@kernel
def test_default_dtype_and_global_randomness_are_left_alone():
    c,state = Case('decode', state=True, final=True, **KIND),torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try: assert sc.check_case(c, CPU).ok
    finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)

@pytest.mark.slow
@kernel
def test_over_processes(tmp_path):
    "A second process finds the first one's verdict."
    code = ("import sys, torch; from unittest.mock import patch; from hedgehog_nb import linear_attention as f; "
            "from hedgehog_nb.kernels import self_check as sc; sc.TOKENS = 5; "
            "q = torch.rand(1, 1, 1, 4); m = sys.modules['hedgehog_nb.functional']; "
            "m._runs_kernels = lambda x: True; s = m.LinearState(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4), torch.zeros(1, 1))\n"
            "with patch.object(sc, '_run', wraps=sc._run) as run: f(q, q, q, initial_state=s); print(run.call_count)")
    out = [python('-W', 'error', '-c', code, TRITON_INTERPRET='1', XDG_CACHE_HOME=str(tmp_path/'cache')) for _ in range(2)]
    assert [p.stdout.strip() for p in out]==['1', '0'], out
