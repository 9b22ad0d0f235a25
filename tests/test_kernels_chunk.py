"""Chunked linear attention in Triton against fp64 PyTorch: on a GPU where there is one, else in Triton's interpreter."""
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.ops.linear import bidirectional_linear_attention, chunk_linear_attention, LinearState, recurrent_linear_attention
from helpers.chunk_inputs import close, extras, inputs, rand
from helpers.interpreter import DEVICE, HERE, compiles, few, kernel, python, quick_and_slow, under_the_interpreter

TOL = {torch.float32:1e-5, torch.float16:2e-3, torch.bfloat16:2e-2} # of the largest reference value; the interpreter cuts bf16 where a GPU rounds

if HERE:
    from hedgehog_nb.kernels import chunk_fwd, plan as plans, states
    from hedgehog_nb.kernels.chunk_fwd import chunk_forward
else:
    test_under_the_interpreter = under_the_interpreter(__file__)

def check(q, k, v, causal=True, schedule=None, tol=None, **kw):
    "Outputs and final state against the fp64 oracle."
    double = (lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point()
        else LinearState(*map(double, x)) if isinstance(x, LinearState) else x)
    f = recurrent_linear_attention if causal else bidirectional_linear_attention
    o,s = chunk_forward(q, k, v, causal=causal, schedule=schedule, output_final_state=True, **kw)
    ref,after = f(*map(double, (q, k, v)), **{n:double(x) for n,x in kw.items()}, output_final_state=True)
    tol = tol or TOL[torch.promote_types(q.dtype, v.dtype) if q.dtype!=v.dtype else v.dtype]
    assert o.dtype==v.dtype and all(x.dtype==torch.float32 for x in s)
    close(o, ref.double(), tol, 'o'); close(s.S, after.S, tol, 'S'); close(s.z, after.z, tol, 'z'); close(s.m, after.m, 1e-5, 'm')
    return o,s

SCHEDULES = 'scan','parallel',2

@kernel
@few(4, 'T', [1, 17, 64, 100, 257])
@pytest.mark.parametrize('F,D', [(16,8), (120,60), (128,64), (16,32)])
def test_shapes(F, D, T):
    for i,schedule in enumerate(('scan', 'parallel')):
        H,Hkv = [(4,4), (4,2), (4,1)][(F + D + T + i) % 3]
        check(*inputs(1, H, Hkv, T, F, D, dtype=torch.float32 if T<=64 else torch.float16 if T==100 else torch.bfloat16), schedule=schedule)

@kernel
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('heads', [(4,4), (4,2), (4,1)])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_everything_at_once(schedule, heads, causal):
    H,Hkv = heads
    check(*inputs(2, H, Hkv, 40, 24, 20), causal, schedule, **extras(2, Hkv, 40, 24, 20))

@kernel
@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('state', [False, True])
def test_each_alone(log, masked, state):
    for causal in (True, False):
        for schedule in ('scan', 'parallel'): check(*inputs(1, 2, 1, 40), causal, schedule, **extras(1, 1, 40, log=log, masked=masked, state=state))

@kernel
@pytest.mark.parametrize('dtype', TOL)
@pytest.mark.parametrize('causal', [True, False])
def test_dtypes(causal, dtype):
    for schedule in SCHEDULES[:2]: check(*inputs(1, 2, 1, 150, 64, 32, dtype=dtype), causal, schedule, **extras(1, 1, 150, 64, 32))

@kernel
def test_mixed_dtypes():
    q,k,v = inputs(T=70)
    check(q.bfloat16(), k.bfloat16(), v, tol=1e-2); check(q, k, v.half(), tol=2e-3); check(q.half(), k.half(), v.bfloat16(), tol=1e-2)

@pytest.mark.slow
@kernel
@pytest.mark.parametrize('F,D', [(512,256), (300,8), (1,1), (17,130)])
def test_extreme_widths(F, D):
    for causal in (True, False): check(*inputs(1, 1, 1, 9, F, D), causal, **extras(1, 1, 9, F, D))

