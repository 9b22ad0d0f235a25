"The algebra of the Hedgehog map over random inputs, its gradients, and the exact paper form at any size."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.ops.common import repeat_kv, make_attention_mask
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.hedgehog import FORMS, hedgehog_features, naive_exp_weights, recurrent_exp_attention
from hedgehog_nb.attentions.hedgehog import Hedgehog
from hedgehog_nb.functional import linear_attention
from hedgehog_nb.ops.linear import naive_linear_weights

F64 = torch.float64
shapes = dict(seed=st.integers(0,10**6), Hkv=st.integers(1,3), G=st.integers(1,3), T=st.integers(1,14), D=st.sampled_from([1,3,8]))

def draw(seed, *shape): return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
def qk(seed, Hkv=1, G=1, T=9, D=8, B=2): return draw(seed, B, Hkv*G, T, D), draw(seed+1, B, Hkv, T, D)
def same(a, b, tol=1e-9): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)

def shaken(m, seed=0, by=.3):
    "A map with its parameters moved off their start, in fp64."
    m = m.double()
    with torch.no_grad():
        for i,p in enumerate(m.parameters()): p += by*draw(seed+i, *p.shape)
    return m

def projected(m, q, k): # y of queries and keys, one matrix product at a time
    def y(x, w, b): return torch.stack([x[:,h]@w[h].T + (0 if b is None else b[h]) for h in range(len(w))], 1)
    return y(q, m.w_q, m.b_q), y(k, m.w_k, m.b_k)

def log_oracle(y_q, y_k, causal=True):
    "Weights as softmax over keys of log Σ_f 2cosh(y_q + y_k), log cosh written without overflow."
    y = (y_q[:,:,:,None] + repeat_kv(y_k, y_q.shape[1])[:,:,None]).abs()
    s = (y + (-2*y).exp().log1p()).logsumexp(-1)
    return s.masked_fill(~make_attention_mask(*s.shape[-2:], causal), -torch.inf).softmax(-1)

# --- scalars

@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=15)
@given(**shapes, spread=st.floats(.1,20.))
def test_a_factor_on_a_query_cancels_and_one_on_a_key_reweights(form, seed, Hkv, G, T, D, spread):
    q,k = qk(seed, Hkv, G, T, D)
    phi_q,phi_k,log_k = shaken(Hedgehog(D, Hkv*G, Hkv, form=form), seed)(q, k)
    a = naive_linear_weights(phi_q, phi_k, log_k)
    cq,ck = (spread*draw(seed+9, *x.shape[:3], 1) for x in (q,k))
    same(naive_linear_weights(cq.exp()*phi_q, phi_k, log_k), a)
    want = a.log() + repeat_kv(ck, Hkv*G)[...,0][:,:,None]      # key j gains c_j, rows sum to one again
    want = want.masked_fill(~make_attention_mask(T, T), -torch.inf).softmax(-1)
    same(naive_linear_weights(phi_q, ck.exp()*phi_k, log_k), want)
    same(naive_linear_weights(phi_q, phi_k, ck[...,0] + (0 if log_k is None else log_k)), want) # as a log weight: the same
    if T>1: assert (want-a).abs().max()>0

@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=15)
@given(**shapes)
def test_negating_queries_and_keys_changes_nothing_without_bias(form, seed, Hkv, G, T, D):
    q,k = qk(seed, Hkv, G, max(T,3), D)
    m = shaken(Hedgehog(D, Hkv*G, Hkv, form=form, num_maps=2), seed)
    same(m.weights(-q, -k), m.weights(q, k))
    if form!='softmax_halves' or D>1: assert (m.weights(q, -k)-m.weights(q, k)).abs().max()>1e-6   # one side alone is another matter
    b = shaken(Hedgehog(D, Hkv*G, Hkv, form=form, num_maps=2, bias=True), seed)
    assert (b.weights(-q, -k)-b.weights(q, k)).abs().max()>1e-9

# --- how the forms are related

@settings(max_examples=20)
@given(**shapes, num_maps=st.integers(1,2), bias=st.booleans())
def test_joint_is_exp_of_2W_with_a_log_weight(seed, Hkv, G, T, D, num_maps, bias):
    q,k = qk(seed, Hkv, G, T, D)
    j = shaken(Hedgehog(D, Hkv*G, Hkv, form='softmax_joint', num_maps=num_maps, bias=bias), seed)
    e = Hedgehog(D, Hkv*G, Hkv, form='exp', num_maps=num_maps, bias=bias).double()
    e.load_state_dict({n:2*p for n,p in j.state_dict().items()})
    log_z = (2*(2*projected(j, q, k)[1]).cosh()).sum(-1).log()
    phi_q,phi_k,log_k = e(q, k)
    same(j.weights(q, k), naive_linear_weights(phi_q, phi_k, log_k-log_z))
    phi_q,phi_k,_ = j(q, k)
    same(naive_linear_weights(phi_q, phi_k, log_z), e.weights(q, k))

