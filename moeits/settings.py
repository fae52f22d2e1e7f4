"""Settings that are checked: unknown names and values out of range are errors."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moeits.errors import MoeitsError


class Strict(BaseModel):
    """Settings that cannot be changed, each known by its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def make(
        cls, what: str, settings: Mapping[str, Any], parts: Mapping[str, type[BaseModel]] | None = None
    ) -> Self:
        """Make settings; a MoeitsError says what is wrong with `what`, and what is known instead.

        `parts` are the settings within these, by their names.
        """
        try:
            return cls(**settings)
        except ValidationError as error:
            wrong = []
            for problem in error.errors():
                where = ".".join(map(str, problem["loc"]))
                if problem["type"] == "extra_forbidden":
                    known = (parts or {}).get(problem["loc"][0], cls)
                    wrong.append(f"unknown setting {where!r} (known: {', '.join(known.model_fields)})")
                else:
                    wrong.append(f"{where} = {problem['input']!r}: {problem['msg']}")
            raise MoeitsError(f"{what}: {'; '.join(wrong)}") from error
