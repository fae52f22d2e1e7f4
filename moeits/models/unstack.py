"""The experts of a layer one by one, where transformers keeps them stacked in three-dimensional tensors."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moeits.errors import MoeitsError
from moeits.models.families import MoELayer, expert_block


class _Expert(nn.Module):
    """Linear maps of one expert, on the memory of the stacked tensors."""

    def __init__(self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=name in biases, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if name in biases:
                linear.bias = nn.Parameter(biases[name], requires_grad=False)
            setattr(self, name, linear)


class ExpertList(nn.Module):
    """The experts of a layer one by one; computes what the stacked module computes."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        stacked = layer.experts
        if not hasattr(stacked, "_apply_gate") and getattr(stacked, "has_gate", True):
            raise MoeitsError(
                f"{layer.name}: experts of {type(stacked).__name__} cannot be adapted one by one: "
                "transformers has no switch for how they are computed"
            )
        object.__setattr__(self, "stacked", stacked)  # no submodule: its weights are those of the experts
        self.together = getattr(stacked, "is_concatenated", True)
        block, biases = expert_block(layer), self._biases(stacked)
        self.neurons = block["down"].shape[2]
        self.experts = nn.ModuleList(
            _Expert({name: w[e] for name, w in block.items()}, {name: b[e] for name, b in biases.items()})
            for e in range(layer.num_experts)
        )

    def _biases(self, stacked: nn.Module) -> dict[str, Tensor]:
        found = {
            name.removesuffix("_proj_bias"): bias.detach()
            for name, bias in stacked.named_parameters(recurse=False)
            if name.endswith("_proj_bias")
        }
        if (both := found.pop("gate_up", None)) is not None:
            gate, up = both.chunk(2, dim=1) if self.together else (both[:, 0::2], both[:, 1::2])
            found |= {"gate": gate, "up": up}
        return found

    def hidden(self, expert: int, states: Tensor) -> Tensor:
        """Hidden neurons of one expert, (tokens, m), for states (tokens, d)."""
        maps = self.experts[expert]
        up = maps.up(states)
        if not hasattr(maps, "gate"):
            return self.stacked.act_fn(up)
        gate = maps.gate(states)
        both = torch.cat([gate, up], -1) if self.together else torch.stack([gate, up], -1).flatten(-2)
        return self.stacked._apply_gate(both)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the layer's routed output, (tokens, d), as the stacked module does."""
        out = torch.zeros_like(hidden_states)
        for expert, tokens, weights in chosen_tokens(top_k_index, top_k_weights, len(self.experts)):
            states = _filled(hidden_states.index_select(0, tokens))
            found = self.experts[expert].down(self.hidden(expert, states))[: len(tokens)]
            if getattr(self.stacked, "has_post_expert_norm", False):
                found = self.stacked.post_expert_norm(found)
            out.index_add_(0, tokens, (found * weights[:, None]).to(out.dtype))
        return out

    @torch.no_grad()
    def stack(self, transposed: tuple[str, ...]) -> nn.Module:
        """Write the experts' weights back into the stacked module, and return it."""
        weights = {
            name: torch.stack([getattr(expert, name).weight for expert in self.experts])
            for name in ("gate", "up", "down")
            if hasattr(self.experts[0], name)
        }
        if "gate" in weights:
            gate, up = weights.pop("gate"), weights.pop("up")
            both = torch.cat([gate, up], 1) if self.together else torch.stack([gate, up], 2).flatten(1, 2)
            weights["gate_up"] = both
        for name, weight in weights.items():
            parameter = getattr(self.stacked, f"{name}_proj")
            parameter.copy_(weight.mT if transposed else weight)
        return self.stacked


def one_by_one(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the routed output of stacked experts, (tokens, d), expert by expert.

    What transformers' plain loop does, faster on a CPU: see :func:`_filled`. transformers knows it as the
    experts implementation :data:`ONE_BY_ONE`.
    """
    product = torch.matmul if module.is_transposed else linear
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def project(states: Tensor, name: str, expert: int) -> Tensor:
        found = product(states, getattr(module, name)[expert])
        return found + getattr(module, f"{name}_bias")[expert] if module.has_bias else found

    out = torch.zeros_like(hidden_states)
    for expert, tokens, weights in chosen_tokens(top_k_index, top_k_weights, len(module.down_proj)):
        states = project(_filled(hidden_states.index_select(0, tokens)), first, expert)
        states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
        found = project(states, "down_proj", expert)[: len(tokens)]
        if module.has_post_expert_norm:
            found = module.post_expert_norm(found)
        out.index_add_(0, tokens, (found * weights[:, None]).to(out.dtype))
    return out


ONE_BY_ONE = "one_by_one"
ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)


def _filled(states: Tensor) -> Tensor:
    """Add rows of zeros up to a multiple of 32, if there are more than eight.

    A CPU's library prepares a matrix product for each new shape, which can take longer than the product; this
    way there are few.
    """
    return pad(states, (0, 0, 0, -len(states) % 32)) if len(states) > 8 else states


def chosen_tokens(index: Tensor, weights: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert that any token is routed to, its tokens (rows of `index`), and their weights for it.

    `index` and `weights` (tokens, top-k) are what the router chose; larger numbers than `experts` stand for
    none.
    """
    chosen = index.flatten()
    places = chosen.argsort(stable=True).split(chosen.bincount(minlength=experts).tolist())
    for expert, place in enumerate(places[:experts]):
        if len(place):
            yield expert, place // index.shape[1], weights.flatten().index_select(0, place)


def experts_name(layer: MoELayer) -> str:
    """Name of a layer's experts module in the model."""
    return next(iter(layer.tensors)).rpartition(".")[0]


def replace_experts(model: nn.Module, layer: MoELayer, experts: nn.Module) -> None:
    """Put another module in the place of a layer's experts."""
    owner, _, key = experts_name(layer).rpartition(".")
    setattr(model.get_submodule(owner), key, experts)
