"Softmax attention, the teacher: against PyTorch's own, against loops, and as seen inside a model."
import importlib.util, math, sys
import pytest, torch, transformers
from hypothesis import given, settings, strategies as st
from hedgehog_nb.models.interface import use_attention, capture_attention
from hedgehog_nb.ops.common import autocast_dtype, check_qkv, no_autocast, repeat_kv, make_attention_mask
from hedgehog_nb.ops.softmax import fused_softmax_attention, softmax_attention, softmax_weights
from helpers.tiny_models import MODELS, inputs, llama

def qkv(B=2, H=4, Hkv=2, T=9, D=8, Tq=None, Dv=None, dtype=torch.float64):
    return torch.randn(B,H,Tq or T,D, dtype=dtype), torch.randn(B,Hkv,T,D, dtype=dtype), torch.randn(B,Hkv,T,Dv or D, dtype=dtype)

def loops(q, k, v, causal, scale, mask):
    "Softmax attention, one number at a time."
    B,H,Tq,D = q.shape; Hkv,T = k.shape[1:3]
    o = torch.zeros(B,H,Tq,v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            g = h//(H//Hkv)
            for i in range(Tq):
                js = [j for j in range(T) if (not causal or j<=i+T-Tq) and (mask is None or mask[b,j])]
                if not js: continue
                e = [math.exp(float(q[b,h,i]@k[b,g,j])*(D**-.5 if scale is None else scale)) for j in js]
                o[b,h,i] = sum(w*v[b,g,j] for w,j in zip(e,js))/sum(e)
    return o

@settings(max_examples=25)
@given(st.integers(1,2), st.integers(1,2), st.integers(1,3), st.integers(1,7),
       st.integers(1,5), st.booleans(), st.booleans(), st.sampled_from([None,.3]), st.data())
def test_equals_loops(B, Hkv, G, T, D, causal, masked, scale, data):
    Tq = data.draw(st.integers(1,T))
    q,k,v = qkv(B, Hkv*G, Hkv, T, D, Tq, Dv=3)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=B, max_size=B))) if masked else None
    want = loops(q, k, v, causal, scale, mask)
    torch.testing.assert_close(softmax_attention(q, k, v, causal, scale, mask), want, atol=1e-12, rtol=1e-10)
    fused = fused_softmax_attention(q, k, v, causal, scale, mask)
    seen = make_attention_mask(Tq, T, causal, mask).any(-1)[...,None].expand_as(want)  # rows that see nothing are free
    torch.testing.assert_close(fused[seen], want[seen], atol=1e-12, rtol=1e-10)
    assert fused.isfinite().all()

def test_rows_sum_to_one_or_to_nothing():
    q,k,v = qkv()
    mask = torch.ones(2,9, dtype=torch.bool); mask[0,:3] = False
    a = softmax_weights(q, k, mask=mask)
    assert (a[0,:,:3]==0).all() and (a[0,:,:,:3]==0).all()
    torch.testing.assert_close(a[0,:,3:].sum(-1), torch.ones(4,6, dtype=a.dtype))
    torch.testing.assert_close(a[1].sum(-1), torch.ones(4,9, dtype=a.dtype))
    o,w = softmax_attention(q, k, v, mask=mask, return_weights=True)
    assert torch.equal(a, w) and (o[0,:,:3]==0).all()

@pytest.mark.parametrize('window', [0,-3])
def test_fused_window_holds_at_least_the_token(window):
    q = torch.randn(1,2,5,8)
    with pytest.raises(ValueError, match=f'given {window}'): fused_softmax_attention(q, q, q, window=window)

def test_fused_window_counts_the_query_itself():
    q,k,v = qkv(H=2)
    i,j = torch.arange(9)[:,None], torch.arange(9)
    for window in (1,3,9,20):
        s = (q@k.mT*8**-.5).masked_fill(~((j<=i)&(j>i-window)), -torch.inf)
        torch.testing.assert_close(fused_softmax_attention(q, k, v, window=window), s.softmax(-1)@v)
        s = (q@k.mT*8**-.5).masked_fill((j-i).abs()>=window, -torch.inf)
        torch.testing.assert_close(fused_softmax_attention(q, k, v, causal=False, window=window), s.softmax(-1)@v)

@pytest.mark.parametrize('dtype,tol', [(torch.bfloat16,2e-2), (torch.float16,2e-3), (torch.float32,1e-5)])
def test_low_precision(dtype, tol):
    q,k,v = (x.to(dtype) for x in qkv())
    o = softmax_attention(q, k, v)
    assert o.dtype==dtype
    torch.testing.assert_close(o.double(), softmax_attention(q.double(), k.double(), v.double()), atol=tol, rtol=tol)
    assert softmax_weights(q, k).dtype==torch.float32

@pytest.mark.parametrize('scale', [1e-3,1.,1e3])
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16,torch.float16])
def test_no_overflow(scale, dtype):
    q,k,v = ((x*scale).to(dtype) for x in qkv(dtype=torch.float32))
    assert softmax_attention(q, k, v).isfinite().all()

def test_repeat_kv_gives_each_group_its_own_head():
    x = torch.arange(3.)[None,:,None,None]
    assert repeat_kv(x, 6).flatten().tolist()==[0,0,1,1,2,2]
    assert repeat_kv(x, 3) is x
    with pytest.raises(ValueError, match='3.*4|4.*3'): repeat_kv(x, 4)

