"Decoding with a recurrent state writes what full forward passes write, token by token and bit of memory by bit."
import os
import pytest, torch
from transformers import DynamicCache, set_seed
from hedgehog_nb.attentions.base import make_attention
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.models.cache import recurrent_layer, RecurrentLayer
from helpers.decoding import FREE, forward, left_padded
from helpers.interpreter import few
from helpers.tiny_models import gpt2, llama, tokens

def embedded(seed=0, **kw): return load_embedded()[0]
MODELS = dict(llama=llama, gpt2=gpt2, embedded=embedded)
SETTINGS = [{}, dict(attention='hedgehog-window', window=4), dict(form='exp'),
    dict(form='softmax_joint', num_maps=2), dict(attention='elu'), dict(layers='0'), dict(layers='1-2', form='exp')]
ids = lambda kw: '-'.join(f'{k}={v}' for k,v in kw.items()) or 'plain'

def model_of(name, seed=0, double=True, **kw):
    "A converted model with maps off their start. In fp64, so that near ties in a random model fall the same way in both computations."
    model = linearize(MODELS[name](seed), **kw)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in linear_layers(model).values():
            for p in m.feature_map.parameters(): p += .1*torch.randn(p.shape, generator=g)
    return (model.double() if double else model).eval()

def same(a, b, tol=1e-10): torch.testing.assert_close(a, b, atol=tol, rtol=tol)

# --- tokens

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS, ids=ids)
@pytest.mark.parametrize('seed', [0,1])
def test_greedy_is_the_full_forward(name, kw, seed):
    model = model_of(name, seed, **kw); x = tokens(2, 11, seed)
    assert torch.equal(model.generate(x, max_new_tokens=16, **FREE), forward(model, x, n=16))

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS, ids=ids)
def test_left_padded_prompts_of_unequal_lengths(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([9,1,14,5])
    out = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=12, **FREE)
    assert torch.equal(out, forward(model, x, mask, 12))
    for b,n in enumerate((9,1,14,5)):    # and what each would write alone
        assert torch.equal(out[b,-12:], model.generate(x[b:b+1,-n:], max_new_tokens=12, **FREE)[0,-12:])

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS[:2]+SETTINGS[-1:], ids=ids)
def test_beam_search(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([6,9])
    args = dict(FREE, input_ids=x, attention_mask=mask, max_new_tokens=10, num_beams=4,
        num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    a,b = model.generate(**args), model.generate(**args, use_cache=False)
    assert torch.equal(a.sequences, b.sequences); same(a.sequences_scores, b.sequences_scores, 1e-5)
    assert len({tuple(s.tolist()) for s in a.sequences[:3]})==3
    assert (a.beam_indices[:,:10]!=a.beam_indices[:,:1]).any()    # states did change places
    greedy = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=10, **FREE)
    def score(s):
        m = torch.cat([mask, mask.new_ones(2,10)], 1)
        lp = model(input_ids=s, attention_mask=m, position_ids=(m.cumsum(-1)-1).clamp_min(0), use_cache=False).logits.log_softmax(-1)
        return lp[:,-11:-1].gather(-1, s[:,-10:,None])[...,0].sum(-1)
    best = a.sequences.view(2,3,-1)[:,0]
    same(score(best)/10, a.sequences_scores.view(2,3)[:,0].to(torch.float64), 1e-5)   # its score is a full forward's
    assert (score(best)>=score(greedy)-1e-9).any()

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS[:2]+SETTINGS[-1:], ids=ids)
def test_sampling_and_several_answers(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([6,9])
    args = dict(input_ids=x, attention_mask=mask, max_new_tokens=12, do_sample=True, num_return_sequences=3, eos_token_id=None, pad_token_id=0)
    runs = []
    for seed,cache in ((1,True),(1,False),(1,True),(2,True)): set_seed(seed); runs.append(model.generate(**args, use_cache=cache))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[3])
    assert len({tuple(s.tolist()) for s in runs[0]})>4

