"""Methods that replace groups of similar experts by their average (HC-SMoE, M-SMoE)."""

import numpy as np

from moeits.criteria.base import Layer, best
from moeits.criteria.clusters import average_linkage, euclidean
from moeits.nmi import match_neurons
from moeits.study.methods.change import Change


def merge(layer: Layer, groups: np.ndarray, leaders: dict[int, int], *, align: bool) -> Change:
    """Replace all experts of a group by the average of their weights, each as often as it is used.

    The router keeps its rows: a token that is routed to any expert of the group uses the average. `groups`
    (E,) has the group of each expert, `leaders` of each group the expert whose hidden neurons the others are
    matched with, if `align` says so. One expert for each group is stored.
    """
    block = layer.weights
    neurons = layer.neurons if align else None
    used = np.maximum(layer.statistics.counts, 1)
    for group, leader in leaders.items():
        members = np.flatnonzero(groups == group)
        shares = used[members] / used[members].sum()
        orders = [
            match_neurons(neurons[leader], neurons[member]) if align else slice(None) for member in members
        ]
        for name, part in block.items():
            average = sum(
                share * (part[member][:, order] if name == "down" else part[member][order])
                for share, member, order in zip(shares, members, orders, strict=True)
            )
            part[members] = average
    return Change(block, tuple(range(layer.experts)), len(leaders) / layer.experts)


def hc_smoe(layer: Layer, n_keep: int) -> Change:
    """Group experts with similar mean outputs by average linkage, and merge each group.

    References
    ----------
    doi:10.48550/arXiv.2410.08589.
    """
    groups = average_linkage(euclidean(layer.statistics.mean_outputs), n_keep)
    leaders = {
        group: max(np.flatnonzero(groups == group).tolist(), key=lambda k: layer.statistics.counts[k])
        for group in range(n_keep)
    }
    return merge(layer, groups, leaders, align=False)


def m_smoe(layer: Layer, n_keep: int) -> Change:
    """Let the most used experts lead groups, which the others join by similarity of logits, and merge each.

    References
    ----------
    doi:10.48550/arXiv.2310.01334.
    """
    leading = best(layer.statistics.counts, n_keep)
    columns = layer.statistics.logits / np.maximum(np.linalg.norm(layer.statistics.logits, axis=0), 1e-30)
    similarity = columns.T @ columns[:, leading]
    groups = similarity.argmax(axis=1)
    groups[list(leading)] = np.arange(n_keep)
    return merge(layer, groups, dict(enumerate(leading)), align=True)
