"""Tiny random models of many architectures, and what is checked of each.
`PYTHONPATH=tests python -m helpers.architectures` writes `results/architectures.json`.

Every model has two layers and heads of 8 channels; its matrices are drawn with a spread of 0.3, so that attention is far from uniform."""
import copy, tempfile, time
from pathlib import Path
import torch, transformers
from hedgehog_nb.models.attention import linear_layers, set_implementation
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized, save_linearized
from hedgehog_nb.training.distill import base_forward, distill, teacher_pass
from helpers.tiny_models import shake

VOCAB = 61
SPECIAL = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
PLAIN = dict(SPECIAL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GROUPED = dict(PLAIN, num_key_value_heads=2, head_dim=8)
GPT = dict(SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64)
LOCAL = dict(num_key_value_heads=2, sliding_window=6, layer_types=['sliding_attention','full_attention'])
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
BART = dict(SPECIAL, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, decoder_start_token_id=1, forced_eos_token_id=None)
T5 = dict(SPECIAL, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, decoder_start_token_id=1)
IMAGE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
SPEECH = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, conv_dim=(16,16), conv_stride=(4,4), conv_kernel=(8,4),
    num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=VOCAB)
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
TWO_TOWERS = dict(text_config=dict(TOWER, **SPECIAL, max_position_embeddings=64), vision_config=dict(TOWER, image_size=16, patch_size=4), projection_dim=16)

