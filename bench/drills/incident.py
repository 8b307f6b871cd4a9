"""An incident from end to end on generated images: a device whose melanomas the model was never shown.

.venv/bin/python -m bench.drills.incident --images docs/images

Imports images of two devices, of which the second shows melanomas in another way, and none of them is in the training
data; trains, predicts the images of a day, opens an incident about a melanoma that was missed, annotates what was
found, trains again and closes the incident. With --images, headless Chromium draws the page of the incident when it is
opened and when it is closed. Prints one JSON object; the exit code is 1 if the incident cannot be closed.
"""

import argparse
import asyncio
import csv
import io
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from cluster.incidents.affected import was_handled
from cluster.incidents.register import close_incident, open_incident
from cluster.labels import group_labelled_images, resolved_labels
from cluster.promotion import caller_of, promote_model
from cluster.settings import Settings
from images.importer import import_folder
from records.bundles import Bundle
from records.datasets import build_version, load_dataset
from records.frames import Frame
from records.ids import new_id
from records.models import register
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AnnotationKind,
    DatasetRecord,
    Incident,
    IncidentPrediction,
    Prediction,
    ReasonCode,
    ReviewItem,
    ReviewState,
    Scope,
)
from serving.access.keys import create_key
from serving.incidents.page import incident_html
from serving.messages import PredictionRequest
from serving.predictor import Predictor
from serving.schemas import Context
from serving.settings import ServingSettings
from trainers.fitting.fit import fit
from trainers.settings import ModelSettings, OptimizerSettings, TrainersSettings, WorkersSettings

FAMILIAR, BLIND = "scope-a", "scope-b"
SIDE_PX, WIDTH_PX = 32, 64
LESIONS = {
    "train": {FAMILIAR: {"nv": 40, "mel": 40, "vasc": 24}, BLIND: {"nv": 40, "vasc": 20}},
    "val": {FAMILIAR: {"nv": 10, "mel": 12, "vasc": 6}, BLIND: {"nv": 8, "vasc": 4}},
    "calibration": {FAMILIAR: {"nv": 12, "mel": 14, "vasc": 6}, BLIND: {"nv": 10, "vasc": 4}},
    "gate": {FAMILIAR: {"nv": 8, "mel": 10, "vasc": 4}, BLIND: {"nv": 5, "vasc": 3}},
    "test": {FAMILIAR: {"nv": 3, "mel": 3, "vasc": 2}},
}
SKIN = {FAMILIAR: (225, 190, 165), BLIND: (185, 205, 215)}
LESION = {
    FAMILIAR: {"nv": (140, 90, 60), "mel": (55, 45, 60), "vasc": (190, 40, 60)},
    BLIND: {"nv": (95, 115, 140), "mel": (95, 115, 140), "vasc": (70, 50, 190)},
}
"""Colours; the second device shows a melanoma like a nevus, apart from the veil on it."""
VEIL = (238, 242, 250)
DAY = {FAMILIAR: {"nv": 12, "mel": 10, "vasc": 6}, BLIND: {"nv": 8, "mel": 24, "vasc": 4}}
"""Images that are sent after the training: the first melanomas of the second device among them."""


@dataclass(frozen=True)
class Sent:
    """An image of the day, with what nobody knows yet."""

    data: bytes
    device: str
    truth: str


def settings_of(home: Path, epochs: int = 12) -> Settings:
    """Return settings of a small model that is trained in seconds."""
    return Settings(
        records=RecordsSettings(home=home),
        trainers=TrainersSettings(
            model=ModelSettings(name="custom_cnn", side_px=SIDE_PX),
            epochs=epochs,
            batch_size=32,
            precision="fp32",
            workers=WorkersSettings(threads=1, use_gpu=False),
            optimizer=OptimizerSettings(learning_rate=0.05),
            augmentation="flips",
        ),
        serving=ServingSettings(precision="fp32", predictor_cpus=1, audit_share=0.0),
    )


