"""Compare the logits of pruned GGUF files in llama.cpp with those of transformers (``make interop``).

``python tests/unit/llama_cpp_logits.py PYTHON``: PYTHON is an interpreter with llama-cpp-python.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_model, tokens
from tiny_gguf import write_gguf

from moeits.models.gguf import prune_gguf
from moeits.models.surgery import prune_model

KEPT = {0: [1, 4, 6], 1: [0, 2, 7], 2: [3, 4, 5]}
BOUNDS = {"F32": 1e-3, "Q8_0": 0.1}
"""Largest difference of the logits, as a share of their standard deviation."""
LLAMA_CPP = """
import json, sys
import numpy
from llama_cpp import Llama
file, out, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = Llama(model_path=file, n_ctx=64, logits_all=True, n_gpu_layers=0, verbose=False)
model.eval(ids)
numpy.save(out, numpy.array(model.scores[: len(ids)], dtype=numpy.float32))
"""


def difference(python, family, kind, folder):
    """Prune a small model as a GGUF file and in memory, and compare."""
    model = tiny_model(family, **({"mlp_only_layers": []} if family == "qwen2_moe" else {}))
    source = write_gguf(folder / f"{family}-{kind}.gguf", model, kind)
    target = prune_gguf(source, folder / f"{family}-{kind}-pruned.gguf", KEPT)
    ids = tokens(batch=1)
    with torch.no_grad():
        expected = prune_model(model, KEPT)(ids).logits[0].numpy()
    out = folder / "logits.npy"
    subprocess.run([python, "-c", LLAMA_CPP, target, out, json.dumps(ids[0].tolist())], check=True)
    return float(np.abs(np.load(out) - expected).max() / expected.std())


if __name__ == "__main__":
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for family in ("mixtral", "qwen2_moe"):
            for kind, bound in BOUNDS.items():
                found = difference(sys.argv[1], family, kind, Path(scratch))
                failed |= not found < bound
                print(
                    f"{family}, {kind}: largest difference {found:.2g} standard deviations, bound {bound:g}"
                )
    sys.exit(failed)
