"Every architecture of `architectures.py` converts and passes its checks, or is refused for the reason that is written down; the stored results say the same."
import copy, json
import pytest, torch, transformers
from helpers import architectures
from helpers.architectures import ARCHITECTURES, CHECKS, asked, build, draw, examine, generate, outputs, shake
from hedgehog_nb.models.interface import capture_attention
from hedgehog_nb.models.attention import linear_layers, padding_mask
from hedgehog_nb.models.linearize import linearize, probe_attention, probe_inputs
from hedgehog_nb.models.loading import save_linearized

OFF = "does not call its attention through transformers' attention interface"
PAIRS = "was given a mask of shape"
REFUSED = {'GPT-Neo':OFF, 'Bloom':OFF, 'Falcon':OFF, 'MPT':OFF, 'XGLM':OFF, 'MPNet':OFF, 'DeBERTa':OFF, 'DeBERTa-v2':OFF, 'BigBird':OFF,
    'XLNet':OFF, 'RoFormer':OFF, 'Longformer':OFF, 'PVT':OFF, 'WavLM':OFF, 'Gemma2':'caps its scores', 'T5Gemma':'caps its scores',
    'gpt-oss':'attention sinks', 'T5':'position bias', 'mT5':'position bias', 'BEiT':PAIRS, 'Swin':PAIRS, 'Doge':PAIRS, 'LayoutLM':PAIRS,
    'Llama4':'a pattern of pairs', 'Gemma3n':'keeps a DummyLayer', 'Zamba2':'keeps a LinearAttentionAndFullAttentionLayer',
    'Falcon-H1':'keeps a LinearAttentionAndFullAttentionLayer', 'DiffLlama':'more than once', 'HRM, text':'more than once',
    'Mamba':'no attention call was seen', 'FNet':'no attention call was seen', 'BigBird-Pegasus':'not under the mask that it names'}

HERE = [n for n,(cls,*_) in ARCHITECTURES.items() if hasattr(transformers, cls)] # the oldest transformers lacks some

@pytest.fixture(scope='module')
def stored(root):
    run,rows = json.loads((root/'results'/'architectures.json').read_text()),{}
    for r in run['rows']: rows.setdefault(r['model'], []).append(r)
    return rows, run['versions']['transformers']==transformers.__version__

def test_the_results_are_of_these_architectures(stored):
    assert set(stored[0])==set(ARCHITECTURES) and len(ARCHITECTURES)-len(REFUSED)>=45 and len(HERE)>=len(ARCHITECTURES)-3

# of each kind, and of each shape that attention takes; the others are slow
QUICK = {'GPT-2','Llama','Mistral, windowed','Qwen3-MoE','Gemma3','BERT','ModernBERT','BART','ViT','CLIP','Whisper','wav2vec 2.0','Mllama, text', *REFUSED}

@pytest.mark.parametrize('name', [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HERE])
def test_architecture(name, stored):
    rows,(want,same) = examine(name),stored
    if rows[0]['value']: assert {r['metric']:r['value'] for r in rows}==dict.fromkeys(['convert', *asked(ARCHITECTURES[name][2], rows[0]['layers'])], 1)
    if same: assert rows==[{k:v for k,v in r.items() if k not in ('tokens','seed','unit')} for r in want[name]] and (name in REFUSED)==(not rows[0]['value'])
    elif name not in REFUSED and not rows[0]['value']: assert 'attention interface' in rows[0]['note'] # an older version had not moved it there yet

@pytest.mark.parametrize('name', [n for n in HERE if n in REFUSED])
def test_what_is_refused_is_left_as_it_was(name, stored):
    model = build(name)
    names,impl,hooks = list(model.state_dict()),model.config._attn_implementation,[len(m._forward_pre_hooks) for m in model.modules()]
    if not stored[1] and examine(name)[0]['value']: return # another version may refuse less
    with pytest.raises(ValueError, match=REFUSED[name] if stored[1] else None): linearize(model)
    assert list(model.state_dict())==names and not hasattr(model.config, 'hedgehog') and model.config._attn_implementation==impl
    assert [len(m._forward_pre_hooks) for m in model.modules()]==hooks

