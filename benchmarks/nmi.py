"""Time the NMI on single layers of the paper's exact shapes, and fit how the time grows.

``python benchmarks/nmi.py`` takes about ten minutes on two cores, 8 GB of memory and 3 GB of disk;
``--quick`` does the same on small shapes. Every layer is written to disk as a checkpoint, then
measured by a process of its own, whose peak memory is reported. Ours, NumPy's way, scikit-learn's
and the machine's limit take turns on the same weights; medians are reported.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click
import joblib
import numba
import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import mutual_info_score
from tqdm import tqdm
from transformers import CONFIG_MAPPING

from moeits.histograms import discretise
from moeits.machine.keys import file_digest
from moeits.machine.paths import DATA
from moeits.models.checkpoint import ExpertBlock, Projection, expert_blocks
from moeits.nmi import nmi, nmi_matrix, projection_nmi
from moeits.study import records
from moeits.study.measurement import Measurement
from moeits.study.standin import heavy_tailed


@dataclass(frozen=True)
class Layer:
    """One Mixture-of-Experts layer of a model, as its configuration describes it.

    Attributes
    ----------
    model, family : str
        Its name, and its ``model_type``.
    experts, neurons, width : int
        Experts E, hidden neurons m of each, width d of the residual stream.
    layers : int
        Such layers in the model.
    names : str
        How an expert's tensors are called, and its three projections behind a colon.
    """

    model: str
    family: str
    experts: int
    neurons: int
    width: int
    layers: int
    names: str

    def write(self, folder: Path, *, heavy: bool, seed: int = 0) -> None:
        """Write a checkpoint with this one layer of random bfloat16 weights."""
        sizes = {"hidden_size": self.width, "intermediate_size": self.neurons, "num_hidden_layers": 1}
        experts = dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), self.experts)
        config = CONFIG_MAPPING[self.family](
            **sizes,
            **experts,
            num_experts_per_tok=2,
            moe_intermediate_size=self.neurons,
            first_k_dense_replace=0,
        )
        config.save_pretrained(folder)
        generator = torch.Generator().manual_seed(seed)
        name, _, projections = self.names.partition(":")
        shapes = [(self.neurons, self.width)] * 2 + [(self.width, self.neurons)]
        tensors = {
            name.format(expert=expert, projection=projection): random_weights(shape, heavy, generator)
            for expert in range(self.experts)
            for projection, shape in zip(projections.split(), shapes, strict=True)
        }
        save_file(tensors, folder / "model.safetensors")


FINE_GRAINED = "model.layers.0.mlp.experts.{expert}.{projection}.weight:gate_proj up_proj down_proj"
LAYERS = [
    Layer("Qwen1.5-MoE", "qwen2_moe", 60, 1408, 2048, 24, FINE_GRAINED),
    Layer("DeepSeek-V2-Lite", "deepseek_v2", 64, 1408, 2048, 26, FINE_GRAINED),
    Layer(
        "Mixtral 8x7B",
        "mixtral",
        8,
        14336,
        4096,
        32,
        "model.layers.0.block_sparse_moe.experts.{expert}.{projection}.weight:w1 w3 w2",
    ),
]
QUICK = [Layer("small", "qwen2_moe", 6, 96, 128, 24, FINE_GRAINED)]
KINDS = {"normal": False, "heavy-tailed": True}


def random_weights(shape: tuple[int, ...], heavy: bool, generator: torch.Generator) -> torch.Tensor:
    """Independent weights: normal, or Student's t with 4 degrees of freedom and outliers at 50 sigma."""
    if heavy:
        weights = heavy_tailed(shape, generator, scale=1)
        outliers = torch.randint(weights.numel(), (max(weights.numel() >> 20, 2),), generator=generator)
        weights.view(-1)[outliers] = 50 * weights.std() * weights.view(-1)[outliers].sign()
    else:
        weights = torch.randn(shape, generator=generator)
    return (0.02 * weights).bfloat16()


