"""Cut the power at random moments of predict, label sync and round, and check what is on the disk afterwards.

    python -m bench.drills.power_cut --moments 200 --seed 1     minutes
    python -m bench.drills.power_cut --moments 12 --only predict

Each kind of work runs once with the preset `clinical`, and every call that writes below the home is logged (see
`simulated_disk`). Then the disk is built as it may be after a cut at a moment of the log, and opened again. Everything
that was acknowledged before that moment has to be whole: its rows, and the blobs, datasets, bundles and checkpoints
that rows refer to; and the audit chain has to verify. Label Studio is a stand-in with the client's methods, since its
disk is not Relook's. It exits with 1 if anything is missing.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from bench.drills.simulated_disk import SURVIVES, Disk, read_log, recording
from cluster.presets import clinical
from cluster.round import RoundEvent, run_round
from cluster.settings import RoundSettings, Settings
from images.importer import import_folder
from images.synth import render, synthesize
from labeling.client import LabelStudioClient
from labeling.rows import AnnotationRow, ProjectRow, ProjectState, TaskRow
from labeling.settings import LabelingSettings
from labeling.sync import sync
from labeling.tasks import annotation_result
from records import audit
from records.bundles import read_bundle
from records.datasets import load_dataset
from records.errors import RelookError
from records.frames import Frame
from records.ids import new_id, utc_now
from records.models import register, serve_model, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    Consent,
    DatasetRecord,
    Image,
    ModelRecord,
    ModelStatus,
    Prediction,
    ReviewItem,
    ReviewState,
    RoundStep,
)
from serving.messages import PredictionRequest
from serving.predictor import Predictor
from serving.schemas import Context
from trainers.fitting.checkpoints import load_checkpoint
from trainers.fitting.fit import fit
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings

KINDS = ("predict", "label", "round")
_PREDICTIONS, _AT_ONCE = 40, 4


def settings_of(root: Path) -> Settings:
    """Return the settings of the smallest clinic whose disk is at `root`."""
    preset = clinical()
    return preset.model_copy(
        update={
            "records": RecordsSettings(home=root / "home", durability=preset.records.durability),
            "trainers": TrainersSettings(
                model=ModelSettings(name="custom_cnn", side_px=32),
                epochs=2,
                precision="fp32",
                workers=WorkersSettings(threads=1),
            ),
            "round": RoundSettings(tune="never", select_budget=5, approval=preset.round.approval),
            "labeling": LabelingSettings(),
        }
    )


def prepare(root: Path, scratch: Path) -> None:
    """Fill the home that the work starts from: images and a model that serves."""
    settings = settings_of(root)
    synthesize(scratch / "images", lesions=90, seed=3, width_px=80)
    with closing(open_store(settings.records)) as store:
        report = import_folder(store, scratch / "images", withhold_share=0.2, frames=(Frame(32),))
        dataset = load_dataset(store, str(report.dataset_id))
        bundle = fit(store, settings.trainers, dataset, run_dir=scratch / "run", use_ray=False)
        with store.ledger.begin() as tx:
            register(tx, bundle)
            serve_model(tx, bundle.id, ModelStatus.CHAMPION, replaces=serving_id(tx))
            audit.append(tx, actor="drill", action="model.champion", subject=bundle.id)


class Acknowledged:
    """Tells what was acknowledged, in the same log as the writes."""

    def __init__(self, root: Path) -> None:
        self._handle = os.open(root / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def tell(self, **what: Any) -> None:
        """Note what a caller was just told is done."""
        os.write(self._handle, (json.dumps(what) + "\n").encode())


def predict(store: Store, settings: Settings, told: Acknowledged) -> None:
    """Predict images whose consent covers training, several at once, as the service does."""

    async def run() -> None:
        predictor = Predictor(store, settings.serving)
        await predictor.start()
        for start in range(0, _PREDICTIONS, _AT_ONCE):
            requests = [
                PredictionRequest(
                    render("mel" if number % 2 else "nv", seed=number, width_px=120),
                    new_id(),
                    Context(consent=Consent.TRAINING, lesion_id=f"lesion {number}"),
                    idempotency_key=new_id(),
                )
                for number in range(start, start + _AT_ONCE)
            ]
            for stored in await asyncio.gather(*map(predictor.predict, requests)):
                review = stored.review.id if stored.review is not None else None
                told.tell(prediction=stored.prediction.id, image=stored.prediction.image_id, review=review)
        await predictor.stop()

    asyncio.run(run())


class StandIn:
    """A Label Studio in memory, with the methods of `LabelStudioClient` that a sync calls."""

    server, url = "local", "http://127.0.0.1:8080"

    def __init__(self) -> None:
        self._project: ProjectRow | None = None
        self._tasks: dict[int, TaskRow] = {}

    def project(self, project_id: int) -> ProjectRow | None:
        """Return the only project."""
        return self._project

    def ensure_project(self, title: str, label_config: str, marker: str, model_version: str) -> int:
        """Make the project."""
        self._project = ProjectRow(1, marker, label_config.strip())
        return 1

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Keep tasks and return their ids."""
        first = len(self._tasks) + 1
        for number, task in enumerate(tasks, start=first):
            self._tasks[number] = TaskRow(number, task["meta"], utc_now())
        return list(range(first, first + len(tasks)))

    def state(self, project_id: int) -> ProjectState:
        """Return the number of tasks and annotations."""
        rows = list(self._tasks.values())
        newest = max((row.updated_at for row in rows), default=None)
        return ProjectState(len(rows), sum(len(row.annotations) for row in rows), newest)

    def list_tasks(
        self, project_id: int, *, after_id: int = 0, updated_since: datetime | None = None, **_: Any
    ) -> Iterator[list[TaskRow]]:
        """Yield all tasks that match, as one page."""
        yield [
            row
            for row in self._tasks.values()
            if row.id > after_id and (updated_since is None or row.updated_at >= updated_since)
        ]

    def users(self) -> dict[int, str]:
        """Return the only annotator."""
        return {1: "annotator@example.org"}

    def refresh_task(self, task_id: int, document: Mapping[str, Any]) -> bool:
        """Change nothing: what a task shows does not matter here."""
        return True

    def request(self, method: str, path: str, action: str, **_: Any) -> list[Any]:
        """Return an empty list: there are no webhooks."""
        return []

    def annotate(self, number: int) -> None:
        """Annotate the first tasks that have no annotation yet."""
        for row in [row for row in self._tasks.values() if not row.annotations][:number]:
            done = AnnotationRow(row.id, annotation_result("mel"), 1, False, utc_now(), 3.0)
            self._tasks[row.id] = replace(row, annotations=(done,), updated_at=done.updated_at)


