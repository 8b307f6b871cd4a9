"""The labeling page as an annotator sees it: a real Label Studio in a real browser."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image as PillowImage
from playwright.sync_api import expect

from images.overlay import overlay_png
from images.synth import render
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from records.store import Store
from records.types import Annotation, ReviewItem

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page


PATIENCE_MS = 600_000


def _log_in(page: "Page", server: ServerInfo) -> None:
    page.goto(f"{server.url}/user/login/")
    page.fill("input[name=email]", server.username)
    page.fill("input[name=password]", server.password.get_secret_value())
    page.click("button[type=submit]")
    page.get_by_text("Projects").first.wait_for()


def _is_drawn(shown: "Locator") -> bool:
    shown.wait_for()
    return bool(shown.evaluate("async image => { await image.decode(); return image.naturalWidth > 0; }"))


def _lesion(number: int) -> tuple[bytes, bytes]:
    """A generated image, and a map drawn over it that is strongest in the middle."""
    data = render("mel" if number % 2 else "nv", seed=7, number=number, width_px=400)
    y, x = np.mgrid[-1:1:14j, -1:1:14j]
    with PillowImage.open(io.BytesIO(data)) as opened:
        return data, overlay_png(np.asarray(opened.convert("RGB")), np.exp(-5 * (x**2 + (y - 0.1) ** 2)))


def _annotate(page: "Page", diagnosis: str, comment: str) -> None:
    """Click a diagnosis, write a comment, submit, and wait until the next task was requested."""
    chosen = page.locator("input[type=radio]:checked")
    expect(chosen).to_have_count(0)
    page.locator("label").filter(has_text=diagnosis).first.click()
    expect(chosen).to_have_count(1)
    page.get_by_placeholder("Comment (optional)").fill(comment)
    with page.expect_response(lambda r: "next_task" in r.url):
        page.get_by_test_id("bottombar-submit-button").click()


@pytest.mark.browser
def test_an_annotator_sees_image_and_heat_map_and_clicks_arrive_in_the_order_of_priority(
    browser: "Browser",
    server: ServerInfo,
    client: LabelStudioClient,
    store: Store,
    settings: LabelingSettings,
    add_item: Callable[[bytes, bytes, float], ReviewItem],
    tmp_path: Path,
) -> None:
    # In two pushes, and neither by priority, so that the order of the task ids and the order shown differ.
    items = [add_item(*_lesion(number), priority) for number, priority in enumerate((20.0, 5.0))]
    first = push(store, client, settings)
    items += [add_item(*_lesion(number + 2), priority) for number, priority in enumerate((30.0, 1.0, 10.0))]
    push(store, client, settings)
    by_priority = sorted(items, key=lambda item: -item.priority)

    context = browser.new_context(viewport={"width": 1400, "height": 1300})
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    requested_elsewhere: list[str] = []
    page.on(
        "request",
        lambda r: requested_elsewhere.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None,
    )
    _log_in(page, server)
    page.goto(f"{server.url}/projects/{first.project_id}/data")
    page.get_by_role("button", name="Label All Tasks").click()

    page.get_by_text("Your diagnosis").wait_for()
    page.get_by_text("The model was not sure.").wait_for()
    assert page.get_by_text("age 55, female, back").is_visible()
    images = page.get_by_alt_text("image", exact=True)
    image, heat_map = images.first, images.nth(1)
    assert _is_drawn(image)
    expect(heat_map).to_be_hidden()
    assert not page.get_by_text("Melanoma 60%").is_visible(), "the model's prediction is folded away"
    page.screenshot(path=tmp_path / "label-task.png")
    page.get_by_text("Model's prediction", exact=True).click()
    page.get_by_text("Melanoma 60%").wait_for()
    page.get_by_text("Where the model looked").click()
    assert _is_drawn(heat_map)
    page.wait_for_timeout(500)  # the fold is still opening
    page.screenshot(path=tmp_path / "label-task-heat-map.png")
    page.get_by_text("Where the model looked").click()
    expect(heat_map).to_be_hidden()

    diagnoses = ("Dermatofibroma", "Melanoma", "Melanocytic nevus", "Can't tell", "Basal cell carcinoma")
    for number, diagnosis in enumerate(diagnoses, start=1):
        _annotate(page, diagnosis, f"looked at number {number}")
    context.close()

    assert pull(store, client, settings).new_labels == 5
    with store.ledger.read() as tx:
        labels = tx.find(Annotation, order_by=("annotated_at",))
    assert [label.review_item_id for label in labels] == [item.id for item in by_priority]
    assert [label.label for label in labels] == ["df", "mel", "nv", None, "bcc"]
    assert [label.comment for label in labels] == [f"looked at number {n}" for n in range(1, 6)]
    assert requested_elsewhere == []
