"""Population-based training (Jaderberg et al. 2017): concurrent trials of which weak ones exploit strong ones.

All members train one generation, to the same epoch, and wait. Then the worst quarter exploits the best quarter: each
continues with the weights and settings of one of the best, learning rate and strengths of augmentation changed a
little. The others continue as they are; the given settings, trial 0, never change. Because all wait, a generation is a
function of the seed and its scores, however many trials run at a time.

Every step is in the journal before it takes effect and is not made again. Overrides hold all changes with their
epochs, so a member's settings can be trained again from the start, without a search.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from records.registry import Range, Tunable
from trainers.augmentation.policy import scaled_start
from trainers.augmentation.registry import PREFIX, Step, format_phases, parse_phases
from trainers.optimization.optimizers import OPTIMIZERS, learning_rate_of
from trainers.optimization.schedulers import rate_factor
from trainers.settings import TrainersSettings
from tuning.judge import Judge
from tuning.log import SearchLog
from tuning.planner import Planner
from tuning.space import STRENGTH, with_overrides
from tuning.trial import parts_folder
from tuning.trials import GenerationStep, SearchHeader, TrialPlan, TrialState

QUANTILE = 0.25
"""Share of the members that exploit others after a generation, and of those that are exploited; at least one."""
FACTORS = (0.8, 1.25)

Overrides = dict[str, Any]


class Population:
    """Plans what each member trains in each generation."""

    def __init__(
        self,
        header: SearchHeader,
        planner: Planner,
        *,
        judge: Judge,
        log: SearchLog,
        past: Sequence[GenerationStep],
        run_dir: Path,
    ) -> None:
        self._header = header
        self._planner = planner
        self._judge = judge
        self._log = log
        self._past = past
        self._run_dir = run_dir

    def plans(self) -> Iterator[TrialPlan | None]:
        """Yield the next generation of each member after another; None while the members wait for each other."""
        header = self._header
        plans = {number: self._planner.plan(number) for number in range(header.trials)}
        every, last = header.generation_epochs, header.trial_epochs
        for until in (*range(every, last, every), last):
            for number, plan in plans.items():
                plans[number] = plan.model_copy(update={"until_epoch": until})
                # A score that is known comes from the journal: the member has trained this generation in an earlier
                # run.
                if self._judge.known(number, until) is None and not self._is_out(number):
                    yield plans[number]
            while any(self._judge.known(number, until) is None and not self._is_out(number) for number in plans):
                yield None
            if until < last:
                # Members without a score failed or were lost; the next generation goes on without them.
                plans = {
                    step.number: plans[step.number].model_copy(
                        update={"overrides": step.overrides, "generation_step": step}
                    )
                    for step in self._generation_after(until, plans)
                }
                # Members continue from the checkpoints of `until`; those of the generation before are not read again.
                shutil.rmtree(parts_folder(self._run_dir, until - every), ignore_errors=True)
        shutil.rmtree(parts_folder(self._run_dir, last).parent, ignore_errors=True)

    def _is_out(self, number: int) -> bool:
        return any(t.number == number and t.state in (TrialState.FAILED, TrialState.LOST) for t in self._log.trials)

    def _generation_after(self, epoch: int, plans: Mapping[int, TrialPlan]) -> list[GenerationStep]:
        """Return the steps of all members: those in the journal, or new ones, journalled before they take effect."""
        past = [step for step in self._past if step.epoch == epoch]
        if past:
            return past
        made = {number: self._judge.known(number, epoch) for number in plans}
        scores = {number: decision.score for number, decision in made.items() if decision is not None}
        overrides = {number: plan.overrides for number, plan in plans.items()}
        steps = make_generation(epoch, scores, overrides, self._change, self._header.seed)
        self._log.generation(steps)
        return steps

    def _change(self, overrides: Overrides, epoch: int, random: np.random.Generator) -> Overrides:
        settings = with_overrides(self._planner.base, overrides)
        # Overrides count epochs of the full training; the trial is a shortened copy, so its epochs are scaled back.
        start = scaled_start(epoch + 1, settings.epochs / self._header.trial_epochs)
        known = self._planner.space.tunables()
        rates = known.get(f"{settings.optimizer.name}.learning_rate") or known.get("optimizer.learning_rate")
        if rates is None:
            rates = OPTIMIZERS[settings.optimizer.name].tunable["learning_rate"]
        return overrides | changed(settings, start, rates, random)


def make_generation(
    epoch: int,
    scores: Mapping[int, float],
    overrides: Mapping[int, Overrides],
    change: Callable[[Overrides, int, np.random.Generator], Overrides],
    seed: int,
) -> list[GenerationStep]:
    """Decide what each member of a population continues with; a function of its arguments alone.

    Args:
        epoch: the last epoch that all members have done.
        scores: score of that epoch, by number of the member.
        overrides: overrides that each member was trained with, by number.
        change: (overrides of the exploited member, epoch, generator) -> overrides to continue with.
        seed: of the search.
    Returns:
        One step per member with a score, in order of number.
    """
    ranked = sorted(scores, key=lambda number: (-scores[number], number))
    count = max(1, int(len(ranked) * QUANTILE)) if len(ranked) > 1 else 0
    # Trial 0 may be exploited by others and never exploits: the given settings have to be comparable at the end.
    best, worst = ranked[:count], set(ranked[len(ranked) - count :]) - {0}
    steps = []
    for number in sorted(scores):
        # One generator per (member, epoch): how many trials run at a time changes no draw.
        random = np.random.default_rng([seed, number, epoch])
        parent = best[int(random.integers(count))] if number in worst else number
        taken = overrides[parent]
        steps.append(
            GenerationStep(
                number=number,
                epoch=epoch,
                score=scores[number],
                parent=parent,
                parent_overrides=taken,
                overrides=change(taken, epoch, random) if parent != number else taken,
            )
        )
    return steps


def changed(settings: TrainersSettings, start: int, rates: Tunable, random: np.random.Generator) -> Overrides:
    """Change learning rate and strengths from an epoch on.

    Returns overrides; what the settings had planned for later epochs is dropped. A policy that is not in one line
    has no strengths and stays as it is.
    """
    rate, factor = learning_rate_of(settings.optimizer), rate_factor(settings.scheduler, start)
    low, high = (rates.low, rates.high) if isinstance(rates, Range) else (min(rates.values), max(rates.values))
    # Clipped to the searched range, as the initial rates are.
    wanted = min(high, max(low, rate * factor * random.choice(FACTORS)))
    # Changes that the exploited member had planned for later epochs are dropped; the new member's own follow from
    # later generations.
    factors = [list(pair) for pair in settings.scheduler.learning_rate_factors if pair[0] < start]
    found: Overrides = {"scheduler.learning_rate_factors": [*factors, [start, float(f"{wanted / rate:.4g}")]]}
    if settings.augmentation.startswith(PREFIX):
        begun = [phase for phase in parse_phases(settings.augmentation) if phase[0] <= start]
        steps = [_changed_step(step, random) for step in begun[-1][1]]
        found["augmentation"] = format_phases([*(phase for phase in begun if phase[0] < start), (start, steps)])
    return found


def _changed_step(step: Step, random: np.random.Generator) -> Step:
    if step.strength is None:
        return step
    wanted = step.strength * float(random.choice(FACTORS))
    return replace(step, strength=round(min(STRENGTH.high, max(STRENGTH.low, wanted)), 2))
