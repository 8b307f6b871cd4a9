"""Has a candidate done harm more often than is tolerated? Tests that may be looked at after every request.

For each kind of harm: n looks, x of them harm, tolerated rate p0. The e-value is the mean over a few worse rates p1
of (p1/p0)^x ((1-p1)/(1-p0))^(n-x). While the true rate is at most p0 each factor is a supermartingale, so by
Ville's inequality the e-value ever reaches K / alpha with probability at most alpha / K. The K kinds share one
budget alpha: a harmless candidate is taken back by mistake in at most 5 % of rollouts, however long they last
(Ramdas et al. 2023, Game-theoretic statistics and safe anytime-valid inference).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ERROR_BUDGET = 0.05
"""How often a candidate without harm may be taken back, over a whole rollout."""


@dataclass(frozen=True)
class Harm:
    """A kind of harm: how often it is tolerated, and what it is."""

    name: str
    tolerated: float
    text: str


HARMS: dict[str, Harm] = {
    harm.name: harm
    for harm in (
        Harm("error", 0.01, "images for which it failed"),
        Harm("non_finite", 0.01, "images with a finite answer of the champion and none of the candidate"),
        Harm("slow", 0.20, "batches that took it more than three times as long"),
        Harm("downgrade", 0.05, "images that the champion refers and the candidate answers by itself"),
    )
}
SLOW_FACTOR = 3.0

Counts = Mapping[str, tuple[int, int]]
"""kind of harm -> (how often looked, how often seen)"""


def log_evidence(looked: int, seen: int, tolerated: float) -> float:
    """Return the log of the e-value against `rate <= tolerated`.

    >>> round(log_evidence(0, 0, 0.01), 6)
    0.0
    """
    worse = _worse_rates(tolerated)
    logs = [
        seen * math.log(rate / tolerated) + (looked - seen) * math.log((1 - rate) / (1 - tolerated)) for rate in worse
    ]
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(worse))


def threshold() -> float:
    """Return the log of the e-value from which a candidate is taken back."""
    return math.log(len(HARMS) / ERROR_BUDGET)


def found_harm(counts: Counts) -> Harm | None:
    """Return the first kind of harm that is proven, or None."""
    return next(
        (HARMS[name] for name, (n, x) in counts.items() if log_evidence(n, x, HARMS[name].tolerated) >= threshold()),
        None,
    )


def looks_needed(name: str, rate: float) -> int | None:
    """Return after how many looks a harm of a steady rate is found; None beyond 100,000.

    Args:
        name: kind of harm.
        rate: how often it happens, 0 to 1.
    Returns:
        Looks, if exactly `rate` of them were harm.
    """
    low, high = 1, 100_000
    tolerated = HARMS[name].tolerated
    if log_evidence(high, math.floor(high * rate), tolerated) < threshold():
        return None
    while low < high:
        middle = (low + high) // 2
        if log_evidence(middle, math.floor(middle * rate), tolerated) >= threshold():
            high = middle
        else:
            low = middle + 1
    return low


def _worse_rates(tolerated: float) -> list[float]:
    rates = [1.5 * tolerated, 2 * tolerated, 4 * tolerated, 0.5, 0.8, 0.99]
    return sorted({rate for rate in rates if tolerated < rate < 1})
