"Every registered map, the algebra of the three Hedgehog forms, and the loss that trains them."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from hedgehog_nb.ops.common import repeat_kv
from hedgehog_nb.ops.softmax import softmax_weights
from hedgehog_nb.training.losses import distill_map, naive_weight_loss, output_loss, weight_loss
from hedgehog_nb.attentions.base import FEATURE_MAPS, FeatureMap, make_feature_map
from hedgehog_nb.attentions.baselines import T2R
from hedgehog_nb.ops.features import exp_features
from hedgehog_nb.ops.hedgehog import FORMS, hedgehog_features
from hedgehog_nb.attentions.hedgehog import Hedgehog
from hedgehog_nb.functional import linear_attention
from hedgehog_nb.ops.linear import naive_linear_attention, naive_linear_weights

MAPS = sorted(FEATURE_MAPS)
VARIANTS = [(n,{}) for n in MAPS] + [('hedgehog',dict(form=f, num_maps=n, bias=b)) for f in FORMS for n,b in ((1,False),(2,True))] + [('exp',dict(t=2.))]
ids = lambda v: v if isinstance(v,str) else '-'.join(f'{k}={x}' for k,x in v.items()) or 'plain'

def qk(B=2, H=4, Hkv=2, T=17, D=8, dtype=torch.float64): return torch.randn(B,H,T,D, dtype=dtype), torch.randn(B,Hkv,T,D, dtype=dtype)

def shaken(m, by=.1):
    "A map with its parameters moved off their start, in fp64."
    m = m.double()
    with torch.no_grad():
        for p in m.parameters(): p += by*torch.randn_like(p)
    return m

def same(a, b, tol=1e-10): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)


@pytest.mark.parametrize('name,kw', VARIANTS, ids=ids)
@settings(max_examples=8)
@given(B=st.integers(1,2), Hkv=st.integers(1,2), G=st.integers(1,3), T=st.integers(1,20), D=st.sampled_from([1,3,8,60]))
def test_shapes_and_signs(name, kw, B, Hkv, G, T, D):
    if name=='taylor' and D>8: D = 9
    m = make_feature_map(name, D, Hkv*G, Hkv, **kw)
    q,k = qk(B, Hkv*G, Hkv, T, D, torch.float32)
    pq,pk,l = m(q, k)
    assert pq.shape==(B,Hkv*G,T,m.feature_dim) and pk.shape==(B,Hkv,T,m.feature_dim)
    assert l is None or l.shape==(B,Hkv,T)
    if m.positive: assert (pq@repeat_kv(pk, Hkv*G).mT>=-1e-6).all()
    a = naive_linear_weights(pq, pk, l)
    assert a.isfinite().all()

@pytest.mark.parametrize('name,kw', VARIANTS, ids=ids)
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
@pytest.mark.parametrize('size', [1e-3,1.,30.,1e3])
def test_no_overflow_forward_or_backward(name, kw, dtype, size):
    m = make_feature_map(name, 8, 4, 2, **kw)
    q,k = ((size*x).to(dtype).requires_grad_() for x in qk(dtype=torch.float32))
    v = torch.randn(2,2,17,5).to(dtype)
    for causal in (True,False):
        for impl in ('chunked','recurrent'):
            o = linear_attention(q, k, v, m, causal=causal, implementation=impl)
            assert o.dtype==dtype and o.isfinite().all()
        grads = torch.autograd.grad(o.float().square().sum(), [q,k,*m.parameters()], allow_unused=True)
        assert all(g.isfinite().all() for g in grads if g is not None)
    assert weight_loss(q, k, m).isfinite()

