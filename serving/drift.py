"""Drift of a source: whether its images, or the scores of the model for them, have changed over time.

In: the predictions of one source by one model, in order. Out: an alarm with the statistic that changed. The rank of
each value among all before it is uniform and independent of the earlier ranks as long as nothing changes (conformal
p-values; Vovk and others, 2003). A bet against uniform ranks multiplies its capital by a factor whose mean is 1; the
Shiryaev-Roberts sum of such bets, begun anew at every image, has mean n after n images, so the probability that it
ever reaches A within n images is at most n / A, whatever the distribution (Doob). Each statistic has A = statistics /
`serving.drift_false_alarm`. After 2,000 images a random half of the values is kept and the sum starts anew: memory is
bounded, and a change at that moment is found all the same.
"""

import math
import random
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from records.ids import sha256_hex
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Cursor, Prediction

CURSOR = "serving.drift"
"""Cursor that names the sources that drift, which the predictors read."""
BLOCK = 2000
FEWEST = 30
"""Values of a source from which ranks are bet on."""
KEPT_IDS = 12
_JUMP = 0.01
"""Part of the capital that moves to the other bets at each image, so that the best one is found soon."""
_QUANTILES = (0.1, 0.5, 0.9)
_STATE = ("values", "capital", "risen", "lowest", "times")

STATISTICS: dict[str, str] = {
    "out_of_distribution_score": "inputs: distance from the training images",
    "quality_score": "inputs: image quality",
    "malignant": "scores: probability of a malignant class",
    "confidence": "scores: probability of the label",
}


