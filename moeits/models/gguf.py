"""GGUF files, as llama.cpp runs them: the NMI of their experts, and pruning without dequantising.

A GGUF file stacks the experts of a layer along the slowest axis, so that the bytes of one expert lie
together, whatever the quantisation. All layers have the same number of experts, which the metadata holds.

References
----------
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import hashlib
import os
import re
import struct
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from gguf.constants import (
    GGUF_MAGIC,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSORS,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)
from gguf.gguf_reader import READER_SUPPORTED_VERSIONS
from tqdm import tqdm

from moeits.errors import MissingError, MoeitsError
from moeits.kept import Kept
from moeits.machine.keys import once_for_file
from moeits.machine.paths import CACHE, check_writable, whole
from moeits.models.checkpoint import ExpertBlock, check_disk, measure_blocks
from moeits.models.families import MoELayer, check_budgets
from moeits.models.folder import check_target
from moeits.models.quantised import Dequantised
from moeits.models.safetensors import StoredTensor
from moeits.models.surgery import complete, compose, warn_of_top_k

REFUSED = {"grovemoe": "several of its experts share one adjugate expert, by their numbers"}
"""Architectures with experts that cannot be pruned, and why."""

ARCHITECTURES = {
    MODEL_ARCH_NAMES[architecture]
    for architecture, tensors in MODEL_TENSORS.items()
    if MODEL_TENSOR.FFN_DOWN_EXP in tensors
} - set(REFUSED)
"""Architectures with stacked experts, by the gguf package."""

# Families that presets know, under the names of transformers.
_FAMILIES = {"llama": "mixtral", "qwen2moe": "qwen2_moe", "deepseek2": "deepseek_v2"}
_KEPT = "moeits.kept"
_CUT = re.compile(
    r"blk\.(\d+)\.(?:ffn_(gate|up|down|gate_up)_exps\.\w+|ffn_gate_inp\.(?:weight|bias)|exp_probs_b(?:\.bias)?)$"
)
_FOREIGN = re.compile(r"blk\.\d+\.ffn_(?:\w+\.\d+\.weight|\w+_chexps\.\w+|gate_tid2eid\.\w+)$")
_FLOATS = {GGMLQuantizationType.F32, GGMLQuantizationType.F16}


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file says of its experts.

    Attributes
    ----------
    file : Path
        The file.
    reader : gguf.GGUFReader
        Its metadata, and its tensors mapped into memory.
    architecture : str
        As llama.cpp spells it.
    experts, top_k : int
        Experts of every layer, and how many of them a token uses.
    groups, top_groups : int
        Groups of the router, and how many of them a token may use.
    layers : dict of int to list of gguf.ReaderTensor
        Of every layer, the tensors that list the experts.
    """

    file: Path
    reader: GGUFReader
    architecture: str
    experts: int
    top_k: int
    groups: int
    top_groups: int
    layers: dict[int, list[ReaderTensor]]

    def __str__(self) -> str:
        return f"{self.experts} experts in each of {len(self.layers)} layers, top-{self.top_k}"

    def moe_layer(self, layer: int) -> MoELayer:
        """Say what bounds the pruning of a layer: two experts of each of several groups rank it."""
        return MoELayer(
            layer=layer,
            name=f"blk.{layer}",
            experts=None,
            num_experts=self.experts,
            top_k=self.top_k,
            minimum=2 * self.groups if self.groups > 1 else 1,
            groups=self.groups,
            top_groups=self.top_groups,
            tensors={},
            router=(),
            counters=(),
            top_ks=(),
        )

    @property
    def kept(self) -> Kept | None:
        """Which experts earlier pruning kept."""
        field = self.reader.get_field(_KEPT)
        return None if field is None else Kept.from_json(field.contents(), f"{self.file}: {_KEPT}")


