"""One rule that finds every Mixture-of-Experts layer of a model, and a short table of what differs by family.

The rule is duck-typed. An *experts module* owns the weights that :class:`Family` names, for most families a
three-dimensional ``down_proj`` (E, ., .); its parent is the layer's *block*; what the block's router owns
with E entries along some dimension is cut with the experts, and the plain attributes that count experts
follow. No class of any model is named here.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from moeits.errors import BudgetError, MoeitsError
from moeits.selection import check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """What the rule cannot read off a model's modules.

    Attributes
    ----------
    minimum : int
        Fewest experts with which the router still works, per layer or per group of a router with groups.
    fixed_top_k : bool
        Whether all layers share the configuration's top-k, which then bounds the experts of each.
    transposed : tuple of str
        What is stored (in, out), of `weights`, by a class that does not say so itself.
    weights : dict of str to str
        Where an experts module may hold what: ``gate``, ``up``, ``gate_up`` or ``down``.
        ``{}`` stands for the expert where each has its own; a matrix (E m, .) holds all.
    pads : bool
        Whether a router's bias alone can keep tokens from an expert, with no effect on the others.
    """

    minimum: int = 1
    fixed_top_k: bool = False
    transposed: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(
        default_factory=lambda: {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
    )
    pads: bool = False


# Routers of DeepSeek-V3's kind score each expert by itself, and rank a group, or their only one, by the sum
# of its two best scores.
_TWO = Family(minimum=2, pads=True)
_DBRX = {"mlp.w1": "gate", "mlp.v1": "up", "mlp.w2": "down"}
_SWITCH = {
    "expert_{}.wi_0.weight": "gate",
    "expert_{}.wi_1.weight": "up",
    "expert_{}.wi.weight": "up",
    "expert_{}.wo.weight": "down",
}

FAMILIES: dict[str, Family] = {
    "afmoe": Family(),
    "aria_text": Family(),
    "axk1": _TWO,
    "axk2": _TWO,
    "bailing_hybrid": _TWO,
    "beam": _TWO,
    "cohere2_moe": Family(),
    "dbrx": Family(transposed=("down",), weights=_DBRX),
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
    "glm4v_moe_text": _TWO,
    "gpt_oss": Family(pads=True),
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
    "llama4_text": Family(transposed=("gate_up", "down")),
    "mellum": Family(),
    "mimo_v2_flash": _TWO,
    "minimax": Family(),
    "minimax_m2": Family(),
    "minimax_m3_vl_text": Family(),
    "mistral4": Family(minimum=2),
    "mixtral": Family(),
    "nemotron_h": _TWO,
    "olmoe": Family(),
    "phimoe": Family(minimum=2),  # its router always picks two experts
    "qwen2_moe": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_vl_moe_text": Family(),
    "qwen4_exp_text": Family(),
    "solar_open": _TWO,
    "switch_transformers": Family(fixed_top_k=True, weights=_SWITCH),  # its router always picks one expert
    "unlimited_ocr_text": Family(),
}
"""Served model types (``config.model_type``); pruning each of them is tested to be exact."""

REFUSED: dict[str, str] = {
    "deepseek_v4": "some of its layers pick experts by a table of token ids, so the rest cannot take over",
    "doge": "its experts are rows of an embedding, found by product keys",
    "inkling_text": "its router scores the shared experts together with the routed ones",
    "jetmoe": "its attention heads are routed experts too, and one number in its configuration counts both",
    "longcat_flash": "its router also scores experts that compute nothing",
    "nllb-moe": "an encoder-decoder model whose class in transformers takes its first two experts, whatever "
    "the router chooses, so that there is nothing to compare with",
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
LAYER = re.compile(r"(?:^|\.)(?:layers|blocks?)\.(\d+)(?=\.|$)")
"""Finds the number of a layer in the name of what belongs to it; what is before it names its stack."""


@dataclass(frozen=True)
class MoELayer:
    """One Mixture-of-Experts layer: where its tensors are, and what bounds its pruning.

    Names are those of ``model.named_modules`` and ``model.named_parameters``.

    Attributes
    ----------
    layer : int
        Number of the decoder layer, N of ``model.layers.N``; the decoder's follow an encoder's.
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
    transposed : tuple of str
        Those of `weights` that are (E, in, out) instead of (E, out, in).
    weights : dict of str to str
        By what they are, where the experts module holds its weights; see :class:`Family`.
    pads : bool
        Whether there may be experts that no token is routed to; see :class:`Family`.
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
    transposed: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    pads: bool = False

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


