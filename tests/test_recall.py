"Associative recall: the generator's promises, causality of the model, early stopping, and a sweep that is killed."
import json
import pytest, torch
from hypothesis import given, settings, strategies as st
from hedgehog_nb.attentions.base import ATTENTIONS, make_attention
from hedgehog_nb.experiments.recall import *
from hedgehog_nb.experiments.recall import _best_recall, _rotary, _rotate

make_attention('hedgehog', 1)
TINY = RecallTask(vocab_size=8, seq_len=8)
FEW = dict(train=64, valid=16, test=16)
FAST = dict(steps=4, every=2, batch_size=16, sizes=dict(dim=8, num_heads=1))


@st.composite
def tasks(draw):
    K = draw(st.integers(2, 12))
    if draw(st.booleans()): return RecallTask(2*K, 2*draw(st.integers(2, 20)))
    N = draw(st.integers(1, K))
    return RecallTask(2*K, 2*(N+draw(st.integers(1, 2*N))), N)


@given(tasks(), st.integers(0, 2**31))
def test_labels_are_the_dictionarys(task, seed):
    x,y = recall_sequences(task, 5, torch.Generator().manual_seed(seed))
    assert x.shape==y.shape==(5, task.seq_len-1)
    for a,b in zip(x.tolist(), y.tolist()):
        book,K,asked = {},task.num_keys,[]
        for i in range(0, task.seq_len-1, 2):
            if a[i]==2*K:                                    # a filler stands for a key and its value
                assert task.num_tokens==2*K+1 and b[i]==-100 and (i+1==len(a) or a[i+1]==2*K and b[i+1]==-100)
                continue
            assert 0<=a[i]<K and b[i]==book.get(a[i], -100)  # a label exactly where the key has been there
            if b[i]>=0: asked.append(a[i])
            if i+1==len(a): break
            assert K<=a[i+1]<2*K and b[i+1]==-100
            assert book.setdefault(a[i], a[i+1])==a[i+1]     # a key keeps its value
        if not task.num_pairs: assert b[-1]!=-100            # the last query can be answered
        else: assert len(book)==task.num_pairs and len({*asked})==len(asked)==min(task.num_pairs, task.seq_len//2-task.num_pairs)


def test_queries_follow_the_power_law():
    "Of one query among S places, place s is drawn as often as s^-0.99."
    task = RecallTask(20, 22, 1)
    _,y = recall_sequences(task, 20_000, torch.Generator().manual_seed(0))
    found = (y>=0).float().mean(0)[2::2]
    p = torch.arange(1, 11.)**-.99
    torch.testing.assert_close(found, p/p.sum(), rtol=0, atol=.015)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([RecallTask(), RecallTask(32, 32, 8)]))
def test_splits_are_disjoint_and_repeatable(seed, task):
    a,b = (recall_data(task, FEW, seed) for _ in range(2))
    assert all(torch.equal(u, v) for k in FEW for u,v in zip(a[k], b[k]))
    assert [len(a[k][0]) for k in FEW]==[*FEW.values()]
    rows = torch.cat([a[k][0] for k in FEW])
    assert len(rows.unique(dim=0))==len(rows)
    assert not torch.equal(a['train'][0], recall_data(task, FEW, seed+1)['train'][0])


def test_disjoint_where_draws_collide():
    data = recall_data(RecallTask(4, 10), dict(train=30, test=15))
    rows = torch.cat([x for x,_ in data.values()])
    assert len(rows.unique(dim=0))==len(rows)==45


@pytest.mark.parametrize('task', [RecallTask(20, 24), RecallTask(20, 24, 8), RecallTask(20, 24, 4)])
def test_balanced(task):
    x,y = recall_sequences(task, 20_000, torch.Generator().manual_seed(0))
    last = (y>=0).cumsum(1).argmax(1, keepdim=True)  # where the last query is
    for t in (x.gather(1, last)[:,0], y.gather(1, last)[:,0]-10, x[:,0], x[:,1]-10):
        n = torch.bincount(t, minlength=10)
        assert len(n)==10 and ((n-2000).abs()<5*(2000*.9)**.5).all()  # five standard deviations