def read_gguf(file: str | Path) -> GGUFModel:
    """Read the structure of a GGUF file, and check that its experts can be told apart.

    Parameters
    ----------
    file : str or Path
        GGUF file of a Mixture-of-Experts model.

    Returns
    -------
    GGUFModel
        Its structure; no weights are read.

    Raises
    ------
    MissingError
        If there is no such file.
    MoeitsError
        If it is no whole GGUF file of a known version, one of several parts, dense or of an unknown
        architecture, or its tensors and its metadata disagree.
    """
    file = Path(file)
    reader = _reader(file)

    def value(key: str, default: object = None) -> object:
        field = reader.get_field(key.format(arch=architecture))
        return default if field is None else field.contents()

    architecture = ""
    architecture = value(Keys.General.ARCHITECTURE)
    experts = value(Keys.LLM.EXPERT_COUNT)
    if (parts := value(Keys.Split.LLM_KV_SPLIT_COUNT, 1)) > 1:
        raise MoeitsError(f"{file} is one of {parts} parts: merge them first, with llama-gguf-split --merge")
    if architecture in REFUSED:
        raise MoeitsError(f"{file}: {architecture!r} models cannot be pruned: {REFUSED[architecture]}")
    if not experts:
        raise MoeitsError(f"{file}: this {architecture!r} model is dense: it has no routed experts to prune")
    if architecture not in ARCHITECTURES:
        raise MoeitsError(
            f"{file}: the architecture {architecture!r} is not known to have stacked experts; known are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    layers = defaultdict(list)
    for tensor in reader.tensors:
        if _FOREIGN.match(tensor.name):
            raise MoeitsError(f"{file}: {tensor.name}: experts stored in this way cannot be pruned")
        if match := _CUT.match(tensor.name):
            layers[int(match[1])].append(tensor)
            if tensor.data.shape[0] != experts:
                raise MoeitsError(
                    f"{file}: {tensor.name} lists {tensor.data.shape[0]} experts, the metadata {experts}"
                )
    groups = value(Keys.LLM.EXPERT_GROUP_COUNT) or 1
    top_groups = value(Keys.LLM.EXPERT_GROUP_USED_COUNT) or groups
    top_k = value(Keys.LLM.EXPERT_USED_COUNT)
    if not layers or not top_k or experts % groups:
        raise MoeitsError(f"{file}: {experts} experts, top-{top_k}, {groups} groups, {len(layers)} layers")
    return GGUFModel(file, reader, architecture, experts, top_k, groups, top_groups, dict(layers))


def gguf_blocks(model: GGUFModel, layers: Collection[int] | None = None) -> dict[int, ExpertBlock]:
    """Find the experts of every layer, as :func:`moeits.models.checkpoint.expert_blocks` does.

    Parameters
    ----------
    model : GGUFModel
        The file.
    layers : collection of int, optional
        Layers; all by default.

    Returns
    -------
    dict of int to ExpertBlock
        By layer: each expert's matrix is dequantised when it is used, in float32.

    Raises
    ------
    MoeitsError
        If a layer has no experts or lacks a tensor, or the gguf package cannot dequantise a type.
    """
    if unknown := sorted(set(layers or ()) - set(model.layers)):
        raise MoeitsError(
            f"{model.file} has no experts in layer {unknown}: it has them in {sorted(model.layers)}"
        )
    blocks = {}
    for layer, tensors in sorted(model.layers.items()):
        if layers is not None and layer not in layers:
            continue
        weights = {_CUT.match(t.name)[2]: t for t in tensors if t.name.endswith("_exps.weight")}
        names = {t.name.partition(f"{layer}.")[2] for t in tensors}
        if "ffn_gate_inp.weight" not in names or "down" not in weights or len(weights) < 2:
            raise MoeitsError(f"{model.file}: layer {layer} has only {', '.join(sorted(names))}")
        projections = {}
        for name in ("gate", "up", "gate_up", "down"):
            if name in weights:
                projections |= _projections(model.file, name, weights[name])
        blocks[layer] = ExpertBlock(layer, model.moe_layer(layer).minimum, model.groups, projections)
    return blocks


def expert_counts(file: str | Path) -> dict[int, int]:
    """Count the experts of every layer of a GGUF file."""
    model = read_gguf(file)
    return dict.fromkeys(sorted(model.layers), model.experts)


def measure_nmi(
    file: str | Path, *, layers: Collection[int] | None = None, **options: object
) -> tuple[dict[int, np.ndarray], dict[str, object]]:
    """NMI matrices of a GGUF file, layer by layer, as :func:`moeits.models.checkpoint.measure_nmi`."""
    model = read_gguf(file)
    about = {
        "model": model.file.name,
        "family": _FAMILIES.get(model.architecture, model.architecture),
        "fingerprint": gguf_fingerprint(model),
    }
    return measure_blocks(gguf_blocks(model, layers), about, gguf_blocks, **options)


def gguf_fingerprint(model: GGUFModel) -> str:
    """Fingerprint a GGUF file: all of it."""

    def compute() -> str:
        with model.file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return f"gguf-{once_for_file(model.file, 'sha256', compute)}"


def check_prunable(
    source: str | Path,
    target: str | Path,
    *,
    at_least: int | None = None,
    at_least_top_k: bool = False,
    **budget: object,
) -> dict[str, int]:
    """Check all that can be known of a pruning before anything is measured.

    Parameters, result and errors are those of :func:`moeits.models.checkpoint.check_prunable`.
    """
    check_target(target)
    check_writable(CACHE)
    model = read_gguf(source)
    gguf_blocks(model)
    layer = model.moe_layer(0)
    floor = max(at_least or 1, layer.least_for_top_k if at_least_top_k else layer.minimum)
    check_budgets([layer], floor, **budget)
    return {"groups": model.groups, "minimum": floor}


def prune_gguf(
    source: str | Path,
    target: str | Path,
    kept: Mapping[int, Sequence[int]] | Kept,
    *,
    progress: bool = False,
) -> Path:
    """Remove experts from a GGUF file; bytes that stay are copied, nothing is dequantised.

    The metadata stays as it is, but for the number of experts, the top-k where fewer experts remain than a
    token uses, and ``moeits.kept``, which holds what ``kept.json`` would.

    Parameters
    ----------
    source : str or Path
        GGUF file, whole or pruned; it is only read.
    target : str or Path
        File to make, written whole or not at all.
    kept : mapping of int to sequence of int, or Kept
        Layer to the experts that stay, equally many in each. A choice for the checkpoint folder that the file
        was made from serves as well.
    progress : bool, default=False
        Show a bar with the time left.

    Returns
    -------
    Path
        The new file.

    Raises
    ------
    ExistsError, PlaceError
        If `target` exists or cannot be written; if the disk is too small, before anything is written.
    MissingError, MoeitsError
        As :func:`read_gguf` and :func:`moeits.models.surgery.complete`; if different numbers of experts would
        stay; if experts or a router that stay in floating point hold NaN or infinite values.
    """
    source, target = Path(source), check_target(target)
    model = read_gguf(source)
    kept = complete(kept, [model.moe_layer(layer) for layer in gguf_blocks(model)], source.name)
    if len(counts := {len(ids) for ids in kept.layers.values()}) > 1:
        raise MoeitsError(
            f"a GGUF file holds one number of experts for all layers, but {sorted(counts)} would stay: "
            "choose them with --uniform, --share or --n-keep"
        )
    # Of what was chosen for a folder, only the numbers can be compared.
    mark, of = gguf_fingerprint(model), kept.fingerprint or ""
    if of.startswith("gguf-") and of != mark:
        raise MoeitsError(
            f"the experts were chosen for another model ({kept.model or 'not named'}, fingerprint {of}); "
            f"{source} has fingerprint {mark}"
        )
    kept = replace(kept, fingerprint=mark)
    warn_of_top_k(kept)
    pieces = {
        tensor.name: np.ascontiguousarray(kept.layers[layer])
        for layer, tensors in model.layers.items()
        for tensor in tensors
    }
    count = len(kept.layers[min(kept.layers)])
    header, sizes = _header(model, compose(model.kept, kept), count)
    size = len(header) + sum(sizes)
    check_disk(target, size)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="prune", disable=not progress)
    with whole(target) as part, part.open("wb") as out, bar:
        bar.update(out.write(header))
        for tensor, length in zip(model.reader.tensors, sizes, strict=True):
            start, ids = out.tell(), pieces.get(tensor.name)
            for piece in [tensor.data] if ids is None else (tensor.data[expert] for expert in ids):
                if ids is not None and tensor.tensor_type in _FLOATS and not np.isfinite(piece).all():
                    raise MoeitsError(f"{source}: {tensor.name} holds NaN or infinite values")
                out.write(np.ascontiguousarray(piece).data)
            out.write(bytes(length - (out.tell() - start)))
            bar.update(length)
        out.flush()
        os.fsync(out.fileno())
    return target


