"""Take the whole chain through stand-ins of the paper's models at full width, and time each step.

``python benchmarks/standins.py`` takes two layers of each model, one model after the other.
"""

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click

from moeits.machine.keys import file_digest
from moeits.machine.paths import DATA
from moeits.study import paper, records
from moeits.study.measurement import Measurement
from moeits.study.standin import names

SAVING = {"standin": "whole", "prune": "pruned", "heal": "healed"}  # step -> the folder that it writes
RECIPE = ["steps=1", "batch_size=1", "accumulation=1", "max_tokens=64", "rank=8"]


def run(*arguments: object) -> tuple[float, float]:
    """Seconds and peak memory (GB) of a command of the package, which must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "moeits", *map(str, arguments)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"`moeits {' '.join(map(str, arguments))}` failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


def measure(name: str, layers: int, shrink: int, disk: Path | None) -> list[dict]:
    """Take a stand-in through the chain; return tidy rows (see :func:`moeits.study.records.row`)."""
    rows = []
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        at = Path(scratch)
        recipe = [part for setting in RECIPE for part in ("-s", setting)]
        steps = {
            "standin": (name, "-o", at / "whole", "--layers", layers, "--shrink", shrink),
            "nmi": (at / "whole", "-o", at / "nmi.npz"),
            "select": (at / "nmi.npz", "--share", 0.5, "-o", at / "kept.json"),
            "prune": (at / "whole", "--kept", at / "kept.json", "-o", at / "pruned"),
            "heal": (at / "pruned", "-o", at / "healed", *recipe),
            "evaluate": (at / "healed", "--tasks", "arc_easy", "--limit", 2),
            "size": (at / "healed",),
        }
        for step, arguments in steps.items():
            seconds, memory = run(step, *arguments)
            common = {"model": name, "task": step, "n": layers}
            rows += [
                records.row(**common, metric="seconds", value=seconds, unit="s"),
                records.row(**common, metric="peak memory", value=memory, unit="GB"),
            ]
            click.echo(f"{name:18} {step:10} {seconds:8.1f} s {memory:8.1f} GB")
            if step in SAVING:
                written = sum(file.stat().st_size for file in (at / SAVING[step]).iterdir())
                rows.append(records.row(**common, metric="files", value=written / 1e9, unit="GB"))
    return rows


@click.command()
@click.argument("models", nargs=-1)
@click.option("--layers", default=2, show_default=True)
@click.option("--shrink", default=1, show_default=True, help="Divisor of the widths; 1 is full width.")
@click.option("--disk", type=click.Path(path_type=Path, exists=True), help="Where to put the folders.")
@click.option("--profile", default="laptop", show_default=True, help="Whose records the rows belong to.")
def main(models: tuple[str, ...], layers: int, shrink: int, disk: Path | None, profile: str) -> None:
    """Make, measure, prune, heal, score and load stand-ins for MODELS (all three by default)."""
    folder = DATA / "results" / profile
    for name in models or [name for name, of in names().items() if of in paper.models()]:
        take = partial(measure, name, layers, shrink, disk)
        measurement = Measurement(
            folder,
            "bench-standins",
            {"model": name, "layers": layers, "shrink": shrink},
            lambda take=take: (take(), {}),
            built_on={"benchmark": file_digest(Path(__file__))},
        )
        measurement.record()
        click.echo(measurement.path)


if __name__ == "__main__":
    main()
