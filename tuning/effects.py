"""What difference a choice makes: the effect of each optimizer, scheduler, policy, with its uncertainty.

Only balanced samples are compared, at a budget that all of them had, because their choices were drawn before any score
was seen; trials that a searcher proposed, or that got more epochs by successive halving, are biased. The effect of a
choice is its coefficient in an additive least-squares model of all axes, against the mean of its axis. With too few
trials for that, each axis gets a model of its own, to which the other axes are noise. Intervals are t-intervals with
Bonferroni correction over all choices of the search.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import stdtrit as student_quantile

from records.arrays import FloatArray
from trainers.augmentation.registry import PREFIX
from tuning.settings import Axis
from tuning.space import COMPOSED
from tuning.trials import Origin, SearchHeader, TrialResult

Estimates = dict[tuple[str, str], tuple[float, float, float]]
LEVEL = 0.95
LEAST_SPARE = 2
"""Residual degrees of freedom at least; with fewer, the residual variance is not estimated well enough."""
SAME = "not distinguishable"


class Effect(BaseModel):
    """What one choice does to the score, against the mean of its axis."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: str
    choice: str
    trials: int = Field(ge=0, description="balanced trials with it")
    effect: float | None = Field(description="of validation balanced accuracy; empty if it cannot be estimated")
    low: float | None = Field(description="of the interval that holds for all choices together, 95 %")
    high: float | None
    verdict: str = Field(description="better | worse | not distinguishable")
    seconds_per_epoch: float | None = Field(description="mean over all trials with it: what the choice costs")


