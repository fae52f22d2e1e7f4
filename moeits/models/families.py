"""One rule that finds every Mixture-of-Experts layer of a model, and a short table of what differs by family.

The rule is duck-typed. An *experts module* directly owns a three-dimensional ``down_proj`` (E, ., .); its
parent is the layer's *block*; what the block's router owns with E entries along some dimension is cut with
the experts, and the plain attributes that count experts follow. No class of any model is named here.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moeits.errors import BudgetError, MoeitsError
from moeits.selection import check_budget


@dataclass(frozen=True)
class Family:
    """What the rule cannot read off a model's modules.

    Attributes
    ----------
    minimum : int
        Fewest experts with which the router still works, per layer or per group of a router with groups.
    fixed_top_k : bool
        Whether all layers share the configuration's top-k, which then bounds the experts of each.
    transposed : bool
        Whether expert weights are stored (E, in, out) by a class that does not say so itself.
    """

    minimum: int = 1
    fixed_top_k: bool = False
    transposed: bool = False


# Routers of DeepSeek-V3's kind rank a group, or their only one, by the sum of its two best scores.
_TWO = Family(minimum=2)

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "aria_text": Family(),
    "axk1": _TWO,
    "axk2": _TWO,
    "bailing_hybrid": _TWO,
    "beam": _TWO,
    "cohere2_moe": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": _TWO,
    "deepseek_v32": _TWO,
    "dots1": _TWO,
    "dots3_note_text": _TWO,
    "ernie4_5_moe": Family(),
    "exaone_moe": _TWO,
    "flex_olmo": Family(),
    "flint": Family(),
    "gemma4_text": Family(fixed_top_k=True),
    "glm4_moe": _TWO,
    "glm4_moe_lite": _TWO,
    "glm_moe_dsa": _TWO,
    "gpt_oss": Family(),
    "granitemoe": Family(),
    "granitemoe_swa": Family(),
    "granitemoehybrid": Family(),
    "granitemoeshared": Family(),
    "hunyuan_v1_moe": Family(),
    "hy_v3": Family(),
    "hy_v4": _TWO,
    "inkling2_text": Family(),
    "jamba": Family(),
    "kimi_linear": _TWO,
    "kolibri1": Family(),
    "laguna": Family(),
    "lfm2_moe": Family(),
    "llama4_text": Family(transposed=True),
    "mellum": Family(),
    "mimo_v2_flash": _TWO,
    "minimax": Family(),
    "minimax_m2": Family(),
    "minimax_m3_vl_text": Family(),
    "mixtral": Family(),
    "nemotron_h": _TWO,
    "olmoe": Family(),
    "phimoe": Family(minimum=2),  # its router always picks two experts
    "qwen2_moe": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen4_exp_text": Family(),
    "solar_open": _TWO,
}
"""Served model types (``config.model_type``); pruning each of them is tested to be exact."""

REFUSED: dict[str, str] = {
    "dbrx": "all its experts lie in one two-dimensional matrix",
    "deepseek_v4": "some of its layers pick experts by a table of token ids, so the rest cannot take over",
    "doge": "its experts are rows of an embedding, found by product keys",
    "inkling_text": "its router scores the shared experts together with the routed ones",
    "jetmoe": "its attention heads are routed experts too, and neither kind is stacked as the rule expects",
    "longcat_flash": "its router also scores experts that compute nothing",
    "nllb-moe": "an encoder-decoder model, not a causal language model: its experts are separate modules",
    "switch_transformers": "an encoder-decoder model, not a causal language model: its experts are separate "
    "modules, and each drops the tokens above its capacity, which those of a removed expert would fill",
    "zaya": "its router also scores skipping every expert, and hands its state to the next layer's",
}
"""Model types with experts that cannot be pruned here, and why."""

EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "out_features",
)
"""Names under which modules (and, but for the last, configurations) keep the number of experts."""


def count_key(config: Mapping[str, object]) -> str:
    """Name under which a configuration keeps the number of experts of a layer."""
    return next(key for key in EXPERT_COUNTS[:-1] if key in config)


TOP_KS = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)
"""Names under which modules (the first) and configurations (any) keep the number of experts per token."""

_ROUTER = re.compile(r"^(gate|router)$|expert_bias|correction_bias|moe_statics")
_GROUPS = ("num_group", "n_group", "num_groups")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class MoELayer:
    """One Mixture-of-Experts layer: where its tensors are, and what bounds its pruning.

    Names are those of ``model.named_modules`` and ``model.named_parameters``.

    Attributes
    ----------
    layer : int
        Number of the decoder layer, N of ``model.layers.N``.
    name : str
        Name of the block that owns the experts and the router.
    experts : torch.nn.Module
        Experts module.
    num_experts, top_k : int
        Routed experts, and how many of them a token uses.
    minimum : int
        Fewest experts with which the layer still works.
    groups, top_groups : int
        Groups of the router and how many of them a token may use; 1 and 1 without groups.
    tensors : dict of str to int
        Every tensor that is cut with the experts, and along which dimension.
    router : tuple of str
        Those of `tensors` that belong to the router.
    counters, top_ks : tuple of str
        Attributes that hold the number of experts, and the number of experts per token.
    transposed : bool
        Whether expert weights are (E, in, out) instead of (E, out, in).
    """

    layer: int
    name: str
    experts: nn.Module
    num_experts: int
    top_k: int
    minimum: int
    groups: int
    top_groups: int
    tensors: dict[str, int]
    router: tuple[str, ...]
    counters: tuple[str, ...]
    top_ks: tuple[str, ...]
    transposed: bool

    def top_k_of(self, count: int) -> int:
        """Experts per token when `count` experts remain: never more than the groups that are chosen hold."""
        return min(self.top_k, count * self.top_groups // self.groups)

    @property
    def least_for_top_k(self) -> int:
        """Fewest experts with which a token still uses `top_k` of them, as many in every group."""
        per_group = -(-self.top_k // self.top_groups)
        return max(per_group * self.groups, self.minimum)


def refusal(model_type: str) -> str:
    """Say why models of a type are not served: a reason that is known, or that the type is not."""
    if model_type in REFUSED:
        return f"models of type {model_type!r} cannot be pruned: {REFUSED[model_type]}"
    return (
        f"models of type {model_type!r} are not known; known are {', '.join(sorted(FAMILIES))}. "
        "To add a family whose experts are stacked in three-dimensional weights, add it to "
        "moeits.models.families.FAMILIES and run the tests: they prune a small random model of every family"
    )


def families_table() -> list[tuple[str, str, str]]:
    """List the served families.

    Returns
    -------
    list of (str, str, str)
        Model type, class of transformers, and fewest experts per layer.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    return [
        (name, CLASSES[name], "top-k" if family.fixed_top_k else str(family.minimum))
        for name, family in sorted(FAMILIES.items())
    ]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find every Mixture-of-Experts layer of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers, on any device (``meta`` too), whole or pruned.

    Returns
    -------
    list of MoELayer
        In the order of the decoder layers.

    Raises
    ------
    MoeitsError
        If the model is dense, of a refused or an unknown family, or a router does not fit the rule.
    """
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    experts = [name for name, module in modules.items() if _is_experts(module)]
    family = _family(config, dense=not experts)
    layers = [_moe_layer(modules, name, config, family) for name in experts]
    numbers = [layer.layer for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise MoeitsError(
            f"{type(model).__name__} has two Mixture-of-Experts blocks in one decoder layer: {numbers}"
        )
    return sorted(layers, key=lambda layer: layer.layer)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of all decoder layers of a Mixture-of-Experts model, and its name."""
    layer = moe_layers(model)[0]
    name = re.match(rf"(.*)\.{layer.layer}(\.|$)", layer.name)[1]
    return name, model.get_submodule(name)


