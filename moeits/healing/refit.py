"""Refit: healing without training. The down projections of the kept experts, by least squares.

Layer by layer, through what is already refitted, the down projections are fitted on calibration text so that
the kept experts give the output of all experts, as the unpruned model's layer has it on the same input. Where
the router's weights of the kept experts grow, as a softmax over fewer experts makes them, the fit undoes it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeits.errors import MoeitsError
from moeits.models.families import MoELayer, decoder_layers, moe_layers
from moeits.models.unstack import ExpertList, chosen_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGE = 3e-2
"""Penalty on what a fit changes, relative to the mean diagonal of the Gram matrix."""


@dataclass(frozen=True)
class Refitted:
    """How close a layer's routed output is to that of the unpruned model.

    Attributes
    ----------
    layer : int
        Decoder layer.
    before, after : float
        Squared error as a share of the unpruned layer's squared output, on the calibration text, each token
        weighted by the inverse square of its hidden state's norm.
    """

    layer: int
    before: float
    after: float


@torch.no_grad()
def refit_model(
    model: "PreTrainedModel",
    original: "PreTrainedModel",
    blocks: Tensor,
    *,
    ridge: float = RIDGE,
    batch_size: int = 4,
) -> list[Refitted]:
    """Refit the down projections of a pruned model's experts, in place.

    Parameters
    ----------
    model, original : transformers.PreTrainedModel
        The pruned model and the unpruned one.
    blocks : Tensor of int64, shape (N, T)
        Calibration text.
    ridge : float, default=0.03
        See :data:`RIDGE`.
    batch_size : int, default=4
        Blocks in one pass.

    Returns
    -------
    list of Refitted
        One for each Mixture-of-Experts layer.

    Raises
    ------
    MoeitsError
        If the models have experts in different layers, or a fit is not finite.
    """
    unpruned = {layer.layer: layer for layer in moe_layers(original)}
    layers = {layer.layer: layer for layer in moe_layers(model)}
    if unpruned.keys() != layers.keys():
        raise MoeitsError(
            f"one model has experts in layers {sorted(unpruned)}, the other in {sorted(layers)}"
        )
    report = []
    training = model.training
    model.eval()
    try:
        stream = _Stream(model, torch.as_tensor(blocks).split(batch_size))
        for number, decoder in enumerate(decoder_layers(model)[1]):
            if number in layers:
                observe = _Observer(model, layers[number], original, unpruned[number])
                report.append(observe.fit(stream.run(number, decoder, keep=False), ridge))
            stream.run(number, decoder)
    finally:
        model.train(training)
    return report


def least_squares(mixed: Tensor, wanted: Tensor, start: Tensor, ridge: float = RIDGE) -> Tensor:
    """Fit ``mixed @ fitted`` to `wanted`, drawn towards a start; the fit is (n, d) in float32.

    `mixed` (tokens, n) are hidden neurons times the weight of their expert, `wanted` (tokens, d) what they
    should give, `start` (n, d) the down projection before. Minimises ``|wanted - mixed @ fitted|**2 + c
    |fitted - start|**2`` with ``c`` the ridge times the mean diagonal of the Gram matrix, by the Gram matrix
    of the columns or of the rows, whichever is smaller.
    """
    missing = wanted - mixed @ start.to(mixed.dtype)
    tokens, neurons = mixed.shape
    rows = mixed if neurons <= tokens else mixed.T
    gram = product(rows, rows)
    penalty = (ridge * gram.diagonal().sum() / neurons).clamp(min=torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    if neurons <= tokens:
        change = torch.cholesky_solve(product(mixed, missing), factor)
    else:
        change = mixed.T.float() @ torch.cholesky_solve(missing.float(), factor)
    return start.float() + change


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left.T @ right`` in float32 for rows of any dtype: sums over chunks, so that they lose few digits."""
    return sum((a.T @ b).float() for a, b in zip(left.split(4096), right.split(4096), strict=True))


class _KnownError(Exception):
    """The layers will be called as for an earlier batch; holds those calls."""