def numpy_nmi(x: np.ndarray, y: np.ndarray) -> float:
    """NMI of a pair the straightforward way: NumPy's edges, histograms and two-dimensional histogram."""
    edges = [np.histogram_bin_edges(v, bins="auto") for v in (x, y)]
    counts = [np.histogram(v, e)[0] for v, e in zip((x, y), edges, strict=True)]
    counts.append(np.histogram2d(x, y, bins=edges)[0].ravel())
    probabilities = [c[c > 0] / x.size for c in counts]
    hx, hy, hxy = (float(-(p * np.log(p)).sum()) for p in probabilities)
    return (hx + hy - hxy) / math.sqrt(hx * hy)


@numba.njit(nogil=True, cache=True)
def limit(x, y, columns, table, counts, xlogx, size):
    """Do what one pair costs at the least: an increment for each of `size` elements, and the sum.

    `x` and `y` are few codes, read again and again out of the cache; `counts` is the true joint histogram.
    """
    done = 0
    while done < size:
        for n in range(min(x.size, size - done)):
            table[np.uint64(x[n]) * np.uint64(columns) + np.uint64(y[n])] += np.uint32(1)
        done += x.size
    total = 0.0
    for count in counts:
        if count > 0:
            total += xlogx[count] if count < xlogx.size else count * math.log(count)
    return total


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def limit_seconds(weights: torch.Tensor, threads: int) -> float:
    """Seconds per pair of the machine's own limit, with as many threads."""
    a, b = discretise(weights[0]), discretise(weights[1])
    columns = b.counts.size
    cells = a.codes.astype(np.int64) * columns + b.codes
    counts = np.bincount(cells, minlength=a.counts.size * columns).astype(np.uint32)
    xlogx = np.arange(4096) * np.log(np.maximum(np.arange(4096), 1))
    few = slice(8192)
    x, y = a.codes[few].copy(), b.codes[few].copy()

    def work(table: np.ndarray) -> None:
        for _ in range(4):
            limit(x, y, columns, table, counts, xlogx, a.codes.size)

    tables = [np.zeros_like(counts) for _ in range(threads)]
    limit(x, y, columns, tables[0], counts, xlogx, 1)
    with ThreadPoolExecutor(threads) as pool:
        return seconds(lambda: list(pool.map(work, tables)), 3) / (4 * threads)


def read_layer(block: ExpertBlock, buffers: list[np.ndarray]) -> None:
    """Read every matrix of a layer, by as many threads as there are buffers, each into its own."""

    def read(part: int, matrices: Projection) -> None:
        for expert in range(part, len(matrices), len(buffers)):
            np.copyto(buffers[part], bits(matrices[expert]))

    with ThreadPoolExecutor(len(buffers)) as pool:
        for matrices in block.values():
            list(pool.map(read, range(len(buffers)), [matrices] * len(buffers)))


def bits(matrix: torch.Tensor) -> np.ndarray:
    """Weights in bfloat16 as a flat array of their bit patterns."""
    return matrix.view(torch.int16).numpy().reshape(-1)


