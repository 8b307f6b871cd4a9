"""The gate's report: the verdict, every check in words and figures, and the page that shows them."""

from enum import StrEnum
from importlib.resources import files
from typing import Literal

from jinja2 import Environment
from pydantic import BaseModel, ConfigDict, Field

from records.taxonomy import Taxonomy

Outcome = Literal["pass", "fail", "undecided"]


class Verdict(StrEnum):
    """The verdict on a challenger."""

    PROMOTE = "promote"
    REFUSE = "refuse"
    UNDECIDED = "undecided"


class Check(BaseModel):
    """One check and its outcome."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Outcome
    text: str = Field(description="one sentence with the figures")
    estimate: float | None = None
    lower_bound: float | None = Field(default=None, description="one-sided, at the confidence of the settings")
    limit: float | None = None
    lesions: int = Field(default=0, description="lesions the estimate rests on")
    more_lesions: int | None = Field(default=None, description="if undecided: about how many more would decide")
    passes_from: float | None = Field(
        default=None, description="true difference from which this check passes with a power of 0.8"
    )


class SliceReport(BaseModel):
    """A part of the gate split, such as one body site."""

    model_config = ConfigDict(frozen=True)

    name: str
    images: int
    key_lesions: int
    judged: bool = Field(description="false if it holds too few key-class lesions to be checked")


class GateReport(BaseModel):
    """The verdict and its evidence."""

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
    Verdict.PROMOTE: "The new model may serve",
    Verdict.REFUSE: "The new model must not serve",
    Verdict.UNDECIDED: "There are too few lesions to decide; the current model keeps serving",
}


def report_page(report: GateReport, taxonomy: Taxonomy) -> str:
    """Return the report as a self-contained HTML page; `taxonomy` has the display name of the key class."""
    key = taxonomy.key_class.code if taxonomy.key_class else None
    name = next((c.name for c in taxonomy.classes if c.code == key), None)
    # Names of sites and devices come from imported tables, so everything is escaped.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("cluster.gate") / "page.html").read_text(encoding="utf-8"))
    return template.render(report=report, headline=HEADLINES[report.verdict], key_name=name)
