"""Which other predictions resemble one that missed the true class, and may have missed it as well.

In: the prediction, the true class and what its model saw. Out: predictions that went to their callers without a
referral, each with what it has in common. A shared score and label alone do not count, since most harmless images
share them too: something about the image has to agree, its place (device or institution) or its features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log

import numpy as np

from cluster.incidents.evidence import BATCH, Seen, described
from images.decode import decode_frame
from records.errors import UnavailableError
from records.parts import attempt
from records.store import Store, read_image
from records.types import Consent, Decision, Image, Prediction, ReasonCode
from records.types.incidents import Criterion

LOOKED_AT = 10_000
"""Served predictions of a model that are compared, the newest."""
SCORE_FACTOR = 2.0
"""Odds of the true class count as close if they differ by no more than this factor."""
REACH_FACTOR = 1.5
"""Features count as close within this many times the distance to the image's neighbours among training images."""
AGREEING = 2
"""Criteria that have to agree."""


@dataclass(frozen=True)
class Affected:
    """A prediction that resembles that of an incident."""

    prediction: Prediction
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Place:
    """Where an image was taken, as far as it is known."""

    device: str | None
    site: str | None

    def agrees(self, other: "Place") -> bool:
        """Return whether device or institution are the same."""
        return (self.device is not None and self.device == other.device) or (
            self.site is not None and self.site == other.site
        )


def find_affected(store: Store, case: Prediction, truth: str, seen: Seen) -> tuple[list[Affected], int, int]:
    """Find predictions that may have missed the true class like that of an incident.

    Args:
        store: with the predictions of its model.
        case: the incident's prediction.
        truth: class code.
        seen: what the model saw in it.
    Returns:
        They, those that have most in common first; how many predictions were compared, and of how many.
    """
    where = {"model_id": case.model_id, "served": True}
    with store.ledger.read() as tx:
        total = tx.count(Prediction, where)
        newest = tx.find(Prediction, where, order_by=("-created_at", "-id"), limit=LOOKED_AT)
        others = [one for one in newest if one.id != case.id and not was_handled(one, truth)]
        images = _images_of(store, [case, *others])
    place = _place_of(case, images.get(case.image_id))
    found = []
    for other in others:
        criteria = set(_stored_criteria(case, other, truth, place, _place_of(other, images.get(other.image_id))))
        found.append((other, criteria))
    _add_neighbours(store, seen, found, images)
    affected = [Affected(other, tuple(c for c in Criterion if c in criteria)) for other, criteria in found]
    chosen = [one for one in affected if _agrees(one.criteria)]
    chosen.sort(key=lambda one: (-len(one.criteria), _score_distance(case, one.prediction, truth), one.prediction.id))
    return chosen, len(newest), total


def was_handled(prediction: Prediction, truth: str) -> bool:
    """Return whether a stored prediction classified an image of this class or referred it; a random draw is neither."""
    referred = set(prediction.reasons) - {ReasonCode.AUDIT_SAMPLE}
    return prediction.label == truth or (prediction.decision is not Decision.ANSWERED and bool(referred))


def _agrees(criteria: Sequence[Criterion]) -> bool:
    if Criterion.IMAGE in criteria:
        return True
    about_the_image = {Criterion.PLACE, Criterion.NEIGHBOURHOOD} & set(criteria)
    return len(criteria) >= AGREEING and bool(about_the_image)


def _stored_criteria(
    case: Prediction, other: Prediction, truth: str, place: Place, other_place: Place
) -> Iterator[Criterion]:
    if other.image_id == case.image_id:
        yield Criterion.IMAGE
    if _score_distance(case, other, truth) <= log(SCORE_FACTOR):
        yield Criterion.SCORE
    if place.agrees(other_place):
        yield Criterion.PLACE
    if other.label == case.label:
        yield Criterion.LABEL


def _score_distance(case: Prediction, other: Prediction, truth: str) -> float:
    """Return by how much the log odds of the true class differ."""
    ours, theirs = ((one.probabilities or {}).get(truth) for one in (case, other))
    return inf if ours is None or theirs is None else abs(_log_odds(ours) - _log_odds(theirs))


def _log_odds(probability: float) -> float:
    clipped = min(max(probability, 1e-12), 1 - 1e-12)
    return log(clipped / (1 - clipped))


def _place_of(prediction: Prediction, image: Image | None) -> Place:
    def said(name: str) -> str | None:
        value = prediction.context.get(name) or (getattr(image, name) if image is not None else None)
        return None if value is None else str(value)

    return Place(said("device"), said("site"))


def _images_of(store: Store, predictions: Sequence[Prediction]) -> Mapping[str, Image]:
    wanted = sorted({one.image_id for one in predictions if one.consent is not Consent.NONE})
    with store.ledger.read() as tx:
        return {image.id: image for image in tx.find(Image, where={"id": wanted}) if image.erased_at is None}


def _add_neighbours(
    store: Store, seen: Seen, found: Sequence[tuple[Prediction, set[Criterion]]], images: Mapping[str, Image]
) -> None:
    """Compare the features of images that share something else already; decoding all of them may take hours."""
    if seen.reach is None:
        return
    wanted = sorted({other.image_id for other, criteria in found if criteria and other.image_id in images})
    distances: dict[str, float] = {}
    for at in range(0, len(wanted), BATCH):
        distances.update(_distances(store, seen, [images[image_id] for image_id in wanted[at : at + BATCH]]))
    for other, criteria in found:
        if distances.get(other.image_id, inf) <= REACH_FACTOR * seen.reach:
            criteria.add(Criterion.NEIGHBOURHOOD)


def _distances(store: Store, seen: Seen, images: Sequence[Image]) -> dict[str, float]:
    frame = seen.loaded.geometry.frame
    decoded = [(image.id, attempt(lambda one: decode_frame(read_image(store, one), frame), image)) for image in images]
    # An image whose file is gone stops no other; an unreachable store does.
    for _, pixels in decoded:
        if isinstance(pixels, UnavailableError):
            raise pixels
    usable = [(image_id, pixels) for image_id, pixels in decoded if not isinstance(pixels, Exception)]
    if not usable:
        return {}
    vectors = described(seen.loaded, np.stack([pixels for _, pixels in usable]))
    lengths = np.linalg.norm(vectors - seen.vector, axis=1).tolist()
    return dict(zip([image_id for image_id, _ in usable], lengths, strict=True))
