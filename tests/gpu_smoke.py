"""The first thing to run on a GPU, a minute and a half: the kernels that matter most, forward and every gradient, against fp64, again and
again for equal bits; then their time, softmax's and a copy's.

    python tests/gpu_smoke.py --out results/smoke.json      on a GPU; once more with TRITON_PTXAS_PATH for another assembler
    python tests/gpu_smoke.py --small                       in Triton's interpreter: TRITON_INTERPRET=1 before it"""
import argparse, os, sys, time
from gpu_parallel import in_parallel, own_cache
import torch
from hedgehog_nb.experiments.bench import Case, copy_rate, floor_bytes, measure, prepare
from hedgehog_nb.attentions.base import make_feature_map
from hedgehog_nb.ops.features import per_head
from hedgehog_nb.ops.hedgehog import FORMS, hedgehog_features
from hedgehog_nb.ops.linear import bidirectional_linear_attention, chunk_linear_attention, LinearState
from hedgehog_nb.functional import linear_attention
from hedgehog_nb.results import write_results
from hedgehog_nb.ops.window import naive_window_attention

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
TOLERANCE = 4e-2 # of the norm of the fp64 result, in bf16; see `error`
HEAD = dict(B=8, H=16, Hkv=16, T=8192, D=64, dtype=torch.bfloat16)
HEADLINE = [(Case(kind, **HEAD), n) for n in ('hedgehog','hedgehog-kernels','sdpa') for kind in ('train','forward')]
HEADLINE += [(Case('decode', **HEAD | dict(B=64)), n) for n in ('hedgehog','sdpa')]

def cases(small):
    "Name -> what to run; the slowest to compile first."
    if small: return {n: c | dict(B=1, T=40, D=16) for n,c in cases(False).items() if c['D']==64 and n.split()[2] in ('exp','softmax_joint')}
    res = {}
    for D,H in ((128, (2,2)), (64, (4,4))):
        for f in ('fused','apart'):
            for i,form in enumerate(FORMS if D==64 else FORMS[1:2]):
                res[f'{f} D={D} {form}'] = dict(kind=f, D=D, heads=(4,2) if form=='exp' else H, form=form, masked=form!='softmax_halves')
    for f in ('fused','apart'):
        res[f'{f} D=64 exp segments'] = dict(kind=f, D=64, heads=(4,4), form='exp', schedule=4)
        res[f'{f} D=64 softmax_halves bidirectional'] = dict(kind=f, D=64, heads=(4,4), form='softmax_halves', causal=False)
    for form in FORMS: res[f'window D=64 {form}'] = dict(kind='window', D=64, heads=(4,2), form=form, masked=form=='exp')
    for form in FORMS: res[f'loss D=64 {form}'] = dict(kind='loss', D=64, heads=(4,2), form=form, masked=form=='exp')
    for form in FORMS: res[f'decode D=64 {form}'] = dict(kind='decode', D=64, heads=(4,2), form=form)
    return {n: dict(B=2, T=1000, masked=False, causal=True, schedule=None) | c for n,c in res.items()}

# What is run, on leaves in bf16, and what it should give, on the same in fp64
def fused(x, c, mask):
    from hedgehog_nb.kernels.fused import fused_hedgehog_attention
    return fused_hedgehog_attention(*x, form=c['form'], mask=mask, causal=c['causal'], schedule=c['schedule'])

def apart(x, c, mask):
    from hedgehog_nb.kernels.chunk_bwd import triton_linear_attention
    from hedgehog_nb.kernels.feature_map import fused_feature_map
    (phi_q,_),(phi_k,log_k) = (fused_feature_map(y, w, form=c['form']) for y,w in ((x[0], x[3]), (x[1], x[4])))
    return triton_linear_attention(phi_q, phi_k, x[2], log_k, mask=mask, causal=c['causal'], schedule=c['schedule'])

def attention_reference(x, c, mask):
    (phi_q,_),(phi_k,log_k) = (hedgehog_features(per_head(y, w), c['form']) for y,w in ((x[0], x[3]), (x[1], x[4])))
    return (chunk_linear_attention if c['causal'] else bidirectional_linear_attention)(phi_q, phi_k, x[2], log_k, mask)

