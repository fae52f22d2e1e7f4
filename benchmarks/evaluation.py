"""Time the scoring of benchmark questions against lm-eval's plain HFLM: same model, dtype and questions.

``python benchmarks/evaluation.py FOLDER`` takes about ten minutes on two cores.
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
from transformers import AutoTokenizer

from moeits import evaluation
from moeits.surgery import load_model


def plain(model: torch.nn.Module, tokenizer: object, shots: int, limit: int, batch_size: int) -> pd.DataFrame:
    """Likeliest choice of every question as HFLM finds it."""
    tasks = {name: evaluation.load_task(name, shots=shots) for name in evaluation.TASKS}
    samples = {
        name: evaluation.sample_questions(name, len(task.eval_docs), limit, 0) for name, task in tasks.items()
    }
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
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


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--shots", multiple=True, type=int, default=(5, 15), show_default=True)
@click.option("--limit", default=8, show_default=True, help="Questions per task.")
@click.option("--dtype", multiple=True, default=("float32", "bfloat16"), show_default=True)
@click.option("--batch-size", default=8, show_default=True)
def main(folder: Path, shots: tuple[int, ...], limit: int, dtype: tuple[str, ...], batch_size: int) -> None:
    """Compare seconds and choices on the model in FOLDER."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in dtype:
        model = load_model(folder, dtype=getattr(torch, name))
        for count in shots:
            start = time.perf_counter()
            ours = evaluation.evaluate(
                model, tokenizer, list(evaluation.TASKS), shots=count, limit=limit, batch_size=batch_size
            )
            middle = time.perf_counter()
            with redirect_stderr(io.StringIO()):
                theirs = plain(model, tokenizer, count, limit, batch_size)
            end = time.perf_counter()
            both = ours.merge(theirs, on=["task", "question"], suffixes=("", "_plain"))
            flips = int((both.choice != both.choice_plain).sum())
            click.echo(
                f"{name}, {count} shots: {len(both)} questions, {middle - start:.1f} s here, "
                f"{end - middle:.1f} s by HFLM, {(end - middle) / (middle - start):.2f} x, {flips} differ"
            )


if __name__ == "__main__":
    main()
