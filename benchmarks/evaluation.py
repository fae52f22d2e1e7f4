"""Time the scoring of benchmark questions against lm-eval's plain HFLM: same model, dtype and questions.

``python benchmarks/evaluation.py`` takes about a quarter of an hour on two cores, after the model is made.
"""

import io
import time
from contextlib import redirect_stderr
from pathlib import Path

import click
import pandas as pd
import torch
from lm_eval.evaluator import evaluate as run
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import AutoTokenizer

from moeits import evaluation, profiles, records
from moeits.paths import DATA, ROOT
from moeits.pipeline import Study
from moeits.surgery import load_model

MODEL = "smol-qwen"
BATCH_SIZE = 8


def plain(model: torch.nn.Module, tokenizer: object, name: str, shots: int, limit: int) -> pd.DataFrame:
    """Likeliest choice of every question of one task as HFLM finds it."""
    task = evaluation.load_task(name, shots=shots)
    samples = {name: evaluation.sample_questions(name, len(task.eval_docs), limit, 0)}
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
    results = run(lm=lm, task_dict={name: task}, samples=samples, bootstrap_iters=0)
    return pd.DataFrame(
        {"question": sample["doc_id"], "choice": max(range(len(values)), key=values.__getitem__)}
        for sample in results["samples"][name]
        for values in [[value for value, _ in sample["filtered_resps"]]]
    )


def measure(folder: Path, settings: list[tuple[str, int]], limit: int) -> list[dict]:
    """Score the same questions both ways, task by task in turn.

    Parameters
    ----------
    folder : Path
        Folder of the model.
    settings : list of (str, int)
        Dtypes and shots.
    limit : int
        Questions of each task.

    Returns
    -------
    list of dict
        Tidy rows (see :func:`moeits.records.row`): seconds of both ways, and answers that differ.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    bar = tqdm([(*setting, task) for setting in settings for task in evaluation.TASKS], "scoring")
    for dtype, shots, task in bar:
        bar.set_postfix_str(f"{dtype}, {shots} shots, {task}")
        model = load_model(folder, dtype=getattr(torch, dtype))
        start = time.perf_counter()
        ours = evaluation.evaluate(model, tokenizer, [task], shots=shots, limit=limit, batch_size=BATCH_SIZE)
        middle = time.perf_counter()
        with redirect_stderr(io.StringIO()):
            theirs = plain(model, tokenizer, task, shots, limit)
        end = time.perf_counter()
        both = ours.merge(theirs, on="question", suffixes=("", "_plain"))
        if not len(both) == len(ours) == len(theirs):
            raise AssertionError(f"{task}: {len(ours)} questions here, {len(theirs)} by HFLM")
        common = {"model": MODEL, "task": task, "variant": f"{dtype}, {shots} shots", "n": len(both)}
        flips = int((both.choice != both.choice_plain).sum())
        rows += [
            records.row(**common, method="ours", metric="seconds", value=middle - start, unit="s"),
            records.row(**common, method="HFLM", metric="seconds", value=end - middle, unit="s"),
            records.row(**common, method="ours", metric="answers that differ", value=flips, unit="1"),
        ]
    return rows


@click.command()
@click.option("--shots", multiple=True, type=int, default=(5, 15), show_default=True)
@click.option("--dtype", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--limit", default=4, show_default=True, help="Questions per task.")
@click.option("--profile", default="laptop", show_default=True, help="Whose records the rows belong to.")
def main(shots: tuple[int, ...], dtype: tuple[str, ...], limit: int, profile: str) -> None:
    """Compare seconds and answers on a laptop model."""
    study = Study(profiles.load(profile), MODEL)
    settings = [(name, count) for name in dtype for count in shots]
    inputs = {
        "fingerprint": study.fingerprint,
        "settings": settings,
        "limit": limit,
        "source": records.source_digest(("evaluation", "shared_prefix")),
        "benchmark": records.file_digest(ROOT / "benchmarks" / "evaluation.py"),
        "lock": records.lock_digest(),
    }
    record = records.remember(
        DATA / "results" / profile,
        "bench-evaluation",
        inputs,
        lambda: (measure(study.folder, settings, limit), {}),
    )
    found = records.frame([record])
    for variant, part in found.groupby("variant", sort=False):
        seconds = part[part.metric == "seconds"].groupby("method").value.sum()
        asked = int(part[part.metric == "answers that differ"].n.sum())
        flips = int(part[part.metric == "answers that differ"].value.sum())
        click.echo(
            f"{variant}: {asked} questions, {seconds['ours']:.1f} s here, {seconds['HFLM']:.1f} s by HFLM, "
            f"{seconds['HFLM'] / seconds['ours']:.2f} x, {flips} answers differ"
        )


if __name__ == "__main__":
    main()
