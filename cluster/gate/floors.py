"""What a challenger has to reach by itself: it differs, its floors hold, it is calibrated, its maps mean something."""

from collections.abc import Sequence

import numpy as np

from cluster.gate.contenders import Contender, lesions_of
from cluster.gate.report import Check
from cluster.settings import GateSettings
from records.arrays import IntArray
from records.taxonomy import Taxonomy
from trainers.evaluation.evaluate import SplitPredictions
from vision.metrics.metrics import expected_calibration_error


def identity_checks(challenger: Contender, rivals: Sequence[tuple[str, Contender]]) -> list[Check]:
    """Check that the challenger answers otherwise than each rival; nothing is gained by swapping equals."""
    checks = []
    for role, rival in rivals:
        same = challenger.model_id == rival.model_id or np.array_equal(
            challenger.predictions.probabilities, rival.predictions.probabilities
        )
        text = f"it answers exactly as the {role} does" if same else f"it is another model than the {role}"
        checks.append(Check(name=f"differs from {role}", outcome="fail" if same else "pass", text=text))
    return checks


def floor_checks(
    challenger: Contender, groups: IntArray, key_index: int | None, taxonomy: Taxonomy, settings: GateSettings
) -> list[Check]:
    """Check sensitivity and specificity of the key class at the challenger's operating point, per lesion."""
    if key_index is None or taxonomy.key_class is None or challenger.key_threshold is None:
        return []
    lesions = lesions_of(challenger.predictions, groups, key_index)
    name, floor = taxonomy.key_class.code, taxonomy.key_class.sensitivity_floor
    num_key, num_other = int(lesions.is_key.sum()), int((~lesions.is_key).sum())
    if num_key == 0 or num_other == 0:
        text = (
            f"the gate split holds {num_key} lesions of {name} and {num_other} others, so its floor cannot be checked"
        )
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


def calibration_check(predictions: SplitPredictions, settings: GateSettings) -> Check:
    """Check that its probabilities are about as often right as they say."""
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


def explanation_check(similarity: float | None, settings: GateSettings) -> Check:
    """Check that its heat maps depend on what it has learned."""
    name, limit = "explanation sanity", settings.max_random_similarity
    if similarity is None:
        return Check(name=name, outcome="fail", text="its heat maps could not be compared with a randomised network's")
    holds = similarity <= limit
    text = (
        f"its heat maps {'differ from' if holds else 'look like'} those of the same network with random weights "
        f"(similarity {similarity:.2f}, limit {limit:.2f})"
    )
    return Check(name=name, outcome="pass" if holds else "fail", text=text, estimate=similarity, limit=limit)
