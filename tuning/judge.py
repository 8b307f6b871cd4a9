"""The pruner: asynchronous successive halving, median stopping, or no early stop.

In: (trial, epoch, score), as they arrive. Out: a Decision, which the journal keeps before it takes effect. The
decisions of an earlier run are replayed first and none is made twice, so a search that was killed resumes with its
rungs. Plain Python, without Ray.
"""

from collections.abc import Callable, Iterable
from statistics import median
from typing import Protocol

import numpy as np

from tuning.settings import Scheduler
from tuning.trials import Decision, SearchHeader


class Judge:
    """Decides once per (trial, epoch).

    Args:
        rule: of an early end.
        max_epochs: the budget of a trial, after which nothing is left to decide.
        is_exempt: trials that are never cut off, by number.
        past: decisions of an earlier run, in their order.
    """

    def __init__(
        self, rule: "Rule", max_epochs: int, is_exempt: Callable[[int], bool], past: Iterable[Decision] = ()
    ) -> None:
        self._rule = rule
        self.max_epochs = max_epochs
        self._is_exempt = is_exempt
        self._made: dict[tuple[int, int], Decision] = {}
        for decision in past:
            # Scores of the earlier run, in their order: asynchronous halving depends on who reached a rung first.
            self._rule.take_in(decision.number, decision.epoch, decision.score)
            self._made[decision.number, decision.epoch] = decision

    def known(self, number: int, epoch: int) -> Decision | None:
        """Return the decision that was made already, if there is one."""
        return self._made.get((number, epoch))

    def decide(self, number: int, epoch: int, score: float) -> Decision:
        """Decide whether a trial goes on after an epoch.

        Returns the decision; `goes_on` is false only where a trial is cut off. A repeated call returns the
        first decision, whatever the score is now.
        """
        made = self.known(number, epoch)
        if made is not None:
            return made
        # The bar before the score is taken in: a trial is compared with those that came before it, not with itself.
        rung, cutoff = self._rule.bar(epoch)
        self._rule.take_in(number, epoch, score)
        last = epoch >= self.max_epochs
        # Exempt trials are scored like all others and raise the bar; only their own end is never early.
        goes_on = last or cutoff is None or score >= cutoff or self._is_exempt(number)
        decision = Decision(number=number, epoch=epoch, score=score, rung=rung, cutoff=cutoff, goes_on=goes_on)
        self._made[number, epoch] = decision
        return decision


class Rule(Protocol):
    """When a score is too low to go on."""

    def bar(self, epoch: int) -> tuple[int | None, float | None]:
        """Return the rung (None between rungs) and the score to reach there (None: any score continues)."""
        ...

    def take_in(self, number: int, epoch: int, score: float) -> None:
        """Remember a score."""
        ...


class Halving:
    """Asynchronous successive halving (Li et al. 2018, the stopping form that Ray Tune has).

    After grace_epochs * factor^k epochs a trial goes on if it is not below the best 1/factor of those
    that came to that rung before it.
    """

    def __init__(self, grace_epochs: int, factor: int, max_epochs: int) -> None:
        self._factor = factor
        self._rungs: dict[int, list[float]] = {}
        rung = grace_epochs
        while rung < max_epochs:
            self._rungs[rung] = []
            rung *= factor

    def bar(self, epoch: int) -> tuple[int | None, float | None]:
        """Return the rung and the score to reach."""
        if epoch not in self._rungs:
            return None, None
        scores = self._rungs[epoch]
        return epoch, float(np.percentile(scores, 100.0 * (1.0 - 1.0 / self._factor))) if scores else None

    def take_in(self, number: int, epoch: int, score: float) -> None:
        """Remember a score of a rung."""
        if epoch in self._rungs:
            self._rungs[epoch].append(score)


class MedianStopping:
    """A trial ends when its epoch is below the median of what the others had at that epoch (Golovin et al. 2017).

    Args:
        grace_epochs: none ends before it.
        min_trials: none ends before so many others were there.
    """

    def __init__(self, grace_epochs: int, min_trials: int = 3) -> None:
        self._grace_epochs = grace_epochs
        self._min_trials = min_trials
        self._at: dict[int, list[float]] = {}

    def bar(self, epoch: int) -> tuple[int | None, float | None]:
        """Return the epoch and the median there."""
        scores = self._at.get(epoch, [])
        if epoch < self._grace_epochs or len(scores) < self._min_trials:
            return epoch, None
        return epoch, median(scores)

    def take_in(self, number: int, epoch: int, score: float) -> None:
        """Remember a score."""
        self._at.setdefault(epoch, []).append(score)


class NoStopping:
    """Every trial gets its whole budget."""

    def bar(self, epoch: int) -> tuple[int | None, float | None]:
        """Return no rung."""
        return None, None

    def take_in(self, number: int, epoch: int, score: float) -> None:
        """Remember nothing."""


def rule_of(header: SearchHeader) -> Rule:
    """Return the rule that a search is made with, knowing no score yet."""
    if header.scheduler == Scheduler.NONE:
        return NoStopping()
    if header.scheduler == Scheduler.MEDIAN:
        return MedianStopping(header.grace_epochs)
    return Halving(header.grace_epochs, header.reduction_factor, header.trial_epochs)