def label(store: Store, settings: Settings, told: Acknowledged) -> None:
    """Push the review items, and pull annotations in several syncs."""
    with store.ledger.read() as tx:
        has_items = bool(tx.find(ReviewItem, limit=1))
    if not has_items:
        predict(store, settings, told)
    stand_in = StandIn()
    for _ in range(6):
        sync(store, cast(LabelStudioClient, stand_in), settings.labeling)
        with store.ledger.read() as tx:
            annotations = [annotation.id for annotation in tx.find(Annotation)]
            sent = [item.id for item in tx.find(ReviewItem) if item.state is not ReviewState.NEW]
        told.tell(annotations=annotations, sent=sent)
        stand_in.annotate(5)


def a_round(store: Store, settings: Settings, told: Acknowledged) -> None:
    """Run a round."""

    def follow(event: RoundEvent) -> None:
        if event.state == "done":
            told.tell(step=event.step)

    run_round(store, settings, started_by="key drill", on_event=follow)
    told.tell(step="push")


WORK: dict[str, Callable[[Store, Settings, Acknowledged], None]] = {
    "predict": predict,
    "label": label,
    "round": a_round,
}


def find_missing(root: Path, acknowledged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Open the home below `root` and return one sentence for everything that is not whole."""
    try:
        with closing(open_store(settings_of(root).records)) as store:
            missing = audit.verify(store.ledger, store.home)
            missing += [*_broken_references(store), *_lost(store, acknowledged)]
            # What was opened can be worked with.
            with store.ledger.begin() as tx:
                audit.append(tx, actor="drill", action="drill.opened", subject=str(root))
            return missing + [f"after another event: {fault}" for fault in audit.verify(store.ledger, store.home)]
    except Exception as error:  # noqa: BLE001 - whatever it is, the home cannot be opened
        return [f"the home cannot be used: {type(error).__name__}: {error}"]


def _broken_references(store: Store) -> Iterator[str]:
    """Yield a sentence for each thing that a row names and that is not whole, acknowledged or not."""
    with store.ledger.read() as tx:
        images = [image.id for image in tx.find(Image) if image.uri.endswith(image.id)]
        overlays = [item.overlay_blob for item in tx.find(ReviewItem) if item.overlay_blob is not None]
        datasets = [record.id for record in tx.find(DatasetRecord)]
        models = [record.id for record in tx.find(ModelRecord)]
    checks: list[Callable[[], object]] = [
        *(lambda blob=blob: store.blobs.get(blob) for blob in [*images, *overlays]),
        *(lambda dataset=dataset: load_dataset(store, dataset) for dataset in datasets),
        *(lambda model=model: read_bundle(store.home.bundles / model, model) for model in models),
        *(lambda path=path: load_checkpoint(path) for path in store.home.runs.rglob("checkpoint.pt")),
        *(lambda path=path: json.loads(path.read_text()) for path in store.home.runs.rglob("*.json")),
    ]
    for check in checks:
        try:
            check()
        except (RelookError, ValueError) as error:
            yield str(error)


def _lost(store: Store, acknowledged: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    with store.ledger.read() as tx:
        predictions = {row.id for row in tx.find(Prediction)}
        images = {row.id for row in tx.find(Image)}
        items = {row.id: row.state for row in tx.find(ReviewItem)}
        annotations = {row.id for row in tx.find(Annotation)}
        steps = {row.step for row in tx.find(RoundStep)}
    for told in acknowledged:
        if "prediction" in told:
            if told["prediction"] not in predictions or told["image"] not in images:
                yield f"prediction {told['prediction']} was returned and is lost"
            if told["review"] is not None and told["review"] not in items:
                yield f"review item {told['review']} was returned and is lost"
        for annotation in set(told.get("annotations", ())) - annotations:
            yield f"annotation {annotation} was pulled and is lost"
        for item in told.get("sent", ()):
            if items.get(item, ReviewState.NEW) is ReviewState.NEW:
                yield f"review item {item} was pushed and is not marked"
        if "step" in told and told["step"] not in steps:
            yield f"step {told['step']} had ended and is lost"


def cut(kind: str, root: Path, scratch: Path, moments: int, chance: random.Random) -> dict[str, Any]:
    """Do one kind of work, and check the disk after a cut at so many moments of it."""
    variables, log = recording(scratch, root)
    log.unlink(missing_ok=True)
    disk = Disk(root)
    program = [sys.executable, "-m", "bench.drills.power_cut", "--work", kind, str(root)]
    subprocess.run(program, check=True, env={**os.environ, **variables}, stdout=sys.stderr)
    records = list(read_log(log))
    wanted = Counter(chance.randint(0, len(records)) for _ in range(moments))
    # States of the disk have the home's own path, since rows name folders in it; the real one waits beside it.
    kept = root.with_name(f"{root.name}-kept")
    faults: list[str] = []
    acknowledged: list[dict[str, Any]] = []
    for at in range(len(records) + 1):
        if wanted[at]:
            root.rename(kept)
            try:
                for _ in range(wanted[at]):
                    survives = chance.choice(SURVIVES)
                    disk.after_cut(chance, survives, root)
                    found = find_missing(root, acknowledged)
                    faults += [f"{kind}, call {at} of {len(records)}, survives {survives}: {text}" for text in found]
                    shutil.rmtree(root)
            finally:
                kept.rename(root)
        if at < len(records):
            record = records[at]
            disk.apply(record)
            if record.operation == "W" and record.path.endswith("/acknowledged"):
                acknowledged += [json.loads(line) for line in record.data.splitlines()]
    # The log has to be complete, or the states that were checked were not those of the disk.
    unlogged = disk.differences()
    return {
        "calls": len(records),
        "flushes": sum(record.operation == "F" for record in records),
        "acknowledged": len(acknowledged),
        "cuts": moments,
        "faults": faults,
        "not_logged": unlogged,
    }


def run_drill(scratch: Path, moments: int, seed: int, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Run the drill in an empty folder and return what was found, by kind of work."""
    root = scratch.resolve() / "disk"
    root.mkdir()
    prepare(root, scratch)
    chance = random.Random(seed)
    found: dict[str, Any] = {}
    for number, kind in enumerate(kinds):
        share = moments // len(kinds) + (number < moments % len(kinds))
        found[kind] = cut(kind, root, scratch, share, chance)
        print(kind, json.dumps(found[kind]), file=sys.stderr)
    return found


def main() -> None:
    """Run the drill, or one kind of work of it, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=200, help="how many cuts, in all")
    parser.add_argument("--seed", type=int, default=1, help="draws the moments, and what survives")
    parser.add_argument(
        "--only", choices=KINDS, action="append", help="kind of work; default: all, one after the other"
    )
    parser.add_argument("--work", nargs=2, metavar=("KIND", "ROOT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        kind, root = arguments.work[0], Path(arguments.work[1])
        settings = settings_of(root)
        with closing(open_store(settings.records)) as store:
            WORK[kind](store, settings, Acknowledged(root))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="relook-power-") as scratch:
        found = run_drill(Path(scratch), arguments.moments, arguments.seed, arguments.only or KINDS)
    print(json.dumps({**found, "seconds": round(time.monotonic() - began, 1)}, indent=2))
    sys.exit(1 if any(part["faults"] or part["not_logged"] for part in found.values()) else 0)


if __name__ == "__main__":
    main()
