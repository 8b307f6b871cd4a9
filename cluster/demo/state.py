"""Files of a demo in its home: a marker that the home belongs to a demo, the finished stages, and the summary.

All are JSON files in `demo/` of the home. `prepare_home` decides whether a demo may use a home: one
that holds other work is refused, and an earlier demo is moved aside, never deleted.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.settings import Settings
from records.durable import write_file
from records.errors import RefusedError
from records.home import Home, open_home
from records.ids import utc_now
from records.progress import stderr
from records.store import open_store
from records.types import Image, ModelRecord

KEPT_FOLDERS = ("demo", "keys")


class RoundSummary(BaseModel):
    """One round in the summary."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    dataset_id: str
    labels_from_annotators: int
    balanced_accuracy: float | None = Field(description="on the test split")
    balanced_accuracy_ci: list[float] | None = Field(description="95 %, resampled by lesion")
    key_class: str | None = Field(default=None, description="its code; None if the taxonomy has none")
    key_class_sensitivity: float | None = Field(default=None, description="at its operating point, test split")
    key_class_specificity: float | None = None
    promoted: bool
    status: str
    why: str


class DemoSummary(BaseModel):
    """The results of the whole demo."""

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
    """The results of the finished stages, kept in a file so that an interrupted demo can be resumed."""

    def __init__(self, home: Home) -> None:
        self._path = home.demo / "stages.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def done(self, name: str, result: dict[str, Any]) -> None:
        """Record the result of a finished stage; it must be JSON."""
        self.results[name] = result
        write_json(self._path, self.results)


def summary_path(home: Home) -> Path:
    """Return where the summary of a finished demo is."""
    return home.demo / "summary.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON; a reader sees the old file or the new one, never a part of it."""
    write_file(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def prepare_home(settings: Settings, data: Path | None) -> None:
    """Prepare the home: resume an unfinished demo of the same data, or move an earlier demo aside.

    Args:
        settings: `records` names the home and the database.
        data: folder of the demo's images; None for generated ones.
    Raises:
        RefusedError: the home holds work that is not a demo's, or the database holds another demo.
    """
    home = open_home(settings.records.home)
    mark, stages = home.demo / "begun.json", Stages(home)
    source = str(data) if data else "generated"
    if not mark.exists() and _holds_work(settings):
        raise RefusedError(
            f"{home.root} holds work that is not a demo's; run the demo in its own folder: RELOOK_HOME=DIR relook demo"
        )
    # The import is the first stage. Before it has ended there is nothing to keep or to move, whatever the source.
    if "data" in stages.results:
        if stages.results["data"]["source"] == source and not summary_path(home).exists():
            stderr.print("resuming an unfinished demo of the same data", highlight=False)
            return
        # Files can be moved aside; a database outside the home cannot.
        if settings.records.database:
            raise RefusedError("the database holds another demo; give this one its own (RELOOK_DATABASE)")
        stderr.print(f"the previous demo was moved to {_move_aside(home)}", highlight=False)
    write_json(mark, {"source": source})


def _holds_work(settings: Settings) -> bool:
    store = open_store(settings.records)
    with store.ledger.read() as tx:
        found = tx.count(Image) + tx.count(ModelRecord)
    store.close()
    return found > 0


def _move_aside(home: Home) -> Path:
    """Move the files of a demo, except the keys and earlier demos, into a folder of its own."""
    earlier = home.demo / "earlier" / f"{utc_now():%Y%m%dT%H%M%S}"
    earlier.mkdir(parents=True)
    left = [path for path in home.root.iterdir() if path.name not in KEPT_FOLDERS]
    left += [path for path in home.demo.iterdir() if path.name != "earlier"]
    for path in sorted(left):
        shutil.move(path, earlier / path.name)
    # Key and head of the audit chain belong to the ledger that was moved.
    (earlier / "keys").mkdir(mode=0o700)
    for path in sorted(home.keys.glob("audit-*")):
        shutil.move(path, earlier / "keys" / path.name)
    return earlier