@pytest.mark.parametrize('kw,word', [(dict(seq_len=7), 'seq_len'), (dict(seq_len=2), 'seq_len'),
    (dict(vocab_size=9), 'vocab_size'), (dict(vocab_size=2), 'vocab_size'), (dict(vocab_size=8, seq_len=16, num_pairs=5), '1 to 4'),
    (dict(seq_len=16, num_pairs=8), '1 to 7'), (dict(num_pairs=0), 'num_pairs')])
def test_sizes_that_do_not_fit(kw, word):
    with pytest.raises(ValueError, match=word): RecallTask(**kw)


def test_too_few_sequences():
    with pytest.raises(ValueError, match='different sequences'): recall_data(RecallTask(4, 4))


def test_bad_training_settings():
    data = recall_data(TINY, FEW)
    for kw,word in ((dict(batch_size=0), 'batch_size'), (dict(batch_size=65), 'batch_size'),
            (dict(sizes=dict(dim=10, num_heads=4)), 'dim'), (dict(t=2.), 'does not take')):
        with pytest.raises(ValueError, match=word): train_recall('elu', TINY, data=data, **{**FAST, **kw})
    with pytest.raises(ValueError, match='no attention'): train_recall('nothing', TINY, data=data, **FAST)


@pytest.mark.parametrize('name', sorted(n for n,c in ATTENTIONS.items() if True in c.directions))
def test_model_is_causal(name):
    m = RecallModel(name, 8, dim=16).double()
    x = torch.randint(8, (2,11))
    with torch.no_grad():
        before = m(x)
        for t in (10,5):
            z = x.clone(); z[:,t] = (z[:,t]+1)%8
            after = m(z)
            torch.testing.assert_close(after[:,:t], before[:,:t], rtol=0, atol=1e-10)
            assert (after[:,t:]-before[:,t:]).abs().amax()>1e-6


def test_linformer_says_why():
    with pytest.raises(ValueError, match='Linformer is bidirectional only'): RecallModel('linformer', 8)


def test_rotation_knows_distances_only():
    q,k = torch.randn(2, 1, 1, 1, 16, dtype=torch.double).expand(2, 1, 1, 9, 16)
    s = _rotate(q, _rotary(9, 16).to(torch.cdouble)) @ _rotate(k, _rotary(9, 16).to(torch.cdouble)).mT
    for d in range(-8, 9): assert s[0,0].diagonal(d).std(correction=0)<1e-5
    assert s[0,0,0].std()>1e-3


def test_accuracy_counts():
    x = torch.tensor([[0,4,0],[1,5,1],[2,6,2]]); y = torch.tensor([[4,-100,4],[5,-100,5],[0,-100,6]])
    right = lambda x, where: F_one_hot(x+4)[where]  # says value = key + 4
    F_one_hot = lambda t: torch.nn.functional.one_hot(t, 12).float()
    assert recall_accuracy(right, x, y)==100
    assert recall_accuracy(right, x, y, last=False, batch_size=2)==pytest.approx(500/6)


def test_stops_early():
    data,kw = recall_data(TINY, FEW),{**FAST, 'steps':40}
    full = train_recall("softmax", TINY, data=data, target=101, patience=None, **kw)
    assert full['steps']==40 and [s for s,_ in full['curve']]==[*range(2, 41, 2)] and full['tokens']==40*16*7
    assert train_recall('softmax', TINY, data=data, target=0, **kw)['steps']==4    # two looks in a row
    flat = train_recall('softmax', TINY, data=data, lr=1e-9, target=101, patience=6, **kw)
    assert flat['steps']==8 and flat['valid']==flat['curve'][0][1]                 # nothing better since step 2
    again = train_recall('softmax', TINY, data=data, target=101, **kw)
    assert again['curve']==full['curve'] and again['accuracy']==full['accuracy']


