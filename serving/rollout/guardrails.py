"""Guardrails of a rollout: sequential tests that may be evaluated after every request.

Each guardrail has n observations, x events among them, and a tolerated rate p0. Its e-value is the mean, over a few
worse rates p1, of (p1/p0)^x ((1-p1)/(1-p0))^(n-x). While the true rate is at most p0, each factor is a supermartingale,
so by Ville's inequality the e-value ever reaches K / alpha with probability at most alpha / K. The K guardrails share
one budget alpha: at most 5 % of rollouts of a harmless candidate are rolled back by mistake, however long they last
(Ramdas et al. 2023, Game-theoretic statistics and safe anytime-valid inference).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

ERROR_BUDGET = 0.05
"""Probability that a harmless candidate is rolled back, over a whole rollout and all guardrails."""


@dataclass(frozen=True)
class Guardrail:
    """An event that ends a rollout if its rate exceeds a limit.

    Args:
        name: key in `Rollout.evidence` and in the API.
        limit: tolerated rate of events per observation.
        text: what an event is, for the reason of a rollback.
    """

    name: str
    limit: float
    text: str


GUARDRAILS: dict[str, Guardrail] = {
    guardrail.name: guardrail
    for guardrail in (
        Guardrail("error", 0.01, "images for which it failed"),
        Guardrail("non_finite", 0.01, "images with finite output of the champion and none of the candidate"),
        Guardrail("slow", 0.20, "batches that took it more than three times as long"),
        Guardrail("downgrade", 0.05, "images that the champion refers and the candidate does not"),
    )
}
SLOW_FACTOR = 3.0

Counts = Mapping[str, tuple[int, int]]
"""guardrail -> (observations, events)"""


def log_evidence(observations: int, events: int, limit: float) -> float:
    """Return the log of the e-value against `rate <= limit`.

    >>> round(log_evidence(0, 0, 0.01), 6)
    0.0
    """
    worse = _worse_rates(limit)
    logs = [
        events * math.log(rate / limit) + (observations - events) * math.log((1 - rate) / (1 - limit)) for rate in worse
    ]
    # log-sum-exp: the products under- and overflow float64 after some thousand observations.
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(worse))


def threshold() -> float:
    """Return the log e-value from which a candidate is rolled back."""
    return math.log(len(GUARDRAILS) / ERROR_BUDGET)


def violated_guardrail(counts: Counts) -> Guardrail | None:
    """Return the first guardrail whose limit is exceeded beyond doubt, or None."""
    for name, (observations, events) in counts.items():
        if log_evidence(observations, events, GUARDRAILS[name].limit) >= threshold():
            return GUARDRAILS[name]
    return None


def _worse_rates(limit: float) -> list[float]:
    # Rates close to the limit detect small excess after many observations, large ones a broken candidate after a few.
    rates = [1.5 * limit, 2 * limit, 4 * limit, 0.5, 0.8, 0.99]
    return sorted({rate for rate in rates if limit < rate < 1})
