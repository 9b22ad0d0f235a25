"Every registered attention: gradients, signs, causality, padding, grouped heads, sizes from 1e-3 to 1e3, and the errors that say what fits."
import itertools, math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from hedgehog_nb.ops.common import repeat_kv
from hedgehog_nb.ops.softmax import softmax_weights
from hedgehog_nb.attentions.base import ATTENTIONS, FEATURE_MAPS, FeatureMap, make_attention, make_feature_map, register_attention
from hedgehog_nb.attentions.baselines import _orthogonal_gaussian, _repeats, Taylor
from hedgehog_nb.functional import linear_attention
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.ops.metrics import lognormal_fit
from helpers.tiny_models import llama, tokens

SETTINGS = [(n,{}) for n in sorted(ATTENTIONS)] + [('exp',dict(t=2.)), ('taylor',dict(order=1)), ('taylor',dict(order=4)),
    ('fast',dict(order=4)), ('performer',dict(num_features=5)), ('rfa',dict(num_features=3)), ('cosformer',dict(max_len=64)),
    ('linformer',dict(rank=4, max_len=32)), ('latte',dict(num_latents=3)), ('transnormer',dict(decay=False)),
    *[('hedgehog',dict(form=f, num_maps=2, bias=True)) for f in ('exp','softmax_halves','softmax_joint')]]
CASES = [(n,kw,c) for n,kw in SETTINGS for c in ATTENTIONS[n].directions]
ids = lambda v: v if isinstance(v,str) else 'causal' if v is True else 'both' if v is False else '-'.join(f'{k}={x}' for k,x in v.items()) or 'plain'
every = pytest.mark.parametrize('name,kw,causal', CASES, ids=ids)

def qkv(B=2, H=4, Hkv=2, T=11, D=5, Dv=3, dtype=torch.float64): return (torch.randn(B,h,T,d, dtype=dtype) for h,d in ((H,D),(Hkv,D),(Hkv,Dv)))

def shaken(name, D=5, H=4, Hkv=2, by=.1, **kw):
    "An attention in fp64 with its parameters moved off their start."
    m = make_attention(name, D, H, Hkv, **kw).double()
    with torch.no_grad():
        for p in m.parameters(): p += by*torch.randn_like(p)
    return m

def same(a, b, tol=1e-9): torch.testing.assert_close(a.double(), b.double(), atol=tol, rtol=tol)


class Call(torch.nn.Module):
    "An attention as a function of tensors, for `functional_call`."
    def __init__(self, m, causal): super().__init__(); self.m,self.causal = m,causal
    def forward(self, q, k, v): return self.m.attend(q, k, v, self.causal)

@every
def test_gradients_are_those_of_differences(name, kw, causal):
    if name=='linformer': kw = dict(rank=4, max_len=8) | kw # 5 tokens read 5 of the 256 rows of its projections
    call,(q,k,v) = Call(shaken(name, 3, 2, 1, **kw), causal), qkv(1, 2, 1, 5, 3, 2)
    names,params = zip(*call.named_parameters()) if list(call.parameters()) else ((),())
    f = lambda q,k,v,*ps: torch.func.functional_call(call, dict(zip(names, ps)), (q,k,v))
    assert torch.autograd.gradcheck(f, [x.detach().clone().requires_grad_() for x in (q,k,v,*params)], eps=1e-6, atol=1e-5)

@every
def test_weights_are_what_attend_applies(name, kw, causal):
    m,(q,k,v) = shaken(name, **kw), qkv()
    a = m.weights(q, k, causal)
    assert a.shape==(2,4,11,11)
    o = a@repeat_kv(v, 4)
    same(m.attend(q, k, v, causal), F.rms_norm(o, o.shape[-1:]) if name=='transnormer' else o)

@every
def test_signs_and_sums(name, kw, causal):
    m,(q,k,_) = make_attention(name, 5, 4, 2, **kw).double(), qkv(T=30)
    a = m.weights(3*q, 3*k, causal)
    if m.positive: assert (a>=-1e-12).all()
    if name not in ('flowformer','linformer'): # those two give rows their own weight
        s = a.sum(-1)
        assert ((s-1).abs()<1e-8).logical_or((a==0).all(-1)).all()

