"""The methods that the study compares: all criteria, and methods that change weights."""

from moeits.criteria import CRITERIA, Criterion
from moeits.errors import MoeitsError
from moeits.machine.keys import by_value
from moeits.study.methods import compression, merging, recombination
from moeits.study.methods.change import Changing

METHODS: dict[str, Criterion] = CRITERIA | {
    "moe-i2-low-rank": Changing("MoE-I², low rank", text=None, change=compression.low_rank),
    "stun-sparse": Changing("STUN, both stages", change=compression.stun_sparse),
    "dern": Changing("DERN", change=recombination.dern),
    "hc-smoe": Changing("HC-SMoE", change=merging.hc_smoe),
    "m-smoe": Changing("M-SMoE", change=merging.m_smoe),
    "moe-pruner": Changing("MoE-Pruner", change=compression.moe_pruner),
    "mc-moe": Changing("MC-MoE", change=compression.mc_moe),
}
"""Every method by name."""


@by_value
def method_named(name: str) -> Criterion:
    """Look up a method; a MoeitsError, where there is none of that name, lists the known ones."""
    if name not in METHODS:
        raise MoeitsError(f"no method {name!r}: there are {', '.join(METHODS)}")
    return METHODS[name]
