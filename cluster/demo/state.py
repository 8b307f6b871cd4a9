"""What a demo leaves behind: `demo/summary.json`, and the stages that are done."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.settings import Settings
from records.command import stderr
from records.errors import RefusedError
from records.home import Home, open_home
from records.ids import utc_now
from records.store import open_store
from records.types import Image, ModelRecord


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


KEPT_FOLDERS = ("demo", "keys")


def prepare_home(settings: Settings, data: Path | None) -> None:
    """Take the home for this demo: go on with an unfinished one, move a finished one aside, refuse real work.

    Args:
        settings: with the home and the database.
        data: folder of the demo's images; None for generated ones.
    Raises:
        RefusedError: the home holds work that no demo made, or the database holds another demo.
    """
    home = open_home(settings.records.home)
    mark, stages = home.demo / "begun.json", Stages(home)
    source = str(data) if data else "generated"
    if not mark.exists() and _holds_work(settings):
        raise RefusedError(
            f"{home.root} holds work that is not a demo's; play it in a folder of its own: RELOOK_HOME=DIR relook demo"
        )
    if "data" in stages.results:
        if stages.results["data"]["source"] == source and not summary_path(home).exists():
            stderr.print("an unfinished demo of the same data goes on", highlight=False)
            return
        if settings.records.database:
            raise RefusedError("the database holds another demo; give this one its own (RELOOK_DATABASE)")
        stderr.print(f"the demo before this one was moved to {_set_aside(home)}", highlight=False)
    write_json(mark, {"source": source})


def _holds_work(settings: Settings) -> bool:
    store = open_store(settings.records)
    with store.ledger.read() as tx:
        found = tx.count(Image) + tx.count(ModelRecord)
    store.close()
    return found > 0


def _set_aside(home: Home) -> Path:
    """Move what a demo left, except the keys and earlier demos, into a folder of its own."""
    earlier = home.demo / "earlier" / f"{utc_now():%Y%m%dT%H%M%S}"
    earlier.mkdir(parents=True)
    left = [path for path in home.root.iterdir() if path.name not in KEPT_FOLDERS]
    left += [path for path in home.demo.iterdir() if path.name != "earlier"]
    for path in sorted(left):
        shutil.move(path, earlier / path.name)
    return earlier
