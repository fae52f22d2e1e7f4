"""One pass of text through a model gathers what all criteria need to know about its layers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from moeits.criteria.base import SCORES, Layer, Routing, Statistics
from moeits.errors import MoeitsError
from moeits.models.families import MoELayer, expert_block, moe_layers

SAMPLE = 256
"""Tokens whose routing and outputs of all experts are kept."""


@torch.inference_mode()
def gather(
    model: nn.Module, blocks: np.ndarray, *, batch_size: int = 8, sample: int = SAMPLE
) -> dict[int, Statistics]:
    """Gather the statistics of every Mixture-of-Experts layer in one pass over tokens.

    Parameters
    ----------
    model : torch.nn.Module
        Unpruned causal language model of a family that :func:`moeits.models.families.moe_layers` supports,
        on any device.
    blocks : ndarray of int, shape (N, T)
        Token ids.
    batch_size : int, default=8
        Blocks per pass.
    sample : int, default=256
        Tokens to sample, spread evenly over the text; all where there are fewer.

    Returns
    -------
    dict of int to Statistics
        By decoder layer.

    Raises
    ------
    MoeitsError
        If a layer's experts are not gated and stacked, or compute something else than
        ``down(act(gate(x)) * up(x))`` weighted by the router.
    """
    blocks = np.asarray(blocks)
    wanted = np.unique(np.linspace(0, blocks.size - 1, min(sample, blocks.size)).round().astype(int))
    gatherers = {layer.layer: _Gatherer(model, layer, wanted) for layer in moe_layers(model)}
    training = model.training
    model.eval()
    with ExitStack() as hooks:
        hooks.callback(model.train, training)
        for gatherer in gatherers.values():
            hook = gatherer.layer.experts.register_forward_hook(gatherer, with_kwargs=True)
            hooks.callback(hook.remove)
        for start in range(0, len(blocks), batch_size):
            ids = torch.as_tensor(blocks[start : start + batch_size], device=model.device)
            model(input_ids=ids, use_cache=False)
    return {number: gatherer.statistics() for number, gatherer in gatherers.items()}


def random_tokens(model: nn.Module, tokens: int, *, length: int = 512, seed: int = 0) -> np.ndarray:
    """Draw token ids from a model's vocabulary, all equally likely, shape (blocks, length).

    `tokens` are rounded down to whole blocks, at least one.
    """
    vocabulary = model.config.get_text_config().vocab_size
    shape = (max(tokens // length, 1), length)
    return np.random.default_rng(seed).integers(0, vocabulary, shape)


def layers_of(
    model: nn.Module,
    statistics: Mapping[int, Statistics] | None = None,
    *,
    seed: int = 0,
) -> dict[int, Layer]:
    """Show the layers of a model to criteria, by number; the weights are not copied.

    `statistics` are those of :func:`gather`, of the text that the criterion reads; `seed` is for random
    choices.
    """
    return {
        layer.layer: Layer(
            number=layer.layer,
            block=expert_block(layer),
            router=_router(model, layer)[0].float().cpu().numpy(),
            family=model.config.get_text_config().model_type,
            minimum=layer.minimum,
            groups=layer.groups,
            calibration=statistics[layer.layer] if statistics else None,
            seed=seed,
        )
        for layer in moe_layers(model)
    }


def fit_routing(
    logits: np.ndarray,
    gates: np.ndarray,
    top_k: int,
    biases: Sequence[np.ndarray],
    groups: int = 1,
    top_groups: int = 1,
) -> Routing | None:
    """Find the rule that gives a router's weights from its logits.

    `logits` and `gates` (n, E) are the unpruned router's; `biases` (E,) what may be added to the scores for
    the choice; a token uses experts of `top_groups` of the `groups`. None if the rule that fits best misses
    a weight of more than one token in fifty by over a percent of the mean weight.
    """
    found = None
    # A group's score is that of its best expert, or the sum of its two best.
    ranks = (1, 2) if groups > 1 else (1,)
    for scores, normalised, bias, rank in product(SCORES, (False, True), biases, ranks):
        bias = np.asarray(bias, dtype=np.float64)
        rule = Routing(scores, top_k, normalised, 1.0, bias, groups, top_groups, rank)
        guess = rule.gates(logits)
        both = (guess > 0) & (gates > 0)
        if not both.any():
            continue
        scale = float(np.median(gates[both] / guess[both]))
        off = np.abs(scale * guess - gates).max(axis=1) / gates[gates > 0].mean()
        misses, error = float((off > 0.01).mean()), float(np.minimum(off, 1).mean())
        if misses <= 0.02 and (found is None or error < found[0]):
            found = error, replace(rule, scale=scale)
    return found and found[1]


def _router(model: nn.Module, layer: MoELayer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rows of the router (E, d) and its vectors (E,)."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = [(name, tensors[name].detach()) for name in layer.router]
    rows = next(
        tensor
        for name, tensor in found
        if name.endswith(".weight") and tensor.dim() == 2 and tensor.shape[0] == layer.num_experts
    )
    return rows, [tensor.flatten() for _, tensor in found if tensor.numel() == layer.num_experts]


class _Gatherer:
    """Forward hook of one experts module, which adds up its statistics."""

    def __init__(self, model: nn.Module, layer: MoELayer, wanted: np.ndarray) -> None:
        self.layer, self.wanted = layer, wanted
        self.block = expert_block(layer)
        extra = [name for name, tensor in layer.experts.named_parameters(recurse=False) if tensor.dim() != 3]
        if set(self.block) != {"gate", "up", "down"} or extra or not hasattr(layer.experts, "act_fn"):
            raise MoeitsError(
                f"{layer.name}: statistics are gathered from gated experts without biases, whose module has "
                "an `act_fn`; those of this family are built differently"
            )
        self.router, self.vectors = _router(model, layer)
        experts, width, neurons = self.block["down"].shape
        self.tokens = 0
        self.sums = {
            name: np.zeros(shape)
            for name, shape in {
                "counts": (experts,),
                "weights": (experts,),
                "norms": (experts,),
                "weighted_norms": (experts,),
                "coactivation": (experts, experts),
                "inputs_squared": (experts, width),
                "neurons_squared": (experts, neurons),
            }.items()
        }
        self.inputs: list[torch.Tensor] = []
        self.gates: list[torch.Tensor] = []

    def __call__(self, _: nn.Module, args: tuple, options: dict, output: torch.Tensor) -> None:
        x, index, weights = self._arguments(args, options)
        gates = torch.zeros(len(x), self.layer.num_experts, dtype=torch.float32, device=x.device)
        gates.scatter_(1, index, weights.float())
        used = torch.zeros_like(gates).scatter_(1, index, 1.0)
        self._add("counts", used.sum(0))
        self._add("weights", gates.sum(0))
        self._add("coactivation", used.T @ used)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.layer.num_experts):
            tokens = used[:, expert].nonzero()[:, 0]
            if not len(tokens):
                continue
            gate = gates[tokens, expert][:, None]
            neurons = self._neurons(x[tokens], expert)
            out = linear(neurons, self.block["down"][expert]).float()
            norms = out.norm(dim=1)
            self._add("norms", norms.sum(), expert)
            self._add("weighted_norms", (gate[:, 0] * norms).sum(), expert)
            self._add("inputs_squared", (gate * x[tokens].float()).square().sum(0), expert)
            self._add("neurons_squared", (gate * neurons.float()).square().sum(0), expert)
            total.index_add_(0, tokens, gate * out)
        output = output.reshape(x.shape).float()
        if not (output - total).norm() <= 0.02 * total.norm():
            raise MoeitsError(
                f"{self.layer.name}: the experts of this family compute something else than the weighted sum "
                "of down(act(gate(x)) * up(x)), so their statistics cannot be gathered"
            )
        here = self.wanted[(self.wanted >= self.tokens) & (self.wanted < self.tokens + len(x))] - self.tokens
        self.inputs.append(x[here].clone())
        self.gates.append(gates[here])
        self.tokens += len(x)

    def _arguments(self, args: tuple, options: dict) -> Iterator[torch.Tensor]:
        given = [*args, *options.values()]
        if len(given) != 3 or given[1].shape != given[2].shape or given[1].is_floating_point():
            raise MoeitsError(
                f"{self.layer.name}: the experts of this family are not called with hidden states, indices "
                "and weights of the chosen experts, so their statistics cannot be gathered"
            )
        return (tensor.reshape(-1, tensor.shape[-1]) for tensor in given)

    def _neurons(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        act = self.layer.experts.act_fn
        return act(linear(x, self.block["gate"][expert])) * linear(x, self.block["up"][expert])

    def _add(self, name: str, value: torch.Tensor, expert: int | slice = slice(None)) -> None:
        self.sums[name][expert] += value.double().cpu().numpy()

    def statistics(self) -> Statistics:
        inputs, gates = torch.cat(self.inputs), torch.cat(self.gates).double().cpu().numpy()
        outputs = torch.stack(
            [
                linear(self._neurons(inputs, expert), self.block["down"][expert]).float()
                for expert in range(self.layer.num_experts)
            ],
            dim=1,
        )  # (n, E, d)
        logits = linear(inputs.float(), self.router.float()).double().cpu().numpy()
        vectors = [vector.double().cpu().numpy() for vector in self.vectors]
        biases = [*vectors, np.zeros(self.layer.num_experts)]
        return Statistics(
            tokens=self.tokens,
            **self.sums,
            logits=logits,
            gates=gates,
            gram=torch.bmm(outputs, outputs.transpose(1, 2)).double().cpu().numpy(),
            mean_outputs=outputs.double().mean(0).cpu().numpy(),
            routing=fit_routing(
                logits, gates, self.layer.top_k, biases, self.layer.groups, self.layer.top_groups
            ),
        )
