"""The gate: may a challenger answer instead of the champion?

In: the predictions of challenger, champion and best champion ever on the gate side, and each
model's operating point. Out: a verdict with every check behind it, in words and figures.

Two kinds of evidence are asked for. Floors are point estimates on the gate side (with as few key
lesions as a gate holds, a proven bound is out of reach; the proof belongs to the calibration side).
Comparisons are paired: the same resamples of lesions are drawn for both models, and what counts is
the one-sided bound of the difference. Nothing here reads data, trains or serves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cluster.settings import GateSettings
from records.errors import ContractError
from records.taxonomy import Taxonomy
from trainers.evaluation.bootstrap import group_strata, resample_weights, resampled_confusions
from trainers.evaluation.evaluate import SidePredictions
from trainers.evaluation.metrics import (
    FloatArray,
    IntArray,
    balanced_accuracy,
    confusion_matrix,
    expected_calibration_error,
    mean_by_unit,
)


class Verdict(StrEnum):
    """What the gate says of a challenger."""

    PROMOTE = "promote"
    REFUSE = "refuse"
    UNDECIDED = "undecided"


class Check(BaseModel):
    """One thing the gate looked at."""

    model_config = ConfigDict(frozen=True)

    name: str
    outcome: Literal["pass", "fail", "undecided"]
    text: str = Field(description="one sentence with the figures")
    estimate: float | None = None
    lower_bound: float | None = Field(default=None, description="one-sided, at the confidence of the settings")
    limit: float | None = None
    lesions: int = Field(default=0, description="lesions the estimate rests on")
    more_lesions: int | None = Field(default=None, description="about how many more would decide, if undecided")


class GateReport(BaseModel):
    """The verdict and everything it rests on."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    verdict: Verdict
    why: str
    challenger: str
    champion: str | None
    images: int
    lesions: int
    key_lesions: int
    balanced_accuracy: float | None = Field(description="of the challenger, on the gate side")
    checks: list[Check]


@dataclass(frozen=True)
class Contender:
    """A model as the gate sees it.

    Args:
        model_id: of the bundle.
        predictions: on the gate side; all contenders answer the same pictures in the same order.
        key_threshold: refer threshold of the key class, None if the taxonomy has none.
    """

    model_id: str
    predictions: SidePredictions
    key_threshold: float | None


@dataclass(frozen=True)
class _Lesions:
    """Lesion-level view of one contender: one row per group."""

    is_key: np.ndarray[Any, np.dtype[np.bool_]]
    key_probability: FloatArray


def decide(
    challenger: Contender,
    rivals: Sequence[tuple[str, Contender]],
    *,
    taxonomy: Taxonomy,
    settings: GateSettings,
    explanation_similarity: float | None,
) -> GateReport:
    """Decide whether the challenger may answer.

    Args:
        challenger: the new model.
        rivals: (role, contender) pairs, `champion` and, if it is another model, `best ever`.
        taxonomy: with the key class and its sensitivity floor.
        settings: margins and floors.
        explanation_similarity: how alike the heat maps of the trained and of a randomised network are,
            0 to 1; None if it could not be measured.
    Returns:
        The report. Without rivals the floors alone decide.
    Raises:
        ContractError: the contenders did not answer the same pictures.
    """
    for role, rival in rivals:
        if not np.array_equal(rival.predictions.image_ids, challenger.predictions.image_ids):
            raise ContractError(f"the {role} answered other pictures than the challenger")
    if not np.isfinite(challenger.predictions.probabilities).all():
        return _refused_for_non_finite(challenger, rivals)
    groups = np.unique(challenger.predictions.group_ids, return_inverse=True)[1].astype(np.int64)
    key_index = taxonomy.index_of(taxonomy.key_class.code) if taxonomy.key_class else None
    checks = [*_identity_checks(challenger, rivals), *_floor_checks(challenger, groups, key_index, taxonomy, settings)]
    checks.append(_calibration_check(challenger.predictions, settings))
    checks.append(_explanation_check(explanation_similarity, settings))
    weights = _weights(challenger.predictions, groups, taxonomy, settings)
    for role, rival in rivals:
        checks.append(_accuracy_check(role, challenger, rival, groups, weights, taxonomy, settings))
        if key_index is not None:
            checks.append(_sensitivity_check(role, challenger, rival, groups, weights, key_index, settings))
    verdict, why = _conclude(checks)
    num_key = int(_lesions(challenger.predictions, groups, key_index).is_key.sum()) if key_index is not None else 0
    return GateReport(
        verdict=verdict,
        why=why,
        challenger=challenger.model_id,
        champion=_champion_id(rivals),
        images=len(challenger.predictions.labels),
        lesions=int(groups.max()) + 1,
        key_lesions=num_key,
        balanced_accuracy=_balanced_accuracy(challenger.predictions, len(taxonomy.codes)),
        checks=checks,
    )