@pytest.mark.parametrize('name,kw', VARIANTS, ids=ids)
def test_every_implementation_agrees(name, kw):
    m = shaken(make_feature_map(name, 8, 4, 2, **kw))
    q,k = qk(T=23); v = torch.randn(2,2,23,8, dtype=torch.float64)
    mask = torch.rand(2,23)<.8
    want = linear_attention(q, k, v, m, mask=mask, implementation='naive')
    for impl in ('recurrent','chunked'): same(linear_attention(q, k, v, m, mask=mask, implementation=impl, chunk_size=5), want)
    o,s = linear_attention(q[:,:,:9], k[:,:,:9], v[:,:,:9], m, mask=mask[:,:9], output_final_state=True)
    same(torch.cat([o, linear_attention(q[:,:,9:], k[:,:,9:], v[:,:,9:], m, mask=mask[:,9:], initial_state=s, offset=9)], 2), want)

@pytest.mark.parametrize('name,kw', VARIANTS, ids=ids)
def test_low_precision_inputs(name, kw):
    "Tolerance: the inputs are what they are after rounding; fixed maps that stay in bf16 round their features too."
    m = make_feature_map(name, 8, 4, 2, **kw)
    q,k = (x.to(torch.bfloat16) for x in qk()); v = torch.randn(2,2,17,8).to(torch.bfloat16)
    want = linear_attention(q.double(), k.double(), v.double(), make_feature_map(name, 8, 4, 2, **kw).double())
    o,s = linear_attention(q, k, v, m, output_final_state=True)
    assert o.dtype==torch.bfloat16 and all(x.dtype==torch.float32 for x in s)
    same(o, want, 4e-2)

# --- fixed maps against their definitions

def test_fixed_maps_by_hand():
    x = torch.tensor([-2.,0.,3.], dtype=torch.float64)[None,None,None]
    phi = lambda name, **kw: make_feature_map(name, 3, scale=1., **kw).map_q(x).flatten()
    same(phi('elu'), torch.tensor([math.exp(-2),1,4], dtype=torch.float64))
    same(phi('relu'), torch.tensor([0.,0,3]))
    y,l = make_feature_map('exp', 3, t=2.).map_k(x)
    same(y.flatten()*l.exp().item(), torch.tensor([math.exp(-4),1,math.exp(6)], dtype=torch.float64))
    x2 = torch.tensor([2.,-1.], dtype=torch.float64)[None,None,None]
    y,l = make_feature_map('taylor', 2, scale=1.).map_k(x2)  # 1, x, y, x²/√2, xy, y²/√2, over the square of the largest
    same(y.flatten()*l.exp().item(), torch.tensor([1,2,-1,4/math.sqrt(2),-2,1/math.sqrt(2)], dtype=torch.float64))

def test_t2r_has_a_bias_vector_per_head():
    m = T2R(8, 4, 2)
    assert m.b_q.shape==(4,8) and m.b_k.shape==(2,8) and m.w_q.shape==(4,8,8) and m.w_k.shape==(2,8,8)
    shaken(m)
    q,k = qk()
    for h in range(4): same(m.map_q(q)[:,h], F.relu(q[:,h]@m.w_q[h].T+m.b_q[h]))
    for h in range(2): same(m.map_k(k)[0][:,h], F.relu(k[:,h]@m.w_k[h].T+m.b_k[h]))

# --- the Hedgehog forms

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('D', [7,8,60,64])
def test_the_start_is_the_whole_identity(form, D):
    "Truncated, it would drop one half of each rotary pair."
    m = Hedgehog(D, 4, 2, form=form, init=1.)
    assert torch.equal(m.w_q, torch.eye(D).expand(4,D,D)) and torch.equal(m.w_k, torch.eye(D).expand(2,D,D))
    assert m.feature_dim==2*D and m.b_q is None
    m2 = Hedgehog(D, 4, 2, form=form, num_maps=2, bias=True, init=1.)
    assert m2.w_q.shape==(4,2*D,D) and torch.equal(m2.w_q[:,:D], m.w_q) and m2.b_q.shape==(4,2*D) and (m2.b_q==0).all()
    r = m2.w_q[0,D:]
    torch.testing.assert_close(r@r.T, torch.eye(D), atol=1e-5, rtol=0)   # the second map is a rotation
    assert (r-torch.eye(D)).abs().max()>.1

