"""A measurement that is taken once: found while code, versions and weights are the same, or taken."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moeits.errors import MissingError
from moeits.machine.keys import by_value, code_digest, versions
from moeits.machine.paths import check_writable
from moeits.study import energy, records
from moeits.study.records import Record


@dataclass(frozen=True)
class Measurement:
    """A question and how to answer it.

    Attributes
    ----------
    folder : Path
        Folder of records.
    step : str
        Name of the step.
    inputs : mapping
        What is asked, as JSON can write it: settings and digests of files.
    measure : callable
        Answers: returns rows and details. The code that it reaches is part of the key.
    built_on : mapping, default={}
        What the answer depends on beside, as JSON can write it: a model's weights, keys of measurements.
    code : sequence of callable, default=()
        Functions that `measure` calls without naming them.
    provenance : mapping, default={}
        Facts about the run that are kept with the answer: device, dtype, batch size, seed.
    """

    folder: Path
    step: str
    inputs: Mapping[str, Any]
    measure: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]]
    built_on: Mapping[str, Any] = field(default_factory=dict)
    code: tuple[Callable, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Hash of what is asked."""
        return records.identity(self.step, self.inputs)

    @cached_property
    def made_by(self) -> dict[str, Any]:
        """What the answer depends on beside the question."""
        code = code_digest(self.measure, *self.code)
        return {"code": code, "versions": versions(), "built_on": dict(self.built_on)}

    @property
    @by_value
    def key(self) -> str:
        """Hash of the question and of all that the answer depends on."""
        return f"{self.identity}-{records.maker(self.made_by)}"

    @property
    def path(self) -> Path:
        """File of its record."""
        return Path(self.folder) / f"{self.step}-{self.key}.json"

    def exists(self) -> bool:
        """Whether it was taken before; in a preview, whether a committed record answers it."""
        return bool(self._committed()) if records.in_preview() else self.path.exists()

    def _committed(self) -> list[Record]:
        return records.find(records.committed(Path(self.folder).name), self.step, self.inputs)

    def record(self) -> Record:
        """Find its record, or take it; in a preview, find the committed one.

        Raises
        ------
        MissingError
            If nothing is measured, in a preview, and there is no committed record.
        """
        if records.in_preview():
            if not (answers := self._committed()):
                raise MissingError(
                    f"no {self.step} record of {self.inputs.get('model')} in data/reference answers what "
                    "the settings ask: run `make book`, which measures"
                )
            return answers[-1]
        if not self.exists():
            check_writable(self.folder)
            records.write(self.folder, self.take())
        return records.read(self.path)

    def answer(self) -> Record:
        """Find a record of the question, whatever code made it, or take it: for hours of committed work."""
        answers = records.find(self.folder, self.step, self.inputs)
        return answers[-1] if answers else self.record()

    def take(self) -> Record:
        """Measure, without looking for a record or writing one."""
        start, before = time.perf_counter(), energy.joules()
        rows, details = self.measure()
        seconds, used = time.perf_counter() - start, energy.spent(before, energy.joules())
        cost = {"seconds": round(seconds, 3), "peak_memory": records.peak_memory()}
        facts = records.environment() | dict(self.provenance) | cost | ({"joules": used} if used else {})
        inputs = json.loads(json.dumps(self.inputs))
        return Record(self.step, inputs, rows, details, facts | self.made_by)


def found(measurements: Iterable[Measurement]) -> list[Record]:
    """Find the records of those measurements that were taken before."""
    return [measurement.record() for measurement in measurements if measurement.exists()]