def auto_class(config: "type[PreTrainedConfig]") -> tuple[str, type] | None:
    """Find the class that generates text with a kind of configuration, and the automatic class that loads it.

    A model that reads images, too, is taken whole.
    """
    import transformers

    names = ["AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"]
    if "text_config" in config.sub_configs:
        names[:2] = names[1::-1]
    for name in names:
        if (found := getattr(transformers, name)._model_mapping.get(config, None)) is not None:
            return name, found
    return None


def families_table() -> list[tuple[str, str, str]]:
    """List the served families.

    Returns
    -------
    list of (str, str, str)
        Model type, class of transformers, and fewest experts per layer.
    """
    from transformers import CONFIG_MAPPING

    parts = {
        part.model_type: whole
        for whole in CONFIG_MAPPING.values()
        for key, part in whole.sub_configs.items()
        if key == "text_config" and hasattr(part, "model_type")
    }
    return [
        (
            name,
            (auto_class(CONFIG_MAPPING[name]) or auto_class(parts[name]))[1].__name__,
            "top-k" if family.fixed_top_k else str(family.minimum),
        )
        for name, family in sorted(FAMILIES.items())
    ]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """Find every Mixture-of-Experts layer of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A language model of transformers, alone or as a part of one that reads images too, on any device
        (``meta`` too), whole or pruned.

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
    decoder = modules.values() if config is model.config else model.get_decoder().modules()
    weights = FAMILIES.get(config.model_type, Family()).weights
    inside = {id(module) for module in decoder if "down" in _held(module, weights)}
    experts = [name for name, module in modules.items() if id(module) in inside]
    family = _family(config, dense=not experts)
    places = _places(modules, experts)
    layers = [_moe_layer(modules, name, places[name], config, family) for name in experts]
    numbers = [layer.layer for layer in layers]
    if len(set(numbers)) < len(numbers):
        raise MoeitsError(
            f"{type(model).__name__} has two Mixture-of-Experts blocks in one decoder layer: {numbers}"
        )
    return sorted(layers, key=lambda layer: layer.layer)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of all decoder layers of a Mixture-of-Experts model, and its name."""
    found = [LAYER.search(layer.name) for layer in moe_layers(model)]
    name = found[-1].string[: found[-1].start(1) - 1]
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
    weights = {role: _stacked(layer, path) for role, path in layer.weights.items()}
    weights |= {role: weights[role].transpose(1, 2) for role in layer.transposed}
    if (both := weights.pop("gate_up", None)) is not None:
        if getattr(layer.experts, "is_concatenated", True):
            weights["gate"], weights["up"] = both.chunk(2, dim=1)
        else:
            weights["gate"], weights["up"] = both[:, 0::2], both[:, 1::2]
    return {role: weights[role] for role in ("gate", "up", "down") if role in weights}


def _stacked(layer: MoELayer, path: str) -> torch.Tensor:
    """Weights (E, ., .) of a layer's experts, a copy only where each expert has its own."""
    if "{}" in path:
        return torch.stack(
            [layer.experts.get_parameter(path.format(e)).detach() for e in range(layer.num_experts)]
        )
    weight = layer.experts.get_parameter(path).detach()
    return weight if weight.dim() == 3 else weight.unflatten(0, (layer.num_experts, -1))


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