def expert_block(layer: MoELayer) -> dict[str, torch.Tensor]:
    """Weights of a layer's experts, as views of the model's own tensors where the layout allows.

    Parameters
    ----------
    layer : MoELayer
        Layer with E experts of m hidden neurons on a residual stream of width d.

    Returns
    -------
    dict of str to torch.Tensor
        ``gate`` (E, m, d), ``up`` (E, m, d), ``down`` (E, d, m); no ``gate`` where the experts are not gated.
    """
    weights = {
        name: parameter.detach().transpose(1, 2) if layer.transposed else parameter.detach()
        for name, parameter in layer.experts.named_parameters(recurse=False)
        if parameter.dim() == 3
    }
    block = {}
    if (both := weights.get("gate_up_proj")) is not None:
        if getattr(layer.experts, "is_concatenated", True):
            block["gate"], block["up"] = both.chunk(2, dim=1)
        else:
            block["gate"], block["up"] = both[:, 0::2], both[:, 1::2]
    else:
        block["up"] = weights["up_proj"]
    block["down"] = weights["down_proj"]
    return block


def router_dimension(name: str, shape: Sequence[int], count: int) -> int | None:
    """Along which dimension a tensor of a router lists the experts; None if it does not.

    Sizes alone cannot tell where a model is as wide as it has experts, so names decide: a weight has a row
    for each expert (E, d); of other tensors, those named after experts or a bias end in E.
    """
    key = name.rpartition(".")[2]
    if key == "weight":
        return 0 if len(shape) == 2 and shape[0] == count else None
    return len(shape) - 1 if re.search("expert|bias", key) and shape[-1] == count else None


