"Hedgehog linear attention: a book of notebooks that is a library. The main names load on first use."

__version__ = "0.1.0"

from importlib import import_module as _import_module

_where = dict(linear_attention='functional', make_attention='attentions.base', make_feature_map='attentions.base',
              attention_report='analysis.report', compare_attentions='analysis.comparison', linearize='models.linearize', distill='training.distill',
              align='training.align', finetune='training.finetune', save_linearized='models.loading', load_linearized='models.loading')
__all__ = list(_where)

def __getattr__(name):
    if name not in _where: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    res = globals()[name] = getattr(_import_module(f'{__name__}.{_where[name]}'), name)
    return res

def __dir__(): return sorted({*globals(), *__all__})
