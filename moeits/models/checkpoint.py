"""Checkpoints as folders of safetensors files: one projection of one layer at a time, never the whole model.

The layers and their shapes come from the configuration; where their weights lie comes from the names and the
headers of the files. Nothing here is written for one model.
"""

import json
import os
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import joblib
import numpy as np
import torch
from tqdm import tqdm

from moeits.errors import BudgetError, MoeitsError, PlaceError
from moeits.kept import PADDED, Kept
from moeits.machine.keys import code_digest, digest, versions
from moeits.machine.paths import CACHE, check_writable, whole
from moeits.machine.spread import unordered
from moeits.models.card import read_card
from moeits.models.families import (
    LAYER,
    MoELayer,
    check_budgets,
    expert_block,
    moe_layers,
    router_dimension,
)
from moeits.models.folder import (
    carry_files,
    check_target,
    describe_folder,
    folder_sizes,
    hollow_model,
    read_config,
)
from moeits.models.hub import find, name_of
from moeits.models.quantised import SCALES, Dequantised, Format, read_tensor, renumbered, split_name
from moeits.models.safetensors import INDEX, StoredTensor, fingerprint, stored_tensors
from moeits.models.surgery import complete, compose, pruned_settings, warn_of_top_k
from moeits.nmi import nmi_matrix, preset_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_DTYPES = {
    "F64": (np.uint64, torch.float64),
    "F32": (np.uint32, torch.float32),
    "F16": (np.uint16, torch.float16),
    "BF16": (np.uint16, torch.bfloat16),
}
# Last words of tensors' names, and what they hold: of one expert, or of all experts in three dimensions.
_ROLES = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "wi_0": "gate",
    "wi": "up",
    "wi_1": "up",
    "v1": "up",
    "down_proj": "down",
    "wo": "down",
    "w2": "down",
    "w2_weight": "down",
    "fc2": "down",
    "output_linear": "down",
    "gate_up_proj": "gate_up",
    "fc1": "gate_up",
    "input_linear": "gate_up",
    "w13_weight": "interleaved gate_up",
}
_EXPERT = re.compile(
    r"\.(?:experts|block_sparse_moe)\.(?:mlp\.)?(?:(?:expert_)?(?P<expert>\d+)\.)?(?P<word>\w+?)(?:\.weight)?$"
)


# By expert (None for all of them), and by what it holds of the weight: a StoredTensor.
_Stored = Mapping[int | None, Mapping[str, StoredTensor]]


def family(folder: str | Path) -> str:
    """Name the family of a checkpoint: the ``model_type`` of its (text) configuration."""
    return read_config(folder).get_text_config().model_type


@dataclass(frozen=True)
class Projection(Sequence):
    """One projection of all experts of a layer: item e is the matrix of expert e.

    An item is a view of its file, mapped into memory: nothing is read before it is used, nothing is kept, and
    what is written to it stays in memory. A file must not be cut short while it is used.

    Attributes
    ----------
    pieces : tuple of (Path, int, str)
        For each expert, the file, the first byte in it, and the type as safetensors spells it.
    shape : tuple of int
        Rows and columns of a piece.
    transposed : bool
        Whether the pieces are the matrices' transposes.
    neurons : slice
        Those of a piece's neurons that belong to the projection.
    """

    pieces: tuple[tuple[Path, int, str], ...]
    shape: tuple[int, int]
    transposed: bool = False
    neurons: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, expert: int) -> torch.Tensor:
        file, start, name = self.pieces[expert]
        bits, dtype = _DTYPES[name]
        try:
            mapped = np.memmap(file, bits, mode="c", offset=start, shape=self.shape)
        except ValueError as error:
            raise MoeitsError(f"{file} is cut short: {error}") from error
        # Older writers did not align the numbers.
        matrix = torch.from_numpy(np.require(mapped, requirements="A")).view(dtype)
        return (matrix.T if self.transposed else matrix)[self.neurons]


class ExpertBlock(Mapping):
    """Weights of the experts of one layer, where they lie on disk.

    ``block["gate"]`` and ``block["up"]`` are sequences of E tensors (m, d), ``block["down"]`` of E tensors
    (d, m), in the type they are stored in, each read when it is used. Blocks can be pickled.

    Attributes
    ----------
    layer : int
        Number of the decoder layer.
    num_experts : int
        Routed experts E.
    minimum, groups : int
        Fewest experts with which the layer works, and groups of its router.
    """

    def __init__(self, layer: int, minimum: int, groups: int, projections: Mapping[str, Projection]) -> None:
        self.layer, self.minimum, self.groups = layer, minimum, groups
        self._projections = dict(projections)
        self.num_experts = len(self._projections["down"])

    def __getitem__(self, projection: str) -> Projection:
        return self._projections[projection]

    def __iter__(self) -> Iterator[str]:
        return iter(self._projections)

    def __len__(self) -> int:
        return len(self._projections)

    def __repr__(self) -> str:
        return f"<ExpertBlock: layer {self.layer}, {self.num_experts} experts, {', '.join(self)}>"


