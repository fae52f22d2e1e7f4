"""Proof, on a user's own checkpoint, that a pruned model is the unpruned one with experts masked."""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from moeits.errors import MissingError
from moeits.kept import Kept
from moeits.models.checkpoint import stored_bytes
from moeits.models.folder import load_model
from moeits.models.hub import find
from moeits.models.surgery import masked

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit, that rounding in float32 explains."""


@dataclass(frozen=True)
class Verified:
    """What was compared, and what came out.

    Attributes
    ----------
    tensors, different : int
        Stored tensors that both folders name alike, and how many of them are not, byte for byte, what the
        source stores of the kept experts.
    tokens : int
        Tokens whose logits were compared.
    difference : float
        Largest difference of two logits, as a share of the largest logit.
    same_choice : float
        Share of the tokens after which both models rank the same token first.
    equal : bool
        Whether no tensor and no logit differs, the latter by more than :data:`TOLERANCE`.
    """

    tensors: int
    different: int
    tokens: int
    difference: float
    same_choice: float
    equal: bool


def verify(
    pruned: str | Path,
    against: str | Path,
    *,
    tokens: int = 512,
    length: int = 128,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Verified:
    """Compare a pruned folder with the unpruned model whose removed experts are masked.

    The kept experts come from the folder's ``kept.json``. All stored tensors are compared byte for byte, and
    the logits of random tokens in float32; one model is in memory at a time.

    Parameters
    ----------
    pruned, against : str or Path
        Folder of the pruned model, and of the unpruned one; or models of the hub.
    tokens : int, default=512
        Tokens, drawn from the whole vocabulary.
    length : int, default=128
        Tokens in a sequence.
    seed : int, default=0
        Seed of the draw.
    device : str or torch.device, optional
        Where the models run; the CPU by default.

    Returns
    -------
    Verified
        What came out.

    Raises
    ------
    MissingError
        If the pruned folder has no ``kept.json``.
    MoeitsError
        If the two are not of one model: other layers, or other numbers of experts.
    """
    pruned, against = find(pruned), find(against)
    file = pruned / "kept.json"
    if not file.is_file():
        raise MissingError(f"{pruned} has no kept.json, so that nobody knows what was removed")
    kept = Kept.read(file)
    expected, found = stored_bytes(against, kept), stored_bytes(pruned)
    named_alike = expected.keys() & found.keys()
    different = sum(expected[name]() != found[name]() for name in named_alike)

    whole = load_model(against, dtype=torch.float32, device=device)
    vocabulary = whole.config.get_text_config().vocab_size
    length = min(length, tokens)
    shape = (max(tokens // length, 1), length)
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    with masked(whole, kept.layers):
        reference = _logits(whole, ids)
    del whole
    gc.collect()
    logits = _logits(load_model(pruned, dtype=torch.float32, device=device), ids)
    difference = ((logits - reference).abs().max() / reference.abs().max()).item()
    same = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    equal = different == 0 and difference <= TOLERANCE
    return Verified(len(named_alike), different, ids.numel(), difference, same, equal)


@torch.inference_mode()
def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    names = ["input_ids", *(["decoder_input_ids"] if model.config.is_encoder_decoder else [])]
    rows = (dict.fromkeys(names, row[None].to(model.device)) for row in ids)
    return torch.stack([model(**row, use_cache=False).logits[0].cpu() for row in rows])
