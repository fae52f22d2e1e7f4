"""Score answers with each shared prefix read once.

lm-eval's :class:`~lm_eval.models.huggingface.HFLM` reads the whole prompt again for every answer of a
question, pads a batch to its longest sequence and computes the vocabulary's logits at every position. Here
the sequences of a batch are merged into a tree of tokens, a node for each distinct prefix. The model reads
the tree as one sequence in which a token attends to its ancestors only and has its depth as position, so that
nothing is read twice, nothing is padded, and logits are computed only where an answer is scored. The
log-likelihoods are those of HFLM up to rounding; they are normalised in float32 whatever the model's dtype.

What is shared is the prompt among the answers of a question. lm-eval draws few-shot examples anew for every
question, so that prompts have little in common.
"""

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import TextIO

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax
from tqdm import tqdm
from transformers import PreTrainedModel

from moeits.errors import MoeitsError

logger = logging.getLogger(__name__)

TOKENS_PER_SEQUENCE = 128  # a pass over the tree holds up to this many tokens times the batch size
LONG_TRUNK = 1024  # from this many shared tokens on, causal attention is worth a pass of its own


def token_tree(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Merge sequences of token ids, none of them empty, at their common prefixes.

    Returns
    -------
    tokens, parents : ndarray (S,), int64
        Token of each node and index of its parent, which comes before it; -1 for a first token.
    ends : list of int
        Node at which each sequence ends.
    """
    tokens: list[int] = []
    parents: list[int] = []
    ends: list[int] = []
    children: dict[tuple[int, int], int] = {}
    for sequence in sequences:
        node = -1
        for token in sequence:
            parent, node = node, children.setdefault((node, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
        ends.append(node)
    return np.array(tokens), np.array(parents), ends


def ancestor_mask(parents: np.ndarray) -> np.ndarray:
    """Which nodes each node of a tree sees, (S, S): True at (i, j) where j is i or one of its ancestors."""
    mask = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def tree_logits(
    model: PreTrainedModel,
    tokens: np.ndarray,
    parents: np.ndarray,
    wanted: np.ndarray,
    *,
    long_trunk: int = LONG_TRUNK,
) -> torch.Tensor:
    """Logits of the next token, (W, V) in float32, at some nodes of a token tree.

    The model has full attention; tokens and parents (S,) are those of :func:`token_tree`, and the wanted
    nodes (W,) ascend. A trunk (the tokens that all sequences share) of at least `long_trunk` tokens is read
    causally into a cache, and the branches after it; a shorter one is read in one pass with them.
    """
    ids = torch.as_tensor(tokens, device=model.device)[None]  # (1, S)
    keep = torch.as_tensor(wanted)  # on the CPU: the logits may be on another device than the embedding
    size = len(tokens)
    branches = np.flatnonzero(parents != np.arange(-1, size - 1))
    if not len(branches):  # a single chain: plain causal attention
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].float()
    mask = ancestor_mask(parents)
    depth = torch.as_tensor(mask.sum(axis=1) - 1, device=model.device)[None]  # (1, S)
    bias = torch.zeros((size, size), dtype=model.dtype)
    bias = bias.masked_fill_(~torch.from_numpy(mask), torch.finfo(model.dtype).min).to(model.device)
    trunk = int(min(parents[branches].min() + 1, wanted[0]))  # what comes before the first fork
    cache = None
    if trunk >= long_trunk:
        cache = model(input_ids=ids[:, :trunk], use_cache=True, logits_to_keep=1).past_key_values
    first = trunk if cache else 0
    output = model(
        input_ids=ids[:, first:],
        attention_mask=bias[None, None, first:],
        position_ids=depth[:, first:],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep - first,
    )
    return output.logits[0].float()


class SharedPrefixLM(HFLM):
    """HFLM that reads each shared prefix once.

    Parameters
    ----------
    pretrained : PreTrainedModel
        A causal language model.
    progress : text stream, optional
        Where to show a progress bar; by default there is none.
    truncate : bool
        Cut a prompt that is longer than the model takes from the left, as lm-eval does; otherwise it is an
        error.
    **kwargs
        As for HFLM.

    Attributes
    ----------
    obstacle : str or None
        Why this model cannot read a token tree and is scored by HFLM itself; None where it can.
    """

    def __init__(
        self,
        pretrained: PreTrainedModel,
        *,
        progress: TextIO | None = None,
        truncate: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        self.progress = progress
        self.truncate = truncate
        self.obstacle = tree_obstacle(pretrained)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one; natural logarithm."""
        fed = [(context + continuation)[-self.max_length - 1 : -1] for _, context, continuation in requests]
        self._check_lengths(requests)
        obstacle = self.obstacle
        window = attention_window(self.model)
        if window is not None and max(map(len, fed)) > window:
            obstacle = f"its layers attend to the last {window} tokens only and the prompts are longer"
        if obstacle is not None:
            logger.info("HFLM scores %s: %s", type(self.model).__name__, obstacle)
            results = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        else:
            results = self._read_trees(requests, fed, disable_tqdm)
        for (texts, *_), (value, _) in zip(requests, results, strict=True):
            if not np.isfinite(value):
                raise MoeitsError(
                    f"{type(self.model).__name__} gives {value} as log-likelihood of {texts[1]!r}: "
                    "its logits are not finite; look for NaN or Inf in its weights, or score it in float32"
                )
        return results

    def _check_lengths(self, requests: list[tuple[tuple[str, str], list[int], list[int]]]) -> None:
        longest = max(len(context) + len(continuation) - 1 for _, context, continuation in requests)
        if longest > self.max_length and not self.truncate:
            raise MoeitsError(
                f"the longest prompt has {longest} tokens and {type(self.model).__name__} takes "
                f"{self.max_length}: ask for fewer shots, or set max_length to cut prompts from the left, "
                "as lm-eval does"
            )
        answer = max(len(continuation) for *_, continuation in requests)
        if answer > self.max_length:
            raise MoeitsError(f"an answer has {answer} tokens, more than max_length = {self.max_length}")

    def _read_trees(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], fed: list[list[int]], quiet: bool
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        budget = TOKENS_PER_SEQUENCE * int(self.batch_size)
        quiet = quiet or self.progress is None
        with (
            tqdm(total=len(requests), desc="answers", file=self.progress, disable=quiet) as bar,
            torch.inference_mode(),
        ):
            for batch in tree_batches(fed, budget):
                tokens, parents, ends = token_tree([fed[i] for i in batch])
                paths = [
                    _last_nodes(parents, end, len(requests[i][2])) for i, end in zip(batch, ends, strict=True)
                ]
                wanted = np.unique(np.concatenate(paths))
                logits = tree_logits(self.model, tokens, parents, wanted)
                logprobs = log_softmax(logits, dim=-1)  # (W, V)
                best = logprobs.argmax(dim=-1)  # (W,)
                for i, path in zip(batch, paths, strict=True):
                    rows = torch.as_tensor(np.searchsorted(wanted, path), device=logits.device)
                    answer = torch.as_tensor(requests[i][2], device=logits.device)
                    value = float(logprobs[rows, answer].sum())
                    results[i] = (value, bool((best[rows] == answer).all()))
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
                bar.update(len(batch))
        return results


def _last_nodes(parents: np.ndarray, end: int, count: int) -> np.ndarray:
    """Walk back `count` nodes from the end of a path; they come in reading order."""
    path = [end]
    while len(path) < count:
        path.append(parents[path[-1]])
    return np.array(path[::-1])


def tree_batches(sequences: Sequence[Sequence[int]], budget: int) -> Iterator[list[int]]:
    """Deal sequences out to token trees: yields the indices of the sequences of one tree.

    Sequences that share a prefix go into the same tree. The tokens of a tree beyond its trunk, which is what
    all of its sequences share, stay within the budget unless a single sequence exceeds it.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])  # neighbours share the longest prefixes
    batch: list[int] = []
    size = trunk = 0
    for i in order:
        if batch:
            shared = _common(sequences[batch[-1]], sequences[i])
            if size + len(sequences[i]) - shared - min(trunk, shared) <= budget:
                batch.append(i)
                size += len(sequences[i]) - shared
                trunk = min(trunk, shared)
                continue
            yield batch
        batch, size, trunk = [i], len(sequences[i]), len(sequences[i])
    if batch:
        yield batch


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def attention_window(model: PreTrainedModel) -> int | None:
    """Give the fewest tokens back that a layer attends to, or None where every layer sees all."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return None
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=None)


