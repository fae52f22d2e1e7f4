"""The trained models: which there are, how each begins, and what is kept of its training.

The *matched set* is the study's evidence: five seeds; for each a dense parent, and four Mixture-of-Experts
children that differ in nothing but how their experts begin. A training is the unit of replication. The
*shipped models* have the form of the paper's three; they illustrate, and new methods are developed on them
alone.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
)

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import CACHE, DATA, whole
from moeits.models.families import expert_block, moe_layers
from moeits.nmi import nmi_matrix
from moeits.study import corpus, energy
from moeits.study.initialisation import branches, redraw, router_rows, slices
from moeits.study.records import environment
from moeits.study.training import Schedule, is_sparse, routing, train

MODELS = DATA / "models"
SEEDS = (1, 2, 3, 4, 5)
INITIALISATIONS = ("scratch", "upcycled", "drop-upcycled", "btm")
SHIPPED = ("mini-mixtral", "mini-qwen", "mini-deepseek")

BRANCHES = (("science",), ("medicine",), ("mathematics", "code"), ("stories", "general"))
"""Domains on which each copy of the FFN is trained before the mix (btm)."""

SLICES, COPIES = 4, 4
HALF = 592
"""Optimiser steps of a parent: half of the learning-rate curve, 1.2 million tokens."""
HALF_PASS = 1509
"""Half of the steps in which the shipped models read the training text once, 6.18 million tokens."""

_BASE = {
    "vocab_size": corpus.VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_DENSE = LlamaConfig(**_BASE, intermediate_size=384)
_SPARSE = MixtralConfig(
    **_BASE, intermediate_size=96, num_local_experts=16, num_experts_per_tok=4, sliding_window=None
)
_STD = 0.02


@dataclass(frozen=True)
class Plan:
    """How one model comes about.

    Attributes
    ----------
    name : str
        Name of the model and of its folder.
    config : PreTrainedConfig
        Class and sizes.
    schedule : Schedule
        Its training.
    seed : int
        Of the initial weights and of the order of the text.
    begin : callable
        Sets the first weights: takes the new model, its plan and the models of `parents`.
    parents : tuple of str
        Models that must be there before.
    first : int
        Position in the text, in tokens, at which the training starts.
    domains : tuple of str
        Domains that are read; all by default.
    kept : bool
        Whether the model is committed, or an intermediate one that stays in the cache.
    """

    name: str
    config: PreTrainedConfig
    schedule: Schedule
    seed: int
    begin: Callable[[PreTrainedModel, "Plan", list[PreTrainedModel]], None]
    parents: tuple[str, ...] = ()
    first: int = 0
    domains: tuple[str, ...] = corpus.DOMAINS
    kept: bool = True

    @property
    def folder(self) -> Path:
        """Where the finished model lies."""
        return (MODELS if self.kept else CACHE / "training" / "models") / self.name

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that the weights depend on, beside the schedule."""
        config = {k: v for k, v in self.config.to_diff_dict().items() if k != "transformers_version"}
        return {
            "name": self.name,
            "config": json.loads(json.dumps(config)),
            "seed": self.seed,
            "begin": self.begin.__name__,
            "parents": list(self.parents),
            "first": self.first,
            "domains": list(self.domains),
        }