def _held(module: nn.Module, weights: Mapping[str, str]) -> dict[str, str]:
    """By what they are, those of a family's weights that a module holds: own ones have three dimensions."""
    found = {}
    for path, role in weights.items():
        try:
            parameter = module.get_parameter(path.format(0))
        except AttributeError:
            continue
        if parameter.dim() == 3 or "." in path:
            found[role] = path
    return found


def _places(modules: Mapping[str, nn.Module], experts: Sequence[str]) -> dict[str, int]:
    """Find the number of each experts module's layer; those of a decoder follow those of its encoder."""
    places, before = {}, {}
    for name in experts:
        if (match := LAYER.search(name)) is None:
            raise MoeitsError(f"{name}: no number of a decoder layer in this name")
        stack = name[: match.start(1) - 1]
        before.setdefault(stack, sum(len(modules[other]) for other in before))
        places[name] = before[stack] + int(match[1])
    return places


def _family(config: object, *, dense: bool) -> Family:
    model_type = config.model_type
    if model_type in REFUSED:
        raise MoeitsError(refusal(model_type))
    if dense and (model_type in FAMILIES or not any(hasattr(config, name) for name in EXPERT_COUNTS)):
        raise MoeitsError(f"this {model_type!r} model is dense: it has no routed experts to prune")
    if model_type not in FAMILIES:
        raise MoeitsError(refusal(model_type))
    return FAMILIES[model_type]


def _moe_layer(
    modules: Mapping[str, nn.Module], name: str, number: int, config: object, family: Family
) -> MoELayer:
    experts = modules[name]
    weights = _held(experts, family.weights)
    owners = {name, *(f"{name}.{path}".rpartition(".")[0] for path in weights.values() if "{}" not in path)}
    count = len(experts) if isinstance(experts, nn.ModuleDict) else _count(experts, weights["down"])
    block_name = name.rpartition(".")[0]
    block = modules[block_name]

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

    if isinstance(experts, nn.ModuleDict):
        cut = [name]
    else:
        own = [key for key, tensor in _own_tensors(experts) if tensor.shape[:1] == (count,)]
        cut = [f"{name}.{key}" for key in dict.fromkeys([*own, *weights.values()])]
    scope = {**{owner: modules[owner] for owner in sorted(owners)}, **routers}
    if LAYER.search(block_name).end() < len(block_name):  # a whole decoder layer's numbers are not ours
        scope[block_name] = block
    counters = [
        f"{owner}.{key}"
        for owner, module in scope.items()
        for key in EXPERT_COUNTS
        if vars(module).get(key) == count and type(vars(module)[key]) is int
    ]
    top_ks = [f"{owner}.top_k" for owner, module in scope.items() if type(vars(module).get("top_k")) is int]
    top_k = (
        next((getattr(config, key) for key in TOP_KS if hasattr(config, key)), family.minimum)
        if family.fixed_top_k
        else vars(scope[top_ks[0].rpartition(".")[0]])["top_k"]
    )
    groups, top_groups = _groups(scope.values())
    return MoELayer(
        layer=number,
        name=block_name,
        experts=experts,
        num_experts=count,
        top_k=top_k,
        minimum=max(family.minimum * groups, top_k if family.fixed_top_k else 1),
        groups=groups,
        top_groups=top_groups,
        tensors={**dict.fromkeys(cut, 0), **router},
        router=tuple(router),
        counters=tuple(counters),
        top_ks=tuple(top_ks),
        transposed=tuple(weights) if getattr(experts, "is_transposed", False) else family.transposed,
        weights=weights,
        pads=family.pads and groups == 1 and any("bias" in name for name in router),
    )


def _count(experts: nn.Module, down: str) -> int:
    weight = experts.get_parameter(down)
    if weight.dim() == 3:
        return len(weight)
    return next(vars(experts)[key] for key in EXPERT_COUNTS if key in vars(experts))


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
