"""Quantised weights of experts: one table of formats, and the matrix of one expert at a time.

Pruning never comes here: it copies bytes. The NMI reads weights as the model computes with them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil

import numpy as np
import torch

from moeits.errors import MoeitsError
from moeits.models.safetensors import StoredTensor

Tensors = Mapping[str, torch.Tensor]

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_PART = re.compile(
    r"[._](?:weight_)?(weight|scale_inv|scale|packed|zero_point|shape|g_idx|blocks|scales|qweight|qzeros)$"
)
_NUMBERED = re.compile(r"(?:layers\.(\d+)\.(?:\w+\.)*?)?(?<!\w)experts\.(\d+)(?=\.|$)")
SCALES = re.compile(
    r"(?:\.weight_\w+|\.qweight|\.qzeros|\.scales|\.g_idx|_proj_(?:\w*scale\w*|\w*zero_point))$"
)
"""Names of what belongs to a quantised weight, beside it."""
_PATTERN = re.compile(r"(?<!\w)experts\\?\.\[?\d")


@dataclass(frozen=True)
class Dequantised(Sequence):
    """One projection of all experts of a layer: item e is expert e's matrix, dequantised when it is used.

    Attributes
    ----------
    experts : tuple of mapping of str to StoredTensor
        For each expert, where its tensors lie: weights, scales and so on.
    dequantise : callable
        From these tensors, by the same names, to the matrix (outputs, inputs).
    shape : tuple of int
        Of that matrix.
    neurons : slice
        Those of the matrix's rows that belong to the projection.
    """

    experts: tuple[Mapping[str, StoredTensor], ...]
    dequantise: Callable[[Tensors], torch.Tensor]
    shape: tuple[int, int]
    neurons: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int) -> torch.Tensor:
        stored = self.experts[expert]
        where = next(iter(stored.values()))
        tensors = {name: read_tensor(tensor) for name, tensor in stored.items()}
        try:
            matrix = self.dequantise(tensors)
        except (RuntimeError, IndexError) as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise MoeitsError(f"{where.name}: expert {expert} cannot be dequantised: {shapes}") from error
        if tuple(matrix.shape) != self.shape:
            raise MoeitsError(
                f"{where.name}: expert {expert} has shape {tuple(matrix.shape)}, by the model {self.shape}"
            )
        return matrix[self.neurons]


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read one tensor.

    Raises
    ------
    MoeitsError
        If its type is not known, or its file was cut short.
    """
    if stored.dtype not in _TYPES:
        raise MoeitsError(f"{stored.file}: {stored.name} has the type {stored.dtype}, which is not known")
    size = stored.stop - stored.start
    data = np.fromfile(stored.file, np.uint8, size, offset=stored.start)
    if data.size < size:
        raise MoeitsError(f"{stored.file} is cut short")
    return torch.from_numpy(data).view(_TYPES[stored.dtype]).reshape(stored.shape)


def _spread(scale: torch.Tensor, shape: Sequence[int], block: Sequence[int] | None = None) -> torch.Tensor:
    """Repeat scales for the weights that they belong to: of a block, a group, a row or all."""
    if scale.dtype == torch.uint8:
        scale = (scale.float() - 127).exp2()  # exponents, as in E8M0
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    scale = scale[:, None] if scale.ndim == 1 else scale
    rows, columns = block or (ceil(size / number) for size, number in zip(shape, scale.shape, strict=True))
    full = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return full[: shape[0], : shape[1]]