def test_maps_have_a_rate_of_their_own():
    "A tenth of the others' if not said; at 0 the maps stay where they began, and all else moves."
    data = recall_data(TINY, FEW)
    def moved(**kw):
        torch.manual_seed(0)
        start,m = RecallModel('hedgehog', 8, dim=8, num_heads=1).state_dict(),train_recall('hedgehog', TINY, data=data, weight_decay=0., **FAST, **kw)['model']
        far = {n: (p-start[n]).abs().max().item() for n,p in m.state_dict().items()}
        return [max(x for n,x in far.items() if ('.w_' in n)==maps) for maps in (True, False)]
    (same,others),(still,_),(tenth,_) = moved(map_lr=3e-3),moved(map_lr=0.),moved()
    assert still==0 and others>same/2 and 5<same/tenth<20


def test_sweep_goes_on_after_a_kill(tmp_path):
    rows = dict(softmax=('softmax',{}), exp2=('exp',dict(t=2.)), linformer=('linformer',{}), elu=('elu',{}))
    args = dict(rows=rows, task=RecallTask(40, 8), seeds=(0,1), lrs=(1e-3,1e-2), command='a test', **FAST)
    whole,why = recall_sweep(tmp_path/'whole.json', **args)
    assert [(r['variant'],r['seed']) for r in whole]==[(v,s) for s in (0,1) for v in ('softmax','exp2','elu')]
    assert [*why]==['linformer'] and 'bidirectional' in why['linformer']

    class Killed(BaseException): pass
    def kill(row):
        if (row['variant'],row['seed'])==('softmax',1): raise Killed
    with pytest.raises(Killed): recall_sweep(tmp_path/'cut.json', **args, on_row=kill)
    assert len(json.loads((tmp_path/'cut.json').read_text())['rows'])==4
    ran = []
    rest,_ = recall_sweep(tmp_path/'cut.json', **args, on_row=ran.append)
    assert [(r['variant'],r['seed']) for r in ran]==[('exp2',1),('elu',1)]
    same = lambda rs: [{k:v for k,v in r.items() if k!='wall_s'} for r in rs]
    assert same(rest)==same(whole)
    assert all(r['lr']==s['lr'] for r,s in zip(whole[:3], whole[3:]))               # a rate per attention, for all seeds


def test_rate_is_chosen_on_validation():
    runs = {.1:dict(valid=50., steps=9, accuracy=90.), .2:dict(valid=60., steps=9, accuracy=10.), .3:dict(valid=60., steps=5, accuracy=5.)}
    assert _best_recall('a', [*runs], runs.get)==(.3, runs[.3])


@pytest.mark.parametrize('name', ['softmax','hedgehog','elu'])
def test_weights_are_those_used(name):
    m,x = RecallModel(name, 8, dim=16),torch.randint(8, (3,9))
    with torch.no_grad():
        h = m.embed(x)
        for l,w in zip(m.layers, recall_weights(m, x), strict=True):
            torch.testing.assert_close(w.sum(-1), torch.ones(3, 2, 9))
            o = h + l.out((w@l.project(h)[2]).transpose(1,2).flatten(2))
            torch.testing.assert_close(o, h := l(h), rtol=1e-4, atol=1e-5)


class _Fixed(torch.nn.Module):
    "A layer whose attention has the weights it is given."
    def __init__(self, w): super().__init__(); self.w = w; self.attention = self
    def project(self, h): return h,h,h
    def weights(self, q, k): return self.w
    def forward(self, h): return h

class _Two(torch.nn.Module):
    def __init__(self, *ws): super().__init__(); self.embed,self.layers = torch.nn.Identity(),[_Fixed(w) for w in ws]


def test_mass():
    x,T = torch.tensor([[0,5,1,6,0,5,1,6,0]]),9
    even = torch.full((1,1,T,T), 1/T)
    right = torch.zeros(1, 1, T, T); right[...,range(1, T), range(T-1)] = 1.; right[...,-1,:] = 0; right[...,-1,1] = .75; right[...,-1,5] = .25
    assert recall_mass(_Two(right, right), x)==(1, 1)
    assert recall_mass(_Two(torch.cat([even, right], 1), even), x)==pytest.approx((1, 2/T))
    assert recall_mass(_Two(even, even), x)==pytest.approx((1/T, 2/T))