def test_causal_queries_are_the_last_positions():
    assert make_attention_mask(2, 4).long().tolist()==[[[[1,1,1,0],[1,1,1,1]]]]
    q,k,v = qkv(T=7)
    torch.testing.assert_close(softmax_attention(q[:,:,-3:], k, v), softmax_attention(q, k, v)[:,:,-3:])

BAD = dict(three_dims=lambda q,k,v: (q[0],k,v), batch=lambda q,k,v: (q[:1],k,v), channels=lambda q,k,v: (q[...,:4],k,v), heads_kv=lambda q,k,v: (q,k,v[:,:1]),
    tokens_kv=lambda q,k,v: (q,k,v[:,:,1:]), group=lambda q,k,v: (q[:,:3],k,v), empty=lambda q,k,v: (q[:,:,:0],k[:,:,:0],v[:,:,:0]),
    whole=lambda q,k,v: (q.long(),k,v), mask=lambda q,k,v: (q,k,v,torch.ones(2,8)), device=lambda q,k,v: (q,k.to('meta'),v))

@pytest.mark.parametrize('what', BAD)
def test_what_does_not_fit_is_refused(what):
    args = BAD[what](*qkv())
    with pytest.raises(ValueError) as e: check_qkv(*args)
    assert any(c.isdigit() or c in "meta" for c in str(e.value))
    mask = args[3] if len(args)>3 else None
    for f in (softmax_attention, fused_softmax_attention):
        with pytest.raises(ValueError): f(*args[:3], mask=mask)

@pytest.mark.parametrize('name', MODELS)
def test_capture_sees_every_layer(name):
    model = MODELS[name](layers=2)
    before = model.config._attn_implementation
    calls = capture_attention(model, **inputs(model))
    assert model.config._attn_implementation==before
    assert len(calls)==2 and len({c.name for c in calls})==2
    for c in calls:
        assert dict(model.named_modules())[c.name] is c.module
        assert c.q.shape[1]==4 and c.k.shape[1]==(2 if name=='llama' else 4) and c.q.shape[-1]==8
        assert c.scale==pytest.approx(8**-.5) and c.causal==(name in ('llama','gpt2'))

@pytest.mark.parametrize('name', MODELS)
def test_the_oracle_inside_a_model_is_the_model(name):
    model = MODELS[name](layers=2).double()
    x = inputs(model)
    def fn(module, q, k, v, attention_mask, scaling=None, **kw):
        return softmax_attention(q, k, v, name in ('llama','gpt2'), scaling).transpose(1,2), None
    want = model(**x).logits
    with use_attention(model, fn): got = model(**x).logits
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)

def test_attention_as_gives_back_what_it_borrowed():
    model = llama(layers=1)
    before,x = model.config._attn_implementation, inputs(model)
    want = model(**x).logits
    def fail(*args, **kw): raise RuntimeError('inside')
    with pytest.raises(RuntimeError, match='inside'):
        with use_attention(model, fail): model(**x)
    assert model.config._attn_implementation==before and torch.equal(model(**x).logits, want)

def test_parts_with_a_config_of_their_own_are_reached_and_given_back():
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, d_model=32, num_heads=4, num_layers=1, d_kv=8, d_ff=48)).eval()
    model.encoder.config._attn_implementation = 'eager' # T5's encoder and decoder have copies of the config
    x = dict(input_ids=torch.tensor([[1,2,3]]), decoder_input_ids=torch.tensor([[1,2]]))
    want,seen = model(**x).logits,[]
    def fn(module, q, k, v, attention_mask, scaling=None, position_bias=None, **kw):
        seen.append(module)
        weights = (q@k.mT*scaling + (0 if position_bias is None else position_bias)).softmax(-1)
        return (weights@v).transpose(1,2), None
    with use_attention(model, fn), torch.no_grad(): got = model(**x).logits
    assert len(seen)==3 and seen[0] in set(model.encoder.modules()) # self-attention of both, and the decoder's look at the encoder
    assert [m.config._attn_implementation for m in (model, model.encoder, model.decoder)]==['sdpa','eager','sdpa']
    assert torch.equal(model(**x).logits, want)


# ---- autocast, asked in a way that torch.compile can trace in every version

@pytest.mark.parametrize('enabled', [False, True])
def test_full_precision_compiles_into_one_graph(enabled):
    f = no_autocast(lambda x: x@x.mT)
    x = torch.randn(3, 5)
    with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
        y = torch.compile(f, fullgraph=True, backend='eager')(x)
        assert autocast_dtype(x) == (torch.bfloat16 if enabled else None)
    assert y.dtype == torch.float32 and torch.equal(y, x@x.mT)

def test_autocast_dtype_is_none_where_a_device_has_no_autocast():
    x = torch.zeros(2, 2, device='meta')
    with torch.autocast('cpu', torch.bfloat16): assert autocast_dtype(x) is None and no_autocast(lambda x: x+1)(x).is_meta

def test_second_copy_of_the_module():
    "A notebook that exports the module has its functions twice in one process: both see what a model is given, in turn."
    spec = importlib.util.spec_from_file_location('interface_again', sys.modules[capture_attention.__module__].__file__)
    again = importlib.util.module_from_spec(spec); spec.loader.exec_module(again)
    model = llama()
    n = [len(f(model, **inputs(model))) for f in (capture_attention, again.capture_attention, capture_attention, again.capture_attention)]
    assert n[0] and n == n[:1]*4
