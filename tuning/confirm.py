"""Confirmation: train the leader and the given settings again with fresh seeds before one is called the winner.

The best of many scores is partly luck. So the leader of a search and the given settings are trained
again with the same few new seeds, at the budget of a trial and without an early end; the leader is
called the winner only if it is ahead of the given settings there as well.
"""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit as student_quantile

from trainers.settings import TrainersSettings
from tuning.trials import Confirmation, Origin, TrialPlan, TrialResult, Verdict

FIRST_NUMBER = 1_000_000
SEEDS_AT_MOST = 100
LEVEL = 0.95


def confirmation_plans(leader: TrialResult, base: TrainersSettings, seeds: int) -> list[TrialPlan]:
    """Plan the trainings that confirm a leader.

    Returns plans of the leader and of the given settings alternately; of the latter alone if they lead. Their
    numbers say whose configuration they repeat, so that going on finds them again.
    """
    found = []
    for index in range(seeds):
        seed = {"seed": (base.seed + 1 + index) % 2**31}
        for number, overrides in {leader.number: leader.overrides, 0: {}}.items():
            plan_number = FIRST_NUMBER + number * SEEDS_AT_MOST + index
            found.append(TrialPlan(number=plan_number, origin=Origin.CONFIRMATION, overrides=overrides | seed))
    return found


def verdict_on(leader: TrialResult, trials: Sequence[TrialResult]) -> Verdict | None:
    """Compare leader and given settings by their fresh seeds.

    Returns the verdict; None if one of the two has no confirmation that ended well.
    """
    own, given = _scores(leader.number, trials), _scores(0, trials)
    both = sorted(own.keys() & given.keys())
    if not both:
        return None
    # Paired by seed: initial weights and order of images are shared, so their spread cancels.
    differences = [own[index] - given[index] for index in both]
    mean = fmean(differences)
    low, high = interval(differences)
    winner = leader.number if mean >= 0 else 0
    return Verdict(
        winner=winner,
        winner_confirmed=_confirmation(winner, [(own if winner else given)[index] for index in both]),
        given_confirmed=_confirmation(0, [given[index] for index in both]),
        difference=mean,
        difference_low=low,
        difference_high=high,
        words=_words(leader.number, len(both), mean, low),
    )


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the 95 % t-interval of the mean; nothing with fewer than two values.

    >>> [round(end, 3) for end in interval([0.4, 0.5, 0.6])]
    [0.252, 0.748]
    """
    if len(values) < 2:
        return None, None
    half = float(student_quantile(len(values) - 1, 0.5 + LEVEL / 2)) * stdev(values) / sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def _scores(number: int, trials: Sequence[TrialResult]) -> dict[int, float]:
    first = FIRST_NUMBER + number * SEEDS_AT_MOST
    return {
        trial.number - first: trial.score
        for trial in trials
        if first <= trial.number < first + SEEDS_AT_MOST and trial.error is None and trial.score is not None
    }


def _confirmation(number: int, scores: list[float]) -> Confirmation:
    low, high = interval(scores)
    return Confirmation(number=number, scores=tuple(scores), mean=fmean(scores), low=low, high=high)


def _words(leader: int, seeds: int, mean: float, low: float | None) -> str:
    points = f"{100 * mean:+.1f} points over {seeds} fresh seed{'s' if seeds > 1 else ''}"
    if leader == 0:
        return f"the given settings led the search; they were trained with {seeds} fresh seeds"
    if mean < 0:
        return f"trial {leader} led the search but not with fresh seeds ({points}); the given settings stay"
    if low is None or low <= 0:
        return f"trial {leader} is ahead of the given settings by {points}, not distinguishable from chance"
    return f"trial {leader} is ahead of the given settings by {points}, and the interval excludes zero"
