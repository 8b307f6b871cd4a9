"""Run the gate on a bundle: predict the gate split, find rivals and slices, and decide.

In: a store, settings, a bundle and a dataset version. Out: the gate's report. Every call reads the gate
split, and each reading is an audit event.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from cluster.gate import Contender, GateReport, Slice, Verdict, decide
from cluster.gate.regression import regression_checks
from cluster.gate.unseen import on_unseen
from cluster.settings import Settings
from images.cache import PixelCache
from records.arrays import BoolArray
from records.bundles import Bundle
from records.datasets import DatasetVersion
from records.ledger import Transaction
from records.models import find_bundle, serving_model
from records.store import Store, find_images
from records.types import AuditEvent, Image, ModelStatus, RoundStep, Split
from trainers.evaluation.evaluate import GUARDED_SPLITS, SplitPredictions, predict_split
from trainers.evaluation.faithfulness import randomisation_similarity

SANITY_IMAGES = 32
AGE_BANDS = ((0, 40), (40, 60), (60, 131))


def run_gate(
    store: Store, settings: Settings, challenger: Bundle, dataset: DatasetVersion, *, actor: str
) -> GateReport:
    """Compare a bundle with the floors and the rivals; reading the gate split is audited.

    Args:
        store: with the challenger and its rivals.
        settings: `gate` has the margins and floors, `serving` the rules of triage for the regression set.
        challenger: the bundle to decide on.
        dataset: its gate split is read.
        actor: for the audit.
    Returns:
        The gate's report.
    """
    # Predictions are computed anew for rivals, too: their stored figures may be of another dataset version.
    own = _contender(store, challenger, predict_split(store, challenger, dataset, Split.GATE, actor=actor))
    rivals = [
        (role, _contender(store, bundle, predict_split(store, bundle, dataset, Split.GATE, actor=actor)))
        for role, bundle in _rivals(store, challenger.id)
    ]
    own, rivals, unseen = on_unseen(own, rivals)
    return decide(
        own,
        rivals,
        taxonomy=store.taxonomy,
        settings=settings.gate,
        explanation_similarity=_map_similarity(store, challenger, dataset, settings.gate.seed),
        slices=slices_of(find_images(store, own.predictions.image_ids)),
        looks=count_looks(store),
        regression=[*unseen, *regression_checks(store, settings.serving, challenger, actor)],
    )


def slices_of(images: Sequence[Image]) -> list[Slice]:
    """Return slices by age, sex, body site, device and institution, each with at least one image.

    An image without a value for a field is in no slice of that field.
    """
    members: dict[str, BoolArray] = defaultdict(lambda: np.zeros(len(images), dtype=np.bool_))
    for row, image in enumerate(images):
        for name in _slice_names(image):
            members[name][row] = True
    return [Slice(name, members[name]) for name in sorted(members)]


def _slice_names(image: Image) -> Iterator[str]:
    if image.age_years is not None:
        low, high = next(band for band in AGE_BANDS if image.age_years < band[1])
        yield f"age: {low} to {high - 1}" if high < AGE_BANDS[-1][1] else f"age: {low} and over"
    for name in ("sex", "localization", "device", "site"):
        value = getattr(image, name)
        if value:
            yield f"{name}: {value}"


def count_looks(store: Store) -> dict[str, int]:
    """Return how often each guarded split has been read, by split."""
    with store.ledger.read() as tx:
        return {split.value: tx.count(AuditEvent, where={"action": f"{split.value}.read"}) for split in GUARDED_SPLITS}


def _map_similarity(store: Store, bundle: Bundle, dataset: DatasetVersion, seed: int) -> float | None:
    """Compare heat maps of validation images with those of the same network with random weights."""
    image_ids = [str(image_id) for image_id in dataset.split(Split.VAL)["image_id"][:SANITY_IMAGES]]
    cache = PixelCache(store.home.cache, bundle.document.geometry.frame)
    cache.ensure(store, image_ids)
    return randomisation_similarity(bundle, cache.rows(image_ids).take(np.arange(len(image_ids))), seed=seed)


def _contender(store: Store, bundle: Bundle, predictions: SplitPredictions) -> Contender:
    key = store.taxonomy.key_class
    point = bundle.document.operating.refer.get(key.code) if key else None
    return Contender(bundle.id, predictions, point.threshold if point else None, bundle.document.operating.decision)


def _rivals(store: Store, challenger_id: str) -> list[tuple[str, Bundle]]:
    """Return the champion, and the best champion ever if that is another model."""
    with store.ledger.read() as tx:
        current = serving_model(tx)
        best = _best_ever(tx)
    champion = current.id if current and current.status == ModelStatus.CHAMPION else None
    # The best champion ever is a rival, too: a sequence of champions, each a little worse than the one before and
    # within the margin, would otherwise drift downwards.
    rivals: dict[str, str] = {}
    for role, model_id in (("champion", champion), ("best ever", best)):
        if model_id is not None and model_id != challenger_id:
            rivals.setdefault(model_id, role)
    return [(role, find_bundle(store, model_id)) for model_id, role in rivals.items()]


def _best_ever(tx: Transaction) -> str | None:
    """Return the champion with the best balanced accuracy at its gate, whoever promoted it."""
    # Promotions by a person are in the audit only, and those of a round are in its gate step as well.
    figures = {
        event.subject: float(event.details["balanced_accuracy"])
        for event in tx.find(AuditEvent, where={"action": f"model.{ModelStatus.CHAMPION}"})
        if event.details.get("balanced_accuracy") is not None
    }
    for step in tx.find(RoundStep, where={"step": "gate"}):
        if step.result["verdict"] == Verdict.PROMOTE:
            figures.setdefault(step.result["challenger"], step.result["balanced_accuracy"])
    return max(figures, key=lambda model_id: figures[model_id], default=None)
