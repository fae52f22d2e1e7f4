"""Energy of processors and GPUs in joules, by their own counters: RAPL and NVML, where the machine has them.

A counter covers everything that runs on its device, so that it gives an upper estimate for one program.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_RAPL = Path("/sys/class/powercap")


def joules() -> dict[str, float]:
    """Read the counters.

    Returns
    -------
    dict of str to float
        Joules since some moment, of ``processors`` and ``GPUs``; what offers no counter is left out.
    """
    found = {"processors": _processors(), "GPUs": _gpus()}
    return {name: value for name, value in found.items() if value is not None}


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float] | None:
    """Joules between two readings by device; None where there is no counter, or one began anew."""
    found = {name: after[name] - value for name, value in before.items() if name in after}
    return found if found and min(found.values()) >= 0 else None


def _processors() -> float | None:
    try:
        counters = [
            path / "energy_uj" for path in _RAPL.glob("intel-rapl:[0-9]*") if path.name.count(":") == 1
        ]
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except OSError:  # readable by root alone
        return None


def _gpus() -> float | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver
        return None
    try:
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, devices)) / 1e3 if devices else None
    except pynvml.NVMLError:  # a GPU without a counter
        return None
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