# name: (model class, its config, kind)
ARCHITECTURES = {
    'GPT-2': ('GPT2LMHeadModel', GPT, 'decoder'),
    'GPT-J': ('GPTJForCausalLM', dict(GPT, rotary_dim=4), 'decoder'),
    'CodeGen': ('CodeGenForCausalLM', dict(GPT, rotary_dim=4), 'decoder'),
    'GPT-BigCode': ('GPTBigCodeForCausalLM', GPT, 'decoder'),
    'GPT-Neo': ('GPTNeoForCausalLM', dict(SPECIAL, hidden_size=32, num_layers=2, num_heads=4,
        intermediate_size=48, max_position_embeddings=64, attention_types=[[['global'],2]]), 'decoder'),
    'GPT-NeoX': ('GPTNeoXForCausalLM', PLAIN, 'decoder'),
    'OPT': ('OPTForCausalLM', dict(SPECIAL, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64), 'decoder'),
    'Bloom': ('BloomForCausalLM', dict(SPECIAL, hidden_size=32, n_layer=2, n_head=4), 'decoder'),
    'Falcon': ('FalconForCausalLM', dict(SPECIAL, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False), 'decoder'),
    'MPT': ('MptForCausalLM', dict(SPECIAL, d_model=32, n_heads=4, n_layers=2, max_seq_len=64), 'decoder'),
    'Llama': ('LlamaForCausalLM', GROUPED, 'decoder'),
    'Mistral': ('MistralForCausalLM', dict(GROUPED, sliding_window=None), 'decoder'),
    'Mistral, windowed': ('MistralForCausalLM', dict(GROUPED, sliding_window=6), 'decoder'),
    'Mixtral': ('MixtralForCausalLM', dict(GROUPED, num_local_experts=4, num_experts_per_tok=2), 'decoder'),
    'Qwen2': ('Qwen2ForCausalLM', GROUPED, 'decoder'),
    'Qwen2-MoE': ('Qwen2MoeForCausalLM', dict(GROUPED, **MOE, shared_expert_intermediate_size=16), 'decoder'),
    'Qwen3': ('Qwen3ForCausalLM', GROUPED, 'decoder'),
    'Qwen3-MoE': ('Qwen3MoeForCausalLM', dict(GROUPED, **MOE), 'decoder'),
    'Gemma': ('GemmaForCausalLM', GROUPED, 'decoder'),
    'Gemma2': ('Gemma2ForCausalLM', dict(GROUPED, sliding_window=6, query_pre_attn_scalar=8), 'decoder'),
    'Gemma2, no softcap': ('Gemma2ForCausalLM', dict(GROUPED, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=None), 'decoder'),
    'Gemma3': ('Gemma3ForCausalLM', dict(GROUPED, sliding_window=6, query_pre_attn_scalar=8, layer_types=['sliding_attention','full_attention']), 'decoder'),
    'Phi': ('PhiForCausalLM', PLAIN, 'decoder'),
    'Phi-3': ('Phi3ForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'StableLM': ('StableLmForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'StarCoder2': ('Starcoder2ForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'OLMo': ('OlmoForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'OLMo2': ('Olmo2ForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'Cohere': ('CohereForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'GLM': ('GlmForCausalLM', GROUPED, 'decoder'),
    'GLM-4': ('Glm4ForCausalLM', GROUPED, 'decoder'),
    'Granite': ('GraniteForCausalLM', dict(PLAIN, num_key_value_heads=2, attention_multiplier=.3), 'decoder'),
    'SmolLM3': ('SmolLM3ForCausalLM', dict(PLAIN, num_key_value_heads=2, no_rope_layers=[1,0]), 'decoder'),
    'Nemotron': ('NemotronForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'Helium': ('HeliumForCausalLM', GROUPED, 'decoder'),
    'Persimmon': ('PersimmonForCausalLM', PLAIN, 'decoder'),
    'XGLM': ('XGLMForCausalLM', dict(SPECIAL, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64), 'decoder'),
    'BioGPT': ('BioGptForCausalLM', PLAIN, 'decoder'),
    'DeepSeek-V3': ('DeepseekV3ForCausalLM', dict(PLAIN, num_key_value_heads=4, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8), 'decoder'),
    'gpt-oss': ('GptOssForCausalLM', dict(GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=6), 'decoder'),
    'BERT': ('BertForMaskedLM', PLAIN, 'encoder'),
    'RoBERTa': ('RobertaForMaskedLM', dict(PLAIN, pad_token_id=1), 'encoder'),
    'XLM-RoBERTa': ('XLMRobertaForMaskedLM', dict(PLAIN, pad_token_id=1), 'encoder'),
    'CamemBERT': ('CamembertForMaskedLM', dict(PLAIN, pad_token_id=1), 'encoder'),
    'DistilBERT': ('DistilBertForMaskedLM', dict(SPECIAL, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64), 'encoder'),
    'ALBERT': ('AlbertForMaskedLM', dict(PLAIN, embedding_size=16), 'encoder'),
    'ELECTRA': ('ElectraForMaskedLM', dict(PLAIN, embedding_size=16), 'encoder'),
    'MPNet': ('MPNetForMaskedLM', dict(PLAIN, pad_token_id=1), 'encoder'),
    'DeBERTa-v2': ('DebertaV2ForMaskedLM', dict(PLAIN, relative_attention=True, pos_att_type=['p2c','c2p']), 'encoder'),
    'ModernBERT': ('ModernBertForMaskedLM', dict(PLAIN, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2), 'encoder'),
    'ESM': ('EsmForMaskedLM', dict(PLAIN, mask_token_id=3), 'encoder'),
    'MiniLM (BERT without a head)': ('BertModel', PLAIN, 'encoder'),
    'Gemma3n': ('Gemma3nForCausalLM', dict(GROUPED, num_hidden_layers=4, num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, laurel_rank=4,
        sliding_window=6, layer_types=['sliding_attention','full_attention']*2, activation_sparsity_pattern=[0.]*4), 'decoder'),
    'Gemma4, no shared keys': ('Gemma4ForCausalLM', dict(GROUPED, num_kv_shared_layers=0, vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8, sliding_window=6, global_head_dim=8, layer_types=['sliding_attention','full_attention']), 'decoder'),
    'Llama4': ('Llama4ForCausalLM', dict(GROUPED, num_local_experts=2, num_experts_per_tok=1,
        intermediate_size_mlp=48, attention_chunk_size=6, interleave_moe_layer_step=1), 'decoder'),
    'LFM2': ('Lfm2ForCausalLM', dict(PLAIN, num_key_value_heads=2, layer_types=['conv','full_attention']), 'decoder'),
    'Jamba': ('JambaForCausalLM', dict(PLAIN, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False), 'decoder'),
    'Bamba': ('BambaForCausalLM', dict(PLAIN, num_key_value_heads=2, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2), 'decoder'),
    'Zamba2': ('Zamba2ForCausalLM', dict(PLAIN, num_hidden_layers=4, layers_block_type=['mamba','hybrid','mamba','hybrid'],
        mamba_ngroups=1, mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8, num_mem_blocks=1, adapter_rank=4), 'decoder'),
    'Qwen3-Next': ('Qwen3NextForCausalLM', dict(GROUPED, **MOE, shared_expert_intermediate_size=16, layer_types=['linear_attention','full_attention'],
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8), 'decoder'),
    'DiffLlama': ('DiffLlamaForCausalLM', GROUPED, 'decoder'),
    'Doge': ('DogeForCausalLM', GROUPED, 'decoder'),
    'OLMoE': ('OlmoeForCausalLM', dict(PLAIN, num_experts=4, num_experts_per_tok=2), 'decoder'),
    'OLMo3': ('Olmo3ForCausalLM', dict(PLAIN, **LOCAL), 'decoder'),
    'EXAONE-4': ('Exaone4ForCausalLM', dict(PLAIN, **LOCAL), 'decoder'),
    'Cohere2': ('Cohere2ForCausalLM', dict(PLAIN, **LOCAL), 'decoder'),
    'ERNIE-4.5': ('Ernie4_5ForCausalLM', GROUPED, 'decoder'),
    'Seed-OSS': ('SeedOssForCausalLM', GROUPED, 'decoder'),
    'Apertus': ('ApertusForCausalLM', GROUPED, 'decoder'),
    'Arcee': ('ArceeForCausalLM', GROUPED, 'decoder'),
    'BitNet': ('BitNetForCausalLM', dict(PLAIN, num_key_value_heads=2), 'decoder'),
    'Ministral': ('MinistralForCausalLM', GROUPED, 'decoder'),
    'Hunyuan': ('HunYuanDenseV1ForCausalLM', GROUPED, 'decoder'),
    'NanoChat': ('NanoChatForCausalLM', PLAIN, 'decoder'),
    'FlexOlmo': ('FlexOlmoForCausalLM', PLAIN, 'decoder'),
    'AFMoE': ('AfmoeForCausalLM', dict(GROUPED, **MOE), 'decoder'),
    'GLM-4-MoE': ('Glm4MoeForCausalLM', dict(GROUPED, **MOE), 'decoder'),
    'Granite-MoE': ('GraniteMoeForCausalLM', PLAIN, 'decoder'),
    'JetMoE': ('JetMoeForCausalLM', GROUPED, 'decoder'),
    'MiniMax-M2': ('MiniMaxM2ForCausalLM', dict(GROUPED, **MOE), 'decoder'),
    'Phi-3.5-MoE': ('PhimoeForCausalLM', dict(GROUPED, num_local_experts=4), 'decoder'),
    'Mllama, text': ('MllamaForCausalLM', GROUPED, 'decoder'),
    'CTRL': ('CTRLLMHeadModel', dict(SPECIAL, n_embd=32, n_layer=2, n_head=4, n_positions=64, dff=48), 'decoder'),
    'ModernBERT, decoder': ('ModernBertDecoderForCausalLM', dict(PLAIN, local_attention=12), 'decoder'),
    'Falcon-H1': ('FalconH1ForCausalLM', GROUPED, 'decoder'),
    'HRM, text': ('HrmTextForCausalLM', PLAIN, 'decoder'),
    'Mamba': ('MambaForCausalLM', PLAIN, 'decoder'),
    'BERT, decoder': ('BertLMHeadModel', dict(PLAIN, is_decoder=True), 'decoder'),
    'XLNet': ('XLNetLMHeadModel', dict(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48), 'decoder'),
    'data2vec, text': ('Data2VecTextForMaskedLM', dict(PLAIN, pad_token_id=1), 'encoder'),
    'NomicBERT': ('NomicBertForMaskedLM', PLAIN, 'encoder'),
    'EuroBERT': ('EuroBertForMaskedLM', dict(GROUPED, mask_token_id=3), 'encoder'),
    'GTE': ('GteForMaskedLM', PLAIN, 'encoder'),
    'Jina embeddings v3': ('JinaEmbeddingsV3ForMaskedLM', PLAIN, 'encoder'),
    'ERNIE': ('ErnieForMaskedLM', PLAIN, 'encoder'),
    'DeBERTa': ('DebertaForMaskedLM', PLAIN, 'encoder'),
    'BigBird': ('BigBirdForMaskedLM', PLAIN, 'encoder'),
    'FNet': ('FNetForMaskedLM', PLAIN, 'encoder'),
    'LayoutLM': ('LayoutLMForMaskedLM', PLAIN, 'encoder'),
    'RoFormer': ('RoFormerForMaskedLM', PLAIN, 'encoder'),
    'Longformer': ('LongformerForMaskedLM', dict(PLAIN, attention_window=4), 'encoder'),
    'BART': ('BartForConditionalGeneration', BART, 'encoder-decoder'),
    'mBART': ('MBartForConditionalGeneration', BART, 'encoder-decoder'),
    'Pegasus': ('PegasusForConditionalGeneration', BART, 'encoder-decoder'),
    'Marian': ('MarianMTModel', BART, 'encoder-decoder'),
    'M2M100': ('M2M100ForConditionalGeneration', BART, 'encoder-decoder'),
    'Blenderbot': ('BlenderbotForConditionalGeneration', BART, 'encoder-decoder'),
    'T5': ('T5ForConditionalGeneration', T5, 'encoder-decoder'),
    'mT5': ('MT5ForConditionalGeneration', T5, 'encoder-decoder'),
    'T5Gemma': ('T5GemmaForConditionalGeneration', dict(encoder=dict(GROUPED, sliding_window=6), decoder=dict(GROUPED, sliding_window=6)), 'encoder-decoder'),
    'BigBird-Pegasus': ('BigBirdPegasusForConditionalGeneration', dict(BART, attention_type='original_full'), 'encoder-decoder'),
    'ViT': ('ViTForImageClassification', IMAGE, 'vision'),
    'DeiT': ('DeiTForImageClassification', IMAGE, 'vision'),
    'BEiT': ('BeitForImageClassification', dict(IMAGE, use_relative_position_bias=True), 'vision'),
    'DINOv2': ('Dinov2ForImageClassification', dict(IMAGE, mlp_ratio=2), 'vision'),
    'ViT-MSN': ('ViTMSNForImageClassification', IMAGE, 'vision'),
    'DINOv3': ('DINOv3ViTModel', IMAGE, 'vision'),
    'I-JEPA': ('IJepaForImageClassification', IMAGE, 'vision'),
    'YOLOS': ('YolosForObjectDetection', dict(IMAGE, image_size=[16,16], num_detection_tokens=3), 'vision'),
    'PVT': ('PvtForImageClassification', {}, 'vision'),
    'Swin': ('SwinForImageClassification', dict(image_size=16, patch_size=2, embed_dim=16, depths=[1,1], num_heads=[2,4], window_size=4), 'vision'),
    'CLIP': ('CLIPModel', TWO_TOWERS, 'two towers'),
    'CLIP, text': ('CLIPTextModel', dict(TOWER, **SPECIAL, max_position_embeddings=64), 'encoder'),
    'CLIP, vision': ('CLIPVisionModel', dict(TOWER, image_size=16, patch_size=4), 'vision'),
    'SigLIP, vision': ('SiglipVisionModel', dict(TOWER, image_size=16, patch_size=4), 'vision'),
    'AltCLIP': ('AltCLIPModel', dict(TWO_TOWERS, text_config=dict(TOWER, **SPECIAL, project_dim=16)), 'two towers'),
    'SigLIP': ('SiglipModel', {k:v for k,v in TWO_TOWERS.items() if k!='projection_dim'}, 'two towers'),
    'Whisper': ('WhisperForConditionalGeneration', dict({k:v for k,v in BART.items() if k!='max_position_embeddings'}, num_mel_bins=8,
        max_source_positions=16, max_target_positions=64, suppress_tokens=None, begin_suppress_tokens=None), 'speech to text'),
    'wav2vec 2.0': ('Wav2Vec2ForCTC', SPEECH, 'sound'),
    'HuBERT': ('HubertForCTC', SPEECH, 'sound'),
    'UniSpeech': ('UniSpeechForCTC', SPEECH, 'sound'),
    'SEW': ('SEWForCTC', dict(SPEECH, squeeze_factor=2), 'sound'),
    'WavLM': ('WavLMForCTC', SPEECH, 'sound'),
    'Audio spectrogram Transformer': ('ASTForAudioClassification', dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, patch_size=4, frequency_stride=4, time_stride=4, max_length=16, num_mel_bins=8), 'spectrogram'),
}

def build(name, seed=0):
    "The model, random, in double precision."
    cls,config,_ = ARCHITECTURES[name]
    cls = getattr(transformers, cls)
    torch.manual_seed(seed)
    model = cls._from_config(cls.config_class(**config), dtype=torch.float64, experts_implementation='eager').eval() # other experts have no double precision
    with torch.no_grad():
        for p in model.parameters():
            if p.dim()>1 and p.requires_grad: p.normal_(0, .3)
    return model

def draw(kind, model, B=2, T=12, seed=1):
    "Something to read, in the model's precision."
    g = torch.Generator().manual_seed(seed)
    tokens = lambda T: torch.randint(4, VOCAB, (B,T), generator=g)
    written = lambda T: torch.cat([torch.ones(B, 1, dtype=torch.long), tokens(T-1)], 1) # begins as decoders begin
    noise = lambda *s: torch.randn(B, *s, generator=g).to(model.dtype)
    return {'decoder': lambda: dict(input_ids=tokens(T)), 'encoder': lambda: dict(input_ids=tokens(T)),
        'encoder-decoder': lambda: dict(input_ids=tokens(T), decoder_input_ids=written(T-3)), 'vision': lambda: dict(pixel_values=noise(3,16,16)),
        'two towers': lambda: dict(input_ids=tokens(T), pixel_values=noise(3,16,16)), 'sound': lambda: dict(input_values=noise(16*T+8)),
        'spectrogram': lambda: dict(input_values=noise(16,8)),
        'speech to text': lambda: dict(input_features=noise(8,32), decoder_input_ids=written(T-3))}[kind]()

def without_cache(model): return dict(use_cache=False) if model.can_generate() or getattr(model.config, 'is_decoder', False) else {}

@torch.no_grad()
def outputs(model, x):
    "The first output of a forward pass: scores where the model has them, else hidden states."
    out = model(**x, **without_cache(model))
    return out.logits if 'logits' in out else out[0]

def close(a, b, tol=1e-4): return a.shape==b.shape and bool(((a-b).abs() <= tol*b.abs().max().clamp_min(1)).all())

def padded(x, side, T=12, short=8):
    "The second row has `short` tokens of its own; the rest is padding, at the left or at the right."
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, slice(0, T-short) if side=='left' else slice(short, T)] = 0
    return dict(x, attention_mask=mask)

# --- what is checked: each takes (kind, converted model, input, the softmax model it came from)

def forward(kind, model, x, soft):
    "The output is finite, is what the T × T oracle gives, and is no longer softmax's."
    got = outputs(model, x)
    set_implementation(model, 'naive'); want = outputs(model, x); set_implementation(model)
    return bool(got.isfinite().all()) and close(got, want) and not close(got, outputs(soft, x), 1e-3)

def teacher(kind, model, x, soft):
    "What the maps are taught is the attention of the model that was converted, windows and padding included."
    xs,seen,ok = [padded(x, s) for s in ('left','right')] if kind in ('decoder','encoder') else [x],[],True
    model,soft = copy.deepcopy(model).float(),copy.deepcopy(soft).float() # some models' own attention has no double precision
    for m in (model, soft): base_forward(m).register_forward_hook(lambda m, a, out: seen.append(out[0]))
    for x in xs:
        x = {k:v.float() if v.is_floating_point() else v for k,v in x.items()}
        seen.clear()
        teacher_pass(model, x, lambda *a: None)
        with torch.no_grad(): base_forward(soft)(**x, **without_cache(soft))
        real = x['attention_mask'].bool() if 'attention_mask' in x else ...
        ok &= close(seen[0][real], seen[1][real])
    return ok

def padding(kind, model, x, soft):
    "Other tokens under the padding change nothing, and padding at the right is as no padding."
    other,ok = draw(kind, model, seed=2),True
    for side in ('left','right'):
        y = padded(x, side); real = y['attention_mask'].bool()
        z = dict(y, input_ids=torch.where(real, x['input_ids'], other['input_ids']))
        a,b = outputs(model, y),outputs(model, z)
        where = real if kind in ('decoder','encoder') else ...
        ok &= close(a[where], b[where], 1e-9)
        if side=='right':
            alone = outputs(model, {k:v[1:,:8] if k=='input_ids' else v[1:] for k,v in x.items()})[0]
            ok &= close(a[1,:8] if kind!='encoder-decoder' else a[1], alone)
    return ok

@torch.no_grad()
def generate(kind, model, x, soft, n=6):
    "Greedy decoding with the recurrent state gives what forward passes over the whole text give; for decoders, of a batch padded at the left."
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=1, decoder_start_token_id=1, do_sample=False, max_new_tokens=n)
    writes = 'input_ids' if kind=='decoder' else 'decoder_input_ids'
    x = padded(x, 'left') if kind=='decoder' else padded(x, 'right') if kind=='encoder-decoder' else x
    got = transformers.GenerationMixin.generate(model, **x)[:,-n:]
    for b in range(2):
        own = {k:v[b:b+1] for k,v in x.items() if k!='attention_mask'}
        if 'attention_mask' in x: own['input_ids'] = own['input_ids'][:,x['attention_mask'][b].bool()]
        for _ in range(n): own[writes] = torch.cat([own[writes], model(**own, use_cache=False).logits[:,-1:].argmax(-1)], 1)
        if not torch.equal(own[writes][0,-n:], got[b]): return False
    return True

def save(kind, model, x, soft):
    "What is saved comes back: every weight, and the outputs."
    with tempfile.TemporaryDirectory() as d:
        save_linearized(model, Path(d)/'m')
        again = load_linearized(Path(d)/'m', dtype='auto', experts_implementation='eager')
    a,b = model.state_dict(),again.state_dict()
    return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a) and close(outputs(again, x), outputs(model, x), 1e-6)

