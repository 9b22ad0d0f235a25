"Training of converted models: the maps alone by their teacher, the whole by its task."
import math
import pytest, torch
from hedgehog_nb.distillation import naive_weight_loss
from hedgehog_nb.linearize import linear_layers, linearize
from hedgehog_nb.training import distill, finetune, perplexity, teacher_pass
from tiny_models import MODELS, corpus, inputs, llama

CAUSAL = 'llama','gpt2'

@torch.no_grad()
def logits(model, **x): return model(**x).logits

@torch.no_grad()
def kl(model, batch):
    "KL to the teacher of each layer, by the n × n oracle."
    out = []
    teacher_pass(model, batch, lambda module, q, k, v, causal, scale, mask, o: out.append(naive_weight_loss(q, k, module.feature_map, causal, scale, mask).mean().item()))
    return out

def batches_of(model, name, n):
    if name=='vit': return [inputs(model, B=4, seed=i) for i in range(n)]
    return [dict(input_ids=corpus(4, seed=i), **(dict(attention_mask=torch.ones(4,24, dtype=torch.long)) if name=='bert' else {})) for i in range(n)]

@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('objective', ['weights','outputs','both'])
def test_distillation_teaches_the_maps_alone(name, objective):
    model = linearize(MODELS[name](), layers='0,2').train()
    batches,held = batches_of(model, name, 25),batches_of(model, name, 26)[-1]
    before = {k:v.clone() for k,v in model.state_dict().items()}
    kl0 = kl(model.eval(), held); model.train()
    seen = []
    history = distill(model, batches, 25, on_step=lambda *a: seen.append(a))
    assert model.training and len(history)==25 and [s[0] for s in seen]==list(range(1,26)) and [s[1] for s in seen]==history
    assert all(math.isfinite(x) for x in history) and sum(history[-5:])<.95*sum(history[:5])
    if objective=='weights': assert all(b<.95*a for a,b in zip(kl0, kl(model.eval(), held)))
    for k,v in model.state_dict().items(): assert torch.equal(v, before[k])==('.feature_map.' not in k), k
    assert all(p.grad is None for n,p in model.named_parameters() if '.feature_map.' not in n)

def test_distillation_sees_the_teacher_not_the_student():
    "A layer is taught on what softmax layers below would give it: wrecked maps below change nothing above."
    model = linearize(llama()); batch = dict(input_ids=corpus(2))
    want = kl(model, batch)
    layers = list(linear_layers(model).values())
    with torch.no_grad(): layers[0].feature_map.w_q.mul_(-3)
    got = kl(model, batch)
    assert got[0]!=want[0] and got[1:]==want[1:]

def test_a_loss_that_is_not_finite_names_its_layer():
    model = linearize(llama())
    names = list(linear_layers(model))
    with torch.no_grad(): linear_layers(model)[names[1]].feature_map.w_k[0,0,0] = float('nan')
    for objective in ('weights','outputs','both'):
        with pytest.raises(FloatingPointError, match=f'{names[1]} .*lower the learning rate'): distill(model, [corpus(2)], 1, objective=objective)
    assert not model.training and model.config._attn_implementation=='hedgehog'

def test_settings_of_distillation_are_checked():
    model = linearize(llama())
    with pytest.raises(ValueError, match='weights.*outputs'): distill(model, [corpus(2)], 1, objective='logits')
    with pytest.raises(ValueError, match='no maps'): distill(linearize(llama(), 'elu'), [corpus(2)], 1)
    with pytest.raises(ValueError, match='no maps'): distill(llama(), [corpus(2)], 1)
    assert len(distill(model, iter([corpus(2)]*3), 9))==3  # batches end before the steps

@pytest.mark.parametrize('name', CAUSAL)
def test_finetuning_reaches_everything(name):
    model = linearize(MODELS[name](layers=2)); blocks = corpus(32)
    before,ppl = {k:v.clone() for k,v in model.named_parameters()},perplexity(model, blocks)
    losses = []
    finetune(model, blocks, 20, batch_size=8, lr=1e-2, on_step=lambda s,l: losses.append(l))
    assert len(losses)==20 and not model.training
    assert perplexity(model, blocks)<.8*ppl
    assert not [k for k,v in model.named_parameters() if torch.equal(v, before[k])]
    assert model.config._attn_implementation=='hedgehog'

def test_perplexity_by_hand():
    model = linearize(llama()); x = corpus(5)
    p = logits(model, input_ids=x)[:,:-1].log_softmax(-1).gather(-1, x[:,1:,None])
    want = math.exp(-p.mean().item())
    assert perplexity(model, x, batch_size=2)==pytest.approx(want, rel=1e-5)==pytest.approx(perplexity(model, x, batch_size=5), rel=1e-5)
