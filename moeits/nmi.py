"""Normalised mutual information between the weights of experts, by histograms. Arrays only.

Every matrix is discretised by itself into equal-width bins, once; a pair then costs one pass over two arrays
of bin codes. Source: MoEITS, section 4.1, equations 3 to 11, doi:10.48550/arXiv.2604.10603.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import joblib
import numba
import numpy as np
from scipy.optimize import linear_sum_assignment

from moeits.paths import whole

MAX_BINS = 1 << 16  # codes are uint16
TABLE_CELLS = 1 << 23  # of a joint histogram at a time: 40 MiB per thread
CORRECTIONS = (None, "miller-madow", "null")
NULL_DRAWS = 4  # shuffles behind the mean that the correction "null" subtracts
_NEURON_AXIS = {"gate": 0, "up": 0, "down": 1}
_XLOGX = np.arange(256) * np.log(np.maximum(np.arange(256), 1))

NORMALIZERS: dict[str, Callable[[float, float], float]] = {
    "geometric": lambda hx, hy: math.sqrt(hx * hy),  # the paper's, eq. 6
    "arithmetic": lambda hx, hy: (hx + hy) / 2,
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Preset:
    """A way to measure redundancy.

    Attributes
    ----------
    bins : str or int
        For :func:`nmi_matrix`.
    diagonal : str
        For :func:`moeits.selection.select_experts`.
    weights : mapping of str to mapping, or None
        Weight of each projection, by model family; None is the plain mean, whatever the family.
    """

    bins: str | int
    diagonal: str
    weights: Mapping[str, Mapping[str, float]] | None

    def projection_weights(self, family: str) -> dict[str, float] | None:
        """Weights of the projections of a family (``model_type`` of its config), for :func:`nmi_matrix`.

        Raises
        ------
        ValueError
            If the preset has no weights for the family.
        """
        if self.weights is None:
            return None
        if family not in self.weights:
            raise ValueError(
                f"the authors' code has projection weights for {', '.join(self.weights)}, not for {family}: "
                'use the preset "paper" (plain mean), or give the weights yourself'
            )
        return dict(self.weights[family])


_FINE_GRAINED = {"gate": 0.2, "up": 0.4, "down": 0.4}
PRESETS = {
    "official": Preset(
        "auto",
        "zero",
        {"mixtral": {"gate": 1 / 3, "up": 1 / 3, "down": 1 / 3}}
        | dict.fromkeys(("qwen2_moe", "deepseek_v2"), _FINE_GRAINED),
    ),
    "paper": Preset("auto", "zero", None),
}


class Codes(NamedTuple):
    """A discretised matrix.

    Attributes
    ----------
    codes : ndarray of uint16, shape (N,)
        Bin of each weight. Only occupied bins are numbered, the fullest first.
    counts : ndarray of int64, shape (K,)
        Weights in each of the K occupied bins, descending.
    entropy : float
        H(X) in nats (eq. 3).
    """

    codes: np.ndarray
    counts: np.ndarray
    entropy: float


def nmi(x: object, y: object, *, bins: str | int = "auto", normalizer: str = "geometric") -> float:
    """Normalised mutual information of two matrices of weights (eq. 6).

    Parameters
    ----------
    x, y : array or tensor, same number of elements N
        Weights in float64, float32, float16 or bfloat16; they are compared element by element.
    bins : "auto" or int
        Number of equal-width bins of each matrix, from its least to its largest value. "auto" is the rule of
        :func:`auto_bins`.
    normalizer : {"geometric", "arithmetic", "min", "max"}
        Mean of the two entropies that the mutual information is divided by; the paper's is the geometric.

    Returns
    -------
    float
        I(X;Y) over that mean, in [0, 1].

    Raises
    ------
    ValueError
        If a matrix is empty, holds NaN or infinite values, or has a single value (its entropy is zero); if
        the sizes differ.

    Examples
    --------
    >>> x = np.array([0.0, 0.0, 1.0, 1.0])
    >>> nmi(x, 5 - 2 * x, bins=2)
    1.0
    >>> nmi(x, np.array([0.0, 1.0, 0.0, 1.0]), bins=2)
    0.0
    """
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer is {normalizer!r}: choose one of {', '.join(NORMALIZERS)}")
    a, b = _discretise_named(x, bins, "x"), _discretise_named(y, bins, "y")
    if a.codes.size != b.codes.size:
        raise ValueError(f"x has {a.codes.size} elements and y has {b.codes.size}: they must be equally many")
    return _normalise(a.entropy, b.entropy, joint_entropy(a, b), normalizer)


def nmi_matrix(
    block: Mapping[str, object],
    *,
    bins: str | int = "auto",
    projection_weights: Mapping[str, float] | None = None,
    n_jobs: int | None = None,
    correction: str | None = None,
    align: bool = False,
) -> np.ndarray:
    """NMI matrix R of the experts of one layer (eq. 7 to 11).

    Parameters
    ----------
    block : mapping of str to array or tensor, shape (E, rows, columns)
        Weights of the E experts for each projection, such as ``{"gate": ..., "up": ..., "down": ...}``, in
        float64, float32, float16 or bfloat16. A sequence of E matrices serves as well.
    bins : "auto" or int
        As in :func:`nmi`.
    projection_weights : mapping of str to float, optional
        Weight of each projection, divided by their sum; None is the plain mean of eq. 10.
    n_jobs : int, optional
        Threads; None takes all cores that this process may use. The result does not depend on it.
    correction : {None, "miller-madow", "null"}
        What is done about the bias that finite samples give the estimate: nothing (the paper's); to every
        entropy (K - 1) / 2N is added, K being its occupied cells and N the number of weights; or the mean NMI
        with shuffled weights is subtracted. Corrected values of unrelated experts scatter around 0, on both
        sides.
    align : bool
        First order the second expert's hidden neurons by :func:`match_neurons`, for each pair, so that the
        NMI no longer depends on their order.

    Returns
    -------
    ndarray of float64, shape (E, E)
        Symmetric, zero diagonal.

    Raises
    ------
    ValueError
        If the block is empty, its projections differ in E, the weights' names are not the block's, or a
        matrix has NaN, infinite values or zero entropy; the message names projection and expert. If the
        correction is unknown; if projections to align are not gate, up and down; for "null" with `align`,
        where shuffled weights have no neurons to match.

    References
    ----------
    The correction of Miller and Madow: section 4.1 of doi:10.1162/089976603321780272.
    """
    if correction not in CORRECTIONS:
        known = ", ".join(map(repr, CORRECTIONS))
        raise ValueError(f"correction is {correction!r}: choose one of {known}")
    if correction == "null" and align:
        raise ValueError('correction="null" is not defined with align=True: shuffled weights have no neurons')
    orders = _matched(block) if align else None
    room: list[np.ndarray] = []
    R = _sum_of_projections(
        block,
        projection_weights,
        lambda projection: projection_nmi(
            block[projection],
            bins=bins,
            n_jobs=n_jobs,
            name=projection,
            correction=None if correction == "null" else correction,
            orders=orders,
            room=room,
        ),
    )
    if correction == "null":
        R -= null_nmi(
            block, NULL_DRAWS, bins=bins, projection_weights=projection_weights, n_jobs=n_jobs
        ).mean(0)
    return R


def null_nmi(
    block: Mapping[str, object],
    draws: int,
    *,
    bins: str | int = "auto",
    projection_weights: Mapping[str, float] | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """NMI of every pair with the second expert's weights shuffled: what unrelated experts would score.

    Parameters
    ----------
    block, bins, projection_weights, n_jobs
        As in :func:`nmi_matrix`.
    draws : int
        Number of shuffles.
    seed : int
        Of the shuffles.

    Returns
    -------
    ndarray of float64, shape (draws, E, E)
        Each symmetric, zero diagonal.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: shuffle once or more")
    return np.stack(
        [
            _sum_of_projections(
                block,
                projection_weights,
                lambda projection, draw=draw: projection_nmi(
                    block[projection], bins=bins, n_jobs=n_jobs, name=projection, shuffle=(seed, draw)
                ),
            )
            for draw in range(draws)
        ]
    )


def nmi_zscores(
    block: Mapping[str, object],
    *,
    draws: int = 20,
    bins: str | int = "auto",
    projection_weights: Mapping[str, float] | None = None,
    n_jobs: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """How many standard deviations the NMI of every pair lies above that of shuffled weights.

    Parameters
    ----------
    block, bins, projection_weights, n_jobs
        As in :func:`nmi_matrix`.
    draws : int
        Shuffles, 2 or more, that mean and standard deviation of each pair are taken over.
    seed : int
        Of the shuffles.

    Returns
    -------
    ndarray of float64, shape (E, E)
        Symmetric, zero diagonal.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}: a standard deviation needs 2 shuffles or more")
    options = {"bins": bins, "projection_weights": projection_weights, "n_jobs": n_jobs}
    null = null_nmi(block, draws, seed=seed, **options)
    spread = null.std(axis=0, ddof=1)
    np.fill_diagonal(spread, 1)
    return (nmi_matrix(block, **options) - null.mean(axis=0)) / spread


def match_neurons(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Order the hidden neurons of the second expert so that they are as near as can be to those of the first.

    Parameters
    ----------
    first, second : ndarray, shape (m, n)
        Weights of m neurons.

    Returns
    -------
    ndarray of int, shape (m,)
        Of all orders, ``second[order]`` has the largest inner product with `first`.

    References
    ----------
    Weight matching, doi:10.48550/arXiv.2209.04836.
    """
    return linear_sum_assignment(first @ second.T, maximize=True)[1]


def _matched(block: Mapping[str, object]) -> dict[tuple[int, int], np.ndarray]:
    """For each pair of experts, the order of the second one's neurons."""
    if set(block) - set(_NEURON_AXIS):
        raise ValueError(
            f"align=True knows the neurons of gate, up and down, the block has {', '.join(block)}"
        )
    experts = len(next(iter(block.values()), ()))
    neurons = [
        np.concatenate(
            [np.moveaxis(as_float(part[expert]), _NEURON_AXIS[name], 0) for name, part in block.items()],
            axis=1,
        )
        for expert in range(experts)
    ]
    return {(i, j): match_neurons(neurons[i], neurons[j]) for i, j in combinations(range(experts), 2)}


def _sum_of_projections(
    block: Mapping[str, object],
    projection_weights: Mapping[str, float] | None,
    measure: Callable[[str], np.ndarray],
) -> np.ndarray:
    """Add up what is measured of every projection, by their weights."""
    if not len(block):
        raise ValueError("the block is empty: it has no projection")
    shares = _normalised(projection_weights, list(block))
    R = None
    for projection in block:
        # Looked up one at a time: a block may read its projections from disk.
        part = measure(projection)
        if R is None:
            R = np.zeros_like(part)
        if len(part) != len(R):
            raise ValueError(f"{projection} has {len(part)} experts, the projections before it {len(R)}")
        R += shares[projection] * part
    return R


def projection_nmi(
    weights: object,
    *,
    bins: str | int = "auto",
    n_jobs: int | None = None,
    name: str = "weights",
    correction: str | None = None,
    orders: Mapping[tuple[int, int], np.ndarray] | None = None,
    shuffle: tuple[int, int] | None = None,
    room: list[np.ndarray] | None = None,
) -> np.ndarray:
    """NMI of all pairs of experts for one projection.

    Parameters
    ----------
    weights : array or tensor, shape (E, rows, columns), or sequence of E matrices
        One projection of the experts of a layer.
    bins, n_jobs
        As in :func:`nmi_matrix`.
    name : str
        What error messages call the projection.
    correction : {None, "miller-madow"}
        As in :func:`nmi_matrix`.
    orders : mapping of (int, int) to ndarray, optional
        For each pair, the order of the second expert's hidden neurons.
    shuffle : (int, int), optional
        Seed and number of a draw: every second expert's weights are shuffled.
    room : list of ndarray of uint16, optional
        Memory of another projection's codes to use again, and left with this one's: fresh memory costs as
        much as finding the codes does.

    Returns
    -------
    ndarray of float64, shape (E, E)
        Symmetric, zero diagonal.
    """
    experts = len(weights)
    if not experts:
        raise ValueError(f"{name}: there are no experts")
    workers = joblib.cpu_count() if n_jobs is None else n_jobs
    if workers < 1:
        raise ValueError(f"n_jobs is {n_jobs}: give a number of threads, 1 or more")
    R = np.zeros((experts, experts))
    with ThreadPoolExecutor(workers) as pool:
        spare = room or []

        def code(e: int) -> Codes:
            return _discretise_named(
                weights[e], bins, f"{name} of expert {e}", spare[e] if e < len(spare) else None
            )

        coded = list(pool.map(code, range(experts)))
        if room is not None:
            room[:] = [a.codes for a in coded]
        elements = {a.codes.size for a in coded}
        if len(elements) > 1:
            raise ValueError(f"{name}: the experts have different sizes, {sorted(elements)} weights")
        second = coded
        if shuffle is not None:
            second = [
                a._replace(codes=np.random.default_rng([*shuffle, expert]).permutation(a.codes))
                for expert, a in enumerate(coded)
            ]

        def of_group(group: list[tuple[int, int]]) -> list[float]:
            pairs = [(coded[i], second[j]) for i, j in group]
            if orders is not None:
                axis = _NEURON_AXIS[name]
                pairs = [
                    (a, _ordered(b, np.shape(weights[j]), orders[i, j], axis))
                    for (a, b), (i, j) in zip(pairs, group, strict=True)
                ]
            if correction == "miller-madow":
                return _corrected(pairs)
            return [
                _normalise(a.entropy, b.entropy, joint, "geometric")
                for (a, b), joint in zip(pairs, _joint_entropies(pairs), strict=True)
            ]

        # A pair is one thread's from beginning to end, so that the number of threads changes no sum.
        pairs = list(combinations(range(experts), 2))
        size = math.ceil(len(pairs) / 256)
        groups = [pairs[start : start + size] for start in range(0, len(pairs), size or 1)]
        for group, values in zip(groups, pool.map(of_group, groups), strict=True):
            for (i, j), value in zip(group, values, strict=True):
                R[i, j] = R[j, i] = value
    return R


def discretise(weights: object, bins: str | int = "auto", *, out: np.ndarray | None = None) -> Codes:
    """Replace every weight by the number of its bin.

    Bins have equal width from the least to the largest weight; the last includes its right edge. Edges are
    made in the precision of the weights, and at least in float32, as NumPy makes them.

    Parameters
    ----------
    weights : array or tensor
        Any shape; float64, float32, float16 or bfloat16.
    bins : "auto" or int
        Number of bins.
    out : ndarray of uint16, optional
        Where the codes go, if it is of the right size.

    Returns
    -------
    Codes
        Codes of the occupied bins, in the order of the flattened weights.

    Raises
    ------
    ValueError
        If there are no weights, some are NaN or infinite, or all lie in one bin.
    """
    array, bfloat16 = _as_array(weights)
    if array.size == 0:
        raise ValueError("there are no weights")
    if out is None or out.size != array.size:
        # NumPy lays large arrays in huge pages; one made inside a compiled function costs three times more.
        out = np.empty(array.size, dtype=np.uint16)
    return (
        _code_patterns(array, bfloat16, bins, out) if array.itemsize == 2 else _code_floats(array, bins, out)
    )


def joint_entropy(a: Codes, b: Codes) -> float:
    """H(X,Y) in nats (eq. 4) of two discretised matrices with equally many elements."""
    return _joint_entropies([(a, b)])[0]


def auto_bins(size: int, extent: float, iqr: float) -> int:
    """Choose the number of bins by NumPy 2.4.6's ``bins="auto"``, whichever NumPy is installed.

    Width = min(max(Freedman-Diaconis, square root / 2), Sturges), that is
    min(max(2 IQR / N^(1/3), range / (2 sqrt(N))), range / (log2(N) + 1)): at most about 2 sqrt(N) bins.

    Parameters
    ----------
    size : int
        Number of weights N.
    extent : float
        Their range, the largest minus the least.
    iqr : float
        Their interquartile range, by linear interpolation.

    Returns
    -------
    int
        Number of bins, at least 1.
    """
    freedman_diaconis = 2.0 * iqr * size ** (-1.0 / 3.0)
    width = min(max(freedman_diaconis, extent / math.sqrt(size) / 2), extent / (math.log2(size) + 1.0))
    return max(math.ceil(extent / width), 1) if width > 0 else 1


def write_matrices(
    path: str | Path, matrices: Mapping[int, np.ndarray], settings: Mapping[str, object]
) -> None:
    """Write ``nmi.npz``, whole or not at all.

    Parameters
    ----------
    path : path
        Target; an existing file is replaced.
    matrices : mapping of int to ndarray, shape (E, E)
        R of each layer; in the file it is called ``layer_N``.
    settings : mapping
        What made them (model, fingerprint, preset, bins, ...), kept as JSON under ``settings``.
    """
    arrays = {f"layer_{layer}": np.asarray(R, dtype=np.float64) for layer, R in sorted(matrices.items())}
    with whole(Path(path)) as part, part.open("wb") as file:
        np.savez(file, settings=np.array(json.dumps(settings, sort_keys=True)), **arrays)


def read_matrices(path: str | Path) -> tuple[dict[int, np.ndarray], dict[str, object]]:
    """Read ``nmi.npz``.

    Returns
    -------
    matrices : dict[int, ndarray]
        R of each layer, ascending.
    settings : dict
        What made them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it was not written by :func:`write_matrices`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(file["settings"].item())
            names = (name for name in file.files if name.startswith("layer_"))
            matrices = {int(name.removeprefix("layer_")): file[name] for name in names}
    except FileNotFoundError:
        raise
    except Exception as error:
        # np.load raises a different class for every way a file can be damaged.
        raise ValueError(f"{path} is not an nmi.npz of `moeits nmi`: {error}") from error
    return dict(sorted(matrices.items())), settings


def _normalised(weights: Mapping[str, float] | None, projections: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(projections, 1 / len(projections))
    if set(weights) != set(projections):
        raise ValueError(
            f"projection_weights names {', '.join(weights) or 'none'}, the block has {', '.join(projections)}"
        )
    total = math.fsum(weights.values())
    if not (all(weight >= 0 for weight in weights.values()) and 0 < total < math.inf):
        raise ValueError(f"projection_weights must be finite, not negative, not all zero: {dict(weights)}")
    return {projection: weight / total for projection, weight in weights.items()}


def _normalise(hx: float, hy: float, joint: float, normalizer: str) -> float:
    """NMI from the three entropies; rounding may carry it out of [0, 1] by an ulp or two."""
    return min(max(hx + hy - joint, 0.0) / NORMALIZERS[normalizer](hx, hy), 1.0)


def _ordered(a: Codes, shape: tuple[int, ...], order: np.ndarray, axis: int) -> Codes:
    return a._replace(codes=np.take(a.codes.reshape(shape), order, axis=axis).reshape(-1))


def _corrected(pairs: list[tuple[Codes, Codes]]) -> list[float]:
    """NMI of pairs with (K - 1) / 2N added to each of the three entropies of K occupied cells."""
    found = []
    for (a, b), joint in zip(pairs, _joint_entropies(pairs), strict=True):
        kx, ky, twice = a.counts.size, b.counts.size, 2 * a.codes.size
        hx, hy = a.entropy + (kx - 1) / twice, b.entropy + (ky - 1) / twice
        joint += (_occupied_cells(a.codes, b.codes, ky) - 1) / twice
        found.append((hx + hy - joint) / math.sqrt(hx * hy))
    return found


def _occupied_cells(x: np.ndarray, y: np.ndarray, ky: int) -> int:
    """Count the cells of the joint histogram that are not empty."""
    cells = x.astype(np.int64) * ky
    cells += y
    cells.sort()
    return 1 + int(np.count_nonzero(cells[1:] != cells[:-1]))


def _joint_entropies(pairs: list[tuple[Codes, Codes]]) -> list[float]:
    """H(X,Y) of pairs, with one joint histogram for all of them."""
    shapes = [(a.counts.size, b.counts.size) for a, b in pairs]
    # Where the joint histogram has more cells than the table, as many of its rows at a time as fit.
    rows = [max(min(kx, TABLE_CELLS // ky), 1) for kx, ky in shapes]
    cells = max(band * ky for band, (_, ky) in zip(rows, shapes, strict=True))
    low, high = np.zeros(cells, dtype=np.uint8), np.zeros(cells, dtype=np.uint32)
    size = pairs[0][0].codes.size
    return [
        _entropy(_joint_sum(a.codes, b.codes, kx, ky, band, low, high, _XLOGX), size)
        for (a, b), (kx, ky), band in zip(pairs, shapes, rows, strict=True)
    ]


def _discretise_named(weights: object, bins: str | int, name: str, out: np.ndarray | None = None) -> Codes:
    try:
        return discretise(weights, bins, out=out)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _as_array(weights: object) -> tuple[np.ndarray, bool]:
    """Flatten the weights; 16-bit ones become bit patterns (uint16). Also say whether these are bfloat16."""
    torch = sys.modules.get("torch")  # a tensor can only come from a torch that is already loaded
    if torch is not None and isinstance(weights, torch.Tensor):
        weights = weights.detach().cpu().contiguous().reshape(-1)
        bfloat16 = weights.dtype == torch.bfloat16
        array = weights.view(torch.int16).numpy().view(np.uint16) if bfloat16 else weights.numpy()
    else:
        array = np.ascontiguousarray(weights).reshape(-1)
        bfloat16 = array.dtype.name == "bfloat16"
    if bfloat16 or array.dtype == np.float16:
        return array.view(np.uint16), bfloat16
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"the weights are {array.dtype}: give float64, float32, float16 or bfloat16")
    return array, False


def as_float(weights: object) -> np.ndarray:
    """Weights as an array of float32 or float64, of their own shape."""
    array, bfloat16 = _as_array(weights)
    values = _patterns_as_float32(array, bfloat16) if array.itemsize == 2 else array
    return values.reshape(np.shape(weights))


def _patterns_as_float32(patterns: np.ndarray, bfloat16: bool) -> np.ndarray:
    if bfloat16:
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.view(np.float16).astype(np.float32)


def _edges(least: np.floating, largest: np.floating, size: int, iqr: Callable[[], float], bins: str | int):
    if not np.isfinite(largest - least):
        raise ValueError("NaN or infinite weights")
    if least == largest:
        raise ValueError(f"all weights are {least}, so the entropy is zero and NMI is not defined")
    if bins == "auto":
        number = auto_bins(size, float(largest - least), iqr())
    elif isinstance(bins, int | np.integer) and not isinstance(bins, bool) and bins > 0:
        number = int(bins)
    else:
        raise ValueError(f'bins is {bins!r}: give "auto" or a positive number')
    if number > MAX_BINS:
        raise ValueError(f"{number} bins: at most {MAX_BINS} are possible")
    # Every operation in the weights' own precision: a weight on an edge then falls where NumPy puts it.
    dtype = least.dtype
    edges = np.arange(number + 1, dtype=dtype) * dtype.type((largest - least) / number) + least
    edges[-1] = largest
    return edges


def _iqr(size: int, order_statistics: Callable[[np.ndarray], np.ndarray]) -> float:
    """Interquartile range, each quartile interpolated linearly from the nearer of its two neighbours."""
    rank = (size - 1) * np.array([0.25, 0.75])
    below = rank.astype(np.int64)
    fraction = rank - below
    low, high = order_statistics(np.stack([below, np.minimum(below + 1, size - 1)]))
    quartiles = np.where(fraction < 0.5, low + (high - low) * fraction, high - (high - low) * (1 - fraction))
    return float(quartiles[1] - quartiles[0])


def _code_patterns(patterns: np.ndarray, bfloat16: bool, bins: str | int, codes: np.ndarray) -> Codes:
    """Codes of 16-bit weights: all that matters is how often each of the 65,536 bit patterns occurs."""
    occurrences = _count(patterns)
    occupied = np.flatnonzero(occurrences).astype(np.uint16)
    values = _patterns_as_float32(occupied, bfloat16)
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinite weights")
    order = np.argsort(values, kind="stable")
    occupied, values = occupied[order], values[order]
    until = np.cumsum(occurrences[occupied])

    def iqr() -> float:
        return _iqr(patterns.size, lambda ranks: values[np.searchsorted(until, ranks, side="right")])

    edges = _edges(values[0], values[-1], patterns.size, iqr, bins)
    bin_of_value = np.searchsorted(edges[1:-1], values, side="right")
    counts = np.zeros(edges.size - 1, dtype=np.int64)
    np.add.at(counts, bin_of_value, occurrences[occupied])
    rank_of_bin, counts = _rank(counts)
    code_of_pattern = np.zeros(1 << 16, dtype=np.uint16)
    code_of_pattern[occupied] = rank_of_bin[bin_of_value]
    _look_up(patterns, code_of_pattern, codes)
    return Codes(codes, counts, _entropy(_xlogx(counts), patterns.size))


def _code_floats(array: np.ndarray, bins: str | int, codes: np.ndarray) -> Codes:
    """Codes of float32 and float64 weights, by arithmetic that the edges then correct."""

    def iqr() -> float:
        return _iqr(array.size, lambda ranks: np.sort(array)[ranks])

    edges = _edges(array.min(), array.max(), array.size, iqr, bins)
    rank_of_bin, counts = _rank(_bin(array, edges, codes))
    _look_up(codes, rank_of_bin, codes)
    return Codes(codes, counts, _entropy(_xlogx(counts), array.size))


def _rank(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank the occupied bins, the fullest first: often used cells of the joint table then lie together."""
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if order.size == 1:
        raise ValueError("all weights lie in one bin, so the entropy is zero and NMI is not defined")
    rank_of_bin = np.zeros(counts.size, dtype=np.uint16)
    rank_of_bin[order] = np.arange(order.size)
    return rank_of_bin, counts[order]


def _xlogx(counts: np.ndarray) -> float:
    return float((counts * np.log(counts)).sum())


def _entropy(sum_xlogx: float, size: int) -> float:
    """H = log N - (1/N) sum c log c, in nats, of counts c that add up to N."""
    return math.log(size) - sum_xlogx / size


@numba.njit(nogil=True, cache=True)
def _count(patterns):
    occurrences = np.zeros(1 << 16, dtype=np.int64)
    for pattern in patterns:
        occurrences[pattern] += 1
    return occurrences


@numba.njit(nogil=True, cache=True)
def _look_up(codes, table, out):
    for n in range(codes.size):
        out[n] = table[codes[n]]


@numba.njit(nogil=True, cache=True)
def _bin(array, edges, codes):
    """Write the bin of every weight into `codes`; return how many weights each bin has."""
    last = edges.size - 2
    counts = np.zeros(last + 1, dtype=np.int64)
    least = edges[0]
    scale = (last + 1) / (edges[last + 1] - least)
    for n in range(array.size):
        x = array[n]
        b = min(int((x - least) * scale), last)
        while b > 0 and x < edges[b]:
            b -= 1
        while b < last and x >= edges[b + 1]:
            b += 1
        codes[n] = b
        counts[b] += 1
    return counts


@numba.njit(nogil=True, cache=True)
def _joint_sum(x, y, kx, ky, band, low, high, xlogx):
    """Sum c log c over the joint histogram of two arrays of codes, `band` of its kx rows at a time.

    `low` and `high` hold at least ``band * ky`` cells each, all zero, and are left so. A count is
    ``256 * high + low``: most increments touch `low` only, of which twice as much as of 16 bits fits into a
    cache.
    """
    total = 0.0
    for first in range(0, kx, band):
        _tally(x, y, first, band, ky, low, high)
        total += _drain(low[: band * ky], high[: band * ky], xlogx)
    return total


# The one loop that matters for speed: a function of its own that calls none, because it compiles better so.
@numba.njit(nogil=True, cache=True)
def _tally(x, y, first, band, ky, low, high):
    """Count the elements of `band` rows of the joint histogram."""
    first, rows, columns = np.uint64(first), np.uint64(band), np.uint64(ky)
    one = np.uint8(1)
    for n in range(x.size):
        row = np.uint64(x[n]) - first
        if row < rows:  # unsigned, so that a row before the first is a very large number
            cell = row * columns + np.uint64(y[n])
            count = np.uint8(low[cell] + one)
            low[cell] = count
            if count == 0:
                high[cell] += np.uint32(1)


@numba.njit(nogil=True, cache=True)
def _drain(low, high, xlogx):
    """Sum c log c over the counts c of all cells, and set them to zero."""
    a = b = c = d = 0.0
    quads = low.size // 4 * 4
    for n in range(0, quads, 4):
        # Four sums that do not wait for each other; most cells are empty or hold a small count.
        if (high[n] | high[n + 1] | high[n + 2] | high[n + 3]) == 0:
            i, j, k, m = low[n], low[n + 1], low[n + 2], low[n + 3]
            if (i | j | k | m) != 0:
                a += xlogx[i]
                b += xlogx[j]
                c += xlogx[k]
                d += xlogx[m]
        else:
            for cell in range(n, n + 4):
                count = 256.0 * high[cell] + low[cell]
                if count > 0:
                    a += count * math.log(count)
    for cell in range(quads, low.size):
        count = 256.0 * high[cell] + low[cell]
        if count > 0:
            a += count * math.log(count)
    low[:] = 0
    high[:] = 0
    return (a + b) + (c + d)
