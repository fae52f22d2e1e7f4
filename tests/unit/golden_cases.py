"""The golden vectors: NMI matrices and kept lists on seeded inputs, and how the inputs are made."""

import json
from pathlib import Path

import numpy as np

CASES = json.loads((Path(__file__).parent / "golden" / "official.json").read_text())
WEIGHTS = [case for case in CASES if case["kind"] != "matrix"]


def name(case):
    return f"{case['kind']}-{case['seed']}"


def round_to_bfloat16(array):
    """Round to nearest even by hand, on the bits of float32."""
    bits = array.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def weights(case):
    """Weights (experts, *shape) of a case, float32."""
    draw = np.random.default_rng(case["seed"])
    shape, experts = tuple(case["shape"]), case["experts"]
    W = draw.standard_normal((experts, *shape)) * 0.02
    if case["kind"] == "heavy":
        W = draw.standard_t(4, (experts, *shape)) * 0.02
    elif case["kind"] == "correlated":
        base = draw.standard_normal(shape) * 0.02
        mix = np.linspace(0, 0.9, experts)[:, None, None]
        W = mix * base + np.sqrt(1 - mix**2) * W
    elif case["kind"] == "scaled":
        W = W * np.linspace(0.5, 2, experts)[:, None, None]
    W = W.astype(np.float32)
    return round_to_bfloat16(W) if case["kind"] == "bfloat16" else W


def matrix(case):
    """R of a case: given for `matrix`, the golden NMI for the others."""
    if case["kind"] != "matrix":
        return np.array(case["nmi"])
    A = np.random.default_rng(case["seed"]).random((case["experts"],) * 2) * 0.01 + 0.02
    R = (A + A.T) / 2
    np.fill_diagonal(R, 0)
    return R
