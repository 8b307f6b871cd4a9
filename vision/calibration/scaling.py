"""Calibration by a temperature and a bias per class: probabilities = softmax(logits / temperature + bias).

Both are fitted by maximum posterior on the val split, at the natural prevalence: a temperature alone cannot undo what
a balanced sampler did to the priors. Weak normal priors (bias: sd 3, log temperature: sd 1) keep the parameters finite
for a class without cases or for separable logits; a hundred images outweigh them.

In: logits [N, C]. Out: `records.bundles.Calibration`, or probabilities [N, C] in float64.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from records.arrays import FloatArray, IntArray
from records.bundles import Calibration
from records.errors import ConfigError, ContractError, TaxonomyError
from records.taxonomy import Taxonomy

BIAS_PRIOR_SD = 3.0
LOG_TEMPERATURE_PRIOR_SD = 1.0
LOG_TEMPERATURE_BOUNDS = (-4.6, 4.6)


def fit_calibration(logits: NDArray[np.floating], labels: IntArray, taxonomy: Taxonomy) -> Calibration:
    """Fit temperature and per-class bias on images at their natural prevalence.

    Args:
        logits: [N, C], finite, N >= 1.
        labels: [N] class indices.
        taxonomy: gives class order.
    Returns:
        The calibration with the class shares it was fitted at; the biases sum to zero.
    Raises:
        ContractError: the shapes do not fit, there are no images, or a logit is not finite.
    """
    # Here, since processes that only predict load this module.
    from scipy.optimize import minimize

    num_classes = len(taxonomy.codes)
    logits = checked_logits(logits, labels, num_classes)
    start = np.zeros(1 + num_classes)
    bounds = [LOG_TEMPERATURE_BOUNDS] + [(None, None)] * num_classes
    # The temperature is fitted as its logarithm, so that it stays positive and its prior is symmetric.
    fitted = minimize(
        _penalised_loss, start, args=(logits, labels), jac=True, method="L-BFGS-B", bounds=bounds,
        options={"maxiter": 500, "ftol": 1e-14, "gtol": 1e-9},
    )  # fmt: skip
    # Softmax ignores a constant added to all biases; a sum of zero makes equal fits equal numbers.
    bias = fitted.x[1:] - fitted.x[1:].mean()
    shares = np.bincount(labels, minlength=num_classes) / len(labels)
    return Calibration(
        temperature=float(np.exp(fitted.x[0])),
        bias=[float(b) for b in bias],
        priors={code: float(share) for code, share in zip(taxonomy.codes, shares, strict=True)},
    )


def checked_logits(logits: NDArray[np.floating], labels: IntArray, num_classes: int) -> FloatArray:
    """Return logits in float64; ContractError if they are not [N >= 1, C] beside N labels, or not finite."""
    checked: FloatArray = np.asarray(logits, dtype=np.float64)
    if checked.shape != (len(labels), num_classes) or len(labels) == 0:
        raise ContractError(f"logits must be [N >= 1, {num_classes}] beside N labels, got {list(checked.shape)}")
    if not np.isfinite(checked).all():
        row = int(np.flatnonzero(~np.isfinite(checked).all(axis=1))[0])
        raise ContractError(f"row {row} of the logits is not finite; such a model cannot be calibrated")
    return checked


def apply_calibration(
    logits: NDArray[np.floating], calibration: Calibration, added: FloatArray | None = None
) -> FloatArray:
    """Turn logits into calibrated probabilities.

    Args:
        logits: [N, C].
        calibration: of the model.
        added: [N, C], finite: what the context adds to the scaled logits; None: nothing.
    Returns:
        [N, C] in float64; rows sum to 1. A row with a logit that is not finite becomes NaN throughout.
    Raises:
        ContractError: C differs from the calibration's.
    """
    if logits.ndim != 2 or logits.shape[1] != len(calibration.bias):
        raise ContractError(f"logits must be [N, {len(calibration.bias)}], got {list(logits.shape)}")
    finite = np.isfinite(logits).all(axis=1)
    # Only finite rows are computed: softmax would warn about the others.
    probabilities = np.full(logits.shape, np.nan)
    scaled = logits[finite].astype(np.float64) / calibration.temperature + np.asarray(calibration.bias)
    probabilities[finite] = softmax(scaled if added is None else scaled + added[finite], axis=1)
    return probabilities


def reweight(probabilities: FloatArray, from_priors: Mapping[str, float], to_priors: Mapping[str, float]) -> FloatArray:
    """Move probabilities to another prevalence by Bayes: p_c * to_c / from_c, scaled to sum to 1.

    It holds where only the shares of the classes differ, not what each class looks like.

    Args:
        probabilities: [N, C], in the order of `from_priors`.
        from_priors: class shares that the probabilities were calibrated at.
        to_priors: class shares of the stated population; the same classes, scaled to sum to 1.
    Returns:
        [N, C].
    Raises:
        TaxonomyError: the classes differ, or a share is negative.
        ContractError: a class has a share in the stated population and had none before.
    """
    if set(from_priors) != set(to_priors) or min(to_priors.values()) < 0:
        raise TaxonomyError(f"the stated prevalence needs a share >= 0 for each of {', '.join(from_priors)}")
    before = np.array([from_priors[code] for code in from_priors])
    after = np.array([to_priors[code] for code in from_priors]) / sum(to_priors.values())
    if ((before == 0) & (after > 0)).any():
        raise ContractError("a class without a share in the calibration data cannot get a prevalence above 0")
    # Where the old share is 0, so is the new one: such a class keeps probability 0.
    ratio = np.divide(after, before, out=np.zeros_like(after), where=before > 0)
    weighted = probabilities * ratio
    return np.asarray(weighted / weighted.sum(axis=1, keepdims=True), dtype=np.float64)


def stated_prevalence(stated: Mapping[str, float], priors: Mapping[str, float]) -> dict[str, float]:
    """Complete a prevalence that is stated for some classes; the others share the rest as they did before.

    Args:
        stated: class code to share, 0 to 1; the sum is at most 1, and 1 if every class is stated.
        priors: class shares at calibration, of every class.
    Returns:
        Class code to share, in the order of `priors`; they sum to 1.
    Raises:
        ConfigError: an unknown class, a share outside 0 to 1, a sum that cannot be, or a class with a share now and
            none in the calibration data.

    >>> stated_prevalence({"nv": 0.8}, {"mel": 0.1, "nv": 0.6, "bcc": 0.3})
    {'mel': 0.05, 'nv': 0.8, 'bcc': 0.15}
    """
    unknown = sorted(set(stated) - set(priors))
    if unknown:
        raise ConfigError(f"prevalence names the class {unknown[0]!r}; there are {', '.join(priors)}")
    for code, share in stated.items():
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"prevalence of {code} is {share:g}; it must be a share from 0 to 1, such as {code}=0.1")
        if share > 0 and priors[code] == 0:
            raise ConfigError(
                f"prevalence of {code} is {share:g}, but calibration had none of this class; leave it out"
            )
    rest, others = 1.0 - sum(stated.values()), sum(priors[code] for code in priors if code not in stated)
    if rest < -1e-6 or (rest > 1e-6 and others == 0):
        raise ConfigError(f"the stated prevalence sums to {1.0 - rest:g}; it must be 1, or less and leave classes out")
    return {
        code: stated[code] if code in stated else round(max(0.0, rest) * priors[code] / others, 12) for code in priors
    }


def _penalised_loss(parameters: FloatArray, logits: FloatArray, labels: IntArray) -> tuple[float, FloatArray]:
    """Return mean negative log posterior and its gradient in (log temperature, biases)."""
    log_temperature, bias = parameters[0], parameters[1:]
    scaled = logits * np.exp(-log_temperature)
    log_p = log_softmax(scaled + bias, axis=1)
    rows = np.arange(len(labels))
    residual = np.exp(log_p)
    residual[rows, labels] -= 1.0
    count = len(labels)
    loss = -log_p[rows, labels].sum()
    loss += 0.5 * (bias**2).sum() / BIAS_PRIOR_SD**2 + 0.5 * (log_temperature / LOG_TEMPERATURE_PRIOR_SD) ** 2
    gradient = np.concatenate(
        [
            # d(scaled) / d(log temperature) = -scaled, because scaled = logits * exp(-log temperature).
            [-(residual * scaled).sum() + log_temperature / LOG_TEMPERATURE_PRIOR_SD**2],
            residual.sum(axis=0) + bias / BIAS_PRIOR_SD**2,
        ]
    )
    return float(loss / count), gradient / count
