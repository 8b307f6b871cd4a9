"""Which configuration is tried next: the given settings, then enqueued ones, then samples or suggestions.

Plan number n is a function of the seed, n, the space and the trials before it, so that a resumed search proposes what
it would have proposed. Samples are balanced: each choice of an axis comes equally often, which the comparison of
choices in `tuning.effects` needs.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from records.errors import ConfigError
from trainers.settings import TrainersSettings
from tuning.settings import Axis, Searcher
from tuning.space import COMPOSED, SearchSpace, difference, with_overrides
from tuning.trials import Origin, TrialPlan, TrialResult

# Choices of names alone repeat soon; a draw is repeated at most this often to find a configuration that is new.
MAX_DRAWS = 50

History = Sequence[TrialResult]


class Planner:
    """Plans trials by number.

    Args:
        space: that is searched.
        base: the given settings, trial 0.
        trials: how many in all.
        seed: of the samples.
        enqueued: whole settings to try first, for example earlier winners; equal ones are tried once.
        searcher: who proposes after them.
        startup_trials: for a searcher that learns: balanced samples before it proposes.
        done: trials of an earlier run, whose plans stand.
    """

    def __init__(
        self,
        space: SearchSpace,
        base: TrainersSettings,
        *,
        trials: int,
        seed: int,
        enqueued: Sequence[TrainersSettings] = (),
        searcher: Searcher = Searcher.RANDOM,
        startup_trials: int = 0,
        done: Iterable[TrialResult] = (),
    ) -> None:
        self.space = space
        self.base = base
        self._trials = trials
        self._seed = seed
        self._searcher = searcher
        self._startup_trials = startup_trials
        first = [base]
        for settings in enqueued:
            if settings not in first and len(first) < trials:
                first.append(settings)
        self._first = first
        self._plans: dict[int, TrialPlan] = {
            t.number: TrialPlan(number=t.number, origin=t.origin, overrides=t.overrides) for t in done
        }
        self._hashes: dict[int, str] = {n: self._hash(plan) for n, plan in self._plans.items()}

    def plan(self, number: int, history: History = ()) -> TrialPlan:
        """Return a plan.

        Returns the plan; the same one each time.
        """
        for earlier in range(number + 1):
            if earlier not in self._plans:
                made = self._make(earlier, [trial for trial in history if trial.number < earlier])
                self._plans[earlier] = made
                self._hashes[earlier] = self._hash(made)
        return self._plans[number]

    def is_balanced(self, number: int) -> bool:
        """Return whether a trial is one of the balanced samples."""
        sample = number - len(self._first)
        return sample >= 0 and (self._searcher is not Searcher.TPE or sample < self._startup_trials)

    def is_in_block(self, number: int, block_trials: int) -> bool:
        """Return whether a trial is one of the first balanced samples, which may be kept from an early end."""
        return self.is_balanced(number) and number - len(self._first) < block_trials

    def _make(self, number: int, history: History) -> TrialPlan:
        if number == 0:
            return TrialPlan(number=0, origin=Origin.DEFAULTS, overrides={})
        if number < len(self._first):
            overrides = difference(self.base, self._first[number])
            return TrialPlan(number=number, origin=Origin.ENQUEUED, overrides=overrides)
        if self.is_balanced(number):
            return self._sample(number)
        return self._suggest(number, history)

    def _sample(self, number: int) -> TrialPlan:
        # A generator per trial number: plans do not depend on how many were drawn before, so more trials keep the
        # first ones.
        random = np.random.default_rng([self._seed, number])
        levels = self._levels(number - len(self._first))

        def propose(attempt: int) -> dict[str, object]:
            # Where the balanced choices leave nothing new, others are taken.
            return self.space.sample(random, levels if attempt < MAX_DRAWS // 2 else None)

        return self._unseen(number, Origin.SAMPLED, propose)

    def _suggest(self, number: int, history: History) -> TrialPlan:
        from tuning.tpe import suggest

        def propose(attempt: int) -> dict[str, object]:
            return suggest(self.space, self.base, history, seed=[self._seed, number, attempt])

        return self._unseen(number, Origin.SUGGESTED, propose)

    def _unseen(self, number: int, origin: Origin, propose: Callable[[int], dict[str, object]]) -> TrialPlan:
        """Take the first proposal that can be trained and was not tried before."""
        seen = {self._hashes[earlier] for earlier in range(number) if earlier in self._hashes}
        plan = None
        for attempt in range(MAX_DRAWS):
            proposed = TrialPlan(number=number, origin=origin, overrides=propose(attempt))
            try:
                known = self._hash(proposed) in seen
            # Corners of the space were checked, but ranges in between may combine to something invalid.
            except ConfigError:
                continue
            plan = proposed
            if not known:
                break
        if plan is None:
            raise ConfigError(f"{MAX_DRAWS} draws from the space gave nothing that can be trained; narrow it")
        return plan

    def _levels(self, sample: int) -> dict[Axis, str]:
        """Return the choice of each axis for a sample: whole permutations of the choices, one after the other."""
        levels = {}
        for position, (axis, records) in enumerate(self.space.axes.items()):
            pass_number, place = divmod(sample, len(records))
            random = np.random.default_rng([self._seed, 1 + position, pass_number, len(records)])
            order = random.permutation(len(records))
            levels[axis] = records[int(order[place])].name
        if self._searcher is Searcher.PBT and COMPOSED in self.space.axes.get(Axis.AUGMENTATION, ()):
            # Only a composed policy has strengths that a population can change.
            levels[Axis.AUGMENTATION] = COMPOSED.name
        return levels

    def _hash(self, plan: TrialPlan) -> str:
        return with_overrides(self.base, plan.overrides).recipe_hash()
