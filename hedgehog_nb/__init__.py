"Hedgehog linear attention: a book of notebooks that is a library. The main names load on first use."

__version__ = "0.0.1"

import sys as _sys
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

_where = dict(linear_attention='linear_attention', make_attention='feature_maps', make_feature_map='feature_maps',
              attention_report='metrics', compare_attentions='comparison', linearize='linearize', distill='training',
              finetune='training', save_linearized='linearize', load_linearized='linearize')
__all__ = list(_where)


class _Package(_ModuleType):
    "`linear_attention` and `linearize` name a function and a module: here the function wins, in whatever order they are imported."
    def __setattr__(self, name, value):
        if not (name in _where and isinstance(value, _ModuleType)): super().__setattr__(name, value)

_sys.modules[__name__].__class__ = _Package

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f'{__name__}.{_where[name]}')
    res = globals()[name] = getattr(module, name)
    if _where[name]==name: vars(res).update({n:getattr(module, n) for n in module.__all__}) # `import hedgehog_nb.linearize as L` binds this function: L.linear_layers
    return res

def __dir__(): return sorted({*globals(), *__all__})
