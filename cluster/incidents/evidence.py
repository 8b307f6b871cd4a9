"""What a model saw in a prediction that turned out to be wrong: the prediction replayed, and its surroundings.

In: a stored prediction and the true class. Out: `Seen`, whose `Evidence` an incident keeps. Nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from images.cache import PixelCache
from images.decode import decode_frame
from images.overlay import levels_of
from records.arrays import FloatArray, UInt8Array
from records.bundles import Bundle
from records.context import COLUMNS
from records.datasets import load_dataset
from records.errors import DataError, IntegrityError, RefusedError, RelookError, UnknownIdError
from records.models import registered_bundle
from records.store import Store, find_images, read_image
from records.taxonomy import Taxonomy
from records.types import Consent, Image, ModelRecord, Prediction
from records.types.incidents import Evidence, ReplayedPrediction, TrainingNeighbour, TriageLimit
from serving.bulk import verdicts_of
from serving.settings import ServingSettings
from serving.triage import Verdict, malignant_probability
from trainers.fitting.suitability import sample_of_train
from trainers.fitting.workers import compute_threads
from vision.inference.engines import EngineChoice, load_engine
from vision.inference.loaded import LoadedModel
from vision.inference.output import BatchOutput
from vision.precision import PrecisionChoice

NEIGHBOURS = 5
BATCH = 64


@dataclass(frozen=True)
class Seen:
    """A replayed prediction, and its model for comparisons with others."""

    evidence: Evidence
    loaded: LoadedModel
    vector: FloatArray
    """[D] the image as the model describes it, in the space in which distances are compared"""
    reach: float | None
    """distance from the image to its neighbours among the training images; None if the bundle has no checks"""


def examine(store: Store, settings: ServingSettings, prediction: Prediction, truth: str) -> Seen:
    """Replay a prediction with its engine, number format and threads, and say what the model saw.

    Args:
        store: with the image, the model and its training images.
        settings: rules of triage.
        prediction: whose image is stored.
        truth: class code.
    Returns:
        The evidence, and what other predictions are compared with.
    Raises:
        RefusedError: the image was erased or never stored, or the engine cannot run here.
        UnknownIdError: the bundle of the model is gone.
    """
    image, data = _image_of(store, prediction)
    bundle = bundle_of(store, prediction)
    loaded = load_for(bundle, prediction)
    pixels = decode_frame(data, loaded.geometry.frame)[None]
    output, batch_size = _computed_again(loaded, pixels, prediction, settings.max_batch_size)
    (verdict,) = verdicts_of(bundle, loaded, output, pixels, [min(image.width_px, image.height_px)], settings)
    vector = described(loaded, pixels)[0]
    neighbours, compared = _neighbours(store, bundle, loaded, vector)
    evidence = Evidence(
        replay=_replayed(prediction, loaded, output, batch_size),
        label=verdict.label,
        probabilities=_by_class(output.probabilities[0], bundle.document.taxonomy),
        decision=verdict.decision.value,
        reasons=[reason.value for reason in verdict.reasons],
        limits=limits_of(bundle, settings, output.probabilities[0], verdict, truth),
        out_of_distribution_score=verdict.suitability.ood_score,
        quality_score=verdict.suitability.quality_score,
        quality_reason=verdict.suitability.quality_reason,
        maps=_maps(output, bundle.document.taxonomy, [verdict.label, truth]),
        crop=loaded.geometry.crop,
        neighbours=neighbours,
        neighbours_of=compared,
        looked_at=0,
        looked_at_of=0,
    )
    reach = None if loaded.checks is None else float(loaded.checks.features.distance(_raw(loaded, pixels))[0])
    return Seen(evidence, loaded, vector, reach)


def bundle_of(store: Store, prediction: Prediction) -> Bundle:
    """Return the bundle that made a prediction; UnknownIdError, with what to do, if it is gone or was altered."""
    model = prediction.model_id
    with store.ledger.read() as tx:
        record = tx.get(ModelRecord, model)
    try:
        if record is None:
            raise UnknownIdError("the model is not registered any more")
        return registered_bundle(store, record)
    except (UnknownIdError, IntegrityError) as error:
        raise UnknownIdError(
            f"prediction {prediction.id} cannot be replayed, since the bundle of its model {model[:12]} is gone "
            f"({error}); restore it from a backup and open the incident again"
        ) from error


def load_for(bundle: Bundle, prediction: Prediction) -> LoadedModel:
    """Load a bundle as it was loaded when it made a prediction; RefusedError if that cannot be done here."""
    engine: EngineChoice = "openvino" if prediction.engine == "openvino" else "torch"
    precision: PrecisionChoice = "bf16" if prediction.precision == "bf16" else "fp32"
    try:
        return load_engine(bundle, engine, precision=precision, device="cpu")
    except RelookError as error:
        raise RefusedError(f"prediction {prediction.id} cannot be replayed on this machine: {error}") from error


def described(loaded: LoadedModel, pixels: UInt8Array) -> FloatArray:
    """Describe images as they are compared, [N, D]: in the whitened space of the bundle's checks, if it has them."""
    raw = _raw(loaded, pixels)
    return raw if loaded.checks is None else loaded.checks.features.project(raw)


def _raw(loaded: LoadedModel, pixels: UInt8Array) -> FloatArray:
    parts = [loaded.describe(pixels[at : at + BATCH]) for at in range(0, len(pixels), BATCH)]
    return np.concatenate(parts).astype(np.float64)