def _unpack(packed: torch.Tensor, bits: int, dim: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Unpack unsigned numbers from int32 along a dimension, the lowest bits first, or in an order."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts if order is None else shifts[torch.tensor(order).argsort()]
    values = packed.unsqueeze(-1) >> shifts & (1 << bits) - 1
    return (values.transpose(-1, -2).flatten(0, 1) if dim == 0 else values.flatten(1, 2)).float()


def scaled(tensors: Tensors, *, block: Sequence[int] | None = None) -> torch.Tensor:
    """Dequantise numbers of one byte: FP8 with scales of blocks, or compressed-tensors, not packed."""
    weight = tensors["weight"].float()
    if "zero_point" in tensors:
        weight -= _spread(tensors["zero_point"].float(), weight.shape, block)
    scale = tensors["scale_inv"] if "scale_inv" in tensors else tensors["scale"]
    return weight * _spread(scale, weight.shape, block)


def packed(tensors: Tensors, *, bits: int) -> torch.Tensor:
    """Dequantise compressed-tensors' packed integers, which are signed and stored with an offset."""
    rows, columns = tensors["shape"].tolist()[-2:]
    offset = 1 << (bits - 1)
    weight = _unpack(tensors["packed"], bits, 1)[:rows, :columns] - offset
    scale, zero = tensors["scale"].float(), 0.0
    groups = tensors.get("g_idx")
    ordered = groups is not None and bool((groups >= 0).all())
    if "zero_point" in tensors:
        points = _unpack(tensors["zero_point"], bits, 0)[:rows] - offset
        zero = points[:, groups] if ordered else _spread(points, weight.shape)
    return (weight - zero) * (scale[:, groups] if ordered else _spread(scale, weight.shape))


def mxfp4(tensors: Tensors) -> torch.Tensor:
    """Dequantise gpt-oss's MXFP4: 32 numbers E2M1 share an exponent; of a byte, the low half comes first."""
    blocks = tensors["blocks"]
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    numbers = values[torch.stack([blocks & 15, blocks >> 4], dim=-1).long()].flatten(1)
    return numbers * _spread(tensors["scales"], numbers.shape)


def gptq(tensors: Tensors, *, bits: int, group_size: int, zero: int) -> torch.Tensor:
    """Dequantise GPTQ: packed along the inputs, zero points along the outputs and stored less `zero`."""
    weight = _unpack(tensors["qweight"], bits, 0)
    zeros = (_unpack(tensors["qzeros"], bits, 1) + zero) % (1 << bits)
    groups = tensors.get("g_idx")
    if groups is None:
        groups = torch.arange(len(weight)) // (group_size if group_size > 0 else len(weight))
    return ((weight - zeros[groups]) * tensors["scales"].float()[groups]).T


def awq(tensors: Tensors, *, group_size: int) -> torch.Tensor:
    """Dequantise AWQ's 4 bits: packed along the outputs, even ones first."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    weight, zeros = (_unpack(tensors[name], 4, 1, order) for name in ("qweight", "qzeros"))
    groups = torch.arange(len(weight)) // (group_size if group_size > 0 else len(weight))
    return ((weight - zeros[groups]) * tensors["scales"].float()[groups]).T


def _compressed(settings: Mapping) -> tuple[Sequence[str], Callable]:
    groups = list(settings.get("config_groups", {}).values())
    named = [group for group in groups if any("experts" in str(t) for t in group.get("targets", ()))]
    group = (named or groups or [{}])[0]
    weights, form = group.get("weights") or {}, group.get("format") or settings.get("format")
    if form == "pack-quantized" and weights.get("num_bits") in (2, 4, 8):
        return ("packed", "scale", "shape"), partial(packed, bits=weights["num_bits"])
    if form in ("float-quantized", "int-quantized", "naive-quantized") and weights.get("num_bits") == 8:
        return ("weight", "scale"), partial(scaled, block=weights.get("block_structure"))
    raise MoeitsError(f"its format {form!r} with {weights.get('num_bits')} bits is not")


def _gptq(settings: Mapping) -> tuple[Sequence[str], Callable]:
    if settings.get("bits") not in (2, 4, 8):
        raise MoeitsError(f"{settings.get('bits')} bits are not")
    zero = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    options = {"bits": settings["bits"], "group_size": settings.get("group_size", -1), "zero": zero}
    return ("qweight", "qzeros", "scales"), partial(gptq, **options)


def _awq(settings: Mapping) -> tuple[Sequence[str], Callable]:
    if settings.get("bits") != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
        raise MoeitsError(f"version {settings.get('version')!r} with {settings.get('bits')} bits is not")
    return ("qweight", "qzeros", "scales"), partial(awq, group_size=settings.get("group_size", -1))


FORMATS: dict[str, Callable[[Mapping], tuple[Sequence[str], Callable]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": lambda s: (("weight", "scale_inv"), partial(scaled, block=s.get("weight_block_size"))),
    "gptq": _gptq,
    "mxfp4": lambda _: (("blocks", "scales"), mxfp4),
}
"""By ``quant_method`` of a configuration, from its settings: the tensors of a weight, and what reads them."""


@dataclass(frozen=True)
class Format:
    """How a checkpoint's weights are quantised.

    Attributes
    ----------
    method : str
        Key of :data:`FORMATS`.
    needed : sequence of str
        Tensors without which a weight cannot be read.
    dequantise : callable
        From the tensors of a weight to its matrix (outputs, inputs).
    """

    method: str
    needed: Sequence[str]
    dequantise: Callable[[Tensors], torch.Tensor]

    @classmethod
    def of(cls, settings: Mapping, where: object) -> "Format":
        """Find the format that a ``quantization_config`` describes.

        Raises
        ------
        MoeitsError
            If it is not known; the message names those that are.
        """
        method = settings.get("quant_method")
        try:
            if method not in FORMATS:
                raise MoeitsError("this method is not")
            return cls(method, *FORMATS[method](settings))
        except MoeitsError as error:
            raise MoeitsError(
                f"{where}: the weights are quantised by {method!r}: {error} read here; known are "
                f"{', '.join(FORMATS)}. Save the model dequantised first"
            ) from None

    def projection(
        self, where: str, tensors: Mapping[int | None, Mapping[str, StoredTensor]], count: int, shape: tuple
    ) -> Dequantised:
        """Put the tensors of one projection of all experts together.

        Parameters
        ----------
        where : str
            Names layer and projection in errors.
        tensors : mapping of int to mapping of str to StoredTensor
            By expert, or all under None, and by the names that :func:`split_name` gives.
        count : int
            Experts of the layer.
        shape : tuple of int
            Of the dequantised matrix.
        """
        if stacked := tensors.get(None):
            for part, tensor in stacked.items():
                if tensor.shape[:1] != (count,) and part not in ("shape", "g_idx"):
                    raise MoeitsError(f"{where}: {tensor.name} has shape {tensor.shape}, of {count} experts")
            experts = [
                {part: _of_expert(tensor, expert, count) for part, tensor in stacked.items()}
                for expert in range(count)
            ]
        else:
            experts = [tensors[expert] for expert in range(count)]
        for expert, parts in enumerate(experts):
            if missing := sorted(set(self.needed) - set(parts)):
                raise MoeitsError(
                    f"{where} of expert {expert} lacks its {', '.join(missing)} ({self.method})"
                )
        return Dequantised(tuple(experts), self.dequantise, shape)


def _of_expert(tensor: StoredTensor, expert: int, count: int) -> StoredTensor:
    if tensor.shape[:1] != (count,):
        return tensor
    size = (tensor.stop - tensor.start) // count
    start = tensor.start + expert * size
    return replace(tensor, shape=tensor.shape[1:], start=start, stop=start + size)


def split_name(name: str) -> tuple[str, str]:
    """Split a tensor's name into that of its weight, and what it holds of it: ``weight``, ``scale``, ..."""
    match = _PART.search(name)
    return (name[: match.start()], match[1]) if match else (name, "weight")


def renumbered(settings: object, kept: Mapping[int, Sequence[int]], counts: Mapping[int, int]) -> object:
    """Renumber the experts that a ``quantization_config`` names, and drop the removed ones.

    Parameters
    ----------
    settings : object
        It, or a part of it.
    kept : mapping of int to sequence of int
        Layer to the experts that stay.
    counts : mapping of int to int
        Layer to the experts before.

    Returns
    -------
    object
        The same, renumbered.

    Raises
    ------
    MoeitsError
        If a pattern, or a name without a layer, names some of the experts: their numbers change by layer.
    """
    if isinstance(settings, Mapping):
        keys = renumbered(list(settings), kept, counts)
        if len(keys) != len(settings):
            raise MoeitsError(f"quantization_config: settings of single experts, {', '.join(settings)}")
        values = (renumbered(value, kept, counts) for value in settings.values())
        return dict(zip(keys, values, strict=True))
    if not isinstance(settings, list | tuple):
        return settings
    found = []
    for entry in settings:
        match = _NUMBERED.search(entry) if isinstance(entry, str) else None
        if match is None or set(entry) & set("\\*^$[(|:"):
            if isinstance(entry, str) and _PATTERN.search(entry):
                raise MoeitsError(
                    f"quantization_config: {entry!r} names single experts, whose numbers change"
                )
            found.append(renumbered(entry, kept, counts))
        elif match[1] is None:
            left = {len(ids) for ids in kept.values()}
            names = {
                f"{entry[: match.start(2)]}{e}{entry[match.end() :]}" for e in range(max(counts.values()))
            }
            if len(left) > 1 or not names <= set(settings):
                raise MoeitsError(f"quantization_config: {entry!r} names single experts of all layers")
            found += [entry] if int(match[2]) < min(left) else []
        elif (ids := kept.get(int(match[1]))) is None:
            found.append(entry)
        elif int(match[2]) in ids:
            new = list(ids).index(int(match[2]))
            found.append(f"{entry[: match.start(2)]}{new}{entry[match.end() :]}")
    return found
