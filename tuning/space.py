"""The search space, derived from the registries of the trainers; nothing is declared here a second time.

An axis (optimizer, scheduler, augmentation, model, loss, sampler) is a setting whose value names a record
of a registry. A draw picks a record, then only the settings that this record makes tunable: a momentum is
drawn for SGD and for nothing else. A policy of augmentation may also be composed of operations, each with
a probability and a strength. Out: overrides, a dict from the dotted name of a field of TrainersSettings
(`optimizer.momentum`) to its value.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
from pydantic import ValidationError

from records.errors import ConfigError, ContractError
from records.ids import hash_of
from records.registry import Choice, Range, Registered, Registry, Tunable
from records.settings import first_problem
from trainers.augmentation import POLICIES
from trainers.augmentation.operations import OPERATIONS
from trainers.augmentation.registry import PREFIX, Step, format_steps, parse_steps
from trainers.optimization.losses import LOSSES
from trainers.optimization.optimizers import OPTIMIZERS, learning_rate_of
from trainers.optimization.samplers import SAMPLERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.settings import TrainersSettings
from tuning.settings import Axis
from vision.networks import MODELS


def random_chooser(random: np.random.Generator) -> Callable[[str, Tunable], Any]:
    """Return what decides by chance; the generator's state decides the result."""

    def choose(name: str, tunable: Tunable) -> Any:
        return draw(tunable, random)

    return choose


def draw(tunable: Tunable, random: np.random.Generator) -> Any:
    """Draw one value.

    Returns the value; numbers that are not whole have four digits, which is enough for a setting and can be typed.
    """
    if isinstance(tunable, Choice):
        return tunable.values[int(random.integers(len(tunable.values)))]
    if tunable.integer:
        return _draw_integer(tunable, random)
    if tunable.log:
        value = math.exp(random.uniform(math.log(tunable.low), math.log(tunable.high)))
    else:
        value = random.uniform(tunable.low, tunable.high)
    return four_digits(value, tunable)


def four_digits(value: float, tunable: Range) -> float:
    """Round to four digits without leaving the range."""
    return min(tunable.high, max(tunable.low, float(f"{value:.4g}")))


def _draw_integer(tunable: Range, random: np.random.Generator) -> int:
    low, high = math.ceil(tunable.low), math.floor(tunable.high)
    if tunable.log:
        return min(high, max(low, round(math.exp(random.uniform(math.log(low), math.log(high))))))
    return int(random.integers(low, high + 1))


REGISTRIES: Mapping[Axis, Registry[Any]] = {
    Axis.OPTIMIZER: OPTIMIZERS,
    Axis.SCHEDULER: SCHEDULERS,
    Axis.AUGMENTATION: POLICIES,
    Axis.MODEL: MODELS,
    Axis.LOSS: LOSSES,
    Axis.SAMPLER: SAMPLERS,
}
COMPOSED = Registered(name="composed", description="a set of operations, each with a probability and a strength")
PROBABILITY = Range(0.1, 0.9)
STRENGTH = Range(0.05, 1.0)
OFF_OR_ON = Choice((False, True))

Chooser = Callable[[str, Tunable], Any]
"""Given the name of a decision and what it may be, decides."""


@dataclass(frozen=True)
class SearchSpace:
    """What may be varied.

    Args:
        axes: axis to the records it may take.
        free: settings that no record owns, to what they may be.
    """

    axes: Mapping[Axis, tuple[Registered, ...]]
    free: Mapping[str, Tunable] = field(default_factory=dict)

    def draw(self, choose: Chooser, fixed: Mapping[Axis, str] | None = None) -> dict[str, Any]:
        """Draw one configuration, one decision after the other.

        Returns overrides of TrainersSettings: the name on each axis, then the settings that it makes tunable.
        """
        overrides: dict[str, Any] = {}
        for axis, records in self.axes.items():
            by_name = {record.name: record for record in records}
            name = (fixed or {}).get(axis) or choose(axis.value, Choice(tuple(by_name)))
            overrides[axis.setting] = name
            for setting, tunable in by_name[name].tunable.items():
                overrides[f"{axis}.{setting}"] = choose(f"{name}.{setting}", tunable)
            if name == COMPOSED.name:
                overrides[axis.setting] = _compose(choose)
        for setting, tunable in self.free.items():
            overrides[setting] = choose(setting, tunable)
        return overrides

    def sample(self, random: np.random.Generator, fixed: Mapping[Axis, str] | None = None) -> dict[str, Any]:
        """Draw one configuration by chance.

        Returns overrides of TrainersSettings.
        """
        return self.draw(random_chooser(random), fixed)

    def level(self, axis: Axis, settings: TrainersSettings) -> str:
        """Return the record of an axis that settings stand for; every line `ops:` is the composed policy."""
        value: str = attrgetter(axis.setting)(settings)
        return COMPOSED.name if value.startswith(PREFIX) else value

    def replay(self, settings: TrainersSettings, ask: Chooser) -> None:
        """Repeat the decisions behind given settings, for example to add a trial to a searcher's history."""
        for axis, records in self.axes.items():
            by_name = {record.name: record for record in records}
            name = self.level(axis, settings)
            if name not in by_name:
                continue
            ask(axis.value, Choice((name,)))
            for setting in by_name[name].tunable:
                value = attrgetter(f"{axis}.{setting}")(settings)
                # No rate means the optimizer's own, which is the number that the searcher has to learn from.
                if value is None and setting == "learning_rate":
                    value = learning_rate_of(settings.optimizer)
                ask(f"{name}.{setting}", Choice((value,)))
            if name == COMPOSED.name:
                _recall_steps(parse_steps(settings.augmentation), ask)
        for setting in self.free:
            ask(setting, Choice((attrgetter(setting)(settings),)))

    def tunables(self) -> dict[str, Tunable]:
        """Return every decision that a draw may be asked, by name."""
        found: dict[str, Tunable] = {}
        for axis, records in self.axes.items():
            found[axis.value] = Choice(tuple(record.name for record in records))
            for record in records:
                found |= {f"{record.name}.{name}": tunable for name, tunable in record.tunable.items()}
            if COMPOSED in records:
                found |= _composed_tunables()
        return found | dict(self.free)

    def describe(self) -> dict[str, Any]:
        """Return the space as plain values: axis, record, field, range; then the settings that no record owns."""
        described: dict[str, Any] = {
            axis.value: {
                record.name: {name: tunable.as_dict() for name, tunable in record.tunable.items()} for record in records
            }
            for axis, records in self.axes.items()
        }
        free = {name: tunable.as_dict() for name, tunable in self.free.items()}
        return described | ({"settings": free} if free else {})

    @property
    def hash(self) -> str:
        """SHA-256 of the description; another space draws other configurations."""
        return hash_of(self.describe())