class Effects(BaseModel):
    """All effects, and what they rest on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    basis: str = Field(description="which trials were compared, at which budget")
    trials: int = Field(ge=0)
    epochs: int = Field(ge=0, description="the budget that all of them had")
    table: tuple[Effect, ...]


def effects_of(header: SearchHeader, trials: Sequence[TrialResult]) -> Effects:
    """Estimate the effect of every choice of every axis.

    Returns an effect per choice; without enough balanced trials all are `not distinguishable`.
    """
    block, epochs, basis = _comparable(header, trials)
    levels = [_levels(header, trial) for trial in block]
    scores = np.array([max(trial.scores[:epochs]) for trial in block], dtype=np.float64)
    estimates, how = _estimates(header.axes, levels, scores)
    table = []
    for axis, choices in header.axes.items():
        for choice in choices:
            found = estimates.get((axis, choice))
            effect, low, high = found if found is not None else (None, None, None)
            table.append(
                Effect(
                    axis=axis,
                    choice=choice,
                    trials=sum(level.get(axis) == choice for level in levels),
                    effect=effect,
                    low=low,
                    high=high,
                    verdict=_verdict(low, high),
                    seconds_per_epoch=_cost(header, trials, axis, choice),
                )
            )
    return Effects(basis=basis + how, trials=len(block), epochs=epochs, table=tuple(table))


def _comparable(header: SearchHeader, trials: Sequence[TrialResult]) -> tuple[list[TrialResult], int, str]:
    """Return the balanced trials, the epochs that all of them had, and both in words."""
    if header.generation_epochs:
        return [], 0, "members of a population change while they train, which proves nothing about their choices"
    sampled = [trial for trial in trials if trial.origin is Origin.SAMPLED and trial.scores and trial.error is None]
    block = sampled[: header.block_trials]
    whole = [trial for trial in block if trial.epochs >= header.trial_epochs]
    if header.block_trials and len(whole) >= len(block) > 0:
        return whole, header.trial_epochs, f"{len(whole)} balanced trials with the whole budget"
    if not sampled:
        return [], 0, "no balanced trial was scored"
    epochs = min(trial.epochs for trial in sampled)
    return (
        sampled,
        epochs,
        f"{len(sampled)} balanced trials, each by its first {epochs} of {header.trial_epochs} epochs",
    )


def _levels(header: SearchHeader, trial: TrialResult) -> dict[str, str]:
    values = header.base | trial.overrides
    chosen = {axis: str(values[Axis(axis).setting]) for axis in header.axes}
    return {axis: COMPOSED.name if name.startswith(PREFIX) else name for axis, name in chosen.items()}


def _estimates(
    axes: Mapping[str, tuple[str, ...]], levels: Sequence[Mapping[str, str]], scores: FloatArray
) -> tuple[Estimates, str]:
    """Estimate all axes together, or each by itself where there are too few trials; say which."""
    met = {axis: [c for c in choices if any(row[axis] == c for row in levels)] for axis, choices in axes.items()}
    contrasts = sum(len(choices) for choices in met.values() if len(choices) > 1)
    together = _least_squares(met, levels, scores, contrasts)
    if together:
        return together, ""
    alone: Estimates = {}
    for axis, choices in met.items():
        alone |= _least_squares({axis: choices}, levels, scores, contrasts)
    return alone, ", each axis by itself: too few trials to estimate all together" if alone else ""


def _least_squares(
    met: Mapping[str, Sequence[str]], levels: Sequence[Mapping[str, str]], scores: FloatArray, contrasts_in_all: int
) -> Estimates:
    """Fit score = mean + one effect per axis; the effects of an axis sum to zero. Empty if it cannot be told apart."""
    columns: list[FloatArray] = [np.ones(len(levels))]
    names: list[tuple[str, str]] = []
    for axis, choices in met.items():
        for choice in choices[:-1]:
            # Sum-to-zero coding: the last choice of an axis is minus the sum of the others, so effects are against
            # the axis mean.
            column = [(row[axis] == choice) - float(row[axis] == choices[-1]) for row in levels]
            columns.append(np.array(column, dtype=np.float64))
            names.append((axis, choice))
    design = np.stack(columns, axis=1)
    spare = len(levels) - design.shape[1]
    if spare < LEAST_SPARE or np.linalg.matrix_rank(design) < design.shape[1]:
        return {}
    inverse = np.linalg.inv(design.T @ design)
    solution = inverse @ design.T @ scores
    variance = float(((scores - design @ solution) ** 2).sum()) / spare
    contrasts = {name: np.eye(design.shape[1])[1 + position] for position, name in enumerate(names)}
    for axis, choices in met.items():
        if len(choices) > 1:
            contrasts[axis, choices[-1]] = -sum(contrasts[axis, choice] for choice in choices[:-1])
    # Bonferroni: the error probability is divided by the number of choices in the whole search, so one wrong interval
    # among all is as rare as one alone.
    width = float(student_quantile(spare, 1.0 - (1.0 - LEVEL) / (2 * max(1, contrasts_in_all))))
    found = {}
    for name, contrast in contrasts.items():
        effect = float(contrast @ solution)
        half = width * float(np.sqrt(max(0.0, variance * (contrast @ inverse @ contrast))))
        found[name] = (effect, effect - half, effect + half)
    return found


def _verdict(low: float | None, high: float | None) -> str:
    if low is not None and low > 0:
        return "better"
    if high is not None and high < 0:
        return "worse"
    return SAME


def _cost(header: SearchHeader, trials: Sequence[TrialResult], axis: str, choice: str) -> float | None:
    seconds = [
        second for trial in trials if _levels(header, trial).get(axis) == choice for second in trial.epoch_seconds
    ]
    return fmean(seconds) if seconds else None


def importance_of(header: SearchHeader, trials: Sequence[TrialResult], seed: int = 0) -> dict[str, float] | None:
    """Say how much each setting moves the score: permutation importance in a random forest.

    Returns setting to its share, summing to 1; None with fewer than 12 scored trials, where it would be noise, and
    for a population, whose settings change while they are scored.
    """
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance

    scored = [trial for trial in trials if trial.scores and not trial.confirms]
    if len(scored) < 12 or header.generation_epochs:
        return None
    # The budget that all trials had: scores of longer trials would be larger for that reason alone.
    epochs = min(trial.epochs for trial in scored)
    names = sorted({name for trial in scored for name in trial.overrides if name != "seed"})
    rows = [_features(header, trial, names) for trial in scored]
    scores = np.array([max(trial.scores[:epochs]) for trial in scored])
    forest = RandomForestRegressor(n_estimators=100, random_state=seed, n_jobs=1).fit(np.array(rows), scores)
    found = permutation_importance(forest, np.array(rows), scores, n_repeats=10, random_state=seed).importances_mean
    kept = np.maximum(found, 0.0)
    total = float(kept.sum())
    if total <= 0:
        return None
    shares = {name: float(value) / total for name, value in zip(names, kept, strict=True)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _features(header: SearchHeader, trial: TrialResult, names: Sequence[str]) -> list[float]:
    values = header.base | trial.overrides
    levels = _levels(header, trial)
    axis_of = {Axis(axis).setting: axis for axis in header.axes}
    features = []
    for name in names:
        if name in axis_of:
            level, choices = levels[axis_of[name]], header.axes[axis_of[name]]
            features.append(float(choices.index(level)) if level in choices else -1.0)
        else:
            value = values.get(name)
            features.append(float(value) if isinstance(value, int | float) else -1.0)
    return features