class DriftAlarm(BaseModel):
    """What changed in a source."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistic: str = Field(description="name in STATISTICS")
    raised_at: datetime
    began_about: datetime = Field(description="of the image at which the evidence began to grow")
    images: int = Field(ge=1, description="of the source when it was raised")
    before: list[float] = Field(description="10th, 50th and 90th percentile before")
    after: list[float] = Field(description="the same since the change")
    images_before: list[str] = Field(description="ids of some predictions before")
    images_after: list[str] = Field(description="ids of the last predictions")


@dataclass
class Watched:
    """One statistic of a source: the values so far, and the capital of each bet."""

    values: list[float] = field(default_factory=list)
    ordered: list[float] = field(default_factory=list, repr=False)
    capital: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    risen: list[float] = field(default_factory=lambda: [0.0] * len(_BETS))
    """logarithm of what each bet has won since it was lowest"""
    lowest: list[int] = field(default_factory=lambda: [0] * len(_BETS))
    """number of values at that moment, which is where a change that the bet is about began"""
    times: list[str] = field(default_factory=lambda: [""] * len(_BETS))
    """that moment"""

    def see(self, value: float, draw: float, at: str = "") -> float:
        """Take a value and return the capital; `draw` in [0, 1) decides between equal values."""
        value, number = round(value, 6), len(self.ordered) + 1
        larger = number - 1 - bisect_right(self.ordered, value)
        equal = bisect_right(self.ordered, value) - bisect_left(self.ordered, value) + 1
        rank = min(max((larger + draw * equal) / number, 1e-9), 1 - 1e-9)
        self.values.append(value)
        insort(self.ordered, value)
        if number > FEWEST:
            pooled = _JUMP * sum(self.capital) / len(_BETS)
            for number, bet in enumerate(_BETS):
                factor = bet(rank)
                self.capital[number] = ((1 - _JUMP) * self.capital[number] + pooled + 1 / len(_BETS)) * factor
                self.risen[number] += math.log(factor)
                if self.risen[number] <= 0.0:
                    self.risen[number], self.lowest[number], self.times[number] = 0.0, len(self.values), at
        return sum(self.capital)

    def began(self) -> tuple[int, str]:
        """Return after how many values, and when, the change began that the best bet is about."""
        best = max(range(len(_BETS)), key=self.risen.__getitem__)
        return min(self.lowest[best], len(self.values) - 1), self.times[best]

    def shorten(self, seed: str) -> None:
        """Keep a random half of the values and begin anew, once there are many."""
        if len(self.values) >= BLOCK:
            # Drawn without looking at the values: a chosen half would make the next ranks depend on it.
            chosen = sorted(random.Random(seed).sample(range(len(self.values)), BLOCK // 2))
            self.values = [self.values[row] for row in chosen]
            self.ordered, self.lowest = sorted(self.values), [len(self.values)] * len(_BETS)
            self.capital, self.risen = [0.0] * len(_BETS), [0.0] * len(_BETS)


_BETS: tuple[Callable[[float], float], ...] = (
    lambda rank: 1.0,
    lambda rank: 0.5 * rank**-0.5,
    lambda rank: 0.5 * (1 - rank) ** -0.5,
)
"""Factors with mean 1 over uniform ranks: no change, larger values, smaller values."""


class Source:
    """One source of predictions by one model.

    Args:
        false_alarm: setting `serving.drift_false_alarm`.
        state: what `state` returned earlier; None begins anew.
    """

    def __init__(self, false_alarm: float, state: Mapping[str, Any] | None = None) -> None:
        known = dict(state or {})
        self.limit = len(STATISTICS) / false_alarm
        self.images: int = known.get("images", 0)
        self.alarm = DriftAlarm.model_validate(known["alarm"]) if known.get("alarm") else None
        self._first: list[str] = list(known.get("first", []))
        self.last: list[str] = list(known.get("last", []))
        self.watched = {name: _restored(known.get("watched", {}).get(name)) for name in STATISTICS}

    def see(self, prediction: Prediction, taxonomy: Taxonomy) -> bool:
        """Take the next prediction; returns whether it raises the alarm. After an alarm nothing is tested any more."""
        if self.alarm is not None:
            return False
        self.images += 1
        if len(self._first) < KEPT_IDS:
            self._first.append(prediction.id)
        self.last = [*self.last, prediction.id][-KEPT_IDS:]
        for name, value in values_of(prediction, taxonomy).items():
            watched = self.watched[name]
            if watched.see(value, _draw(prediction.id, name), prediction.created_at.isoformat()) >= self.limit:
                self.alarm = self._raised(name, prediction.created_at)
                return True
            watched.shorten(f"{prediction.id}:{name}")
        return False

    def state(self) -> dict[str, Any]:
        """Return what a later `Source` goes on from, as JSON."""
        watched = {name: {key: getattr(one, key) for key in _STATE} for name, one in self.watched.items()}
        return {
            "images": self.images, "first": self._first, "last": self.last, "watched": watched,
            "alarm": None if self.alarm is None else self.alarm.model_dump(mode="json"),
        }  # fmt: skip

    def _raised(self, name: str, now: datetime) -> DriftAlarm:
        watched = self.watched[name]
        began, at = watched.began()
        return DriftAlarm(
            statistic=name, raised_at=now, began_about=datetime.fromisoformat(at) if at else now,
            images=self.images, before=_quantiles(watched.values[:began]), after=_quantiles(watched.values[began:]),
            images_before=self._first, images_after=self.last,
        )  # fmt: skip


def source_of(organisation: str, context: Mapping[str, Any]) -> str:
    """Return the name of the source of an image: who sent it, and the device and institution that took it."""
    return " · ".join([organisation, *(str(context[name]) for name in ("site", "device") if context.get(name))])


def key_of(source: str) -> str:
    """Return what the ledger keeps instead of a source's name, which an erasure could not find there."""
    return sha256_hex(source.encode())[:32]


def values_of(prediction: Prediction, taxonomy: Taxonomy) -> dict[str, float]:
    """Return the statistics of a prediction that are known and finite, by name."""
    probabilities = prediction.probabilities
    found = {
        "out_of_distribution_score": prediction.out_of_distribution_score,
        "quality_score": prediction.quality_score,
        "malignant": sum(probabilities[c] for c in taxonomy.malignant_codes) if probabilities else None,
        "confidence": prediction.confidence,
    }
    return {name: float(value) for name, value in found.items() if value is not None and np.isfinite(value)}


def _restored(state: Mapping[str, Any] | None) -> Watched:
    if state is None:
        return Watched()
    return Watched(**{key: list(state[key]) for key in _STATE}, ordered=sorted(state["values"]))


def _quantiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.quantile(values, _QUANTILES)] if values else []


def _draw(prediction_id: str, name: str) -> float:
    return int(sha256_hex(f"{name}:{prediction_id}".encode())[:13], 16) / 2**52


def drifting_sources(store: Store) -> frozenset[str]:
    """Return the keys of the sources that the last check found changed, for the model that served then."""
    with store.ledger.read() as tx:
        cursor = tx.get(Cursor, CURSOR)
    return frozenset(cursor.position["sources"]) if cursor is not None else frozenset()
