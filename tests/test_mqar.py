"Multi-query recall by the size of the state: what is counted, what is written, and a sweep that goes on."
import math, pytest, torch
from typer.testing import CliRunner
from hedgehog_nb.attentions.base import make_attention
from hedgehog_nb.cli import app
from hedgehog_nb.experiments.mqar import *
from hedgehog_nb.experiments.recall import RecallModel
from hedgehog_nb.results import read_results

TINY = mqar_size('cpu', seq_len=16, num_pairs=3, dims=(32,), examples=64, batch_size=8, steps=4, vocab_size=12)


@pytest.mark.parametrize('variant', MQAR)
@pytest.mark.parametrize('dim', [32, 64])
def test_state_is_counted(variant, dim):
    "By hand: keys and values, or S, z and m of each head."
    H,d = mqar_heads(variant, dim),dim//mqar_heads(variant, dim)
    F = dict(hedgehog=2*d, taylor=(d+1)*(d+2)//2, elu=d).get(variant, 2*d)
    linear = H*(F*d + F + 1)
    by_hand = dict(softmax=2*100*dim, **{'hedgehog-window':linear + 2*8*dim + 8}).get(variant, linear)
    assert mqar_state(variant, dim, 100, layers=3)==3*4*by_hand


def test_convolution_is_causal():
    torch.manual_seed(0)
    m = RecallModel('elu', 8, dim=16, conv=4).double()
    x = torch.randint(8, (2,11)); z = x.clone(); z[:,6] = (z[:,6]+1)%8
    with torch.no_grad(): a,b = m(x),m(z)
    torch.testing.assert_close(a[:,:6], b[:,:6], rtol=0, atol=1e-10)
    one = RecallModel('elu', 8, dim=16, conv=4, num_layers=1).double().layers[0]
    h = torch.randn(1, 9, 16, dtype=torch.double)
    g = h.clone(); g[:,4,0] += 1
    with torch.no_grad(): diff = (one.project(h)[2]-one.project(g)[2]).abs().amax((0,1,3))
    assert (diff[4:8]>1e-6).all() and (diff[8:]<1e-12).all() and (diff[:4]<1e-12).all() # four tokens see it


def test_goes_on_and_adds(tmp_path):
    "A stopped sweep ends as another; more widths go into the same file; other settings do not."
    class Stop(Exception): pass
    kw,ran = dict(variants=['softmax','elu'], size=TINY, lrs=(1e-2,)),[]
    def stop(event, label=None, **_):
        if event=='run': ran.append(label)
        if ran==['softmax, 32 channels','elu, 32 channels']: raise Stop
    strip = lambda rows: [{k:v for k,v in r.items() if k!='wall_s'} for r in rows]
    with pytest.raises(Stop): mqar_experiment(tmp_path/'a.json', on_event=stop, **kw)
    again = mqar_experiment(tmp_path/'a.json', on_event=stop, **kw)
    assert ran==['softmax, 32 channels','elu, 32 channels','elu, 32 channels']
    assert strip(again)==strip(mqar_experiment(tmp_path/'b.json', **kw))
    more = mqar_experiment(tmp_path/'a.json', **{**kw, 'size':mqar_size('cpu', **{**vars(TINY), 'dims':(16,)})})
    assert [(r['variant'],r['dim']) for r in more]==[('softmax',32),('elu',32),('softmax',16),('elu',16)]
    longer = {**kw, 'size':mqar_size('cpu', **{**vars(TINY), 'steps':5})}
    with pytest.raises(ValueError, match='steps 4 there, 5 here'): mqar_experiment(tmp_path/'a.json', **longer)
    assert [r[:2] for r in mqar_table(more).rows]==[['softmax','16'],['softmax','32'],['elu','16'],['elu','32']]


def test_rate_of_each_width(tmp_path):
    told = []
    def listen(event, label=None, seed=None, lr=None, **_): told.extend([(label, seed, lr)] if event=='run' else ())
    rows = mqar_experiment(tmp_path/'x.json', ['elu'], (0,1), TINY, (1e-2,1e-7), on_event=listen)
    assert told==[('elu, 32 channels',0,1e-2), ('elu, 32 channels',0,1e-7), ('elu, 32 channels',1,rows[0]['lr'])]


def test_a_rate_that_diverges(tmp_path):
    "It is left out, and is no measurement; a bar of it is not taken on by the next."
    told = []
    listen = lambda event, lr=None, loss=None, **_: told.append((event, lr if event!='progress' else math.isfinite(loss)))
    row, = mqar_experiment(tmp_path/'x.json', ['elu'], size=TINY, lrs=(1e30,1e-2), on_event=listen)
    assert row['lr']==1e-2 and [*row['tried']]==['0.01'] and ('diverged',1e30) in told and ('progress',True) in told
    assert ('progress',False) not in told
    with pytest.raises(FloatingPointError, match='the loss is nan'):
        mqar_experiment(tmp_path/'y.json', ['elu'], size=TINY, lrs=(1e30,))
    assert not (tmp_path/'y.json').exists()
    for more,says in ((dict(lrs=()), 'one learning rate or more'), (dict(seeds=()), 'seeds is above 0'),
        (dict(size=mqar_size('cpu', steps=0)), 'steps is above 0')):
        with pytest.raises(ValueError, match=says): mqar_experiment(tmp_path/'z.json', ['elu'], **more)


def test_a_run_that_ends_early_says_so(tmp_path):
    "The last of its steps is the last of the bar."
    told = []
    easy = mqar_size('cpu', seq_len=4, num_pairs=1, dims=(32,), examples=4000, batch_size=64, steps=600, vocab_size=256)
    row, = mqar_experiment(tmp_path/'x.json', ['softmax'], size=easy, lrs=(1e-2,), on_event=lambda event, **kw: told.append(kw))
    steps = [(k['done'],k['total']) for k in told if 'done' in k]
    assert row['steps']<600 and steps[-2:]==[(row['steps'],600), (row['steps'],row['steps'])]


def test_command(tmp_path):
    def run(*args, code=0):
        r = CliRunner(env={'COLUMNS':'120', 'TERM':'dumb'}).invoke(app, ['experiment','mqar','--out',str(tmp_path/'x.json'), *map(str, args)])
        assert r.exit_code==code, (r.output, r.exception)
        return ' '.join(r.stderr.split())
    for args,says in ((('--variant','linear'), 'there are softmax, hedgehog'), (('--size','tpu'), 'one of cpu, gpu'), (('--dim',7), 'in pairs; softmax has 7'),
            (('--variant','taylor','--dim',40), 'a multiple of 16; given 40'), (('--lr',-1), 'rate')):
        assert says in run(*args, '--steps', 1, code=1) and not (tmp_path/'x.json').exists()
    assert 'elu, 16 channels, seed 0, rate 0.01' in run('--variant', 'elu', '--dim', 16, '--steps', 1, '--lr', 1e-2)
    row, = read_results(tmp_path)
    assert (row['experiment'],row['dim'],row['seq_len'],row['num_pairs'])==('mqar',16,32,8)


def test_without_rotary():
    "Equal tokens give equal queries and keys wherever they stand, without a convolution."
    x = torch.tensor([[3,1,3,2,3]])
    for rotary in (True, False):
        torch.manual_seed(0)
        m = RecallModel('hedgehog', 8, dim=16, rotary=rotary)
        q,k,v = m.layers[0].project(m.embed(x))
        same = lambda a: torch.allclose(a[:,:,0], a[:,:,4], rtol=0, atol=1e-6)
        assert same(q)!=rotary and same(k)!=rotary and same(v)
