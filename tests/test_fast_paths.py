"What must stay cheap: importing, asking for help, a forward pass without gradients, one token."
import pytest, subprocess, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS, hedgehog_features
from hedgehog_nb.ops.linear import chunk_linear_attention, naive_linear_attention, recurrent_linear_attention
from hedgehog_nb.functional import linear_attention

pytestmark = pytest.mark.processes

class Watch(TorchDispatchMode):
    "Counts operations and remembers the largest new tensor."
    def __init__(self): super().__init__(); self.calls,self.largest = 0,0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        res = f(*args, **(kwargs or {})); self.calls += 1
        for x in res if isinstance(res, (tuple,list)) else [res]:
            if isinstance(x, torch.Tensor) and x._base is None: self.largest = max(self.largest, x.numel())
        return res

def seconds(code):
    "Processor time that `code` prints, in a new interpreter."
    return float(subprocess.run([sys.executable, '-c', 'import time\n'+code], check=True, capture_output=True, text=True).stdout)

def test_import_is_quick():
    "Under 0.3 s beyond torch; the bound leaves room for a slow machine."
    t = min(seconds("import torch; t = time.process_time(); import hedgehog_nb; hedgehog_nb.linear_attention; "
        "hedgehog_nb.make_feature_map; print(time.process_time()-t)") for _ in range(2))
    assert t<.6

def test_help_is_quick():
    code = ("import sys; sys.argv = ['hedgehog','--help']; from hedgehog_nb.cli import app; import io, contextlib\n"
        "with contextlib.redirect_stdout(io.StringIO()): app(standalone_mode=False)\nprint(time.process_time())")
    assert min(seconds(code) for _ in range(2))<2

def inputs(B=1, H=4, Hkv=2, T=700, D=16): return torch.randn(B,T,H,D).transpose(1,2), *(torch.randn(B,T,Hkv,D).transpose(1,2) for _ in range(2))

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('masked', [False,True])
def test_features_by_segments_are_the_features(form, masked, monkeypatch):
    "Without gradients the map runs segment by segment; outputs and state are those of the whole, at every segment length."
    import importlib
    la,(q,k,v) = importlib.import_module('hedgehog_nb.ops.linear'),inputs(B=2)
    m,mask = make_feature_map('hedgehog', 16, 4, 2, form=form),torch.rand(2,700)<.8 if masked else None
    m.w_q.data += .3*torch.randn_like(m.w_q)
    want = naive_linear_attention(*m(q, k)[:2], v, m(q, k)[2], mask=mask)
    _,end = recurrent_linear_attention(*m(q, k)[:2], v, m(q, k)[2], mask=mask, output_final_state=True)
    for size in (1, 3*2*4*32*16, 2**17):
        monkeypatch.setattr(la, 'L2_NUMEL', size)
        with torch.no_grad(): o,s = linear_attention(q, k, v, m, mask=mask, output_final_state=True)
        torch.testing.assert_close(o, want, atol=2e-5, rtol=2e-5)
        for a,b in zip(s, end): torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)

def test_nothing_of_the_features_size_without_gradients():
    q,k,v = inputs(T=16384)
    m = make_feature_map('hedgehog', 16, 4, 2)
    with torch.no_grad(), Watch() as w: linear_attention(q, k, v, m)
    assert w.largest==16384*4*16 # the output

def test_no_gradient_keeps_nothing():
    q,k,v = inputs()
    m = make_feature_map('hedgehog', 16, 4, 2)
    with torch.no_grad(): o = linear_attention(q, k, v, m)
    assert o.grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_attention(q, k, v, m.requires_grad_(False))
        assert not kept
        linear_attention(q, k, v, m.requires_grad_(True))
    assert kept and sum(kept)<700*(4+2)*16*60  # linear in T: no T × T, no copy per chunk but its state

def test_one_token_is_few_calls():
    m = make_feature_map('hedgehog', 64, 9, 3).requires_grad_(False)
    x = [torch.randn(1,h,1,64) for h in (9,3,3)]
    _,s = linear_attention(*x, m, output_final_state=True)
    with torch.no_grad(), Watch() as w: linear_attention(*x, m, initial_state=s, output_final_state=True)
    assert w.calls<110

def test_a_given_state_stays_as_it_was():
    q,k,v = inputs(T=40); m = make_feature_map('hedgehog', 16, 4, 2)
    with torch.no_grad():
        _,s = linear_attention(q, k, v, m, output_final_state=True)
        before = s.apply(torch.clone)
        for T in (1, 40): linear_attention(q[:,:,:T], k[:,:,:T], v[:,:,:T], m, initial_state=s, output_final_state=True)
    for a,b in zip(s, before): assert torch.equal(a, b)

def test_rows_that_see_no_key_give_no_gradient():
    q,k,v = (x.requires_grad_() for x in inputs(T=40))
    mask = torch.ones(1,40, dtype=torch.bool); mask[:,:7] = False
    for g in torch.autograd.grad(linear_attention(q, k, v, make_feature_map('hedgehog', 16, 4, 2), mask=mask).square().sum(), (q,k,v)):
        assert g.isfinite().all() and (g[:,:,:7]==0).all() and (g[:,:,7:]!=0).any()

def test_second_derivatives_say_no():
    q,k,v = (x.requires_grad_() for x in inputs(T=40))
    g, = torch.autograd.grad(chunk_linear_attention(q.exp(), k.exp(), v).sin().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('size', [1.,30.,300.])
def test_one_exponential_is_all_forms_at_any_size(form, size):
    "Past what fp32 holds the plain form takes over; nothing overflows, and gradients are those of fp64."
    y = size*torch.randn(2,3,200,32)
    with torch.no_grad(): (f,l),(want,wl) = hedgehog_features(y, form), hedgehog_features(y.double(), form)
    torch.testing.assert_close(f.double(), want, atol=1e-5, rtol=1e-4)
    assert (l is None)==(form!='exp') and f.isfinite().all()
    if l is not None: torch.testing.assert_close(l.double(), wl, atol=1e-5*size, rtol=1e-5)
    grads = []
    for x in (y.clone().requires_grad_(), y.double().requires_grad_()):
        w = torch.arange(64, dtype=x.dtype).cos()
        grads.append(torch.autograd.grad((hedgehog_features(x, form)[0]*w).sum(), x)[0].double())
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)

@pytest.mark.parametrize('form', ['softmax_halves','softmax_joint'])
def test_gradcheck_of_normalised_features(form):
    y = torch.randn(1,1,3,4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: hedgehog_features(y, form)[0], y)

@pytest.mark.parametrize('dtype,tol', [(torch.float64,1e-10), (torch.float32,2e-5), (torch.float16,2e-3), (torch.bfloat16,1.6e-2)])
@pytest.mark.parametrize('form', FORMS)
def test_segments_in_every_precision(form, dtype, tol):
    "Outputs in the precision of the values, sums in fp32; the error is that of rounding the output."
    q,k,v = (x.to(dtype) for x in inputs(B=2, T=1000))
    m = make_feature_map('hedgehog', 16, 4, 2, form=form)
    want = linear_attention(q.double(), k.double(), v.double(), make_feature_map('hedgehog', 16, 4, 2, form=form).double(), implementation='naive')
    if dtype==torch.float64: m = m.double()
    with torch.no_grad(): o,s = linear_attention(q, k, v, m, output_final_state=True)
    assert o.dtype==dtype and s.S.dtype==torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(o.double(), want, atol=tol, rtol=tol)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): a = linear_attention(q, k, v, m)
    assert a.dtype==dtype
    torch.testing.assert_close(a.double(), want, atol=tol, rtol=tol)
