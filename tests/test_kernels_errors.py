"""One rule for inputs that do not fit, in every public function of the kernels: a `ValueError` that says what was given. Empty inputs are among them."""
import pytest, torch
from hedgehog_nb import linear_attention
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.linear import LinearState
from helpers.interpreter import DEVICE, HERE, kernel, under_the_interpreter

if HERE:
    from hedgehog_nb.kernels.chunk_fwd import chunk_forward
    from hedgehog_nb.kernels.chunk_bwd import triton_linear_attention
    from hedgehog_nb.kernels.decode import decode_step
    from hedgehog_nb.kernels.feature_map import fused_feature_map
    from hedgehog_nb.kernels.fused import fused_hedgehog_attention
    from hedgehog_nb.kernels.window import triton_window_attention
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def rand(*s): return torch.rand(*s, device=DEVICE)

def functions():
    "Name -> (function, arguments that fit, names of the queries, keys and values among them)."
    q,k,v,w_q,w_k = rand(2,2,6,8), rand(2,1,6,8), rand(2,1,6,8), rand(2,8,8), rand(1,8,8)
    one,state = [x[:,:,:1] for x in (q, k, v)],LinearState(rand(2,1,8,8), rand(2,1,8), rand(2,1))
    phi,qkv = dict(phi_q=q, phi_k=k, v=v),dict(q=q, k=k, v=v)
    entry = lambda **kw: linear_attention(**kw, implementation='triton')
    fm = make_feature_map('hedgehog', 8, 2, 1).to(DEVICE)
    return {
        'fused_feature_map': (fused_feature_map, dict(x=q, weight=w_q), ['x']),
        'chunk_forward': (chunk_forward, phi, [*phi]),
        'triton_linear_attention': (triton_linear_attention, phi, [*phi]),
        'fused_hedgehog_attention': (fused_hedgehog_attention, qkv | dict(w_q=w_q, w_k=w_k), [*qkv]),
        'decode_step': (decode_step, dict(zip('qkv', one), state=state), [*qkv]),
        'triton_window_attention': (triton_window_attention, qkv | dict(phi_q=q, phi_k=k, window=3), [*qkv, 'phi_q', 'phi_k']),
        'linear_attention': (entry, qkv, [*qkv]),
        'linear_attention, a map': (entry, qkv | dict(feature_map=fm), [*qkv])}

NAMES = ['fused_feature_map', 'chunk_forward', 'triton_linear_attention', 'fused_hedgehog_attention',
    'decode_step', 'triton_window_attention', 'linear_attention', 'linear_attention, a map']
ALL = {'no batch': ('empty', lambda x: x[:0]), 'no tokens': ('empty|takes one token', lambda x: x[:,:,:0]),
    'three dimensions': (r'batch, heads|x is \(B, H', lambda x: x[0])}
ONE = {'another device': ('device', lambda x: x.to('meta')), 'whole numbers': ('floating point|is float32', lambda x: x.long()),
       'another batch': ('batch', lambda x: x.expand(2, *x.shape[1:])[:1]), 'doubles': ('float32', lambda x: x.double())}

@kernel
@pytest.mark.parametrize('name', NAMES)
def test_what_fits_runs(name):
    f,kw,_ = functions()[name]
    o = f(**kw)
    assert torch.isfinite(o[0] if isinstance(o, tuple) else o).all()

@kernel
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('fault', ALL)
def test_all_of_it_is_wrong(name, fault):
    f,kw,big = functions()[name]
    with pytest.raises(ValueError, match=ALL[fault][0]): f(**kw | {n: ALL[fault][1](kw[n]) for n in big})

@kernel
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('fault', ONE)
def test_one_of_it_is_wrong(name, fault):
    f,kw,big = functions()[name]
    if len(big)==1 and fault=='another batch': big = [] # nothing to differ from
    if name.startswith('linear_attention') and fault=='doubles': big = []  # of several dtypes the widest is taken, and then refused
    for n in big:
        with pytest.raises(ValueError, match=ONE[fault][0]): f(**kw | {n: ONE[fault][1](kw[n])})

@kernel
@pytest.mark.parametrize('name', [n for n in NAMES if not n.startswith('linear_attention')]) # which copies
def test_channels_that_lie_apart(name):
    f,kw,big = functions()[name]
    for n in big:
        apart = torch.stack([kw[n], kw[n]], -1)[...,0]
        with pytest.raises(ValueError, match='last stride 1'): f(**kw | {n: apart})

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('name', ['chunk_forward', 'triton_linear_attention', 'fused_hedgehog_attention', 'linear_attention', 'linear_attention, a map'])
@pytest.mark.parametrize('cu', [[0,4,2,6], [0,3,3,6], [1,6], [0,5], [0], [], [0,2.5,6]])
def test_borders_out_of_order(name, cu):
    f,kw,big = functions()[name]
    one = {n: kw[n][:1] for n in big}
    f(**kw | one, cu_seqlens=[0,2,6])
    with pytest.raises(ValueError, match='cu_seqlens'): f(**kw | one, cu_seqlens=cu)
    if all(isinstance(x, int) for x in cu):
        with pytest.raises(ValueError, match='cu_seqlens'): f(**kw | one, cu_seqlens=torch.tensor(cu, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match='batch must be 1'): f(**kw, cu_seqlens=[0,2,6])

@kernel
@pytest.mark.parametrize('name', [n for n in NAMES if n!='fused_feature_map'])
def test_masks_that_do_not_fit(name):
    f,kw,_ = functions()[name]
    with pytest.raises(ValueError, match='mask is'): f(**kw, mask=torch.ones(2, 9, device=DEVICE))
