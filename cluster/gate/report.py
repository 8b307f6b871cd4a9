"""What the gate says: a verdict, and every check behind it in words and figures."""

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Outcome = Literal["pass", "fail", "undecided"]


class Verdict(StrEnum):
    """What the gate says of a challenger."""

    PROMOTE = "promote"
    REFUSE = "refuse"
    UNDECIDED = "undecided"


class Check(BaseModel):
    """One thing the gate looked at."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    text: str = Field(description="one sentence with the figures")
    estimate: float | None = None
    lower_bound: float | None = Field(default=None, description="one-splitd, at the confidence of the settings")
    limit: float | None = None
    lesions: int = Field(default=0, description="lesions the estimate rests on")
    more_lesions: int | None = Field(default=None, description="about how many more would decide, if undecided")
    passes_from: float | None = Field(
        default=None, description="power: true difference from which this check passes in four of five cases"
    )


class SliceReport(BaseModel):
    """A part of the gate split, such as one body site."""

    model_config = ConfigDict(frozen=True)

    name: str
    images: int
    key_lesions: int
    judged: bool = Field(description="false if it holds too few key-class lesions for a figure")


class GateReport(BaseModel):
    """The verdict and everything it rests on."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    verdict: Verdict
    why: str
    challenger: str
    champion: str | None
    images: int
    lesions: int
    key_lesions: int
    balanced_accuracy: float | None = Field(description="of the challenger, on the gate split")
    checks: list[Check]
    slices: list[SliceReport] = []
    looks: dict[str, int] = Field(default={}, description="how often each guarded split was read so far, by split")