@pytest.mark.parametrize('name', ['llama','gpt2'])
def test_beam_sampling_and_early_ends(name):
    "Sequences that end early are padded; the others go on as if alone."
    model = model_of(name); x,mask = left_padded([6,9,3,7])
    free = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=12, **FREE)[:,-12:]
    eos = free[0,3].item()
    out = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)[:,-12:]
    for f,o in zip(free.tolist(), out.tolist()):
        n = f.index(eos)+1 if eos in f else 12
        assert o[:n]==f[:n] and not any(o[n:])
    set_seed(3); a = model.generate(input_ids=x, attention_mask=mask, max_new_tokens=8, num_beams=3, do_sample=True, eos_token_id=None, pad_token_id=0)
    set_seed(3)
    assert torch.equal(a, model.generate(input_ids=x, attention_mask=mask, max_new_tokens=8,
        num_beams=3, do_sample=True, eos_token_id=None, pad_token_id=0, use_cache=False))

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS[:2]+SETTINGS[-1:], ids=ids)
def test_a_prompt_continued_over_several_calls(name, kw):
    model = model_of(name, **kw); cache = DynamicCache(config=model.config); x = tokens(1, 7)
    for turn in range(3):
        out = model.generate(x, past_key_values=cache, max_new_tokens=6, **FREE)
        assert torch.equal(out, forward(model, x, n=6))
        assert cache.get_seq_length()==out.shape[1]-1       # the last token has not been read yet
        x = torch.cat([out, tokens(1, 4, 20+turn)], 1)

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('kw', SETTINGS, ids=ids)
def test_logits_of_any_cut(name, kw):
    model = model_of(name, **kw); x,mask = left_padded([20,31])
    pos = (mask.cumsum(-1)-1).clamp_min(0)
    with torch.no_grad(): want = model(input_ids=x, attention_mask=mask, position_ids=pos, use_cache=False).logits
    for cut in ([1]*31, [7,1,1,20,2], [31], [13,18]):
        cache,got,at = DynamicCache(config=model.config),[],0
        for n in cut:
            with torch.no_grad():
                got.append(model(input_ids=x[:,at:at+n], attention_mask=mask[:,:at+n], position_ids=pos[:,at:at+n], past_key_values=cache).logits)
            at += n
        real = mask.bool()
        same(torch.cat(got, 1)[real], want[real])

@pytest.mark.parametrize('name', MODELS)
def test_fp32_logits(name):
    "As above in the usual precision: logits of order 10 to 1e-3."
    model = model_of(name, double=False, form='exp'); x = tokens(2, 40)
    cache = DynamicCache()
    with torch.no_grad():
        want = model(input_ids=x, use_cache=False).logits
        got = torch.cat([model(input_ids=p, past_key_values=cache).logits for p in x.split([9,1,30], 1)], 1)
    same(got, want, 1e-3)

@pytest.mark.parametrize('cache', ['dynamic','static'])
def test_caches_that_generate_makes(cache):
    model = model_of('llama'); x = tokens(2, 11)
    assert torch.equal(model.generate(x, max_new_tokens=10, cache_implementation=cache, **FREE), forward(model, x, n=10))
    assert torch.equal(model.generate(x, max_new_tokens=10, prefill_chunk_size=4, **FREE), forward(model, x, n=10))

@pytest.mark.parametrize('name', ['llama','gpt2'])
@pytest.mark.parametrize('layers', ['0','1','2','0-1'])
def test_a_hybrid_refuses_a_static_cache(name, layers):
    "Its softmax layers would attend to seats that are not yet taken."
    with pytest.raises(ValueError, match='static cache'):
        model_of(name, layers=layers).generate(tokens(1, 5), max_new_tokens=4, cache_implementation='static', **FREE)

def test_two_models_and_two_caches_do_not_meet():
    a,b = model_of('llama', 0),model_of('llama', 1); x,y = tokens(1, 8),tokens(1, 8, seed=2)
    ca,cb = DynamicCache(),DynamicCache()
    with torch.no_grad():
        a(input_ids=x[:,:5], past_key_values=ca); b(input_ids=y[:,:5], past_key_values=cb); a(input_ids=y, use_cache=False)
        same(a(input_ids=x[:,5:], past_key_values=ca).logits, a(input_ids=x, use_cache=False).logits[:,5:])
        same(b(input_ids=y[:,5:], past_key_values=cb).logits, b(input_ids=y, use_cache=False).logits[:,5:])

def test_a_forward_that_fails_leaves_no_seat():
    model = model_of('llama'); cache = DynamicCache()
    with pytest.raises(Exception): model(input_ids=tokens(1, 5), attention_mask=torch.ones(1,5,5), past_key_values=cache)
    x = tokens(1, 5)
    same(model(input_ids=x, use_cache=False).logits, model(input_ids=x, past_key_values=DynamicCache()).logits)

def test_generation_after_save_and_load(tmp_path):
    model = model_of('embedded', double=False); x = tokens(1, 9)
    again = load_linearized(save_linearized(model, tmp_path/'m'))
    assert torch.equal(again.generate(x, max_new_tokens=12, **FREE), model.generate(x, max_new_tokens=12, **FREE))

# --- the state

