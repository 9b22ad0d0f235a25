"""Every kernel, forward and backward, several times on the same input: each time the same bits. A race between threads or programs shows as a difference.

    python tests/gpu_repeat.py              on a GPU: shapes that fill it, 20 times
    python tests/gpu_repeat.py --small      a few programs, 2 times: what compute-sanitizer is given, and Triton's interpreter"""
import argparse, sys
from pathlib import Path
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hedgehog_nb.hedgehog import FORMS
from hedgehog_nb.kernels.chunk_backward import triton_linear_attention
from hedgehog_nb.kernels.decode import decode_step
from hedgehog_nb.kernels.feature_map import fused_feature_map
from hedgehog_nb.kernels.fused import fused_hedgehog_attention
from hedgehog_nb.kernels.window import triton_window_attention
from hedgehog_nb.linear_attention import LinearState


def cases(small, device):
    "Name -> (function of the leaves, leaves): what is run, and what its gradients are taken of."
    B,H,Hkv,T,D,w,dtype = (1,2,1,40,16,7,torch.float32) if small else (4,16,4,2048,64,64,torch.bfloat16)
    g = torch.Generator().manual_seed(0)
    rand = lambda *s, dtype=dtype: torch.randn(*s, generator=g).to(device, dtype)
    q,k,v,w_q,w_k = rand(B,H,T,D), rand(B,Hkv,T,D), rand(B,Hkv,T,D), rand(H,D,D)/D**.5, rand(Hkv,D,D)/D**.5
    phi_q,phi_k,log_k = rand(B,H,T,2*D).softmax(-1), rand(B,Hkv,T,2*D).softmax(-1), rand(B,Hkv,T,dtype=torch.float32)
    mask = torch.rand(B, T, generator=g).to(device) > .2
    cu = [0, T//3, T//3+1, T]
    res = {'map': (lambda x,w: fused_feature_map(x, w, form='exp')[0], (q, w_q))}
    for s in ('scan', 'parallel'):
        for causal in (True, False):
            res[f'chunk {s} causal={causal}'] = (lambda *x, s=s, c=causal: triton_linear_attention(*x, causal=c, mask=mask, schedule=s), (phi_q, phi_k, v, log_k))
        for form in FORMS: res[f'fused {form} {s}'] = (lambda *x, s=s, f=form: fused_hedgehog_attention(*x, form=f, mask=mask, schedule=s), (q, k, v, w_q, w_k))
        res[f'window {s}'] = (lambda *x, s=s: triton_window_attention(*x, w, log_k=log_k, mask=mask, schedule=s), (q, k, v, phi_q, phi_k))
    one = lambda x: x[:1]
    res['chunk packed'] = (lambda *x: triton_linear_attention(*x, cu_seqlens=cu), tuple(map(one, (phi_q, phi_k, v, log_k))))
    res['fused packed'] = (lambda *x: fused_hedgehog_attention(*x, form='exp', cu_seqlens=cu), (*map(one, (q, k, v)), w_q, w_k))
    state = LinearState(rand(B,Hkv,2*D,D,dtype=torch.float32), rand(B,Hkv,2*D,dtype=torch.float32).abs(), rand(B,Hkv,dtype=torch.float32))
    res['decode'] = (lambda q,k,v: torch.cat([x.float().flatten() for o,s in [decode_step(q, k, v, state, inplace=False)] for x in (o, *s)]), (phi_q[:,:,:1], phi_k[:,:,:1], v[:,:,:1]))
    return res

def run(f, leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o = f(*leaves)
    return [o.detach()] + (list(torch.autograd.grad(o.float().square().sum(), leaves)) if o.requires_grad else [])

def main(small, times):
    device,bad = 'cuda' if torch.cuda.is_available() else 'cpu',[]
    for name,(f,leaves) in cases(small, device).items():
        first = run(f, leaves)
        differ = [i for i in range(1, times) if not all(map(torch.equal, first, run(f, leaves)))]
        finite = all(torch.isfinite(x).all() for x in first)
        print(f"{name:<28} {len(first)-1} gradients, {times} times: {'the same bits' if not differ else f'runs {differ} differ'}{'' if finite else ', NOT FINITE'}", flush=True)
        if differ or not finite: bad.append(name)
    if bad: sys.exit(f"not the same each time, or not finite: {', '.join(bad)}")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--small', action='store_true'); p.add_argument('--times', type=int)
    a = p.parse_args()
    main(a.small, a.times or (2 if a.small else 20))