@kernel
@settings(max_examples=20, deadline=None, derandomize=True)
@given(B=st.integers(1, 2), Hkv=st.integers(1, 2), G=st.integers(1, 3), T=st.integers(1, 140), Tq=st.integers(1, 80), F=st.integers(1, 40),
       D=st.integers(1, 40), causal=st.booleans(), log=st.booleans(), masked=st.booleans(), state=st.booleans(), bthd=st.booleans(),
       dtype=st.sampled_from(list(TOL)), schedule=st.sampled_from([None, 'scan', 'parallel', 3]), seed=st.integers(0, 99))
@pytest.mark.slow
def test_drawn(B, Hkv, G, T, Tq, F, D, causal, log, masked, state, bthd, dtype, schedule, seed):
    qkv = inputs(B, Hkv*G, Hkv, T, F, D, dtype, None if causal else Tq, seed)
    if bthd: qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    # a state of random signs makes sums that cancel: o is then as large as it is uncertain
    check(*qkv, causal, schedule, tol=3*TOL[dtype], **extras(B, Hkv, T, F, D, seed, log, masked, state))

@pytest.mark.slow
@kernel
def test_strided_views_are_read_in_place():
    q,k,v = inputs(2, 4, 2, 20, 16, 16)
    qkv = rand(2, 20, 8, 48).abs().transpose(1, 2) # as a fused projection leaves them
    bthd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for views in (bthd, (qkv[:,:4,:,:16], qkv[:,4:6,:,16:32], qkv[:,6:,:,32:]),
            (q[:,:,::2], k[:,:,::2], v[:,:,::2]), (q[:,:1].expand(-1, 4, -1, -1), k[:1].expand(2, -1, -1, -1), v)):
        for causal in (True, False):
            a,b = (chunk_forward(*x, causal=causal) for x in (views, [x.contiguous() for x in views]))
            assert torch.equal(a, b)
        check(*views)

@kernel
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_two_halves_are_the_whole(schedule):
    q,k,v = inputs(2, 2, 1, 60)
    kw = extras(2, 1, 60)
    first,second = ([None if x is None else x[:,:,s] for x in (q, k, v, kw['log_k'])] for s in (slice(37), slice(37, None)))
    whole,end = chunk_forward(q, k, v, **kw, output_final_state=True)
    a,mid = chunk_forward(*first, mask=kw['mask'][:,:37], initial_state=kw['initial_state'], output_final_state=True, schedule=schedule)
    b,last = chunk_forward(*second, mask=kw['mask'][:,37:], initial_state=mid, output_final_state=True, schedule=schedule)
    close(torch.cat([a, b], 2), whole.double(), 1e-5); [close(x, y.double(), 1e-5) for x,y in zip(last, end)]

@kernel
def test_causal():
    q,k,v = inputs(H=1, Hkv=1, T=100)
    for schedule in SCHEDULES:
        o = chunk_forward(q, k, v, schedule=schedule)
        v2,k2 = v.clone(),k.clone(); v2[:,:,70:] = 9; k2[:,:,70:] = 5
        o2 = chunk_forward(q, k2, v2, schedule=schedule)
        assert torch.equal(o[:,:,:70], o2[:,:,:70]) and not torch.equal(o[:,:,70:], o2[:,:,70:])

@kernel
def test_padding_changes_nothing_else():
    q,k,v = inputs(2, 2, 2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool, device=DEVICE); mask[0,:9] = False; mask[1,30:] = False
    k[0,:,:9], v[0,:,:9], v[1,:,30:] = float('inf'), float('nan'), float('nan') # whatever lies there is not read
    for schedule in SCHEDULES:
        o,s = chunk_forward(q, k, v, mask=mask, output_final_state=True, schedule=schedule)
        for b,sl in ((0, slice(9, None)), (1, slice(30))):
            ref,after = chunk_linear_attention(*(x[b:b+1,:,sl].double() for x in (q, k, v)), output_final_state=True)
            close(o[b:b+1,:,sl], ref, 1e-5); close(s.S[b:b+1], after.S, 1e-5)
        assert not o[0,:,:9].any() # these queries see no key

@kernel
@pytest.mark.parametrize('causal', [True, False])
def test_nothing_visible_gives_zero(causal):
    q,k,v = inputs(T=20)
    for log_k in (None, rand(1, 2, 20)):
        o = chunk_forward(q, k, v, log_k, causal, torch.zeros(1, 20, dtype=torch.bool, device=DEVICE), schedule='parallel')
        assert not o.any()

