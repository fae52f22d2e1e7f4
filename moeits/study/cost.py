"""What a model costs to keep and to run: memory, bytes, multiply-adds, tokens per second, energy.

Each variant is measured in a process of its own, so that none profits from what another left in memory:
``whole``; ``pruned``, with the experts cut out; ``zeroed``, with the same experts' weights set to zero, which
saves nothing that is stored or computed (section 6.1 of arXiv 2604.10603 makes the point for unstructured
pruning); and ``int8``, the whole model with its linear maps in eight bits. What other methods leave is timed
in two more: ``sparse``, the experts' matrices in compressed rows without their smallest weights, and
``low-rank``, each of them as the product of two thin ones.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import TYPE_CHECKING

import numpy as np

from moeits.study import energy, records

if TYPE_CHECKING:
    import torch

VARIANTS = ("whole", "pruned", "zeroed", "int8")
"""What the page on costs compares."""


def compare_costs(
    folder: Path | str,
    kept: Mapping[int, Sequence[int]],
    *,
    variants: Sequence[str] = VARIANTS,
    share: float = 0.5,
    prompt: int = 512,
    new: int = 16,
    repeats: int = 5,
    device: str = "cpu",
    dtype: str = "bfloat16",
) -> list[dict]:
    """Measure a model and its variants.

    Parameters
    ----------
    folder : path
        Checkpoint of the whole model.
    kept : mapping of int to sequence of int
        Experts that the pruned variant keeps.
    variants : sequence of str
        Of :data:`VARIANTS`, ``sparse`` and ``low-rank``.
    share : float
        Of the bytes of the experts in 16 bits that ``sparse`` and ``low-rank`` leave.
    prompt, new : int
        Tokens that are read at once, and tokens that are generated one after the other.
    repeats : int
        Repetitions; medians are reported, and the first pass is not counted.
    device, dtype : str
        Where and in what the model runs; ``int8`` computes in float32 where it does not in eight bits, and
        the products of ``sparse`` are in float32.

    Returns
    -------
    list of dict
        For each variant its name, ``file_bytes``, ``memory_bytes`` (resident memory after the passes, less
        that before the model was loaded), ``multiply_adds`` per token of the model as it was loaded,
        ``prefill`` and ``decode`` in tokens per second with their standard errors over the ``n`` repetitions
        (``prefill_stderr``, ``decode_stderr``),
        ``joules`` per generated token or None (see :mod:`moeits.study.energy`), and ``surgery``, the
        seconds in which the pruned variant's checkpoint was written, or None.

    Raises
    ------
    RuntimeError
        If a measurement fails, with what it printed.
    """
    from moeits.models.checkpoint import prune_checkpoint

    found = []
    with tempfile.TemporaryDirectory() as scratch:
        pruned = Path(scratch) / "pruned"
        start = time.perf_counter()
        if "pruned" in variants:
            prune_checkpoint(folder, pruned, kept)
        surgery = time.perf_counter() - start
        for variant in variants:
            job = {
                "folder": str(pruned if variant == "pruned" else folder),
                "variant": variant,
                "share": share,
                "kept": {str(layer): list(ids) for layer, ids in kept.items()},
                **{"prompt": prompt, "new": new, "repeats": repeats, "device": device, "dtype": dtype},
            }
            done = subprocess.run(
                [sys.executable, "-m", "moeits.study.cost"],
                input=json.dumps(job),
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "TQDM_DISABLE": "1"},
            )
            if done.returncode:
                raise RuntimeError(f"measuring {variant!r} failed:\n{done.stderr[-2000:]}")
            measured = json.loads(done.stdout.splitlines()[-1])
            measured["surgery"] = surgery if variant == "pruned" else None
            found.append({"variant": variant, **measured})
    return found


def multiply_adds(model: "torch.nn.Module") -> int:
    """Multiply-adds of all weight matrices for one token; those of attention over the context come on top.

    Every active parameter of a matrix is used once. The embedding is looked up, and counts only where it is
    also the output layer.
    """
    from moeits.models.families import sizes

    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return sizes(model).active - (0 if tied else model.get_input_embeddings().weight.numel())


def _measure(job: Mapping) -> dict:
    """Measure one variant in this process."""
    import torch

    from moeits.models.families import expert_block, moe_layers
    from moeits.models.folder import load_model

    folder, variant = Path(job["folder"]), job["variant"]
    dtype = torch.float32 if variant == "int8" else getattr(torch, job["dtype"])
    before_loading = _resident()
    model = load_model(folder, dtype=dtype, device=job["device"])
    products = multiply_adds(model)
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if variant == "zeroed":
        for layer in moe_layers(model):
            gone = sorted(set(range(layer.num_experts)) - set(job["kept"][str(layer.layer)]))
            for weights in expert_block(layer).values():
                weights[gone] = 0
    if variant == "int8":
        file_bytes = _to_int8(model)
    elif variant in ("sparse", "low-rank"):
        file_bytes -= _shrink_experts(model, _sparse if variant == "sparse" else _low_rank, job["share"])
    ids = torch.randint(3, model.config.vocab_size, (1, job["prompt"]), device=job["device"])
    prefill, decode, joules = [], [], []
    with torch.inference_mode():
        for _ in range(job["repeats"] + 1):
            start = time.perf_counter()
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            _wait(job["device"])
            middle, before = time.perf_counter(), energy.joules()
            for position in range(job["new"]):
                cache = model(
                    input_ids=ids[:, position : position + 1], past_key_values=cache
                ).past_key_values
            _wait(job["device"])
            end, after = time.perf_counter(), energy.joules()
            prefill.append(job["prompt"] / (middle - start))
            decode.append(job["new"] / (end - middle))
            if used := energy.spent(before, after):
                joules.append(sum(used.values()) / job["new"])

    prefill, decode, joules = prefill[1:], decode[1:], joules[1:]  # the first pass warms up
    on_device = torch.cuda.max_memory_allocated() if job["device"].startswith("cuda") else 0
    return {
        "file_bytes": file_bytes,
        "memory_bytes": on_device or max(_resident() - before_loading, 0),
        "multiply_adds": products,
        "prefill": median(prefill),
        "prefill_stderr": stdev(prefill) / len(prefill) ** 0.5,
        "decode": median(decode),
        "decode_stderr": stdev(decode) / len(decode) ** 0.5,
        "joules": median(joules) if joules else None,
        "n": len(prefill),
    }


def _resident() -> int:
    """Resident memory of this process now, in bytes; the largest so far where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return records.peak_memory()


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def _to_int8(model: "torch.nn.Module") -> int:
    """Put every linear map and expert in eight bits, in place; return the bytes that this takes to store."""
    import warnings

    import torch

    from moeits.models.families import moe_layers
    from moeits.models.unstack import ExpertList, replace_experts

    for layer in moe_layers(model):
        replace_experts(model, layer, ExpertList(layer).requires_grad_(False))
        layer.experts.to("meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    tensors = {}
    for name, value in model.state_dict().items():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                bits = 1 if tensor.dtype == torch.qint8 else 2  # the rest would be stored in bfloat16
                tensors[name, tensor.data_ptr() if not tensor.is_quantized else 0] = tensor.numel() * bits
    return sum(tensors.values())


def _shrink_experts(model: "torch.nn.Module", shrink: Callable, share: float) -> int:
    """Put every matrix of the experts in a smaller form, in place; return the bytes saved in a file."""
    from moeits.models.families import moe_layers
    from moeits.models.unstack import ExpertList, replace_experts

    saved = 0
    for layer in moe_layers(model):
        experts = ExpertList(layer).requires_grad_(False)
        for expert in experts.experts:
            for name, whole in list(expert.named_children()):
                form, numbers = shrink(whole.weight, share)
                setattr(expert, name, form)
                saved += int((whole.weight.numel() - numbers) * whole.weight.element_size())
        replace_experts(model, layer, experts)
        layer.experts.to("meta")
    return saved


def _sparse(weight: "torch.Tensor", share: float) -> "tuple[torch.nn.Module, float]":
    """Keep the largest weights of every row, in compressed rows; a mask of a bit per weight is counted."""
    import warnings

    import torch

    from moeits.study.methods.compression import BITS, sparse

    class Rows(torch.nn.Module):
        def __init__(self, rows: torch.Tensor) -> None:
            super().__init__()
            self.rows = rows

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.rows @ x.float().T).T.to(x.dtype)

    dense = weight.float().cpu().numpy()
    left = torch.from_numpy(sparse(dense, np.ones(dense.shape[1]), max(share - 1 / BITS, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices a beta
        rows = left.to(weight.device).to_sparse_csr()
    return Rows(rows), left.count_nonzero().item() + weight.numel() / BITS


def _low_rank(weight: "torch.Tensor", share: float) -> "tuple[torch.nn.Module, float]":
    """Write a matrix as the product of two, of the rank that leaves this share of its numbers."""
    import torch

    rows, columns = weight.shape
    rank = max(int(share * rows * columns / (rows + columns)), 1)
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    factors = right[:rank], left[:, :rank] * values[:rank]
    maps = [
        torch.nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta") for factor in factors
    ]
    for linear, factor in zip(maps, factors, strict=True):
        linear.weight = torch.nn.Parameter(factor.to(weight.dtype).contiguous(), requires_grad=False)
    return torch.nn.Sequential(*maps), rank * (rows + columns)


if __name__ == "__main__":
    print(json.dumps(_measure(json.load(sys.stdin))))
