"""What every part of the spec shares."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field, WithJsonSchema

NAME_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
Name = Annotated[
    str, Field(pattern=NAME_PATTERN, description="lower-case letters, digits and dashes, at most 40 characters")
]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
# Bytes, or a number with a unit such as 12GiB.
Bytes = Annotated[ByteSize, Field(gt=0), WithJsonSchema({"type": ["integer", "string"]})]


class Section(BaseModel):
    """A part of the spec: unknown fields are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
