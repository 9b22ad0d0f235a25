"Metrics of attention: against plain loops in double precision, on known cases, and as a report on whole models."
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from functools import partial
from hedgehog_nb.models.interface import capture_attention
from hedgehog_nb.ops.common import repeat_kv
from hedgehog_nb.ops.softmax import softmax_weights
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.analysis.report import attention_report, METRICS, plot_report
from hedgehog_nb.ops.metrics import (
    attention_entropy, attention_metrics, inverted_pairs, kl_to_softmax, lognormal_fit,
    map_weights, top_p_tokens, monotonicity, valid_pairs, _ranks, spectral_gap, _remove_sink)
from helpers.tiny_models import MODELS, inputs, llama, tokens

PER_ROW = 'entropy','share','sink','entropy_rest','support','tokens90','spearman','inverted','kl'

def qk(B=2, H=4, Hkv=2, T=12, D=6): return torch.randn(B,H,T,D).double(), torch.randn(B,Hkv,T,D).double()

def loop_ranks(x): return [sum(b<a for b in x) + (sum(b==a for b in x)-1)/2 for a in x]

def loop_spearman(x, y):
    x,y = loop_ranks(x),loop_ranks(y); m = (len(x)-1)/2
    d = math.sqrt(sum((a-m)**2 for a in x)*sum((b-m)**2 for b in y))
    return sum((a-m)*(b-m) for a,b in zip(x,y))/d if d else 0.

def loop_row(a, p, s):
    "All metrics of one row, given the numbers of its visible keys only."
    ent = lambda w: -sum(x*math.log(x) for x in w if x>0)
    rest,n,mass,t = sum(a[1:]),len(a),0.,0
    for x in sorted(a, reverse=True):
        if mass>=.9-1e-6: break
        mass += x; t += 1
    h = ent(a)
    return dict(entropy=h, share=h/math.log(n), sink=a[0], entropy_rest=ent([x/rest for x in a[1:]]) if rest>0 else 0., support=math.exp(h),
        tokens90=t, spearman=loop_spearman(a, s), inverted=sum((s[i]-s[j])*(a[i]-a[j])<0 for i in range(n) for j in range(i))/(n*(n-1)/2),
        kl=sum(x*math.log(x/max(y,1e-30)) for x,y in zip(p,a) if x>0))

@settings(max_examples=12)
@given(st.integers(1,2), st.integers(1,2), st.integers(3,9), st.booleans(),
       st.sampled_from([None,'elu','relu','exp','taylor']), st.sampled_from(['none','left','right','holes']), st.integers(1,3))
