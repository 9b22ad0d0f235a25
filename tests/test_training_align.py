"Alignment: attention modules, projections and maps, learn to give what softmax gave on the teacher's inputs."
import copy
import pytest, torch
from transformers import BartConfig, BartForConditionalGeneration, WhisperConfig, WhisperForConditionalGeneration
from hedgehog_nb.models.attention import linear_layers
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.align import align, alignment_loss, attention_copy
from hedgehog_nb.training.distill import as_softmax
from helpers.training import OnStep
from helpers.tiny_models import MODELS, corpus, inputs, llama, shake

def hidden(model, batch):
    "{layer: (its inputs, its output)} of the softmax model."
    seen = {}
    def keep(n): return lambda m, args, kw, out: seen.__setitem__(n, (args, kw, out[0] if isinstance(out, tuple) else out))
    hooks = [m.register_forward_hook(keep(n), with_kwargs=True) for n,m in linear_layers(model).items()]
    with torch.no_grad(), as_softmax(model): model(**batch, **dict(use_cache=False) if hasattr(model.config, 'use_cache') else {})
    for h in hooks: h.remove()
    return seen

def batches_of(model, name, n):
    if name=='vit': return [inputs(model, B=4, seed=i) for i in range(n)]
    return [dict(input_ids=corpus(4, seed=i), attention_mask=torch.ones(4, 24, dtype=torch.long)) for i in range(n)]

@pytest.mark.parametrize('name', MODELS)
def test_attention_alone_learns(name):
    model = linearize(MODELS[name](), layers='0,2').train()
    batches,before = batches_of(model, name, 30),{k:v.clone() for k,v in model.state_dict().items()}
    h = align(model, batches, 30, lr=1e-2, eval_data=batches_of(model, name, 32)[30:])
    own = {f'{n}.{p}' for n,m in linear_layers(model).items() for p,_ in m.named_parameters()}
    assert model.training and len(h.losses)==30 and h.best_value<.9*h.evaluations[0]['loss']
    assert {k for k,v in model.state_dict().items() if not torch.equal(v, before[k])}<=own
    assert sum(not torch.equal(v, before[k]) for k,v in model.state_dict().items())>=.8*len(own) # a key's bias changes nothing under softmax
    assert all(p.grad is None for p in model.parameters())

@pytest.mark.parametrize('name', ['llama','gpt2','bert'])
def test_the_loss_is_that_of_each_module_on_the_teachers_inputs(name):
    "Read from hooks of our own, padding left out; the copy is the teacher whatever the model has become."
    model = linearize(MODELS[name]()); shake(model)
    batch = inputs(model, B=3, T=11)
    batch['attention_mask'] = torch.ones(3, 11, dtype=torch.long); batch['attention_mask'][0,7:] = 0
    want,mask = [],batch['attention_mask'].bool()
    for n,(args,kw,out) in hidden(model, batch).items():
        with torch.no_grad(): o = model.get_submodule(n)(*args, **kw)
        o = o[0] if isinstance(o, tuple) else o
        e = ((o-out).square().sum(-1)/out.square().sum(-1)).clamp_max(10)
        want.append(e[mask].mean().item())
    first = align(copy.deepcopy(model), [batch], 1).losses[0]
    assert abs(first-sum(want)/len(want))<1e-5

def test_the_teacher_does_not_follow():
    model = linearize(llama()); shake(model)
    teacher,batch = attention_copy(model),dict(input_ids=corpus(2))
    was = hidden(model, batch)
    align(model, [batch]*5, 5, lr=1e-2)
    now,kept = hidden(model, batch),hidden(teacher, batch)
    assert all(torch.equal(was[n][2], kept[n][2]) for n in was) and not any(torch.equal(was[n][2], now[n][2]) for n in was)

