"""Time pruning a checkpoint file by file against copying the bytes that stay, on the same disk.

``python benchmarks/streaming.py`` writes a checkpoint with layers of Qwen1.5-MoE-A2.7B's shapes (1.1 GB each,
random weights), keeps half of the experts several times, and copies the result with ``cp`` as often, each
followed by ``sync``. Four layers need 13 GB of disk and a few minutes.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig

from moeits.kept import Kept
from moeits.models.checkpoint import prune_checkpoint
from moeits.models.folder import hollow_model

EXPERTS, KEPT = 60, 30


def write_checkpoint(folder: Path, layers: int) -> None:
    """Write a checkpoint with the family's own names of tensors, one file for each layer."""
    config = Qwen2MoeConfig(
        num_hidden_layers=layers,
        num_experts=EXPERTS,
        hidden_size=2048,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        vocab_size=32000,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
        architectures=["Qwen2MoeForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in hollow_model(config).state_dict().items():
        parts = name.split(".")
        file = f"model-{int(parts[2]) if parts[1] == 'layers' else layers:05d}.safetensors"
        if name.endswith("experts.gate_up_proj"):
            shapes = {
                f"{i}.{half}": (1408, 2048) for i in range(EXPERTS) for half in ("gate_proj", "up_proj")
            }
        elif name.endswith("experts.down_proj"):
            shapes = {f"{i}.down_proj": (2048, 1408) for i in range(EXPERTS)}
        else:
            files.setdefault(file, {})[name] = tensor.shape
            continue
        prefix = name.rpartition(".")[0]
        files.setdefault(file, {}).update({f"{prefix}.{key}.weight": shape for key, shape in shapes.items()})
    for file, shapes in files.items():
        tensors = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def timed(step: Callable[[], object], source: Path, target: Path) -> float:
    """Seconds that a step takes from `source` in the page cache until all that it wrote is on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    for file in source.iterdir():
        subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    step()
    subprocess.run(["sync"], check=True)
    return time.perf_counter() - start


@click.command()
@click.option("--layers", default=4, show_default=True, help="Layers of the checkpoint, 1.1 GB each.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--disk", type=click.Path(path_type=Path, exists=True), help="A folder on the disk to measure.")
def main(layers: int, repeats: int, disk: Path | None) -> None:
    """Compare pruning a checkpoint with copying what stays."""
    with tempfile.TemporaryDirectory(dir=disk) as scratch:
        source, pruned, copy = (Path(scratch) / name for name in ("source", "pruned", "copy"))
        source.mkdir()
        # In a process of its own, so that its memory does not count for the command's.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(source, layers))
        writer.start()
        writer.join()
        rng = np.random.default_rng(0)
        kept = {layer: sorted(rng.choice(EXPERTS, KEPT, replace=False).tolist()) for layer in range(layers)}
        choice = Path(scratch) / "kept.json"
        Kept(kept, dict.fromkeys(kept, EXPERTS)).write(choice)
        command = [sys.executable, "-m", "moeits", "prune", source, "--kept", choice, "-o", pruned]
        child = subprocess.Popen(command)
        *_, usage = os.wait4(child.pid, 0)
        peak = usage.ru_maxrss / 1024
        steps = {
            "prune": (lambda: prune_checkpoint(source, pruned, kept), source, pruned),
            "cp": (lambda: subprocess.run(["cp", "-r", pruned, copy], check=True), pruned, copy),
        }
        for step in steps.values():  # once without counting, which loads what they need
            timed(*step)
        pairs = [[timed(*step) for step in steps.values()] for _ in range(repeats)]
        times = dict(zip(steps, zip(*pairs, strict=True), strict=True))
        size = sum(file.stat().st_size for file in pruned.iterdir())
        for name, seconds in times.items():
            median = statistics.median(seconds)
            shown = ", ".join(f"{second:.2f}" for second in seconds)
            click.echo(f"{name:5} + sync: {median:6.2f} s, {size / median / 1e9:5.2f} GB/s   ({shown})")
        ratio = statistics.median(cp / prune for prune, cp in pairs)
        click.echo(f"peak memory of the command, its libraries included: {peak:,.0f} MiB")
        click.echo(
            f"pruning runs at {ratio:.0%} of the speed of cp (median of {repeats} pairs; {size / 1e9:.2f} GB)"
        )


if __name__ == "__main__":
    main()
