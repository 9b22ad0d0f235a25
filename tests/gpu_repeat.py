"""Every kernel, forward and backward, several times on the same input: each time the same bits. A race between threads or programs shows as a difference.

    python tests/gpu_repeat.py                      on a GPU: shapes that fill it, 20 times, each kernel in a process of its own, side by side
    python tests/gpu_repeat.py --size few           a few programs of the kernels that matter most, bf16, D=64, once, in one process: for compute-sanitizer
    python tests/gpu_repeat.py --size small         a few programs of all, 2 times, fp32, D=16: for Triton's interpreter (TRITON_INTERPRET=1)
    python tests/gpu_repeat.py --done FILE          leave out the kernels that FILE names, and add those that are done; anew when the sources change"""
import argparse, os, sys
from pathlib import Path
from gpu_parallel import in_parallel, own_cache
from gpu_pytest import sources
import torch
from hedgehog_nb.ops.hedgehog import FORMS
from hedgehog_nb.kernels.chunk_bwd import triton_linear_attention
from hedgehog_nb.kernels.decode import decode_step
from hedgehog_nb.kernels.feature_map import fused_feature_map
from hedgehog_nb.kernels.fused import fused_hedgehog_attention
from hedgehog_nb.kernels.window import triton_window_attention
from hedgehog_nb.ops.linear import LinearState

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
SIZES = dict(full=(4,16,4,2048,64,64,torch.bfloat16), few=(1,2,1,200,64,64,torch.bfloat16), small=(1,2,1,40,16,7,torch.float32))
TIMES = dict(full=20, few=1, small=2)

def cases(size, device):
    "Name -> (function of the leaves, leaves): what is run, and what its gradients are taken of."
    B,H,Hkv,T,D,w,dtype = SIZES[size] # w: the window
    g = torch.Generator().manual_seed(0)
    rand = lambda *s, dtype=dtype: torch.randn(*s, generator=g).to(device, dtype)
    q,k,v,w_q,w_k = rand(B,H,T,D), rand(B,Hkv,T,D), rand(B,Hkv,T,D), rand(H,D,D)/D**.5, rand(Hkv,D,D)/D**.5
    phi_q,phi_k,log_k = rand(B,H,T,2*D).softmax(-1), rand(B,Hkv,T,2*D).softmax(-1), rand(B,Hkv,T,dtype=torch.float32)
    mask = torch.rand(B, T, generator=g).to(device) > .2
    cu = [0, T//3, T//3+1, T]
    res = {'map': (lambda x,w: fused_feature_map(x, w, form='exp')[0], (q, w_q))}
    for s in ('scan', 'parallel'):
        for causal in (True, False):
            res[f'chunk {s} causal={causal}'] = (lambda *x, s=s, c=causal: triton_linear_attention(*x, causal=c, mask=mask, schedule=s),
                (phi_q, phi_k, v, log_k))
        for form in FORMS: res[f'fused {form} {s}'] = (lambda *x, s=s, f=form: fused_hedgehog_attention(*x, form=f, mask=mask, schedule=s), (q, k, v, w_q, w_k))
        res[f'window {s}'] = (lambda *x, s=s: triton_window_attention(*x, w, log_k=log_k, mask=mask, schedule=s), (q, k, v, phi_q, phi_k))
    one = lambda x: x[:1]
    res['chunk packed'] = (lambda *x: triton_linear_attention(*x, cu_seqlens=cu), tuple(map(one, (phi_q, phi_k, v, log_k))))
    res['fused packed'] = (lambda *x: fused_hedgehog_attention(*x, form='exp', cu_seqlens=cu), (*map(one, (q, k, v)), w_q, w_k))
    state = LinearState(rand(B,Hkv,2*D,D,dtype=torch.float32), rand(B,Hkv,2*D,dtype=torch.float32).abs(), rand(B,Hkv,dtype=torch.float32))
    res['decode'] = (lambda q,k,v: torch.cat([x.float().flatten() for o,s in [decode_step(q, k, v, state, inplace=False)] for x in (o, *s)]),
        (phi_q[:,:,:1], phi_k[:,:,:1], v[:,:,:1]))
    return res

def run(f, leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o = f(*leaves)
    return [o.detach()] + (list(torch.autograd.grad(o.float().square().sum(), leaves)) if o.requires_grad else [])

def repeat(name, size='full', times=None):
    "(gradients, runs, which of them differ from the first, is all finite?)"
    os.environ['HEDGEHOG_TUNE'] = '0'
    f,leaves = cases(size, DEVICE)[name]
    times = times or TIMES[size]
    first = run(f, leaves)
    differ = [i for i in range(1, times) if not all(map(torch.equal, first, run(f, leaves)))]
    return len(first)-1, times, differ, all(torch.isfinite(x).all().item() for x in first)

def few(name): return repeat(name, 'few')
def small(name): return repeat(name, 'small')

def begin(done):
    "Names in the file `done`, which begins anew if it is of other sources."
    head,f = f'sources {sources()}',Path(done)
    first,*names = f.read_text().splitlines() or [''] if f.exists() else ['']
    if first==head: return names
    f.write_text(head+'\n')
    return []

def main(size, seconds, done=None, only=()):
    names,bad = [*cases('small', 'cpu')],[]
    if wrong := set(only)-set(names): raise SystemExit(f"there is no kernel {', '.join(sorted(wrong))}; there are {', '.join(names)}")
    past = begin(done) if done else []
    names = [n for n in names if (not only or n in only) and n not in past]
    if size=='full': names.sort(key=lambda n: 'fused' not in n) # the slowest to compile first
    processes = None if size=='full' and DEVICE=='cuda' else 0
    for name,state,value,s in in_parallel(dict(full=repeat, few=few, small=small)[size], names, total=seconds, processes=processes):
        if state=='ok':
            n,times,differ,finite = value
            text = f"{n} gradients, {times} time{'s'*(times>1)}: {f'runs {differ} DIFFER' if differ else 'the same bits'}{'' if finite else ', NOT FINITE'}"
        else: text = f'FAILED: {value}'
        if state!='ok' or differ or not finite: bad.append(name)
        elif done:
            with open(done, 'a') as f: f.write(name+'\n')
        print(f"{name:<28} {text}  [{s:.0f} s]", flush=True)
    if bad: sys.exit(f"not the same each time, not finite, or not run: {', '.join(bad)}")

if os.environ.get('TRITON_INTERPRET')=='1':
    from hedgehog_nb.docs import quick_interpreter
    quick_interpreter()
else: own_cache()

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--size', choices=SIZES, default='full'); p.add_argument('--done'); p.add_argument('--seconds', type=float)
    p.add_argument('--only', action='append', default=[], help='name of a kernel, as in the lines')
    a = p.parse_args()
    main(a.size, a.seconds, a.done, a.only)
