"""MoEITS: prune the redundant experts of a Mixture-of-Experts language model.

The package is lazy: importing :mod:`moeits` or :mod:`moeits.nmi` loads no deep-learning framework.
"""

from importlib import import_module

# Not lazy: loaded later, the module would take the name of its function.
from moeits.simplify import simplify as simplify

_LAZY = {
    "evaluate": "moeits.evaluation",
    "heal": "moeits.healing.lora",
    "load_model": "moeits.models.folder",
    "nmi_matrix": "moeits.nmi",
    "prune_checkpoint": "moeits.models.checkpoint",
    "prune_model": "moeits.models.surgery",
    "push": "moeits.models.hub",
    "save_model": "moeits.models.folder",
    "select_experts": "moeits.selection",
}
__all__ = sorted([*_LAZY, "simplify"])


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moeits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
