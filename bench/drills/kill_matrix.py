"""Kill a round (SIGKILL) before each of its writes, resume it, and compare it with an undisturbed round.

A write is a commit to the ledger, or a file opened for writing, renamed, removed or created in the home, on the main
thread. The round runs without Ray (its workers have tests of their own) and, on request, with a real Label Studio.

    python -m bench.drills.kill_matrix --points 8       some of them, spread over the steps
    python -m bench.drills.kill_matrix                  all of them: minutes
    python -m bench.drills.kill_matrix --label-studio   with a real Label Studio: tasks are counted, too
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import SecretStr

from cluster.round import RoundEvent, run_round
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from images.synth import synthesize
from labeling.connection import connect
from labeling.local_server import LocalLabelStudio
from labeling.settings import LabelingSettings
from records import audit
from records.frames import Frame
from records.ledger.engine import WRITE_OPTION
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import AuditEvent, DatasetRecord, ModelRecord, ReviewItem, RoundRecord, RoundStep
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings

WRITE_EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
RISKIEST_FIRST = ("select", "rollout", "fit", "version", "gate", "push", "begin", "evaluate", "collect", "tune")
"""Steps that a short run kills in: those where a repetition would show first."""


class Killer:
    """Counts the writes of this process and ends it before one of them.

    Args:
        home: only files under it count.
        at: number of the write before which the process ends, None to only count.
    """

    def __init__(self, home: Path, at: int | None) -> None:
        self.home, self.at = str(home), at
        self.points: list[str] = []
        self.step = "begin"
        self.armed = False

    def arm(self) -> None:
        """Start counting."""
        sys.addaudithook(self._audited)
        sa.event.listen(sa.Engine, "commit", self._committed)
        self.armed = True

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            _, mode, flags = arguments
            writes = isinstance(mode, str) and bool(set(mode) & set("wax+"))
            writes = writes or (isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR)))
            if not writes:
                return
        elif event not in WRITE_EVENTS:
            return
        if str(arguments[0]).startswith(self.home):
            self._write(event)

    def _committed(self, connection: sa.Connection) -> None:
        # Reading transactions end in a commit, too; a kill before one cannot show anything.
        if connection.get_execution_options().get(WRITE_OPTION):
            self._write("commit")

    def _write(self, kind: str) -> None:
        # The main thread alone: its writes come in the same order in every run, so their numbers name the same write.
        if not self.armed or threading.current_thread() is not threading.main_thread():
            return
        self.points.append(f"{self.step}: {kind}")
        if self.at is not None and len(self.points) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def follow(self, event: RoundEvent) -> None:
        """Remember which step is running."""
        if event.state == "started":
            self.step = event.step


def settings_of(home: Path, url: str | None, token: SecretStr | None) -> Settings:
    """Return the settings of the smallest round that has every step."""
    return Settings(
        records=RecordsSettings(home=home),
        trainers=TrainersSettings(
            model=ModelSettings(name="custom_cnn", side_px=32),
            epochs=2,
            precision="fp32",
            workers=WorkersSettings(threads=1),
        ),
        round=RoundSettings(tune="never", select_budget=5),
        labeling=LabelingSettings(url=url, token=token),
    )


def run_in_home(home: Path, url: str | None, token: SecretStr | None, at: int | None) -> dict[str, Any]:
    """Run or resume the round of a home in this process; return its results and the writes that were passed."""
    settings = settings_of(home, url, token)
    store = open_store(settings.records)
    killer = Killer(home, at)
    killer.arm()
    with store.ledger.read() as tx:
        unfinished = tx.count(RoundRecord, where={"finished_at": None}) > 0
        ended = tx.count(RoundRecord) > 0 and not unfinished
    if not ended:
        run_round(store, settings, resume=unfinished, started_by="bench", on_event=killer.follow)
    killer.armed = False
    found = outcome_of(store, settings) | {"points": killer.points}
    store.close()
    return found


def outcome_of(store: Store, settings: Settings) -> dict[str, Any]:
    """Return everything about a finished round that a kill must not change."""
    with store.ledger.read() as tx:
        (record,) = tx.find(RoundRecord)
        steps = {step.step: step.result for step in tx.find(RoundStep)}
        actions = Counter(event.action for event in tx.find(AuditEvent))
        items = tx.find(ReviewItem)
        models = {model.id: str(model.status) for model in tx.find(ModelRecord)}
        num_datasets = tx.count(DatasetRecord)
    client = connect(store.home, settings.labeling)
    tasks: list[str] = []
    if client is not None:
        project = items[0].project_id if items else None
        pages = client.list_tasks(project, with_annotations=False) if project is not None else []
        tasks = [str(row.meta["relook_item"]) for page in pages for row in page]
    return {
        "steps": sorted(steps),
        "dataset": record.dataset_id,
        "datasets": num_datasets,
        "winner": steps["tune"]["settings"],
        "model": record.model_id,
        "models": models,
        "verdict": record.verdict,
        "why": record.why,
        "rollouts": {action: n for action, n in actions.items() if action.startswith("model.")},
        "rounds_started": actions["round.started"],
        "review_items": sorted(item.image_id for item in items),
        "review_item_states": dict(Counter(str(item.state) for item in items)),
        "tasks": sorted(Counter(tasks).values()),
        "audit_faults": audit.verify(store.ledger, store.home),
    }


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """Fork, do the work there, and return its result; None if it was killed."""
    # Forked, not started anew: imports take seconds. And an audit hook cannot be removed; it goes with its process.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            with os.fdopen(writing, "w") as file:
                json.dump(work(), file)
            code = 0
        except BaseException:  # noqa: BLE001 - a forked child must never return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    if status != 0:
        raise SystemExit(f"a child failed with status {status}")
    found: dict[str, Any] = json.loads(said)
    return found


def prepare(home: Path, folder: Path) -> dict[str, Any]:
    """Fill the home that every run starts from: generated images, some of them without a diagnosis."""
    settings = settings_of(home, None, None)
    synthesize(folder, lesions=140, seed=3, width_px=96)
    store = open_store(settings.records)
    report = import_folder(store, folder, withhold_share=0.3, frames=(Frame(32),))
    store.close()
    return {"images": report.images}


def chosen(points: Sequence[str], wanted: int | None) -> list[int]:
    """Return which writes to kill before, 1-based: all, or so many spread over the steps, commits first."""
    everything = list(range(1, len(points) + 1))
    if wanted is None or wanted >= len(points):
        return everything
    commits = [n for n in everything if points[n - 1].endswith("commit")]
    files = [n for n in everything if not points[n - 1].endswith("commit")]
    per_step = {points[n - 1].partition(":")[0]: n for n in commits}  # the last commit of every step
    first = [per_step[step] for step in RISKIEST_FIRST if step in per_step][:wanted]
    rest = wanted - len(first)
    stride = max(1, len(files) // rest) if rest else 1
    return sorted([*first, *(files[::stride][:rest] if rest else [])])


def main() -> None:
    """Run the matrix and print its result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, help="how many kill points; default: all")
    parser.add_argument("--label-studio", action="store_true", help="push to a real Label Studio")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relook-kill-") as scratch:
        root = Path(scratch)
        server = LocalLabelStudio(_home(root), LabelingSettings(port=0)) if arguments.label_studio else None
        try:
            running = server.up() if server else None
            url, token = (running.url, running.token) if running else (None, None)
            result = run_matrix(root, url, token, arguments.points)
        finally:
            if server:
                server.down()
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result, indent=2))
    sys.exit(1 if result["different"] else 0)


