"""The distillation loss in Triton against the naive form in fp64: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.attentions.base import make_attention, make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.training import losses
from hedgehog_nb.training.losses import naive_weight_loss, order_loss, naive_order_loss, weight_loss
from helpers.interpreter import DEVICE, HERE, compiles, few, kernel, other_masks, under_the_interpreter

F32,F16,BF16 = torch.float32,torch.float16,torch.bfloat16
# Of the largest reference value, or of 1: the loss of each row, and gradients; a GPU multiplies fp32 as three TF32, and adds in another order
LOSS,GRAD = 1e-6 if DEVICE=='cpu' else 1e-5,{F32:1e-5 if DEVICE=='cpu' else 1e-4, F16:2e-3, BF16:2e-2}
NAMES = 'q','k','phi_q','phi_k'

if HERE:
    from hedgehog_nb.kernels import weight_loss as kw
    from hedgehog_nb.kernels.weight_loss import naive_weight_loss_rows, triton_weight_loss
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

def inputs(B=1, H=2, Hkv=1, T=20, D=8, F=12, dtype=F32, features=None, logs=True, masked=False, size=1., seed=0):
    "A dict of what `triton_weight_loss` takes."
    x = dict(zip(NAMES, (rand(B, h, T, d, seed=seed+i) for i,(h,d) in enumerate(((H, D), (Hkv, D), (H, F), (Hkv, F))))))
    x = {n: ((2*y).softmax(-1).to(features or dtype) if 'phi' in n else y.to(dtype)) for n,y in x.items()}
    mask = None
    if masked:
        mask = rand(B, T, seed=seed+5) > -1
        if T>3: mask[0,:3] = False
    return x | dict(log_k=size*rand(B, Hkv, T, seed=seed+6) if logs else None, log_q=size*rand(B, H, T, seed=seed+7) if logs else None, mask=mask)

def run(f, a, dt=None, **kw):
    "The loss of each row, and the gradients of features and log weights."
    ins = {n: x if x is None or n=='mask' else x.to(dt or x.dtype).detach().requires_grad_(n not in 'qk') for n,x in a.items()}
    kl = f(**ins, **kw)
    leaves = {n:x for n,x in ins.items() if x is not None and n not in ('q','k','mask') and (n!='log_q' or kw.get('window'))}
    weight = rand(*kl.shape, seed=77).abs().to(kl.dtype) # rows that count differently
    return dict(loss=kl.detach()) | dict(zip(leaves, torch.autograd.grad((kl*weight).sum(), list(leaves.values()))))

def close(a, r, tol, name=''):
    assert a.shape==r.shape and torch.isfinite(a).all(), name
    err = ((a.double() - r.double()).abs().max()/r.double().abs().max().clamp_min(1)).item()
    assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"

def check(a, times=1, **kw):
    got,want = run(triton_weight_loss, a, **kw),run(naive_weight_loss_rows, a, torch.float64, **kw)
    for n in got:
        assert n=='loss' or got[n].dtype==a[n].dtype
        close(got[n], want[n], times*(LOSS if n=='loss' else GRAD[a['phi_q'].dtype]), n)
    return got

@kernel
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('D,F,T', [(8, 12, 1), (60, 120, 17), (8, 16, 65), (16, 24, 130), (5, 3, 40), (128, 256, 33)])
def test_shapes(D, F, T, causal): # a row that sees one key has no gradient: its two parts, 1/u, differ by rounding
    H,Hkv = [(4, 4), (4, 2), (3, 1)][T % 3] if T<100 and D<100 else (1, 1)
    check(inputs(1, H, Hkv, T, D, F, masked=T==17), causal=causal, times=100 if T==1 else 1)

@kernel
@pytest.mark.parametrize('window', [1, 5, 16, 63, 64, 65, 200])
@few(1, 'logs', [True, False])
def test_windows(window, logs): check(inputs(1, 4, 2, 40 if window<60 else 90, masked=window%2, logs=logs), window=window)

@kernel
@pytest.mark.parametrize('window', [0, 6])
@pytest.mark.parametrize('dtype,features', [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32), (F32, BF16)])
def test_dtypes(dtype, features, window): check(inputs(2, 2, 1, 70, 16, 32, dtype, features, masked=True), window=window)

@kernel
@few(1, 'logs,causal', [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize('where', ['left', 'right', 'middle', 'all'])
def test_padding(where, causal, logs):
    a = inputs(2, 2, 1, 75, logs=logs)
    m = torch.ones(2, 75, dtype=torch.bool, device=DEVICE)
    m[0][dict(left=slice(66), right=slice(9, None), middle=slice(20, 70), all=slice(None))[where]] = False
    got = check(a | dict(mask=m), causal=causal)
    assert not any((got[n][0]*~m[0].view(1, -1, *[1]*(got[n].ndim-3))).any() for n in got) # neither loss nor gradient
    if where=='all': return
    for bad in (1e4, torch.nan):
        wild = {n: x.masked_fill(~m.view(2, 1, 75, *[1]*(x.ndim-3)), bad) if x is not None and n!='mask' else x for n,x in a.items()}
        for n,x in run(triton_weight_loss, wild | dict(mask=m), causal=causal).items(): close(x, got[n], 1e-6, n)

@kernel
def test_masks_of_other_dtypes():
    a = inputs(1, 2, 1, 30, masked=True); want = triton_weight_loss(**a)
    for m in other_masks(a['mask']): assert torch.equal(triton_weight_loss(**a | dict(mask=m)), want)

@kernel
@settings(max_examples=10, deadline=None, derandomize=True)
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 3), T=st.integers(2, 80), D=st.integers(1, 20), F=st.integers(1, 40),
       window=st.integers(0, 90), causal=st.booleans(), masked=st.booleans(), logs=st.booleans(), bthd=st.booleans(),
       dtype=st.sampled_from([F32, F16, BF16]), seed=st.integers(0, 99))
@pytest.mark.slow
def test_drawn(B, Hkv, G, T, D, F, window, causal, masked, logs, bthd, dtype, seed):
    a = inputs(B, Hkv*G, Hkv, T, D, F, dtype, torch.float32, logs, masked, seed=seed)
    if bthd: a |= {n: a[n].transpose(1, 2).contiguous().transpose(1, 2) for n in NAMES}
    check(a, times=5, causal=causal, window=window if causal else 0)

@kernel
def test_strides_are_read_in_place():
    a = inputs(2, 2, 2, 30)
    views = a | {n: torch.cat([a[n], a[n]], -1).transpose(1, 2).contiguous().transpose(1, 2)[...,:a[n].shape[-1]] for n in NAMES}
    for x,y in zip(run(triton_weight_loss, a).values(), run(triton_weight_loss, views).values()): assert torch.equal(x, y)

# --- extremes

@kernel
@pytest.mark.parametrize('window', [0, 7])
def test_log_weights_far_apart(window):
    "In the naive form's log domain: nothing is cut off, whatever the difference."
    a = inputs(1, 2, 1, 70, masked=True)
    for size in (60, 200):
        logs = {n: size*a[n].sign() for n in ('log_k','log_q')}
        got,want = (run(f, a | logs, dt, window=window) for f,dt in ((triton_weight_loss, None), (naive_weight_loss_rows, torch.float64)))
        for n in got: close(got[n], want[n], 1e-4, n)

@kernel
@pytest.mark.parametrize('logs', [False, True])
def test_scores_too_large_to_exponentiate(logs):
    a = inputs(1, 2, 1, 70, logs=logs)
    for window in (0, 7): check(a | dict(q=100*a['q']), window=window, times=20)

@kernel
@pytest.mark.parametrize('logs', [False, True])
def test_a_key_that_the_student_cannot_see(logs):
    "It counts as one of similarity 1e-30: 69 nats for its weight, and no gradient through its features."
    a = inputs(1, 2, 1, 40, logs=logs); a['phi_k'][:,:,3] = 0; a['phi_q'][:,0,9] = 0
    got = check(a)
    assert not got['phi_k'][:,:,3].any() and not got['phi_q'][:,0,9].any() and got['loss'][0,:,3].min()>1

@kernel
def test_zero_for_softmax_itself():
    q,k = rand(1, 2, 70, 1).abs()*0+1,rand(1, 2, 70, 1, seed=1)
    one = torch.ones_like(q)
    for causal in (True, False): assert triton_weight_loss(q, k, one, one, k[...,0], causal=causal, scale=1.).abs().max()<1e-6
    assert triton_weight_loss(q, k, one, one, k[...,0]*1.1, scale=1.).mean()>1e-4
    assert triton_weight_loss(*(inputs(T=30)[n] for n in NAMES), window=30).abs().max()<1e-6 # all in the window

@kernel
def test_causal():
    a = inputs(1, 2, 1, 70)
    changed = {n: torch.cat([x[:,:,:45], torch.full_like(x[:,:,45:], 7)], 2) if x is not None else x for n,x in a.items()}
    for window in (0, 6): assert torch.equal(triton_weight_loss(**changed, window=window)[:,:,:45], triton_weight_loss(**a, window=window)[:,:,:45])

@kernel
def test_every_run_gives_the_same_bits():
    a = inputs(2, 4, 2, 70, masked=True)
    one,two = (run(triton_weight_loss, a, window=5) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)

# --- as an operation of PyTorch

@kernel
def test_only_some_gradients():
    a = inputs(T=20); a['phi_k'].requires_grad_()
    g, = torch.autograd.grad(triton_weight_loss(**a).mean(), a['phi_k']) # the gradient of a mean has stride 0
    r, = torch.autograd.grad(naive_weight_loss_rows(**a).mean(), a['phi_k'])
    close(g, r, 1e-5); assert not triton_weight_loss(**a).sum().isnan()

@kernel
@few(1, 'logs,masked,window', [(True, True, 4), (False, False, 0)])
def test_registered_as_torch_wants_it(logs, masked, window):
    a = inputs(1, 2, 1, 20, logs=logs, masked=masked)
    order = *NAMES,'log_q','log_k','mask'
    leaves = [a[n].requires_grad_() if a[n] is not None and n not in ('q','k','mask') else a[n] for n in order]
    args = window,True,.3,''
    torch.library.opcheck(kw._loss_op, (*leaves, *args))
    kl,lse,log_a = kw._loss_op(*leaves, *args)
    torch.library.opcheck(kw._loss_bwd_op, [x.detach() if isinstance(x, torch.Tensor) else x for x in (kl, lse, log_a, *leaves, *args)])

@kernel
def test_one_graph():
    torch._dynamo.reset()
    a = inputs(1, 2, 1, 22, masked=True); leaves = [a[n].requires_grad_() for n in ('phi_q','phi_k','log_k')]
    f = lambda phi_q, phi_k, log_k: triton_weight_loss(a['q'], a['k'], phi_q, phi_k, log_k, mask=a['mask']).sum()
    ours,theirs = ([l, *torch.autograd.grad(l, leaves)] for l in (g(*leaves) for g in (torch.compile(f, fullgraph=True, backend='aot_eager'), f)))
    assert all(map(torch.equal, ours, theirs))

@kernel
@pytest.mark.parametrize('message,change', [
    ('as many queries', lambda a: dict(q=a['q'][:,:,:9], phi_q=a['phi_q'][:,:,:9])), ('phi_q is', lambda a: dict(phi_q=a['phi_q'][:,:1])),
    ('phi_k is', lambda a: dict(phi_k=a['phi_k'][0])), ('same features', lambda a: dict(phi_k=a['phi_k'][...,:3])),
    ('log_q is', dict(log_q=torch.zeros(1, 2, 3))), ('log_k is', dict(log_k=torch.zeros(1, 2, 20))),
    ('window is', dict(window=-1)), ('window is', dict(window=2.)), ('what came before', dict(window=2, causal=False)),
    ('mask', dict(mask=torch.ones(1, 3))), ('must lie on', dict(mask=torch.ones(1, 20, device='meta'))),
    ('q is float32', lambda a: dict(q=a['q'].double())), ('phi_k is float32', lambda a: dict(phi_k=a['phi_k'].double())),
    ('last stride 1', lambda a: dict(k=a['k'].mT.contiguous().mT)), ('precision is', dict(precision='tf16')),
    ('up to 512', dict(phi_q=torch.ones(1, 2, 20, 513), phi_k=torch.ones(1, 1, 20, 513))),
    ('256 channels', dict(q=torch.ones(1, 2, 20, 257), k=torch.ones(1, 1, 20, 257))),
    ('empty', lambda a: {n: a[n][:,:,:0] for n in NAMES} | dict(log_k=None, log_q=None)),
    ('do not divide', lambda a: {n: a[n].repeat(1, 3, 1, 1)[:,:h] for n,h in zip(NAMES, (3, 2, 3, 2))})])
def test_what_does_not_fit(message, change):
    a = inputs(T=20)
    with pytest.raises(ValueError, match=message): triton_weight_loss(**a | (change(a) if callable(change) else change))

# --- `weight_loss` by this kernel

STUDENTS = {form: lambda form=form: make_feature_map('hedgehog', 8, 4, 2, form=form) for form in FORMS} | {
    'window ' + ' '.join(kw): lambda kw=kw: make_attention('hedgehog-window', 8, 4, 2, window=7, **kw) for kw in ({}, dict(form='exp'), dict(relative=True))}

@kernel
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('which', STUDENTS)
def test_every_student(which, masked):
    m = STUDENTS[which]().to(DEVICE)
    for i,p in enumerate(m.parameters()): p.data += .2*rand(*p.shape, seed=50+i)
    q,k,mask = rand(2, 4, 40, 8),rand(2, 2, 40, 8, seed=1),rand(2, 40, seed=5)>-1 if masked else None
    def both(dt, **kw):
        loss = weight_loss(q.to(dt), k.to(dt), m.to(dt), mask=mask, **kw)
        grads = torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
        return [loss.detach(), *(x for x in grads if x is not None)]
    got,want = both(F32, implementation='triton'),both(torch.float64, implementation='torch')
    for a,b in zip(got, want): close(a, b, 2e-6 if DEVICE=='cpu' else 1e-4)

@kernel
def test_layouts_and_dtypes_that_need_a_copy():
    q,k = rand(1, 2, 20, 8),rand(1, 2, 20, 8, seed=1)
    odd = lambda q,k: (q.exp().mT.contiguous().mT, k.exp().mT.contiguous().mT, None)
    got,want = weight_loss(q.mT.contiguous().mT, k, odd, implementation='triton'),naive_weight_loss(q.double(), k.double(), odd).mean()
    close(got, want, 2e-6 if DEVICE=='cpu' else 1e-4)
    with pytest.raises(ValueError, match='float64'): weight_loss(q.double(), k.double(), odd, implementation='triton')
    wide = lambda q,k: (q.repeat(1, 1, 1, 65).exp(), k.repeat(1, 1, 1, 65).exp(), None)
    with pytest.raises(ValueError, match='up to 512'): weight_loss(q, k, wide, implementation='triton')
    with pytest.raises(ValueError, match="implementation is one of triton, c, torch"): weight_loss(q, k, odd, implementation='cuda')

@kernel
def test_a_batch_of_padding_alone():
    q,m = rand(2, 2, 20, 8),make_feature_map('hedgehog', 8, 2).to(DEVICE)
    for i in ('triton','torch'):
        loss = weight_loss(q, q, m, mask=torch.zeros(2, 20, device=DEVICE), implementation=i)
        assert loss==0 and not any(g.any() for g in torch.autograd.grad(loss, list(m.parameters())))

def test_all_sequences_at_a_time_and_one_by_one(monkeypatch):
    "What PyTorch's form does on a GPU, here on a CPU."
    for of,naive in ((weight_loss, naive_weight_loss), (order_loss, naive_order_loss)):
        for which in ('hedgehog','hedgehog-window') if of is weight_loss else ('hedgehog',):
            for causal in (True,False) if which=='hedgehog' else (True,):
                for masked in (True,False):
                    m = (make_feature_map('hedgehog', 8, 4, 2, form='exp') if which=='hedgehog' else make_attention(which, 8, 4, 2, window=5)).double()
                    q,k = rand(3, 4, 21, 8).double().cpu(),rand(3, 2, 21, 8, seed=1).double().cpu()
                    mask = (rand(3, 21, seed=2)>-.5).cpu() if masked else None
                    def both():
                        loss = of(q, k, m, causal, mask=mask, rows=8)
                        return loss.detach(), *(g for g in torch.autograd.grad(loss, list(m.parameters()), allow_unused=True) if g is not None)
                    one = both()
                    with monkeypatch.context() as p:
                        p.setattr(losses, '_batches', lambda real: [slice(None)])
                        for a,b in zip(one, both()): close(a, b, 1e-12)
                    if which=='hedgehog': close(one[0], naive(q, k, m, causal, mask=mask).mean(), 1e-12)

def test_nothing_in_the_loop_waits_for_a_gpu():
    "On `meta` tensors, where to look at a number is an error, in as few blocks as there are rows for."
    m = make_feature_map('hedgehog', 8, 4, 2, form='exp').to('meta')
    q,k = torch.empty(3, 4, 50, 8, device='meta'),torch.empty(3, 2, 50, 8, device='meta')
    for of in (weight_loss, order_loss):
        for mask in (None, torch.empty(3, 50, dtype=torch.bool, device='meta')):
            torch.autograd.grad(of(q, k, m, mask=mask), list(m.parameters()))

RESOURCES = '''
import torch
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.kernels.weight_loss import triton_weight_loss
b,f,h = torch.bfloat16,torch.float32,torch.float16
for capability,most in ((90, 227), (80, 163)):
    for D,dtype,phi,window in ((64,b,b,0), (64,b,f,0), (64,f,f,0), (64,b,f,64), (128,b,b,0)):
        e = lambda h, d, dtype: torch.empty(1, h, 256, d, dtype=dtype).requires_grad_()
        q,k,phi_q,phi_k = e(3, D, dtype),e(1, D, dtype),e(3, 2*D, phi),e(1, 2*D, phi)
        rows = inspect_kernels(lambda: triton_weight_loss(q, k, phi_q, phi_k, window=window).mean().backward(), capability=capability)
        assert [r['kernel'] for r in rows]==['weight_loss_fwd','weight_loss_bwd_q','weight_loss_bwd_k']
        for r in rows: assert r['spilled_bytes']==0 and r['shared_bytes']<=most*1024, (capability, D, dtype, phi, window, r)
'''

@pytest.mark.compiles
@pytest.mark.slow
def test_no_configuration_of_models_spills(tmp_path): compiles(RESOURCES, tmp_path)