def _champion_id(rivals: Sequence[tuple[str, Contender]]) -> str | None:
    return next((rival.model_id for role, rival in rivals if role == "champion"), None)


def _refused_for_non_finite(challenger: Contender, rivals: Sequence[tuple[str, Contender]]) -> GateReport:
    num_images = len(challenger.predictions.image_ids)
    num_finite = int(np.isfinite(challenger.predictions.probabilities).all(axis=1).sum())
    text = f"{num_images - num_finite} of its {num_images} answers are not finite numbers"
    return GateReport(
        verdict=Verdict.REFUSE,
        why=text,
        challenger=challenger.model_id,
        champion=_champion_id(rivals),
        images=num_images,
        lesions=len(set(challenger.predictions.group_ids)),
        key_lesions=0,
        balanced_accuracy=None,
        checks=[Check(name="finite answers", outcome="fail", text=text)],
    )


def _conclude(checks: Sequence[Check]) -> tuple[Verdict, str]:
    failed = [check for check in checks if check.outcome == "fail"]
    if failed:
        return Verdict.REFUSE, failed[0].text
    undecided = [check for check in checks if check.outcome == "undecided"]
    if undecided:
        return Verdict.UNDECIDED, undecided[0].text
    return Verdict.PROMOTE, "every floor holds and no comparison speaks against it"


def _identity_checks(challenger: Contender, rivals: Sequence[tuple[str, Contender]]) -> list[Check]:
    checks = []
    for role, rival in rivals:
        same = challenger.model_id == rival.model_id or np.array_equal(
            challenger.predictions.probabilities, rival.predictions.probabilities
        )
        text = f"it answers exactly as the {role} does" if same else f"it is another model than the {role}"
        checks.append(Check(name=f"differs from {role}", outcome="fail" if same else "pass", text=text))
    return checks


def _floor_checks(
    challenger: Contender, groups: IntArray, key_index: int | None, taxonomy: Taxonomy, settings: GateSettings
) -> list[Check]:
    if key_index is None or taxonomy.key_class is None or challenger.key_threshold is None:
        return []
    lesions = _lesions(challenger.predictions, groups, key_index)
    name, floor = taxonomy.key_class.code, taxonomy.key_class.sensitivity_floor
    num_key, num_other = int(lesions.is_key.sum()), int((~lesions.is_key).sum())
    if num_key == 0 or num_other == 0:
        text = f"the gate side holds {num_key} lesions of {name} and {num_other} others, so its floor cannot be checked"
        return [Check(name=f"{name} sensitivity floor", outcome="undecided", text=text, limit=floor)]
    referred = lesions.key_probability >= challenger.key_threshold
    sensitivity = float(referred[lesions.is_key].mean())
    specificity = float((~referred)[~lesions.is_key].mean())
    return [
        _floor_check(f"{name} sensitivity", sensitivity, floor, num_key),
        _floor_check(f"{name} specificity", specificity, settings.min_specificity, num_other),
    ]


def _floor_check(name: str, value: float, floor: float, lesions: int) -> Check:
    holds = value >= floor
    relation = "reaches" if holds else "is under"
    text = f"{name} {value:.3f} at the operating point {relation} its floor {floor:.2f} ({lesions} lesions)"
    return Check(
        name=f"{name} floor",
        outcome="pass" if holds else "fail",
        text=text,
        estimate=value,
        limit=floor,
        lesions=lesions,
    )


def _calibration_check(predictions: SidePredictions, settings: GateSettings) -> Check:
    error = expected_calibration_error(predictions.labels, predictions.probabilities)
    holds = error <= settings.max_calibration_error
    relation = "is within" if holds else "is over"
    return Check(
        name="calibration error",
        outcome="pass" if holds else "fail",
        text=f"calibration error {error:.3f} {relation} its limit {settings.max_calibration_error:.2f}",
        estimate=error,
        limit=settings.max_calibration_error,
    )


def _explanation_check(similarity: float | None, settings: GateSettings) -> Check:
    name, limit = "explanation sanity", settings.max_random_similarity
    if similarity is None:
        return Check(name=name, outcome="fail", text="its heat maps could not be compared with a randomised network's")
    holds = similarity <= limit
    text = (
        f"its heat maps {'differ from' if holds else 'look like'} those of the same network with random weights "
        f"(similarity {similarity:.2f}, limit {limit:.2f})"
    )
    return Check(name=name, outcome="pass" if holds else "fail", text=text, estimate=similarity, limit=limit)