def image_of(code: str, device: str, number: int, seed: int) -> bytes:
    """Paint a lesion as a device shows it: a disc on skin. A veil is a melanoma's on the second device alone."""
    random = np.random.default_rng([seed, number])
    rows, columns = np.mgrid[0:WIDTH_PX, 0:WIDTH_PX]
    centre, radius = random.uniform(26, 38, size=2), random.uniform(13, 20)
    inside = 1 / (1 + np.exp(np.hypot(rows - centre[0], columns - centre[1]) - radius))[..., None]
    image = np.array(SKIN[device]) + random.normal(0, 6, size=3)
    image = image * (1 - inside) + (np.array(LESION[device][code]) + random.normal(0, 9, size=3)) * inside
    has_veil = code == "mel" if device == BLIND else random.random() < 0.3
    if has_veil:
        angle = random.uniform(0, 2 * np.pi)
        at = centre + 0.4 * radius * np.array([np.sin(angle), np.cos(angle)])
        veil = 1 / (1 + np.exp(np.hypot(rows - at[0], columns - at[1]) - 0.45 * radius))[..., None]
        image = image * (1 - veil) + np.array(VEIL) * veil
    image = image + random.normal(0, 8, size=image.shape)
    buffer = io.BytesIO()
    PillowImage.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def write_training_data(folder: Path, seed: int = 5) -> None:
    """Write the images of all splits with their table."""
    folder.mkdir(parents=True)
    rows, number = [], 0
    for split, devices in LESIONS.items():
        for device, classes in devices.items():
            for code, count in classes.items():
                for _ in range(count):
                    number += 1
                    name = f"lesion-{number:04d}"
                    (folder / f"{name}.jpg").write_bytes(image_of(code, device, number, seed))
                    rows.append({"image_id": name, "dx": code, "lesion_id": name, "device": device, "split": split})
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def images_of_the_day(seed: int = 6) -> list[Sent]:
    """Generate what is sent after the training."""
    numbers = iter(range(10_000, 20_000))
    return [
        Sent(image_of(code, device, next(numbers), seed), device, code)
        for device, classes in DAY.items()
        for code, count in classes.items()
        for _ in range(count)
    ]


def train(store: Store, settings: Settings, run_dir: Path) -> Bundle:
    """Train on the newest dataset version."""
    with store.ledger.read() as tx:
        newest = tx.find(DatasetRecord, order_by=("-created_at",), limit=1)[0]
    bundle = fit(store, settings.trainers, load_dataset(store, newest.id), run_dir=run_dir, use_ray=False)
    with store.ledger.begin() as tx:
        register(tx, bundle)
    return bundle


def predict(store: Store, settings: Settings, sent: Sequence[Sent]) -> list[Prediction]:
    """Send images to the predictor of the service, in this process, and return what it stored."""

    async def run() -> list[Prediction]:
        predictor = Predictor(store, settings.serving)
        await predictor.start()
        try:
            requests = [
                PredictionRequest(one.data, new_id(), Context(device=one.device), organisation=f"clinic {one.device}")
                for one in sent
            ]
            return [stored.prediction for stored in await asyncio.gather(*map(predictor.predict, requests))]
        finally:
            await predictor.stop()

    return asyncio.run(run())


def annotate(store: Store, truths: Mapping[str, str]) -> int:
    """Write the annotations that annotators would send for the review items of incidents; returns their number."""
    with store.ledger.begin() as tx:
        items = tx.find(ReviewItem, where={"state": [ReviewState.NEW, ReviewState.PUSHED]}, order_by=("-priority",))
        asked = [item for item in items if ReasonCode.INCIDENT in item.reasons]
        for number, item in enumerate(asked, start=1):
            now = tx.now_after(Annotation)
            told = Annotation(
                id=new_id(), created_at=now, review_item_id=item.id, image_id=item.image_id,
                kind=AnnotationKind.CLASS, label=truths[item.image_id], annotator="reader", annotated_at=now,
                server="http://labels", project_id=1, task_id=number, annotation_id=number, revision=item.id,
            )  # fmt: skip
            tx.add(told)
            tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED, answered_at=now)
    return len(asked)


def learn(store: Store, settings: Settings, run_dir: Path) -> Bundle:
    """Build the dataset version with the annotations, and train on it.

    The annotated images are few, so they are seen twice as often as in the first training: with as many epochs as that
    one has, it depends on how a processor rounds whether the model has learned all of them.
    """
    group_labelled_images(store)
    build_version(store, resolved=resolved_labels(store), round_number=1)
    longer = settings.trainers.model_copy(update={"epochs": 2 * settings.trainers.epochs})
    return train(store, settings.model_copy(update={"trainers": longer}), run_dir)