def test_report_of_a_layer_equals_loops(Hkv, G, T, causal, name, padding, every):
    q,k = qk(2, Hkv*G, Hkv, T)
    fm = name and make_feature_map(name, 6, Hkv*G, Hkv)
    mask = torch.ones(2, T, dtype=torch.bool)
    if padding=='left': mask[1,:T//2] = False
    if padding=='right': mask[1,T-T//2:] = False
    if padding=='holes': mask[0,1] = False
    a,p,s = map_weights(q, k, fm, causal, mask=mask), softmax_weights(q, k, causal, mask=mask), q@repeat_kv(k, Hkv*G).mT
    got = attention_metrics(q, k, fm, causal, mask=mask, every=every, min_keys=2)
    for h in range(Hkv*G):
        rows,seen = [],0
        for b in range(2):
            for i in range((T-1)%every, T, every):
                js = [j for j in range(T) if mask[b,j] and (j<=i or not causal)]
                if not mask[b,i] or len(js)<2: continue
                seen += 1
                if a[b,h,i].sum()>.5: rows.append(loop_row(*(x[b,h,i,js].tolist() for x in (a,p,s))))
        assert got['rows'][h]==len(rows) and abs(got['dead'][h]-(1-len(rows)/seen))<1e-6
        for n in PER_ROW if rows else (): assert got[n][h]==pytest.approx(sum(r[n] for r in rows)/len(rows), abs=1e-9), n

@given(st.lists(st.lists(st.integers(0,4), min_size=7, max_size=7), min_size=1, max_size=4),
       st.lists(st.integers(0,4), min_size=7, max_size=7), st.integers(2,7))
def test_ranks_correlation_and_inversions_with_ties(rows, s, n):
    a,s,ok = torch.tensor(rows).double(), torch.tensor(s).double().expand(len(rows),7), torch.arange(7)<n
    for x,r,m,v in zip(a, _ranks(a, ok), monotonicity(a, s, ok.expand_as(a)), inverted_pairs(a, s, ok.expand_as(a))):
        x,y = x[:n].tolist(),s[0,:n].tolist()
        assert r[:n].tolist()==loop_ranks(x)
        assert m.item()==pytest.approx(loop_spearman(x, y), abs=1e-9)
        assert v.item()==pytest.approx(sum((x[i]-x[j])*(y[i]-y[j])<0 for i in range(n) for j in range(i))/(n*(n-1)/2))

def test_long_rows_of_few_values():
    a,s = torch.randint(0, 9, (3,300)).double(), torch.randint(0, 9, (3,300)).double()
    ds,da = (x[:,:,None]-x[:,None] for x in (s,a))
    want = (ds*da<0).sum((1,2))/(300*299)
    torch.testing.assert_close(inverted_pairs(a, s, torch.ones(3,300, dtype=torch.bool)), want.double(), rtol=0, atol=1e-7)

def test_known_cases():
    ok = valid_pairs(11, 11); n = torch.arange(1,12).double()
    even = ok.double()/n[:,None]
    torch.testing.assert_close(attention_entropy(even)[0,0], n.log())
    torch.testing.assert_close(attention_entropy(even, share=True)[0,0,1:], torch.ones(10).double())
    assert top_p_tokens(even)[0,0].tolist()==[math.ceil(.9*i-1e-6) for i in range(1,12)]
    one = torch.eye(11).double()[None,None]
    assert attention_entropy(one).abs().max()==0 and (top_p_tokens(one)==1).all() and spectral_gap(one)==0
    assert monotonicity(even, torch.randn(1,1,11,11).double()).abs().max()==0  # nothing to rank
    torch.testing.assert_close(kl_to_softmax(one, even)[0,0], n.log())
    assert kl_to_softmax(even, one).max()>50  # a key that is not seen is dear, not infinite
    assert kl_to_softmax(even, one).isfinite().all()

def test_any_increasing_function_is_monotone():
    s = torch.randn(1,2,17,17).double()
    for f in (torch.exp, torch.tanh, lambda x: x**3):
        assert monotonicity(f(s), s)[...,1:].min()>1-1e-12 and inverted_pairs(f(s), s).max()==0
        assert monotonicity(-f(s), s)[...,1:].max()<-1+1e-12 and inverted_pairs(-f(s), s)[...,1:].min()==1

def test_hidden_keys_do_not_count():
    q,k = qk(T=10); mask = torch.ones(2,10, dtype=torch.bool); mask[1,:4] = False
    k2 = k.clone(); k2[1,:,:4] = 1e3
    for causal in (True, False):
        m,m2 = (attention_metrics(q, x, None, causal, mask=mask, min_keys=2) for x in (k,k2))
        for n in m: torch.testing.assert_close(m[n], m2[n], msg=n)

def test_large_scores_stay_monotone():
    q,k = qk(T=64)
    m = attention_metrics((60*q).float(), k.float())
    assert m['spearman'].min()>1-1e-9 and m['inverted'].max()==0

def test_sink_is_the_first_visible_key():
    a = torch.tensor([[0,.9,.1,0],[0,.6,.2,.2]])[None,None]; ok = valid_pairs(2, 4, mask=torch.tensor([[0,1,1,1]]))
    sink,rest = _remove_sink(a, ok)
    torch.testing.assert_close(sink[0,0], torch.tensor([.9,.6])); torch.testing.assert_close(rest[0,0], torch.tensor([[0,0,1,0],[0,0,.5,.5]]))

def test_gap_of_a_padded_batch_is_that_of_its_sequences():
    q,k = qk(T=9); mask = torch.ones(2,9, dtype=torch.bool); mask[1,6:] = False
    for causal in (True, False):
        g = spectral_gap(softmax_weights(q, k, causal, mask=mask))
        alone = spectral_gap(softmax_weights(q[1:,:,:6], k[1:,:,:6], causal))
        torch.testing.assert_close(g[1:], alone)
        want = 1-torch.linalg.eigvals(softmax_weights(q, k, causal, mask=mask)).abs().sort(-1).values[...,-2]
        torch.testing.assert_close(g, want)
    with pytest.raises(ValueError, match='square'): spectral_gap(torch.ones(1,1,2,3))

def test_lognormal_fit_finds_sigma_and_ignores_zeros():
    a = torch.randn(2,3,150,150).mul(torch.tensor([.3,1.,3.])[:,None,None]).softmax(-1); ok = valid_pairs(150, 150, causal=False)
    a[...,5] = 0
    sigma,ks = lognormal_fit(a, ok)
    torch.testing.assert_close(sigma, torch.tensor([.3,1.,3.]), rtol=.02, atol=0); assert ks.max()<.01
    assert lognormal_fit(torch.rand(1,1,150,150), ok)[1]>.1

def test_dead_rows_are_counted_not_averaged():
    q,k = torch.rand(1,1,12,4).double(), torch.rand(1,1,12,4).double(); q[:,:,9:] *= -1
    m = attention_metrics(q, k, make_feature_map('relu', 4))
    assert m['rows'].item()==2 and m['dead'].item()==pytest.approx(3/5) and m['entropy'].item()>1

@pytest.mark.parametrize('arch', MODELS)
def test_every_architecture(arch):
    model = MODELS[arch]()
    r = attention_report(model, inputs(model), feature_map=['elu','hedgehog'])
    assert len(r)==3*4*3 and [x['variant'] for x in r.mean('variant')]==['softmax','elu','hedgehog']
    soft = [x for x in r if x['variant']=='softmax']
    assert all(x['spearman']>1-1e-9 and abs(x['kl'])<1e-9 and x['inverted']==0 for x in soft) and all(x['kl']>0 for x in r if x['variant']!='softmax')
    c = capture_attention(model, **inputs(model))[1]
    torch.testing.assert_close(torch.tensor([x['entropy'] for x in soft[4:8]]).double(), attention_metrics(c.q, c.k, causal=c.causal, scale=c.scale)['entropy'])

def test_converted_model_is_read_with_its_own_maps():
    plain,model = llama(),linearize(llama(), 'hedgehog', layers='1', form='exp')
    with torch.no_grad():
        for m in model.modules():
            if hasattr(m, 'feature_map'): m.feature_map.w_q.mul_(1.7); own = m.feature_map
    ids = tokens(2, 20)
    r = attention_report(model, ids)
    assert [(x['variant'],x['layer']) for x in r.mean('variant','layer')]==[('softmax',0),('softmax',1),('hedgehog',1),('softmax',2)]
    c = capture_attention(plain, input_ids=ids)[1]
    want = attention_metrics(c.q, c.k, own, scale=c.scale)['kl']
    torch.testing.assert_close(torch.tensor([x['kl'] for x in r if x['variant']=='hedgehog']).double(), want.double(), rtol=1e-5, atol=1e-7)
    assert model.config._attn_implementation=='hedgehog'

def test_texts_padding_precision_and_mode():
    model,tok = load_embedded(); model.train()
    texts = ['Once upon a time, there was a little girl named Lily.', 'One day a cat sat on the mat and saw a big dog.']
    both = attention_report(model, texts, tok)
    assert model.training
    alone = [attention_report(model, t, tok) for t in texts]
    for b,x,y in zip(both, *alone):
        assert b['rows']==x['rows']+y['rows']
        for n in ('entropy','spearman','sink'): assert b[n]==pytest.approx((x[n]*x['rows']+y[n]*y['rows'])/b['rows'], abs=1e-4)
    half = attention_report(model.eval().bfloat16(), texts, tok, 'elu').mean('variant')
    assert half[0]['spearman']>1-1e-9 and all(math.isfinite(r[m]) for r in half for m in METRICS)

def test_a_map_by_function_and_figures():
    import matplotlib.pyplot as plt
    model = llama()
    maps = dict(exp2=partial(make_feature_map, 'exp', t=2.), mine=lambda d, h, g, scale: lambda q, k: (q.exp(), k.exp(), None))
    r = attention_report(model, tokens(), feature_map=maps)
    assert '| mine |' in r._repr_markdown_() or 'mine' in repr(r.mean('variant'))
    assert '… and' in repr(r.table(max_rows=3)) and len(r.table(['kl']).header)==4
    assert len(plot_report(r).axes)==3
    plt.close('all')
    with pytest.raises(ValueError, match='spikiness'): plot_report(r, ('spikiness',))

def test_bad_input_says_what_fits():
    model = llama()
    with pytest.raises(ValueError, match='tokenizer'): attention_report(model, ['a text'])
    with pytest.raises(ValueError, match='no feature map is called'): attention_report(model, tokens(), feature_map='elo')
    with pytest.raises(ValueError, match='min_keys'): attention_report(model, tokens(T=4))
    with pytest.raises(ValueError, match='every'): attention_report(model, tokens(), every=0)
    with pytest.raises(ValueError, match='mass'): top_p_tokens(torch.ones(1,1,1,1), 1.5)
