"""The labeling page, the task format, and the parsing of annotations; no server."""

import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from label_studio_sdk.label_interface import LabelInterface
from PIL import Image as PillowImage
from PIL import ImageCms

from labeling.settings import LabelingSettings
from labeling.tasks import (
    CANT_TELL,
    OTHER,
    PRIORITY_VERSION,
    about_text,
    annotation_result,
    data_uri,
    label_config,
    parse_annotation,
    prediction_text,
    task_document,
    why_text,
)
from records.errors import ImageError
from records.ids import utc_now
from records.taxonomy import DiagnosisClass, Taxonomy, load_taxonomy
from records.types import AnnotationKind, Decision, Image, Prediction, ReasonCode, ReviewItem
from tests.labeling.conftest import drawing_of

HAM = load_taxonomy("ham10000")
SETTINGS = LabelingSettings()


def _encoded(side: tuple[int, int], kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side[1], side[0], 3)).astype(np.uint8)
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _opened(uri: str) -> PillowImage.Image:
    head, body = uri.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return PillowImage.open(io.BytesIO(base64.b64decode(body)))


def _item(**changes: object) -> ReviewItem:
    base = ReviewItem(
        id="item",
        created_at=utc_now(),
        image_id="f" * 64,
        reasons=[ReasonCode.FLAGGED],
        priority=7.5,
        comment="looks <b>odd</b>",
        suggested_label="mel",
    )
    return base.model_copy(update=changes)


def _image(**changes: object) -> Image:
    base = Image(
        id="f" * 64,
        uri="file:///x",
        format="jpeg",
        width_px=8,
        height_px=8,
        provenance="served",
        created_at=utc_now(),
        patient_hash="secret",
        source_id="ISIC_0000001",
    )
    return base.model_copy(update=changes)


def _prediction(**changes: object) -> Prediction:
    base = Prediction(
        id="p",
        request_id="r",
        created_at=utc_now(),
        caller="local",
        image_id="f" * 64,
        model_id="m",
        model_status="champion",
        engine="torch",
        precision="fp32",
        num_threads=1,
        settings_hash="s",
        label="nv",
        confidence=0.5,
        probabilities={"akiec": 0.0, "bcc": 0.1, "bkl": 0.1, "df": 0.0, "mel": 0.3, "nv": 0.5, "vasc": 0.0},
        decision=Decision.REVIEW,
        latency_ms=1,
    )
    return base.model_copy(update=changes)


def test_the_page_follows_the_taxonomy() -> None:
    page = ElementTree.fromstring(label_config(HAM))
    choices = page.findall(".//Choices[@name='diagnosis']/Choice")
    assert [c.get("alias") for c in choices] == [*HAM.codes, CANT_TELL, OTHER]
    assert [c.get("value") for c in choices][:2] == ["Actinic keratosis / Bowen's disease", "Basal cell carcinoma"]
    assert [c.get("hotkey") for c in choices] == ["1", "2", "3", "4", "5", "6", "7", "0", None]
    values = {tag.get("value") for tag in page.iter() if (tag.get("value") or "").startswith("$")}
    document = task_document(
        _item(), _image(), _encoded((8, 8), "JPEG"), None, None, taxonomy=HAM, settings=SETTINGS, key="k"
    )
    assert {value.removeprefix("$") for value in values if value} <= set(document["data"])
    assert label_config(HAM) == label_config(load_taxonomy("ham10000"))


def test_label_studios_own_validator_accepts_page_and_annotations() -> None:
    page = LabelInterface(label_config(HAM))
    assert page.validate() is None
    assert page.validate_annotation({"result": annotation_result("mel")})


def test_classes_with_one_display_name_are_told_apart() -> None:
    twice = Taxonomy(
        name="t",
        version=1,
        classes=tuple(DiagnosisClass(code=code, name='A "<b>" & co', malignant=False) for code in ("one", "two")),
    )
    choices = ElementTree.fromstring(label_config(twice)).findall(".//Choices[@name='diagnosis']/Choice")
    assert [c.get("value") for c in choices][:2] == ['A "<b>" & co (one)', 'A "<b>" & co (two)']


def test_more_than_nine_classes_keep_their_digits_apart() -> None:
    many = Taxonomy(
        name="t",
        version=1,
        classes=tuple(DiagnosisClass(code=f"c{n}", name=f"C{n}", malignant=False) for n in range(12)),
    )
    choices = ElementTree.fromstring(label_config(many)).findall(".//Choices[@name='diagnosis']/Choice")
    keys = [c.get("hotkey") for c in choices if c.get("hotkey") is not None]
    assert keys == [*"123456789", "0"]