@settings(max_examples=20)
@given(**shapes)
def test_halves_are_exp_where_their_two_sums_agree(seed, Hkv, G, T, D):
    q,k = (torch.cat([x,-x], -1) for x in qk(seed, Hkv, G, max(T,3), D))
    h,e = (Hedgehog(2*D, Hkv*G, Hkv, form=f, init=1.).double() for f in ('softmax_halves','exp'))
    phi_q,phi_k,none = h(q, k)
    assert none is None
    same(naive_linear_weights(phi_q, phi_k, k.logsumexp(-1)), e.weights(q, k))
    lop = q+torch.linspace(0, 1, 2*D, dtype=F64)**2              # sums that differ: no longer (two channels always agree)
    if D>1: assert (naive_linear_weights(h(lop, k)[0], phi_k, k.logsumexp(-1))-e.weights(lop, k)).abs().max()>1e-6

@settings(max_examples=20)
@given(**shapes, num_maps=st.integers(1,2), bias=st.booleans(), causal=st.booleans())
def test_exp_is_a_sum_of_hyperbolic_cosines(seed, Hkv, G, T, D, num_maps, bias, causal):
    q,k = qk(seed, Hkv, G, T, D)
    m = shaken(Hedgehog(D, Hkv*G, Hkv, form='exp', num_maps=num_maps, bias=bias), seed)
    y_q,y_k = projected(m, q, k)
    u = 2*(y_q[:,:,:,None]+repeat_kv(y_k, Hkv*G)[:,:,None]).cosh().sum(-1)
    want = (u*make_attention_mask(T, T, causal)); want = want/want.sum(-1, keepdim=True)
    same(m.weights(q, k, causal), want); same(naive_exp_weights(y_q, y_k, causal), want)

# --- biases and temperatures

@settings(max_examples=20)
@given(**shapes, share=st.floats(-2.,2.))
def test_only_the_sum_of_the_biases_matters_to_exp(seed, Hkv, G, T, D, share):
    q,k = qk(seed, Hkv, 1, max(T,2), D)
    m = shaken(Hedgehog(D, Hkv, Hkv, form='exp', bias=True), seed)
    a,b = m.weights(q, k),draw(seed+5, *m.b_q.shape)
    with torch.no_grad(): m.b_q += share*b; m.b_k -= share*b
    same(m.weights(q, k), a)
    with torch.no_grad(): m.b_q += b
    assert (m.weights(q, k)-a).abs().max()>1e-9

@settings(max_examples=20)
@given(**shapes, beta=st.floats(-30.,30.))
def test_a_constant_bias_balances_the_halves_of_exp_and_leaves_softmax_halves(seed, Hkv, G, T, D, beta):
    y = draw(seed, 1, Hkv, T, D)
    same(hedgehog_features(y+beta, 'softmax_halves')[0], hedgehog_features(y, 'softmax_halves')[0])
    q,k = qk(seed, Hkv, G, T, D)
    u = math.exp(beta)*(q.exp()@repeat_kv(k, Hkv*G).exp().mT) + math.exp(-beta)*((-q).exp()@(-repeat_kv(k, Hkv*G)).exp().mT)
    want = u.tril(); want = want/want.sum(-1, keepdim=True)
    same(naive_linear_weights(hedgehog_features(q+beta, 'exp')[0], *hedgehog_features(k, 'exp')), want)

@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=15)
@given(**shapes, c=st.floats(.1,4.))
def test_scaling_the_matrix_is_scaling_the_input(form, seed, Hkv, G, T, D, c):
    q,k = qk(seed, Hkv, G, T, D)
    m = shaken(Hedgehog(D, Hkv*G, Hkv, form=form), seed)
    want = m.weights(c*q, c*k)
    with torch.no_grad():
        for p in m.parameters(): p *= c
    same(m.weights(q, k), want)