def at_random(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Leave the weights as they were drawn: *scratch*, and every dense parent."""


def continued(model: PreTrainedModel, _: Plan, parents: list[PreTrainedModel]) -> None:
    """Take all weights of the parent: the dense baseline, and the branches."""
    model.load_state_dict(parents[0].state_dict())


def upcycled(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Start as slices and copies of the parent's FFN, computing what the parent does."""
    _adopt(model, parents)
    for number, experts, router in _experts(model):
        _fill(experts, slices(ffn(parents[0], number), SLICES, COPIES, scale=SLICES))
        router.copy_(router_rows(router.shape[1], SLICES, COPIES, _STD, _generator(plan, number)))


def drop_upcycled(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Start as `upcycled`, with half of each expert's neurons drawn anew."""
    upcycled(model, plan, parents)
    for number, experts, _ in _experts(model):
        block = slices(ffn(parents[0], number), SLICES, COPIES, scale=SLICES)
        _fill(experts, redraw(block, 0.5, _generator(plan, 100 + number)))


def mixed(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Start as `upcycled`, each copy of the FFN trained on its own domains: branch-train-mix."""
    _adopt(model, parents)
    for number, experts, router in _experts(model):
        _fill(experts, branches([ffn(parent, number) for parent in parents], SLICES, scale=SLICES))
        router.copy_(router_rows(router.shape[1], SLICES, COPIES, _STD, _generator(plan, number)))


def copied(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Start every expert as a copy of the parent's whole FFN, as reported for Mixtral (mini-mixtral)."""
    _adopt(model, parents)
    for number, experts, router in _experts(model):
        _fill(experts, slices(ffn(parents[0], number), 1, model.config.num_local_experts, scale=1.0))
        router.copy_(torch.randn(router.shape, generator=_generator(plan, number)) * _STD)


def fine_grained(model: PreTrainedModel, plan: Plan, parents: list[PreTrainedModel]) -> None:
    """Start as fine slices of the parent's FFN, copied and half re-drawn, as reported for Qwen1.5-MoE.

    The first neurons of the parent become the shared expert, the others 15 slices in four copies.
    """
    _adopt(model, parents)
    shared = model.config.shared_expert_intermediate_size
    for number, experts, router in _experts(model):
        dense = ffn(parents[0], number)
        rest = {"gate": dense["gate"][shared:], "up": dense["up"][shared:], "down": dense["down"][:, shared:]}
        # Unnormalised routing gives each of 60 experts about 1/60.
        block = slices(rest, 15, 4, scale=60.0)
        _fill(experts, redraw(block, 0.5, _generator(plan, 100 + number)))
        expert = model.model.layers[number].mlp.shared_expert
        expert.gate_proj.weight.copy_(dense["gate"][:shared])
        expert.up_proj.weight.copy_(dense["up"][:shared])
        # Its gate starts at one half.
        expert.down_proj.weight.copy_(2 * dense["down"][:, :shared])
        model.model.layers[number].mlp.shared_expert_gate.weight.zero_()
        router.copy_(torch.randn(router.shape, generator=_generator(plan, number)) * _STD)


def matched(seed: int, half: int = HALF) -> list[Plan]:
    """Plans of one seed of the matched set, parents first.

    Parameters
    ----------
    seed : int
        Seed of weights and text order; its models share both.
    half : int, default=HALF
        Steps of the parent.

    Returns
    -------
    list of Plan
        Parent, dense baseline (the parent continued), the branches, and the four initialisations.
    """
    curve = Schedule(steps=half)
    tokens = curve.tokens
    first, second = _with(curve, curve=(0, 0.5)), _with(curve, curve=(0.5, 1))
    parent = f"parent-{seed}"
    names = [f"branch-{seed}-{domains[0]}" for domains in BRANCHES]
    branch = _with(curve, steps=half // 8, curve=(0.5, 0.75), warmup=20)
    mix = _with(curve, steps=half // 2, curve=(0.75, 1))
    child = {"seed": seed, "parents": (parent,), "first": tokens}
    return [
        Plan(parent, _DENSE, first, seed, at_random),
        Plan(f"dense-{seed}", _DENSE, second, begin=continued, **child),
        Plan(f"scratch-{seed}", _SPARSE, _with(curve, steps=2 * half), seed, at_random),
        Plan(f"upcycled-{seed}", _SPARSE, second, begin=upcycled, **child),
        Plan(f"drop-upcycled-{seed}", _SPARSE, second, begin=drop_upcycled, **child),
        *(
            Plan(name, _DENSE, branch, begin=continued, domains=domains, kept=False, **child)
            for name, domains in zip(names, BRANCHES, strict=True)
        ),
        Plan(f"btm-{seed}", _SPARSE, mix, seed, mixed, parents=tuple(names), first=tokens + mix.tokens),
    ]


def shipped(half: int = HALF_PASS) -> list[Plan]:
    """Plans of the shipped models, in the form of the paper's, with the dense parents of two of them.

    Parameters
    ----------
    half : int, default=HALF_PASS
        Steps of a parent; a shipped model and its parent together read the text once.

    Returns
    -------
    list of Plan
    """
    curve = Schedule(steps=half)
    first, second = _with(curve, curve=(0, 0.5)), _with(curve, curve=(0.5, 1))
    moe = {"num_experts_per_tok": 4, "moe_intermediate_size": 48}
    qwen = Qwen2MoeConfig(
        **_BASE, **moe, num_experts=60, shared_expert_intermediate_size=192, intermediate_size=912
    )
    deepseek = DeepseekV2Config(
        **_BASE,
        intermediate_size=384,
        moe_intermediate_size=32,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        kv_lora_rank=48,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        topk_method="greedy",
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=8.0,
    )
    mixtral = MixtralConfig(
        **_BASE, intermediate_size=384, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )
    child = {"seed": 11, "first": curve.tokens}
    return [
        Plan("parent-11", _DENSE, first, 11, at_random, kept=False),
        Plan("mini-mixtral", mixtral, second, begin=copied, parents=("parent-11",), **child),
        Plan("parent-12", Qwen2Config(**_BASE, intermediate_size=912), first, 12, at_random, kept=False),
        Plan("mini-qwen", qwen, second, begin=fine_grained, parents=("parent-12",), **child | {"seed": 12}),
        Plan("mini-deepseek", deepseek, _with(curve, steps=2 * half), 13, at_random),
    ]


def plans() -> dict[str, Plan]:
    """All models by name, in the order in which they are trained."""
    every = [*(plan for seed in SEEDS for plan in matched(seed)), *shipped()]
    return {plan.name: plan for plan in every}


def find(name: str) -> Plan:
    """Plan of a model.

    Raises
    ------
    MoeitsError
        If no model has this name; the message lists the names.
    """
    known = plans()
    if name not in known:
        raise MoeitsError(f"unknown model {name!r}: expected one of {', '.join(known)}")
    return known[name]


def finished() -> list[str]:
    """Name the models that are trained and kept."""
    return [name for name, plan in plans().items() if plan.kept and _is_finished(plan)]


def _is_finished(plan: Plan) -> bool:
    return (plan.folder / FACTS).exists()


def load(name: str) -> PreTrainedModel:
    """Load a finished model in float32.

    Parameters
    ----------
    name : str
        One of :func:`plans`.

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    MissingError
        If the model has not been trained.
    """
    return AutoModelForCausalLM.from_pretrained(finished_folder(name), dtype=torch.float32).eval()


def finished_folder(name: str) -> Path:
    """Folder of a finished model.

    Raises
    ------
    MissingError
        If the model has not been trained.
    """
    plan = find(name)
    if not _is_finished(plan):
        raise MissingError(f"the model {name} has not been trained: run `make train MODEL={name}`")
    return plan.folder


def history(name: str) -> dict[str, np.ndarray]:
    """Losses and observations along the training of a finished model: see :func:`observation`."""
    with np.load(find(name).folder / HISTORY) as arrays:
        return dict(arrays)


def facts(name: str) -> dict[str, Any]:
    """Read settings, cost and provenance of a finished model."""
    return json.loads((find(name).folder / FACTS).read_text())


def architecture(name: str) -> str:
    """Read the class of a finished model."""
    return json.loads((find(name).folder / "config.json").read_text())["architectures"][0]


def make(plan: Plan, *, progress: bool = False) -> Path:
    """Train a model, resume its training, or find it finished.

    Parameters
    ----------
    plan : Plan
        Which; its parents must be finished.
    progress : bool, default=False
        Whether to show a progress bar.

    Returns
    -------
    Path
        Folder of the finished model: a stock checkpoint in bfloat16 with tokenizer and card, the settings and
        cost in ``training.json``, losses and observations in ``training.npz``.

    Raises
    ------
    MoeitsError
        If the folder holds a model of other settings or another text.
    """
    text = corpus.load("training")
    present = [parent for parent in plan.parents if _is_finished(find(parent))]
    inputs = {
        **plan.identity,
        "text": corpus.text_digest(text),
        "weights": {parent: weights_digest(find(parent).folder) for parent in present},
    }
    done = plan.folder / FACTS
    if done.exists():
        before = json.loads(done.read_text())
        weights = before["settings"]["weights"]
        before["settings"]["weights"] = {parent: weights[parent] for parent in present if parent in weights}
        now = json.loads(json.dumps(inputs | {"schedule": plan.schedule.model_dump()}))
        if other := sorted(key for key in now if before["settings"].get(key) != now[key]):
            raise MoeitsError(
                f"{plan.folder} holds a model trained with another {', '.join(other)}: "
                "delete that folder to train it anew"
            )
        return plan.folder
    model = begin(plan)
    start = {layer.layer: _clone(expert_block(layer)) for layer in _layers(model)}
    before, clock = energy.joules(), time.perf_counter()
    record = train(
        model,
        stream(text, plan),
        plan.schedule,
        CACHE / "training" / plan.name,
        identity=inputs,
        observe=observation(start, _ancestors(plan)) if start else None,
        observe_at=observed_at(plan.schedule.steps),
        progress=progress,
    )
    joules = energy.spent(before, energy.joules())
    cost = {
        "tokens": plan.schedule.tokens,
        "cpu_seconds": round(float(record["seconds"].sum()), 1),
        "wall_seconds_of_last_run": round(time.perf_counter() - clock, 1),
        "joules": joules or None,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    loss = record["loss"]
    told = {
        "settings": inputs | {"schedule": plan.schedule.model_dump()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": {"first": float(loss[0]), "last 50 steps": float(loss[-50:].mean())},
        "cost": cost,
        "environment": environment(),
    }
    _save(plan, model, record, told)
    return plan.folder


def begin(plan: Plan) -> PreTrainedModel:
    """Build the model of a plan before its first step, in float32."""
    torch.manual_seed(plan.seed)
    # A model writes into its configuration; the plan's stays as it is.
    model = AutoModelForCausalLM.from_config(deepcopy(plan.config), dtype=torch.float32)
    with torch.no_grad():
        plan.begin(model, plan, [load(parent) for parent in plan.parents])
    return model


def stream(text: corpus.Text, plan: Plan) -> np.ndarray:
    """Order the tokens that a model reads.

    Documents are shuffled by the plan's seed, so that the models of a seed read the same text; a plan that
    begins later, or reads some domains only, skips the rest.

    Parameters
    ----------
    text : Text
        The training part.
    plan : Plan
        Whose tokens.

    Returns
    -------
    ndarray of uint16, shape (``plan.schedule.tokens``,)

    Raises
    ------
    MoeitsError
        If the text is too short.
    """
    order = np.random.default_rng(plan.seed).permutation(len(text))
    lengths = np.diff(text.starts)[order]
    position = np.cumsum(lengths) - lengths
    wanted = np.isin(text.domain[order], [corpus.DOMAINS.index(name) for name in plan.domains])
    taken = order[wanted & (position + lengths > plan.first)]
    skipped = max(0, plan.first - int(position[wanted & (position + lengths > plan.first)][0]))
    tokens = np.concatenate([text.document(i) for i in taken])[skipped:]
    if tokens.size < plan.schedule.tokens:
        raise MoeitsError(
            f"{plan.name} reads {plan.schedule.tokens} tokens of {', '.join(plan.domains)}, "
            f"but only {tokens.size} are left"
        )
    return tokens[: plan.schedule.tokens]


def observed_at(steps: int) -> tuple[int, ...]:
    """List the steps after which a Mixture-of-Experts model is observed: close together at first."""
    return tuple(sorted({0, *(max(1, steps // part) for part in (64, 32, 16, 8, 4, 2, 1))}))


def observation(
    start: dict[int, dict[str, Tensor]], ancestors: dict[int, dict[str, Tensor]]
) -> Callable[[nn.Module], dict[str, np.ndarray]]:
    """Make the function that observes a model along its training.

    Parameters
    ----------
    start, ancestors : dict of int to dict of str to Tensor
        Layer to the expert weights that the training started from, and to those of the parent's slices;
        empty where there is no parent.

    Returns
    -------
    callable
        Model to arrays, layers first: ``nmi`` (L, E, E); ``moved`` and ``from_parent`` (L, E), the Frobenius
        norm of each expert's change over that of what it is compared with; ``router`` (L, E, d);
        ``chosen`` (L, tokens, top-k), the experts chosen for 2,048 tokens of held-out text.
    """
    ids = torch.from_numpy(corpus.load("heldout").ids[:2048].astype(np.int64)).reshape(8, 256)

    def observe(model: nn.Module) -> dict[str, np.ndarray]:
        layers = moe_layers(model)
        with torch.no_grad(), routing(model) as held:
            model(input_ids=ids, use_cache=False)
            chosen = [held[layer.layer][1].to(torch.uint8).numpy() for layer in layers]
        blocks = {layer.layer: expert_block(layer) for layer in layers}
        seen = {
            "nmi": [nmi_matrix(block).astype(np.float32) for block in blocks.values()],
            "moved": [distance(block, start[number]) for number, block in blocks.items()],
            "router": [_router(model, layer).detach().half().numpy() for layer in layers],
            "chosen": chosen,
        }
        if ancestors:
            seen["from_parent"] = [distance(block, ancestors[number]) for number, block in blocks.items()]
        return {name: np.stack(values) for name, values in seen.items()}

    return observe


def distance(block: dict[str, Tensor], other: dict[str, Tensor]) -> np.ndarray:
    """Relative distance of experts from others: norm of the difference over norm of the other.

    Parameters
    ----------
    block, other : dict of str to Tensor
        Experts of a layer, E of each.

    Returns
    -------
    ndarray of float32, shape (E,)
    """
    flat = [torch.cat([one[name].flatten(1) for name in sorted(one)], 1) for one in (block, other)]
    return ((flat[0] - flat[1]).norm(dim=1) / flat[1].norm(dim=1)).numpy().astype(np.float32)


def ffn(model: PreTrainedModel, number: int) -> dict[str, Tensor]:
    """Weights of a dense model's FFN in one layer: gate (m, d), up (m, d), down (d, m)."""
    mlp = model.model.layers[number].mlp
    return {name: getattr(mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down")}


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model's weights file."""
    file = folder / "model.safetensors"
    if not file.exists():
        raise MissingError(f"{folder.name} must be trained first: run `make train MODEL={folder.name}`")
    return sha256(file.read_bytes()).hexdigest()


def train_all(names: Sequence[str] = (), *, jobs: int = 1, progress: bool = True) -> list[Path]:
    """Train models and what they need.

    Parameters
    ----------
    names : sequence of str
        Models; all that are kept by default.
    jobs : int, default=1
        Processes, one thread each. Models of one seed follow each other.
    progress : bool, default=True
        Whether to show progress bars.

    Returns
    -------
    list of Path
        Folders of the finished models.
    """
    known = plans()
    wanted = set()

    def want(name: str) -> None:
        wanted.add(find(name).name)
        # The parents of a finished model may be intermediate ones, which are not committed.
        for parent in () if _is_finished(known[name]) else known[name].parents:
            want(parent)

    for name in names or [name for name, plan in known.items() if plan.kept]:
        want(name)
    seeds: dict[int, list[Plan]] = {}
    for plan in known.values():
        if plan.name in wanted:
            seeds.setdefault(plan.seed, []).append(plan)
    corpus.load("training"), corpus.load("heldout")
    done = Parallel(n_jobs=jobs)(delayed(_make_each)(group, progress) for group in seeds.values())
    return [folder for group in done for folder in group]


FACTS = "training.json"
HISTORY = "training.npz"


def _make_each(group: Sequence[Plan], progress: bool) -> list[Path]:
    torch.set_num_threads(1)
    return [make(plan, progress=progress) for plan in group]


def _save(plan: Plan, model: PreTrainedModel, record: dict[str, np.ndarray], told: dict[str, Any]) -> None:
    with whole(plan.folder) as part:
        model.to(torch.bfloat16).save_pretrained(part)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(corpus.tokenizer_file()), bos_token=corpus.END, eos_token=corpus.END
        )
        tokenizer.save_pretrained(part)
        np.savez_compressed(part / HISTORY, **record)
        told["weights"] = weights_digest(part)
        (part / FACTS).write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def _with(schedule: Schedule, **changes: Any) -> Schedule:
    return schedule.model_copy(update=changes)


def _generator(plan: Plan, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * plan.seed + number)


def _layers(model: PreTrainedModel) -> list:
    return moe_layers(model) if is_sparse(model) else []


def _router(model: nn.Module, layer: Any) -> nn.Parameter:
    return model.get_parameter(next(name for name in layer.router if name.endswith(".weight")))


def _experts(model: PreTrainedModel) -> Iterator[tuple[int, dict[str, Tensor], nn.Parameter]]:
    """Layer, expert weights (views) and router of every sparse layer."""
    for layer in moe_layers(model):
        yield layer.layer, expert_block(layer), _router(model, layer)


def _fill(experts: dict[str, Tensor], block: dict[str, Tensor]) -> None:
    for name, weight in block.items():
        experts[name].copy_(weight)


def _clone(block: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in block.items()}


def _adopt(model: PreTrainedModel, parents: Sequence[PreTrainedModel]) -> None:
    """Take what is not an expert or a router from the parents, averaged over them."""
    states = [parent.state_dict() for parent in parents]
    for name, tensor in model.state_dict().items():
        if name in states[0] and states[0][name].shape == tensor.shape:
            tensor.copy_(torch.stack([state[name] for state in states]).mean(0))


def _ancestors(plan: Plan) -> dict[int, dict[str, Tensor]]:
    """Cut the parent into the slices that experts of the matched set are compared with; none elsewhere."""
    if plan.begin not in (upcycled, drop_upcycled, mixed):
        return {}
    parent = load(f"parent-{plan.seed}")
    return {
        number: slices(ffn(parent, number), SLICES, COPIES, scale=SLICES)
        for number in range(parent.config.num_hidden_layers)
    }


def _processor() -> str:
    """Kind of processor, without the machine's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in told.get("flags", "")]
    return " ".join([told.get("model name", platform.machine()), *kinds])