def test_a_task_has_key_and_score_and_no_preselected_choice() -> None:
    document = task_document(
        _item(),
        _image(),
        _encoded((600, 450), "JPEG"),
        np.zeros((64, 64, 3), np.uint8),
        _prediction(),
        taxonomy=HAM,
        settings=SETTINGS,
        key="item[relook:x]",
    )
    assert document["predictions"] == [{"result": [], "score": -7.5, "model_version": PRIORITY_VERSION}]
    assert document["meta"] == {"relook_item": "item", "relook_key": "item[relook:x]"}
    assert _opened(document["data"]["image"]).size == (512, 384)
    size, drawn = drawing_of(document["data"]["heatmap"])
    assert size == {"width": "512", "height": "512"}, "a folded panel shows an image at its own size"
    assert _opened(drawn).size == (64, 64)
    assert "secret" not in str(document)
    assert "ISIC" not in str(document)


def test_the_texts_of_a_task() -> None:
    why = why_text(_item(), HAM)
    assert why == (
        "A user reported that the model's prediction looks wrong. Suggested instead: Melanoma. "
        "Their comment: “looks <b>odd</b>”"
    )
    for reason in ReasonCode:
        assert why_text(_item(reasons=[reason], comment=None, suggested_label=None), HAM).endswith((".", "first."))
    assert prediction_text(_prediction(), HAM) == "Melanocytic nevus 50% · Melanoma 30% · Basal cell carcinoma 10%"
    assert prediction_text(_prediction(label=None, probabilities=None), HAM) == "The model gave no prediction."
    assert prediction_text(None, HAM) == "There is no prediction for this image."
    assert about_text(_image(age_years=55.0, sex="male")) == "age 55, male"
    assert about_text(_image()) == "No age, sex or site is recorded."


def test_images_are_reduced_to_the_longest_side_and_never_enlarged() -> None:
    assert _opened(data_uri(_encoded((500, 400), "JPEG"), SETTINGS)).size == (500, 400)
    assert _opened(data_uri(_encoded((500, 400), "PNG"), SETTINGS)).size == (500, 400)
    assert _opened(data_uri(_encoded((1024, 100), "WEBP"), SETTINGS)).size == (512, 50)


def test_only_a_small_plain_jpeg_is_sent_as_it_is() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = PillowImage.Exif()
    exif[0x010F] = "a camera"
    plain = _encoded((200, 150), "JPEG")

    def sent(data: bytes) -> bytes:
        return base64.b64decode(data_uri(data, SETTINGS).partition(",")[2])

    assert sent(plain) == plain
    assert sent(_encoded((200, 150), "JPEG", exif=exif)) == plain, "without its metadata"
    grey = io.BytesIO()
    PillowImage.new("CMYK", (64, 64)).save(grey, "JPEG")
    large = io.BytesIO()
    PillowImage.effect_noise((500, 500), 90).convert("RGB").save(large, "JPEG", quality=100)
    others = (_encoded((200, 150), "JPEG", icc_profile=profile), _encoded((600, 100), "JPEG"), grey.getvalue())
    for data in (*others, large.getvalue(), _encoded((64, 64), "PNG")):
        assert sent(data) != data
        assert sent(data).startswith(b"\xff\xd8")
    assert len(sent(large.getvalue())) < len(large.getvalue())


def test_orientation_and_profile_are_applied() -> None:
    exif = PillowImage.Exif()
    exif[0x0112] = 6  # stored lying on its side
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = _opened(data_uri(_encoded((1000, 500), "JPEG", exif=exif, icc_profile=profile), SETTINGS))
    assert turned.size == (256, 512)
    assert "icc_profile" not in turned.info, "the pixels are in sRGB already"
    assert not turned.getexif(), "nor may a viewer turn them again"


@pytest.mark.parametrize("data", [b"", b"GIF89a", _encoded((64, 64), "JPEG")[:400], _encoded((600, 600), "PNG")[:900]])
def test_damaged_images_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        data_uri(data, SETTINGS)


@pytest.mark.parametrize("code", HAM.codes)
def test_each_class_reads_back(code: str) -> None:
    parsed = parse_annotation(annotation_result(code), HAM)
    assert (parsed.kind, parsed.label, parsed.understood) == (AnnotationKind.CLASS, code, True)


def test_other_annotations_are_kept_and_those_not_understood_are_marked() -> None:
    assert parse_annotation(annotation_result(CANT_TELL), HAM).kind is AnnotationKind.CANT_TELL
    assert parse_annotation(annotation_result(OTHER), HAM).understood
    for result in ([], annotation_result("naevus"), [*annotation_result("mel"), *annotation_result("nv")]):
        parsed = parse_annotation(result, HAM)
        assert (parsed.kind, parsed.label, parsed.understood) == (AnnotationKind.OTHER, None, False)
    assert "mel, nv" in str(parse_annotation([*annotation_result("mel"), *annotation_result("nv")], HAM).other_text)
    assert parse_annotation([{"from_name": "diagnosis"}, {"value": None}], HAM).other_text == "no diagnosis was chosen"