def test_maps_called_positive_are_and_the_others_are_not():
    torch.manual_seed(1)
    q,k,_ = qkv(T=60)
    for name,kw in SETTINGS:
        if (m := make_attention(name, 5, 4, 2, **kw).double()).positive or name=='linformer': continue
        phi_q,phi_k,_ = m(4*q, 4*k)
        assert (phi_q@repeat_kv(phi_k, 4).mT).min()<0, f"{name} {kw} says its weights may be negative: show one"

@pytest.mark.parametrize('name,kw', [c[:2] for c in CASES if c[2]], ids=ids)
def test_causal(name, kw):
    "Changing token t changes no output before t, and does change t."
    m,(q,k,v) = shaken(name, **kw), qkv(T=23)
    o = m.attend(q, k, v)
    for t in (0, 7, 15, 16, 22):
        q2,k2,v2 = q.clone(),k.clone(),v.clone()
        for x in (q2,k2,v2): x[:,:,t] += 1.
        o2 = m.attend(q2, k2, v2)
        same(o2[:,:,:t], o[:,:,:t], 1e-12)
        assert (o2[:,:,t]-o[:,:,t]).abs().max()>1e-6
        same(m.attend(q[:,:,:t+1], k[:,:,:t+1], v[:,:,:t+1]), o[:,:,:t+1])

@every
@settings(max_examples=5)
@given(st.integers(1,2), st.integers(1,3), st.integers(1,20), st.sampled_from([1,2,6]), st.integers(0,9), st.integers(0,9), st.integers(0,2**16))
def test_padding_is_not_there(name, kw, causal, Hkv, G, T, D, left, right, seed):
    "Padded on both sides with garbage = not padded; rows of padding are finite."
    torch.manual_seed(seed)
    if name=='linformer' and left: left = 0  # its mixtures are by place
    if name=='linformer' and not kw: kw = dict(max_len=64)
    m,(q,k,v) = shaken(name, D, Hkv*G, Hkv, **kw), qkv(1, Hkv*G, Hkv, T, D)
    pad = lambda x: F.pad(x, (0,0,left,right), value=7.)
    mask = F.pad(torch.ones(1, T, dtype=torch.bool), (left,right))
    o = m.attend(pad(q), pad(k), pad(v), causal, mask)
    assert o.isfinite().all()
    if name=='linformer': return  # softmax over mixtures counts those of padding too: finite is all it promises
    same(o[:,:,left:left+T], m.attend(q, k, v, causal), 1e-7)

@every
def test_masks_of_any_dtype(name, kw, causal):
    m,(q,k,v),real = shaken(name, **kw),qkv(),torch.rand(2, 11)<.7
    o = m.attend(q, k, v, causal, real)
    for mask in (real*256, real*-1, real.to(torch.uint8)*2, real*.5, real*256.):
        assert torch.equal(o, m.attend(q, k, v, causal, mask)), (mask.dtype, mask.unique())

@every
@pytest.mark.parametrize('size', [1e-3,1.,1e3])
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
def test_no_nan_or_inf(name, kw, causal, dtype, size):
    m = make_attention(name, 8, 4, 2, **kw)
    q,k,v = ((s*x).to(dtype).requires_grad_() for s,x in zip((size,size,1), qkv(T=19, D=8, dtype=torch.float32)))
    o = m.attend(q, k, v, causal)
    assert o.dtype==dtype
    if m.positive or name=='linformer': assert o.isfinite().all() # a sum of signed weights may be near zero
    grads = torch.autograd.grad(o.float().square().sum(), [q,k,v,*m.parameters()], allow_unused=True)
    if m.positive or name=='linformer': assert all(g is None or g.float().isfinite().all() for g in grads)

@settings(max_examples=60)
@given(st.sampled_from([c for c in CASES if make_attention(c[0], 6, **c[1]).positive]), st.floats(-3,3), st.floats(-3,3),
       st.integers(1,40), st.sampled_from([torch.float32,torch.bfloat16,torch.float16]), st.integers(0,2**16))
