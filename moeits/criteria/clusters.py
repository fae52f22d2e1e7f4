"""Groups of similar experts, of which STUN keeps one expert each."""

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from moeits.criteria.base import Layer, in_groups


def average_linkage(distances: np.ndarray, groups: int) -> np.ndarray:
    """Group experts by average linkage of `distances` (E, E): the group of each, 0 to groups - 1, (E,)."""
    if len(distances) == 1:
        return np.zeros(1, dtype=int)
    tree = linkage(squareform(distances, checks=False), method="average")
    return cut_tree(tree, n_clusters=groups)[:, 0]


def euclidean(rows: np.ndarray) -> np.ndarray:
    """Distances of all pairs of rows, shape (E, E)."""
    rows = np.asarray(rows, dtype=np.float64).reshape(len(rows), -1)
    products = rows @ rows.T
    squares = np.diag(products)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * products, 0))
    np.fill_diagonal(distances, 0)
    return distances


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / max(float(values.max()), np.finfo(float).tiny)


def behaviour_distance(router: np.ndarray, coactivation: np.ndarray) -> np.ndarray:
    """Distance, (E, E), of experts whose router rows (E, d) differ and that rarely work together.

    The distance of the rows plus one minus `coactivation` (E, E), the tokens that use both; each divided by
    its largest value.
    """
    together = np.array(coactivation, dtype=np.float64)
    np.fill_diagonal(together, 0)
    distance = _scaled(euclidean(router)) + 1 - _scaled(together)
    np.fill_diagonal(distance, 0)
    return distance


def stun(layer: Layer, n_keep: int) -> tuple[int, ...]:
    """Group the experts by behaviour; of each group, keep the one nearest to the group's mean weights.

    References
    ----------
    doi:10.48550/arXiv.2409.06211.
    """
    distances = behaviour_distance(layer.router, layer.statistics.coactivation)
    flat = layer.neurons.reshape(layer.experts, -1).astype(np.float64)
    size = layer.experts // layer.groups

    def medoids(of: int, count: int) -> list[int]:
        own = slice(of * size, (of + 1) * size)
        clusters, kept = average_linkage(distances[own, own], count), []
        for cluster in range(count):
            members = np.flatnonzero(clusters == cluster)
            rows = flat[own][members]
            off = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
            kept.append(int(members[off.argmin()]))
        return kept

    return in_groups(medoids, layer.experts, n_keep, layer.groups)