def states(cache): return [l for l in cache.layers if isinstance(l, RecurrentLayer)]

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('dtype', [torch.float32,torch.bfloat16])
def test_the_state_is_float_and_constant_in_size(name, dtype):
    model = linearize(MODELS[name]().to(dtype)); sizes = []
    for n in (1,10,100):
        cache = DynamicCache()
        out = model.generate(tokens(1, n), past_key_values=cache, max_new_tokens=5, **FREE)
        assert out.shape[1]==n+5 and len(states(cache))==len(cache.layers)
        assert all(x.dtype==torch.float32 for l in states(cache) for x in l.state)
        sizes.append(sum(l.nbytes for l in states(cache)))
    c = model.config; heads = getattr(c, 'num_key_value_heads', None) or c.num_attention_heads
    D = getattr(c, 'head_dim', None) or c.hidden_size//c.num_attention_heads
    assert sizes==[4*len(cache.layers)*heads*(2*D*D+2*D+1)]*3   # S, z and m per key-value head, and nothing else

def leaves(state): return [state] if isinstance(state, torch.Tensor) else [t for x in state for t in leaves(x)] if isinstance(state, tuple) else []

@pytest.mark.parametrize('name', ['hedgehog','hedgehog-window','elu','exp','performer','cosformer'])
@pytest.mark.parametrize('implementation', [None, 'chunked'])
@pytest.mark.parametrize('T', [1, 7, 500])
@pytest.mark.parametrize('grad', [False, True], ids=['', 'grad'])
def test_a_state_holds_on_to_nothing_else(name, implementation, T, grad):
    "A view into the prompt would keep all of it in memory, and write all of it to disk."
    a = make_attention(name, 16, 4, 2, **(dict(window=16) if name=='hedgehog-window' else {}))
    a.implementation = implementation
    x = [torch.randn(1, h, T, 16, requires_grad=grad) for h in (4, 2, 2)]
    state = leaves(a.attend(*x, output_final_state=True)[1])
    held = sum({t.untyped_storage().data_ptr():t.untyped_storage().nbytes() for t in state}.values())
    assert held<=sum(t.nbytes for t in state)

def test_a_bf16_model_keeps_what_fp32_keeps():
    "Decoding 200 tokens one at a time: the state is the one of the same bf16 keys and values summed in fp64."
    model = linearize(llama(layers=1).bfloat16()); x = tokens(1, 200); seen = []
    att = next(iter(linear_layers(model).values()))
    h = att.feature_map.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    cache = DynamicCache()
    with torch.no_grad():
        for t in x.unbind(1): model(input_ids=t[:,None], past_key_values=cache)
    h.remove()
    z = torch.cat(seen, 2).double().sum(2)
    torch.testing.assert_close(states(cache)[0].state.z.double(), z, rtol=1e-5, atol=1e-5)

def test_hybrids_hold_keys_only_where_softmax_stayed():
    model = model_of('llama', layers='1'); cache = DynamicCache(config=model.config)
    model.generate(tokens(1, 9), past_key_values=cache, max_new_tokens=4, **FREE)
    assert [isinstance(l, RecurrentLayer) for l in cache.layers]==[False,True,False]
    assert cache.layers[0].keys.shape[2]==12 and cache.get_seq_length()==12

def test_the_seat():
    cache = DynamicCache()
    l = recurrent_layer(cache, 2)
    assert recurrent_layer(cache, 2) is l and len(cache.layers)==3
    k = torch.zeros(2,1,4,8)
    assert l.update(k, k)[0] is k and l.get_seq_length()==4 and l.get_mask_sizes(3)==(7,0) and l.nbytes==0
    cache.layers[0].update(k, k)
    with pytest.raises(ValueError, match='4 tokens'): recurrent_layer(cache, 0)
    l.reset(); assert l.get_seq_length()==0 and l.state is None

def test_batches_of_states_are_reordered_repeated_and_selected():
    model = model_of('llama'); x = tokens(3, 6); cache = DynamicCache()
    with torch.no_grad(): model(input_ids=x, past_key_values=cache)
    before = [l.state for l in states(cache)]
    for f,idx in ((lambda: cache.reorder_cache(torch.tensor([2,0,0])), [2,0,0]),
            (lambda: cache.batch_repeat_interleave(2), [0,0,1,1,2,2]), (lambda: cache.batch_select_indices(torch.tensor([5,1])), [5,1])):
        before = [l.state for l in states(cache)]
        f()
        for l,s in zip(states(cache), before): assert all(torch.equal(a, b[idx]) for a,b in zip(l.state, s))

# --- what cannot be done

