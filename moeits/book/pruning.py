"""Tables of the pages that prune a model: its answers before and after."""

import pandas as pd

from moeits import evaluation
from moeits.study.records import Record

FORMATS = dict.fromkeys(["before", "± before", "after", "± after", "± difference"], ".3f") | {
    "difference": "+.3f",
    "chance": ".2f",
}


def scores(unpruned: Record, pruned: Record) -> pd.DataFrame:
    """Pair the answers of a model before and after pruning, question by question.

    Parameters
    ----------
    unpruned, pruned : Record
        Of :meth:`moeits.study.pipeline.Study.scores`. At another tau than the model's own the profile may ask
        fewer of the same questions; those that both answered count.

    Returns
    -------
    DataFrame
        A row per task and measure: task, measure, before, after and difference with a standard error each,
        verdict, chance, n.
    """
    after = pd.DataFrame(pruned.details["items"])
    before = pd.DataFrame(unpruned.details["items"]).merge(after[["task", "question"]])
    keys = ["task", "variant"]
    one, two = (evaluation.summarise(items).set_index(keys) for items in (before, after))
    paired = evaluation.compare(before, after).set_index(keys)
    table = pd.DataFrame(
        {
            "task": [title(task) for task, _ in paired.index],
            "measure": [variant.replace("_", " ") for _, variant in paired.index],
            "before": one.value[paired.index].to_numpy(),
            "± before": one.stderr[paired.index].to_numpy(),
            "after": two.value[paired.index].to_numpy(),
            "± after": two.stderr[paired.index].to_numpy(),
            "difference": paired.difference.to_numpy(),
            "± difference": paired.stderr.to_numpy(),
            "verdict": paired.verdict.to_numpy(),
            "chance": one.chance[paired.index].to_numpy(),
            "n": one.n[paired.index].astype(int).to_numpy(),
        }
    )
    return table


def title(task: str) -> str:
    """Name of a task in prose."""
    return evaluation.KNOWN[task].title if task in evaluation.KNOWN else task
