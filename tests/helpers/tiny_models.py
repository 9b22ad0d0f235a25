"Small random models of the four architectures, and inputs for them."
import torch
from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification)
from hedgehog_nb.models.attention import linear_layers

VOCAB = 61


def llama(seed=0, head_dim=8, heads=4, kv_heads=2, layers=3):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, vocab_size=VOCAB, max_position_embeddings=256, initializer_range=.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()

def gpt2(seed=0, head_dim=8, heads=4, layers=3):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=head_dim*heads, n_layer=layers, n_head=heads, vocab_size=VOCAB, n_positions=256, initializer_range=.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()

def bert(seed=0, head_dim=8, heads=4, layers=3):
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(hidden_size=head_dim*heads, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=VOCAB,
        max_position_embeddings=256, initializer_range=.3)).eval()

def vit(seed=0, head_dim=8, heads=4, layers=3):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(hidden_size=head_dim*heads, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=16, patch_size=4, initializer_range=.3)).eval()

MODELS = dict(llama=llama, gpt2=gpt2, bert=bert, vit=vit)

def tokens(B=2, T=19, seed=1): return torch.randint(3, VOCAB, (B,T), generator=torch.Generator().manual_seed(seed))

def inputs(model, B=2, T=19, seed=1):
    "Something the model's forward takes, in its precision."
    if model.main_input_name=='input_ids': return dict(input_ids=tokens(B, T, seed))
    return dict(pixel_values=torch.randn(B,3,16,16, generator=torch.Generator().manual_seed(seed)).to(model.dtype))

def corpus(n, T=24, seed=0):
    "Token blocks with something to attend to: each repeats a random half."
    x = torch.randint(3, VOCAB, (n,T//2), generator=torch.Generator().manual_seed(seed))
    return torch.cat([x,x], 1)

def shake(model, by=.1):
    "Move the maps off their start, so that queries, keys and heads differ."
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for m in linear_layers(model).values():
            for p in m.feature_map.parameters(): p += (by*torch.randn(p.shape, generator=g)).to(p)
    return model
