"""The pages for those who are responsible for a model in use: one incident, and the report over all of them.

In: rows of the ledger, stored images and the stored report. Out: self-contained HTML without scripts. An image that
was erased since, or came without consent, is not shown.
"""

import base64
from typing import Any

import numpy as np

from images.decode import decode_frame
from images.overlay import overlay_png
from records.arrays import UInt8Array
from records.errors import RelookError
from records.frames import Crop, Frame
from records.incidents import predictions_of
from records.store import Store, read_image
from records.types import Consent, Image, Incident, IncidentPrediction, Prediction
from records.types.incidents import Evidence
from serving.incidents.bodies import in_common, incident_details
from serving.incidents.report import stored_report
from serving.page.render import render
from serving.words import DISCLAIMER

SIDE_PX, SMALL_PX = 240, 96
SHOWN = 60
"""Affected predictions that the page lists."""
CRITERIA_WORDS = {
    "image": "the same image",
    "score": "a score as close",
    "neighbourhood": "features as close",
    "place": "the same device or institution",
    "label": "the same wrong label",
}


def incident_html(store: Store, name: str) -> str:
    """Return the page of an incident; UnknownIdError if there is none."""
    details = incident_details(store, name)
    with store.ledger.read() as tx:
        incident = tx.require(Incident, details.id)
        case = tx.get(Prediction, incident.prediction_id)
        rows = predictions_of(tx, incident.id)
        evidence = Evidence.model_validate(incident.evidence) if incident.evidence else None
        wanted = {incident.image_id, *(one.image_id for one in (evidence.neighbours if evidence else ()))}
        images = {image.id: image for image in tx.find(Image, where={"id": wanted})}
    return render(
        "incident",
        incident=incident,
        details=details,
        evidence=evidence,
        names={c.code: c.name for c in store.taxonomy.classes},
        context=case.context if case is not None else {},
        case=case,
        shown=_case_images(store, images.get(incident.image_id), evidence),
        neighbours=_neighbours(store, evidence, images),
        in_common=[(CRITERIA_WORDS[name], number) for name, number in in_common(rows).items()],
        affected=[_affected(row) for row in rows[1 : SHOWN + 1]],
        disclaimer=DISCLAIMER,
    )


def incident_report_html(store: Store) -> str:
    """Return the page of the newest report; UnknownIdError if none was made."""
    report = stored_report(store)
    names = {c.code: c.name for c in store.taxonomy.classes}
    return render("incident_report", report=report, key_name=names.get(report.key_class or ""), disclaimer=DISCLAIMER)


def _affected(row: IncidentPrediction) -> dict[str, Any]:
    return {
        "prediction_id": row.prediction_id,
        "criteria": ", ".join(CRITERIA_WORDS[criterion.value] for criterion in row.criteria),
        "truth": row.truth,
    }


def _case_images(store: Store, image: Image | None, evidence: Evidence | None) -> list[tuple[str, str]]:
    """Return (class code or empty, data URI) of the image and of each heat map over it."""
    shown = _shown(store, image, evidence, SIDE_PX)
    if shown is None:
        return []
    maps = evidence.maps if evidence is not None else {}
    drawn = [(code, _uri(shown, np.array(levels, dtype=np.float32))) for code, levels in maps.items()]
    return [("", _uri(shown)), *drawn]


def _neighbours(store: Store, evidence: Evidence | None, images: dict[str, Image]) -> list[dict[str, Any]]:
    found = []
    for one in evidence.neighbours if evidence is not None else ():
        shown = _shown(store, images.get(one.image_id), evidence, SMALL_PX)
        found.append({**one.model_dump(), "uri": None if shown is None else _uri(shown)})
    return found


def _shown(store: Store, image: Image | None, evidence: Evidence | None, side_px: int) -> UInt8Array | None:
    """Return what the model saw of an image; None if it may not be shown, or cannot be read."""
    if image is None or image.erased_at is not None or image.consent is Consent.NONE:
        return None
    try:
        crop = Crop.CENTER if evidence is None else evidence.crop
        return decode_frame(read_image(store, image), Frame(side_px, crop).shown(side_px))
    except RelookError:
        return None  # a file that was moved or damaged since; the page is about more than its pixels


def _uri(shown: UInt8Array, heat_map: Any = None) -> str:
    png = overlay_png(shown, np.zeros((1, 1), dtype=np.float32) if heat_map is None else heat_map)
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
