"""What the gate says: a verdict, and every check behind it in words and figures."""

from enum import StrEnum
from importlib.resources import files
from typing import Literal

from jinja2 import Environment
from pydantic import BaseModel, ConfigDict, Field

from records.taxonomy import Taxonomy

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


HEADLINES = {
    Verdict.PROMOTE: "The new model may answer",
    Verdict.REFUSE: "The new model must not answer",
    Verdict.UNDECIDED: "There are too few lesions to decide; the model before goes on answering",
}


def report_page(report: GateReport, taxonomy: Taxonomy) -> str:
    """Render the report.

    Args:
        report: of the gate.
        taxonomy: with the display name of the key class.
    Returns:
        One HTML page that needs nothing else.
    """
    key = taxonomy.key_class.code if taxonomy.key_class else None
    name = next((c.name for c in taxonomy.classes if c.code == key), None)
    # Names of sites and devices come from imported tables: everything is escaped.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("cluster.gate") / "page.html").read_text(encoding="utf-8"))
    return template.render(report=report, headline=HEADLINES[report.verdict], key_name=name)
