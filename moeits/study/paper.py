"""The paper's own figures: Tables 2 to 4 as printed (arXiv 2604.10603, CC BY 4.0), averages recomputed."""

import pandas as pd
import yaml

from moeits.errors import MoeitsError
from moeits.machine.paths import DATA

TASKS = {
    "boolq": "BoolQ",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
    "hellaswag": "HellaSwag",
}
TABLES = {
    2: ("DeepSeek-V2-Lite", "table2_deepseek_v2_lite.csv"),
    3: ("Qwen1.5-MoE", "table3_qwen1.5_moe.csv"),
    4: ("Mixtral 8x7B", "table4_mixtral_8x7b.csv"),
}
TAU = {"DeepSeek-V2-Lite": 1.25, "Qwen1.5-MoE": 1.25, "Mixtral 8x7B": 0.5}


def table(number: int) -> pd.DataFrame:
    """One of the paper's result tables.

    Parameters
    ----------
    number : {2, 3, 4}
        The table's number in the paper.

    Returns
    -------
    DataFrame
        A row per method as printed, accuracies and reductions in percent, with the added columns ``average``
        (recomputed over the tasks that the row has), ``tasks`` (how many these are) and ``model``.

    Raises
    ------
    MoeitsError
        Unknown table, or a value that is no percentage.
    """
    if number not in TABLES:
        raise MoeitsError(f"the paper's result tables are {sorted(TABLES)}, not {number!r}")
    model, file = TABLES[number]
    printed = pd.read_csv(DATA / "paper" / file)
    scores = printed[list(TASKS)]
    numbers = printed.select_dtypes("number")
    wrong = ((numbers < 0) | (numbers > 100)).any(axis=1)
    if wrong.any():
        raise MoeitsError(f"{file}: no percentage in the row of {', '.join(printed.method[wrong])}")
    return printed.assign(average=scores.mean(axis=1), tasks=scores.notna().sum(axis=1), model=model)


def protocols() -> pd.DataFrame:
    """Read what is known of how the rows of the result tables were measured.

    Returns
    -------
    DataFrame
        A line per method: row (its name in the tables), citation, tables, models, asked (shots and the way to
        ask), after_pruning (what follows the pruning), reading (what that means for the row), mark ("read" in
        the source, or "second hand"). What was not found is missing.
    """
    return pd.read_csv(DATA / "paper" / "protocols.csv", dtype=str)


def dense() -> pd.DataFrame:
    """Read scores of the whole models in percent, which the tables leave out, where a source has them.

    Returns
    -------
    DataFrame
        model, asked, metric, a column for each of :data:`TASKS`, citation, source, mark as in
        :func:`protocols`.
    """
    return pd.read_csv(DATA / "paper" / "dense.csv")


def margins(number: int) -> pd.DataFrame:
    """Lead of MoEITS over every other row, on the tasks that both rows have.

    Parameters
    ----------
    number : {2, 3, 4}
        The table's number in the paper.

    Returns
    -------
    DataFrame
        Columns method, tasks (in common), lead (percentage points, mean over these tasks),
        lead_without_hellaswag.
    """
    rows = table(number).set_index("method")[list(TASKS)]
    differences = rows.loc["MoEITS"] - rows.drop(index="MoEITS")
    return pd.DataFrame(
        {
            "tasks": differences.notna().sum(axis=1),
            "lead": differences.mean(axis=1),
            "lead_without_hellaswag": differences.drop(columns="hellaswag").mean(axis=1),
        }
    ).reset_index()


def models() -> dict[str, dict]:
    """Read the shapes of the paper's models from ``data/paper/models.yaml``.

    Returns
    -------
    dict of str to dict
        By the names of :data:`TABLES`: ``checkpoint`` on the hub, ``citation``, and ``config``, the settings
        that fix the number of parameters.
    """
    return yaml.safe_load((DATA / "paper" / "models.yaml").read_text(encoding="utf-8"))