def test_any_size_any_length_stays_finite(case, a, b, T, dtype, seed):
    name,kw,causal = case
    torch.manual_seed(seed)
    m = make_attention(name, 6, 2, 1, **kw | (dict(max_len=64) if 'max_len' in kw else {}))
    q,k,v = ((s*x).to(dtype) for s,x in zip((10**a,10**b,1), qkv(1, 2, 1, T, 6, dtype=torch.float32)))
    o = m.attend(q, k, v, causal)
    assert o.isfinite().all() and o.abs().max()<=(v.abs().max()*1.02+1e-2 if name not in ('transnormer','flowformer') else 1e3)

@every
def test_low_precision_follows_fp64(name, kw, causal):
    "Inputs in bf16 are what rounding made of them; computed in fp32, the output is within bf16's own rounding of fp64's."
    m = make_attention(name, 8, 4, 2, **kw)
    q,k,v = (x.to(torch.bfloat16) for x in qkv(T=17, D=8))
    want = make_attention(name, 8, 4, 2, **kw).double().attend(q.double(), k.double(), v.double(), causal)
    if not m.positive and name!='linformer':
        want,got = (make_attention(name, 8, 4, 2, **kw).to(d).weights(q.to(d), k.to(d), causal) for d in (torch.float64,torch.float32))
        return same(got, want, 2e-2)
    same(m.attend(q, k, v, causal), want, 2e-2)

# --- feature maps in particular

@pytest.mark.parametrize('name,kw', [s for s in SETTINGS if s[0] in FEATURE_MAPS], ids=ids)
def test_halves_with_a_state_are_the_whole(name, kw):
    m,(q,k,v) = shaken(name, **kw), qkv(T=23)
    want = linear_attention(q, k, v, m, implementation='naive')
    for impl in ('recurrent','chunked'): same(linear_attention(q, k, v, m, implementation=impl, chunk_size=5), want, 1e-8)
    o,s = linear_attention(q[:,:,:9], k[:,:,:9], v[:,:,:9], m, output_final_state=True)
    same(torch.cat([o, linear_attention(q[:,:,9:], k[:,:,9:], v[:,:,9:], m, initial_state=s, offset=9)], 2), want, 1e-8)

@pytest.mark.parametrize('name', ['cosformer','performer','rfa','taylor','lognormal'])
def test_converted_model_generates_what_its_forward_says(name, tmp_path):
    from hedgehog_nb.models.loading import load_linearized, save_linearized
    model = linearize(llama().double(), name, **dict(cosformer=dict(max_len=64)).get(name, {}))
    x = tokens(2, 12)
    out = model.generate(input_ids=x, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for t in range(12, 20): assert torch.equal(out[:,t], model(input_ids=out[:,:t], use_cache=False).logits[:,-1].argmax(-1))
    for n,b in model.named_buffers():
        if n.endswith('omega'): b.mul_(1.5)  # a draw that no seed gives: it must come from the file
    save_linearized(model, tmp_path/'m')
    same(load_linearized(tmp_path/'m', dtype=torch.float64)(input_ids=x).logits, model(input_ids=x).logits)

def test_taylor_keeps_each_monomial_once():
    for D,p in ((1,3), (3,2), (4,4)):
        m,x,y = make_attention('taylor', D, order=p, scale=1.).double(), *torch.randn(2,D, dtype=torch.float64)
        (f,l),(g,n) = m._expand(x), m._expand(y)
        combs = [c for n in range(p+1) for c in itertools.combinations_with_replacement(range(D), n)]
        assert len(combs)==len({*combs})==len(_repeats(D, p))==math.comb(D+p, p)==m.feature_dim==len(f)
        same(f*l.exp(), torch.stack([math.prod(x[i] for i in c)*_repeats(D, p)[j].double().rsqrt() for j,c in enumerate(combs)])) # in this order
        same((f@g)*(l+n).exp(), sum((x@y)**i/math.factorial(i) for i in range(p+1)))

@pytest.mark.parametrize('name,kw', [('taylor',{}), ('taylor',dict(order=1)), ('taylor',dict(order=4)), ('fast',{})], ids=ids)
@pytest.mark.parametrize('Hkv', [4, 2, 1])
@pytest.mark.parametrize('causal,masked', [(True,False), (True,True), (False,False), (False,True)])
def test_weights_from_scores(name, kw, Hkv, causal, masked):
    "Without features: the oracle in fp64, its gradients too, within fp32's rounding."
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(2, h, 12, 8, generator=g) for h in (4, Hkv, Hkv)]
    m,mask = make_attention(name, 8, 4, Hkv, **kw),torch.rand(2, 12, generator=g)>.3 if masked else None
    if mask is not None: mask[1] = False # rows that see nothing
    def go(dt, implementation):
        leaves = [t.to(dt).requires_grad_() for t in x]
        o = linear_attention(*leaves, m, causal=causal, mask=mask, implementation=implementation)
        return o, *torch.autograd.grad(o.sin().sum(), leaves)
    for a,b,c in zip(go(torch.float32, 'scores'), go(torch.float64, 'naive'), go(torch.float64, 'scores')):
        if m.positive: assert (a-b).abs().max()<2e-5*b.abs().max() # a sum that may be near 0 loses digits in either form
        same(c, b)

