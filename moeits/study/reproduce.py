"""Find the measurement that a record answers, as today's code takes it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from moeits.errors import MissingError, MoeitsError
from moeits.machine.paths import DATA
from moeits.study import profiles, records
from moeits.study.comparison import Comparison
from moeits.study.measurement import Measurement
from moeits.study.records import Record


def find(name: str) -> Path:
    """Find a record's file.

    Parameters
    ----------
    name : str
        A file, or a record's id.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    MissingError
        If there is none; the message names the folders that were searched.
    """
    file = Path(name)
    if not file.is_file():
        file = records.locate(name, DATA)
    if file is None:
        places = ", ".join(f"data/{place}" for place in records.PLACES)
        raise MissingError(f"{name!r} is neither a record's file nor an id in {places}")
    return file


def measurement(record: Record, place: str = "") -> Measurement:
    """Make the measurement that a record answers.

    Parameters
    ----------
    record : Record
        Of the study, or of a profile.
    place : str, default=""
        Name of the record's folder. If it is a profile's, the others are not tried.

    Returns
    -------
    Measurement
        With the record's identity.

    Raises
    ------
    MissingError
        If its model is not here.
    MoeitsError
        If the record has no rows, or nothing that is measured today asks what the record answers.
    """
    from moeits.study import anatomy, bounds, healed, trials

    if not record.rows:
        raise MoeitsError(f"{record.step}-{record.id} has no rows to compare: all that it says is details")
    study = {module.STEP: module.measurement for module in (anatomy, bounds, healed, trials)}
    study[trials.FURTHER] = partial(trials.measurement, step=trials.FURTHER)
    known = record.step in study
    measured = [study[record.step](record.inputs["model"])] if known else _of_profiles(record, place)
    for one in measured:
        if one.identity == record.identity:
            return one
    raise MoeitsError(
        f"nothing that is measured today asks what {record.step}-{record.id} answers: its model, text or "
        f"settings have changed, or a benchmark took it (`make bench`). Check out the commit that took it: "
        f"{record.provenance.get('commit')}"
    )


def _of_profiles(record: Record, place: str) -> Iterator[Measurement]:
    model, asked = record.inputs.get("model"), record.inputs
    for name in [place] if place in profiles.names() else profiles.names():
        profile = profiles.load(name, device=asked.get("device"), dtype=asked.get("dtype"))
        if model not in profile.models:
            continue
        compared = Comparison(profile, model)
        _check_here(compared.study.source)
        if compared.study.checkpoint == asked["checkpoint"]:
            yield from chain(compared.study.measurements(record.step), compared.measurements(record.step))


def _check_here(source: str) -> None:
    """Raise a MissingError if a model of the hub would have to be downloaded first."""
    kind, _, repository = source.partition(":")
    if kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(repository, "config.json"), str):
            raise MissingError(
                f"{repository} is not on this machine: download it first (`hf download {repository}`)"
            )