def test_a_state_cannot_go_back():
    l = RecurrentLayer()
    with pytest.raises(ValueError, match='cannot forget'): l.crop(-1)
    assert not l.is_croppable

@pytest.mark.parametrize('name', ['llama','gpt2'])
@pytest.mark.parametrize('kw', [{}, dict(layers='1')], ids=ids)
def test_assisted_decoding_is_refused(name, kw):
    model = model_of(name, **kw); x = tokens(1, 8)
    for how in (dict(assistant_model=MODELS[name](1).double()), dict(prompt_lookup_num_tokens=2)):
        with pytest.raises(ValueError, match='(?i)assisted'): model.generate(x, max_new_tokens=20, **{**FREE, **how})
    assert torch.equal(model.generate(x, max_new_tokens=6, **FREE), forward(model, x, n=6))   # and nothing stays behind

@pytest.mark.skipif(not os.environ.get('HEDGEHOG_NB_TEST_MODEL'), reason="HEDGEHOG_NB_TEST_MODEL names no local model")
def test_a_real_model():
    "Any decoder at its real size: a left-padded batch, cache against no cache."
    from transformers import AutoModelForCausalLM
    model = linearize(AutoModelForCausalLM.from_pretrained(os.environ['HEDGEHOG_NB_TEST_MODEL'], dtype=torch.float32)); x,mask = left_padded([7,12])
    args = dict(FREE, input_ids=x, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
    a,b = model.generate(**args),model.generate(**args, use_cache=False)
    same(torch.stack(a.logits)[:2], torch.stack(b.logits)[:2], 1e-2)
    assert torch.equal(a.sequences, b.sequences)

@few(2, 'kw', [{}, dict(attention='hedgehog-window', window=5), dict(form='exp')], ids=ids)
@torch.no_grad()
def test_a_step_compiles_into_one_graph_for_any_context(kw):
    graphs = []
    def backend(gm, _): graphs.append(gm); return gm.forward
    torch._dynamo.reset(); torch._dynamo.utils.counters.clear()
    model,x,cache = linearize(llama(layers=2), **kw),tokens(2, 20),DynamicCache()
    step = torch.compile(model.forward, backend=backend)
    parts = [model(input_ids=x[:,:6], past_key_values=cache).logits] + [step(input_ids=x[:,t:t+1], past_key_values=cache).logits for t in range(6, 20)]
    torch.testing.assert_close(torch.cat(parts, 1), model(input_ids=x, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert len(graphs)<=2 and not torch._dynamo.utils.counters['graph_break'] # one, and one more when the context is seen to vary

# --- caches that are sent away, or handed on

@pytest.mark.parametrize('name,kw',
    [('linear',{}), ('hybrid',dict(attention='hedgehog-window', window=4)), ('heads',dict(softmax_heads='0:0,1')), ('partly',dict(layers=[0]))])
def test_an_offloaded_cache(name, kw, monkeypatch):
    "transformers sends a layer away between `update` and its attention; streams are stood for, since a CPU has none."
    class NoStream:
        def wait_stream(self, other): pass
        def __enter__(self): return self
        def __exit__(self, *a): pass
    monkeypatch.setattr(torch, 'Stream', NoStream); monkeypatch.setattr(torch.cuda, 'default_stream', lambda device: NoStream())
    model,x = model_of('llama', **kw),tokens(1, 6)
    want,sent = model.generate(x, max_new_tokens=5, do_sample=False, eos_token_id=None),[]
    monkeypatch.setattr(DynamicCache, 'offload', lambda self, i, *a, offload=DynamicCache.offload: sent.append(i) or offload(self, i, *a))
    assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False, eos_token_id=None, cache_implementation='offloaded'), want) and sent
    l = RecurrentLayer(); l.state = state = object(); l.offload(); l.prefetch()
    assert l.state is state

def test_softmax_attention_takes_no_cache_of_states():
    model,soft,x = linearize(llama(layers=2)),llama(layers=2),tokens(1, 9)
    with torch.no_grad():
        for more in (1, 4):
            cache = DynamicCache(); model(input_ids=x, past_key_values=cache)
            with pytest.raises(ValueError, match='holds states of linear attention'): soft(input_ids=tokens(1, more), past_key_values=cache)
            assert cache.get_seq_length()==9
            model(input_ids=tokens(1, more), past_key_values=cache); assert cache.get_seq_length()==9+more

def test_a_cache_of_fewer_layers():
    with torch.no_grad(), pytest.raises(ValueError, match='made for 1 layers, and layer 1'):
        linearize(llama(layers=2))(input_ids=tokens(1, 4), past_key_values=DynamicCache(config=llama(layers=1).config))