def _accuracy_check(
    role: str,
    challenger: Contender,
    rival: Contender,
    groups: IntArray,
    weights: np.ndarray[Any, np.dtype[np.float32]],
    taxonomy: Taxonomy,
    settings: GateSettings,
) -> Check:
    num_classes, labels = len(taxonomy.codes), challenger.predictions.labels
    estimates, resampled = [], []
    for contender in (challenger, rival):
        predicted = contender.predictions.probabilities.argmax(axis=1)
        estimates.append(_balanced_accuracy(contender.predictions, num_classes))
        resampled.append(balanced_accuracy(resampled_confusions(labels, predicted, groups, weights, num_classes)))
    return _comparison(
        name=f"balanced accuracy against {role}",
        estimate=estimates[0] - estimates[1],
        differences=resampled[0] - resampled[1],
        margin=settings.margin,
        confidence=settings.confidence,
        must_gain=True,
        lesions=int(groups.max()) + 1,
    )


def _sensitivity_check(
    role: str,
    challenger: Contender,
    rival: Contender,
    groups: IntArray,
    weights: np.ndarray[Any, np.dtype[np.float32]],
    key_index: int,
    settings: GateSettings,
) -> Check:
    """Compare key-class sensitivity where both models have the rival's specificity."""
    name = f"key-class sensitivity against {role}"
    ours, theirs = (_lesions(c.predictions, groups, key_index) for c in (challenger, rival))
    is_key = ours.is_key
    if not is_key.any() or is_key.all() or rival.key_threshold is None:
        return Check(
            name=name, outcome="undecided", text=f"{name} cannot be compared: no such lesions on the gate side"
        )
    specificity = float((theirs.key_probability[~is_key] < rival.key_threshold).mean())
    threshold = _threshold_at_specificity(ours.key_probability[~is_key], specificity)
    hits = (ours.key_probability >= threshold).astype(np.float64)
    rival_hits = (theirs.key_probability >= rival.key_threshold).astype(np.float64)
    gain = (hits - rival_hits)[is_key]
    key_weights = weights[:, is_key].astype(np.float64)
    return _comparison(
        name=f"{name} at specificity {specificity:.2f}",
        estimate=float(gain.mean()),
        differences=key_weights @ gain / key_weights.sum(axis=1),
        margin=settings.key_class_margin,
        confidence=settings.confidence,
        must_gain=False,
        lesions=int(is_key.sum()),
    )


def _comparison(
    *,
    name: str,
    estimate: float,
    differences: FloatArray,
    margin: float,
    confidence: float,
    must_gain: bool,
    lesions: int,
) -> Check:
    """Judge a paired difference: refuse what is worse, ask for more lesions where it is not clear."""
    lower = float(np.nanquantile(differences, 1 - confidence))
    least = 0.0 if must_gain else -margin
    bound = f"at least {lower:+.3f} with {confidence:.0%} confidence"
    figures = f"{estimate:+.3f}, {bound}, margin {-margin:+.2f} ({lesions} lesions)"
    if estimate < least or (must_gain and estimate <= 0):
        outcome: Literal["pass", "fail", "undecided"] = "fail"
        text = f"{name} is not good enough: {figures}"
        more = None
    elif lower > -margin:
        outcome, text, more = "pass", f"{name} holds: {figures}", None
    else:
        outcome = "undecided"
        # The half-width of the bound shrinks with the square root of the lesions.
        room = estimate + margin
        more = ceil(lesions * ((estimate - lower) / room) ** 2) - lesions if room > 0 else None
        advice = f"; about {more} more lesions would decide" if more is not None else ""
        text = f"{name} is not clear: {figures}{advice}"
    return Check(
        name=name,
        outcome=outcome,
        text=text,
        estimate=estimate,
        lower_bound=lower,
        limit=-margin,
        lesions=lesions,
        more_lesions=more,
    )


def _weights(
    predictions: SidePredictions, groups: IntArray, taxonomy: Taxonomy, settings: GateSettings
) -> np.ndarray[Any, np.dtype[np.float32]]:
    strata = group_strata(predictions.labels, groups, len(taxonomy.codes))
    return resample_weights(strata, num_resamples=settings.bootstrap_resamples, seed=settings.seed)


def _balanced_accuracy(predictions: SidePredictions, num_classes: int) -> float:
    predicted = predictions.probabilities.argmax(axis=1)
    return float(balanced_accuracy(confusion_matrix(predictions.labels, predicted, num_classes)))


def _lesions(predictions: SidePredictions, groups: IntArray, key_index: int) -> _Lesions:
    """Average the key-class probability over the pictures of each group."""
    is_key = mean_by_unit((predictions.labels == key_index).astype(np.float64), groups) >= 0.5
    return _Lesions(is_key=is_key, key_probability=mean_by_unit(predictions.probabilities[:, key_index], groups))


def _threshold_at_specificity(negatives: FloatArray, specificity: float) -> float:
    """Return the lowest threshold at which at least this share of the negatives stays below."""
    kept = ceil(specificity * len(negatives) - 1e-9)
    ordered = np.sort(negatives)
    if kept >= len(ordered):
        return float(np.nextafter(ordered[-1], np.inf))
    return float(np.nextafter(ordered[kept - 1], np.inf)) if kept > 0 else 0.0
