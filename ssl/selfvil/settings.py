"""The base of every settings model: the sections of a recipe and the settings of an objective."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know. A field's docstring is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


Size = Annotated[tuple[int, int], BeforeValidator(_pair)]
"""Height and width in pixels; a single number means a square."""

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path or a pattern of paths; `~` at its start is the user's home folder."""
