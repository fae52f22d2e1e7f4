"""Train a causal language model of transformers on a fixed order of tokens, and resume to the same weights.

The loop is shorter than a configuration of a trainer would be: one file holds weights, optimiser state,
losses and observations. A killed run loses at most the steps since that file was written, and ends with the
same weights as a run that was never interrupted (on one device, with one number of threads).
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from moeits.errors import MoeitsError
from moeits.machine.paths import whole
from moeits.models.families import moe_layers

STATE = "state.safetensors"


class LossError(MoeitsError, FloatingPointError):
    """The loss of a training is not finite."""


class Schedule(BaseModel):
    """Settings of one training.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    rows, context : int
        Sequences per step, and their length in tokens.
    curve : tuple of float
        Which part of the learning-rate curve the steps cover; the whole curve is (0, 1).
    learning_rate : float
        Peak of the curve: a cosine that ends at a twentieth of it.
    warmup : int
        Steps over which the rate rises to the curve, since the optimiser starts anew.
    weight_decay : float
        Decay of matrices.
    clip : float
        Largest norm of the gradient.
    balance, z : float
        Weights of the routers' load-balancing loss (doi:10.48550/arXiv.2101.03961, equation 4) and of their
        z-loss (doi:10.48550/arXiv.2202.08906, equation 5).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int
    rows: int = 8
    context: int = 256
    curve: tuple[float, float] = (0.0, 1.0)
    learning_rate: float = 5e-3
    warmup: int = 40
    weight_decay: float = 0.1
    clip: float = 1.0
    balance: float = 0.01
    z: float = 1e-3

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.steps * self.rows * self.context

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from zero."""
        first, last = self.curve
        position = first + (last - first) * step / self.steps
        curve = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * position))
        return self.learning_rate * curve * min(1.0, (step + 1) / self.warmup)


@contextmanager
def routing(model: nn.Module) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Hold what the routers decide while a model runs.

    Parameters
    ----------
    model : torch.nn.Module
        Mixture-of-Experts or dense model.

    Yields
    ------
    dict of int to (Tensor, Tensor)
        After each forward pass: layer to its router logits, float32 of shape (tokens, E), and the chosen
        experts, shape (tokens, top-k). Empty for a dense model.
    """
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    for layer, router in routers(model).items() if is_sparse(model) else ():

        def hold(module: nn.Module, inputs: tuple, outputs: tuple, number: int = layer) -> None:
            hidden = inputs[0].reshape(-1, module.weight.shape[1])
            held[number] = nn.functional.linear(hidden.float(), module.weight.float()), outputs[-1]

        handles.append(router.register_forward_hook(hold))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """Router module of every Mixture-of-Experts layer; its `weight` is (E, d)."""
    found = {}
    for layer in moe_layers(model):
        weight = next(name for name in layer.router if name.endswith(".weight"))
        found[layer.layer] = model.get_submodule(weight.rpartition(".")[0])
    return found


def is_sparse(model: nn.Module) -> bool:
    """Say whether a model has experts, whose weights are its only three-dimensional ones."""
    return any(parameter.dim() == 3 for parameter in model.parameters())


