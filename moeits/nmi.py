"""Normalised mutual information between the weights of experts, by histograms. Arrays only.

The equations are in :mod:`moeits.method`, the histograms in :mod:`moeits.histograms`.
"""

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import joblib
import numpy as np
from scipy.optimize import linear_sum_assignment

from moeits import method
from moeits.errors import MissingError, MoeitsError
from moeits.histograms import (
    Codes,
    ConstantError,
    as_float,
    discretise,
    joint_entropies,
    joint_entropy,
    occupied_cells,
)
from moeits.machine.paths import whole

CORRECTIONS = (None, "miller-madow", "null")
NULL_DRAWS = 4  # shuffles behind the mean that the correction "null" subtracts
_NEURON_AXIS = {"gate": 0, "up": 0, "down": 1}


_FINE_GRAINED = {"gate": 0.2, "up": 0.4, "down": 0.4}
OFFICIAL_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "mixtral": {"gate": 1 / 3, "up": 1 / 3, "down": 1 / 3}
} | dict.fromkeys(("qwen2_moe", "deepseek_v2"), _FINE_GRAINED)
"""Weights of the projections in the authors' code, by model family."""
PRESETS = ("paper", "official")
"""Ways to average the projections: by the text or by the authors' code. "paper", the default, is a hybrid:
the plain mean is the text's (eq. 10); the diagonal of 0 and the bins, which the text does not specify, are
the code's."""


def preset_weights(preset: str, family: str) -> dict[str, float] | None:
    """Weights of the projections of a family (``model_type`` of its config), for :func:`nmi_matrix`.

    The preset "paper" is the plain mean, as in the paper's text; "official" has :data:`OFFICIAL_WEIGHTS`.

    Raises
    ------
    MoeitsError
        If there is no such preset, or it has no weights for the family.
    """
    if preset not in PRESETS:
        raise MoeitsError(f"no preset {preset!r}: there are {', '.join(PRESETS)}")
    if preset == "paper":
        return None
    if family not in OFFICIAL_WEIGHTS:
        raise MoeitsError(
            f"the authors' code has projection weights for {', '.join(OFFICIAL_WEIGHTS)}, not for {family}: "
            'use the preset "paper" (plain mean), or give the weights yourself'
        )
    return dict(OFFICIAL_WEIGHTS[family])


