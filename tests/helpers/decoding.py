"Greedy decoding written out, and prompts padded at the left."
import torch
from helpers.tiny_models import tokens

FREE = dict(do_sample=False, eos_token_id=None, pad_token_id=0)   # write on to the end

@torch.no_grad()
def forward(model, x, mask=None, n=1):
    "Greedy decoding by full forward passes without a cache."
    mask = torch.ones_like(x) if mask is None else mask
    for _ in range(n):
        l = model(input_ids=x, attention_mask=mask, position_ids=(mask.cumsum(-1)-1).clamp_min(0), use_cache=False).logits[:,-1]
        x,mask = torch.cat([x, l.argmax(-1, keepdim=True)], 1), torch.cat([mask, mask[:,:1]*0+1], 1)
    return x

def left_padded(lengths, seed=4):
    T = max(lengths); x = tokens(len(lengths), T, seed)
    mask = (torch.arange(T)>=T-torch.tensor(lengths)[:,None]).long()
    return torch.where(mask.bool(), x, 0), mask