def measure_layer(folder: Path, pairs: int, repeats: int = 3) -> dict[str, float]:
    """Measure the layer in a folder, in this process: times in seconds, memory in bytes."""
    [(_, block)] = expert_blocks(folder)
    warm = {dtype: torch.randn((2, 4, 64)).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    for weights in warm.values():
        projection_nmi(weights)  # compiles
    threads = joblib.cpu_count()
    read, measured, busy = [], [], []
    against = {"numpy": [], "scikit-learn": [], "limit": []}
    for repeat in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        nmi_matrix(block)
        measured.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
        if repeat == 0:
            weights = block["down"]
            peak = records.peak_memory()
            buffers = [np.zeros_like(bits(weights[0])) for _ in range(threads)]
        start = time.perf_counter()
        read_layer(block, buffers)
        read.append(time.perf_counter() - start)
        # Alternating, so that what else the machine does falls on all alike.
        against["limit"].append(limit_seconds(weights, threads))
        for pair in range(pairs):
            x, y = (weights[expert].float().numpy().reshape(-1) for expert in (pair, pair + 1))
            start = time.perf_counter()
            expected = numpy_nmi(x, y)
            against["numpy"].append(time.perf_counter() - start)
            found = nmi(weights[pair], weights[pair + 1])
            if not math.isclose(found, expected, abs_tol=1e-9):
                raise AssertionError(f"{found} here, {expected} by NumPy")
            codes = [discretise(v).codes for v in (x, y)]
            against["scikit-learn"].append(seconds(lambda codes=codes: mutual_info_score(*codes)))
    count = block.num_experts * (block.num_experts - 1) // 2 * len(block)
    sizes = [discretise(expert).counts.size for expert in weights]
    discretising = seconds(lambda: [discretise(expert) for expert in weights], 3) / len(weights)
    return {
        "layer": float(np.median(measured)),
        "reading": float(np.median(read)),
        "ours": float(np.median(measured)) / count,
        "processor": float(np.median(busy)) / count,
        "discretising": discretising,
        "bytes": folder.joinpath("model.safetensors").stat().st_size,
        "peak": peak,
        "pairs": count,
        "bins": float(np.median(sizes)),
        **{name: float(np.median(times)) for name, times in against.items()},
    }


def layer_rows(layer: Layer, kind: str, found: dict[str, float]) -> Iterator[dict]:
    """Turn the measurements of a layer into tidy rows."""
    for method in ("ours", "numpy", "scikit-learn", "limit"):
        yield row(layer.model, method, "time per pair", kind, found[method], "s")
    yield row(layer.model, "ours", "processor time per pair", kind, found["processor"], "s")
    yield row(
        layer.model, "ours", "time per matrix to discretise, one thread", kind, found["discretising"], "s"
    )
    yield row(layer.model, "ours", "occupied bins", kind, found["bins"], "1")
    yield row(layer.model, "ours", "time per layer", kind, found["layer"], "s")
    yield row(layer.model, "ours", "time to read a layer", kind, found["reading"], "s")
    yield row(layer.model, "ours", "reading speed", kind, found["bytes"] / found["reading"], "B/s")
    yield row(layer.model, "ours", "peak memory", kind, found["peak"], "B")
    whole = layer.layers * found["layer"]
    yield row(layer.model, "ours", "projected time of the model", kind, whole, "s", layer.layers)


def scaling_rows(quick: bool) -> Iterator[dict]:
    """Time against experts, elements and bins, and the exponents of power laws fitted to it."""
    small, step = (10, 1) if quick else (21, 2)
    scales = {
        "experts": ([8, 16, 32, 64], lambda e: (e, 1 << small, 512)),
        "elements": ([1 << k for k in range(small, small + 5)], lambda n: (8, n, 512)),
        "bins": ([1 << k for k in range(5, 12, step)], lambda b: (8, 1 << small, b)),
    }
    generator = torch.Generator().manual_seed(0)
    projection_nmi(random_weights((2, 4096), False, generator))  # compiles
    for name, (values, settings) in scales.items():
        times = []
        for value in tqdm(values, name):
            experts, size, bins = settings(value)
            weights = random_weights((experts, size), False, generator)
            times.append(seconds(lambda w=weights, b=bins: projection_nmi(w, bins=b), 2 if quick else 5))
            yield row("scaling", "ours", f"time against {name}", str(value), times[-1], "s")
        (exponent, _), covariance = np.polyfit(np.log(values), np.log(times), 1, cov=True)
        error = float(math.sqrt(covariance[0, 0]))
        yield row("scaling", "ours", "exponent", name, float(exponent), "1", len(values), stderr=error)


def row(
    model: str, method: str, metric: str, variant: str, value: float, unit: str, n: int | None = None, **more
):
    """One tidy row of the records."""
    return records.row(
        model=model, method=method, metric=metric, variant=variant, value=value, unit=unit, n=n, **more
    )


def measure(quick: bool = False) -> list[dict]:
    """Measure every layer and the scaling.

    Parameters
    ----------
    quick : bool
        Small shapes, for tests.

    Returns
    -------
    list of dict
        Tidy rows (see :func:`moeits.study.records.row`).
    """
    rows = []
    layers = QUICK if quick else LAYERS
    bar = tqdm([(layer, kind) for layer in layers for kind in KINDS], "layers")
    for layer, kind in bar:
        bar.set_postfix_str(f"{layer.model}, {kind}")
        with tempfile.TemporaryDirectory() as folder:
            layer.write(Path(folder), heavy=KINDS[kind])
            if quick:
                found = measure_layer(Path(folder), repeats=1, pairs=1)
            else:
                # NumPy needs half a minute for one pair of Mixtral's.
                pairs = 1 if layer.neurons * layer.width > 1 << 24 else 3
                command = [sys.executable, __file__, "--measure", folder, "--pairs", str(pairs)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found = json.loads(done.stdout)
        rows += layer_rows(layer, kind, found)
    return [*rows, *scaling_rows(quick)]


def bars(rows: list[dict]) -> list[tuple[str, str, str]]:
    """Compare rows with what is promised: measure, bar, and what was measured."""
    found = {(r["model"], r["method"], r["metric"], r["variant"]): r["value"] for r in rows}
    table = []
    for model in dict.fromkeys(r["model"] for r in rows if r["model"] != "scaling"):
        for kind in KINDS:

            def get(metric: str, method: str = "ours", model: str = model, kind: str = kind) -> float:
                return found[model, method, metric, kind]

            ours = get("time per pair")
            minutes = {"DeepSeek-V2-Lite": 6, "Mixtral 8x7B": 6}.get(model, 5)
            share = get("time to read a layer") / get("time per layer")
            what = f"{model}, {kind}: "
            table += [
                (what + "against NumPy", "200 x faster", f"{get('time per pair', 'numpy') / ours:.0f} x"),
                (
                    what + "against scikit-learn",
                    "20 x faster",
                    f"{get('time per pair', 'scikit-learn') / ours:.0f} x",
                ),
                (
                    what + "against the machine's limit",
                    "within 2 x",
                    f"{ours / get('time per pair', 'limit'):.2f} x",
                ),
                (
                    what + "whole model",
                    f"{minutes} min",
                    f"{get('projected time of the model') / 60:.1f} min",
                ),
                (what + "peak memory", "5 GB", f"{get('peak memory') / 1e9:.2f} GB"),
                (what + "reading", "2 GB/s", f"{get('reading speed') / 1e9:.1f} GB/s"),
                (what + "reading against NMI", "10 %", f"{share:.1%}"),
            ]
        ratio = get("time per pair") / found[model, "ours", "time per pair", "normal"]
        table.append((f"{model}: heavy-tailed against normal", "at most 2 x", f"{ratio:.2f} x"))
    for r in rows:
        if r["metric"] == "exponent":
            table.append((f"exponent of {r['variant']}", "", f"{r['value']:.2f} ± {r['stderr']:.2f}"))
    return table


@click.command()
@click.option("--quick", is_flag=True, help="Small shapes: a check that the benchmark works.")
@click.option("--profile", default="laptop", show_default=True, help="Whose records the rows belong to.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the rows here, not as a record.")
@click.option("--measure", "folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--pairs", default=3, hidden=True)
def main(quick: bool, profile: str, output: Path | None, folder: Path | None, pairs: int) -> None:
    """Time the NMI on layers of the paper's exact shapes."""
    if folder is not None:
        click.echo(json.dumps(measure_layer(folder, pairs)))
        return
    if output is not None:
        rows = measure(quick)
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    else:
        rows = (
            Measurement(
                DATA / "results" / profile,
                "bench-nmi",
                {"quick": quick},
                lambda: (measure(quick), {}),
                built_on={"benchmark": file_digest(Path(__file__))},
                code=(nmi_matrix, expert_blocks),
            )
            .record()
            .rows
        )
    width = max(len(what) for what, _, _ in bars(rows))
    for what, bar, value in bars(rows):
        click.echo(f"{what:<{width}}  {bar:>12}  {value:>12}")


if __name__ == "__main__":
    main()