def tree_obstacle(model: PreTrainedModel) -> str | None:
    """Why a model cannot read a token tree, or None where it can.

    The model must take a mask, positions and a cache; a recurrent state (Mamba, linear attention) cannot skip
    the branch before. A short tree is read and compared with its sequences read one by one, so that a model
    that ignores mask or positions is found out.
    """
    missing = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"} - set(
        inspect.signature(model.forward).parameters
    )
    if missing:
        return f"its forward takes no {', '.join(sorted(missing))}"
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
        "chunked_attention",
    }
    if layers or model._is_stateful:
        return f"it has layers other than attention: {', '.join(sorted(layers)) or 'a recurrent state'}"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention, {config._attn_implementation}, takes no mask of our own"
    draw = np.random.default_rng(0).integers(config.vocab_size, size=16)
    sequences = [draw[:8], np.r_[draw[:4], draw[8:12]], np.r_[draw[:4], draw[12:]]]
    tokens, parents, ends = token_tree([sequence.tolist() for sequence in sequences])
    wanted = np.array(sorted(ends))
    with torch.inference_mode():
        straight = torch.stack(
            [model(input_ids=torch.as_tensor(s, device=model.device)[None]).logits[0, -1] for s in sequences]
        ).float()
        for long_trunk in (1, LONG_TRUNK):
            tree = tree_logits(model, tokens, parents, wanted, long_trunk=long_trunk)
            gap = (tree - straight).norm(dim=-1) / straight.norm(dim=-1)  # (3,)
            # bfloat16 leaves 1 or 2 %; one router near a tie may flip, so the middle one of the three counts
            if gap.median() > 0.05:
                return "it does not read a token tree as it reads sequences"
    return None
