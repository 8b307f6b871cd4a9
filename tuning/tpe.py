"""Proposals of Optuna's tree-structured Parzen estimator. The study is rebuilt for each proposal, which makes a
proposal a function of the trials so far and a seed; no state has to be saved.

In: the space and the trials. Out: overrides of TrainersSettings.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from records.registry import Choice, Tunable
from trainers.settings import TrainersSettings
from tuning.space import SearchSpace, four_digits, with_overrides
from tuning.trials import TrialResult, TrialState


def suggest(
    space: SearchSpace, base: TrainersSettings, history: Sequence[TrialResult], *, seed: Sequence[int]
) -> dict[str, Any]:
    """Propose one configuration.

    Returns overrides of TrainersSettings.
    """
    import optuna

    logging.getLogger("optuna").setLevel(logging.ERROR)
    chance = int(np.random.SeedSequence(list(seed)).generate_state(1)[0])
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=chance, n_startup_trials=0)
    )
    tunables = space.tunables()
    for trial in history:
        study.add_trial(_frozen(space, tunables, with_overrides(base, trial.overrides), trial))
    asked = study.ask()

    def choose(name: str, tunable: Tunable) -> Any:
        if isinstance(tunable, Choice):
            return asked.suggest_categorical(name, tunable.values)
        if tunable.integer:
            return asked.suggest_int(name, int(tunable.low), int(tunable.high), log=tunable.log)
        return four_digits(asked.suggest_float(name, tunable.low, tunable.high, log=tunable.log), tunable)

    return space.draw(choose)


def _frozen(space: SearchSpace, tunables: dict[str, Tunable], settings: TrainersSettings, trial: TrialResult) -> Any:
    """Return Optuna's record of a trial, with the decisions that lie in the space."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import TrialState as State
    from optuna.trial import create_trial

    params: dict[str, Any] = {}
    distributions: dict[str, Any] = {}

    def note(name: str, decided: Tunable) -> None:
        tunable = tunables[name]
        value = decided.values[0] if isinstance(decided, Choice) else None
        if value not in tunable:
            return
        params[name] = value
        if isinstance(tunable, Choice):
            distributions[name] = CategoricalDistribution(tunable.values)
        elif tunable.integer:
            distributions[name] = IntDistribution(int(tunable.low), int(tunable.high), log=tunable.log)
        else:
            distributions[name] = FloatDistribution(tunable.low, tunable.high, log=tunable.log)

    space.replay(settings, note)
    if trial.state is TrialState.FINISHED:
        return create_trial(params=params, distributions=distributions, value=trial.score)
    state = State.RUNNING if trial.state is TrialState.RUNNING else State.PRUNED
    # A pruned trial counts by the best score up to each epoch, since that is what a finished one counts by.
    reached = dict(enumerate(np.maximum.accumulate(trial.scores).tolist(), start=1)) if trial.scores else {}
    return create_trial(params=params, distributions=distributions, intermediate_values=reached, state=state)