def test_scores_are_chosen_by_length(monkeypatch):
    m,x = make_attention('taylor', 16, 2),lambda T: torch.randn(3, 1, 2, T, 16) # 153 features
    calls = []
    monkeypatch.setattr(Taylor, 'score_weights', lambda self, *a, f=Taylor.score_weights: calls.append(1) or f(self, *a))
    def taken(T, **kw): calls.clear(); linear_attention(*x(T), m, **kw); return bool(calls)
    assert taken(12) and taken(38) and taken(12, causal=False) and not taken(39)
    assert not taken(12, output_final_state=True) and not taken(12, cu_seqlens=[0,5,12]) and not taken(12, chunk_size=4)
    _,state = linear_attention(*x(12), m, output_final_state=True)
    assert not taken(12, initial_state=state)
    handle = m.register_forward_hook(lambda *a: None)
    assert not taken(12); handle.remove()
    for kw in (dict(output_final_state=True), dict(cu_seqlens=[0,5,12])):
        with pytest.raises(ValueError): linear_attention(*x(12), m, implementation='scores', **kw)
    with pytest.raises(ValueError, match='score_weights'): linear_attention(*x(12), make_attention('elu', 16, 2), implementation='scores')

@pytest.mark.parametrize('size', [1e-6, 1., 1e3, 1e8])
def test_scores_of_any_size(size):
    m,(q,k,v) = make_attention('taylor', 8, 2),torch.randn(3, 1, 2, 12, 8)
    o = linear_attention(size*q, size*k, v, m, implementation='scores')
    want = linear_attention(size*q.double(), size*k.double(), v.double(), m, implementation='naive')
    assert o.isfinite().all() and (o-want).abs().max()<1e-4*want.abs().max()

def test_fast_standardises():
    q,k,_ = qkv()
    norm = lambda x: (x-x.mean(-1, keepdim=True))/(x.var(-1, keepdim=True, correction=0)+1e-5).sqrt()
    same(make_attention('fast', 5, 4, 2).double().weights(q, k), make_attention('taylor', 5, 4, 2).double().weights(norm(q), norm(k)))

def test_directions_are_orthogonal_and_gaussian():
    w = _orthogonal_gaussian(4096, 16, seed=3).view(256,16,16)
    g = w@w.mT
    assert (g-torch.diag_embed(g.diagonal(dim1=1, dim2=2))).abs().max()<1e-3
    w = w.flatten(0,1)
    assert w.mean(0).abs().max()<.1 and (w.T@w/4096-torch.eye(16)).abs().max()<.1 and abs(w.norm(dim=-1).var()/(16-w.norm(dim=-1).mean()**2)-1)<.3
    assert (torch.equal(_orthogonal_gaussian(5, 3, 1), _orthogonal_gaussian(5, 3, 1))
            and not torch.equal(_orthogonal_gaussian(5, 3, 1), _orthogonal_gaussian(5, 3, 2)))

def test_performer_has_no_bias_and_redraws():
    "The mean over many draws of one pair's kernel is exp(q·k)."
    m = make_attention('performer', 4, num_features=64, scale=1.).double()
    q,k = (.6*torch.randn(1,1,1,4, dtype=torch.float64) for _ in range(2))
    est = []
    for seed in range(400):
        m.redraw(seed)
        qq = m._along(q, m.omega); phi_k,l = m.map_k(k)
        est.append(((qq-q.square().sum(-1, keepdim=True)/2).exp()*phi_k*l.exp()[...,None]).mean().item())
    est = torch.tensor(est)
    assert abs(est.mean()-(q*k).sum().exp())<4*est.std()/20
    m.redraw(7); a = m.omega.clone(); m.redraw(8); assert not torch.equal(a, m.omega)
    m.redraw(7); assert torch.equal(a, m.omega)