@kernel
def test_large_log_weights_and_sums_beyond_fp16():
    q,k,v = inputs(T=150)
    for causal in (True, False): check(q, k, v, causal, 'parallel', log_k=200*rand(1, 2, 150))
    q,k,v = inputs(T=300, dtype=torch.float16)
    assert k.double().sum(2).max()*5000 > 65504
    for causal in (True, False): check(60*q, 5000*k, 30*v, causal, 'parallel', tol=4e-3)

@kernel
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('causal', [True, False])
def test_normalisers_have_more_bits_than_the_inputs(causal, dtype):
    q,k,v = inputs(1, 2, 1, 300, 32, 8, dtype)
    den = chunk_fwd.chunk_fwd(q, k, v, None, None, None, causal, False, None, 'ieee')[1]
    a = q.double()@k.double().mT
    ref = (a.tril() if causal else a).sum(-1)
    assert ((den - ref)/ref).abs().max() < 1e-4 # rounded to bf16, z alone would be off by 4e-3

@kernel
def test_repeats_to_the_bit_and_schedules_agree():
    q,k,v = inputs(1, 2, 1, 130, dtype=torch.bfloat16)
    for schedule in SCHEDULES: assert torch.equal(*(chunk_forward(q, k, v, schedule=schedule) for _ in range(2)))
    q,k,v = inputs(1, 2, 1, 100)
    o = chunk_forward(q, k, v, schedule='scan')
    for n in (1, 3, 4, 100, None): close(chunk_forward(q, k, v, schedule=n), o.double(), 1e-5)

@kernel
@pytest.mark.parametrize('schedule', ['scan', 3])
@pytest.mark.parametrize('causal', [True, False])
def test_a_state_goes_in_though_none_comes_out(causal, schedule):
    (q,k,v),kw = inputs(1, 2, 1, 40),extras(1, 1, 40)
    o,_ = chunk_forward(q, k, v, causal=causal, schedule=schedule, output_final_state=True, **kw)
    assert torch.equal(chunk_forward(q, k, v, causal=causal, schedule=schedule, **kw), o)

