"""Time the scoring of benchmark questions against lm-eval's plain HFLM: same model, dtype and questions.

HFLM loads the model as lm-eval does. ``python benchmarks/evaluation.py`` takes half an hour on two cores.
"""

import io
import time
from contextlib import redirect_stderr
from functools import partial
from itertools import product
from pathlib import Path

import click
import pandas as pd
import torch
from lm_eval.evaluator import evaluate as run
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from moeits import evaluation
from moeits.machine.keys import file_digest
from moeits.models.folder import load_model
from moeits.study import profiles, records
from moeits.study.pipeline import Study

MODEL = "smol-qwen"
BATCH_SIZE = 8


def plain(folder: Path, dtype: str, shots: int, limit: int) -> pd.DataFrame:
    """Likeliest choice of every question as HFLM finds it, which loads the model itself."""
    tasks = {name: evaluation.load_task(name, shots=shots) for name in evaluation.TASKS}
    samples = {
        name: evaluation.sample_questions(name, len(task.eval_docs), limit, 0) for name, task in tasks.items()
    }
    lm = HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=BATCH_SIZE)
    results = run(lm=lm, task_dict=tasks, samples=samples, bootstrap_iters=0)
    return pd.DataFrame(
        {
            "task": name,
            "question": sample["doc_id"],
            "choice": max(range(len(values)), key=values.__getitem__),
        }
        for name, answered in results["samples"].items()
        for sample in answered
        for values in [[value for value, _ in sample["filtered_resps"]]]
    )


def ours(folder: Path, dtype: str, shots: int, limit: int) -> pd.DataFrame:
    """Score the same questions as the package does, loading included."""
    model = load_model(folder, dtype=getattr(torch, dtype), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return evaluation.evaluate(
        model, tokenizer, list(evaluation.TASKS), shots=shots, limit=limit, batch_size=BATCH_SIZE
    )


def measure(folder: Path, dtype: str, shots: int, limit: int, repeats: int) -> list[dict]:
    """Score the same questions both ways in turn.

    Parameters
    ----------
    folder : Path
        Folder of the model.
    dtype, shots : str, int
        Setting.
    limit : int
        Questions of each task.
    repeats : int
        Repetitions; the rows have one line for each.

    Returns
    -------
    list of dict
        Tidy rows (see :func:`moeits.study.records.row`): seconds of both ways, and answers that differ.
    """
    rows = []
    for repeat in range(repeats):
        seconds, answers = {}, {}
        for way in (ours, plain):
            start = time.perf_counter()
            with redirect_stderr(io.StringIO()):
                answers[way] = way(folder, dtype, shots, limit)
            seconds[way] = time.perf_counter() - start
        both = answers[ours].merge(answers[plain], on=["task", "question"], suffixes=("", "_plain"))
        if not len(both) == len(answers[ours]) == len(answers[plain]):
            raise AssertionError(f"{len(answers[ours])} questions here, {len(answers[plain])} by HFLM")
        common = {
            "model": MODEL,
            "task": f"repetition {repeat}",
            "variant": f"{dtype}, {shots} shots",
            "n": len(both),
        }
        flips = int((both.choice != both.choice_plain).sum())
        rows += [
            records.row(**common, method="ours", metric="seconds", value=seconds[ours], unit="s"),
            records.row(**common, method="HFLM", metric="seconds", value=seconds[plain], unit="s"),
            records.row(**common, method="ours", metric="answers that differ", value=flips, unit="1"),
        ]
        click.echo(
            f"{dtype}, {shots} shots: {len(both)} questions, {seconds[ours]:.1f} s here, "
            f"{seconds[plain]:.1f} s by HFLM, {seconds[plain] / seconds[ours]:.2f} x, {flips} answers differ"
        )
    return rows


@click.command()
@click.option("--shots", multiple=True, type=int, default=(5, 15), show_default=True)
@click.option("--dtype", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--limit", default=4, show_default=True, help="Questions per task.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--profile", default="laptop", show_default=True, help="Whose records the rows belong to.")
def main(shots: tuple[int, ...], dtype: tuple[str, ...], limit: int, repeats: int, profile: str) -> None:
    """Compare seconds and answers on a laptop model."""
    study = Study(profiles.load(profile), MODEL)
    for name, count in product(dtype, shots):
        score = partial(measure, study.folder, name, count, limit, repeats)
        found = study.measurement(
            "bench-evaluation",
            {"dtype": name, "shots": count, "limit": limit, "repeats": repeats},
            lambda score=score: (score(), {}),
            on={"benchmark": file_digest(Path(__file__))},
            code=(evaluation.evaluate,),
        ).record()
        table = records.frame([found]).query("metric == 'seconds'")
        table = table.pivot_table(index="task", columns="method", values="value")
        click.echo(f"{name}, {count} shots: {(table.HFLM / table.ours).median():.2f} x as fast, median")


if __name__ == "__main__":
    main()
