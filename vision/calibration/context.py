"""What is known about an image beside its pixels, added to its logits: log p(class | context) - log p(class).

A logistic regression on train with the log of the class shares as fixed intercept: a value that is missing, or that no
training image had, adds exactly nothing. Its weight is fitted on val together with temperature and bias, where each
image counts once with its context and once without, so that one temperature holds for both. The sum assumes that
image and context are independent within a class; a weight below 1 is what they share.

In: what is known of N images. Out: `records.context.ContextHead`, or numbers [N, C].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from records.arrays import BoolArray, FloatArray, IntArray
from records.bundles import Calibration
from records.context import ContextColumn, ContextHead, ContextPart, Known, Value
from records.errors import DataError
from records.taxonomy import Taxonomy, folded
from vision.calibration.scaling import (
    BIAS_PRIOR_SD,
    LOG_TEMPERATURE_BOUNDS,
    LOG_TEMPERATURE_PRIOR_SD,
    apply_calibration,
    checked_logits,
)

MIN_IMAGES = 5
"""A value of fewer training images counts as never seen."""

VALUE_PRIOR_SD = 1.0
WEIGHT_PRIOR_SD = 1.0
MAX_WEIGHT = 2.0
_KNOTS = 6


@dataclass(frozen=True)
class ContextUse:
    """Which columns of one image's context count.

    Args:
        used: columns that were added.
        unknown: columns with a value that no training image had; they changed nothing.
    """

    used: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class InContext:
    """Predictions of N images with what is known about them."""

    probabilities: FloatArray
    """[N, C]; a row without a column that counts is that of `without`, to the bit"""
    without: FloatArray
    """[N, C], of the image alone"""
    uses: list[ContextUse]


def fit_context(
    columns: Sequence[ContextColumn], known: Sequence[Known], labels: IntArray, taxonomy: Taxonomy
) -> ContextHead:
    """Fit what the values of some columns say about the class.

    Args:
        columns: as the taxonomy names them.
        known: of N training images.
        labels: [N] class indices.
        taxonomy: gives the classes.
    Returns:
        The head, with weight 1.
    Raises:
        DataError: no column has a value that enough images share.
    """
    parts = [part for column in columns if (part := _unfitted(column, known)) is not None]
    bases = [_basis(part, known) for part in parts]
    design = np.concatenate(bases, axis=1) if bases else np.zeros((len(known), 0))
    # Only images with context: whether any was written down must not count as a value.
    rows = (design != 0).any(axis=1)
    if not rows.any():
        raise DataError(
            f"no training image has {' or '.join(column.name for column in columns) or 'context'} with a value that "
            f"{MIN_IMAGES} images share; import a table with these columns, or set trainers.context=false"
        )
    design, of = design[rows], labels[rows]
    num_classes = len(taxonomy.codes)
    shares = np.bincount(of, minlength=num_classes) + 0.5
    weights = _fitted_weights(design, of, np.log(shares / shares.sum()))
    fitted, first = [], 0
    for part, basis in zip(parts, bases, strict=True):
        own = weights[first : first + basis.shape[1]].tolist()
        first += basis.shape[1]
        update = {"heights": own} if part.kind == "numeric" else {"values": dict(zip(part.values, own, strict=True))}
        fitted.append(part.model_copy(update=update))
    return ContextHead(weight=1.0, columns=fitted, train_images=int(rows.sum()))


def fit_calibration_in_context(
    logits: NDArray[np.floating], labels: IntArray, taxonomy: Taxonomy, head: ContextHead, known: Sequence[Known]
) -> tuple[Calibration, ContextHead]:
    """Fit temperature, bias per class and the weight of the context together; see `fit_calibration`.

    Args:
        logits: [N, C], finite, N >= 1.
        labels: [N] class indices.
        taxonomy: gives class order.
        head: fitted on train.
        known: of the N images.
    Returns:
        The calibration, and the head with its weight, 0 to 2; near 0 where no image has context.
    Raises:
        ContractError: as of `fit_calibration`.
    """
    from scipy.optimize import minimize

    logits = checked_logits(logits, labels, len(taxonomy.codes))
    added = context_logits(head.model_copy(update={"weight": 1.0}), known, len(taxonomy.codes))[0]
    start = np.zeros(2 + len(taxonomy.codes))
    bounds = [LOG_TEMPERATURE_BOUNDS] + [(None, None)] * len(taxonomy.codes) + [(0.0, MAX_WEIGHT)]
    fitted = minimize(
        _loss, start, args=(np.tile(logits, (2, 1)), np.concatenate([added, np.zeros_like(added)]), np.tile(labels, 2)),
        jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500, "ftol": 1e-14, "gtol": 1e-9},
    )  # fmt: skip
    bias = fitted.x[1:-1] - fitted.x[1:-1].mean()
    shares = np.bincount(labels, minlength=len(taxonomy.codes)) / len(labels)
    calibration = Calibration(
        temperature=float(np.exp(fitted.x[0])),
        bias=[float(b) for b in bias],
        priors={code: float(share) for code, share in zip(taxonomy.codes, shares, strict=True)},
    )
    return calibration, head.model_copy(update={"weight": float(fitted.x[-1])})


def context_logits(head: ContextHead, known: Sequence[Known], num_classes: int) -> tuple[FloatArray, list[ContextUse]]:
    """Return what the context of N images adds to their scaled logits, [N, C], and which columns count."""
    total = np.zeros((len(known), num_classes))
    counts: list[tuple[str, BoolArray, BoolArray]] = []
    for part in head.columns if head.weight > 0 else []:
        basis = _basis(part, known)
        heights = np.asarray(part.heights if part.kind == "numeric" else list(part.values.values()))
        total += head.weight * (basis @ heights)
        is_given = np.array([not _is_missing(each.get(part.name)) for each in known], dtype=np.bool_)
        is_seen = np.asarray((basis != 0).any(axis=1), dtype=np.bool_)
        counts.append((part.name, is_seen, is_given & ~is_seen))
    uses = [
        ContextUse(
            tuple(name for name, seen, _ in counts if seen[row]), tuple(name for name, _, un in counts if un[row])
        )
        for row in range(len(known))
    ]
    return total, uses


def predict_in_context(
    logits: NDArray[np.floating], calibration: Calibration, head: ContextHead, known: Sequence[Known]
) -> InContext:
    """Return calibrated probabilities with and without what is known about the images.

    Args:
        logits: [N, C].
        calibration: of the model.
        head: of the model.
        known: of the N images.
    Returns:
        Both, in float64.
    """
    without = apply_calibration(logits, calibration)
    added, uses = context_logits(head, known, logits.shape[1])
    is_used = np.array([bool(use.used) for use in uses], dtype=np.bool_)
    probabilities = without.copy()
    if is_used.any():
        probabilities[is_used] = apply_calibration(logits[is_used], calibration, added[is_used])
    return InContext(probabilities, without, uses)


def _unfitted(column: ContextColumn, known: Sequence[Known]) -> ContextPart | None:
    """Return a column with the values or knots that it will have numbers for; None if it has none."""
    if column.kind == "numeric":
        numbers = np.array([n for each in known if (n := _number(each.get(column.name))) is not None])
        if len(numbers) < MIN_IMAGES:
            return None
        knots = np.unique(np.quantile(numbers, np.linspace(0.0, 1.0, _KNOTS)))
        return ContextPart(name=column.name, kind="numeric", knots=knots.tolist())
    texts = [_text(each.get(column.name)) for each in known if not _is_missing(each.get(column.name))]
    values, counts = np.unique(np.array(texts, dtype=object), return_counts=True) if texts else ([], [])
    common = [str(value) for value, count in zip(values, counts, strict=True) if count >= MIN_IMAGES]
    if not common:
        return None
    return ContextPart(name=column.name, kind="categorical", values={value: [] for value in common})


def _basis(part: ContextPart, known: Sequence[Known]) -> FloatArray:
    """Return [N, K]: per value 1 or 0, or the shares of the two knots around a number; 0 throughout if not seen."""
    given = [each.get(part.name) for each in known]
    if part.kind == "categorical":
        index = {value: at for at, value in enumerate(part.values)}
        basis = np.zeros((len(known), len(index)))
        for row, value in enumerate(given):
            at = None if _is_missing(value) else index.get(_text(value))
            if at is not None:
                basis[row, at] = 1.0
        return basis
    basis, knots = np.zeros((len(known), len(part.knots))), np.asarray(part.knots)
    for row, value in enumerate(given):
        number = _number(value)
        if number is None or not knots[0] <= number <= knots[-1]:
            continue
        right = min(int(np.searchsorted(knots, number, side="right")), len(knots) - 1)
        left = max(right - 1, 0)
        share = (number - knots[left]) / (knots[right] - knots[left]) if right > left else 1.0
        basis[row, left] += 1.0 - share
        basis[row, right] += share
    return basis


def _fitted_weights(design: FloatArray, labels: IntArray, log_shares: FloatArray) -> FloatArray:
    """Return [K, C], by maximum posterior under a normal prior."""
    from scipy.optimize import minimize

    shape, rows = (design.shape[1], len(log_shares)), np.arange(len(labels))

    def loss(flat: FloatArray) -> tuple[float, FloatArray]:
        weights = flat.reshape(shape)
        log_p = log_softmax(log_shares + design @ weights, axis=1)
        residual = np.exp(log_p)
        residual[rows, labels] -= 1.0
        value = -log_p[rows, labels].sum() + 0.5 * (weights**2).sum() / VALUE_PRIOR_SD**2
        gradient = design.T @ residual + weights / VALUE_PRIOR_SD**2
        return float(value / len(labels)), gradient.ravel() / len(labels)

    found = minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    weights: FloatArray = found.x.reshape(shape)
    return weights


def _loss(parameters: FloatArray, logits: FloatArray, added: FloatArray, labels: IntArray) -> tuple[float, FloatArray]:
    """Return mean negative log posterior and its gradient; every image is there twice and counts once."""
    log_temperature, bias, weight = parameters[0], parameters[1:-1], parameters[-1]
    scaled, rows, count = logits * np.exp(-log_temperature), np.arange(len(labels)), len(labels) / 2
    log_p = log_softmax(scaled + bias + weight * added, axis=1)
    residual = np.exp(log_p)
    residual[rows, labels] -= 1.0
    residual /= 2.0
    loss = -log_p[rows, labels].sum() / 2.0
    loss += 0.5 * (bias**2).sum() / BIAS_PRIOR_SD**2 + 0.5 * (log_temperature / LOG_TEMPERATURE_PRIOR_SD) ** 2
    loss += 0.5 * (weight / WEIGHT_PRIOR_SD) ** 2
    gradient = np.concatenate(
        [
            [-(residual * scaled).sum() + log_temperature / LOG_TEMPERATURE_PRIOR_SD**2],
            residual.sum(axis=0) + bias / BIAS_PRIOR_SD**2,
            [(residual * added).sum() + weight / WEIGHT_PRIOR_SD**2],
        ]
    )
    return float(loss / count), gradient / count


def _is_missing(value: Value) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def _text(value: Value) -> str:
    return folded(value if isinstance(value, str) else f"{value or 0.0:g}")


def _number(value: Value) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and np.isfinite(number) else None
