"""The decision of the gate: may a challenger replace the champion?

In: predictions of challenger, champion and best champion ever on the gate split, with each model's
operating point. Out: a `GateReport` with every check. Floors are compared with point estimates: the gate
split holds too few key-class lesions for a useful bound, which the calibration split provides instead.
Nothing here reads data.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.gate.checks import (
    accuracy_check,
    calibration_check,
    explanation_check,
    floor_checks,
    identity_checks,
    lesions_in,
    sensitivity_checks,
)
from cluster.gate.contenders import Contender, Slice, accuracy_of, gate_weights, lesions_of
from cluster.gate.report import Check, GateReport, SliceReport, Verdict
from cluster.settings import GateSettings
from records.arrays import BoolArray, IntArray
from records.errors import ContractError
from records.taxonomy import Taxonomy


def decide(
    challenger: Contender,
    rivals: Sequence[tuple[str, Contender]],
    *,
    taxonomy: Taxonomy,
    settings: GateSettings,
    explanation_similarity: float | None,
    slices: Sequence[Slice] = (),
    looks: Mapping[str, int] | None = None,
    regression: Sequence[Check] = (),
) -> GateReport:
    """Decide whether the challenger may serve.

    Args:
        challenger: the new model.
        rivals: (role, contender) pairs: `champion`, and `best ever` if that is another model.
        taxonomy: with the key class and its sensitivity floor.
        settings: margins and floors.
        explanation_similarity: of the heat maps of the trained and of a randomised network, 0 to 1; None if it
            could not be measured.
        slices: parts of the split; those with enough key-class lesions are checked, too.
        looks: how often each guarded split was read so far, for the report.
        regression: the check of the regression set, if there are cases.
    Returns:
        The report. Without rivals the floors alone decide.
    Raises:
        ContractError: the contenders did not predict the same images.
    """
    for role, rival in rivals:
        if not np.array_equal(rival.predictions.image_ids, challenger.predictions.image_ids):
            raise ContractError(f"the {role} predicted other images than the challenger")
    # NaN compares as false, so a check on such predictions could pass by accident.
    if not np.isfinite(challenger.predictions.probabilities).all():
        return _refused_for_non_finite(challenger, rivals, looks or {})
    groups = np.unique(challenger.predictions.group_ids, return_inverse=True)[1].astype(np.int64)
    key_index = taxonomy.index_of(taxonomy.key_class.code) if taxonomy.key_class else None
    checks = [*regression, *identity_checks(challenger, rivals)]
    checks += floor_checks(challenger, groups, key_index, taxonomy, settings)
    checks += [calibration_check(challenger.predictions, settings), explanation_check(explanation_similarity, settings)]
    # Drawn once for all rivals and slices: paired differences have a smaller variance than two independent samples.
    weights = gate_weights(challenger.predictions, groups, taxonomy, settings)
    for role, rival in rivals:
        checks.append(accuracy_check(role, challenger, rival, groups, weights, taxonomy, settings))
        if key_index is not None:
            checks += sensitivity_checks(role, challenger, rival, groups, weights, key_index, slices, settings)
    verdict, why = _conclude(checks)
    is_key = _key_lesions(challenger, groups, key_index)
    return GateReport(
        verdict=verdict,
        why=why,
        challenger=challenger.model_id,
        champion=_champion_id(rivals),
        images=len(challenger.predictions.labels),
        lesions=int(groups.max()) + 1,
        key_lesions=int(is_key.sum()),
        balanced_accuracy=accuracy_of(challenger, len(taxonomy.codes)),
        checks=checks,
        slices=[_slice_report(part, groups, is_key, settings) for part in slices],
        looks=dict(looks or {}),
    )


def _key_lesions(challenger: Contender, groups: IntArray, key_index: int | None) -> BoolArray:
    if key_index is None:
        return np.zeros(int(groups.max()) + 1, dtype=np.bool_)
    return lesions_of(challenger.predictions, groups, key_index).is_key


def _slice_report(part: Slice, groups: IntArray, is_key: BoolArray, settings: GateSettings) -> SliceReport:
    num_key = int((is_key & lesions_in(part, groups)).sum())
    return SliceReport(
        name=part.name,
        images=int(part.members.sum()),
        key_lesions=num_key,
        judged=num_key >= settings.min_slice_lesions,
    )


def _champion_id(rivals: Sequence[tuple[str, Contender]]) -> str | None:
    return next((rival.model_id for role, rival in rivals if role == "champion"), None)


def _refused_for_non_finite(
    challenger: Contender, rivals: Sequence[tuple[str, Contender]], looks: Mapping[str, int]
) -> GateReport:
    num_images = len(challenger.predictions.image_ids)
    num_finite = int(np.isfinite(challenger.predictions.probabilities).all(axis=1).sum())
    text = f"{num_images - num_finite} of its {num_images} predictions are not finite numbers"
    return GateReport(
        verdict=Verdict.REFUSE,
        why=text,
        challenger=challenger.model_id,
        champion=_champion_id(rivals),
        images=num_images,
        lesions=len(set(challenger.predictions.group_ids)),
        key_lesions=0,
        balanced_accuracy=None,
        checks=[Check(name="finite predictions", outcome="fail", text=text)],
        looks=dict(looks),
    )


def _conclude(checks: Sequence[Check]) -> tuple[Verdict, str]:
    # One failed check refuses, however many others are undecided: more lesions would not change it.
    failed = [check for check in checks if check.outcome == "fail"]
    if failed:
        return Verdict.REFUSE, failed[0].text
    undecided = [check for check in checks if check.outcome == "undecided"]
    if undecided:
        return Verdict.UNDECIDED, undecided[0].text
    return Verdict.PROMOTE, "every floor is reached and no comparison is worse or unclear"