def test_lognormal_matches_the_deviation():
    q,k,_ = qkv(T=64, D=16)
    m = make_feature_map('lognormal', 16, 4, 2).double().match(2*q, k)
    sigma = lambda a: lognormal_fit(a)[0].view(2,2).mean(1)
    same(sigma(m.weights(2*q, k)), sigma(softmax_weights(2*q, k)), 1e-3)

def test_cosformer_by_hand():
    q,k,_ = qkv(T=9)
    i = torch.arange(9.)
    a = F.relu(q)@repeat_kv(F.relu(k), 4).mT*torch.cos(math.pi/2*(i[:,None]-i)/12).double()
    a = a.tril(); a = a/a.sum(-1, keepdim=True).clamp_min(1e-30)
    same(make_attention('cosformer', 5, 4, 2, max_len=12).double().weights(q, k), a, 1e-6)

# --- the others

def test_flowformer_conserves_and_flows_by_hand():
    "The published equations with plain sums, both directions."
    q,k,v = qkv(1, 1, 1, 7, 4, 3); p,s = q[0,0].sigmoid(),k[0,0].sigmoid()
    n = torch.arange(1., 8).double()
    I,O = (p*s.sum(0)).sum(-1),(s*p.sum(0)).sum(-1)
    A = (p*(s/O[:,None]).sum(0)).sum(-1).sigmoid(); C = ((s*(p/I[:,None]).sum(0)).sum(-1)).softmax(0)*7
    same(make_attention('flowformer', 4).attend(q, k, v, causal=False)[0,0], A[:,None]*(p/I[:,None])@(s.T@(C[:,None]*v[0,0])))
    I,O = (p*s.cumsum(0)).sum(-1)/n,(s*p.cumsum(0)).sum(-1)/n
    A = ((p*(s/O[:,None]).cumsum(0)).sum(-1)/n).sigmoid(); C = ((s*(p/I[:,None]).cumsum(0)).sum(-1)/n).clamp(-1,1).exp(); C = C/C.cumsum(0)*n
    want = A[:,None]*((p/(I*n)[:,None]@s.T).tril()@(C[:,None]*v[0,0]))
    same(make_attention('flowformer', 4).attend(q, k, v)[0,0], want)

def test_transnormer_is_the_plain_decayed_sum_normed():
    q,k,v = qkv(T=13)
    m = make_attention('transnormer', 5, 4, 2).double()
    i = torch.arange(13.).double()
    fade = (-repeat_kv(m.slope[None], 4)[0][:,None,None]*(i[:,None]-i)).exp().tril()
    o = ((1+F.elu(q))@repeat_kv(1+F.elu(k), 4).mT*fade)@repeat_kv(v, 4)
    same(m.attend(q, k, v), F.rms_norm(o, (3,)), 1e-6)

def test_latte_is_a_mixture_over_latents():
    q,k,v = qkv(T=40)
    m = shaken('latte', num_latents=3)
    p,y = torch.einsum('bhtd,hld->bhtl', q, m.w_q).softmax(-1), repeat_kv(torch.einsum('bhtd,hld->bhtl', k, m.w_k), 4)
    per_latent = torch.stack([softmax_weights(torch.ones_like(q[...,:1]), y[...,l:l+1], scale=1.) for l in range(3)], -1)
    same(m.weights(q, k), (p[:,:,:,None]*per_latent).sum(-1))
    m2 = torch.einsum('bhtl,bhsl->bhts', p, y.softmax(2))
    same(m.weights(q, k, causal=False), m2)

# --- the registry

def test_your_own():
    @register_attention('cube')
    class Cube(FeatureMap):
        "φ(x) = x³"
        def phi(self, x): return x**3
    try:
        assert make_feature_map('cube', 4).name=='cube' and 'cube' in ATTENTIONS and 'cube' in FEATURE_MAPS
        assert linearize(llama(), 'cube').config.hedgehog['attention']=='cube'
    finally: del ATTENTIONS['cube'], FEATURE_MAPS['cube']

