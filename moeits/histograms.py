"""Histograms of weights, and the entropies that they give. Arrays only.

Every matrix is discretised by itself into equal-width bins, once; a pair then costs one pass over two arrays
of bin codes.
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from moeits import method
from moeits.errors import MoeitsError

MAX_BINS = 1 << 16  # codes are uint16
TABLE_CELLS = 1 << 23  # of a joint histogram at a time: 40 MiB per thread
_XLOGX = np.arange(256) * np.log(np.maximum(np.arange(256), 1))


class ConstantError(MoeitsError):
    """All weights of a matrix are equal, so that it has no entropy."""


class Codes(NamedTuple):
    """A discretised matrix.

    Attributes
    ----------
    codes : ndarray of uint16, shape (N,)
        Bin of each weight. Only occupied bins are numbered, the fullest first.
    counts : ndarray of int64, shape (K,)
        Weights in each of the K occupied bins, descending.
    entropy : float
        H(X) in nats.
    """

    codes: np.ndarray
    counts: np.ndarray
    entropy: float


def discretise(weights: object, bins: str | int = "auto", *, out: np.ndarray | None = None) -> Codes:
    """Replace every weight by the number of its bin.

    Bins have equal width from the least to the largest weight; the last includes its right edge. Edges are
    made in the precision of the weights, and at least in float32, as NumPy makes them.

    Parameters
    ----------
    weights : array or tensor
        Any shape; float64, float32, float16 or bfloat16.
    bins : "auto" or int, default="auto"
        Number of bins; "auto" is the rule of :func:`auto_bins`.
    out : ndarray of uint16, optional
        Memory for the codes, if it is of the right size.

    Returns
    -------
    Codes
        Codes of the occupied bins, in the order of the flattened weights.

    Raises
    ------
    ConstantError
        If all weights are equal.
    MoeitsError
        If there are no weights, or some are NaN or infinite.
    """
    array, bfloat16 = _as_array(weights)
    if array.size == 0:
        raise MoeitsError("there are no weights")
    if out is None or out.size != array.size:
        # NumPy lays large arrays in huge pages; one made inside a compiled function costs three times more.
        out = np.empty(array.size, dtype=np.uint16)
    return (
        _code_patterns(array, bfloat16, bins, out) if array.itemsize == 2 else _code_floats(array, bins, out)
    )


def joint_entropy(a: Codes, b: Codes) -> float:
    """H(X,Y) in nats of two discretised matrices with equally many elements."""
    return joint_entropies([(a, b)])[0]


def auto_bins(size: int, extent: float, iqr: float) -> int:
    """Choose the number of bins by NumPy 2.4.6's ``bins="auto"``, whichever NumPy is installed.

    Width = min(max(Freedman-Diaconis, square root / 2), Sturges), that is min(max(2 IQR / N^(1/3), range /
    (2 sqrt(N))), range / (log2(N) + 1)): at most about 2 sqrt(N) bins. N is the `size`, the range is the
    `extent`, and the interquartile range is by linear interpolation.
    """
    freedman_diaconis = 2.0 * iqr * size ** (-1.0 / 3.0)
    width = min(max(freedman_diaconis, extent / math.sqrt(size) / 2), extent / (math.log2(size) + 1.0))
    return max(math.ceil(extent / width), 1) if width > 0 else 1


def occupied_cells(x: np.ndarray, y: np.ndarray, ky: int) -> int:
    """Count the cells of the joint histogram that are not empty."""
    cells = x.astype(np.int64) * ky
    cells += y
    cells.sort()
    return 1 + int(np.count_nonzero(cells[1:] != cells[:-1]))


def joint_entropies(pairs: list[tuple[Codes, Codes]]) -> list[float]:
    """H(X,Y) of pairs, with one joint histogram for all of them."""
    shapes = [(a.counts.size, b.counts.size) for a, b in pairs]
    # Where the joint histogram has more cells than the table, as many of its rows at a time as fit.
    rows = [max(min(kx, TABLE_CELLS // ky), 1) for kx, ky in shapes]
    cells = max(band * ky for band, (_, ky) in zip(rows, shapes, strict=True))
    low, high = np.zeros(cells, dtype=np.uint8), np.zeros(cells, dtype=np.uint32)
    size = pairs[0][0].codes.size
    return [
        method.entropy(_joint_sum(a.codes, b.codes, kx, ky, band, low, high, _XLOGX), size)
        for (a, b), (kx, ky), band in zip(pairs, shapes, rows, strict=True)
    ]


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
        raise MoeitsError(f"the weights are {array.dtype}: give float64, float32, float16 or bfloat16")
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
        raise MoeitsError("NaN or infinite weights")
    if least == largest:
        raise ConstantError(f"all weights are {least}, so the entropy is zero and NMI is not defined")
    if bins == "auto":
        number = auto_bins(size, float(largest - least), iqr())
    elif isinstance(bins, int | np.integer) and not isinstance(bins, bool) and bins > 0:
        number = int(bins)
    else:
        raise MoeitsError(f'bins is {bins!r}: give "auto" or a positive number')
    if number > MAX_BINS:
        raise MoeitsError(f"{number} bins: at most {MAX_BINS} are possible")
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
        raise MoeitsError("NaN or infinite weights")
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
    return Codes(codes, counts, method.entropy(_xlogx(counts), patterns.size))


def _code_floats(array: np.ndarray, bins: str | int, codes: np.ndarray) -> Codes:
    """Codes of float32 and float64 weights, by arithmetic that the edges then correct."""

    def iqr() -> float:
        return _iqr(array.size, lambda ranks: np.sort(array)[ranks])

    edges = _edges(array.min(), array.max(), array.size, iqr, bins)
    rank_of_bin, counts = _rank(_bin(array, edges, codes))
    _look_up(codes, rank_of_bin, codes)
    return Codes(codes, counts, method.entropy(_xlogx(counts), array.size))


def _rank(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rank the occupied bins, the fullest first: often used cells of the joint table then lie together."""
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    if order.size == 1:
        raise MoeitsError("all weights lie in one bin, so the entropy is zero and NMI is not defined")
    rank_of_bin = np.zeros(counts.size, dtype=np.uint16)
    rank_of_bin[order] = np.arange(order.size)
    return rank_of_bin, counts[order]


def _xlogx(counts: np.ndarray) -> float:
    return float((counts * np.log(counts)).sum())


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
