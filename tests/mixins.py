"""transformers' own tests of its models, run on converted ones: `make test-all`, which fetches them with the source of the installed version.

A source distribution has `ModelTesterMixin`; a checkout of transformers, named by TRANSFORMERS_SOURCE, has `GenerationTesterMixin` too.
What is not asked of a converted model is in `NOT_ASKED`, with the reason. MIXINS_CONVERT=0 runs the softmax models, for comparison."""
import fnmatch, importlib, os, sys, types, unittest
from pathlib import Path
import torch
from transformers import (BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, GPT2Config, GPT2ForSequenceClassification,
    GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, ViTConfig, ViTForImageClassification, ViTModel)
from hedgehog_nb.models.linearize import linearize
from hedgehog_nb.models.loading import load_linearized

SOURCE = Path(os.environ['TRANSFORMERS_SOURCE'])   # an unpacked source distribution, or a checkout
CONVERT = os.environ.get('MIXINS_CONVERT', '1')=='1'

NOT_ASKED = {
    'test_eager_matches_*': "compares implementations of softmax with each other",
    'test_sdpa_can_dispatch_*': "asks which implementation of softmax a new model has; a class that converts when it is made has another",
    'test_can_set_attention_dynamically': "the same",
    'test_attention_outputs': "sets config.output_attentions, which transformers takes for 'eager' alone and refuses for sdpa too "
        "(asked for in the call, tests/test_linearize.py compares the weights)",
    'test_retain_grad_hidden_states_attentions': "takes the gradient of weights, which are computed beside the output, not on the way to it",
    'test_from_pretrained_no_checkpoint': "loads from no folder, which is refused in words",
    'test_model_weights_reload_no_missing_tied_weights': "loads a folder without weights, which is refused in words",
    'test_base_model_prefix_loads_base_weights': "saves a softmax body under the config of a converted model; without maps it is refused in words",
    'test_generation_tester_mixin_inheritance': "about how transformers' own tests are written",
    'test_model_get_set_embeddings': "about models with a vocabulary",
}

def _empty(name, cls):
    "A module with an empty class, for what a source distribution leaves out."
    m = types.ModuleType(name); setattr(m, cls, type(cls, (), {})); sys.modules[name] = m

def _load():
    "transformers' `tests` as a package of their own name; that of this project is a folder of scripts."
    sys.modules['tests'] = tests = types.ModuleType('tests'); tests.__path__ = [str(SOURCE/'tests')]
    sys.path.insert(0, str(SOURCE))
    for part,cls in (('exporters.test_export','ExportTesterMixin'), ('generation.test_utils','GenerationTesterMixin')):
        if not (SOURCE/'tests'/(part.replace('.', '/')+'.py')).exists():
            sys.modules.setdefault('tests.'+part.split('.')[0], types.ModuleType('tests.'+part.split('.')[0])); _empty('tests.'+part, cls)
    return importlib.import_module('tests.test_modeling_common')

common = _load()
ids = lambda *shape: common.ids_tensor(list(shape), 61)

def converted(cls):
    "A class that makes converted models, and loads them."
    if not CONVERT: return cls
    def init(self, config, *args, **kwargs):
        cls.__init__(self, config, *args, **kwargs)
        if self.device.type!='meta': linearize(self)
    def load(c, path, *args, **kwargs): return load_linearized(path, cls=cls, **kwargs)
    return type(cls.__name__, (cls,), dict(__init__=init, from_pretrained=classmethod(load), __module__=cls.__module__))

SMALL = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
KINDS = dict(
    llama=(LlamaConfig, dict(SMALL, num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, pad_token_id=0),
        (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification), True),
    gpt2=(GPT2Config, dict(n_embd=32, n_layer=2, n_head=4, n_inner=37, vocab_size=61, n_positions=64, pad_token_id=0, bos_token_id=60, eos_token_id=60),
        (GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification), True),
    bert=(BertConfig, dict(SMALL, vocab_size=61, max_position_embeddings=64), (BertModel, BertForMaskedLM, BertForSequenceClassification), False),
    vit=(ViTConfig, dict(SMALL, image_size=30, patch_size=2), (ViTModel, ViTForImageClassification), False))

class Tester:
    "What transformers' tests ask of a model's tester."
    is_training,batch_size,hidden_size,num_hidden_layers,num_attention_heads = True,3,32,2,4
    def __init__(self, kind):
        self.config_class,self.settings,_,self.causal = KINDS[kind]
        self.seq_length = self.encoder_seq_length = self.key_length = 226 if kind=='vit' else 7
        self.kind = kind
    def get_config(self): return self.config_class(**self.settings)
    def prepare_config_and_inputs_for_common(self):
        if self.kind=='vit': return self.get_config(), dict(pixel_values=common.floats_tensor([3, 3, 30, 30]))
        return self.get_config(), dict(input_ids=ids(3, 7), attention_mask=torch.ones(3, 7, dtype=torch.long))

def _tests(kind):
    cls,_,models,causal = KINDS[kind]
    class Tests(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
        all_model_classes = tuple(converted(m) for m in models)
        all_generative_model_classes = tuple(m for m in all_model_classes if causal and 'LM' in m.__name__)
        test_resize_embeddings,has_attentions,_is_stateful = kind!='vit',True,CONVERT
        def setUp(self): self.model_tester = Tester(kind)
    for name in dir(Tests):
        why = next((w for p,w in NOT_ASKED.items() if fnmatch.fnmatch(name, p) and (p!='test_model_get_set_embeddings' or kind=='vit')), None)
        if why: setattr(Tests, name, unittest.skip(why)(lambda self: None))
    Tests.__name__ = Tests.__qualname__ = f'Test_{kind}'
    return Tests

for _kind in KINDS: globals()[f'Test_{_kind}'] = _tests(_kind)
del _kind