def run_matrix(root: Path, url: str | None, token: SecretStr | None, wanted: int | None) -> dict[str, Any]:
    """Kill, resume and compare; return the points and every difference."""
    base = root / "base"
    in_child(partial(prepare, base, root / "images"))
    reference = in_child(lambda: run_in_home(_copy(base, root / "reference"), url, token, None))
    if reference is None:
        raise SystemExit("the round that nobody kills was killed")
    points = reference.pop("points")
    different: dict[str, Any] = {}
    killed = 0
    numbers = chosen(points, wanted)
    for number in numbers:
        home = _copy(base, root / f"point-{number}")
        if in_child(partial(run_in_home, home, url, token, number)) is None:
            killed += 1
        resumed = in_child(partial(run_in_home, home, url, token, None)) or {}
        resumed.pop("points", None)
        wrong = {k: [v, resumed.get(k)] for k, v in reference.items() if resumed.get(k) != v}
        if wrong:
            different[f"{number} {points[number - 1]}"] = wrong
        shutil.rmtree(home)
    return {
        "writes": len(points),
        "writes_by_step": dict(Counter(point.partition(":")[0] for point in points)),
        "kill_points": [f"{number} {points[number - 1]}" for number in numbers],
        "killed": killed,
        "different": different,
        "reference": reference,
    }


def _copy(base: Path, home: Path) -> Path:
    shutil.copytree(base, home)
    return home


def _home(root: Path) -> Any:
    from records.home import open_home

    return open_home(root / "label-studio-home")


if __name__ == "__main__":
    main()
