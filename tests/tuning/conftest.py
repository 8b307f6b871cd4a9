"""A small store with labelled images, and settings under which a search takes seconds."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from records.datasets import DatasetVersion, build_version
from records.ids import utc_now
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Confirmation, Consent, Group, Image, SourceLabel, Split
from trainers.settings import ModelSettings, OptimizerSettings, TrainersSettings
from tuning.settings import TuningSettings
from tuning.trials import Origin, SearchHeader, TrialPlan, TrialResult

SIDE_PX = 32
LESIONS_PER_CLASS = 12
IMAGES_PER_LESION = 2


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, DatasetVersion]]:
    """A store of generated images, each class in a colour of its own, and its dataset version.

    The bytes of all calibration, gate and test images are gone: whoever reads one fails.
    """
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("tuning") / "home"))
    dataset = fill(store)
    for split in (Split.CALIBRATION, Split.GATE, Split.TEST):
        for image_id in dataset.split(split)["image_id"]:
            store.blobs.delete(image_id)
    yield store, dataset
    store.close()


def fill(store: Store) -> DatasetVersion:
    """Put labelled images into an empty store and build the version of them."""
    random = np.random.default_rng(0)
    now = utc_now()
    with store.ledger.begin() as tx:
        for index, label in enumerate(store.taxonomy.codes):
            colour = np.array([40 + 30 * index, 220 - 25 * index, 60 + 60 * (index % 3)])
            for lesion in range(LESIONS_PER_CLASS):
                group = Group(id=f"{index:08x}{lesion:08x}", created_at=now)
                tx.add(group)
                for _ in range(IMAGES_PER_LESION):
                    image_id = store.blobs.put(_png(colour, random))
                    tx.add(
                        Image(
                            id=image_id,
                            uri=store.blobs.uri(image_id),
                            format="png",
                            width_px=SIDE_PX,
                            height_px=SIDE_PX,
                            provenance="generated",
                            consent=Consent.TRAINING,
                            group_id=group.id,
                            created_at=now,
                        ),
                        SourceLabel(
                            id=image_id[:32],
                            image_id=image_id,
                            label=label,
                            confirmation=Confirmation.HISTOPATHOLOGY,
                            source="import:generated",
                            created_at=now,
                        ),
                    )
    return build_version(store).version


def _png(colour: np.ndarray, random: np.random.Generator) -> bytes:
    pixels = np.clip(colour + random.normal(0, 25, (SIDE_PX, SIDE_PX, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def trainers() -> TrainersSettings:
    """Small and quick, and without augmentation's import."""
    return TrainersSettings(
        model=ModelSettings(side_px=SIDE_PX),
        epochs=4,
        batch_size=32,
        augmentation="none",
        precision="fp32",
        optimizer=OptimizerSettings(learning_rate=0.05),
    )


@pytest.fixture(scope="session")
def diverging(trainers: TrainersSettings) -> TrainersSettings:
    """Settings under which the weights grow about tenfold per step, so that the loss is soon not finite."""
    return trainers.with_values({"optimizer.learning_rate": 10.0, "optimizer.weight_decay": 1.0, "batch_size": 2})


@pytest.fixture(scope="session")
def tuning() -> TuningSettings:
    """Four trials of three epochs, one at a time, rungs after epochs 1 and 2."""
    return TuningSettings(
        max_concurrent=1,
        trials=4,
        trial_epochs=3,
        grace_epochs=1,
        reduction_factor=2,
        search=("optimizer", "scheduler"),
        confirm_seeds=0,
    )


@pytest.fixture
def make_header() -> Callable[..., SearchHeader]:
    """Builds the header of a search of three trials with two epochs, with some fields changed."""

    def make(**changes: Any) -> SearchHeader:
        values = {
            "dataset_id": "d" * 64,
            "base": {"optimizer.name": "sgd"},
            "seed": 0,
            "search": ("optimizer",),
            "space_hash": "5" * 64,
            "trials": 3,
            "trial_epochs": 2,
            "grace_epochs": 1,
            "reduction_factor": 2,
            "train_images": 10,
            "train_images_available": 20,
            "val_images": 5,
        }
        return SearchHeader.model_validate(values | changes)

    return make


@pytest.fixture
def make_trial() -> Callable[..., TrialResult]:
    """Builds a trial with the given number and scores."""

    def make(number: int, scores: Sequence[float] = (), state: str = "finished", **changes: Any) -> TrialResult:
        values = {"number": number, "origin": Origin.SAMPLED, "overrides": {}, "state": state, "scores": tuple(scores)}
        return TrialResult.model_validate(values | changes)

    return make


@pytest.fixture
def make_plan() -> Callable[..., TrialPlan]:
    """Builds a plan with the given number."""

    def make(number: int, **overrides: Any) -> TrialPlan:
        origin = Origin.SAMPLED if overrides else Origin.DEFAULTS
        return TrialPlan(number=number, origin=origin, overrides=overrides)

    return make
