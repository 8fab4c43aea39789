"Medal-grade recipes for image-recognition competitions, as fastai objects"
__version__ = '0.0.1'

_modules = 'imet','bengali','animal','whale','inclusive','boxes','landmarks','masks'
_names = dict(Recipe='recipe.core', Competition='recipe.core', from_json='recipe.core', Run='recipe.folder', blend='recipe.effects',
    Predictions='infer.predictions', runs='look.record', note='look.record', compare_runs='look.against', plot_curves='look.against',
    plot_trust='look.against', medal='look.medals', pack='recipe.packing')
__all__ = [*_modules, *_names]

def __getattr__(name):
    "Load a task or a name when it is first touched: `import recipes` itself imports nothing"
    from importlib import import_module
    if name in _modules: return import_module(f'{__name__}.{name}')
    if name in _names: return getattr(import_module(f'{__name__}.{_names[name]}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}: it has {", ".join(__all__)}')

def __dir__(): return [*globals(), *__all__]
