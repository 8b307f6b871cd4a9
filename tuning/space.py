"""The search space, derived from the registries of the trainers; nothing is declared here a second time.

An axis (optimizer, scheduler, augmentation) is a field of TrainersSettings whose value names a record
of a registry. Sampling draws a record, then only the settings that this record makes tunable: a
momentum is drawn for SGD and for nothing else. Out: dicts of overrides of TrainersSettings.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from records.errors import ConfigError, ContractError
from records.ids import hash_of
from trainers.augmentation import POLICIES
from trainers.optimization.optimizers import OPTIMIZERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.registry import Choice, Range, Registered, Registry, Tunable
from trainers.settings import TrainersSettings
from tuning.settings import Axis
from tuning.trials import Origin, TrialPlan

REGISTRIES: Mapping[Axis, Registry[Any]] = {
    Axis.OPTIMIZER: OPTIMIZERS,
    Axis.SCHEDULER: SCHEDULERS,
    Axis.AUGMENTATION: POLICIES,
}
# Names alone can repeat when nothing else is tunable, so a draw is repeated this often before it is taken twice.
MAX_DRAWS = 50


@dataclass(frozen=True)
class SearchSpace:
    """What may be varied.

    Args:
        axes: axis to the records it may take.
    """

    axes: Mapping[Axis, tuple[Registered, ...]]

    def sample(self, random: np.random.Generator) -> dict[str, Any]:
        """Draw one configuration.

        Args:
            random: the only source of chance; its state decides the result.
        Returns:
            Overrides of TrainersSettings: the name on each axis, then the settings that it makes tunable.
        """
        overrides: dict[str, Any] = {}
        for axis, records in self.axes.items():
            record = records[int(random.integers(len(records)))]
            overrides[axis.value] = record.name
            for name, tunable in record.tunable.items():
                overrides[name] = _draw(tunable, random)
        return overrides

    def describe(self) -> dict[str, Any]:
        """Return the space as plain values: axis, record, field, range."""
        return {
            axis.value: {
                record.name: {name: tunable.as_dict() for name, tunable in record.tunable.items()} for record in records
            }
            for axis, records in self.axes.items()
        }

    @property
    def hash(self) -> str:
        """SHA-256 of the description; another space draws other configurations."""
        return hash_of(self.describe())


def derive_space(search: Sequence[Axis], base: TrainersSettings) -> SearchSpace:
    """Derive the space from the registries.

    Args:
        search: the axes to vary; what is not named stays as `base` has it.
        base: the given settings; a policy of the caller's own (a file) joins the registered ones.
    Returns:
        The space.
    Raises:
        ContractError: two axes make the same setting tunable, so that one would overrule the other.
    """
    space = SearchSpace({axis: _records(axis, base) for axis in search})
    owner: dict[str, Axis] = {}
    for axis, records in space.axes.items():
        for name in sorted({name for record in records for name in record.tunable}):
            if owner.setdefault(name, axis) is not axis:
                raise ContractError(f"both {owner[name]} and {axis} make {name} tunable; one setting needs one owner")
    return space


def plan_trials(
    space: SearchSpace, base: TrainersSettings, *, trials: int, seed: int, enqueued: Sequence[TrainersSettings] = ()
) -> Iterator[TrialPlan]:
    """Say what shall be tried: the given settings, then those the caller wants tried, then samples.

    Sample number n depends on the seed, n and the space only, so that a search which goes on draws
    what it would have drawn.

    Args:
        space: from `derive_space`.
        base: the given settings.
        trials: how many in all.
        seed: of the samples.
        enqueued: whole settings, for example earlier winners; equal ones are tried once.
    Yields:
        The plans, in order of number.
    """
    seen = [base]
    yield TrialPlan(number=0, origin=Origin.DEFAULTS, overrides={})
    for settings in enqueued:
        if settings not in seen and len(seen) < trials:
            yield TrialPlan(number=len(seen), origin=Origin.ENQUEUED, overrides=difference(base, settings))
            seen.append(settings)
    for number in range(len(seen), trials):
        random = np.random.default_rng([seed, number])
        overrides = space.sample(random)
        for _ in range(MAX_DRAWS):
            if with_overrides(base, overrides) not in seen:
                break
            overrides = space.sample(random)
        seen.append(with_overrides(base, overrides))
        yield TrialPlan(number=number, origin=Origin.SAMPLED, overrides=overrides)


def with_overrides(base: TrainersSettings, overrides: Mapping[str, Any]) -> TrainersSettings:
    """Return `base` with some fields changed, validated as a whole.

    Args:
        base: the given settings.
        overrides: field to value.
    Returns:
        The settings.
    Raises:
        ConfigError: the result is not valid (names the field).
    """
    try:
        return TrainersSettings.model_validate(base.model_dump() | dict(overrides))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the settings"
        raise ConfigError(f"trainers.{field} = {first.get('input')!r} cannot be tried: {first['msg']}") from error


def difference(base: TrainersSettings, other: TrainersSettings) -> dict[str, Any]:
    """Return the overrides that make `other` out of `base`, as JSON values."""
    before, after = base.model_dump(mode="json"), other.model_dump(mode="json")
    return {name: after[name] for name in after if after[name] != before[name]}


def _records(axis: Axis, base: TrainersSettings) -> tuple[Registered, ...]:
    registry = REGISTRIES[axis]
    given: str = getattr(base, axis.value)
    own = () if given in registry else (Registered(name=given, description="given by the caller"),)
    return (*registry.records, *own)


def _draw(tunable: Tunable, random: np.random.Generator) -> Any:
    if isinstance(tunable, Choice):
        return tunable.values[int(random.integers(len(tunable.values)))]
    if tunable.integer:
        return _draw_integer(tunable, random)
    if tunable.log:
        value = math.exp(random.uniform(math.log(tunable.low), math.log(tunable.high)))
    else:
        value = random.uniform(tunable.low, tunable.high)
    # Four digits are enough for a setting, and a person can type them.
    return min(tunable.high, max(tunable.low, float(f"{value:.4g}")))


def _draw_integer(tunable: Range, random: np.random.Generator) -> int:
    low, high = math.ceil(tunable.low), math.floor(tunable.high)
    if tunable.log:
        return min(high, max(low, round(math.exp(random.uniform(math.log(low), math.log(high))))))
    return int(random.integers(low, high + 1))