def nmi(x: object, y: object, *, bins: str | int = "auto") -> float:
    """Normalised mutual information of two matrices of weights (eq. 6).

    Parameters
    ----------
    x, y : array or tensor, same number of elements N
        Weights in float64, float32, float16 or bfloat16; they are compared element by element.
    bins : "auto" or int, default="auto"
        Number of equal-width bins of each matrix, from its least to its largest value. "auto" is the rule of
        :func:`moeits.histograms.auto_bins`.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    MoeitsError
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
    a, b = _discretise_named(x, bins, "x"), _discretise_named(y, bins, "y")
    if a.codes.size != b.codes.size:
        raise MoeitsError(
            f"x has {a.codes.size} elements and y has {b.codes.size}: they must be equally many"
        )
    return float(_clipped(method.nmi(a.entropy, b.entropy, joint_entropy(a, b))))


def nmi_matrix(
    block: Mapping[str, object],
    *,
    bins: str | int = "auto",
    projection_weights: Mapping[str, float] | None = None,
    n_jobs: int | None = None,
    correction: str | None = None,
    align: bool = False,
) -> np.ndarray:
    """NMI matrix R of the experts of one layer (eq. 4 to 11).

    Parameters
    ----------
    block : mapping of str to array or tensor, shape (E, rows, columns)
        Weights of the E experts for each projection, such as ``{"gate": ..., "up": ..., "down": ...}``, in
        float64, float32, float16 or bfloat16. A sequence of E matrices serves as well.
    bins : "auto" or int, default="auto"
        As in :func:`nmi`.
    projection_weights : mapping of str to float, optional
        Weight of each projection, divided by their sum; None is the plain mean of eq. 10.
    n_jobs : int, optional
        Threads; None takes all cores that this process may use. The result does not depend on it.
    correction : {None, "miller-madow", "null"}, default=None
        Correction of the bias that finite samples give the estimate: none (the paper's); to every entropy
        (K - 1) / 2N is added, K being its occupied cells and N the number of weights; or the mean NMI with
        shuffled weights is subtracted. Corrected values of unrelated experts scatter around 0.
    align : bool, default=False
        First order the second expert's hidden neurons by :func:`match_neurons`, for each pair, so that the
        NMI no longer depends on their order.

    Returns
    -------
    ndarray of float64, shape (E, E)
        Symmetric, zero diagonal.

    Raises
    ------
    MoeitsError
        If the block is empty, its projections differ in E, or a matrix has NaN or infinite values; if an
        option does not fit the block or another option.

    Notes
    -----
    A constant matrix has no entropy, and its NMI is not defined. It carries no information that another
    expert lacks, so it counts as wholly redundant, NMI 1 with every other expert, with a warning: a dead
    expert is the first that selection removes.

    References
    ----------
    The correction of Miller and Madow: section 4.1 of doi:10.1162/089976603321780272.
    """
    if correction not in CORRECTIONS:
        known = ", ".join(map(repr, CORRECTIONS))
        raise MoeitsError(f"correction is {correction!r}: choose one of {known}")
    if correction == "null" and align:
        raise MoeitsError(
            'correction="null" is not defined with align=True: shuffled weights have no neurons'
        )
    orders = _matched(block) if align else None
    memory: list[np.ndarray] = []
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
            memory=memory,
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
    seed: int = 0,
    projection_weights: Mapping[str, float] | None = None,
    **options: object,
) -> np.ndarray:
    """NMI of every pair with the second expert's weights shuffled: what unrelated experts would score.

    There are 1 or more `draws`, by `seed`; weights and options (bins, n_jobs) are those of
    :func:`nmi_matrix`. The result is of shape (draws, E, E), each matrix symmetric with zero diagonal.
    """
    if draws < 1:
        raise MoeitsError(f"draws is {draws}: shuffle once or more")

    def of(draw: int) -> np.ndarray:
        shuffle = {"shuffle": (seed, draw), **options}
        return _sum_of_projections(
            block, projection_weights, lambda name: projection_nmi(block[name], name=name, **shuffle)
        )

    return np.stack([of(draw) for draw in range(draws)])


def nmi_zscores(
    block: Mapping[str, object], *, draws: int = 20, seed: int = 0, **options: object
) -> np.ndarray:
    """How many standard deviations the NMI of every pair lies above that of shuffled weights, (E, E).

    Mean and standard deviation of each pair are those of :func:`null_nmi`, of 2 `draws` or more.
    """
    if draws < 2:
        raise MoeitsError(f"draws is {draws}: a standard deviation needs 2 shuffles or more")
    null = null_nmi(block, draws, seed=seed, **options)
    spread = null.std(axis=0, ddof=1)
    np.fill_diagonal(spread, 1)
    return (nmi_matrix(block, **options) - null.mean(axis=0)) / spread


def match_neurons(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Order the hidden neurons of the second expert as those of the first, by their weights (m, n).

    Of all orders (m,), ``second[order]`` has the largest inner product with `first`: weight matching,
    doi:10.48550/arXiv.2209.04836.
    """
    return linear_sum_assignment(first @ second.T, maximize=True)[1]


def _matched(block: Mapping[str, object]) -> dict[tuple[int, int], np.ndarray]:
    """For each pair of experts, the order of the second one's neurons."""
    if set(block) - set(_NEURON_AXIS):
        raise MoeitsError(
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
        raise MoeitsError("the block is empty: it has no projection")
    shares = _normalised(projection_weights, list(block))

    def parts() -> Iterator[np.ndarray]:
        # Looked up one at a time: a block may read its projections from disk.
        experts = None
        for projection in block:
            part = measure(projection)
            experts = len(part) if experts is None else experts
            if len(part) != experts:
                raise MoeitsError(
                    f"{projection} has {len(part)} experts, the projections before it {experts}"
                )
            yield part

    return method.redundancy(parts(), (shares[projection] for projection in block))


def projection_nmi(
    weights: object,
    *,
    bins: str | int = "auto",
    n_jobs: int | None = None,
    name: str = "weights",
    correction: str | None = None,
    orders: Mapping[tuple[int, int], np.ndarray] | None = None,
    shuffle: tuple[int, int] | None = None,
    memory: list[np.ndarray] | None = None,
) -> np.ndarray:
    """NMI of all pairs of experts for one projection, shape (E, E): symmetric, zero diagonal.

    Parameters
    ----------
    weights : array or tensor, shape (E, rows, columns), or sequence of E matrices
        One projection of the experts of a layer.
    bins, n_jobs, correction
        As in :func:`nmi_matrix`; the correction is not "null".
    name : str, default="weights"
        What error messages call the projection.
    orders : mapping of (int, int) to ndarray, optional
        For each pair, the order of the second expert's hidden neurons.
    shuffle : (int, int), optional
        Seed and number of a draw: every second expert's weights are shuffled.
    memory : list of ndarray of uint16, optional
        Memory for the codes, taken from another projection and left for the next: fresh memory costs as much
        as finding the codes does.
    """
    experts = len(weights)
    if not experts:
        raise MoeitsError(f"{name}: there are no experts")
    workers = joblib.cpu_count() if n_jobs is None else n_jobs
    if workers < 1:
        raise MoeitsError(f"n_jobs is {n_jobs}: give a number of threads, 1 or more")
    joint = np.zeros((experts, experts))
    with ThreadPoolExecutor(workers) as pool:
        spare = memory or []

        def code(e: int) -> Codes | None:
            try:
                return _discretise_named(
                    weights[e], bins, f"{name} of expert {e}", spare[e] if e < len(spare) else None
                )
            except ConstantError:
                return None

        coded = list(pool.map(code, range(experts)))
        if dead := [expert for expert, a in enumerate(coded) if a is None]:
            warnings.warn(
                f"{name} of expert {', '.join(map(str, dead))} is constant: it carries no information, and "
                "counts as wholly redundant",
                stacklevel=2,
            )
        if memory is not None:
            memory[:] = [a.codes for a in coded if a is not None]
        elements = {a.codes.size for a in coded if a is not None}
        if len(elements) > 1:
            raise MoeitsError(f"{name}: the experts have different sizes, {sorted(elements)} weights")
        second = coded
        if shuffle is not None:
            second = [
                a and a._replace(codes=np.random.default_rng([*shuffle, expert]).permutation(a.codes))
                for expert, a in enumerate(coded)
            ]

        def joint_of(group: list[tuple[int, int]]) -> list[float]:
            pairs = [(coded[i], second[j]) for i, j in group]
            if orders is not None:
                axis = _NEURON_AXIS[name]
                pairs = [
                    (a, _ordered(b, np.shape(weights[j]), orders[i, j], axis))
                    for (a, b), (i, j) in zip(pairs, group, strict=True)
                ]
            joint = joint_entropies(pairs)
            if correction is None:
                return joint
            return [
                h + _bias(occupied_cells(a.codes, b.codes, b.counts.size), a)
                for (a, b), h in zip(pairs, joint, strict=True)
            ]

        # A pair is one thread's from beginning to end, so that the number of threads changes no sum.
        pairs = list(combinations((expert for expert, a in enumerate(coded) if a is not None), 2))
        size = math.ceil(len(pairs) / 256)
        groups = [pairs[start : start + size] for start in range(0, len(pairs), size or 1)]
        for group, values in zip(groups, pool.map(joint_of, groups), strict=True):
            for (i, j), value in zip(group, values, strict=True):
                joint[i, j] = joint[j, i] = value
    biased = correction is None
    h = [1.0 if a is None else a.entropy + (0 if biased else _bias(a.counts.size, a)) for a in coded]
    R = method.nmi_of_pairs(np.array(h), joint)
    if biased:
        R = _clipped(R)
    # A shuffled constant shares nothing: what "null" subtracts of it is 0.
    R[dead, :] = R[:, dead] = 1.0 if shuffle is None else 0.0
    np.fill_diagonal(R, 0)
    return R


def write_matrices(
    path: str | Path, matrices: Mapping[int, np.ndarray], settings: Mapping[str, object]
) -> None:
    """Write ``nmi.npz``, whole or not at all; an existing file is replaced.

    It holds R (E, E) of each layer as ``layer_N``, and the settings that made them (model, fingerprint,
    preset, bins, ...) as JSON.
    """
    arrays = {f"layer_{layer}": np.asarray(R, dtype=np.float64) for layer, R in sorted(matrices.items())}
    with whole(Path(path)) as part, part.open("wb") as file:
        np.savez(file, settings=np.array(json.dumps(settings, sort_keys=True)), **arrays)


def read_matrices(path: str | Path) -> tuple[dict[int, np.ndarray], dict[str, object]]:
    """Read the matrices of each layer, ascending, and their settings from ``nmi.npz``.

    Raises
    ------
    MissingError
        If there is no such file.
    MoeitsError
        If it was not written by :func:`write_matrices`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            settings = json.loads(file["settings"].item())
            names = (name for name in file.files if name.startswith("layer_"))
            matrices = {int(name.removeprefix("layer_")): file[name] for name in names}
    except FileNotFoundError as error:
        raise MissingError(f"{path} does not exist: make it with `moeits nmi`") from error
    except Exception as error:
        # np.load raises a different class for every way a file can be damaged.
        raise MoeitsError(f"{path} is not an nmi.npz of `moeits nmi`: {error}") from error
    return dict(sorted(matrices.items())), settings


def _normalised(weights: Mapping[str, float] | None, projections: list[str]) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(projections, 1 / len(projections))
    if set(weights) != set(projections):
        raise MoeitsError(
            f"projection_weights names {', '.join(weights) or 'none'}, the block has {', '.join(projections)}"
        )
    total = math.fsum(weights.values())
    if not (all(weight >= 0 for weight in weights.values()) and 0 < total < math.inf):
        raise MoeitsError(f"projection_weights must be finite, not negative, not all zero: {dict(weights)}")
    return {projection: weight / total for projection, weight in weights.items()}


def _clipped(value: np.ndarray) -> np.ndarray:
    """NMI in [0, 1], which rounding may leave by an ulp or two."""
    return np.clip(value, 0.0, 1.0)


def _ordered(a: Codes, shape: tuple[int, ...], order: np.ndarray, axis: int) -> Codes:
    return a._replace(codes=np.take(a.codes.reshape(shape), order, axis=axis).reshape(-1))


def _bias(cells: int, of: Codes) -> float:
    """Miller and Madow's correction of an entropy: (K - 1) / 2N for K occupied cells of N weights."""
    return (cells - 1) / (2 * of.codes.size)


def _discretise_named(weights: object, bins: str | int, name: str, out: np.ndarray | None = None) -> Codes:
    try:
        return discretise(weights, bins, out=out)
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error
