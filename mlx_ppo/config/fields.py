"""Types of keys that the sections share, and what a section is."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _named(value: object) -> object:
    """An empty text would be the working folder; no system has a null character in a path."""
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise ValueError("must name a file or folder")
    return value


InputPath = Annotated[Path, BeforeValidator(_named), Field(strict=False, json_schema_extra={"path": "input"})]
OutputPath = Annotated[Path, BeforeValidator(_named), Field(strict=False, json_schema_extra={"path": "output"})]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_MOST = 10**11  # of anything that is counted; what memory has room for is much less
Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Length = Annotated[int, Field(ge=2, le=_MOST)]  # tokens: one more than BOS


class Section(BaseModel):
    """One table of the TOML file: frozen, no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Columns = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Za-z_]+=.+$")], ...],
    Field(
        strict=False,
        description='where a file has other names than those of data.md: `["prompt=frage", "completion=reply.text"]`',
    ),
]
