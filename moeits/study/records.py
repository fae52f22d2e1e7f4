"""Results and their provenance: one immutable JSON file per measurement.

What was asked is a record's identity: the step, its settings and the digests of the files that it reads. How
it was answered is provenance: the code, versions, machine. A file is named by both, so that a record is found
on another machine or for another version by what was asked, and a measurement is not taken for current where
the code behind it has changed (see :mod:`moeits.study.measurement`).
"""

import json
import math
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from moeits.errors import MissingError, MoeitsError
from moeits.machine.keys import digest, file_digest, versions
from moeits.machine.paths import DATA, ROOT, whole

SCHEMA = 2
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

MADE_BY = ("code", "versions", "built_on")
"""Parts of the provenance that a result depends on: the hash of the code that was reached, the versions of
what computes, and what was built before from the same inputs, such as a model's weights or its healing."""


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
        Everything that was asked: settings and digests of files.
    rows : list of dict
        Tidy results: model, method, tau, kept_share, task, metric, variant, value, stderr, n, unit,
        higher_is_better.
    details : dict
        What does not fit a row: answers by question, kept experts by layer.
    provenance : dict
        What made it (:data:`MADE_BY`), when (measured, UTC), commit, device, seconds (wall), peak_memory
        (bytes), joules by device where the machine counts them. No host names, no home paths.
    """

    step: str
    inputs: dict[str, Any]
    rows: list[dict[str, Any]]
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def identity(self) -> str:
        """Hash of what was asked."""
        return identity(self.step, self.inputs)

    @property
    def id(self) -> str:
        """Hash of what was asked, and a shorter one of what made the answer."""
        return f"{self.identity}-{maker(self.provenance)}"

    @property
    def age(self) -> tuple[str, str]:
        """Sorts records by when they were measured; those that do not say so come first."""
        return self.provenance.get("measured", ""), self.id

    @property
    def seconds(self) -> float:
        """Wall time of the measurement, in seconds."""
        return float(self.provenance.get("seconds", math.nan))


def identity(step: str, inputs: Mapping[str, Any]) -> str:
    """Hash of what is asked: 16 hexadecimal digits, the same for 16 and 16.0."""
    return digest({"step": step, "inputs": _canonical(inputs)})


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _canonical(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def maker(provenance: Mapping[str, Any]) -> str:
    """Hash of what makes an answer: 8 hexadecimal digits."""
    return digest({name: provenance.get(name) for name in MADE_BY})[:8]


def read(path: Path) -> Record:
    """Read one record.

    Raises
    ------
    MoeitsError
        If the file is no record, has another schema, or was edited: its name must be the hash of its identity
        and of what made it.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        record = Record(**content)
    except (json.JSONDecodeError, TypeError) as error:
        raise MoeitsError(
            f"{path.name} is not a record ({error}): delete it and run the step again"
        ) from error
    if record.schema != SCHEMA:
        raise MoeitsError(f"{path.name} has schema {record.schema}, this version reads schema {SCHEMA}")
    if path.stem != f"{record.step}-{record.id}":
        raise MoeitsError(
            f"{path.name} does not hold what its name stands for (that is {record.id}): "
            "records are never edited; delete it and run the step again"
        )
    return record


def write(folder: Path, record: Record) -> Path:
    """Write a record, whole or not at all; where it is there already, that one stays."""
    for row in record.rows:
        missing = ROW_KEYS - row.keys()
        if missing:
            raise MoeitsError(f"a row of step {record.step!r} lacks {sorted(missing)}: {row}")
    path = Path(folder) / f"{record.step}-{record.id}.json"
    with whole(path, once=True) as part:
        part.write_text(json.dumps(asdict(record), sort_keys=True, separators=(",", ":")) + "\n")
    return path


def row(**values: Any) -> dict[str, Any]:
    """One tidy row; what does not apply is None."""
    unknown = values.keys() - ROW_KEYS - OPTIONAL_KEYS
    if unknown:
        raise MoeitsError(f"unknown columns {sorted(unknown)}: a row has {sorted(ROW_KEYS | OPTIONAL_KEYS)}")
    return dict.fromkeys(sorted(ROW_KEYS)) | values


def load(folder: Path, step: str | None = None) -> list[Record]:
    """All records of a folder, sorted by name.

    Parameters
    ----------
    folder : Path
        Folder of records; one that does not exist holds none.
    step : str, optional
        Only this step's.
    """
    return [read(path) for path in _files(folder, step or "*")]


def find(folder: Path, step: str, inputs: Mapping[str, Any]) -> list[Record]:
    """Find the records that answer a question, whatever made them; the newest comes last."""
    found = [read(path) for path in _files(folder, step, identity(step, inputs))]
    return sorted(found, key=lambda record: record.age)


PREVIEW = "MOEITS_PREVIEW"
"""Environment variable that says that nothing is measured: what is committed is shown."""


def in_preview() -> bool:
    """Whether :data:`PREVIEW` is set."""
    return bool(os.environ.get(PREVIEW))


def committed(profile: str) -> Path:
    """Folder of a profile's committed records."""
    return DATA / "reference" / profile


PLACES = ("study/*/", "reference/*/", "results/*/")
"""Folders of records, below ``data``."""


def locate(record: str, folder: Path = DATA) -> Path | None:
    """Find the file of a record by its id, in a folder or in its :data:`PLACES`."""
    # What was measured here, in results, goes before the copy in reference. Elsewhere others may be writing.
    found = (path for place in ("", *PLACES) for path in Path(folder).glob(f"{place}*-{record}.json"))
    return max(found, default=None)


def _files(folder: Path, step: str, asked: str = "?" * 16) -> list[Path]:
    return sorted(Path(folder).glob(f"{step}-{asked}-{'?' * 8}.json"))


def latest(step: str, *folders: Path) -> Record:
    """Newest record of a step in the first of some folders that has one, by what the records say.

    Raises
    ------
    MissingError
        If none has one.
    """
    for folder in folders:
        if found := load(folder, step):
            return max(found, key=lambda record: record.age)
    raise MissingError(f"there is no record of the step {step!r}: measure it first (see `make help`)")


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
    """Time, commit, versions and machine type of this run, without host names or home paths."""
    return {
        "measured": datetime.now(UTC).isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "lock": lock_digest(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "moeits": version("moeits"),
        "versions": versions(),
    }