@settings(max_examples=15)
@given(seed=st.integers(0,10**6), T=st.integers(2,12), D=st.sampled_from([1,3,8]))
def test_from_even_weights_to_the_one_best_direction(seed, T, D):
    q,k = qk(seed, 1, 1, T, D, B=1)
    best = (q[:,:,:,None]+k[:,:,None]).abs().amax(-1)
    cold = recurrent_exp_attention(300*q, 300*k, torch.eye(T, dtype=F64)[None,None])
    want = (300*best).masked_fill(~make_attention_mask(T, T), -torch.inf)
    gap = want.topk(2).values.diff().abs()[0,0,1:,0]>20            # rows with one clear winner
    same(cold.argmax(-1)[0,0,1:][gap].double(), want.argmax(-1)[0,0,1:][gap].double())
    even = make_attention_mask(T, T)/torch.arange(1, T+1)[:,None]
    same(recurrent_exp_attention(1e-6*q, 1e-6*k, torch.eye(T, dtype=F64)[None,None]), even, 1e-8)

@settings(max_examples=15)
@given(seed=st.integers(0,10**6), T=st.integers(1,12), D=st.sampled_from([1,3,8]))
def test_tied_maps_are_symmetric_and_positive(seed, T, D):
    x = qk(seed, 1, 1, T, D)[0]
    f,l = hedgehog_features(x, 'exp')
    f = f*l.exp()[...,None]
    same(f@f.mT, 2*(x[:,:,:,None]+x[:,:,None]).cosh().sum(-1))
    assert torch.linalg.eigvalsh(f@f.mT).min() > -1e-9*(f@f.mT).max()

# --- exact at any size

@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
@settings(max_examples=30)
@given(**shapes, power=st.floats(-3.,3.), causal=st.booleans())
def test_the_exact_form_equals_the_oracle_at_any_size(dtype, seed, Hkv, G, T, D, power, causal):
    """Inputs are what they are after rounding. fp32 exponents carry an absolute error of about size·6e-7, and weights a relative one of that size."""
    q,k = ((10**power*x).to(dtype) for x in qk(seed, Hkv, G, T, D))
    want,tol = log_oracle(q.double(), k.double(), causal), 1e-5+4e-6*10**power
    a = naive_exp_weights(q, k, causal)
    assert a.dtype==torch.float32 and a.isfinite().all()
    same(a, want, tol)
    if not causal: return
    eye = torch.eye(T).expand(2, Hkv, T, T)
    o = recurrent_exp_attention(q, k, eye)
    assert o.isfinite().all()
    same(o, want, tol); same(o.sum(-1), torch.ones(2,Hkv*G,T), 1e-5)

@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
@pytest.mark.parametrize('implementation', ['naive','recurrent','chunked'])
@settings(max_examples=15)
@given(**shapes, power=st.floats(-3.,3.))
def test_one_maximum_per_key_is_exact_while_peaks_meet(dtype, implementation, seed, Hkv, G, T, D, power):
    """Never NaN or infinite, and equal to the oracle in every row whose best product of features is above e⁻⁵⁰; beyond that a row may vanish,
    which `recurrent_exp_attention` exists for."""
    q,k = ((10**power*x).to(dtype) for x in qk(seed, Hkv, G, T, D))
    m = Hedgehog(D, Hkv*G, Hkv, form='exp', init=1.)
    a = linear_attention(q, k, torch.eye(T).expand(2, Hkv, T, T), m, implementation=implementation, chunk_size=5)
    assert a.isfinite().all() and (a>=0).all() and (a.sum(-1)<1+1e-4).all()
    q,k = q.double(),repeat_kv(k.double(), Hkv*G)
    log_u = torch.cat([q,-q], -1)[:,:,:,None]+torch.cat([k,-k], -1)[:,:,None]
    past = log_u.logsumexp(-1).masked_fill(~make_attention_mask(T, T), -torch.inf).amax(-1)   # the best product in the row ...
    top = k.abs().amax(-1).cummax(-1).values                                      # ... in the unit that the state has there
    live = past-q.abs().amax(-1)-top > -50
    same(a[live], log_oracle(q, k)[live], 1e-5+4e-6*10**power)

def test_where_one_maximum_vanishes_one_per_feature_does_not():
    "A query that looks where every key has its valley: +y in the first channel, while the keys' peaks are in the second."
    q = torch.tensor([[100.,0.]]).expand(1,1,3,2)
    k = torch.tensor([[0.,90.],[-1.,90.],[.5,90.]])[None,None]
    want = log_oracle(q.double(), k.double())
    eye = torch.eye(3)[None,None]
    same(recurrent_exp_attention(q, k, eye), want, 1e-5)
    assert want[0,0,-1].max()<.9                                   # all three count
    lost = linear_attention(q, k, eye, Hedgehog(2, form='exp', init=1.), implementation='recurrent')
    assert lost.isfinite().all() and lost.sum(-1).max()<.5

