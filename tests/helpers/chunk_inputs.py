"Inputs of chunked linear attention, and how close to a reference an output has to be."
import torch
from hedgehog_nb.ops.linear import LinearState
from helpers.interpreter import DEVICE

def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

def inputs(B=1, H=2, Hkv=2, T=20, F=16, D=8, dtype=torch.float32, Tq=None, seed=0):
    return tuple(x.to(dtype)
        for x in (rand(B, H, Tq or T, F, seed=seed).softmax(-1), rand(B, Hkv, T, F, seed=seed+1).softmax(-1), rand(B, Hkv, T, D, seed=seed+2)))

def extras(B=1, Hkv=2, T=20, F=16, D=8, seed=9, log=True, masked=True, state=True):
    "Log weights, a mask with holes at both ends, and a state with its own maximum."
    mask = rand(B, T, seed=seed) > -1
    if T>2: mask[:,:2], mask[-1,-1] = False, False
    before = LinearState(rand(B, Hkv, F, D, seed=seed+1), rand(B, Hkv, F, seed=seed+2).abs(), 3*rand(B, Hkv, seed=seed+3))
    return dict(log_k=5*rand(B, Hkv, T, seed=seed+4) if log else None, mask=mask if masked else None, initial_state=before if state else None)

def close(a, r, tol, name=''):
    assert a.shape==r.shape and torch.isfinite(a).all(), name
    err = ((a.double() - r).abs().max()/r.abs().max().clamp_min(1e-3)).item()
    assert err < tol, f"{name}: {err:.1e}, allowed {tol:.0e}"