@pytest.mark.parametrize('make,says', [
    (lambda: make_attention('hedghog', 8), 'there are .*hedgehog'), (lambda: make_feature_map('latte', 8), 'not of the form'),
    (lambda: make_feature_map('nope', 8), 'no feature map'), (lambda: make_attention('elu', 8, t=1), 'takes no settings|no settings'),
    (lambda: make_attention('taylor', 8, order=0), 'order.*0'), (lambda: make_attention('performer', 8, num_features=0), 'num_features.*0'),
    (lambda: make_attention('cosformer', 8, max_len=0), 'max_len.*0'), (lambda: make_attention('linformer', 8, rank=300), 'rank=300'),
    (lambda: make_attention('latte', 8, num_latents=0), 'num_latents.*0'),
    (lambda: make_attention('softmax', 8, 4, 3), '3.*4'), (lambda: linearize(llama(), 'linformer'), 'keeps no state')])
def test_bad_settings(make, says):
    with pytest.raises(ValueError, match=says): make()

@pytest.mark.parametrize('name', sorted(ATTENTIONS))
def test_bad_input(name):
    m,(q,k,v) = make_attention(name, 5, 4, 2),qkv(dtype=torch.float32)
    c = m.directions[0]
    with pytest.raises(ValueError, match='head_dim 5'): m.attend(q[...,:4], k[...,:4], v, c)
    with pytest.raises(ValueError, match='4 heads'): m.attend(q[:,:2], k, v, c)
    with pytest.raises(ValueError, match='mask'): m.attend(q, k, v, c, mask=torch.ones(2,5))
    with pytest.raises(ValueError, match='batch'): m.attend(q[:1], k, v, c)
    with pytest.raises(ValueError, match='empty'): m.attend(q[:,:,:0], k, v, c)
    if len(m.directions)==1:
        with pytest.raises(ValueError, match=f'only; given causal={not c}'): m.attend(q, k, v, not c)
    with pytest.raises(ValueError, match='head_dim 5'): m.weights(q[...,:4], k[...,:4], c)

def test_positions_are_asked_for():
    q,k,v = qkv(T=9, dtype=torch.float32)
    m = make_attention('cosformer', 5, 4, 2)
    _,s = linear_attention(q, k, v, m, output_final_state=True)
    with pytest.raises(ValueError, match='give `offset`'): linear_attention(q, k, v, m, initial_state=s)

@pytest.mark.parametrize('name', ['cosformer','linformer'])
def test_made_for_a_length(name):
    m,(q,k,v) = make_attention(name, 5, 4, 2, **dict(cosformer=dict(max_len=8), linformer=dict(max_len=8, rank=2))[name]), qkv(T=9, dtype=torch.float32)
    with pytest.raises(ValueError, match='8 tokens; given 9'): m.attend(q, k, v, m.directions[0])

@pytest.mark.parametrize('name,kw', [s for s in SETTINGS if s[0] in FEATURE_MAPS and s[0] not in ('fast',)], ids=ids)
def test_both_log_weights_give_back_the_kernel(name, kw):
    "φ(q)·φ(k) times what was taken out on either side follows the kernel when a query is moved: no scalar of the query is lost."
    m,(q,k,_) = shaken(name, **kw), qkv(T=7)
    u = lambda q: (lambda pq,pk,l: (pq@repeat_kv(pk, 4).mT)*(0 if l is None else repeat_kv(l, 4))[:,:,None].exp()
        if l is not None else pq@repeat_kv(pk, 4).mT)(*m(q, k))
    lq = m.log_q(q)
    known = {'exp': lambda: torch.einsum('bhtd,bhsd->bhts', (m.t*q).exp(), (m.t*repeat_kv(k, 4)).exp()),
        'taylor': lambda: sum((q@repeat_kv(k, 4).mT*m.scale)**n/math.factorial(n) for n in range(m.order+1)),
        'elu': lambda: (1+F.elu(q))@(1+F.elu(repeat_kv(k, 4))).mT, 'lognormal': lambda: (m.alpha*q).exp()@repeat_kv((m.beta*k).exp(), 4).mT}
    if name in known: same(u(q)*(1 if lq is None else lq[...,None].exp()), known[name]())
    assert lq is None or lq.shape==(2,4,7)
