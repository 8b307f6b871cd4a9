"""Tasks: the labeling page, the content of a task, and the parsing of annotations. Nothing here calls a server.

The choices of the page follow the taxonomy. Class codes are stored as aliases of the choices, so display names may
change. No choice is preselected: the prediction of a task has a score, the negated priority, and an empty result. The
model's prediction is in folded panels until the annotator opens them, and it is missing in blind tasks.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

from PIL import Image as PillowImage

from images.decode import decode_image
from labeling.outlines import CONTROL
from labeling.settings import LabelingSettings
from records.arrays import UInt8Array
from records.images import JPEG_APP1, JPEG_FRAMES, JPEG_ICC, image_size, jpeg_segments, strip_metadata
from records.taxonomy import Taxonomy
from records.types import AnnotationKind, Image, Prediction, ReasonCode, ReviewItem
from records.types.base import LINE, LINES

PRIORITY_VERSION = "relook-priority"
"""Model version of the predictions that order a project. All models share it, since the score is a priority and does
not depend on the model; an open task keeps its place when another model becomes the champion."""

CANT_TELL = "cant-tell"
OTHER = "no-class-fits"  # a hyphen cannot occur in a class code
QUALITIES = ("good", "usable", "unusable")
_COLOURS = 3  # components of a JPEG that is neither grey nor CMYK
_PLAIN_BYTES = 100_000  # a larger JPEG is encoded again, in the quality of the settings

_HIDDEN = tuple(
    f"tasks:{name}"
    for name in (
        "inner_id", "annotations_results", "annotations_ids", "predictions_results", "predictions_model_versions",
        "total_predictions", "file_upload", "storage_filename", "avg_lead_time", "draft_exists", "updated_by",
        "updated_at", "created_at", "data.heatmap", "data.prediction", "data.relook_item", "data.relook_key",
        "data.cases", "data.cases_text",
    )
)  # fmt: skip
LIST_VIEW: dict[str, Any] = {
    "type": "list",
    "title": "Most urgent first",
    "ordering": ["tasks:predictions_score"],
    "hiddenColumns": {"explore": list(_HIDDEN), "labeling": list(_HIDDEN)},
}
"""View of the task list, ordered by priority; annotators get the tasks in the order of the list."""

_REASONS: dict[ReasonCode, str] = {
    ReasonCode.LOW_CONFIDENCE: "The model was not sure.",
    ReasonCode.PREDICTION_SET: "The model could not rule out other diagnoses.",
    ReasonCode.REFER: "The model's score for a malignant diagnosis is above the referral threshold.",
    ReasonCode.URGENT: "The model's score for a malignant diagnosis is high: please read this image first.",
    ReasonCode.OUT_OF_DISTRIBUTION: "The image is unlike those that the model was trained on.",
    ReasonCode.NON_FINITE: "The model could not compute a prediction for this image.",
    ReasonCode.FLAGGED: "A user reported that the model's prediction looks wrong.",
    ReasonCode.AUDIT_SAMPLE: "Drawn at random, to check how well the model works.",
    ReasonCode.SELECTED: "Chosen because a diagnosis of this image would improve the model most.",
    ReasonCode.LABEL_NOISE: "The recorded diagnosis may be wrong: please give a second opinion.",
    ReasonCode.ADJUDICATION: "Earlier diagnoses of this image differ: please decide.",
    ReasonCode.INCIDENT: "A prediction like the one for this image was wrong: please read this image first.",
    ReasonCode.BAD_IMAGE: "The image may be unusable: please check its quality.",
    ReasonCode.DRIFT: "Images of this source have changed lately, so more of them are checked.",
    ReasonCode.GOLD: "Please give your diagnosis.",  # its tasks are blind, and blind tasks show no reason
}


@dataclass(frozen=True)
class ParsedAnnotation:
    """The content of one annotation.

    Args:
        kind: class, can't tell, or other.
        label: class code, if `kind` is a class.
        other_text: what the annotator wrote if no class fits, or why the annotation was not understood.
        image_quality: good, usable or unusable, if it was given.
        comment: what the annotator wrote.
        understood: false if the diagnosis is missing or not one of the page; kept, never trained on.
    """

    kind: AnnotationKind
    label: str | None
    other_text: str | None
    image_quality: str | None
    comment: str | None
    understood: bool = True


def label_config(taxonomy: Taxonomy, *, blind: bool = False, cases: bool = False, outline: bool = False) -> str:
    """Return the XML of the labeling page for a taxonomy.

    Args:
        taxonomy: its classes become the choices, in its order; the first nine get the digits as hotkeys.
        blind: whether to leave out the prediction, the heat map and the cases.
        cases: whether there is a panel for the nearest confirmed cases.
        outline: whether the lesion can be painted.
    Returns:
        XML text; equal taxonomies give equal text.
    """
    page = ElementTree.Element("View", style="display: flex; gap: 24px; align-items: flex-start; flex-wrap: wrap")
    left = ElementTree.SubElement(page, "View", style="flex: 0 1 540px; min-width: 320px")
    ElementTree.SubElement(
        left, "Image", name="image", value="$image", zoom="true", zoomControl="true", rotateControl="true",
        brightnessControl="true", contrastControl="true", selectionControl="false", maxWidth="520px",
    )  # fmt: skip
    if outline:
        ElementTree.SubElement(left, "Header", value="Paint the lesion (optional)", size="6")
        brush = ElementTree.SubElement(left, "BrushLabels", name=CONTROL, toName="image")
        ElementTree.SubElement(brush, "Label", value="Lesion", alias="lesion", background="#0b6e6e")
    if not blind:
        _add_model(left, cases=cases)
    right = ElementTree.SubElement(page, "View", style="flex: 1 1 300px; min-width: 280px")
    ElementTree.SubElement(right, "Header", value="$why", size="4")
    ElementTree.SubElement(right, "Header", value="$about", size="6")
    _add_diagnosis(right, taxonomy)
    _add_quality(right)
    ElementTree.SubElement(
        right, "TextArea", name="comment", toName="image", rows="2", editable="true", maxSubmissions="1",
        placeholder="Comment (optional)",
    )  # fmt: skip
    ElementTree.indent(page)
    return ElementTree.tostring(page, encoding="unicode")


def task_document(
    item: ReviewItem,
    image: Image,
    content: bytes,
    overlay: UInt8Array | None,
    prediction: Prediction | None,
    *,
    taxonomy: Taxonomy,
    settings: LabelingSettings,
    key: str,
    cases: Mapping[str, str] | None = None,
    place: str = "",
    pixels: UInt8Array | None = None,
) -> dict[str, Any]:
    """Return the task of a review item, ready to be imported.

    Args:
        item: says why the image is reviewed, and whether the task is blind.
        image: the record of the image.
        content: the stored bytes of the image.
        overlay: the heat map over the image, [H, W, 3], or None if there is none.
        prediction: the prediction under review, or None for an image without one.
        taxonomy: has the display names of the classes.
        settings: size and quality of the embedded images.
        key: idempotency key (item and project), returned with every listing of tasks.
        cases: what the panel of confirmed cases shows; None for a page without one.
        place: which task of a sitting it is, one sentence; empty outside of sittings.
        pixels: of the image as `data_uri` takes them.
    Returns:
        `data`, `meta` and `predictions` of one task.
    Raises:
        ImageError: the image cannot be decoded.
    """
    texts = _texts(item, overlay, prediction, taxonomy, settings)
    return {
        "data": {
            "image": data_uri(content, settings, pixels),
            **texts,
            "why": f"{place} {texts['why']}".strip(),
            **(cases or {}),
            "about": about_text(image),
            "relook_item": item.id,
            "relook_key": key,
        },
        "meta": {"relook_item": item.id, "relook_key": key},
        "predictions": [{"result": [], "score": -item.priority, "model_version": PRIORITY_VERSION}],
    }


def _texts(
    item: ReviewItem,
    overlay: UInt8Array | None,
    prediction: Prediction | None,
    taxonomy: Taxonomy,
    settings: LabelingSettings,
) -> dict[str, str]:
    """Return the data keys with the reason, the prediction and the heat map; a blind task has only a neutral reason."""
    # Left out of the data and not only of the page, since annotators can open a task's data in Label Studio.
    if item.blind:
        return {"why": "Please give your diagnosis."}
    heat_map = _enlarged_uri(overlay, settings) if overlay is not None else None
    return {
        "why": why_text(item, taxonomy),
        "prediction": prediction_text(prediction, taxonomy),
        "heatmap": heat_map or no_image(settings.image_side_px),
    }


def why_text(item: ReviewItem, taxonomy: Taxonomy) -> str:
    """Return the reasons of a review item in words, with the suggestion and comment of a flag."""
    sentences = [_REASONS[reason] for reason in item.reasons]
    if item.suggested_label is not None:
        sentences.append(f"Suggested instead: {_names(taxonomy).get(item.suggested_label, item.suggested_label)}.")
    if item.comment:
        sentences.append(f"Their comment: “{item.comment}”")
    return " ".join(sentences) or "Please give your diagnosis."


def prediction_text(prediction: Prediction | None, taxonomy: Taxonomy) -> str:
    """Return the three most probable classes with their probabilities, and the classes of the prediction set."""
    if prediction is None:
        return "There is no prediction for this image."
    if prediction.label is None or prediction.probabilities is None:
        return "The model gave no prediction."
    names = _names(taxonomy)
    best = sorted(prediction.probabilities.items(), key=lambda pair: -pair[1])[:3]
    said = " · ".join(f"{names.get(code, code)} {probability:.0%}" for code, probability in best)
    held = [names.get(code, code) for code in prediction.prediction_set]
    return f"{said}. Not ruled out: {', '.join(held)}" if held else said


def about_text(image: Image) -> str:
    """Return age, sex and site as far as they are known; nothing that identifies a patient."""
    known = [
        f"age {image.age_years:g}" if image.age_years is not None else None,
        image.sex,
        image.localization,
    ]
    return ", ".join(word for word in known if word) or "No age, sex or site is recorded."


def data_uri(image: bytes, settings: LabelingSettings, pixels: UInt8Array | None = None) -> str:
    """Return an image as a data URI of at most `image_side_px` on its longer side.

    Args:
        image: JPEG, PNG or WebP bytes.
        settings: longest side and JPEG quality.
        pixels: of the image at that size, if it was decoded already.
    Returns:
        A JPEG data URI, upright, in sRGB, without metadata.
    Raises:
        ImageError: the bytes cannot be decoded.
    """
    if (plain := _plain_jpeg(image, settings.image_side_px)) is not None:
        return _jpeg_uri(plain)
    # The model's decoder, so that annotators see its pixels; browsers show transparency and CMYK in another way.
    pixels = decode_image(image, settings.image_side_px) if pixels is None else pixels
    return _jpeg_uri(_encoded(PillowImage.fromarray(pixels), settings.jpeg_quality))


def _plain_jpeg(image: bytes, side_px: int) -> bytes | None:
    """Return a small JPEG without metadata which every browser shows as the decoder does, None if it is none."""
    if not image.startswith(b"\xff\xd8"):
        return None
    stripped = strip_metadata(image)
    if len(stripped) > _PLAIN_BYTES or max(image_size(stripped)) > side_px:
        return None
    for marker, segment in jpeg_segments(stripped):
        # What is left of its metadata turns the image or says which colours it is in.
        if marker in (JPEG_APP1, JPEG_ICC) or (marker in JPEG_FRAMES and segment[9] != _COLOURS):
            return None
    return stripped


def _enlarged_uri(overlay: UInt8Array, settings: LabelingSettings) -> str:
    """Return a heat map as a data URI whose longer side is `image_side_px`: a folded panel shows it at its own size."""
    small = _jpeg_uri(_encoded(PillowImage.fromarray(overlay), settings.jpeg_quality))
    height_px, width_px = overlay.shape[:2]
    factor = settings.image_side_px / max(height_px, width_px)
    if factor <= 1.0:
        return small
    # The browser enlarges it: encoding an enlarged map took half of a task's time, and half of its bytes.
    size = f'width="{round(width_px * factor)}" height="{round(height_px * factor)}"'
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><image {size} href="{small}"/></svg>'
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode()


def parse_annotation(result: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> ParsedAnnotation:
    """Parse the result of an annotation.

    Args:
        result: its regions, as Label Studio stores them.
        taxonomy: a choice must be one of its codes, CANT_TELL or OTHER.
    Returns:
        The content. A diagnosis that is missing, doubled or unknown becomes `other` with `understood` false and the
        choice in `other_text`: the annotation is kept, and nothing is trained on a guess.
    """
    choices = chosen_values(result, "diagnosis", "choices")
    quality = chosen_values(result, "image_quality", "choices")
    # Kept whatever it holds: it is somebody's work, and a database that cannot hold it would stop the pull.
    comment = LINES.keep("\n".join(chosen_values(result, "comment", "text"))) or None
    wrote = LINES.keep("\n".join(chosen_values(result, "other_text", "text"))) or None
    image_quality = quality[0] if len(quality) == 1 and quality[0] in QUALITIES else None
    if choices == [CANT_TELL]:
        return ParsedAnnotation(AnnotationKind.CANT_TELL, None, None, image_quality, comment)
    if choices == [OTHER]:
        return ParsedAnnotation(AnnotationKind.OTHER, None, wrote, image_quality, comment)
    if len(choices) == 1 and choices[0] in taxonomy.codes:
        return ParsedAnnotation(AnnotationKind.CLASS, choices[0], None, image_quality, comment)
    said = f"not a choice of this project: {', '.join(choices)}" if choices else "no diagnosis was chosen"
    return ParsedAnnotation(AnnotationKind.OTHER, None, LINE.keep(said), image_quality, comment, understood=False)


def annotation_result(label: str) -> list[dict[str, Any]]:
    """Return the regions of an annotation that chooses one diagnosis.

    Args:
        label: class code, or CANT_TELL.
    Returns:
        A result as `parse_annotation` takes it.
    """
    return [{"from_name": "diagnosis", "to_name": "image", "type": "choices", "value": {"choices": [label]}}]


def _add_model(left: ElementTree.Element, *, cases: bool) -> None:
    """Add prediction, heat map and cases in folded panels, so that annotators look at the image first."""
    folds = ElementTree.SubElement(left, "Collapse", accordion="false")
    prediction = ElementTree.SubElement(folds, "Panel", value="Model's prediction")
    ElementTree.SubElement(prediction, "Header", value="$prediction", size="5")
    looked = ElementTree.SubElement(folds, "Panel", value="Where the model looked")
    ElementTree.SubElement(
        looked, "Image", name="heatmap", value="$heatmap", zoom="true", zoomControl="true", selectionControl="false",
        maxWidth="520px",
    )  # fmt: skip
    if cases:
        alike = ElementTree.SubElement(folds, "Panel", value="Nearest confirmed cases")
        ElementTree.SubElement(alike, "Header", value="$cases_text", size="6")
        ElementTree.SubElement(
            alike, "Image", name="cases", value="$cases", zoom="true", zoomControl="true", selectionControl="false",
            maxWidth="520px",
        )  # fmt: skip


def _add_diagnosis(parent: ElementTree.Element, taxonomy: Taxonomy) -> None:
    ElementTree.SubElement(parent, "Header", value="Your diagnosis", size="5")
    choices = ElementTree.SubElement(
        parent, "Choices", name="diagnosis", toName="image", choice="single-radio", required="true",
        requiredMessage="Choose a diagnosis or Can't tell.", showInline="false",
    )  # fmt: skip
    names = _names(taxonomy)
    for number, code in enumerate(taxonomy.codes, start=1):
        choice = ElementTree.SubElement(choices, "Choice", value=names[code], alias=code)
        if number <= 9:
            choice.set("hotkey", str(number))
    ElementTree.SubElement(choices, "Choice", value="Can't tell", alias=CANT_TELL, hotkey="0")
    ElementTree.SubElement(choices, "Choice", value="Other diagnosis", alias=OTHER)
    only_other = ElementTree.SubElement(
        parent, "View", visibleWhen="choice-selected", whenTagName="diagnosis", whenChoiceValue="Other diagnosis"
    )
    ElementTree.SubElement(
        only_other, "TextArea", name="other_text", toName="image", rows="1", editable="true", maxSubmissions="1",
        placeholder="Which diagnosis?",
    )  # fmt: skip


def _add_quality(parent: ElementTree.Element) -> None:
    ElementTree.SubElement(parent, "Header", value="Image quality (optional)", size="5")
    choices = ElementTree.SubElement(
        parent, "Choices", name="image_quality", toName="image", choice="single-radio", showInline="true"
    )
    for quality in QUALITIES:
        ElementTree.SubElement(choices, "Choice", value=quality.capitalize(), alias=quality)


def _names(taxonomy: Taxonomy) -> dict[str, str]:
    """Return display names by code; equal names get their code added."""
    names = [c.name for c in taxonomy.classes]
    return {c.code: c.name if names.count(c.name) == 1 else f"{c.name} ({c.code})" for c in taxonomy.classes}


def chosen_values(result: Sequence[Mapping[str, Any]], control: str, kind: str) -> list[str]:
    """Return what an annotation says in one control, as texts; a choice in a tree is its path, as in `skin/mole`."""
    found: list[str] = []
    for region in result:
        value = region.get("value")
        if region.get("from_name") == control and isinstance(value, Mapping):
            inner = value.get(kind)
            said = inner if isinstance(inner, list) else [inner] if isinstance(inner, str) else ()
            found.extend("/".join(map(str, one)) if isinstance(one, list) else str(one) for one in said)
    return found


def _jpeg_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _encoded(image: PillowImage.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@lru_cache(maxsize=4)
def no_image(side_px: int) -> str:
    # Label Studio refuses a task without a key that its page uses, and an empty value shows as a broken image.
    return _jpeg_uri(_encoded(PillowImage.new("RGB", (side_px // 4, side_px // 8), (221, 221, 221)), 50))
