"""Settings that are checked: unknown names and values out of range are errors."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Settings that cannot be changed, each known by its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def problems(
    error: ValidationError, model: type[BaseModel], parts: Mapping[str, type[BaseModel]] | None = None
) -> str:
    """Say what is wrong with settings, and what is known instead of an unknown name.

    Parameters
    ----------
    error : ValidationError
        What was found.
    model : type
        The settings that were to be made.
    parts : mapping of str to type, optional
        Settings within them, by their names.
    """
    said = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = (parts or {}).get(problem["loc"][0], model)
            said.append(f"unknown setting {where!r} (known: {', '.join(known.model_fields)})")
        else:
            said.append(f"{where} = {problem['input']!r}: {problem['msg']}")
    return "; ".join(said)