def balancing_loss(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss of one router: E times the sum of share of choices x mean probability.

    Parameters
    ----------
    logits : Tensor, shape (tokens, E)
        Router logits.
    chosen : Tensor of int, shape (tokens, top-k)
        Chosen experts.

    Returns
    -------
    Tensor
        A scalar: 1 where load and probability are uniform, E where one expert takes all.
    """
    experts = logits.shape[1]
    load = torch.bincount(chosen.reshape(-1), minlength=experts).to(logits.dtype) / chosen.numel()
    return experts * (load * logits.softmax(-1).mean(0)).sum()


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean square of the log of the softmax's denominator, which keeps logits small."""
    return logits.logsumexp(-1).square().mean()


def train(
    model: nn.Module,
    tokens: np.ndarray,
    schedule: Schedule,
    folder: Path,
    *,
    identity: Mapping[str, Any],
    observe: Callable[[nn.Module], Mapping[str, np.ndarray]] | None = None,
    observe_at: tuple[int, ...] = (),
    save_every: int = 100,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Train a model in place, or resume from `folder`.

    Parameters
    ----------
    model : torch.nn.Module
        Model in float32, with the weights to start from.
    tokens : ndarray of int, shape (at least ``schedule.tokens``,)
        Text in the order in which it is read.
    schedule : Schedule
        Settings.
    folder : Path
        Where the state is kept.
    identity : mapping
        What else the result depends on; a state with another identity is not resumed.
    observe : callable, optional
        Measures the model at the steps `observe_at` (0 is before the first), as arrays.
    observe_at : tuple of int
        Steps after which the model is observed.
    save_every : int, default=100
        Steps between states.
    progress : bool, default=False
        Whether to show a progress bar with the time left.

    Returns
    -------
    dict of str to ndarray
        ``loss`` and ``balance`` (float32, one value a step, nats a token), ``seconds`` of the processor, and
        ``NAME@STEP`` for everything
        that was observed.

    Raises
    ------
    MoeitsError
        If there are too few tokens, or the folder holds a training with other settings.
    LossError
        If the loss is not finite; the last state stays.
    """
    if tokens.size < schedule.tokens:
        raise MoeitsError(
            f"{schedule.steps} steps read {schedule.tokens} tokens, but the text has {tokens.size}"
        )
    device = next(model.parameters()).device
    settings = json.loads(
        json.dumps(
            {"schedule": schedule.model_dump(), **identity}
            | {"device": device.type, "threads": torch.get_num_threads()}
        )
    )
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": schedule.weight_decay},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=schedule.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    record = {
        "loss": np.full(schedule.steps, np.nan, np.float32),
        "balance": np.zeros(schedule.steps, np.float32),
        "seconds": np.zeros(schedule.steps, np.float32),
    }
    file = Path(folder) / STATE
    step = _restore(file, settings, named, optimizer, record) if file.exists() else 0

    def observed(after: int) -> None:
        if observe is not None and after in observe_at:
            model.eval()
            record.update({f"{name}@{after}": np.asarray(value) for name, value in observe(model).items()})
            model.train()

    if step == 0:
        observed(0)
    model.train()
    batches = tokens[: schedule.tokens].reshape(schedule.steps, schedule.rows, schedule.context)
    bar = tqdm(total=schedule.steps, initial=step, unit="step", disable=not progress, desc=str(folder.name))
    with routing(model) as held, bar:
        while step < schedule.steps:
            clock = time.process_time()
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            batch = torch.from_numpy(batches[step].astype(np.int64)).to(device)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            none = torch.zeros(1)
            balance = torch.stack([balancing_loss(*pair) for pair in held.values()] or [none]).mean()
            spread = torch.stack([z_loss(logits) for logits, _ in held.values()] or [none]).mean()
            (loss + schedule.balance * balance + schedule.z * spread).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            if not math.isfinite(loss.item() + norm.item()):
                raise LossError(
                    f"{folder.name}: the loss is {loss.item()} at step {step} of {schedule.steps}. "
                    f"The last good state is {file}; its learning rate was {schedule.learning_rate}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record["loss"][step], record["balance"][step] = loss.item(), balance.item()
            record["seconds"][step] = time.process_time() - clock
            step += 1
            observed(step)
            bar.update()
            if step % save_every == 0 or step == schedule.steps:
                _save(file, step, settings, named, optimizer, record)
    model.eval()
    return record


def _save(
    file: Path,
    step: int,
    settings: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    record: Mapping[str, np.ndarray],
) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in named.items()}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    tensors |= {
        f"record.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in record.items()
    }
    with whole(file) as part:
        save_file(tensors, part, metadata={"step": str(step), "settings": json.dumps(settings)})


def _restore(
    file: Path,
    settings: Mapping[str, Any],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    record: dict[str, np.ndarray],
) -> int:
    with safe_open(file, "pt") as state:
        facts = state.metadata()
        before = json.loads(facts["settings"])
        if other := sorted(key for key in before.keys() | settings if before.get(key) != settings.get(key)):
            told = "; ".join(f"{key}: {before.get(key)} then, {settings.get(key)} now" for key in other)
            raise MoeitsError(
                f"{file.parent} holds a training with other settings ({told}): "
                "set them as they were, or delete that folder to start again"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(state.get_tensor(f"model.{name}"))
        for key in state.keys():  # noqa: SIM118 (no mapping)
            kind, _, rest = key.partition(".")
            if kind == "optimizer":
                slot, _, name = rest.partition(".")
                optimizer.state[named[name]][slot] = state.get_tensor(key)
            elif kind == "record":
                record[rest] = state.get_tensor(key).numpy()
    return int(facts["step"])