def expert_blocks(
    folder: str | Path, layers: Collection[int] | None = None
) -> Iterator[tuple[int, ExpertBlock]]:
    """Go through the Mixture-of-Experts layers of a checkpoint.

    All names, shapes and files are checked before the first layer is given. Weights are read only when the
    matrix of an expert is used.

    Parameters
    ----------
    folder : str or Path
        Folder of a checkpoint of a known family, whole or pruned: one file or several, one tensor for each
        expert (``experts.N.w1``, ``experts.N.gate_proj``, ...) or for all (``experts.gate_up_proj``, ...).
    layers : collection of int, optional
        Decoder layers to read; all by default.

    Yields
    ------
    layer : int
        Number N of ``model.layers.N``.
    block : ExpertBlock
        Its weights.

    Raises
    ------
    MissingError
        If the folder, its configuration or a file is missing.
    MoeitsError
        If a file is damaged, a layer lacks an expert or has another shape than the configuration says, the
        weights are quantised, the model is dense or of an unknown family, or a layer is not one of its own.
    """
    config = read_config(folder)
    tensors = stored_tensors(folder)
    quantised = _quantisation(folder, config, tensors)
    expected = {layer.layer: layer for layer in moe_layers(hollow_model(config))}
    if unknown := sorted(set(layers or ()) - set(expected)):
        raise MoeitsError(f"{folder} has no experts in layer {unknown}: it has them in {sorted(expected)}")
    stored = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    places = _places(tensors, expected)
    for tensor in tensors.values():
        name, part = split_name(tensor.name) if quantised else (tensor.name, "weight")
        match = _EXPERT.search(name)
        if match and match["word"] in _ROLES and (layer := places.get(_place(name))) is not None:
            expert = None if match["expert"] is None else int(match["expert"])
            stored[layer][_ROLES[match["word"]]][expert][part] = tensor
    blocks = [
        ExpertBlock(number, layer.minimum, layer.groups, _projections(layer, stored[number], quantised))
        for number, layer in expected.items()
        if layers is None or number in layers
    ]
    for block in blocks:
        yield block.layer, block


def expert_counts(source: str | Path) -> dict[int, int]:
    """Count the experts of every layer of a checkpoint, as :func:`expert_blocks` finds them."""
    return {layer: block.num_experts for layer, block in expert_blocks(find(source))}


def _quantisation(
    folder: str | Path, config: "PreTrainedConfig", tensors: Mapping[str, StoredTensor]
) -> Format | None:
    """Find how weights are quantised; where only the configuration says so, name what to remove from it."""
    if not (settings := getattr(config, "quantization_config", None)):
        return None
    method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
    scaled = [
        name for name in tensors if re.search(r"scales?(_inv)?$|q(weight|zeros)$|_packed$|absmax$", name)
    ]
    if scaled or {tensor.dtype for tensor in tensors.values()} - set(_DTYPES) - {"I64", "I32", "BOOL"}:
        return Format.of(settings, folder)
    raise MoeitsError(
        f"{Path(folder) / 'config.json'} says that the weights are quantised ({method}), but they are stored "
        "in floating point: remove the key 'quantization_config' from it"
    )