def _reader(file: Path) -> GGUFReader:
    if not file.is_file():
        raise MissingError(f"{file} does not exist")
    with file.open("rb") as stream:
        magic, version = struct.unpack("<II", stream.read(8).ljust(8, b"\0"))
    if magic != GGUF_MAGIC:
        raise MoeitsError(f"{file} is no GGUF file")
    if version not in READER_SUPPORTED_VERSIONS:
        known = " and ".join(map(str, READER_SUPPORTED_VERSIONS))
        raise MoeitsError(
            f"{file}: version {version} of the GGUF format is not read, only {known} (little-endian)"
        )
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        # What the reader raises depends on where the file ends.
        raise MoeitsError(f"{file} is cut short or damaged: {error}") from error


def _projections(file: Path, name: str, tensor: ReaderTensor) -> dict[str, Dequantised]:
    """Locate one stacked tensor's experts; gate and up may be stored as one, gate first."""
    try:
        dequantize(tensor.data[0, :1], tensor.tensor_type)
    except NotImplementedError as error:
        raise MoeitsError(f"{file}: {tensor.name}: {error}") from error
    size = tensor.n_bytes // len(tensor.data)
    rows = int(tensor.shape[1])
    experts = tuple(
        {"weight": StoredTensor(tensor.name, file, "U8", (rows, size // rows), start, start + size)}
        for start in range(tensor.data_offset, tensor.data_offset + tensor.n_bytes, size)
    )
    shape = (rows, int(tensor.shape[0]))
    whole_ = Dequantised(experts, partial(_dequantise, kind=tensor.tensor_type), shape)
    if name != "gate_up":
        return {name: whole_}
    half = rows // 2
    return {
        "gate": replace(whole_, neurons=slice(half)),
        "up": replace(whole_, neurons=slice(half, None)),
    }


def _dequantise(tensors: Mapping[str, torch.Tensor], kind: GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(dequantize(tensors["weight"].numpy(), kind))


def _header(model: GGUFModel, kept: Kept, count: int) -> tuple[bytes, list[int]]:
    """Metadata and list of tensors of the pruned file, and the bytes of each tensor with its padding."""
    reader = model.reader
    top_k = model.moe_layer(0).top_k_of(count)
    numbers = {Keys.LLM.EXPERT_COUNT: count, Keys.LLM.EXPERT_USED_COUNT: top_k}
    changed = {key.format(arch=model.architecture): number for key, number in numbers.items()}
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    ends = [*(field.offset for field in fields[1:]), reader.tensors[0].field.offset]
    pairs = []
    for field, end in zip(fields, ends, strict=True):
        raw = reader.data[field.offset : end].tobytes()
        if field.name in changed:
            number = np.array([changed[field.name]], field.parts[-1].dtype).tobytes()
            raw = raw[: -len(number)] + number
        if field.name != _KEPT:
            pairs.append(raw)
    text = _string(kept.to_json().encode())
    pairs.append(_string(_KEPT.encode()) + struct.pack("<I", GGUFValueType.STRING) + text)

    infos, sizes = [], []
    cut = {tensor.name for tensors in model.layers.values() for tensor in tensors}
    for tensor in reader.tensors:
        name, shape, size = tensor.name, tensor.shape.tolist(), tensor.n_bytes
        if name in cut:
            size = size // shape[-1] * count
            shape[-1] = count
        infos.append(
            _string(name.encode())
            + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            + struct.pack("<IQ", tensor.tensor_type, sum(sizes))
        )
        sizes.append(size + -size % reader.alignment)
    version = reader.fields["GGUF.version"].contents()
    head = struct.pack("<IIQQ", GGUF_MAGIC, version, len(infos), len(pairs)) + b"".join(pairs + infos)
    return head + bytes(-len(head) % reader.alignment), sizes


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text
