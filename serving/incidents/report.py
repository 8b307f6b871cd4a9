"""The post-market report: what `relook incident report` measured, kept as a file of the home and shown as a page."""

from collections.abc import Collection
from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from records.erasure import Place
from records.errors import UnknownIdError
from records.store import Store


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class LiveFigure(_Part):
    """Sensitivity and specificity of the key class, of all predictions or of a model, an institution or a device."""

    by: str = Field(description="all | model | site | device")
    name: str
    sensitivity: float | None
    sensitivity_interval: tuple[float, float] = Field(description="level 0.95, valid at all times")
    cases: int = Field(ge=0, description="audited images of the key class")
    specificity: float | None
    specificity_interval: tuple[float, float]
    images: int = Field(ge=0, description="audited images")

    @property
    def sensitivity_text(self) -> str:
        """Estimate and interval in words."""
        return _text(self.sensitivity, self.sensitivity_interval)

    @property
    def specificity_text(self) -> str:
        """Estimate and interval in words."""
        return _text(self.specificity, self.specificity_interval)


class IncidentCounts(_Part):
    """Incidents of all predictions or of a model, an institution or a device, and how long it took to close them."""

    by: str = Field(description="all | model | site | device")
    name: str
    opened: int = Field(ge=0)
    still_open: int = Field(ge=0)
    withdrawn: int = Field(ge=0, description="closed without proof")
    median_days: float | None = Field(description="from opening to proof; empty while none is closed")
    longest_days: float | None


class IncidentReport(_Part):
    """Everything that is reported about a model in use."""

    created_at: AwareDatetime
    key_class: str | None
    figures: list[LiveFigure]
    incidents: list[IncidentCounts]
    regression_cases: int = Field(ge=0, description="images that every later champion has to classify or refer")
    affected: int = Field(ge=0, description="predictions that were recalled because they resemble one that missed")


def report_file(store: Store) -> Path:
    """Return the file of the newest report."""
    return store.home.runs / "incidents" / "report.json"


def stored_report(store: Store) -> IncidentReport:
    """Return the newest report; UnknownIdError if none was made."""
    try:
        return IncidentReport.model_validate_json(report_file(store).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnknownIdError("there is no report of incidents yet; `relook incident report` makes one") from error


def _forget(store: Store, image_ids: Collection[str]) -> int:
    # Whose device or institution it names cannot be told from it, and it is made anew by one command.
    found = report_file(store).is_file()
    report_file(store).unlink(missing_ok=True)
    return int(found)


REPORT = Place("incident report", "runs/incidents", "names of institutions and devices, with their figures", _forget)


def _text(estimate: float | None, interval: tuple[float, float]) -> str:
    return "no data" if estimate is None else f"{estimate:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
