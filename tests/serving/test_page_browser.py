"""The page in a headless Chromium, at desktop and phone width: every tab, from upload to an annotation.

RELOOK_SCREENSHOTS=FOLDER keeps screenshots there, and trains a small model first, so that they show the page with the
metrics of a real model. All images on them are generated.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from records.bundles import Bundle, read_bundle
from records.ids import new_id, utc_now
from records.models import register
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AnnotationKind,
    Consent,
    Decision,
    Flag,
    ModelRecord,
    ModelStatus,
    ReviewItem,
    ReviewState,
    RoundRecord,
    RoundStep,
)
from serving.access.keys import admin_token
from serving.client import Client
from serving.schemas import Context
from serving.settings import ServingSettings
from tests.dicoms import dicom, disk, shipped
from tests.serving.label_values import measured_labels, round_value

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# Gradio counts its events in ways that the newest pandas calls old.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy)\b", re.IGNORECASE)
WIDTHS = {1280: "", 390: "_phone"}
WANTED = os.environ.get("RELOOK_SCREENSHOTS")
TIMEOUT_MS = 600_000
BAND = {"lesions": 40, "right": 31}
VAL = {
    "images": 120, "lesions": 90, "balanced_accuracy": 0.71, "balanced_accuracy_ci": [0.62, 0.79], "accuracy": 0.8,
    "per_class": {"mel": {"support": 14, "sensitivity": 0.79, "sensitivity_ci": [0.49, 0.95], "specificity": 0.9}},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[tuple[Store, Bundle, Bundle]]:
    """A store, the champion, and a candidate."""
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("page") / "home"))
    bands = [{"low": tenth / 10, "high": (tenth + 1) / 10, **BAND} for tenth in range(10)]
    champion = tools.make_bundle(
        store, 0, bias={"bcc": -2.0}, metrics={"calibration": {"scores": bands}, "val": VAL}
    )  # fmt: skip
    if WANTED:
        champion = _trained(store, tmp_path_factory.mktemp("trained"))
    candidate = tools.make_bundle(store, 1)
    tools.serve_bundle(store, champion)
    with store.ledger.begin() as tx:
        register(tx, candidate, status=ModelStatus.CANDIDATE)
    (champion.path / "report").mkdir(exist_ok=True)
    (champion.path / "report" / "report.html").write_text("<h1>A report of the champion</h1>")
    _add_rounds(store, champion)
    yield store, champion, candidate
    store.close()


@pytest.fixture(scope="module")
def url(models: tuple[Store, Bundle, Bundle], tools: Any) -> Iterator[str]:
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.5, overlay_side_px=384 if WANTED else 256)
    with tools.run_service(models[0], settings, page=True) as running:
        yield running.url


def _trained(store: Store, folder: Path) -> Bundle:
    home = {**os.environ, "RELOOK_HOME": str(store.home.root)}
    for arguments in (
        ["data", "synth", str(folder), "--lesions", "240"],
        ["data", "import", str(folder)],
        ["train", "--set", "trainers.epochs=10"],
    ):
        subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], env=home, check=True)
    (path,) = (p for p in store.home.bundles.iterdir() if (p / "report").is_dir())
    return read_bundle(path)


def _add_rounds(store: Store, bundle: Bundle) -> None:
    figures = [(0, 0.48, 0.09), (60, 0.55, 0.08), (140, 0.61, 0.08), (230, 0.64, 0.07)]
    with store.ledger.begin() as tx:
        for number, (labels, accuracy, half) in enumerate(figures, 1):
            now = utc_now()
            record = RoundRecord(
                id=new_id(), number=number, started_at=now, finished_at=now, seed=0, settings_hash="s",
                model_id=bundle.id, verdict="promote", why="better, and no worse where it counts",
            )  # fmt: skip
            test = {
                "lesions": 90,
                "balanced_accuracy": accuracy,
                "balanced_accuracy_ci": [accuracy - half, accuracy + half],
            }
            results = {
                "version": {"images": 600 + labels, "labels_from_annotators": labels},
                "evaluate": {"test": test},
            }
            steps = [
                RoundStep(id=new_id(), round_id=record.id, step=step, started_at=now, finished_at=now, result=result)
                for step, result in results.items()
            ]
            tx.add(record, *steps)
        tx.add(measured_labels(round_value()))


@pytest.mark.slow
@pytest.mark.browser
# The narrow page is also opened by the tests on Ray.
@pytest.mark.parametrize("width_px", [1280, pytest.param(390, marks=pytest.mark.soak)])
def test_every_tab_from_upload_to_annotation(
    browser: "Browser", url: str, models: tuple[Store, Bundle, Bundle], make_image: Callable[..., bytes],
    tmp_path: Path,
    width_px: int,
) -> None:  # fmt: skip
    store, _, candidate = models
    folder = Path(WANTED) if WANTED else tmp_path
    file = tmp_path / "lesion.jpg"
    file.write_bytes(_review_images(url, make_image)[list(WIDTHS).index(width_px)])
    page = browser.new_context(viewport={"width": width_px, "height": 900}).new_page()
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    page.wait_for_selector("#rl-model")

    _upload_and_predict(page, file)
    _image(page, folder / f"page{WIDTHS[width_px]}.png", width_px)
    _change_the_map(page)
    _flag_and_see_the_annotation(page, store, width_px)
    page.get_by_role("tab", name="History").click()
    page.wait_for_selector("#rl-history .rl-past")
    assert "Annotator: " in page.inner_text("#rl-history .rl-past >> nth=0")
    _image(page, folder / f"page_history{WIDTHS[width_px]}.png", width_px)
    _move_a_rollout(page, store, candidate)
    _image(page, folder / f"page_models{WIDTHS[width_px]}.png", width_px)
    page.click("#rl-rollout-back")
    page.wait_for_selector("#rl-rollout >> text=rolled back")
    with store.ledger.begin() as tx:
        tx.update(ModelRecord, candidate.id, status=ModelStatus.CANDIDATE)
    page.get_by_role("tab", name="Rounds").click()
    page.wait_for_selector("#rl-rounds .rl-plot")
    assert "round 4: 230 labels, 64 %" in (page.locator("#rl-rounds .rl-plot").first.get_attribute("alt") or "")
    assert "+1.2 points (+0.4 to +2.0)" in page.inner_text("#rl-label-value")
    _image(page, folder / f"page_rounds{WIDTHS[width_px]}.png", width_px)

    assert not [address for address in requested if not address.startswith((url, "data:", "blob:"))]
    page.context.close()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.browser
def test_a_dicom_file_is_chosen_shown_and_predicted(browser: "Browser", url: str, tmp_path: Path) -> None:
    good, bad = tmp_path / "DOE^JANE", tmp_path / "bad.dcm"
    good.write_bytes(dicom(disk((60, 40, 30), 5), PatientName="DOE^JANE"))
    bad.write_bytes(shipped("MR_small_jpeg_ls_lossless.dcm"))
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    page.wait_for_selector("#rl-model")
    for file in (bad, good):
        with page.expect_file_chooser() as chosen:
            page.click("#rl-dicom")
        chosen.value.set_files(str(file))
        page.wait_for_selector("text=JPEG-LS Lossless" if file is bad else "#rl-image img[src$='dicom.png']")
    page.click("#rl-predict")
    page.wait_for_selector("#rl-map .heat")
    assert "JANE" not in page.content()
    page.context.close()


def _review_images(url: str, make_image: Callable[..., bytes]) -> list[bytes]:
    """Return an image for each width whose prediction goes to review; with consent none, nothing is stored."""
    found: list[bytes] = []
    with Client(url) as client:
        for number in range(60, 120):
            prediction = client.predict(make_image(number), context=Context(consent=Consent.NONE))
            found += [make_image(number)] if prediction.decision is Decision.REVIEW and prediction.label else []
            if len(found) == len(WIDTHS):
                return found
    raise AssertionError("none of sixty images goes to review")


def _upload_and_predict(page: "Page", file: Path) -> None:
    with page.expect_response(lambda response: response.url.endswith(file.name)):
        page.set_input_files("#rl-image input[type=file]", str(file))
    page.click("#rl-predict")
    page.wait_for_selector("#rl-map .heat")
    assert "Most likely" in page.inner_text("#rl-decision")
    assert "Reasons for review" in page.inner_text("#rl-reasons")
    assert re.search(r"Of \d+ lesions in the calibration split", page.inner_text("#rl-accuracy"))
    assert re.search(r"cannot be excluded|The set is empty", page.inner_text("#rl-set"))
    assert "Queued for review" in page.inner_text("#rl-review")


def _change_the_map(page: "Page") -> None:
    heat = page.locator("#rl-map .heat")
    before = float(heat.evaluate("image => getComputedStyle(image).opacity"))
    slider = page.locator("#rl-opacity input[type=range]")
    slider.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"getComputedStyle(document.querySelector('#rl-map .heat')).opacity < {before} - 0.15")
    first = heat.get_attribute("src")
    page.get_by_label("Occlusion").check()
    page.wait_for_selector("#rl-map >> text=Method: Occlusion")
    assert heat.get_attribute("src") != first
    assert float(heat.evaluate("image => getComputedStyle(image).opacity")) < before - 0.15


def _flag_and_see_the_annotation(page: "Page", store: Store, width_px: int) -> None:
    comment = f"seen at {width_px}"
    page.get_by_text("Flag this prediction").click()
    page.fill("#rl-comment textarea", comment)
    page.click("#rl-flag")
    page.wait_for_selector("#rl-flagged .rl-card")
    assert "goes to an annotator" in page.inner_text("#rl-flagged")
    with store.ledger.begin() as tx:
        (flag,) = tx.find(Flag, where={"comment": comment})
        item = tx.require(ReviewItem, flag.review_item_id)
        number = int(item.image_id[:6], 16)
        annotation = Annotation(
            id=new_id(), created_at=utc_now(), review_item_id=item.id, image_id=item.image_id,
            kind=AnnotationKind.CLASS, label="mel", annotator="a", annotated_at=utc_now(), server="test",
            project_id=1, task_id=number, annotation_id=number, revision="1",
        )  # fmt: skip
        tx.add(annotation)
        tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED, answered_at=utc_now())
    # No click: the page polls the review by itself.
    page.wait_for_selector("#rl-review >> text=Annotator: Melanoma")


def _move_a_rollout(page: "Page", store: Store, candidate: Bundle) -> None:
    page.get_by_role("tab", name="Models").click()
    page.wait_for_selector("#rl-models table")
    assert not page.is_visible("#rl-admin")
    page.get_by_text("Sign in with an API key").click()
    page.fill("#rl-key input", admin_token(store.home))
    page.click("#rl-sign-in-button")
    page.wait_for_selector("#rl-caller >> text=Scopes: admin")
    page.wait_for_selector("#rl-admin")
    _choose(page, "#rl-model-choice", "champion")
    page.wait_for_selector("#rl-details")
    page.click("#rl-report-open")
    page.wait_for_selector("#rl-report iframe")
    _choose(page, "#rl-model-choice", candidate.id[:12])
    page.wait_for_selector(f"#rl-details >> text={candidate.id[:12]}")
    _choose(page, "#rl-model-choice", "champion")
    page.wait_for_selector("#rl-report iframe", state="detached")
    _choose(page, "#rl-model-choice", candidate.id[:12])
    page.click("#rl-rollout-start")
    page.wait_for_selector("#rl-rollout >> text=Rollout: shadow")
    _choose(page, "#rl-model-choice", "champion")
    page.wait_for_selector("#rl-details table")


def _choose(page: "Page", dropdown: str, words: str) -> None:
    page.click(f"{dropdown} input")
    page.get_by_role("option").filter(has_text=words).click()


def _image(page: "Page", path: Path, width_px: int) -> None:
    """Keep an image of the whole page, and hold what it shows to what every page must keep."""
    text = page.inner_text("body")
    assert "not a diagnosis" in text
    assert not VERDICTS.search(text)
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    page.screenshot(path=path, full_page=True)
    if WANTED:
        # A palette is enough for a page, and a third of the size.
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
