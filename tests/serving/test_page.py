"""The page in a real browser: upload, answer with its map, flag; nothing from another host; words and widths."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from records.settings import RecordsSettings
from records.store import open_store
from records.types import Flag, ModelStatus, ReviewItem
from serving.page_html import answer_html, flag_html, header_html, problem_html
from serving.schemas import FlagAnswer, PredictionAnswer
from serving.settings import ServingSettings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def page_service(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Any]:
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("page")))
    tools.serve_bundle(opened, tools.make_bundle(opened, 0, bias={"bcc": -2.0}), ModelStatus.PROVISIONAL)
    with tools.run_service(opened, ServingSettings(port=tools.free_port(), max_upload_mb=1.0), page=True) as running:
        yield running
    opened.close()


def open_page(browser: "Browser", url: str, width_px: int) -> tuple["Page", list[str]]:
    """A page of a fresh browser session, and every address that it asked for."""
    page = browser.new_context(viewport={"width": width_px, "height": 900}).new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_selector("#rl-model")
    return page, asked


def upload_and_ask(page: "Page", file: Path) -> None:
    page.set_input_files("#rl-picture input[type=file]", str(file))
    page.wait_for_selector("#rl-picture img")
    page.click("#rl-ask")


@pytest.mark.browser
@pytest.mark.parametrize("width_px", [1280, 390])
def test_a_person_uploads_reads_and_objects(
    browser: "Browser", page_service: Any, picture: Callable[..., bytes], tmp_path: Path, width_px: int
) -> None:
    file = tmp_path / "lesion.jpg"
    file.write_bytes(picture(30 + width_px % 7))
    page, asked = open_page(browser, page_service.url, width_px)
    assert "provisional" in page.inner_text("#rl-model")
    assert not page.is_visible("#rl-flag-form")

    upload_and_ask(page, file)
    page.wait_for_selector("#rl-map img")
    assert "Most likely" in page.inner_text("#rl-decision")
    assert page.locator("#rl-probabilities .rl-bar").count() == 7
    drawn = page.locator("#rl-map img")
    assert drawn.evaluate("image => image.naturalWidth") == page_service.settings.overlay_side_px

    page.get_by_text("Something is wrong with this answer").click()
    page.fill("#rl-comment textarea", f"seen at {width_px}")
    page.click("#rl-flag")
    page.wait_for_selector("#rl-flagged .rl-card")
    assert "goes to an expert" in page.inner_text("#rl-flagged")

    text = page.inner_text("body")
    assert "not a diagnosis" in text
    assert not VERDICTS.search(text)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    assert not [url for url in asked if not url.startswith((page_service.url, "data:", "blob:"))]
    with page_service.store.ledger.read() as tx:
        (flag,) = tx.find(Flag, where={"comment": f"seen at {width_px}"})
        item = tx.require(ReviewItem, flag.review_item_id)
    assert "flagged" in item.reasons
    assert item.overlay_blob is not None
    page.context.close()


@pytest.mark.browser
def test_an_example_is_asked_with_the_keyboard_and_a_wrong_file_is_told(
    browser: "Browser", page_service: Any, tmp_path: Path
) -> None:
    page, _ = open_page(browser, page_service.url, 1280)
    page.locator(".gallery-item, .gallery button, [class*=gallery] img").first.click()
    page.wait_for_selector("#rl-picture img")
    page.focus("#rl-ask")
    page.keyboard.press("Enter")
    page.wait_for_selector("#rl-decision")

    damaged = tmp_path / "broken.png"
    damaged.write_bytes(b"this is no picture")
    page.click("#rl-picture button[aria-label=Clear], #rl-picture button[title=Clear]")
    page.set_input_files("#rl-picture input[type=file]", str(damaged))
    page.wait_for_selector("#rl-picture img")
    page.click("#rl-ask")
    page.wait_for_selector("#rl-result [role=alert]")
    assert "not a picture that Relook reads" in page.inner_text("#rl-result")
    page.context.close()


def test_what_came_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    body = {
        "id": "0" * 32, "request_id": "r", "created_at": "2026-01-01T00:00:00Z", "image_id": "i",
        "model": {"id": "m" * 64, "status": evil}, "label": "nv", "confidence": 0.9, "probabilities": {"nv": 0.9, "mel": 0.1},
        "prediction_set": ["nv"], "decision": "review", "reasons": [{"code": "refer", "text": evil}],
        "review": None, "explanation": None,
    }  # fmt: skip
    html = answer_html(PredictionAnswer.model_validate(body), {"nv": evil, "mel": "Melanoma"}, frozenset({"mel"}))
    flag = {"id": "f", "prediction_id": "0" * 32, "review": {"state": "new"}, "text": evil}
    for text in (html, problem_html(evil), header_html(None, evil), flag_html(FlagAnswer.model_validate(flag))):
        assert "<script>" not in text
        assert not VERDICTS.search(text)
    assert "without consent" in html