def train(kind, model, x, soft):
    "Distillation lowers the loss, moves the maps of every layer, and moves nothing else."
    before = {k:v.clone() for k,v in model.state_dict().items()}
    history = distill(model, [x]*4, 4).losses
    moved = {k for k,v in model.state_dict().items() if not torch.equal(v, before[k])}
    return history[-1]<history[0] and moved=={k for k,_ in model.named_parameters() if '.feature_map.' in k}

def hybrid(kind, model, x, soft):
    "The same with one layer linear and the others softmax."
    some = shake(linearize(copy.deepcopy(soft), layers=[0]))
    return all(check(kind, some, x, soft) for check in (forward,padding,generate) if CHECKS[check.__name__][1] is None or kind in CHECKS[check.__name__][1])

CHECKS = dict(forward=(forward, None), teacher=(teacher, None), padding=(padding, ('decoder','encoder','encoder-decoder')),
    generate=(generate, ('decoder','encoder-decoder','speech to text')), save=(save, None), hybrid=(hybrid, None), train=(train, None))

def windows(model):
    "What became of layers with a window."
    local = lambda m: getattr(m, 'sliding_window', None) or getattr(m.config, 'sliding_window', None) and not hasattr(m, 'sliding_window')
    if any(map(local, linear_layers(model).values())): return 'layers with a window see everything'
    return 'layers with a window stay softmax' if any(getattr(m, 'sliding_window', None) for m in model.modules()) else ''

def asked(kind, layers): return [m for m,(_,kinds) in CHECKS.items() if (kinds is None or kind in kinds) and (m!='hybrid' or layers>1)]

def examine(name):
    "One row of results per check of an architecture; one alone if it cannot be converted."
    _,_,kind = ARCHITECTURES[name]
    row = dict(experiment='architectures', model=name, data='random', variant='hedgehog', kind=kind)
    soft,model = build(name),build(name)
    try: linearize(model)
    except ValueError as e: return [dict(row, metric='convert', value=0, note=str(e))]
    shake(model); x = draw(kind, model)
    rows = [dict(row, metric='convert', value=1, note=windows(model), layers=len(linear_layers(model)))]
    return rows + [dict(row, metric=m, value=int(CHECKS[m][0](kind, model, x, soft)), note='') for m in asked(kind, len(linear_layers(model)))]

if __name__=='__main__':
    from hedgehog_nb.results import results_folder, write_results
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error(); transformers.utils.logging.disable_progress_bar()
    start,rows = time.time(),[r for name in ARCHITECTURES for r in examine(name)]
    write_results(results_folder()/'architectures.json', rows, command='PYTHONPATH=tests python -m helpers.architectures',
        wall_s=time.time()-start, device='cpu')
