"""Painted outlines: run lengths become masks, hostile ones become nothing, and heat maps are measured by them."""

import base64
import io
import uuid
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from labeling.client import LabelStudioClient
from labeling.outlines import SIDE_PX, outline_of, unpacked
from labeling.project import SHARED, own_page
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result, label_config
from records.errors import DataError
from records.frames import Frame
from records.ids import new_id, utc_now
from records.store import Store, find_images
from records.types import Annotation, AnnotationKind
from tests.labeling.conftest import make_image, write_item
from trainers.evaluation.evaluate import _images


def ellipse(width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return (x / 0.6) ** 2 + (y / 0.5) ** 2 < 1


def packed(mask: np.ndarray) -> list[int]:
    """Pack RGBA pixels whose alpha channel is the mask, in runs of equal values and of others, as a browser does."""
    rgba = np.zeros((*mask.shape, 4), dtype=np.uint8)
    rgba[mask] = (11, 110, 110, 255)
    values, sizes = rgba.ravel(), (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    ends = [*np.flatnonzero(np.diff(values.astype(int))) + 1, len(values)]
    start = 0
    for end in map(int, ends):
        while start < end:
            run = min(end - start, 1 << 16)
            which = next(number for number, size in enumerate(sizes) if run <= 1 << size)
            bits += f"1{which:02b}{run - 1:0{sizes[which]}b}{values[start]:08b}"
            start += run
    return list(int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8)))


PACKED_BY_LABEL_STUDIO = (
    [0, 0, 0, 48, 57, 27, 254, 19, 0, 0, 46, 22, 224, 63, 192, 11, 133, 184, 15, 252, 38, 0]
)  # fmt: skip
"""Two painted pixels in the middle of 4 by 3, by the converter of its SDK; it has runs of different values, too."""


def region(mask: np.ndarray, **changes: Any) -> dict[str, Any]:
    value = {"format": "rle", "rle": packed(mask), "brushlabels": ["lesion"]}
    whole = {
        "from_name": "outline", "to_name": "image", "type": "brushlabels", "value": value,
        "original_width": mask.shape[1], "original_height": mask.shape[0], "image_rotation": 0,
    }  # fmt: skip
    return {**whole, **changes}


def decoded(png: str | None) -> np.ndarray:
    assert png is not None
    return np.asarray(PillowImage.open(io.BytesIO(base64.b64decode(png))).convert("L")) > 127


