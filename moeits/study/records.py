"""Results and their provenance: one immutable JSON file per measurement.

A record is named by the hash of its inputs: the settings, the fingerprints of the files it reads, the seed,
and the source of the modules that the step uses. A step that finds its record does nothing, a killed run
resumes, and the records of two machines can be compared.
"""

import hashlib
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd

from moeits.machine import energy
from moeits.machine.paths import ROOT, whole

SCHEMA = 1
LIBRARIES = ("moeits", "torch", "transformers", "lm-eval", "peft", "numpy", "numba", "datasets")
ROW_KEYS = {
    "model",
    "method",
    "tau",
    "kept_share",
    "task",
    "metric",
    "variant",
    "value",
    "stderr",
    "n",
    "unit",
}
OPTIONAL_KEYS = {"higher_is_better", "chance", "at_chance"}


def digest(inputs: object) -> str:
    """Hash of anything that JSON can write, the same on every machine.

    Parameters
    ----------
    inputs : object
        Nested mappings, sequences, strings, numbers, booleans and None. NaN is refused.

    Returns
    -------
    str
        The first 16 hexadecimal digits of the SHA-256 of the canonical JSON.
    """
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """Hash of the bytes of files, in the order given; their names do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return total.hexdigest()[:16]


def source_digest(modules: Iterable[str]) -> str:
    """Hash of the source of modules of this package, so that edited code never serves a stale result.

    Parameters
    ----------
    modules : iterable of str
        Names of modules below ``moeits``, such as ``"nmi"``.
    """
    here = Path(__file__).parents[1]
    return file_digest(*(here / f"{name}.py" for name in sorted(set(modules))))


def lock_digest() -> str:
    """Hash of the two lock files: the versions of everything that is installed."""
    return file_digest(ROOT / "requirements.lock", ROOT / "data.lock")


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes
    ----------
    step : str
        What was done, such as ``"scores"``.
    inputs : dict
        Everything that the result depends on; its hash is the record's `id`.
    rows : list of dict
        Tidy results: model, method, tau, kept_share, task, metric, variant, value, stderr, n, unit,
        higher_is_better.
    details : dict
        What does not fit a row: answers by question, kept experts by layer.
    provenance : dict
        Commit, versions, device, seconds (wall), peak_memory (bytes), joules by device where the machine
        counts them. No host names, no home paths.
    """

    step: str
    inputs: dict[str, Any]
    rows: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def id(self) -> str:
        """Hash of the step and its inputs."""
        return digest({"step": self.step, "inputs": self.inputs})

    @property
    def seconds(self) -> float:
        """Wall time of the measurement, in seconds."""
        return float(self.provenance.get("seconds", math.nan))


def _path(folder: Path, step: str, inputs: Mapping[str, Any]) -> Path:
    return Path(folder) / f"{step}-{digest({'step': step, 'inputs': inputs})}.json"


def read(path: Path) -> Record:
    """Read one record.

    Raises
    ------
    ValueError
        If the file is no record, has another schema, or was edited: its name must be the hash of its inputs.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        record = Record(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path.name} is not a record ({error}): delete it and run the step again"
        ) from error
    if record.schema != SCHEMA:
        raise ValueError(f"{path.name} has schema {record.schema}, this version reads schema {SCHEMA}")
    if path.stem != f"{record.step}-{record.id}":
        raise ValueError(
            f"{path.name} does not hold the inputs that its name stands for (they hash to {record.id}): "
            "records are never edited; delete it and run the step again"
        )
    return record


def write(folder: Path, record: Record) -> Path:
    """Write a record, whole or not at all, under the name of its inputs."""
    for row in record.rows:
        missing = ROW_KEYS - row.keys()
        if missing:
            raise ValueError(f"a row of step {record.step!r} lacks {sorted(missing)}: {row}")
    path = _path(folder, record.step, record.inputs)
    with whole(path) as part:
        part.write_text(json.dumps(asdict(record), sort_keys=True, separators=(",", ":")) + "\n")
    return path


def row(**values: Any) -> dict[str, Any]:
    """One tidy row; what does not apply is None."""
    unknown = values.keys() - ROW_KEYS - OPTIONAL_KEYS
    if unknown:
        raise ValueError(f"unknown columns {sorted(unknown)}: a row has {sorted(ROW_KEYS | OPTIONAL_KEYS)}")
    return dict.fromkeys(sorted(ROW_KEYS)) | values


def remember(
    folder: Path,
    step: str,
    inputs: Mapping[str, Any],
    measure: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> Record:
    """Read the record of a step, or measure and write it.

    Parameters
    ----------
    folder : Path
        The profile's folder of records.
    step : str
        Name of the step.
    inputs : mapping
        Everything the result depends on.
    measure : callable
        Returns ``(rows, details)``; called only when there is no record yet.
    provenance : mapping, optional
        Facts about the run beside those that are gathered here: device, dtype, batch size, seed.

    Returns
    -------
    Record
    """
    inputs = json.loads(json.dumps(inputs))
    path = _path(folder, step, inputs)
    if path.exists():
        return read(path)
    start, before = time.perf_counter(), energy.joules()
    rows, details = measure()
    seconds, used = time.perf_counter() - start, energy.spent(before, energy.joules())
    cost = {"seconds": round(seconds, 3), "peak_memory": peak_memory(), **({"joules": used} if used else {})}
    facts = environment() | dict(provenance or {}) | cost
    record = Record(step=step, inputs=inputs, rows=rows, details=details, provenance=facts)
    write(folder, record)
    return read(path)


def load(folder: Path, step: str | None = None) -> list[Record]:
    """All records of a folder, sorted by name.

    Parameters
    ----------
    folder : Path
        Folder of records; one that does not exist holds none.
    step : str, optional
        Only this step's.
    """
    return [read(path) for path in sorted(Path(folder).glob(f"{step or '*'}-*.json"))]


def exists(folder: Path, step: str, inputs: Mapping[str, Any]) -> bool:
    """Say whether there is a record of a step with these inputs, as :func:`remember` takes them."""
    return _path(folder, step, json.loads(json.dumps(inputs))).exists()


def latest(step: str, *folders: Path) -> Record:
    """Newest record of a step in the first of some folders that has one.

    Parameters
    ----------
    step : str
        Name of the step.
    *folders : Path
        Folders of records.

    Raises
    ------
    FileNotFoundError
        If none has one.
    """
    for folder in folders:
        if paths := list(Path(folder).glob(f"{step}-*.json")):
            return read(max(paths, key=lambda path: path.stat().st_mtime))
    raise FileNotFoundError(f"there is no record of the step {step!r}: measure it first (see `make help`)")


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """Tabulate the rows of records; each row names its record and step."""
    rows = [{"record": record.id, "step": record.step} | row for record in records for row in record.rows]
    return pd.DataFrame(rows)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    # The other counter starts from the size of the process that started this one.
    with suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Commit, versions and machine type of this run, without host names or home paths."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "lock": lock_digest(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
