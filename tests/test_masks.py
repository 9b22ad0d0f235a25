"A mask says which tokens are real, in whatever dtype it comes: as in bool, with whatever is not zero taken for True."
import pytest, torch
from hedgehog_nb.functional import linear_attention, window_attention
from hedgehog_nb.kernels.cpu import build
from hedgehog_nb.models.linearize import linearize
from helpers.decoding import left_padded
from helpers.interpreter import other_masks
from helpers.tiny_models import MODELS, shake

DTYPES = [torch.int64, torch.int32, torch.int8, torch.uint8, torch.float64, torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize('dtype', DTYPES)

def heads(seed=0, B=2, T=19, D=8): return torch.randn(5, B, 4, T, D, generator=torch.Generator().manual_seed(seed))

def real(B=2, T=19):
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1))>.3
    mask[0,:4],mask[1,-5:] = False,False
    return mask

@each_dtype
@pytest.mark.parametrize('causal', [True, False], ids=['causal','both ways'])
@pytest.mark.parametrize('implementation', [None,'naive','recurrent','chunked','c'])
def test_linear_attention(implementation, causal, dtype):
    if implementation=='c' and build.library()[0] is None: pytest.skip("there is no C compiler")
    phi_q,phi_k,v = heads()[:3]
    run = lambda mask: linear_attention(phi_q.exp(), phi_k.exp(), v, causal=causal, implementation=implementation, mask=mask)
    assert torch.equal(run(real()), run(real().to(dtype)))

@each_dtype
@pytest.mark.parametrize('implementation', [None,'naive','chunked'])
def test_window_attention(implementation, dtype):
    q,k,v,phi_q,phi_k = heads()
    run = lambda mask: window_attention(q, k, v, phi_q.exp(), phi_k.exp(), 5, mask=mask, implementation=implementation)
    assert torch.equal(run(real()), run(real().to(dtype)))

def test_whatever_is_not_zero_is_true():
    q,k,v,phi_q,phi_k = heads()
    lin = lambda mask: linear_attention(phi_q.exp(), phi_k.exp(), v, mask=mask)
    win = lambda mask: window_attention(q, k, v, phi_q.exp(), phi_k.exp(), 5, mask=mask)
    for mask in other_masks(real()):
        for f in (lin, win): assert torch.equal(f(real()), f(mask)), (mask.dtype, mask.unique())

@each_dtype
@pytest.mark.parametrize('name,kw',
    [(n, kw) for n in ('llama','gpt2','bert') for kw in ({}, dict(attention='elu'), dict(softmax_heads='0:0-1'), dict(layers='1'))]
    + [(n, dict(attention='hedgehog-window', window=4)) for n in ('llama','gpt2')])
@torch.no_grad()
def test_converted_models(name, kw, dtype):
    model,(x,mask) = shake(linearize(MODELS[name](layers=2), **kw)),left_padded([19,11])
    run = lambda mask: model(input_ids=x, attention_mask=mask).logits[mask.bool()]
    assert torch.equal(run(mask.bool()), run(mask.to(dtype)))