def check_prunable(
    source: str | Path,
    target: str | Path | None = None,
    *,
    tau: float | None = None,
    n_keep: int | None = None,
    share: float | None = None,
    at_least: int | None = None,
    at_least_top_k: bool = False,
    drop_mtp: bool = False,
) -> dict[str, int]:
    """Check all that configuration, index and headers tell of a pruning, before anything is measured.

    Parameters
    ----------
    source : str or Path
        Folder of a checkpoint, or a model of the hub.
    target : str or Path, optional
        Folder to make.
    tau, n_keep, share : optional
        The budget, as in :func:`moeits.selection.choose`.
    at_least : int, optional
        Fewest experts per layer, where the family's minimum is not higher.
    at_least_top_k : bool, default=False
        Keep so many experts in every layer that a token can use as many as before.
    drop_mtp : bool, default=False
        As in :func:`prune_checkpoint`.

    Returns
    -------
    dict of str to int
        ``groups`` of the routers, and ``minimum``: the fewest experts per layer that all this allows.

    Raises
    ------
    ExistsError, PlaceError
        If the target exists, it or the cache cannot be written, or the disk is too small for the smallest
        model that the budget allows.
    BudgetError
        If the budget cannot be kept.
    MissingError, MoeitsError
        As :func:`expert_blocks`; if a router is stored in a way that is not known, or layers for multi-token
        prediction have another number of experts.
    """
    source = find(source)
    check_writable(CACHE)
    if target is not None:
        check_target(target)
    layers = _layers_of(source)
    tensors = stored_tensors(source)
    floors = {
        number: max(at_least or 1, layer.least_for_top_k if at_least_top_k else layer.minimum)
        for number, layer in layers.items()
    }
    floor = max(floors.values())
    check_budgets(layers.values(), floor, tau=tau, n_keep=n_keep, share=share)
    groups = max(layer.groups for layer in layers.values())
    fewest = {number: min(n_keep or floor, layer.num_experts) for number, layer in layers.items()}
    if share is not None:
        total, least = sum(layer.num_experts for layer in layers.values()), sum(fewest.values())
        if share * total <= least - groups:
            raise BudgetError(
                f"a share of {share:g} of {total} experts is out of reach: {least} must stay, "
                f"at least {floor} in every layer"
            )
        per_layer = {number: round(share * layer.num_experts) for number, layer in layers.items()}
        fewest = {number: max(count, per_layer[number]) for number, count in fewest.items()}
    pieces, _ = _pieces(tensors, layers, {n: range(c) for n, c in fewest.items()}, drop_mtp=drop_mtp)
    size = sum(piece.size for piece in pieces)
    if target is not None:
        check_disk(Path(target), size)
    return {"groups": groups, "minimum": floor}


def _layers_of(source: Path) -> dict[int, MoELayer]:
    """Layers of a checkpoint that can be pruned file by file, after checking that this one can."""
    next(expert_blocks(source))  # which checks all of them
    return {layer.layer: layer for layer in moe_layers(hollow_model(read_config(source)))}


def check_disk(target: Path, size: int) -> None:
    """Check that a disk has room for a new folder or file of so many bytes."""
    if (free := shutil.disk_usage(target.absolute().parent).free) < size:
        raise PlaceError(
            f"{target}: the pruned model needs {size:,} bytes, free are {free:,}: choose a larger disk"
        )


def measure_nmi(
    folder: str | Path,
    *,
    preset: str = "paper",
    bins: str | int | None = None,
    layers: Collection[int] | None = None,
    n_jobs: int | None = None,
    backend: str | None = None,
    progress: bool = False,
    **backend_options: object,
) -> tuple[dict[int, np.ndarray], dict[str, object]]:
    """NMI matrices of a checkpoint, layer by layer. A killed run resumes where it stopped.

    Parameters
    ----------
    folder : str or Path
        Folder of a checkpoint, or a model of the hub (:func:`moeits.models.hub.find`).
    preset : {"paper", "official"}
        See :func:`moeits.nmi.preset_weights`.
    bins : "auto" or int, optional
        Number of bins; "auto" by default.
    layers : collection of int, optional
        Decoder layers; all by default.
    n_jobs : int, optional
        Threads for each layer: by default all cores, or one where a backend spreads the layers.
    backend : str, optional
        Backend of joblib that layers are spread by, such as ``"dask"``; without it they follow each other
        in this process. Its workers must see the folder under the same path.
    progress : bool
        Show a bar with the time left.
    **backend_options
        For the backend, such as ``scheduler_host`` for Dask.

    Returns
    -------
    matrices : dict of int to ndarray, shape (E, E)
        R of each layer.
    settings : dict
        What made them, for :func:`moeits.nmi.write_matrices`.

    Raises
    ------
    MissingError, MoeitsError
        As :func:`expert_blocks` and :func:`moeits.nmi.nmi_matrix`; with the layer.
    """
    folder = find(folder)
    blocks = dict(expert_blocks(folder, layers))
    about = {"model": name_of(folder), "family": family(folder), "fingerprint": fingerprint(folder)}
    return measure_blocks(
        blocks,
        about,
        expert_blocks,
        preset=preset,
        bins=bins,
        n_jobs=n_jobs,
        backend=backend,
        progress=progress,
        **backend_options,
    )


