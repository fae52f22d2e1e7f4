"""MoEITS: prune the redundant experts of a Mixture-of-Experts language model.

The package is lazy: importing :mod:`moeits` or :mod:`moeits.nmi` loads no deep-learning framework.
"""

from importlib import import_module

_LAZY = {
    "load_model": "moeits.surgery",
    "nmi_matrix": "moeits.nmi",
    "prune_model": "moeits.surgery",
    "save_model": "moeits.surgery",
    "select_experts": "moeits.selection",
    "simplify": "moeits.pipeline",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moeits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
