"""Context: what is known about an image beside its pixels, such as age, sex and body site, and what a class owes to it.

A taxonomy names the columns. A bundle holds numbers per value and class, fitted on train, which are added to the
logits: log p(class | context) - log p(class), up to a constant. Plain numbers, nothing pickled. Fitting and adding
are in `vision.calibration.context`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from records.types.base import Plain
from records.types.images import Image

Value = str | float | None
Known = Mapping[str, Value]
"""Column to what is known about one image; None, an empty text or an absent column is missing."""

COLUMNS: dict[str, str] = {
    "age": "age_years",
    "sex": "sex",
    "localization": "localization",
    "device": "device",
    "site": "site",
}
"""Columns that a taxonomy may name as context, each with its field of an image's row."""

Kind = Literal["categorical", "numeric"]


class ContextColumn(BaseModel):
    """A column that models may use as context."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Plain(50, least=1)] = Field(description="age, sex, localization, device or site")
    kind: Kind = Field(default="categorical", description="numeric values are interpolated, others are told apart")

    @model_validator(mode="after")
    def _is_known(self) -> "ContextColumn":
        if self.name not in COLUMNS:
            raise ValueError(f"{self.name!r} is no column of context; there are {', '.join(COLUMNS)}")
        return self


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ContextPart(_Part):
    """What one column adds to the logits of the classes."""

    name: str
    kind: Kind
    values: dict[str, list[float]] = Field(
        default_factory=dict, description="categorical: value, without case, to [C] in class order"
    )
    knots: list[float] = Field(default_factory=list, description="numeric: ascending values")
    heights: list[list[float]] = Field(
        default_factory=list, description="numeric: [C] at each knot, linear between them; outside, nothing is added"
    )


class ContextHead(_Part):
    """Weight times the sum of its columns is added to logits / temperature + bias."""

    version: Literal[1] = 1
    weight: float = Field(ge=0, allow_inf_nan=False, description="fitted with temperature and bias; 0 changes nothing")
    columns: list[ContextPart]
    train_images: int = Field(ge=1, description="training images with at least one of the columns")


def context_of_image(image: Image) -> dict[str, Value]:
    """Return what is known about a stored image, by column."""
    return {name: getattr(image, field) for name, field in COLUMNS.items()}


def context_of(values: Any) -> dict[str, Value]:
    """Return the columns of an object with attributes of their names, such as a request's context."""
    return {name: getattr(values, name) for name in COLUMNS}