# --- the checks can fail

def converted(name='Llama'):
    model = shake(linearize(build(name)))
    return ARCHITECTURES[name][2], model, draw(ARCHITECTURES[name][2], model), build(name)

@pytest.mark.parametrize('name,check,fault', [('Llama','forward','oracle'), ('BERT','padding','mask'),
    ('Llama','generate','state'), ('BART','generate','state'), ('Llama','save','weights'),
    ('Llama','train','frozen'), ('OLMo3','teacher','window'), ('ModernBERT','teacher','window'), ('Llama','hybrid','softmax')])
def test_checks_find_faults(name, check, fault, monkeypatch):
    kind,model,x,soft = converted(name)
    first = next(iter(linear_layers(model).values()))
    if fault=='oracle': monkeypatch.setattr(architectures, 'set_implementation', lambda m, i=None: first.feature_map.w_q.data.mul_(1.1))
    if fault=='mask': monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, 'hedgehog', lambda *a, **kw: None)
    if fault=='state':
        def forget(m, args, kwargs):
            if kwargs.get('recurrent_layer') is not None: kwargs['recurrent_layer'].state = None
        for m in linear_layers(model).values(): m.register_forward_pre_hook(forget, with_kwargs=True)
    if fault=='weights': monkeypatch.setattr(architectures, 'save_linearized', lambda m, p: (save_linearized(m, p), first.feature_map.w_q.data.mul_(1.1)))
    if fault=='frozen': first.feature_map.w_k.requires_grad_(False)
    if fault=='softmax':
        import hedgehog_nb.models.attention as lin; whole = lin.fused_softmax_attention
        monkeypatch.setattr(lin, 'fused_softmax_attention',
            lambda q, k, v, causal, scale, mask=None, *args, **kw: whole(q, k, v, causal, scale, None, *args, **kw))
    if fault=='window':
        import hedgehog_nb.training.distill as t; whole = t.fused_softmax_attention
        monkeypatch.setattr(t, 'fused_softmax_attention', lambda q, k, v, causal, scale, mask, window=None, **kw: whole(q, k, v, causal, scale, mask, **kw))
    assert not CHECKS[check][0](kind, model, x, soft)

# --- what goes to a converted model

def test_packed_sequences_are_refused():
    _,model,x,_ = converted()
    packed = torch.tensor([[*range(7),*range(5)]]).expand(2, -1)
    outputs(model, dict(x, position_ids=torch.arange(12).expand(2, -1)))
    with pytest.raises(ValueError, match='packed sequences'): model(**x, position_ids=packed, use_cache=False)
    with pytest.raises(ValueError, match='several sequences in a row'): model(**x, cu_seq_lens_q=torch.tensor([0,7,12]), use_cache=False)

def test_a_past_is_causal():
    model = linearize(build('Llama'))
    for m in linear_layers(model).values(): m.is_causal = False
    cache = transformers.DynamicCache()
    model(input_ids=torch.tensor([[4,5,6]]), past_key_values=cache)                # a whole text at once may be read both ways
    with pytest.raises(ValueError, match='goes on from 3 tokens'): model(input_ids=torch.tensor([[7]]), past_key_values=cache)

def test_masks_over_pairs_are_refused():
    _,model,x,_ = converted()
    with pytest.raises(ValueError, match='mask of shape'): model(**x, attention_mask=torch.ones(2,1,12,12).tril().bool(), use_cache=False)

