"""The installed wheel does its job where nothing else of the project is: `make wheel-check` runs this in an empty folder, in an environment without nbdev."""
import sys, tempfile
from importlib.util import find_spec
from pathlib import Path
import torch
import hedgehog_nb
from hedgehog_nb import distill, linear_attention, linearize, load_linearized, make_feature_map, save_linearized
from hedgehog_nb.data.models import load_embedded
from hedgehog_nb.data.text import load_texts, token_blocks
from hedgehog_nb.ops.linear import naive_linear_attention
from hedgehog_nb.results import read_results
from hedgehog_nb.training.evaluate import perplexity

assert Path(hedgehog_nb.__file__).is_relative_to(sys.prefix), f"imported from {hedgehog_nb.__file__}, not from the wheel"
assert not find_spec('nbdev'), "nbdev is installed here, so nothing shows that the package works without it"

torch.manual_seed(0)
q,k,v = (torch.randn(2, h, 70, 16) for h in (4, 2, 2))
fm = make_feature_map('hedgehog', 16, 4, 2)
diff = (linear_attention(q, k, v, fm) - naive_linear_attention(*fm(q, k)[:2], v)).abs().max().item()
assert diff<1e-4, diff

model,tok = load_embedded()
test = token_blocks(load_texts('embedded', 'test'), tok, 128)
softmax,model = perplexity(model, test),linearize(model)
swapped = perplexity(model, test)
distill(model, token_blocks(load_texts('embedded'), tok, 128, max_tokens=20*4*128), 20, batch_size=4)
distilled = perplexity(model, test)
assert softmax < distilled < swapped, (softmax, distilled, swapped)
with tempfile.TemporaryDirectory() as d:
    save_linearized(model, d+'/model')
    again = perplexity(load_linearized(d+'/model'), test)
assert abs(again-distilled)<1e-3, (again, distilled)
n = len(read_results())
assert n>1000, f"{n} numbers came with the package"
print(f"hedgehog_nb {hedgehog_nb.__version__} works: difference {diff:.1e}; perplexity {softmax:.2f}, swapped {swapped:.2f}, distilled {distilled:.2f}, "
      f"loaded again {again:.2f}; {n:,} results")
