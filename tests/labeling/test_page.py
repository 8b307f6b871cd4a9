"""The labeling page as an expert sees it: a real Label Studio in a real browser."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from records.store import Store
from records.types import ExpertLabel, ReviewItem

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

AddItems = Callable[..., list[ReviewItem]]


def _log_in(page: "Page", server: ServerInfo) -> None:
    page.goto(f"{server.url}/user/login/")
    page.fill("input[name=email]", server.username)
    page.fill("input[name=password]", server.password.get_secret_value())
    page.click("button[type=submit]")
    page.get_by_text("Projects").first.wait_for()


def _is_drawn(picture: "Locator") -> bool:
    picture.wait_for()
    return bool(picture.evaluate("async image => { await image.decode(); return image.naturalWidth > 0; }"))


@pytest.mark.browser
def test_an_expert_sees_picture_and_heat_map_and_the_click_arrives(
    browser: "Browser",
    server: ServerInfo,
    client: LabelStudioClient,
    store: Store,
    settings: LabelingSettings,
    add_items: AddItems,
    tmp_path: Path,
) -> None:
    # Least urgent first, so that the order of the tasks and the order of asking differ.
    add_items(1, first_seed=40)
    first = push(store, client, settings)
    most_urgent = add_items(3, first_seed=50)[0]
    push(store, client, settings)

    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    asked_elsewhere: list[str] = []
    page.on(
        "request",
        lambda r: asked_elsewhere.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None,
    )
    _log_in(page, server)
    page.goto(f"{server.url}/projects/{first.project_id}/data")
    page.get_by_role("button", name="Label All Tasks").click()

    page.get_by_text("Your diagnosis").wait_for()
    page.get_by_text("The model was not sure.").wait_for()
    assert page.get_by_text("age 55, female, back").is_visible()
    picture = page.locator("img[alt=image], img[src^='data:image/jpeg'], img[src^='blob:']").first
    assert _is_drawn(picture)
    assert not page.get_by_text("Melanoma 60%").is_visible(), "the model's opinion is folded away"
    page.screenshot(path=tmp_path / "task.png")
    page.get_by_text("What the model answered").click()
    page.get_by_text("Melanoma 60%").wait_for()
    page.get_by_text("Where the model looked").click()
    page.wait_for_timeout(500)
    page.screenshot(path=tmp_path / "task-heat-map.png")

    page.get_by_text("Dermatofibroma").click()
    page.get_by_placeholder("Comment (optional)").fill("looks firm")
    page.get_by_test_id("bottombar-submit-button").click()
    page.wait_for_timeout(1500)
    page.screenshot(path=tmp_path / "after.png")
    context.close()

    assert pull(store, client, settings).new_labels == 1
    with store.ledger.read() as tx:
        (label,) = tx.find(ExpertLabel)
    assert label.review_item_id == most_urgent.id
    assert (label.label, label.comment) == ("df", "looks firm")
    assert asked_elsewhere == []