def measure_blocks(
    blocks: Mapping[int, ExpertBlock],
    about: Mapping[str, str],
    reader: Callable,
    *,
    preset: str = "paper",
    bins: str | int | None = None,
    n_jobs: int | None = None,
    backend: str | None = None,
    progress: bool = False,
    **backend_options: object,
) -> tuple[dict[int, np.ndarray], dict[str, object]]:
    """NMI matrices of expert blocks, wherever they lie, as :func:`measure_nmi`.

    Parameters
    ----------
    blocks : mapping of int to ExpertBlock
        By layer.
    about : mapping of str to str
        ``model`` (name), ``family`` and ``fingerprint`` of the checkpoint.
    reader : callable
        What made the blocks: a change of its code makes what is remembered of them void.
    preset, bins, n_jobs, backend, progress, **backend_options
        As in :func:`measure_nmi`.
    """
    settings = {
        "fingerprint": about["fingerprint"],
        "bins": "auto" if bins is None else bins,
        "projection_weights": preset_weights(preset, about["family"]),
        "code": code_digest(reader, _layer_nmi),
        "versions": versions(),
    }
    done = CACHE / "nmi" / f"layers-{digest(settings)}"
    check_writable(done)
    files = {layer: done / f"{layer}.npy" for layer in blocks}
    todo = [block for layer, block in blocks.items() if not files[layer].exists()]

    options = {"bins": settings["bins"], "projection_weights": settings["projection_weights"]}
    options["n_jobs"] = 1 if backend and n_jobs is None else n_jobs
    tasks = (joblib.delayed(_layer_nmi)(block, options) for block in todo)
    results = unordered(tasks, backend, **backend_options)
    already = len(blocks) - len(todo)
    for layer, R in tqdm(results, "NMI", len(blocks), initial=already, unit="layer", disable=not progress):
        with whole(files[layer], once=True) as part, part.open("wb") as stream:
            np.save(stream, R)
    settings |= {
        "model": about["model"],
        "family": about["family"],
        "preset": preset,
        "diagonal": "zero",
        "minimum": max(block.minimum for block in blocks.values()),
        "groups": max(block.groups for block in blocks.values()),
    }
    return {layer: np.load(file) for layer, file in files.items()}, settings