def window(x, c, mask):
    from hedgehog_nb.kernels.window import triton_window_attention
    return triton_window_attention(*x[:5], min(64, c['T']//4), log_k=x[5] if len(x)>5 else None, mask=mask)

def window_reference(x, c, mask): return naive_window_attention(*x[:5], min(64, c['T']//4), log_k=x[5] if len(x)>5 else None, mask=mask)

def _student(x, c): # features in fp32 at least, as training has them
    wide = lambda y: y.to(torch.promote_types(y.dtype, torch.float32))
    (phi_q,_),(phi_k,log_k) = (hedgehog_features(per_head(wide(y), wide(w)), c['form']) for y,w in ((x[0], x[2]), (x[1], x[3])))
    return x[0].detach(), x[1].detach(), phi_q, phi_k, log_k

def loss(x, c, mask):
    from hedgehog_nb.kernels.weight_loss import triton_weight_loss
    return triton_weight_loss(*_student(x, c), mask=mask)

def loss_reference(x, c, mask):
    from hedgehog_nb.kernels.weight_loss import naive_weight_loss_rows
    return naive_weight_loss_rows(*_student(x, c), mask=mask)

def _decoder(x, c):
    m = make_feature_map('hedgehog', c['D'], *c['heads'], form=c['form']).to(DEVICE, x[5].dtype).requires_grad_(False)
    m.w_q.data,m.w_k.data = x[3].detach().to(x[5].dtype),x[4].detach().to(x[5].dtype)
    return [y[:,:,:1] for y in x[:3]], LinearState(*x[5:8]), m

def _joined(o, state): # a state means S exp(m), z exp(m)
    return torch.cat([y.double().flatten(1) for y in (o, state.S*state.m[...,None,None].exp(), state.z*state.m[...,None].exp())], 1)

def decode(x, c, mask):
    from hedgehog_nb.kernels.decode import decode_step
    qkv,state,m = _decoder(x, c)
    return _joined(*decode_step(*qkv, state, m, inplace=False))

def decode_reference(x, c, mask):
    qkv,state,m = _decoder(x, c)
    return _joined(*linear_attention(*qkv, m, initial_state=state, output_final_state=True, implementation='chunked'))

RUN = dict(fused=(fused, attention_reference), apart=(apart, attention_reference), window=(window, window_reference), loss=(loss, loss_reference),
           decode=(decode, decode_reference))
NAMES = dict(fused='o dq dk dv dw_q dw_k', apart='o dq dk dv dw_q dw_k', window='o dq dk dv dphi_q dphi_k dlog_k',
             loss='kl dq dk dw_q dw_k', decode='o,S,z')

def inputs(c):
    "Leaves and a mask."
    g,(H,Hkv) = torch.Generator().manual_seed(0),c['heads']
    r = lambda *s: torch.randn(*s, generator=g).to(DEVICE, torch.bfloat16)
    B,T,D = c['B'],c['T'],c['D']
    x = [r(B,T,h,D).transpose(1,2) for h in (H, Hkv, Hkv)] + [r(h,D,D)/D**.5 for h in (H, Hkv)]
    if c['kind']=='decode': x += [y.float() for y in (r(B,Hkv,2*D,D), r(B,Hkv,2*D).abs()+1, r(B,Hkv))]
    if c['kind']=='loss': x = x[:2]+x[3:]
    if c['kind']=='window':
        (phi_q,_),(phi_k,log_k) = (hedgehog_features(per_head(y.float(), w.float()), c['form']) for y,w in ((x[0], x[3]), (x[1], x[4])))
        x = [*x[:3], phi_q.bfloat16(), phi_k.bfloat16()] + ([] if log_k is None else [log_k])
    return x, (torch.rand(B, T, generator=g)>.2).to(DEVICE) if c['masked'] else None

def run(f, c, x, mask, dtype=None):
    "Output and all gradients."
    leaves = [y.detach().to(dtype or y.dtype).requires_grad_(c['kind']!='decode') for y in x]
    o = f(leaves, c, mask)
    if not o.requires_grad: return [o]
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]

def error(a, want):
    "Relative to the norm; of what has tokens, of any eighth of them, which may be twice as far off."
    rel = lambda p,w: ((p.double()-w).norm()/w.norm().clamp_min(1e-30)).item()
    eighths = zip(a.chunk(8, 2), want.chunk(8, 2)) if want.ndim==4 else ()
    return max([rel(a, want), *(rel(p, w)/2 for p,w in eighths)])

def check(name, small=False, times=20):
    "Errors of one case by name of the tensor, and in how many of `times` runs a bit differs from the first."
    os.environ['HEDGEHOG_TUNE'] = '0'
    c = cases(small)[name]
    (f,ref),(x,mask) = RUN[c['kind']],inputs(c)
    got,want = run(f, c, x, mask),run(ref, c, x, mask, torch.float64)
    differ = sum(not all(map(torch.equal, got, run(f, c, x, mask))) for _ in range(1, times))
    return dict(zip(NAMES[c['kind']].split(), (error(a, w) if a.isfinite().all() else float('inf') for a,w in zip(got, want)))), differ, times

def check_small(name): return check(name, True, 2)

def check_headline(name):
    os.environ['HEDGEHOG_TUNE'] = '0'
    c,n = next(x for x in HEADLINE if ' '.join((x[1], str(x[0])))==name)
    err = prepare(c, n, DEVICE)[1]
    return {'all': 0. if err is None else err}, 0, 1

def call(name): # in a process of its own
    return (check if name in cases(False) else check_headline)(name)

def line(state, value, allowed=TOLERANCE):
    "(good?, the text) of one case."
    if state!='ok': return False, value
    errors,differ,times = value
    good = max(errors.values())<allowed and not differ
    bits = f', {differ} of {times} RUNS DIFFER' if differ else f', {times} times the same bits' if times>1 else ''
    return good, ' '.join(f'{n} {e:.1e}' for n,e in errors.items()) + bits

class Record:
    "Rows of results, written as they come."
    def __init__(self, out): self.out,self.rows,self.start = out,[],time.time()
    def add(self, variant, metric, value, **kw):
        self.rows.append(dict(experiment='gpu-smoke', model='attention', data='random', variant=variant, metric=metric, value=value, ptxas=PTXAS[1], **kw))
        if self.out: write_results(self.out, self.rows, wall_s=time.time()-self.start, device=DEVICE)

def check_all(small, record, seconds):
    "A line for each case as it ends; how many are bad."
    names = [*([] if small or DEVICE=='cpu' else [' '.join((n, str(c))) for c,n in HEADLINE]), *cases(small)]
    bad = 0
    for name,state,value,s in in_parallel(check_small if small else call, names, processes=0 if small or DEVICE=='cpu' else None, total=seconds):
        good,text = line(state, value)
        bad += not good
        print(f"{'ok ' if good else 'BAD'} {name:<60} {text}  [{s:.0f} s]", flush=True)
        if state=='ok': record.add(name, 'error', min(max(value[0].values()), 1e30), good=good, runs=value[2], runs_that_differ=value[1])
        else: record.add(name, 'failed', s, unit='s', reason=value)
    return bad

def time_all(record, end):
    "A line for each of the headline's times."
    os.environ['HEDGEHOG_TUNE'] = '0' # as compiled above
    rate = copy_rate(DEVICE)
    print(f'copy: {rate/1e12:.2f} TB/s, read and written', flush=True); record.add('copy', 'bytes_per_s', rate, unit='B/s')
    for c,n in HEADLINE:
        if time.time()>end: print(f'not timed, no time left: {n} {c}', flush=True); continue
        try: got = measure(c, n, DEVICE)
        except Exception as e: print(f'not timed: {n} {c}: {type(e).__name__}: {e}', flush=True); continue
        print(f"{n:<18} {c}: {got['ms']:.3f} ms, {got['ms']*rate/1e3/floor_bytes(c):.1f}× the byte floor, {got['bytes']/2**20:.0f} MiB", flush=True)
        record.add(n, 'ms', got['ms'], **c._asdict() | dict(dtype=str(c.dtype)[6:]))

def main(small, out, seconds):
    start,small_or_cpu = time.time(),small or DEVICE=='cpu'
    if not small_or_cpu: print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, ptxas {' '.join(PTXAS)}", flush=True)
    record = Record(out)
    bad = check_all(small, record, seconds*.75)
    if DEVICE=='cuda': time_all(record, start+seconds)
    print(f"{'BAD' if bad else 'ok '} {bad} of {len(record.rows)} bad, {time.time()-start:.0f} s", flush=True)
    return bad>0

if os.environ.get('TRITON_INTERPRET')=='1':
    from hedgehog_nb.docs import quick_interpreter
    quick_interpreter()
    PTXAS = '', 'none'
else: PTXAS = own_cache() # in every process, before Triton compiles

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--small', action='store_true', help='few tokens, in this process: for the interpreter')
    p.add_argument('--out', help='results, .json'); p.add_argument('--seconds', type=float, default=90.)
    a = p.parse_args()
    sys.exit(main(a.small, a.out, a.seconds))