def test_what_label_studio_packs_is_unpacked() -> None:
    alpha = unpacked(bytes(PACKED_BY_LABEL_STUDIO), 4 * 3 * 4).reshape(3, 4, 4)[..., 3]
    assert alpha.tolist() == [[0, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", [(96, 72), (200, 300), (1, 7)])
def test_what_was_painted_comes_back_as_a_mask(size: tuple[int, int]) -> None:
    width, height = size
    mask = ellipse(width, height) if min(size) > 1 else np.ones((height, width), dtype=bool)
    found = decoded(outline_of([*annotation_result("mel"), region(mask)]))
    assert max(found.shape) == min(SIDE_PX, max(size))
    assert found.mean() == pytest.approx(mask.mean(), abs=0.03)
    both = mask | np.roll(mask, width // 3, axis=1)
    joined = decoded(outline_of([region(mask), region(np.roll(mask, width // 3, axis=1))]))
    assert joined.mean() == pytest.approx(both.mean(), abs=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"value": {"format": "rle", "rle": []}},
        {"value": {"format": "rle", "rle": [255] * 40}},
        {"value": {"format": "rle", "rle": [1, 2, 900]}},
        {"value": {"format": "rle", "rle": "abc"}},
        {"value": {"format": "png", "rle": [1]}},
        {"value": None},
        {"original_width": 10**9},
        {"original_width": -5},
        {"original_height": "72"},
        {"original_width": 95},
        {"type": "rectanglelabels"},
        {"from_name": "elsewhere"},
    ],
)
def test_what_is_no_outline_is_none_and_costs_nothing(changes: dict[str, Any]) -> None:
    assert outline_of([region(ellipse(96, 72), **changes)]) is None


def test_cut_and_altered_run_lengths_end_with_a_sentence_or_a_mask() -> None:
    whole = bytes(packed(ellipse(96, 72)))
    assert len(unpacked(whole, 96 * 72 * 4)) == 96 * 72 * 4
    for cut in range(0, len(whole) - 1, 1 + len(whole) // 20):
        with pytest.raises(DataError, match="run lengths"):
            unpacked(whole[:cut], 96 * 72 * 4)
    chance = np.random.default_rng(1)
    for _ in range(60):
        altered = bytearray(whole)
        altered[chance.integers(len(altered))] ^= 1 << chance.integers(8)
        with suppress(DataError):  # and nothing else
            assert len(unpacked(bytes(altered), 96 * 72 * 4)) == 96 * 72 * 4


def test_an_outline_counts_as_mask_of_heat_maps_until_it_is_taken_back(store: Store) -> None:
    items = [write_item(store, make_image(number), None, 1.0) for number in range(2)]
    mask = ellipse(96, 72)

    def said(number: int, outline: str | None, *, deleted: bool = False) -> None:
        now = utc_now()
        row = Annotation(
            id=new_id(), created_at=now, review_item_id=items[0].id, image_id=items[0].image_id,
            kind=AnnotationKind.CLASS, label="mel", annotator="a@x.org", annotated_at=now, outline=outline,
            server="local", project_id=1, task_id=1, annotation_id=number, revision=new_id(), deleted=deleted,
        )  # fmt: skip
        with store.ledger.begin() as tx:
            tx.add(row)

    assert "BrushLabels" not in own_page(store, LabelingSettings(), SHARED)[0]
    images = find_images(store, [item.image_id for item in items])
    index = [image.id for image in images].index(items[0].image_id)
    said(1, outline_of([region(mask)]))
    found = _images(store, images, None)
    square = found.mask(index, Frame(64))
    assert square is not None
    # The square is the centre of the image, as the model sees it.
    assert square.mean() == pytest.approx(mask[:, 12:84].mean(), abs=0.03)
    assert found.mask(1 - index, Frame(64)) is None
    assert "BrushLabels" in own_page(store, LabelingSettings(), SHARED)[0], "Label Studio would refuse its removal"
    said(2, outline_of([region(~mask)]))
    newest = _images(store, images, None).mask(index, Frame(64))
    assert newest is not None
    assert (newest ^ square).mean() > 0.9, "the newest one counts"
    said(2, None, deleted=True)
    back = _images(store, images, None).mask(index, Frame(64))
    assert back is not None
    assert np.array_equal(back, square)


def test_the_page_has_a_brush_only_if_it_is_asked_for(store: Store) -> None:
    assert "BrushLabels" not in label_config(store.taxonomy)
    assert "BrushLabels" not in own_page(store, LabelingSettings(), SHARED)[0]
    assert "BrushLabels" in own_page(store, LabelingSettings(outline=True), SHARED)[0]
    for blind in (False, True):
        assert '<BrushLabels name="outline" toName="image">' in label_config(store.taxonomy, blind=blind, outline=True)


def test_a_painted_annotation_comes_back_with_its_outline(
    store: Store, client: LabelStudioClient, settings: LabelingSettings
) -> None:
    painted = settings.model_copy(update={"outline": True})
    item = write_item(store, make_image(77), None, 1.0)
    report = push(store, client, painted)
    assert (report.pushed, report.unreadable) == (1, [])
    (row,) = (one for page in client.list_tasks(report.project_id or 0) for one in page)
    mask = ellipse(96, 72)
    client.create_annotation(row.id, [*annotation_result("mel"), region(mask)], key=uuid.uuid4())
    assert pull(store, client, painted).new_labels == 1
    with store.ledger.read() as tx:
        (annotation,) = tx.find(Annotation, where={"review_item_id": item.id})
    assert annotation.label == "mel"
    assert decoded(annotation.outline).mean() == pytest.approx(mask.mean(), abs=0.03)
