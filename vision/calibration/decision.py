"""Which class is the label: argmax of probability * weight, with the weights of a bundle's decision rule.

`natural` weighs every class by 1, `even` by 1 / its share at calibration, `cost` by its miss cost: the expected cost of
a label is the sum of p * miss cost over the other classes, smallest for the class whose own term is largest.
Under `even` and `cost` the label belongs to its prediction set; under `natural` it may lie outside.
"""

from collections.abc import Mapping
from typing import get_args

import numpy as np
from pydantic import Field

from records.arrays import BoolArray, FloatArray, IntArray
from records.bundles import DecisionRule, OperatingPoints, PointName, Rule
from records.errors import ConfigError
from records.settings import RoomSettings
from records.taxonomy import Taxonomy
from vision.calibration.conformal import prediction_set, thresholds_in_order

RULES: tuple[Rule, ...] = get_args(Rule)
TARGET_SENSITIVITY = 0.93
"""Of the point `target`, where the taxonomy's floor is not higher."""


class DecisionSettings(RoomSettings):
    """Which class is the label, and from which probability images are referred."""

    rule: Rule = Field(
        default="natural",
        description="label: the most probable class (natural), as if all classes came equally often (even), or the one "
        "of the smallest expected cost by the taxonomy's miss costs (cost)",
    )
    point: PointName = Field(
        default="proven",
        description="sensitivity of referral: a floor proven on calibration, or a target estimated on it and val",
    )
    target_sensitivity: float = Field(
        default=TARGET_SENSITIVITY,
        gt=0,
        le=1,
        description="share of a key class's lesions that the point `target` refers; a floor that is higher replaces it",
    )


def decision_rule(
    rule: Rule, taxonomy: Taxonomy, priors: Mapping[str, float], point: PointName = "proven"
) -> DecisionRule:
    """Return a rule with its weights.

    Args:
        rule: which class is the label.
        taxonomy: class order and miss costs.
        priors: class code to share at calibration; a class without a share is never the label of `even`.
        point: whose thresholds refer.
    Returns:
        The rule, without the other operating point.
    Raises:
        ConfigError: the rule is `cost`, and every miss cost is 0.
    """
    if rule == "natural":
        return DecisionRule(point=point)
    if rule == "even":
        weights = [1.0 / priors[code] if priors[code] > 0 else 0.0 for code in taxonomy.codes]
    else:
        weights = [one.miss_cost for one in taxonomy.classes]
        if not any(weights):
            raise ConfigError(
                f"trainers.decision.rule is cost, and every miss_cost of taxonomy {taxonomy.name} is 0; state costs "
                "there, or take natural or even"
            )
    return DecisionRule(rule=rule, weights=weights, point=point)


def labels_of(probabilities: FloatArray, decision: DecisionRule) -> IntArray:
    """Return the labels.

    Args:
        probabilities: [N, C] calibrated.
        decision: of the bundle.
    Returns:
        [N] class indices: the argmax of probability * weight, and of the probability in a row all of whose probability
        is on classes of weight 0; 0 for a row that is not finite.
    """
    finite = np.asarray(np.isfinite(probabilities).all(axis=1), dtype=np.bool_)
    known = np.where(finite[:, None], probabilities, 0.0)
    if decision.weights:
        products = known * np.asarray(decision.weights)
        known = np.where((products > 0).any(axis=1, keepdims=True), products, known)
    return np.asarray(known.argmax(axis=1), dtype=np.int64)


def sets_of(probabilities: FloatArray, taxonomy: Taxonomy, operating: OperatingPoints) -> BoolArray:
    """Return the prediction sets.

    Args:
        probabilities: [N, C] calibrated.
        taxonomy: class order.
        operating: rule and thresholds of the model.
    Returns:
        [N, C] which classes cannot be excluded: those of the class-conditional conformal set, and the label of a rule
        with weights, if the set holds any class. The rule may name a class for its rarity or cost whose probability is
        lower than is usual for it; it is not excluded then, and the promised coverage only rises.
    """
    sets = prediction_set(probabilities, thresholds_in_order(operating, taxonomy))
    if operating.decision.weights:
        # An empty set stays empty: its image is unlike those of every class, whatever the rule names.
        has_any = np.asarray(sets.any(axis=1), dtype=np.bool_)
        sets[np.arange(len(sets)), labels_of(probabilities, operating.decision)] |= has_any
    return sets