def limits_of(
    bundle: Bundle, settings: ServingSettings, probabilities: FloatArray, verdict: Verdict, truth: str
) -> list[TriageLimit]:
    """Return every limit that triage compares with, in words, and by how much each missed to refer the image."""
    if not np.isfinite(probabilities).all():
        return []
    taxonomy, operating, found = bundle.document.taxonomy, bundle.document.operating, []

    def add(name: str, value: float, limit: float, *, below: bool = False) -> None:
        short_by = value - limit if below else limit - value
        found.append(TriageLimit(name=name, value=value, limit=limit, short_by=short_by))

    p_malignant = malignant_probability(probabilities, taxonomy)
    for code, point in operating.refer.items():
        add(f"p({code}) for a referral", float(probabilities[taxonomy.index_of(code)]), point.threshold)
    if operating.refer_malignant is not None:
        add("p(malignant) for a referral", p_malignant, operating.refer_malignant.threshold)
    if operating.urgent_threshold is not None:
        add("p(malignant) for an urgent review", p_malignant, operating.urgent_threshold)
    if truth in operating.conformal_thresholds:
        p_truth = float(probabilities[taxonomy.index_of(truth)])
        add(f"p({truth}) for a place in the prediction set", p_truth, 1.0 - operating.conformal_thresholds[truth])
    if verdict.confidence is not None:
        add("confidence, below which an image is reviewed", verdict.confidence, settings.low_confidence, below=True)
    if verdict.suitability.ood_score is not None:
        add("distance from the training images", verdict.suitability.ood_score, 1.0)
    if verdict.suitability.quality_score is not None:
        add("quality, below which an image is taken again", verdict.suitability.quality_score, 0.0, below=True)
    return found


def _image_of(store: Store, prediction: Prediction) -> tuple[Image, bytes]:
    if prediction.consent is Consent.NONE:
        raise RefusedError(
            f"the image of prediction {prediction.id} came without consent and was not stored; nothing can be replayed"
        )
    with store.ledger.read() as tx:
        image = tx.get(Image, prediction.image_id)
    if image is None or image.erased_at is not None:
        raise RefusedError(
            f"image {prediction.image_id[:12]} was erased, so there is nothing to replay and no incident is opened"
        )
    return image, read_image(store, image)


def _computed_again(
    loaded: LoadedModel, pixels: UInt8Array, prediction: Prediction, largest: int
) -> tuple[BatchOutput, int | None]:
    """Compute a prediction again; returns its output, and the batch size that gives the stored bits, or None.

    A network rounds differently in batches of different sizes, and the row does not say which size it was. So sizes are
    tried, with copies of the image in the place of the others.
    """
    taxonomy, alone = loaded.taxonomy, None
    known = {name: prediction.context.get(name) for name in COLUMNS}
    # The order of sums depends on the number of threads, and so the last bits.
    with compute_threads(prediction.num_threads):
        for size in range(1, largest + 1):
            output = loaded.predict(pixels[[0] * size], gradcam=True, context=[known] * size)
            alone = output if alone is None else alone
            for row in range(size):
                if _by_class(output.probabilities[row], taxonomy) == (prediction.probabilities or {}):
                    return output.take([row]), size
    assert alone is not None
    return alone, None


def _replayed(
    prediction: Prediction, loaded: LoadedModel, output: BatchOutput, batch_size: int | None
) -> ReplayedPrediction:
    now = _by_class(output.probabilities[0], loaded.taxonomy)
    stored = prediction.probabilities or {}
    differences = [abs(now[code] - stored[code]) for code in now if code in stored]
    return ReplayedPrediction(
        is_same=batch_size is not None,
        largest_difference=max(differences, default=None),
        engine=loaded.engine,
        precision=loaded.precision,
        num_threads=output.num_threads,
        batch_size=batch_size,
    )


def _by_class(probabilities: FloatArray, taxonomy: Taxonomy) -> dict[str, float]:
    if not np.isfinite(probabilities).all():
        return {}
    return dict(zip(taxonomy.codes, probabilities.tolist(), strict=True))


def _maps(output: BatchOutput, taxonomy: Taxonomy, codes: Sequence[str | None]) -> dict[str, list[list[int]]]:
    if output.maps is None or not np.isfinite(output.maps).all():
        return {}
    return {code: levels_of(output.maps[0, taxonomy.index_of(code)]) for code in codes if code is not None}


def _neighbours(
    store: Store, bundle: Bundle, loaded: LoadedModel, vector: FloatArray
) -> tuple[list[TrainingNeighbour], int]:
    """Return the nearest of the training images, and how many were compared; none if they are not here any more."""
    try:
        dataset = load_dataset(store, bundle.document.dataset_id)
    except (UnknownIdError, IntegrityError):
        return [], 0  # a model that was trained elsewhere
    # The sample that the bundle's own checks are fitted to: a whole split may take minutes.
    image_ids = [image.id for image in find_images(store, sample_of_train(store, dataset)) if image.erased_at is None]
    cache = PixelCache(store.home.cache, loaded.geometry.frame)
    try:
        cache.ensure(store, image_ids)
    except DataError:
        return [], 0  # imported in place, and moved since
    vectors = described(loaded, cache.rows(image_ids).take(np.arange(len(image_ids))))
    distances = np.linalg.norm(vectors - vector, axis=1)
    labels = dict(zip(dataset.rows["image_id"], dataset.rows["label"], strict=True))
    return [
        TrainingNeighbour(image_id=image_ids[row], label=str(labels[image_ids[row]]), distance=float(distances[row]))
        for row in np.argsort(distances, kind="stable")[:NEIGHBOURS].tolist()
    ], len(image_ids)
