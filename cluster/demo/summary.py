"""What a demo leaves behind: `demo/summary.json`, and the stages that are done."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from records.home import Home


class RoundSummary(BaseModel):
    """One round in the summary."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    dataset_id: str
    labels_from_annotators: int
    balanced_accuracy: float | None = Field(description="on the test split")
    balanced_accuracy_ci: list[float] | None = Field(description="95 %, resampled by lesion")
    melanoma_sensitivity: float | None = Field(description="of the key class at its operating point, test split")
    melanoma_specificity: float | None = None
    promoted: bool
    status: str
    why: str


class DemoSummary(BaseModel):
    """The whole demo in figures."""

    data: dict[str, Any]
    search: dict[str, Any]
    rounds: list[RoundSummary]
    served: dict[str, Any]
    label_studio: dict[str, Any]
    gate: dict[str, Any]
    swap: dict[str, Any]
    trace: dict[str, Any]
    seconds: dict[str, float]


class Stages:
    """The stages of a demo that are done, kept in a file so that an interrupted demo goes on.

    Args:
        home: whose demo it is.
    """

    def __init__(self, home: Home) -> None:
        self._path = home.demo / "stages.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def done(self, name: str, result: dict[str, Any]) -> None:
        """Write down that a stage is done.

        Args:
            name: of the stage.
            result: JSON values that later stages and the summary read.
        """
        self.results[name] = result
        write_json(self._path, self.results)


def summary_path(home: Home) -> Path:
    """Return where the summary of the finished demo is."""
    return home.demo / "summary.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
