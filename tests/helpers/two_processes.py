"""Distil, align and finetune in as many processes as `torchrun` starts; the first writes weights and losses.

    torchrun --nproc_per_node 2 tests/helpers/two_processes.py FOLDER"""
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from hedgehog_nb.data.models import load_model
from hedgehog_nb.data.text import load_texts, token_blocks
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.training.align import align
from hedgehog_nb.training.batches import distributed_info
from hedgehog_nb.training.distill import distill
from hedgehog_nb.training.finetune import finetune
from helpers.training import OnStep

def train(folder, steps=4, stop=False):
    torch.set_num_threads(1)
    rank,_ = distributed_info()
    model,tok = load_model('embedded')
    linearize(model, num_maps=2)
    data = token_blocks(load_texts('embedded'), tok, 64, max_tokens=13*64, seed=0)  # the last batch of an epoch is smaller
    def on_step(step, *_):
        if stop and step==3: raise SystemExit('stopped')
    a = distill(model, data.split(3), steps, lr=.1, checkpoint=folder/'distill', save_steps=2).losses
    maps = {f'map.{n}':p.detach().clone() for n,p in model.named_parameters() if 'feature_map' in n}
    b = align(model, data.split(3), steps, checkpoint=folder/'align', save_steps=2).losses
    h = finetune(model, data, steps, 4, lr=1e-3, warmup_ratio=0, gradient_accumulation_steps=2, checkpoint=folder/'finetune', save_steps=2,
        callbacks=[OnStep(on_step)], objective='both', eval_data=data[:5], eval_steps=2, compute_metrics=lambda p: dict(rows=len(p.predictions)))
    if rank==0: save_file({**maps, **{n:p.detach() for n,p in model.named_parameters()}, 'losses':torch.tensor(a+b+h.losses),
        'evaluations':torch.tensor([[e['step'], e['loss'], e['rows']] for e in h.evaluations])}, folder/'done')

if __name__=='__main__': train(Path(sys.argv[1]), stop='--stop' in sys.argv)
