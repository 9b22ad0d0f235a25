"What tests of training share: a function as a callback, and training as an expression."
import transformers
from hedgehog_nb.training.finetune import add_lora, finetune

class OnStep(transformers.TrainerCallback):
    "Calls `fn(step, loss, seconds)` after each step, and at the start for the steps that were done before."
    def __init__(self, fn): self.fn = fn
    def on_train_begin(self, args, state, control, **kw):
        for l in state.log_history:
            if 'loss' in l: self.fn(l['step'], l['loss'], l['seconds'])
    def on_log(self, args, state, control, logs=None, **kw):
        if 'loss' in logs: self.fn(state.global_step, logs['loss'], logs['seconds'])

def finetuned(model, *args, **kw):
    "The model after `finetune`."
    finetune(model, *args, **kw)
    return model

def adapted(model, *args, lora, **kw):
    "The `PeftModel` after `finetune`, its adapters beside the weights."
    return finetuned(add_lora(model, **lora), *args, **kw)
