"The loss on order, the objectives, and the loop that trains one layer's map."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.ops.common import repeat_kv, make_attention_mask
from hedgehog_nb.training.losses import distill_map, layer_loss, naive_order_loss, naive_weight_loss, LOSSES, order_loss, output_loss, weight_loss
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.attentions.hedgehog import Hedgehog
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.distill import distill, teacher_pass
from hedgehog_nb.ops.metrics import monotonicity
from helpers.tiny_models import MODELS, inputs

def qkv(B=2, H=4, Hkv=2, T=13, D=8, dtype=torch.float64): return torch.randn(B,H,T,D, dtype=dtype), *torch.randn(2,B,Hkv,T,D, dtype=dtype)

def shaken(m, by=.2):
    "A map with its parameters moved off their start, in fp64."
    m = m.double()
    with torch.no_grad():
        for p in m.parameters(): p += by*torch.randn_like(p)
    return m

def same(a, b, tol=1e-10): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)

def by_hand(q, k, m, causal, scale, mask):
    "Half the variance of log weight − score, one number at a time."
    pq,pk,l = m(q, k); (B,H,T,_),G = q.shape,q.shape[1]//k.shape[1]
    out,n = torch.zeros(H, dtype=torch.float64),0
    for b in range(B):
        for i in range(T):
            if mask is not None and not mask[b,i]: continue
            n += 1
            keys = [j for j in range(T) if (j<=i or not causal) and (mask is None or mask[b,j])]
            for h in range(H):
                e = torch.stack([(pq[b,h,i]@pk[b,h//G,j]).log() + (0 if l is None else l[b,h//G,j]) - scale*q[b,h,i]@k[b,h//G,j] for j in keys])
                out[h] += ((e-e.mean())**2).mean()/2
    return out/n

MASK = torch.ones(2,13, dtype=torch.bool); MASK[0,:4] = False; MASK[1,5] = MASK[1,11:] = False
CASES = [(c,s,m) for c in (True,False) for s,m in ((None,None),(.7,MASK))]
ids = lambda v: 'padded' if isinstance(v, torch.Tensor) else str(v)

@pytest.mark.parametrize('causal,scale,mask', CASES, ids=ids)
@pytest.mark.parametrize('form', FORMS)
def test_order_loss_by_hand(form, causal, scale, mask):
    m = shaken(Hedgehog(8, 4, 2, form=form, bias=True))
    q,k,_ = qkv()
    want = by_hand(q, k, m, causal, 8**-.5 if scale is None else scale, mask)
    same(naive_order_loss(q, k, m, causal, scale, mask), want)
    for rows in (1,5,64): same(order_loss(q, k, m, causal, scale, mask, rows=rows), want.mean())
    assert (want>0).all()

@pytest.mark.parametrize('causal,scale,mask', CASES, ids=ids)
@pytest.mark.parametrize('loss', [order_loss,weight_loss])
def test_gradients_by_finite_differences(loss, causal, scale, mask):
    q,k,_ = qkv(H=2, Hkv=1, T=6); mask = None if mask is None else mask[:,2:8]
    leaves = [x.requires_grad_()
        for x in (torch.rand(2,2,6,3, dtype=torch.float64)+.1, torch.rand(2,1,6,3, dtype=torch.float64)+.1, torch.randn(2,1,6, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: loss(q, k, lambda *_: x, causal, scale, mask, rows=4), leaves)
    assert torch.autograd.gradcheck(lambda *x: loss(q, k, lambda *_: (*x, None), causal, scale, mask, rows=4), leaves[:2])

@settings(max_examples=25)
@given(B=st.integers(1,2), Hkv=st.integers(1,2), G=st.integers(1,3), T=st.integers(1,20), D=st.sampled_from([1,3,8]), rows=st.integers(1,24),
    form=st.sampled_from(FORMS), causal=st.booleans(), num_maps=st.integers(1,2), seed=st.integers(0,9))
def test_streamed_is_naive(B, Hkv, G, T, D, rows, form, causal, num_maps, seed):
    torch.manual_seed(seed)
    m = shaken(Hedgehog(D, Hkv*G, Hkv, form=form, num_maps=num_maps))
    q,k,_ = qkv(B, Hkv*G, Hkv, T, D)
    mask = torch.rand(B,T)<.8; mask[:,-1] = True
    for naive,fast in ((naive_order_loss,order_loss),(naive_weight_loss,weight_loss)):
        a,b = naive(q, k, m, causal, mask=mask).mean(), fast(q, k, m, causal, mask=mask, rows=rows)
        same(a, b)
        for x,y in zip(*(torch.autograd.grad(l, list(m.parameters())) for l in (a,b))): same(x, y, 1e-8)

@pytest.mark.parametrize('causal', [True,False])
def test_it_is_the_divergence_at_infinite_temperature(causal):
    m = shaken(Hedgehog(8, 4, 2)); q,k,_ = qkv(); k4,ok = repeat_kv(k, 4),make_attention_mask(13, 13, causal)
    s,lu = 8**-.5*q@k4.mT, (m(q, k)[0]@repeat_kv(m(q, k)[1], 4).mT).log()
    gaps = []
    for tau in (1e2,1e3):
        p,a = ((x/tau).masked_fill(~ok, -1e30).log_softmax(-1) for x in (s,lu))
        kl = tau**2*(p.exp()*(p-a)).masked_fill(~ok, 0).sum(-1).mean((0,2))
        gaps.append((kl-naive_order_loss(q, k, m, causal)).abs().max().item())
    assert gaps[1]<1e-3 and gaps[1]<.2*gaps[0]      # the error is of order 1/τ

def test_zero_for_softmax_and_for_nothing_else():
    q,k,_ = qkv(H=2)
    exact = lambda q,k: (torch.ones_like(q[...,:1]), torch.ones_like(k[...,:1]), k[...,0])
    ones = torch.ones_like(q)
    same(naive_order_loss(ones[...,:1], k[...,:1], exact, scale=1.), torch.zeros(2))
    same(order_loss(ones[...,:1], k[...,:1], exact, scale=1.), torch.zeros(()))
    assert naive_order_loss(ones[...,:1], k[...,:1], exact, scale=1.1).min()>1e-4

def test_factors_per_query_cancel_and_factors_per_key_do_not():
    m = shaken(Hedgehog(8, 4, 2)); q,k,_ = qkv(); pq,pk,_ = m(q, k)
    c,d = torch.rand(2,4,13,1, dtype=torch.float64)+.1, torch.rand(2,2,13,1, dtype=torch.float64)+.1
    want = order_loss(q, k, m)
    same(order_loss(q, k, lambda *_: (c*pq, pk, None)), want)
    assert (order_loss(q, k, lambda *_: (pq, d*pk, None))-want).abs()>1e-2
    same(order_loss(q, k, lambda *_: (pq, d*pk, None)), order_loss(q, k, lambda *_: (pq, pk, d[...,0].log())))

def test_padding_is_not_looked_at():
    m = shaken(Hedgehog(8, 4, 2)); q,k,v = qkv(); mask = torch.ones(2,13, dtype=torch.bool); mask[:,9:] = False
    wild = [x.clone() for x in (q,k)]
    for x in wild: x[:,:,9:] = 50*torch.randn_like(x[:,:,9:])
    for causal in (True,False): same(order_loss(*wild, m, causal, mask=mask), order_loss(q[:,:,:9], k[:,:,:9], m, causal))

@pytest.mark.parametrize('size', [1e-3,30.,1e3])
@pytest.mark.parametrize('name', ['t2r','hedgehog','exp'])
def test_finite_where_similarities_vanish(name, size):
    m = make_feature_map('t2r', 8, 4, 2) if name=='t2r' else Hedgehog(8, 4, 2, form='exp' if name=='exp' else 'softmax_halves')
    q,k,_ = (size*x.float() for x in qkv())
    loss = order_loss(q, k, m)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, list(m.parameters())))

@pytest.mark.parametrize('loss', [order_loss,weight_loss])
def test_low_precision_inputs_are_taken_as_they_are(loss):
    q,k,_ = (x.bfloat16() for x in qkv()); m = Hedgehog(8, 4, 2)
    same(loss(q, k, m, scale=.3), loss(q.float(), k.float(), m, scale=.3), 1e-6)

# --- objectives

@pytest.mark.parametrize('objective', LOSSES)
@pytest.mark.parametrize('causal', [True,False])
def test_objectives_are_sums(objective, causal):
    m = shaken(Hedgehog(8, 4, 2)); q,k,v = qkv()
    parts = dict(weights=naive_weight_loss(q, k, m, causal, .5, MASK).mean(),
        order=naive_order_loss(q, k, m, causal, .5, MASK).mean(), outputs=output_loss(q, k, v, m, causal, .5, MASK).mean())
    same(layer_loss(objective, m, q, k, v, causal, .5, MASK), sum(parts[p] for p in LOSSES[objective]))

def test_objectives_that_do_not_fit():
    m = Hedgehog(8, 4, 2); q,k,_ = qkv(dtype=torch.float32)
    with pytest.raises(ValueError, match='weights.*order.*logits'): layer_loss('logits', m, q, k)
    for o in ('outputs','both'):
        with pytest.raises(ValueError, match='values'): layer_loss(o, m, q, k)
        with pytest.raises(ValueError, match='values'): distill_map(m, q, k, steps=1, objective=o)

# --- training

def layer(N=8, T=24, D=8):
    "Queries and keys with something to learn, and the values they read."
    g = torch.Generator().manual_seed(3); basis = torch.randn(2,D,D, generator=g)
    return *(.8*torch.randn(N,2,T,D, generator=g)@basis for _ in range(2)), torch.randn(N,2,T,D, generator=g)

def order_of(m, q, k): return monotonicity(m(q, k)[0]@m(q, k)[1].mT, q@k.mT)[...,4:].mean().item()

@pytest.mark.parametrize('objective', LOSSES)
def test_each_objective_falls(objective):
    q,k,v = layer(); m = Hedgehog(8, 2)
    before = layer_loss(objective, m, q, k, v).item()
    losses = distill_map(m, q, k, v, steps=40, objective=objective)
    assert len(losses)==40 and layer_loss(objective, m, q, k, v).item()<.9*before

def test_the_order_loss_buys_order():
    q,k,v = layer(); got = {}
    for o in ('weights','weights+order'):
        m = Hedgehog(8, 2, form='softmax_joint'); distill_map(m, q, k, steps=80, objective=o)
        with torch.no_grad(): got[o] = order_of(m, q, k)
    assert got['weights+order']>got['weights']+.01

def test_every_text_is_seen_once_before_any_is_seen_again(monkeypatch):
    import hedgehog_nb.training.losses as d
    seen = []
    def spy(objective, m, q, k, v, **kw): seen.append(q[:,0,0,0].long().tolist()); return layer_loss(objective, m, q, k, v, **kw)
    monkeypatch.setattr(d, 'layer_loss', spy)
    q,k,v = layer(10); q[:,0,0,0] = torch.arange(10.)
    for seed in (0,1): d.distill_map(Hedgehog(8, 2), q, k, steps=6, batch_size=4, seed=seed)
    for run in (seen[:6], seen[6:]):
        for epoch in (run[:3], run[3:]): assert sorted(sum(epoch, []))==list(range(10))
        assert run[:3]!=run[3:]
    assert seen[:6]!=seen[6:]

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('objective', ['order','weights+order'])
def test_whole_models_learn_order(name, objective):
    model = linearize(MODELS[name]())
    batch = inputs(model, B=4)
    if 'input_ids' in batch: batch = dict(input_ids=batch['input_ids'], attention_mask=torch.ones_like(batch['input_ids'])); batch['attention_mask'][1,:5] = 0
    def total():
        out = []
        teacher_pass(model, batch,
            lambda module, q, k, v, causal, scale, mask, o: out.append(naive_order_loss(q, k, module.feature_map, causal, scale, mask).mean().item()))
        return out
    before = total()
    history = distill(model, [batch]*25, 25, objective=objective).losses
    after = total()
    assert len(after)==len(linear_layers(model)) and all(math.isfinite(x) for x in history) and all(b<a for a,b in zip(before, after))
