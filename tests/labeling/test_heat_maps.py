"""The heat map of a task: drawn from the numbers of its item when the task is made."""

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from labeling.project import Project
from labeling.push import _Beside, _prepare
from labeling.settings import LabelingSettings
from records.store import Store
from records.types import ReviewItem
from tests.labeling.conftest import make_image, write_item

MAP = [[0, 0, 0], [0, 255, 0], [0, 0, 0]]


def task_of(store: Store, item: ReviewItem) -> dict[str, Any]:
    batch = _prepare(store, [item], Project(id=1, marker="m"), LabelingSettings(), _Beside())
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
    side_px = LabelingSettings().image_side_px
    plain, drawn = (
        pixels_of(task_of(store, item.model_copy(update={"heat_map": shown}))["heatmap"])
        for shown in ([[0] * 3] * 3, MAP)
    )
    assert plain.shape == drawn.shape == (side_px, side_px, 3)
    changed = np.abs(drawn - plain).sum(axis=2)
    third = side_px // 3
    assert changed[third:-third, third:-third].mean() > 4 * changed[: third // 2, : third // 2].mean() + 10


def test_an_item_of_an_older_release_shows_its_drawn_map(store: Store) -> None:
    old = write_item(store, make_image(2), make_image(3, "PNG"), 1.0)
    assert task_of(store, old)["heatmap"].startswith("data:image/jpeg")


def test_a_blind_task_draws_none(store: Store, item: ReviewItem) -> None:
    assert "heatmap" not in task_of(store, item.model_copy(update={"heat_map": MAP, "blind": True}))


def test_an_item_without_a_map_shows_a_grey_field(store: Store, item: ReviewItem) -> None:
    assert np.ptp(pixels_of(task_of(store, item)["heatmap"])) == 0
