"""Settings that are checked: unknown names and values out of range are errors."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Settings that cannot be changed, each known by its name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