@kernel
def test_segments():
    for P in (1, 7, 88, 131, 132, 5000):
        for chunks in (1, 3, 33, 200):
            for again in (0, .2, .5):
                for schedule in (None, 'scan', 'parallel', 1, 7):
                    n = plans.best_split(P, chunks, again, 2.7, schedule)
                    length = -(-chunks//n)
                    assert 1<=n<=chunks and (n-1)*length<chunks<=n*length # no segment is empty
                    if schedule=='scan': assert n==1
                    if schedule=='parallel' and chunks>1: assert n>1
                    if schedule is None:
                        cost = lambda n: plans.schedule_cost(n, P, chunks, again, 2.7)
                        assert all(cost(n)<=cost(i) for i in range(1, min(chunks, 264)+1))
    assert [plans.best_split(P, 128, .5, 2.7) for P in (8, 132, 264)]==[16, 1, 1]

@kernel
def test_maxima_start_anew_at_each_border():
    for cu in ([0,1], [0,7,8,30,50]):
        log,n = 20*rand(2, 3, cu[-1]),len(cu)-1
        m0 = rand(2, 3, n)
        log[0,0,0], log[1,2,-1], m0[0,1,0] = -1e30, 0., -0.
        got = plans.running_max(log, m0, plans.cut_tokens(cu[-1], 2, 16, cu, DEVICE))
        want = [torch.cat([m0[...,i:i+1], log[...,a:b]], -1).cummax(-1).values for i,(a,b) in enumerate(zip(cu, cu[1:]))]
        assert torch.equal(got, torch.cat(want, -1))

@kernel
def test_maxima_at_the_slots_are_those_at_the_borders_of_segments():
    for cu,n in (([0,100], 3), ([0,7,8,30,50], 6), ([0,1], 1), ([0,64], 2)):
        for packed in (True, False):
            if not packed and len(cu)>2: continue
            T,p = cu[-1],plans.cut_tokens(cu[-1], n, 16, cu if packed else None, DEVICE)
            log,m0 = 20*rand(2, 3, T),rand(2, 3, len(cu)-1)
            m = plans.running_max(log, m0, p)
            want = [m[...,a + i + min(j*p.length, b-a)] for i,(a,b) in enumerate(zip(cu, cu[1:])) for j in range(-(-(b-a)//p.length) + 1)]
            assert torch.equal(plans.slot_max(m, p), torch.stack(want, -1))

@kernel
def test_the_scan_sums_slots_of_each_sequence_from_either_end():
    for cu in ([0,100], [0,1,2,3,100], [0,64,65,500]):
        p = plans.cut_tokens(cu[-1], 7, 16, cu, DEVICE)
        x,m = rand(1, 2, p.slots, 70),rand(1, 2, p.slots)
        own = m - rand(1, 2, p.slots).abs()
        first,last = p.ends(after=False).tolist(),p.ends(after=True).tolist()
        for reverse in (False, True):
            for store_all in (False, True):
                want = x.double().clone()
                for a,b in zip(first, last):
                    order = [*range(a, b+1)][::-1] if reverse else [*range(a, b+1)]
                    for i,j in zip(order, order[1:] if store_all else order[1:-1]):
                        decay = (m[...,j] - m[...,i] if reverse else m[...,i] - m[...,j]).double().exp()
                        want[:,:,j] = want[:,:,i]*decay[...,None] + want[:,:,j]*(own[...,j] - m[...,j]).double().exp()[...,None]
                got = x.clone(); states.scan_states(got, p, m, own, reverse, store_all)
                assert torch.allclose(got.double(), want, atol=1e-5)

@kernel
def test_plans_cover_each_token_once_and_cross_no_border():
    for cu in ([0,100], [0,1,2,3,100], [0,64,65,500]):
        for n in (1, 3, 40):
            p = plans.cut_tokens(cu[-1], n, 16, cu)
            table = p.table.tolist()
            first,of = table[len(cu):2*len(cu)],table[2*len(cu):]
            spans = [(cu[q] + (i - first[q])*p.length, min(cu[q] + (i - first[q] + 1)*p.length, cu[q+1])) for i,q in enumerate(of)]
            assert [t for a,b in spans for t in range(a, b)]==list(range(cu[-1])) and all(a<b for a,b in spans)
            slots = [*range(p.slots)]
            assert (p.ends(after=False).tolist()==[slots[f+i] for i,f in enumerate(first[:-1])]
                    and p.ends(after=True).tolist()==[f+i for i,f in enumerate(first[1:])])

@kernel
@pytest.mark.parametrize('message,change', [
    ('4|batch, heads', lambda q,k,v: dict(phi_q=q[0])), ('same channels', lambda q,k,v: dict(phi_q=q[...,:8])),
    ('do not divide', lambda q,k,v: dict(phi_q=q[:,[0,1,1]])),
    ('same heads and tokens', lambda q,k,v: dict(v=v[:,:,:9])), ('empty', lambda q,k,v: dict(phi_q=q[:,:,:0], phi_k=k[:,:,:0], v=v[:,:,:0])),
    ('empty', lambda q,k,v: dict(phi_q=q[:0], phi_k=k[:0], v=v[:0])),
    ('as many queries as keys', lambda q,k,v: dict(phi_q=q[:,:,:9])),
    ('up to 512', lambda q,k,v: dict(phi_q=torch.ones(1,2,20,513), phi_k=torch.ones(1,2,20,513))),
    ('256 channels', lambda q,k,v: dict(v=torch.ones(1,2,20,257))),
    ('phi_q is float32', lambda q,k,v: dict(phi_q=q.double())), ('floating point', lambda q,k,v: dict(v=v.long())),
    ('last stride 1', lambda q,k,v: dict(phi_k=k.mT.contiguous().mT)),
    ('log_k is', lambda q,k,v: dict(log_k=torch.ones(1, 2, 9))), ('mask is', lambda q,k,v: dict(mask=torch.ones(1, 9))),
    ('initial_state has shapes', lambda q,k,v: dict(initial_state=LinearState(torch.zeros(1,2,16,9), torch.zeros(1,2,16), torch.zeros(1,2)))),
    ('must lie on one device', lambda q,k,v: dict(mask=torch.ones(1, 20, device='meta'))), ('different devices', lambda q,k,v: dict(v=v.to('meta'))),
    ('schedule is', lambda q,k,v: dict(schedule='fast')), ('schedule is', lambda q,k,v: dict(schedule=0)),
    ('schedule is', lambda q,k,v: dict(schedule=True)), ('precision is', lambda q,k,v: dict(precision='tf16')),
])
def test_errors_say_what_was_given(message, change):
    q,k,v = inputs()
    with pytest.raises(ValueError, match=message):
        chunk_forward(**(dict(phi_q=q, phi_k=k, v=v)
            | {n: x.to(DEVICE) if isinstance(x, torch.Tensor) and x.device.type!='meta' else x for n,x in change(q, k, v).items()}))

def test_import_without_a_gpu_works_and_cpu_tensors_are_refused():
    pytest.importorskip('triton')
    res = python('-c', 'import torch\nfrom hedgehog_nb.kernels.chunk_fwd import chunk_forward as f\nf(*[torch.ones(1,1,4,8)]*3)',
        TRITON_INTERPRET='0', CUDA_VISIBLE_DEVICES='')
    assert res.returncode!=0 and 'ValueError: the kernel runs on a GPU; given tensors on cpu' in res.stderr

HOPPER = """
import torch
from hedgehog_nb.kernels.chunk_fwd import chunk_forward
from hedgehog_nb.kernels.inspect import inspect_kernels
from hedgehog_nb.ops.linear import LinearState

def use(F, D, dtype=torch.bfloat16, kernel='chunk_fwd', group=1, log_k=False, packed=False, mask=False, schedule='scan', state=False, T=8192, **config):
    e = lambda h, *d, t=dtype: torch.empty(1, h, T, *d, dtype=t)
    n = 2 if packed else 1
    f = lambda: chunk_forward(e(group, F), e(1, F), e(1, D), e(1, t=torch.float32) if log_k else None, kernel!='bidirectional_fwd',
        torch.ones(1, T) if mask else None, LinearState(torch.empty(n, 1, F, D), torch.empty(n, 1, F), torch.empty(n, 1)) if state else None, state,
        [0, T//2, T] if packed else None, schedule)
    return next(r for r in inspect_kernels(f, **config) if r['kernel']==kernel)

def check(F, D, spilled, near, slots, tensor, programs=2, **kw): # cycles of an SM for a token
    u = use(F, D, **kw)
    fit = min(65536//(u['registers']*32*u['warps']), 227*1024//(u['shared_bytes'] + 1024))
    assert u['spilled_bytes']<=spilled and u['near']<=1.15*near and u['slots']<=1.15*slots and u['alu']<=1.5*slots\
 and u['tensor']<=tensor and fit>=programs, u # other versions differ by as much
"""
HOPPER_PARTS = dict(quick="""check(128, 64, 0, 12.2, 11.4, 16)
check(128, 64, 0, 4, 3.5, 5, 4, kernel='segment_states', schedule=4)
check(128, 64, 0, 8.5, 4.6, 5, 3, kernel='bidirectional_fwd')
""", slow="""check(128, 64, 128, 12.2, 11.6, 16, schedule=4)
check(128, 64, 64, 16.9, 11.1, 16, group=4)
check(128, 64, 160, 18.6, 25.4, 16, log_k=True)
check(256, 128, 400, 28.2, 17.9, 21)
check(128, 64, 256, 23.2, 25.1, 16, group=4, schedule=4, log_k=True, packed=True, mask=True, state=True)
check(128, 64, 400, 29.4, 19.1, 23, dtype=torch.float16)
for F,D,dtype in ((512,256,torch.bfloat16), (256,64,torch.float16), (512,256,torch.float32)): assert use(F, D, dtype)['shared_bytes']<=227*1024 # the largest
assert use(60, 60, kernel='segment_states', log_k=True, mask=True, schedule=4)['spilled_bytes']==0
assert use(128, 64, kernel='scan', log_k=True, packed=True, state=True, schedule=4)['spilled_bytes']==0
""")

@pytest.mark.compiles
@quick_and_slow
def test_compiles_for_hopper(which, tmp_path): compiles(HOPPER + HOPPER_PARTS[which], tmp_path)
