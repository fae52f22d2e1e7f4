"""Where and in which number format to compute, with the reason."""

import os
import time
from typing import TYPE_CHECKING

from moeits.errors import MoeitsError

if TYPE_CHECKING:
    import torch


REACHED = 1 / 3
"""Share of a device's peak that scoring and training reach."""


def choose(device: str = "auto", dtype: str = "auto") -> "tuple[torch.device, torch.dtype, str]":
    """Resolve ``auto``.

    Parameters
    ----------
    device : str, default="auto"
        ``auto`` takes CUDA, else the CPU; anything else is a torch device. CUDA without a number is the
        first device, for one of several processes (``LOCAL_RANK``) its own.
    dtype : str, default="auto"
        ``auto`` takes bfloat16 where the device multiplies it in hardware, else float32.

    Returns
    -------
    device : torch.device
    dtype : torch.dtype
    reason : str
        Why, in one sentence.

    Raises
    ------
    MoeitsError
        If the device is not there, or torch knows no such device or dtype.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise MoeitsError(f"device {device!r} is none that torch knows: take auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise MoeitsError(f"device {device!r}: this machine has no CUDA device; use device auto or cpu")
    if chosen.type == "cuda" and chosen.index is None and (rank := os.environ.get("LOCAL_RANK")):
        chosen = torch.device("cuda", int(rank))
    if dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise MoeitsError(f"dtype {dtype!r} is none that torch knows: take bfloat16, float16 or float32")
        return chosen, getattr(torch, dtype), f"{dtype} was asked for"
    if chosen.type == "cuda":
        fast, what = (
            torch.cuda.is_bf16_supported(including_emulation=False),
            torch.cuda.get_device_name(chosen),
        )
    elif chosen.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast, what = (
            any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16")),
            "this processor",
        )
    else:
        fast, what = False, chosen.type
    number = torch.bfloat16 if fast else torch.float32
    return chosen, number, f"{what} {'multiplies' if fast else 'does not multiply'} bfloat16 in hardware"


def flops(device: "torch.device", dtype: "torch.dtype") -> float:
    """Measure the operations per second of a large matrix product on a device, in a type."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (matrix @ matrix).float().sum().item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
