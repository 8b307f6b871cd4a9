"""The heat map of a task: drawn from the numbers of its item when the task is made."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from labeling.batches import Beside, prepare
from labeling.project import Project
from labeling.settings import LabelingSettings
from records.frames import Crop
from records.store import Store
from records.types import ReviewItem
from tests.labeling.conftest import drawing_of, make_image, write_item

MAP = [[0, 0, 0], [0, 255, 0], [0, 0, 0]]


def task_of(store: Store, item: ReviewItem) -> dict[str, Any]:
    batch = prepare(store, [item], Project(id=1, marker="m"), LabelingSettings(), Beside())
    assert batch.unreadable == []
    (document,) = batch.documents
    data: dict[str, Any] = document["data"]
    return data


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(PillowImage.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


@pytest.fixture
def item(store: Store) -> ReviewItem:
    return write_item(store, make_image(1), None, 1.0)


def test_a_task_shows_the_map_over_its_image(store: Store, item: ReviewItem) -> None:
    (size, plain), (_, drawn) = (
        drawing_of(task_of(store, item.model_copy(update={"heat_map": shown}))["heatmap"])
        for shown in ([[0] * 3] * 3, MAP)
    )
    side_px = LabelingSettings().image_side_px
    assert size == {"width": str(side_px), "height": str(side_px)}
    changed = np.abs(pixels_of(drawn) - pixels_of(plain)).sum(axis=2)
    assert changed.shape == (72, 72), "the centre of an image of 96x72, which the browser enlarges"
    third = 72 // 3
    assert changed[third:-third, third:-third].mean() > 4 * changed[: third // 2, : third // 2].mean() + 10


def test_a_map_of_the_whole_image_lies_over_all_of_it(store: Store, item: ReviewItem) -> None:
    corner = [[255, 0, 0], [0, 0, 0], [0, 0, 0]]
    documents = [
        task_of(store, item.model_copy(update={"heat_map": shown, "crop": Crop.WHOLE}))["heatmap"]
        for shown in ([[0] * 3] * 3, corner)
    ]
    (size, plain), (_, drawn) = map(drawing_of, documents)
    side_px = LabelingSettings().image_side_px
    assert size == {"width": str(side_px), "height": str(side_px * 3 // 4)}
    changed = np.abs(pixels_of(drawn) - pixels_of(plain)).sum(axis=2)
    assert changed.shape == (72, 96)
    # The left tenth is no part of the centre square, so no map of that could mark it.
    assert changed[:10, :10].mean() > 4 * changed[-30:, -40:].mean() + 10


def test_an_item_of_an_older_release_shows_its_drawn_map(store: Store) -> None:
    old = write_item(store, make_image(2), make_image(3, "PNG"), 1.0)
    size, drawn = drawing_of(task_of(store, old)["heatmap"])
    assert size == {"width": "512", "height": "384"}
    assert pixels_of(drawn).shape == (72, 96, 3)


def test_a_blind_task_draws_none(store: Store, item: ReviewItem) -> None:
    assert "heatmap" not in task_of(store, item.model_copy(update={"heat_map": MAP, "blind": True}))


def test_an_item_without_a_map_shows_a_grey_field(store: Store, item: ReviewItem) -> None:
    assert np.ptp(pixels_of(task_of(store, item)["heatmap"])) == 0