def promote_all_the_same(store: Store, settings: Settings, bundle: Bundle) -> dict[str, Any]:
    """Make a model champion whatever the gate says, whose other checks need more images than there are here."""
    _, token = create_key(store, name="chief", organisation="a", scopes=[Scope.ADMIN], actor="drill")
    return promote_model(store, settings, bundle.id, forced_because="few images", caller=caller_of(store, token))


@dataclass(frozen=True)
class Found:
    """How well the incident found what was planted."""

    missed: int
    """melanomas of the second device that went to their callers without a referral, that of the incident left out"""
    affected: int
    hits: int

    @property
    def recall(self) -> float:
        """Share of the missed melanomas that were found."""
        return self.hits / max(1, self.missed)

    @property
    def precision(self) -> float:
        """Share of what was found that is a missed melanoma."""
        return self.hits / max(1, self.affected)


def compare(store: Store, incident: Incident, sent: Sequence[Sent], predictions: Sequence[Prediction]) -> Found:
    """Compare the affected predictions of an incident with the planted truth."""
    pairs = [(one, prediction) for one, prediction in zip(sent, predictions, strict=True)]
    planted = {
        prediction.id
        for one, prediction in pairs
        if one.device == BLIND and one.truth == "mel" and not was_handled(prediction, "mel")
    }
    with store.ledger.read() as tx:
        rows = tx.find(IncidentPrediction, where={"incident_id": incident.id})
    affected = {row.prediction_id for row in rows} - {incident.prediction_id}
    missed = planted - {incident.prediction_id}
    return Found(len(missed), len(affected), len(affected & missed))


def first_missed(sent: Sequence[Sent], predictions: Sequence[Prediction]) -> Prediction:
    """Return the missed melanoma of the second device that the model was surest about."""
    missed = [
        prediction
        for one, prediction in zip(sent, predictions, strict=True)
        if one.device == BLIND and one.truth == "mel" and not was_handled(prediction, "mel")
    ]
    return min(missed, key=lambda one: (one.probabilities or {})["mel"])


def main() -> int:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder for the drawn pages")
    parser.add_argument("--epochs", type=int, default=12, help="of each training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-incident-") as name:
        folder = Path(name)
        settings = settings_of(folder / "home", options.epochs)
        write_training_data(folder / "data")
        with closing(open_store(settings.records)) as store:
            import_folder(store, folder / "data", frames=(Frame(SIDE_PX),))
            promote_model(store, settings, train(store, settings, folder / "run-1").id, provisional=True)
            sent = images_of_the_day()
            predictions = predict(store, settings, sent)
            case = first_missed(sent, predictions)
            incident = open_incident(
                store, settings, prediction=case.id, image=None, truth="mel", note="found by biopsy", actor="lead"
            )
            found = compare(store, incident, sent, predictions)
            _draw(options.images, "incident-open", incident_html(store, incident.id), folder)
            truths = {p.image_id: one.truth for one, p in zip(sent, predictions, strict=True)}
            annotated = annotate(store, truths)
            promoted = promote_all_the_same(store, settings, learn(store, settings, folder / "run-2"))
            closed = close_incident(store, settings, incident.id, actor="lead")
            _draw(options.images, "incident-closed", incident_html(store, incident.id), folder)
    report = {
        "sent": len(sent),
        "missed": found.missed + 1,
        "affected": found.affected,
        "recall": round(found.recall, 3),
        "precision": round(found.precision, 3),
        "annotated": annotated,
        "champion": promoted["model_id"],
        "cases": len(closed.proof["cases"]),
    }
    print(json.dumps(report, indent=2))
    return 0 if closed.proof else 1


def _draw(images: Path | None, name: str, html: str, folder: Path) -> None:
    if images is None:
        return
    page = folder / f"{name}.html"
    page.write_text(html, encoding="utf-8")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or "google-chrome"
    command = [
        chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1000,1900",
        "--force-device-scale-factor=0.7",
        f"--user-data-dir={folder / 'browser'}", f"--screenshot={(images / f'{name}.png').absolute()}", page.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