def check_kept(layers: Sequence[MoELayer], kept: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    """Check a choice of experts against the layers of a model.

    Parameters
    ----------
    layers : sequence of MoELayer
        The model's layers.
    kept : mapping of int to sequence of int
        Decoder layer to the experts that stay; layers not named stay whole.

    Returns
    -------
    dict of int to tuple of int
        Every layer, its experts in ascending order.

    Raises
    ------
    MoeitsError
        If a layer is not one of the model's; if experts are out of range, given twice, none at all, fewer
        than the family's minimum, or uneven over the groups of a group-limited router.
    """
    known = {layer.layer: layer for layer in layers}
    if unknown := sorted(set(kept) - set(known), key=str):
        raise MoeitsError(f"no Mixture-of-Experts layer {unknown}: this model has them at {sorted(known)}")
    return {
        number: _check_experts(layer, kept[number]) if number in kept else tuple(range(layer.num_experts))
        for number, layer in known.items()
    }


def check_budgets(layers: Iterable[MoELayer], at_least: int = 1, **budget: float | None) -> None:
    """Check a budget against all layers of a model, before anything is measured.

    Parameters
    ----------
    layers : iterable of MoELayer
        The model's layers.
    at_least : int, default=1
        Fewest experts per layer, where the family's minimum is not higher.
    **budget
        tau, n_keep and share, as in :func:`moeits.selection.check_budget`.

    Raises
    ------
    BudgetError
        See there; the message names the layer.
    """
    for layer in layers:
        floor = min(max(at_least, layer.minimum), layer.num_experts)
        where = f"layer {layer.layer}: "
        check_budget(layer.num_experts, **budget, at_least=floor, groups=layer.groups, where=where)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model.

    Attributes
    ----------
    total, routed, active : int
        All parameters (shared ones once), those of the routed experts, and those that one token uses
        (embeddings and routers included).
    bytes : int
        Bytes of all parameters and saved buffers.
    experts, top_k : dict of int to int
        Routed experts, and experts per token, of each Mixture-of-Experts layer.
    """

    total: int
    routed: int
    active: int
    bytes: int
    experts: dict[int, int]
    top_k: dict[int, int]

    @property
    def other(self) -> int:
        """Parameters outside the routed experts: attention, embeddings, norms, routers, shared experts."""
        return self.total - self.routed


def sizes(model: nn.Module) -> Sizes:
    """Count the parameters of a Mixture-of-Experts model, on any device (``meta`` too).

    Parameters
    ----------
    model : torch.nn.Module
        Whole or pruned model.

    Returns
    -------
    Sizes
        Its sizes.
    """
    layers = moe_layers(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = {layer.layer: sum(p.numel() for p in layer.experts.parameters()) for layer in layers}
    unused = sum(
        routed[layer.layer] * (layer.num_experts - layer.top_k) // layer.num_experts for layer in layers
    )
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    return Sizes(
        total=total,
        routed=sum(routed.values()),
        active=total - unused,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        experts={layer.layer: layer.num_experts for layer in layers},
        top_k={layer.layer: layer.top_k for layer in layers},
    )


def _is_experts(module: nn.Module) -> bool:
    weight = module._parameters.get("down_proj")
    return weight is not None and weight.dim() == 3


def _family(config: object, *, dense: bool) -> Family:
    model_type = config.model_type
    if model_type in REFUSED:
        raise MoeitsError(refusal(model_type))
    if dense and (model_type in FAMILIES or not any(hasattr(config, name) for name in EXPERT_COUNTS)):
        raise MoeitsError(f"this {model_type!r} model is dense: it has no routed experts to prune")
    if model_type not in FAMILIES:
        raise MoeitsError(refusal(model_type))
    return FAMILIES[model_type]


def _moe_layer(modules: Mapping[str, nn.Module], name: str, config: object, family: Family) -> MoELayer:
    experts = modules[name]
    count = experts.down_proj.shape[0]
    block_name = name.rpartition(".")[0]
    block = modules[block_name]
    number = _LAYER.search(name)
    if number is None:
        raise MoeitsError(f"{name}: no number of a decoder layer in this name")

    routers = {
        f"{block_name}.{child}{'.' if inner else ''}{inner}": module
        for child, parent in block.named_children()
        if parent is not experts and _ROUTER.search(child)
        for inner, module in parent.named_modules()
    }
    router = {}
    for owner_name, owner in routers.items():
        for tensor_name, tensor in _own_tensors(owner):
            if not tensor.is_floating_point():
                raise MoeitsError(f"{owner_name}.{tensor_name}: a router that reads a table cannot be pruned")
            if (dimension := router_dimension(tensor_name, tensor.shape, count)) is not None:
                router[f"{owner_name}.{tensor_name}"] = dimension
    for tensor_name, tensor in _own_tensors(block):
        if _ROUTER.search(tensor_name) and count in tensor.shape:
            router[f"{block_name}.{tensor_name}"] = router_dimension(tensor_name, tensor.shape, count)
    if not any(name.endswith(".weight") for name in router):
        raise MoeitsError(f"{block_name}: no router weight with {count} rows, one for each expert")

    stacked = [f"{name}.{key}" for key, tensor in _own_tensors(experts) if tensor.shape[:1] == (count,)]
    scope = {name: experts, **routers}
    if not block_name.endswith(
        f".{number[1]}"
    ):  # where the block is the whole decoder layer, its numbers are not ours
        scope[block_name] = block
    counters = [
        f"{owner}.{key}"
        for owner, module in scope.items()
        for key in EXPERT_COUNTS
        if vars(module).get(key) == count and type(vars(module)[key]) is int
    ]
    top_ks = [f"{owner}.top_k" for owner, module in scope.items() if type(vars(module).get("top_k")) is int]
    top_k = (
        next(getattr(config, key) for key in TOP_KS if hasattr(config, key))
        if family.fixed_top_k
        else vars(scope[top_ks[0].rpartition(".")[0]])["top_k"]
    )
    groups, top_groups = _groups(scope.values())
    return MoELayer(
        layer=int(number[1]),
        name=block_name,
        experts=experts,
        num_experts=count,
        top_k=top_k,
        minimum=max(family.minimum * groups, top_k if family.fixed_top_k else 1),
        groups=groups,
        top_groups=top_groups,
        tensors={**dict.fromkeys(stacked, 0), **router},
        router=tuple(router),
        counters=tuple(counters),
        top_ks=tuple(top_ks),
        transposed=getattr(experts, "is_transposed", family.transposed),
    )


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _groups(modules: Iterable[nn.Module]) -> tuple[int, int]:
    """Count the groups of a router, and those of them that a token may use."""
    for module in modules:
        for key in _GROUPS:
            groups = vars(module).get(key)
            if isinstance(groups, int) and groups > 1 and vars(module).get("topk_method") != "greedy":
                return groups, vars(module).get("topk_group") or groups
    return 1, 1


def _check_experts(layer: MoELayer, ids: Iterable[int]) -> tuple[int, ...]:
    where = f"layer {layer.layer}"
    try:
        given = [operator.index(i) for i in ids]
    except TypeError:
        raise MoeitsError(f"{where}: kept experts must be a list of integers, not {ids!r}") from None
    if not given:
        raise MoeitsError(f"{where}: no expert is kept; at least {layer.minimum} must stay")
    if bad := sorted(i for i in set(given) if not 0 <= i < layer.num_experts):
        raise MoeitsError(f"{where}: experts {bad} do not exist; this layer has 0 to {layer.num_experts - 1}")
    if twice := sorted(i for i in set(given) if given.count(i) > 1):
        raise MoeitsError(f"{where}: experts {twice} are given more than once")
    if len(given) < layer.minimum:
        raise BudgetError(
            f"{where}: {len(given)} kept, but at least {layer.minimum} experts must stay in this family"
        )
    size = math.ceil(layer.num_experts / layer.groups)
    per_group = [sum(i // size == group for i in given) for group in range(layer.groups)]
    if len(set(per_group)) > 1:
        raise BudgetError(
            f"{where}: the router chooses among {layer.groups} groups of experts, which must stay equally "
            f"large; kept per group: {per_group}"
        )
    return tuple(sorted(given))
