"""Population-based training (Jaderberg et al. 2017): trials that train side by side and learn from each other.

All members train to the same epoch and wait. Then the worst quarter goes on with the weights of one of the
best quarter, and with its settings, of which the learning rate and the strengths of the augmentation are
changed a little; everybody else goes on as before. The given settings, trial 0, are never changed. Because
all wait, a generation is a function of the seed and of its scores, however many trials run at a time.

What a member goes on with is written to the journal before it takes effect and is not decided again. Its
settings say all changes with their epochs, so they can be trained again from the start without a search.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from records.registry import Range, Tunable
from trainers.augmentation.inline import PREFIX, Step, format_phases, parse_phases
from trainers.augmentation.policy import scaled_start
from trainers.optimization.optimizers import OPTIMIZERS, learning_rate_of
from trainers.optimization.schedulers import rate_factor
from trainers.settings import TrainersSettings
from tuning.judge import Judge
from tuning.log import SearchLog
from tuning.planner import Planner
from tuning.space import STRENGTH, with_overrides
from tuning.trial import parts_folder
from tuning.trials import SearchHeader, TrialPlan, TrialState, Turn

QUANTILE = 0.25
"""Share of the members that are replaced at a turn, and of those that they are replaced by; at least one."""
FACTORS = (0.8, 1.25)

Overrides = dict[str, Any]


class Population:
    """Plans the parts of all members' trainings.

    Args:
        header: of the search.
        planner: says what the members begin with, and within which space.
        judge: knows the score of every epoch.
        log: told of turns.
        past: turns of an earlier run.
        run_dir: of the search; checkpoints that nobody goes on with any more are removed from it.
    """

    def __init__(
        self,
        header: SearchHeader,
        planner: Planner,
        *,
        judge: Judge,
        log: SearchLog,
        past: Sequence[Turn],
        run_dir: Path,
    ) -> None:
        self._header = header
        self._planner = planner
        self._judge = judge
        self._log = log
        self._past = past
        self._run_dir = run_dir

    def plans(self) -> Iterator[TrialPlan | None]:
        """Yield the next part of a member's training; None while the members wait for each other."""
        header = self._header
        plans = {number: self._planner.plan(number) for number in range(header.trials)}
        for until in (*range(header.turn_epochs, header.trial_epochs, header.turn_epochs), header.trial_epochs):
            for number, plan in plans.items():
                plans[number] = plan.model_copy(update={"until_epoch": until})
                if self._judge.known(number, until) is None and not self._is_out(number):
                    yield plans[number]
            while any(self._judge.known(number, until) is None and not self._is_out(number) for number in plans):
                yield None
            if until < header.trial_epochs:
                turns = self._turns_after(until, plans)
                plans = {
                    turn.number: plans[turn.number].model_copy(update={"overrides": turn.overrides, "turn": turn})
                    for turn in turns
                }
                shutil.rmtree(parts_folder(self._run_dir, until - header.turn_epochs), ignore_errors=True)
        shutil.rmtree(parts_folder(self._run_dir, header.trial_epochs).parent, ignore_errors=True)

    def _is_out(self, number: int) -> bool:
        return any(t.number == number and t.state in (TrialState.FAILED, TrialState.LOST) for t in self._log.trials)

    def _turns_after(self, epoch: int, plans: Mapping[int, TrialPlan]) -> list[Turn]:
        """Return the turns of a generation: as they were made, or made and written down now."""
        past = [turn for turn in self._past if turn.epoch == epoch]
        if past:
            return past
        made = {number: self._judge.known(number, epoch) for number in plans}
        scores = {number: decision.score for number, decision in made.items() if decision is not None}
        overrides = {number: plan.overrides for number, plan in plans.items()}
        turns = make_turns(epoch, scores, overrides, self._change, self._header.seed)
        self._log.turned(turns)
        return turns

    def _change(self, overrides: Overrides, epoch: int, random: np.random.Generator) -> Overrides:
        settings = with_overrides(self._planner.base, overrides)
        # Overrides count in epochs of the whole training, of which a trial is a shortened one.
        start = scaled_start(epoch + 1, settings.epochs / self._header.trial_epochs)
        known = self._planner.space.tunables()
        rates = known.get(f"{settings.optimizer.name}.learning_rate") or known.get("optimizer.learning_rate")
        if rates is None:
            rates = OPTIMIZERS[settings.optimizer.name].tunable["learning_rate"]
        return overrides | changed(settings, start, rates, random)


def make_turns(
    epoch: int,
    scores: Mapping[int, float],
    overrides: Mapping[int, Overrides],
    change: Callable[[Overrides, int, np.random.Generator], Overrides],
    seed: int,
) -> list[Turn]:
    """Decide what the members of a population go on with.

    Args:
        epoch: that all have done.
        scores: of that epoch, by number of the member.
        overrides: that they were trained with.
        change: of what is taken over: (overrides, epoch, source of chance) -> overrides.
        seed: of the search; with it, epoch and scores decide.
    Returns:
        A turn for every member with a score, in order of number.
    """
    ranked = sorted(scores, key=lambda number: (-scores[number], number))
    count = max(1, int(len(ranked) * QUANTILE)) if len(ranked) > 1 else 0
    best, worst = ranked[:count], set(ranked[len(ranked) - count :]) - {0}
    turns = []
    for number in sorted(scores):
        random = np.random.default_rng([seed, number, epoch])
        parent = best[int(random.integers(count))] if number in worst else number
        taken = overrides[parent]
        turns.append(
            Turn(
                number=number,
                epoch=epoch,
                score=scores[number],
                parent=parent,
                parent_overrides=taken,
                overrides=change(taken, epoch, random) if parent != number else taken,
            )
        )
    return turns


def changed(settings: TrainersSettings, start: int, rates: Tunable, random: np.random.Generator) -> Overrides:
    """Change learning rate and strengths from an epoch on.

    Args:
        settings: so far.
        start: the first epoch that is different, 2 or later.
        rates: that the learning rate stays within.
        random: draws one of `FACTORS` for the learning rate and for each strength.
    Returns:
        Overrides; what the settings had planned for later epochs is dropped. A policy that is not in one line has no
        strengths and stays as it is.
    """
    rate, factor = learning_rate_of(settings.optimizer), rate_factor(settings.scheduler, start)
    low, high = (rates.low, rates.high) if isinstance(rates, Range) else (min(rates.values), max(rates.values))
    wanted = min(high, max(low, rate * factor * random.choice(FACTORS)))
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