def prune_checkpoint(
    source: str | Path,
    target: str | Path,
    kept: Mapping[int, Sequence[int]] | Kept,
    *,
    pad: bool = False,
    drop_mtp: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Path:
    """Remove experts from a checkpoint without loading it: bytes that stay are copied, file by file.

    The new folder holds what :func:`moeits.models.folder.save_model` would write, and of the source's other
    files those that a model needs (:data:`moeits.models.folder.CARRIED`; its model card becomes
    ``README.base.md``). A few megabytes are in memory at a time.

    Parameters
    ----------
    source : str or Path
        Folder of a checkpoint of a known family, pruned or not, or a model of the hub; it is only read.
    target : str or Path
        Folder to make; written whole or not at all. What a killed call left is removed by the next one.
    kept : mapping of int to sequence of int, or Kept
        Decoder layer to the experts that stay; layers not named stay whole.
    pad : bool, default=False
        Fill every layer up to as many experts as the largest keeps, with copies that the router's bias keeps
        all tokens from: a plain checkpoint, which computes the same. ``kept.json`` lists the others.
    drop_mtp : bool, default=False
        Leave out layers for multi-token prediction, which transformers does not run. Otherwise each keeps as
        many experts as the last decoder layer, those with the largest rows of its router: what such a layer
        proposes the model itself verifies, so that the choice changes speed alone. The card says which.
    trust_remote_code : bool, default=False
        Carry the code of a tokenizer or processor along, which loading the new folder may then run.
    progress : bool, default=False
        Show a bar with the time left.

    Returns
    -------
    Path
        The new folder.

    Raises
    ------
    ExistsError, PlaceError
        If `target` exists or cannot be written; if the disk is too small, before anything is written.
    MissingError, MoeitsError
        As :func:`expert_blocks` and :func:`moeits.models.surgery.complete`; if `kept` is of another model by
        its fingerprint; if padding is not possible; if an expert or router that stays holds NaN or infinite
        values.
    """
    source, target = find(source), check_target(target)
    layers = _layers_of(source)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    mark = fingerprint(source)
    if isinstance(kept, Kept) and len(kept.fingerprint or "") == _OLD_FINGERPRINT:
        warnings.warn(
            "these kept experts were chosen by moeits 0.1, whose fingerprints are no longer compared: check "
            f"that {source} is the model they were chosen for ({kept.model or 'not named'})",
            FutureWarning,
            stacklevel=2,
        )
    elif isinstance(kept, Kept) and kept.fingerprint not in (None, mark):
        raise MoeitsError(
            f"the experts were chosen for another model ({kept.model or 'not named'}, fingerprint "
            f"{kept.fingerprint}); {source} has fingerprint {mark}"
        )
    kept = complete(kept, list(layers.values()), name_of(source), mark)
    warn_of_top_k(kept)
    tensors = stored_tensors(source)
    pieces, notes = _pieces(tensors, layers, kept.layers, pad=pad, drop_mtp=drop_mtp)
    stored = kept.layers
    if pad:
        stored = dict.fromkeys(kept.layers, max(kept.layers.values(), key=len))
        notes.append("Layers with fewer experts were filled up with copies that no token is routed to.")
        kept = replace(kept, budget={**kept.budget, PADDED: True})
    if quantisation := settings.get("quantization_config"):
        settings["quantization_config"] = renumbered(quantisation, kept.layers, kept.num_experts)

    files = defaultdict(list)
    for piece in sorted(pieces, key=lambda piece: piece.tensor.start):
        files[piece.tensor.file].append(piece)
    size = sum(piece.size for piece in pieces)
    check_disk(target, size)
    earlier = Kept.read(source / "kept.json") if (source / "kept.json").is_file() else None
    composed = compose(earlier, kept)
    before = folder_sizes(source)
    with whole(target) as part:
        part.mkdir()
        bar = tqdm(total=size, unit="B", unit_scale=True, desc="prune", disable=not progress)
        # One file goes to the disk while the next one is copied.
        with _one_thread(), bar, ThreadPoolExecutor(1) as disk:
            written = []
            for file in sorted(files):
                _write_file(part / file.name, files[file], bar)
                written.append(disk.submit(_to_disk, part / file.name))
            for future in written:
                future.result()
        if (source / INDEX).is_file():
            index = {
                "metadata": {"total_size": size},
                "weight_map": {piece.name: piece.tensor.file.name for piece in pieces},
            }
            (part / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        carry_files(source, part, trust_remote_code=trust_remote_code)
        text = settings.get("text_config", settings)
        text |= pruned_settings(text, list(layers.values()), stored, before)
        if drop_mtp:
            text |= dict.fromkeys((key for key in text if _MTP_LAYERS.search(key)), 0)
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        describe_folder(part, composed, base_card=read_card(source), notes=notes)
        left = expert_counts(part)
        if left != {layer: len(stored[layer]) for layer in layers}:
            raise MoeitsError(f"{source}: its experts are stored in a way that is not known; found {left}")
    return target


_ONE_EXPERT = re.compile(r"(\.experts\.(?:expert_)?)(\d+)(?=\.)")
_ALL_EXPERTS = re.compile(r"\.experts\.|\.block_sparse_moe\.(?:input|output)_linear\.")
_SEVERAL_ROWS = re.compile(r"\.experts\.mlp\.[wv][12]$")
_ROUTER = re.compile(r"\.(?:gate|router)\.|expert_bias$|correction_bias$")
_TOWER = re.compile(r"vision|visual|audio|image")
_MTP_LAYERS = re.compile(r"(?:nextn|mtp)\w*_layers$")
_CHUNK = 1 << 22
_NEVER = -1e4  # bias of an expert that no token is routed to: scores and other biases are a few units
_OLD_FINGERPRINT = 32  # digits of one that read a part of the weights


@dataclass(frozen=True)
class _Piece:
    """What of a stored tensor goes into the pruned checkpoint: runs of its bytes, and under which name."""

    name: str
    tensor: StoredTensor
    shape: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]  # first byte in the file, number of bytes
    checked: bool = False  # whether its values must be finite
    end: bytes = b""  # what follows the runs

    @property
    def size(self) -> int:
        return sum(length for _, length in self.runs) + len(self.end)


def _place(name: str) -> tuple[str, int] | None:
    """Stack of layers that a stored tensor belongs to, and the layer's number in it."""
    match = LAYER.search(name) or re.search(r"\.(\d+)\.", name)
    return match and (name[: match.start(1) - 1], int(match[1]))


def _places(names: Iterable[str], layers: Mapping[int, MoELayer]) -> dict[tuple[str, int], int]:
    """Where the layers of a model lie in its checkpoint, which may name its parts otherwise."""
    stored, own = defaultdict(set), defaultdict(dict)
    for name in filter(_ALL_EXPERTS.search, names):
        if place := _place(name):
            stored[place[0]].add(place[1])
    for layer in layers.values():
        stack, number = _place(f"{layer.name}.")
        own[stack][number] = layer.layer

    def likeness(stack: str, numbers: Collection[int], other: str) -> tuple[int, int]:
        return len(stored[other] & set(numbers)), _shared(stack.split(".")[::-1], other.split(".")[::-1])

    found = {}
    for stack, numbers in own.items():
        if stored:
            best = max(sorted(stored), key=partial(likeness, stack, numbers))
            found |= {(best, number): layer for number, layer in numbers.items()}
    return found


def _pieces(
    tensors: Mapping[str, StoredTensor],
    layers: Mapping[int, MoELayer],
    kept: Mapping[int, Sequence[int]],
    *,
    pad: bool = False,
    drop_mtp: bool = False,
) -> tuple[list[_Piece], list[str]]:
    """Choose what goes into the pruned checkpoint, and what its card should say of it."""
    if pad:
        _check_padding(layers, kept)
    places = _places(tensors, layers)
    most = max(map(len, kept.values())) if pad else 0
    chosen = {place: (layers[number].num_experts, kept[number]) for place, number in places.items()}
    beside, dropped, notes = _beside(tensors, places), (), []
    if beside and drop_mtp:
        dropped = tuple(sorted({_root(place, places) for place in beside}))
        notes = [f"Left out: layers for multi-token prediction ({', '.join(dropped)})."]
    elif beside:
        last = layers[max(layers)]
        for (stack, number), held in beside.items():
            ids = chosen[stack, number] = _largest_rows(
                f"{stack}.{number}", held, last, most or len(kept[last.layer])
            )
            notes.append(
                f"{stack}.{number}, for multi-token prediction, keeps {len(ids[1])} of {ids[0]} experts, "
                f"those with the largest rows of its router: {' '.join(map(str, ids[1]))}."
            )
    pieces, routers = [], Counter()
    for tensor in tensors.values():
        place = _place(tensor.name)
        if tensor.name.startswith(dropped):
            continue
        experts, ids = chosen.get(place, (0, ()))
        padding = [ids[0]] * (most - len(ids)) if ids else []
        dimension = _experts_dimension(tensor, experts) if experts else None
        one = _ONE_EXPERT.search(tensor.name) if experts else None
        if one:
            for new in (i for i, expert in enumerate([*ids, *padding]) if expert == int(one[2])):
                name = _ONE_EXPERT.sub(rf"\g<1>{new}", tensor.name)
                pieces.append(_Piece(name, tensor, tensor.shape, _all_of(tensor), checked=True))
        elif dimension is None:
            pieces.append(_Piece(tensor.name, tensor, tensor.shape, _all_of(tensor)))
        else:
            routers[places.get(place)] += bool(_ROUTER.search(tensor.name))
            pieces.append(_taken(tensor, dimension, experts, ids, padding))
    for number, layer in layers.items():
        if routers[number] != len(layer.router):
            raise MoeitsError(
                f"layer {number}: the router has {len(layer.router)} tensors ({', '.join(layer.router)}), "
                f"of which the checkpoint holds {routers[number]} with {layer.num_experts} experts"
            )
    return pieces, notes


def _all_of(tensor: StoredTensor) -> tuple[tuple[int, int], ...]:
    return ((tensor.start, tensor.stop - tensor.start),)


def _beside(
    tensors: Mapping[str, StoredTensor], places: Collection[tuple[str, int]]
) -> dict[tuple[str, int], list[StoredTensor]]:
    """Layers with experts that are none of the model's: those for multi-token prediction."""
    found = defaultdict(list)
    for tensor in tensors.values():
        place = _place(tensor.name)
        if place and place not in places and not _TOWER.search(tensor.name):
            found[place].append(tensor)
    return {
        place: held
        for place, held in found.items()
        if any(_ALL_EXPERTS.search(tensor.name) for tensor in held)
    }


def _root(place: tuple[str, int], places: Iterable[tuple[str, int]]) -> str:
    """First words of the names of all that belongs to a layer beside the model's."""
    stacks = {stack for stack, _ in places}
    if place[0] in stacks:
        return f"{place[0]}.{place[1]}."
    shared = max(_shared(place[0].split("."), stack.split(".")) for stack in stacks)
    return ".".join(place[0].split(".")[: shared + 1]) + "."


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Count the words with which both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _largest_rows(
    where: str, held: Sequence[StoredTensor], layer: MoELayer, count: int
) -> tuple[int, tuple[int, ...]]:
    """Experts of a layer beside the model's, and those that it keeps: as many as `layer`, in equal groups."""
    router = [
        t for t in held if _ROUTER.search(t.name) and t.name.endswith(".weight") and "attn." not in t.name
    ]
    if len(router) != 1 or router[0].shape[0] != layer.num_experts:
        raise MoeitsError(
            f"{where} has experts beside the model's own, for multi-token prediction, but no router of "
            f"{layer.num_experts} as layer {layer.layer} has: leave it out with drop_mtp (--drop-mtp)"
        )
    rows = read_tensor(router[0]).float().norm(dim=1).view(layer.groups, -1)
    best = rows.topk(count // layer.groups).indices + torch.arange(layer.groups)[:, None] * rows.shape[1]
    return layer.num_experts, tuple(sorted(best.flatten().tolist()))


def stored_bytes(folder: str | Path, kept: Kept | None = None) -> dict[str, Callable[[], bytes]]:
    """Readers of the bytes of every tensor of a checkpoint, or of what it would be once pruned, by name.

    Raises
    ------
    MoeitsError
        As :func:`expert_blocks` and :func:`moeits.models.surgery.complete`.
    """
    tensors, layers = stored_tensors(folder), _layers_of(Path(folder))
    everyone = {number: range(layer.num_experts) for number, layer in layers.items()}
    chosen = everyone if kept is None else complete(kept, list(layers.values())).layers

    def read(piece: _Piece) -> bytes:
        with piece.tensor.file.open("rb", buffering=0) as stored:
            return b"".join(os.pread(stored.fileno(), *run[::-1]) for run in piece.runs) + piece.end

    pieces, _ = _pieces(tensors, layers, chosen, pad=kept is not None and PADDED in kept.budget)
    return {piece.name: partial(read, piece) for piece in pieces}


def _experts_dimension(tensor: StoredTensor, experts: int) -> int | None:
    """Along which dimension a tensor of a Mixture-of-Experts layer is cut, if at all."""
    scales = bool(SCALES.search(tensor.name))
    if _ROUTER.search(tensor.name) and "attn." not in tensor.name:
        if scales:
            raise MoeitsError(f"{tensor.name}: a quantised router cannot be pruned")
        return router_dimension(tensor.name, tensor.shape, experts)
    listed = len(tensor.shape) > 1 or scales
    several = bool(_SEVERAL_ROWS.search(tensor.name)) and tensor.shape[0] % experts == 0
    if _ALL_EXPERTS.search(tensor.name) and listed and (tensor.shape[:1] == (experts,) or several):
        return 0
    return None


def _taken(
    tensor: StoredTensor, dimension: int, experts: int, ids: Sequence[int], padding: Sequence[int] = ()
) -> _Piece:
    """Take the experts `ids` along one dimension, which lists one or several rows of each."""
    outer, rows = prod(tensor.shape[:dimension]), tensor.shape[dimension] // experts
    size = (tensor.stop - tensor.start) // (outer * experts)
    end = b""
    taken = [*ids, *padding]
    if padding and _ROUTER.search(tensor.name) and tensor.name.endswith("bias"):
        taken = ids
        values = torch.full((len(padding),), _NEVER, dtype=_DTYPES[tensor.dtype][1])
        end = values.view(torch.uint8).numpy().tobytes()
    runs = tuple(
        (tensor.start + (row * experts + expert) * size, size) for row in range(outer) for expert in taken
    )
    shape = (*tensor.shape[:dimension], (len(ids) + len(padding)) * rows, *tensor.shape[dimension + 1 :])
    return _Piece(tensor.name, tensor, shape, runs, checked=True, end=end)


def _check_padding(layers: Mapping[int, MoELayer], kept: Mapping[int, Sequence[int]]) -> None:
    most = max(map(len, kept.values()))
    for number, layer in layers.items():
        if not layer.pads:
            raise MoeitsError(
                f"layer {number}: its router has no bias that could keep all tokens from padding experts: "
                "keep equally many experts in every layer (--uniform)"
            )
        if len(kept[number]) < layer.top_k_of(most):
            raise MoeitsError(
                f"layer {number}: {len(kept[number])} experts are fewer than a token uses, which padding "
                "cannot make up for: keep enough of them (at_least_top_k, --at-least-top-k)"
            )


def _write_file(file: Path, pieces: Sequence[_Piece], bar: tqdm) -> None:
    """Write one safetensors file out of pieces of another, which lie in it in this order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for piece in pieces:
        offsets = [end, end := end + piece.size]
        header[piece.name] = {"dtype": piece.tensor.dtype, "shape": piece.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = bytearray(_CHUNK)
    with file.open("wb", buffering=0) as out, pieces[0].tensor.file.open("rb", buffering=0) as stored:
        out.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for start, length in piece.runs:
                stored.seek(start)
                while length:
                    view = memoryview(buffer)[: min(length, _CHUNK)]
                    if stored.readinto(view) < len(view):
                        raise MoeitsError(f"{piece.tensor.file} is cut short")
                    if piece.checked:
                        _check_finite(view, piece.tensor)
                    out.write(view)
                    bar.update(len(view))
                    length -= len(view)
            bar.update(out.write(piece.end))


def _to_disk(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sum in one thread: two that wait for each other on a busy machine take a hundred times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_finite(values: memoryview, tensor: StoredTensor) -> None:
    if tensor.dtype not in _DTYPES:
        return
    numbers = torch.frombuffer(values, dtype=_DTYPES[tensor.dtype][1])
    # The sum is many times faster than looking at each value, and finite only if all are.
    if not torch.isfinite(numbers.sum()) and not torch.isfinite(numbers).all():
        raise MoeitsError(f"{tensor.file}: {tensor.name} holds NaN or infinite values")


def _layer_nmi(block: ExpertBlock, options: Mapping[str, object]) -> tuple[int, np.ndarray]:
    try:
        return block.layer, nmi_matrix(block, **options)
    except MoeitsError as error:
        raise MoeitsError(f"layer {block.layer}: {error}") from error


def _projections(
    layer: MoELayer, stored: Mapping[str, _Stored], quantised: Format | None
) -> dict[str, Projection | Dequantised]:
    """Find each projection of a layer among its stored tensors, by role and expert (None for all experts)."""
    shapes = {role: tuple(weight.shape[1:]) for role, weight in expert_block(layer).items()}
    whole_ = partial(_whole, layer, quantised)
    found = {}
    if "gate" in shapes and not {"gate", "up"} & set(stored):
        role = next((role for role in stored if role.endswith("gate_up")), "gate_up")
        interleaved = role != "gate_up" or not getattr(layer.experts, "is_concatenated", True)
        rows, columns = shapes.pop("gate")
        found = _halves(whole_(role, stored.get(role, {}), (2 * rows, columns)), interleaved=interleaved)
    missing = {role: shape for role, shape in shapes.items() if role not in found}
    return found | {role: whole_(role, stored.get(role, {}), shape) for role, shape in missing.items()}


def _whole(
    layer: MoELayer, quantised: Format | None, role: str, stored: _Stored, shape: tuple[int, int]
) -> Projection | Dequantised:
    """Put one role's tensors together, after checking that every expert has one of the right shape."""
    where = f"layer {layer.layer}: {role}"
    experts = set(range(layer.num_experts))
    if None in stored and len(stored) > 1:
        raise MoeitsError(
            f"{where} is stored twice, for all experts and one by one: remove either from the files"
        )
    if None not in stored and (missing := sorted(experts - set(stored))):
        which = "all experts" if len(missing) == len(experts) else f"expert {', '.join(map(str, missing))}"
        raise MoeitsError(f"{where} of {which} is missing in the checkpoint")
    if len(stored) > layer.num_experts:
        raise MoeitsError(f"{where}: {len(stored)} experts, but {layer.num_experts} by the configuration")
    if quantised and not all(
        set(parts) == {"weight"} and parts["weight"].dtype in _DTYPES for parts in stored.values()
    ):
        return quantised.projection(where, stored, layer.num_experts, shape)
    transposed = bool({role, "gate_up" if role != "down" else role} & set(layer.transposed))
    shape = shape[::-1] if transposed else shape
    tensors = {expert: parts["weight"] for expert, parts in stored.items()}
    if fused := tensors.get(None):
        together = len(fused.shape) < 3
        rows = layer.num_experts * shape[0]
        _check(where, fused, (rows, shape[1]) if together else (layer.num_experts, *shape))
        size = (fused.stop - fused.start) // layer.num_experts
        tensors = {e: replace(fused, start=fused.start + e * size) for e in experts}
    else:
        for tensor in tensors.values():
            _check(where, tensor, shape)
    pieces = (
        (tensors[expert].file, tensors[expert].start, tensors[expert].dtype) for expert in sorted(experts)
    )
    return Projection(tuple(pieces), shape, transposed)


def _check(where: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in _DTYPES:
        raise MoeitsError(
            f"{where}: {tensor.name} is {tensor.dtype}; quantised weights are not read, dequantise them first"
        )
    if tensor.shape != shape:
        raise MoeitsError(f"{where}: {tensor.name} has shape {tensor.shape}, by the configuration {shape}")
    if (size := prod(shape) * _DTYPES[tensor.dtype][1].itemsize) != tensor.stop - tensor.start:
        raise MoeitsError(f"{tensor.file}: {tensor.name} has {tensor.stop - tensor.start} bytes of {size}")


def _halves(both: Projection | Dequantised, *, interleaved: bool) -> dict[str, Projection | Dequantised]:
    """Split gate and up, which are stored as one: gate first, or neuron by neuron."""
    if interleaved:
        return {
            "gate": replace(both, neurons=slice(0, None, 2)),
            "up": replace(both, neurons=slice(1, None, 2)),
        }
    if isinstance(both, Dequantised) or both.transposed:
        half = both.shape[0 if isinstance(both, Dequantised) else 1] // 2
        return {"gate": replace(both, neurons=slice(half)), "up": replace(both, neurons=slice(half, None))}
    rows, columns = both.shape[0] // 2, both.shape[1]
    size = rows * columns
    return {
        name: replace(
            both,
            shape=(rows, columns),
            pieces=tuple((f, at + skip * _DTYPES[kind][1].itemsize, kind) for f, at, kind in both.pieces),
        )
        for name, skip in (("gate", 0), ("up", size))
    }
