"""Folders of models, pruned or not: loaded without running their code, saved so that they load anywhere."""

import copy
import inspect
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING

import torch
from torch import nn

from moeits.errors import ExistsError, MissingError, MoeitsError
from moeits.kept import Kept, Simplified, versions
from moeits.machine.paths import check_writable, whole
from moeits.models.card import model_card, read_card
from moeits.models.families import (
    REFUSED,
    MoELayer,
    Sizes,
    auto_class,
    moe_layers,
    refusal,
    sizes,
)
from moeits.models.safetensors import inside, stored_tensors
from moeits.models.surgery import (
    cut_experts,
    refuse_router_loss,
    refuse_router_loss_in,
    save_whole_folders,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

REMOTE_CODE = "modeling_moeits.py"
"""File in a pruned folder that loads it where this package is not installed."""

STOP = (
    "none: layers of this model keep different numbers of experts, which the family's class does not know; "
    "load it with trust_remote_code=True, or with moeits.load_model"
)
"""Implementation of the experts that an uneven folder asks for: the family's own class stops with this text,
whatever it is told to ignore, and the folder's code and this package take the default instead."""


def save_model(
    model: "PreTrainedModel | Simplified",
    folder: str | Path,
    *,
    tokenizer: object | None = None,
    scores: Iterable[Mapping[str, object]] = (),
    max_shard_size: int | str = "5GB",
) -> Path:
    """Save a pruned model as a folder that loads where this package is not installed.

    Tensors have the names of the model's family, as on the hub. Where every layer keeps the same number of
    experts the folder is a plain checkpoint of its family; elsewhere it holds the few lines of code that it
    needs (``trust_remote_code=True``). ``kept.json`` and a model card are written beside the weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel or Simplified
        Model that went through :func:`moeits.models.surgery.prune_model`, or what
        :func:`moeits.simplify` returned.
    folder : str or Path
        Folder to make; written whole or not at all.
    tokenizer : optional
        Tokenizer to save with it.
    scores : iterable of mapping
        Measured scores for the model card: ``task``, ``metric``, ``value``, and ``stderr``, ``n`` if known.
    max_shard_size : int or str
        Size of the largest weight file.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ExistsError, PlaceError
        If the folder exists, or nothing can be written there.
    MoeitsError
        If the model was not pruned.
    """
    folder = check_target(folder)
    if not isinstance(model, nn.Module):
        model = model.model
    if getattr(model, "kept", None) is None:
        raise MoeitsError(
            "this model was not pruned: save it with model.save_pretrained, or prune_model it first"
        )
    with whole(folder) as part:
        # The family's own, for the rest follows with the tokenizer and the scores.
        super(type(model), model).save_pretrained(part, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        complete_folder(model, part, scores=scores)
    return folder


def complete_folder(
    model: "PreTrainedModel", folder: Path, *, scores: Iterable[Mapping[str, object]] = ()
) -> None:
    """Put beside the saved weights of a pruned model what its folder needs to load and to be understood.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Pruned model; where ``model.config.name_or_path`` is a folder, its tokenizer, licence, ... are carried
        along.
    folder : Path
        Folder that ``save_pretrained`` has written.
    scores
        See :func:`save_model`.
    """
    base = Path(model.config.name_or_path)
    if base.is_dir():
        carry_files(base, folder)
    describe_folder(folder, model.kept, scores=scores, base_card=read_card(base))


def check_target(target: str | Path) -> Path:
    """Check that a new folder can be made.

    Raises
    ------
    ExistsError
        If it exists.
    PlaceError
        If nothing can be written where it is to lie.
    """
    target = Path(target)
    if target.exists():
        raise ExistsError(f"{target} exists: choose another folder, or remove it first")
    check_writable(target.absolute().parent)
    return target


CARRIED = (
    *(
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "special_tokens_map.json",
        "added_tokens.json",
        "normalizer.json",
    ),
    *("*.model", "*.model.v*", "*.tiktoken", "tekken.json"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*.jinja"),
    *("*processor_config.json", "generation_config.json", "healing.json"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*", "README.base.md"),
)
"""Files beside the weights that a model or its licence needs; no others go into a pruned folder."""

_CARRIED_SUFFIXES = {"", ".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", ".pdf", ".v3", ".v7"}


def carry_files(source: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Copy what a model needs beside its weights: tokenizer, templates, processor, licence (:data:`CARRIED`).

    Parameters
    ----------
    source, target : Path
        Folder of the model before, and the folder that is being written; what is there already stays.
    trust_remote_code : bool, default=False
        Carry the Python code of a tokenizer or processor along, too. Otherwise the settings that name it are
        removed with a warning, so that what the library has of its own is used.

    Raises
    ------
    MoeitsError
        If a file is a link that leaves the folder.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found = {
        file.relative_to(source).as_posix()
        for pattern in CARRIED
        for file in source.glob(pattern)
        if file.is_file() and file.suffix in _CARRIED_SUFFIXES
    }
    pairs = {name: name for name in found}
    if (source / "README.md").is_file() and "README.base.md" not in found:
        pairs["README.md"] = "README.base.md"
    for name, new in sorted(pairs.items()):
        file = inside(source, name, "the folder")
        if not (target / new).exists():
            (target / new).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / new)
    for file in sorted([*target.glob("tokenizer_config.json"), *target.glob("*processor_config.json")]):
        settings = json.loads(file.read_text(encoding="utf-8"))
        modules = _modules_of(settings.get("auto_map"))
        if not modules:
            continue
        if trust_remote_code:
            for module in modules:
                code = inside(source, f"{module}.py", file.name)
                for needed in (code, *get_relative_import_files(code)):
                    shutil.copyfile(inside(source, Path(needed).name, code.name), target / Path(needed).name)
            continue
        del settings["auto_map"]
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        warnings.warn(
            f"{file.name} names code of its own ({', '.join(modules)}), which is not carried along, so its "
            "auto_map was removed; if you trust the code, prune with trust_remote_code (--trust-remote-code)",
            stacklevel=2,
        )


def _modules_of(auto_map: object) -> list[str]:
    """Modules that an ``auto_map`` names: ``module.Class``, in a mapping or, in older files, a list."""
    classes = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    names = [name for entry in classes for name in (entry if isinstance(entry, list) else [entry]) if name]
    return sorted({name.partition("--")[2].partition(".")[0] or name.partition(".")[0] for name in names})


def load_model(
    folder: str | Path, *, device: str | torch.device | None = None, **options: object
) -> "PreTrainedModel":
    """Load a model, pruned or whole, without running any code of its folder.

    Parameters
    ----------
    folder : str or Path
        Folder of a Hugging Face checkpoint, or a model of the hub (:func:`moeits.models.hub.find`).
    device : str or torch.device, optional
        Where the model goes; by default it stays where ``device_map`` says, or on the CPU.
    **options
        Passed on to ``from_pretrained``: ``dtype``, ``device_map``, ``experts_implementation``, ...

    Returns
    -------
    transformers.PreTrainedModel
        The model, in evaluation mode. A pruned one knows its ``kept.json`` as ``model.kept``. The setting
        ``output_router_logits``, which adds the auxiliary loss of pretraining, is off.

    Raises
    ------
    MissingError
        If there is no ``config.json``.
    MoeitsError
        If it names no causal language model that transformers knows.
    """
    from moeits.models.hub import find

    folder = find(folder)
    config = read_config(folder)
    text = config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False
    model = _model_class(config).from_pretrained(folder, config=config, **options)
    if device is not None:
        model.to(device)
    if model.device.type == "cpu" and "experts_implementation" not in options:
        from moeits.models.unstack import ONE_BY_ONE

        # There the grouped matrix product, which is the default, is slower than a loop over experts.
        model.set_experts_implementation(ONE_BY_ONE)
    if (file := Path(folder) / "kept.json").is_file():
        model.kept = Kept.read(file)
        save_whole_folders(model)
    return model


def store_as(model: "PreTrainedModel", source: str | Path) -> None:
    """Cast a model to the type in which a folder stores it, in place; what the family keeps in float32 stays.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Model that was loaded from the folder in a type to compute in.
    source : str or Path
        The folder.
    """
    stored = Counter()
    for tensor in stored_tensors(source).values():
        stored[tensor.dtype] += tensor.stop - tensor.start
    name = max(stored.keys() & _DTYPE_NAMES.keys(), key=stored.__getitem__)
    dtype = getattr(torch, _DTYPE_NAMES[name])
    in_float32 = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        in_float32 |= {*(model._keep_in_fp32_modules or ())}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in key for part in in_float32):
            tensor.data = tensor.data.to(dtype)
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.dtype = dtype


_DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model's folder, without running any code of it.

    Raises
    ------
    MissingError
        If there is none that transformers reads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{folder} has no tokenizer that can be read ({error}): copy its files there"
        ) from error


def read_config(folder: str | Path) -> "PreTrainedConfig":
    """Read the configuration of a checkpoint's language model, without running any code of its folder."""
    from transformers import CONFIG_MAPPING, AutoConfig

    file = Path(folder) / "config.json"
    if not file.is_file():
        raise MissingError(f"{folder} is no model folder: it has no config.json")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise MoeitsError(f"{file} is no configuration of a model: {error!r}") from error
    if model_type not in CONFIG_MAPPING:
        raise MoeitsError(refusal(model_type))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config._experts_implementation == STOP:
        config._experts_implementation = None
    return config


def hollow_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """Build a model, pruned or whole, from its configuration alone: every tensor has a shape and no data."""
    with torch.device("meta"):
        return _model_class(config)._from_config(copy.deepcopy(config), dtype=config.dtype)


def describe_folder(
    folder: Path,
    kept: Kept,
    *,
    scores: Iterable[Mapping[str, object]] = (),
    base_card: str = "",
    notes: Iterable[str] = (),
) -> None:
    """Write ``kept.json``, the model card and, where it is needed, the loading code into a pruned folder.

    Parameters
    ----------
    folder : Path
        Folder with a ``config.json`` that :func:`moeits.models.surgery.pruned_settings` went into.
    kept : Kept
        What was kept.
    scores, base_card, notes
        See :func:`moeits.models.card.model_card`.
    """
    config = read_config(folder)
    model = hollow_model(config)
    plain = _is_plain(config)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings.pop("auto_map", None)
    settings.pop("experts_implementation", None)
    (folder / REMOTE_CODE).unlink(missing_ok=True)
    base = _native_class(config).__name__
    if not plain:
        (folder / REMOTE_CODE).write_text(_remote_code(config, moe_layers(model)), encoding="utf-8")
        settings["auto_map"] = {auto_class(type(config))[0]: f"{Path(REMOTE_CODE).stem}.Pruned{base}"}
        settings["experts_implementation"] = STOP
    settings["architectures"] = [base if plain else f"Pruned{base}"]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    kept.write(folder / "kept.json")
    before = config.get_text_config().unpruned
    card = model_card(
        kept, before, folder_sizes(folder), plain=plain, scores=scores, base_card=base_card, notes=notes
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def folder_sizes(folder: str | Path) -> Sizes:
    """Count the parameters of the model in a folder; the bytes of a quantised one are those of its files."""
    config = read_config(folder)
    found = sizes(hollow_model(config))
    if getattr(config, "quantization_config", None):
        found = replace(found, bytes=sum(t.stop - t.start for t in stored_tensors(folder).values()))
    return found


def _native_class(config: "PreTrainedConfig") -> type:
    model_type, found = config.get_text_config().model_type, auto_class(type(config))
    if found is None or model_type in REFUSED:
        raise MoeitsError(refusal(model_type))
    return found[1]


def _model_class(config: "PreTrainedConfig") -> type:
    """Class that builds the model which `config` describes, with the experts that each layer keeps.

    It has the native class's name and module, so that transformers converts names of tensors as for that one.
    """
    native = _native_class(config)
    if getattr(config.get_text_config(), "num_experts_per_layer", None) is None:
        return native

    def __init__(self: nn.Module, config: "PreTrainedConfig", *args: object, **options: object) -> None:
        super(pruned, self).__init__(config, *args, **options)
        counts = config.get_text_config().num_experts_per_layer
        for layer in moe_layers(self):
            count = counts[str(layer.layer)]
            if count < layer.num_experts:
                top_k = layer.top_k_of(count)
                cut_experts(self, range(count), top_k, layer.tensors, layer.counters, layer.top_ks)
        refuse_router_loss_in(self)

    names = {"__init__": __init__, "__module__": native.__module__, "__qualname__": native.__qualname__}
    pruned = type(native.__name__, (native,), names)
    return pruned


def _is_plain(config: "PreTrainedConfig") -> bool:
    """Whether the family's own class builds the model that `config` describes."""
    with torch.device("meta"):
        native = _native_class(config)._from_config(copy.deepcopy(config), dtype=config.dtype)
    layers = [
        [(layer.num_experts, layer.top_k) for layer in moe_layers(m)] for m in (native, hollow_model(config))
    ]
    return layers[0] == layers[1]


def _remote_code(config: "PreTrainedConfig", layers: Sequence[MoELayer]) -> str:
    """Write the source of a class that builds the pruned model, out of the functions that build it here."""
    auto, native = auto_class(type(config))
    base = native.__name__
    tables = {
        (
            tuple((name.removeprefix(start), dimension) for name, dimension in layer.tensors.items()),
            tuple(name.removeprefix(start) for name in layer.counters),
            tuple(name.removeprefix(start) for name in layer.top_ks),
        )
        for layer in layers
        for start in [f"{layer.name}."]
    }
    if len(tables) != 1:
        raise MoeitsError(f"the Mixture-of-Experts layers of {base} are built differently from each other")
    [(tensors, counters, top_ks)] = tables
    return _TEMPLATE.format(
        base=base,
        auto=auto,
        layers=pformat({layer.name: (layer.num_experts, layer.top_k) for layer in layers}, width=100),
        tensors=pformat(dict(tensors), width=100),
        counters=pformat(counters, width=100),
        top_ks=top_ks,
        cut_experts=inspect.getsource(cut_experts),
        refuse_router_loss=inspect.getsource(refuse_router_loss),
        stop=STOP,
        versions=" and ".join(f"{name} {number}" for name, number in versions().items()),
    )


_TEMPLATE = '''"""Loads this checkpoint, whose layers keep different numbers of experts.

Written by {versions}.
"""

# transformers looks for the next line to know that the implementation of the experts can be chosen:
# @use_experts_implementation

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import {base}

# Mixture-of-Experts layer: experts, experts per token.
LAYERS = {layers}
# In each of these layers, tensor: dimension of the experts.
TENSORS = {tensors}
COUNTERS = {counters}
TOP_KS = {top_ks}
# What config.json names as the experts' implementation, so that no other class loads random experts.
STOP = {stop!r}


{cut_experts}

{refuse_router_loss}

class Pruned{base}({base}):
    """{base} with the experts that are left in each layer."""

    _auto_class = "{auto}"  # save_pretrained copies this file

    @classmethod
    def is_custom_code(cls):
        """Have transformers convert the names of stored tensors as for the family's own class."""
        return False

    def __init__(self, config, *args, **kwargs):
        if config._experts_implementation == STOP:
            config._experts_implementation = None
        super().__init__(config, *args, **kwargs)
        for name, (count, top_k) in LAYERS.items():
            layer = self.get_submodule(name)
            cut_experts(layer, range(count), top_k, TENSORS, COUNTERS, TOP_KS)
        self.register_forward_pre_hook(refuse_router_loss, with_kwargs=True)

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / "config.json"
        settings = json.loads(file.read_text()) | {{"experts_implementation": STOP}}
        file.write_text(json.dumps(settings, indent=2))
'''