def test_padding_in_the_oracle():
    q,k = qk(3, 2, 2, 7, 4)
    mask = torch.tensor([[0,0,1,1,1,1,1],[1,1,1,1,1,0,0]], dtype=torch.bool)
    m = Hedgehog(4, 4, 2, form='exp', init=1.).double()
    for causal in (True,False): same(naive_exp_weights(q, k, causal, mask), m.weights(q, k, causal, mask))
    assert (naive_exp_weights(q, k, mask=mask)[0,:,:2]==0).all()

# --- gradients

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('num_maps', [1,2])
@pytest.mark.parametrize('causal', [True,False])
def test_gradients_of_inputs_matrices_and_biases(form, num_maps, causal):
    "Numerical against automatic, fp64, grouped heads: four query heads share two key-value heads."
    q,k = qk(5, 2, 2, 4, 3, B=1); v = draw(7, 1, 2, 4, 2)
    m = shaken(Hedgehog(3, 4, 2, form=form, num_maps=num_maps, bias=True))
    names,values = zip(*m.named_parameters())
    def f(q, k, v, *ps): return linear_attention(q, k, v, lambda q,k: torch.func.functional_call(m, dict(zip(names, ps)), (q,k)), causal=causal, chunk_size=3)
    assert torch.autograd.gradcheck(f, [x.detach().clone().requires_grad_() for x in (q,k,v,*values)])

def test_gradients_of_the_exact_form():
    y_q,y_k = qk(5, 2, 2, 4, 3, B=1); v = draw(7, 1, 2, 4, 2)
    xs = [x.requires_grad_() for x in (y_q,y_k,v)]
    assert torch.autograd.gradcheck(recurrent_exp_attention, xs)
    assert torch.autograd.gradcheck(naive_exp_weights, xs[:2])
    got,want = (torch.autograd.grad((f(*xs).sin()).sum(), xs) for f in (recurrent_exp_attention, lambda q,k,v: naive_exp_weights(q, k)@repeat_kv(v, 4)))
    for a,b in zip(got, want): same(a, b)

@settings(max_examples=12)
@given(**shapes)
def test_grouped_heads_are_repeated_heads(seed, Hkv, G, T, D):
    q,k = qk(seed, Hkv, G, T, D); v = draw(seed+2, 2, Hkv, T, 3)
    H = Hkv*G
    same(recurrent_exp_attention(q, k, v), recurrent_exp_attention(q, repeat_kv(k, H), repeat_kv(v, H)))
    for form in FORMS:
        m = shaken(Hedgehog(D, H, Hkv, form=form, bias=True), seed)
        whole = Hedgehog(D, H, H, form=form, bias=True).double()
        whole.load_state_dict({n: p if n.endswith('_q') else p.repeat_interleave(G, 0) for n,p in m.state_dict().items()})
        same(linear_attention(q, k, v, m), linear_attention(q, repeat_kv(k, H), repeat_kv(v, H), whole))

# --- the start, and what is refused

@pytest.mark.parametrize('form', FORMS)
def test_the_start_is_one_kernel_up_to_second_order(form):
    "W_qᵀW_k is a multiple of the identity, for the first map and for the rotations beside it."
    m = Hedgehog(8, 2, 1, form=form, num_maps=3, init=.7)
    p = m.w_q[0].T@m.w_k[0]
    same(p, 3*.7**2*torch.eye(8), 1e-5)
    assert Hedgehog(16, form=form).init==(.5 if form=='exp' else 1.) and m.init==.7
    if form=='exp': assert Hedgehog(16, form=form, scale=.09).init==pytest.approx(.3)

@pytest.mark.parametrize('init', [0, 0., -1, math.inf, math.nan, '1', True, 1j])
def test_a_bad_start_is_refused(init):
    with pytest.raises(ValueError, match=r'positive, finite factor.*given init='): Hedgehog(8, init=init)

@pytest.mark.parametrize('num_maps', [0, -1, 1.5, 2., '2', None, True])
def test_a_bad_number_of_maps_is_refused(num_maps):
    with pytest.raises(ValueError, match='num_maps is a whole number, at least 1; given'): make_feature_map('hedgehog', 8, num_maps=num_maps)

def test_scales_and_shapes_that_do_not_fit_are_refused():
    for scale in (0., -1.):
        with pytest.raises(ValueError, match=f'scale={scale}'): Hedgehog(8, form='exp', scale=scale)
    q,k = qk(0)
    with pytest.raises(ValueError, match='channels'): naive_exp_weights(q[...,:4], k)
    with pytest.raises(ValueError, match='as many queries as keys'): recurrent_exp_attention(q[:,:,:4], k, k)
    with pytest.raises(ValueError, match='same heads and tokens'): recurrent_exp_attention(q, k, k[:,:,:4])