def test_queries_and_keys_are_untied_and_heads_their_own():
    m = shaken(Hedgehog(8, 4, 4))
    q,_ = qk()
    assert (m.map_q(q)-m.map_k(q)[0]).abs().max()>1e-3
    one = m.map_q(q[:,:1].expand(-1,4,-1,-1))
    assert all((one[:,h]-one[:,0]).abs().max()>1e-3 for h in range(1,4))

def test_exp_form_is_the_papers():
    "φ(x) = [exp(Wx+b), exp(−Wx−b)], and the attention of its weights."
    m = shaken(Hedgehog(8, 4, 2, form='exp', bias=True))
    q,k = qk(); v = torch.randn(2,2,17,8, dtype=torch.float64)
    def phi(x, w, b): y = torch.einsum('bhtd,hed->bhte', x, w)+b[:,None]; return torch.cat([y.exp(),(-y).exp()], -1)
    pq,pk = phi(q, m.w_q, m.b_q), phi(k, m.w_k, m.b_k)
    _,mk,l = m(q, k)
    same(mk*l.exp()[...,None], pk)
    assert mk.max()<=1
    same(linear_attention(q, k, v, m), naive_linear_attention(pq, pk, v))

@pytest.mark.parametrize('size', [1.,5.,12.])
def test_exp_form_is_exact_where_exp_overflows(size):
    "fp32 against logarithms in fp64; exp(±size·4) would leave fp16 at 3, and products of two leave fp32 at 12."
    m = Hedgehog(8, 4, 2, form='exp', init=1.)
    q,k = (size*x for x in qk(D=8, dtype=torch.float32))
    y = lambda x: torch.cat([x,-x], -1).double()
    s = torch.logsumexp(y(q)[:,:,:,None]+y(repeat_kv(k, 4))[:,:,None], -1)
    want = s.masked_fill(torch.ones(17,17, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    eye = torch.eye(17).expand(2,2,17,17)
    for impl in ('naive','recurrent','chunked'): same(linear_attention(q, k, eye, m, implementation=impl), want, 2e-4)

def test_joint_form_is_exp_with_2W_on_queries_and_a_reweighting_on_keys():
    joint = shaken(Hedgehog(8, 4, 2, form='softmax_joint'))
    q,k = qk()
    yq,yk = torch.einsum('bhtd,hed->bhte', q, joint.w_q), torch.einsum('bhtd,hed->bhte', k, joint.w_k)
    fq,fk = (hedgehog_features(2*y, 'exp') for y in (yq,yk))
    a = naive_linear_weights(*joint(q, k))
    same(a, naive_linear_weights(fq[0], fk[0], fk[1]-(2*torch.cosh(2*yk)).sum(-1).log()))
    assert (a-naive_linear_weights(fq[0], fk[0], fk[1])).abs().max()>1e-2      # on keys it is not exp
    jq,_ = hedgehog_features(yq, 'softmax_joint')
    same(naive_linear_weights(jq, fk[0], fk[1]), naive_linear_weights(fq[0], fk[0], fk[1]))  # on queries it is

def test_halves_form_is_exp_on_neither_side():
    yq,yk = qk(H=2)
    hq,none = hedgehog_features(yq, 'softmax_halves')
    assert none is None
    same(hq[...,:8].sum(-1), torch.ones(2,2,17)); same(hq[...,8:].sum(-1), torch.ones(2,2,17))
    hk,_ = hedgehog_features(yk, 'softmax_halves')
    (eq,_),(ek,l) = hedgehog_features(yq, 'exp'), hedgehog_features(yk, 'exp')
    want = naive_linear_weights(eq, ek, l)
    assert (naive_linear_weights(hq, ek, l)-want).abs().max()>1e-2
    # no factor per key makes it exp: ratios of two queries' weights on one key would have to agree
    r = naive_linear_weights(eq, hk, causal=False)/naive_linear_weights(eq, ek, causal=False)
    assert (r[...,0,:]/r[...,1,:]).std(-1).min()>1e-3

def test_exp_features_take_out_the_largest():
    y = torch.tensor([[1e4,-1e4,0.],[-1e4,-1e4,-1e4]])
    f,l = exp_features(y)
    assert f.tolist()==[[1,0,0],[1,1,1]] and l.tolist()==[1e4,-1e4]

# --- the registry

def test_what_does_not_fit_is_refused():
    q,k = qk()
    with pytest.raises(ValueError, match='hedgehog'): make_feature_map('hedghog', 8)
    with pytest.raises(ValueError, match='nonsense'): make_feature_map('hedgehog', 8, nonsense=1)
    with pytest.raises(ValueError, match='softmax_joint'): make_feature_map('hedgehog', 8, form='halves')
    with pytest.raises(ValueError): make_feature_map('hedgehog', 8, num_maps=0)
    with pytest.raises(ValueError): hedgehog_features(q, 'halves')
    with pytest.raises(ValueError): make_feature_map('elu', 0)
    with pytest.raises(ValueError, match='3.*4'): make_feature_map('elu', 8, 4, 3)
    with pytest.raises(ValueError, match='head_dim'): make_feature_map('elu', 6, 4, 2)(q, k)
    with pytest.raises(ValueError, match='heads'): make_feature_map('elu', 8, 2, 2)(q, k)
    with pytest.raises(NotImplementedError): FeatureMap(8).phi(q)

# --- the distillation loss

def cross_entropy_by_hand(q, k, m, causal, scale, mask=None):
    "Mean over rows of −Σ p log a, less −Σ p log p, summed one number at a time."
    p = softmax_weights(q, k, causal, scale, mask); a = naive_linear_weights(*m(q, k), causal=causal, mask=mask)
    B,H,T,_ = p.shape
    out,n = torch.zeros(H, dtype=torch.float64),0
    for b in range(B):
        for i in range(T):
            if mask is not None and not mask[b,i]: continue
            n += 1
            for h in range(H):
                ce = sum(-p[b,h,i,j]*a[b,h,i,j].log() for j in range(T) if p[b,h,i,j]>0)
                en = sum(-p[b,h,i,j]*p[b,h,i,j].log() for j in range(T) if p[b,h,i,j]>0)
                out[h] = out[h]+ce-en
    return out/n

LOSSES = [(True,None,False), (True,.7,True), (False,None,False), (False,.7,True)]

@pytest.mark.parametrize('causal,scale,masked', LOSSES)
@pytest.mark.parametrize('form', FORMS)
def test_loss_is_cross_entropy_less_entropy(form, causal, scale, masked):
    m = shaken(Hedgehog(4, 2, 1, form=form))
    q,k = qk(2, 2, 1, 7, 4)
    mask = torch.tensor([[0,1,1,0,1,1,1],[1,1,1,1,1,0,0]], dtype=torch.bool) if masked else None
    want = cross_entropy_by_hand(q, k, m, causal, scale, mask)
    same(naive_weight_loss(q, k, m, causal, scale, mask), want)
    for rows in (1,3,64): same(weight_loss(q, k, m, causal, scale, mask, rows=rows), want.mean())
    assert (want>0).all()

@pytest.mark.parametrize('causal', [True,False])
def test_loss_is_zero_only_for_the_teacher(causal):
    "A map whose features are the softmax kernel itself: the Taylor map of tiny products, in the limit."
    q,k = (1e-3*x for x in qk(1, 2, 2, 9, 4))
    m = make_feature_map('taylor', 4, 2)
    assert naive_weight_loss(q, k, m, causal).abs().max()<1e-15
    assert naive_weight_loss(1e3*q, 1e3*k, m, causal).min()>1e-4

@pytest.mark.parametrize('causal,scale,masked', LOSSES)
def test_gradient_of_the_loss(causal, scale, masked):
    "dL/du_ij = 1/A_i − p_ij/u_ij, over the number of rows."
    q,k = qk(2, 2, 2, 6, 4)
    mask = torch.tensor([[0,1,1,0,1,1],[1,1,1,1,1,0]], dtype=torch.bool) if masked else torch.ones(2,6, dtype=torch.bool)
    pq,pk = (torch.rand(2,2,6,3, dtype=torch.float64)+.1 for _ in range(2))
    l = torch.randn(2,2,6, dtype=torch.float64)
    for leaves in ([pq,pk],[pq,pk,l]):
        leaves = [x.clone().requires_grad_() for x in leaves]
        fm = lambda *_: (leaves[0], leaves[1], leaves[2] if len(leaves)>2 else None)
        p = softmax_weights(q, k, causal, scale, mask)
        with torch.no_grad():
            w = leaves[2].exp()[:,:,None] if len(leaves)>2 else torch.ones(2,2,1,6, dtype=torch.float64)
            u = (leaves[0]@leaves[1].mT)*w*(p>0)
            A = u.sum(-1, keepdim=True)
            rows = mask[:,None,:,None]*(p>0)
            du = torch.where(p>0, 1/A-p/u, 0.)*rows/mask.sum()/2   # mean over rows, and 2 heads
            want = [(du*w)@leaves[1], (du*w).mT@leaves[0]] + ([(du*u).sum(2)] if len(leaves)>2 else [])
        for f in (lambda: naive_weight_loss(q, k, fm, causal, scale, mask).mean(), lambda: weight_loss(q, k, fm, causal, scale, mask, rows=4)):
            for g,x in zip(torch.autograd.grad(f(), leaves), want): same(g, x)

@pytest.mark.parametrize('form', FORMS)
def test_streamed_gradient_reaches_the_matrices(form):
    m = shaken(Hedgehog(8, 4, 2, form=form, bias=True))
    q,k = qk(T=21); mask = torch.rand(2,21)<.8
    want = torch.autograd.grad(naive_weight_loss(q, k, m, mask=mask).mean(), list(m.parameters()))
    for g,x in zip(torch.autograd.grad(weight_loss(q, k, m, mask=mask, rows=8), list(m.parameters())), want): same(g, x)

def test_loss_ignores_what_is_padded():
    m = shaken(Hedgehog(8, 4, 2))
    q,k = qk(T=10)
    mask = torch.ones(2,10, dtype=torch.bool); mask[:,7:] = False
    want = naive_weight_loss(q[:,:,:7], k[:,:,:7], m)
    q,k = q.clone(),k.clone(); q[:,:,7:] = 50; k[:,:,7:] = -50
    for causal in (True,False):
        same(naive_weight_loss(q, k, m, causal, mask=mask), naive_weight_loss(q[:,:,:7], k[:,:,:7], m, causal))
        same(weight_loss(q, k, m, causal, mask=mask), naive_weight_loss(q[:,:,:7], k[:,:,:7], m, causal).mean())
    same(naive_weight_loss(q, k, m, mask=mask), want)

def test_output_loss_by_hand():
    m = shaken(Hedgehog(8, 4, 2))
    q,k = qk(T=10); v = torch.randn(2,2,10,8, dtype=torch.float64)
    t = softmax_weights(q, k)@repeat_kv(v, 4); o = linear_attention(q, k, v, m)
    want = ((o-t)**2).mean((0,2,3))/(t**2).mean((0,2,3))
    same(output_loss(q, k, v, m), want); same(output_loss(q, k, v, m, target=t), want)
    mask = torch.ones(2,10, dtype=torch.bool); mask[:,7:] = False
    same(output_loss(q, k, v, m, mask=mask), output_loss(q[:,:,:7], k[:,:,:7], v[:,:,:7], m))

@pytest.mark.parametrize('name,kw', [v for v in VARIANTS if FEATURE_MAPS[v[0]].trainable], ids=ids)
def test_distillation_learns(name, kw):
    torch.manual_seed(3)
    basis = torch.randn(2,8,8)
    q,k = (2*torch.randn(8,2,24,8)@basis*.4 for _ in range(2))
    m = make_feature_map(name, 8, 2, **kw)
    before = naive_weight_loss(q, k, m).mean().item()
    losses = distill_map(m, q, k, steps=40)
    after = naive_weight_loss(q, k, m).mean().item()
    assert len(losses)==40 and after<(.95 if name=='rfa' else .9)*before  # RFA learns D numbers a head