def test_pieces_and_stops_change_nothing(tmp_path):
    "A batch in pieces is the same step; a run that stops goes on bit by bit; another model does not."
    data = corpus(24)
    def run(m=None, **kw):
        m = linearize(llama()) if m is None else m
        return m,align(m, data, 6, batch_size=4, lr=1e-2, **kw)
    whole,h = run()
    for x,y in zip(whole.parameters(), run(gradient_accumulation_steps=2)[0].parameters()): torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
    class Stop(Exception): pass
    def stop(step, loss, seconds):
        if step==4: raise Stop
    model = linearize(llama())
    for i in range(2): # in another process, and in this one with the very model
        with pytest.raises(Stop): run(model, checkpoint=tmp_path/f'{i}', save_steps=1, callbacks=[OnStep(stop)])
        assert all(torch.equal(x, y) for x,y in zip(model.parameters(), linearize(llama()).parameters()))
        again,h2 = run(model if i else None, checkpoint=tmp_path/f'{i}', save_steps=1)
        assert h2.losses==h.losses and all(torch.equal(x, y) for x,y in zip(whole.parameters(), again.parameters()))
    with pytest.raises(ValueError, match='keeps another run: original'): run(linearize(llama(seed=1)), checkpoint=tmp_path/'0')

@pytest.mark.parametrize('kw,says', [(dict(lr='fast'), 'lr is a number'), (dict(gradient_checkpointing=True), 'nothing in alignment'),
    (dict(steps=0), 'steps'), (dict(objective='outputs'), 'objective')], ids=lambda x: next(iter(x)) if isinstance(x, dict) else '')
def test_bad_settings(kw, says):
    with pytest.raises((ValueError, TypeError), match=says): align(linearize(llama()), corpus(4), **{'steps':1, **kw})

def test_models_that_cannot_be_aligned():
    with pytest.raises(ValueError, match='no converted attention'): align(llama(), corpus(4), 1)
    with pytest.raises(ValueError, match='float16'): align(linearize(llama()).half(), corpus(4), 1)
    model = linearize(llama()); model.set_attn_implementation('sdpa')
    with pytest.raises(ValueError, match="set to 'sdpa'.*set_attn_implementation"): align(model, corpus(4), 1)
    model = linearize(llama())
    for p in model.model.layers.parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match='are frozen'): align(model, corpus(4), 1)

def test_rates_are_found():
    h = align(linearize(llama()), corpus(8), 3, lr='auto', eval_data=corpus(2, seed=5))
    assert h.search and h.lr==h.search.chosen and 1e-5<h.lr<2e-2

def test_a_loss_is_bounded_and_ignores_padding():
    x = torch.randn(2, 3, 4)
    assert alignment_loss(1e6*x, x)==10 and torch.allclose(alignment_loss(torch.zeros_like(x), x), torch.tensor(1.))
    assert alignment_loss(x, torch.zeros_like(x)).isfinite() and alignment_loss(x, x, torch.zeros(2, 3))==0

def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    config = BartConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_position_embeddings=40, dropout=0.)
    torch.manual_seed(0)
    model = linearize(BartForConditionalGeneration(config)).eval(); shake(model)
    batch = dict(input_ids=corpus(2, 12), decoder_input_ids=corpus(2, 12, seed=1), attention_mask=torch.ones(2, 12).long(),
        decoder_attention_mask=torch.ones(2, 12).long())
    batch['attention_mask'][0,5:] = 0; batch['decoder_attention_mask'][1,9:] = 0
    want = []
    for n,(args,kw,out) in hidden(model, batch).items():
        with torch.no_grad(): o = model.get_submodule(n)(*args, **kw)[0]
        e = ((o-out).square().sum(-1)/out.square().sum(-1)).clamp_max(10)
        want.append(e[batch['decoder_attention_mask' if 'decoder' in n else 'attention_mask'].bool()].mean().item())
    assert len(want)==2 and abs(align(model, [batch], 1).losses[0]-sum(want)/2)<1e-5

def test_a_decoder_of_speech():
    config = WhisperConfig(vocab_size=61, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=10, max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None)
    torch.manual_seed(0)
    model = linearize(WhisperForConditionalGeneration(config))
    assert all(0<x<10 for x in align(model, [dict(input_features=torch.randn(2, 8, 20), decoder_input_ids=corpus(2, 8))]*2, 2).losses)

def test_each_module_keeps_its_mode():
    model = linearize(llama()).train(); model.lm_head.eval()
    align(model, corpus(4), 1)
    assert model.training and not model.lm_head.training and model.model.training