def _same(one: Any, other: Any) -> bool:
    """Say whether what a layer is given beside the hidden states is the same."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and not isinstance(one, Tensor) and one == other)


class _Stream:
    """Hidden states of token blocks on their way through the decoder layers of a model."""

    def __init__(self, model: "PreTrainedModel", batches: tuple[Tensor, ...]) -> None:
        self.calls: list[list[tuple[tuple, dict[str, Any]]]] = []  # of every batch and layer
        self.states: list[Tensor] = []
        layers = decoder_layers(model)[1]
        for batch in batches:
            calls: list[tuple[tuple, dict[str, Any]]] = []

            def see(_: nn.Module, args: tuple, options: dict[str, Any], calls: list = calls) -> None:
                options = dict(options)
                states = args[0] if args else options.pop("hidden_states")
                calls.append((args[1:], options))
                if len(calls) == 1:
                    self.states.append(states)
                    for known in self.calls:
                        if _same(known[0], calls[0]):
                            raise _KnownError(known)

            hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
            try:
                model(input_ids=batch.to(model.device), use_cache=False, logits_to_keep=1)
            except _KnownError as found:  # no need to pass the other layers
                (calls,) = found.args
            finally:
                for hook in hooks:
                    hook.remove()
            self.calls.append(calls)

    def run(self, number: int, decoder: nn.Module, *, keep: bool = True) -> list[Tensor]:
        """Run one decoder layer; with `keep` its output replaces the states."""
        found = []
        for states, calls in zip(self.states, self.calls, strict=True):
            args, options = calls[number]
            output = decoder(states, *args, **options)
            found.append(output if isinstance(output, Tensor) else output[0])
        if keep:
            self.states = found
        return found


class _Observer:
    """Collects a pruned layer's active neurons, and what the unpruned layer gives for its input."""

    def __init__(self, model: nn.Module, layer: MoELayer, original: nn.Module, unpruned: MoELayer) -> None:
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise MoeitsError(f"{layer.name}: its experts end in a norm, after which nothing can be refitted")
        self.layer, self.experts = layer, ExpertList(layer)
        self.mixed: list[Tensor] = []
        self.fixed: list[Tensor] = []  # what the biases of the down projections give
        self.wanted: list[Tensor] = []
        block, other = model.get_submodule(layer.name), original.get_submodule(unpruned.name)

        def ask(_: nn.Module, args: tuple, options: dict[str, Any]) -> None:
            other(*args, **options)

        self.hooks = [
            layer.experts.register_forward_pre_hook(self._see),
            block.register_forward_pre_hook(ask, with_kwargs=True),
            unpruned.experts.register_forward_hook(lambda _, __, output: self.wanted.append(output.float())),
        ]

    def _see(self, _: nn.Module, args: tuple) -> None:
        states, index, weights = args
        mixed = states.new_zeros(len(self.experts.experts), len(states), self.experts.neurons)
        fixed = torch.zeros_like(states, dtype=torch.float32)
        for expert, tokens, share in chosen_tokens(index, weights, len(mixed)):
            active = self.experts.hidden(expert, states.index_select(0, tokens)) * share[:, None]
            mixed[expert].index_add_(0, tokens, active.to(mixed.dtype))
            if (bias := self.experts.experts[expert].down.bias) is not None:
                fixed.index_add_(0, tokens, (share[:, None] * bias).float())
        self.mixed.append(mixed.transpose(0, 1).flatten(1))
        self.fixed.append(fixed)

    def fit(self, states: list[Tensor], ridge: float) -> Refitted:
        """Solve, and write the down projections into the model; `states` are those after the layer."""
        for hook in self.hooks:
            hook.remove()
        # What follows sees these states divided by their norm, and errors with them.
        influence = 1 / torch.cat([found.flatten(0, -2) for found in states]).float().norm(
            dim=1, keepdim=True
        )
        mixed = torch.cat(self.mixed).float() * influence
        wanted = (torch.cat(self.wanted).flatten(0, -2) - torch.cat(self.fixed)) * influence
        start = torch.cat([expert.down.weight.T for expert in self.experts.experts]).float()
        fitted = least_squares(mixed, wanted, start, ridge)
        if not torch.isfinite(fitted).all():
            raise MoeitsError(
                f"layer {self.layer.layer}: the fit is not finite; look for NaN or Inf in its weights"
            )
        for expert, down in zip(self.experts.experts, fitted.split(self.experts.neurons), strict=True):
            expert.down.weight.copy_(down.T)
        norm = wanted.square().sum()
        errors = [((wanted - mixed @ down).square().sum() / norm).item() for down in (start, fitted)]
        return Refitted(self.layer.layer, *errors)