def derive_space(search: Sequence[Axis], base: TrainersSettings) -> SearchSpace:
    """Derive the space from the registries.

    Raises ContractError: a record makes something tunable that is no setting of its axis.
    """
    space = SearchSpace({axis: _records(axis, base) for axis in search})
    known = base.flat()
    for axis, records in space.axes.items():
        for record in records:
            for name in record.tunable:
                if f"{axis}.{name}" not in known:
                    raise ContractError(
                        f"{record.name} makes {axis}.{name} tunable, which is no setting of the trainers"
                    )
    return space


def with_overrides(base: TrainersSettings, overrides: Mapping[str, Any]) -> TrainersSettings:
    """Return `base` with some fields changed, validated as a whole.

    Args:
        base: the given settings.
        overrides: dotted name of a field to its value.
    Returns:
        The settings.
    Raises:
        ConfigError: the result is not valid (names the field).
    """
    try:
        return base.with_values(overrides)
    except ValidationError as error:
        name, reason = first_problem(error)
        value = error.errors(include_url=False)[0].get("input")
        # Where fields do not fit together, the input is all of them.
        alone = name and not isinstance(value, Mapping)
        what = f"trainers.{name} = {value!r}" if alone else f"the change of {', '.join(overrides)}"
        raise ConfigError(f"{what} cannot be tried: {reason}") from error


def difference(base: TrainersSettings, other: TrainersSettings) -> dict[str, Any]:
    """Return the overrides that make `other` out of `base`, as JSON values."""
    before, after = base.flat(), other.flat()
    return {name: after[name] for name in after if after[name] != before[name]}


def _records(axis: Axis, base: TrainersSettings) -> tuple[Registered, ...]:
    registry = REGISTRIES[axis]
    given: str = attrgetter(axis.setting)(base)
    composed = (COMPOSED,) if axis is Axis.AUGMENTATION else ()
    known = given in registry or given.startswith(PREFIX)
    own = () if known else (Registered(name=given, description="given by the caller"),)
    return (*registry.records, *own, *composed)


def _compose(choose: Chooser) -> str:
    steps = []
    for operation in OPERATIONS.records:
        if not choose(f"{COMPOSED.name}.{operation.name}", OFF_OR_ON):
            continue
        probability = choose(f"{COMPOSED.name}.{operation.name}.probability", PROBABILITY)
        strong = operation.at_strength is not None
        strength = choose(f"{COMPOSED.name}.{operation.name}.strength", STRENGTH) if strong else None
        steps.append(Step(operation.name, round(probability, 2), None if strength is None else round(strength, 2)))
    return format_steps(steps)


def _recall_steps(steps: Sequence[Step], ask: Chooser) -> None:
    by_name = {step.operation: step for step in steps}
    for name in OPERATIONS:
        ask(f"{COMPOSED.name}.{name}", Choice((name in by_name,)))
        if name in by_name:
            ask(f"{COMPOSED.name}.{name}.probability", Choice((by_name[name].probability,)))
            if by_name[name].strength is not None:
                ask(f"{COMPOSED.name}.{name}.strength", Choice((by_name[name].strength,)))


def _composed_tunables() -> dict[str, Tunable]:
    found: dict[str, Tunable] = {}

    def note(name: str, tunable: Tunable) -> Any:
        found[name] = tunable
        return True if tunable is OFF_OR_ON else 0.5

    _compose(note)
    return found


def axes_of(space: SearchSpace) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each axis with the names that it may be."""
    for axis, records in space.axes.items():
        yield axis.value, tuple(record.name for record in records)
