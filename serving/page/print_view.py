"""One prediction as a page to print: image, heat map, probabilities, prediction set, context and model.

In: a stored prediction, and its heat map if there is one. Out: self-contained HTML without scripts, two A4 sides at
most unless the taxonomy is large. An image that was erased, or came without consent, is not shown, nor is its context.
"""

import base64
from datetime import datetime

from images.decode import decode_frame
from images.overlay import image_png
from records.errors import RelookError
from records.frames import Crop, Frame
from records.store import Store, read_image
from records.types import Consent, Image, Prediction, ReviewItem
from serving.messages import HeatMap
from serving.page.heat_map import method_text
from serving.page.prediction_view import NOT_KNOWN, accuracy_text, context_text, label_text, set_text, state_text
from serving.page.render import render
from serving.registry import model_details
from serving.responses import explanation_body, prediction_body
from serving.schemas import ModelDetails
from serving.words import DECISION_TITLES, DISCLAIMER

SIDE_PX = 360


def print_html(
    store: Store, prediction: Prediction, review: ReviewItem | None, heat_map: HeatMap | None, now: datetime
) -> str:
    """Return the page.

    Args:
        store: with the image and the model.
        prediction: that the caller may see.
        review: its review item, if there is one.
        heat_map: of the label; None if there is none.
        now: when it is printed.
    Returns:
        HTML.
    """
    body = prediction_body(prediction, review, heat_map, store.taxonomy)
    names = {c.code: c.name for c in store.taxonomy.classes}
    details = _details(store, prediction.model_id)
    accuracy = NOT_KNOWN
    if details is not None and body.confidence is not None:
        accuracy = accuracy_text(body.confidence, details.scores)
    return render(
        "print",
        prediction=body,
        precision=prediction.precision,
        title=DECISION_TITLES[prediction.decision],
        names=names,
        malignant=frozenset(store.taxonomy.malignant_codes),
        likely=sorted((body.probabilities or {}).items(), key=lambda pair: -pair[1]),
        accuracy=accuracy,
        label_text=label_text(body, names, details),
        context_text=context_text(body, names),
        prediction_set=set_text(body.prediction_set, names, details, body.label),
        context=prediction.context,
        state=None if body.review is None else state_text(body.review),
        details=details,
        image=_image(store, prediction, Crop.CENTER if details is None else details.crop),
        heat_map=None if body.explanation is None else body.explanation.png_base64,
        method="" if heat_map is None else method_text(explanation_body(heat_map)),
        disclaimer=DISCLAIMER,
        now=now,
    )


def _details(store: Store, model_id: str) -> ModelDetails | None:
    try:
        return model_details(store, model_id)
    except RelookError:
        return None  # a model whose bundle is gone; what it predicted is stored


def _image(store: Store, prediction: Prediction, crop: Crop) -> str | None:
    """Return what the model saw of the image as base64; None where it may not be shown or is not there."""
    with store.ledger.read() as tx:
        image = tx.get(Image, prediction.image_id)
    if image is None or image.erased_at is not None or prediction.consent is Consent.NONE:
        return None
    try:
        return base64.b64encode(
            image_png(decode_frame(read_image(store, image), Frame(SIDE_PX, crop).shown(SIDE_PX)))
        ).decode()
    except RelookError:
        return None