@pytest.mark.parametrize('patterns', ['or','and'])
def test_patterns_added_to_a_mask_are_refused(patterns):
    from transformers.masking_utils import (and_masks, causal_mask_function, or_masks,
        sliding_window_bidirectional_mask_function, sliding_window_causal_mask_function)
    for f in (causal_mask_function, sliding_window_causal_mask_function(3), sliding_window_bidirectional_mask_function(3)):
        assert padding_mask(2, 5, 5, mask_function=f) is None
    join = dict(zip(('or','and'), (or_masks, and_masks)))[patterns]
    for f in (causal_mask_function, sliding_window_causal_mask_function(3)):
        with pytest.raises(ValueError, match='pattern of pairs'): padding_mask(2, 5, 5, mask_function=join(f, lambda b, h, q, k: q//2==k//2))

@pytest.mark.parametrize('name', ['BART','Whisper'])
def test_cross_attention_stays_softmax(name):
    kind,model,x,_ = converted(name)
    names = list(linear_layers(model))
    assert len(names)==4 and not [n for n in names if 'encoder_attn' in n]
    assert sum('encoder_attn' in n and n.endswith('encoder_attn') for n,_ in model.named_modules())==2
    same = dict(probe_inputs(build(name)), decoder_input_ids=torch.ones(1, 3 if name=='BART' else 16, dtype=torch.long))
    with pytest.raises(ValueError, match='cross-attention'): linearize(build(name), inputs=same)

def speech(cls, **config):
    cls = getattr(transformers, cls)
    torch.manual_seed(0)
    return cls(cls.config_class(vocab_size=61, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **config)).eval()

def test_inputs_may_be_given():
    model = speech('Speech2TextForConditionalGeneration', d_model=32, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=64, max_target_positions=64, input_feat_per_channel=8, conv_channels=16)
    with pytest.raises(ValueError, match='give `inputs`'): linearize(model)
    assert len(linear_layers(linearize(model, inputs=dict(input_features=torch.zeros(1,16,8), decoder_input_ids=torch.tensor([[1,4]])))))==4

def test_inputs_that_do_not_fit_are_an_error_of_values():
    with pytest.raises(ValueError, match='BertModel did not run .* Give `inputs`'):
        linearize(build('MiniLM (BERT without a head)'), inputs=dict(input_ids='three words'))

def test_a_model_that_is_causal_by_its_mask_alone_is_refused():
    "Its decoder says that it is not causal wherever it is given a mask, so under padding it would see what comes."
    model = speech('MoonshineForConditionalGeneration', hidden_size=32, intermediate_size=48, encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2, encoder_num_attention_heads=4, decoder_num_attention_heads=4, max_position_embeddings=64)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .3)
    with pytest.raises(ValueError, match=r'decoder\.layers\.0\.self_attn .* mask that it names'):
        linearize(model, inputs=dict(input_values=torch.zeros(1,2000), decoder_input_ids=torch.tensor([[1,4,5]])))

def test_layers_of_encoder_and_decoder_are_counted_as_they_are_called():
    model = linearize(build('BART'), layers='1-2')
    assert list(linear_layers(model))==['model.encoder.layers.1.self_attn','model.decoder.layers.0.self_attn'] and model.config.hedgehog['layers']==[1,2]

@pytest.mark.parametrize('name', ['OLMo3','Cohere2'])
def test_local_layers_that_stay_softmax_keep_their_window(name):
    kind = ARCHITECTURES[name][2]
    model,soft = shake(linearize(build(name), layers='1')),build(name)
    x = draw(kind, model)
    a,b = [{c.name:c for c in capture_attention(m, **x)} for m in (model, soft)]
    assert generate(kind, model, x, soft) and list(linear_layers(model))==list(a)[1:]
    y = {k:v.clone() for k,v in x.items()}; y['input_ids'][:,0] += 1 # out of sight of the last tokens in the first layer
    o = [[], []]
    model.model.layers[0].register_forward_hook(lambda m, a, out: o[0].append(out[0] if isinstance(out, tuple) else out))
    for z in (x, y): outputs(model, z)
    assert torch.equal(o[0][0][:,6:], o[0][1][:,6:]) and not torch.equal(o[0][0][:,5], o[0][1][:,5])

def test_the_probe_leaves_the_model_as_it_was():
    model = build('Llama').train()
    before = copy.deepcopy(model.state_dict())
    calls = probe_attention(model.eval())
    assert [c.name for c in calls]==['model.layers.0.self_attn','model.layers.1.self_attn'] and model.config._attn_implementation!='hedgehog_borrowed'
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
