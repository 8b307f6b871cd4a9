"""Apply what a person said about the space, and refuse what cannot work before anything starts.

In: a derived space, names with Choices and Ranges. Out: the narrowed space, whose every corner is a
valid TrainersSettings.
"""

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

from records.errors import ConfigError
from records.registry import Choice, Range, Registered, Tunable
from trainers.settings import MACHINERY, TrainersSettings
from tuning.settings import Axis
from tuning.space import COMPOSED, REGISTRIES, SearchSpace, derive_space, with_overrides

SEARCHABLE = frozenset(
    name
    for name in TrainersSettings().flat()
    if name.partition(".")[0] not in MACHINERY | {"epochs", "seed", "precision", "early_stop_patience_epochs"}
) - {axis.setting for axis in Axis}
MOST_CORNERS = 4096


def narrow(space: SearchSpace, base: TrainersSettings, wanted: Mapping[str, Tunable]) -> SearchSpace:
    """Narrow a space, and let settings that no registry offers join it.

    Args:
        space: from `derive_space`.
        base: the given settings.
        wanted: name to what it may be; a name is an axis, a setting, or `record.setting`.
    Returns:
        The narrowed space.
    Raises:
        ConfigError: a name is unknown, a range has nothing in common with a registered one, or a
            combination of values can never be trained (names it, with the fix).
    """
    axes = {axis: list(records) for axis, records in space.axes.items()}
    for axis in Axis:
        if axis.value in wanted:
            axes[axis] = _chosen(axis, axes.get(axis), base, wanted[axis.value])
    free: dict[str, Tunable] = dict(space.free)
    for name, tunable in wanted.items():
        if name not in set(Axis):
            _apply(name, tunable, axes, free, base)
    narrowed = SearchSpace({axis: tuple(records) for axis, records in axes.items()}, free)
    _try_corners(narrowed, base)
    return narrowed


def _chosen(axis: Axis, known: list[Registered] | None, base: TrainersSettings, tunable: Tunable) -> list[Registered]:
    if not isinstance(tunable, Choice):
        raise ConfigError(f"space: {axis} takes names, as {axis}={','.join(REGISTRIES[axis].names[:2])}")
    records = known or list(derive_space((axis,), base).axes[axis])
    by_name = {record.name: record for record in records}
    chosen = []
    for value in tunable.values:
        if value not in by_name:
            raise ConfigError(f"space: {axis} {value!r} is unknown; there are {', '.join(by_name)}")
        chosen.append(by_name[value])
    return chosen


def _apply(
    name: str,
    tunable: Tunable,
    axes: dict[Axis, list[Registered]],
    free: dict[str, Tunable],
    base: TrainersSettings,
) -> None:
    """Narrow every record that owns a setting; a setting without an owner joins the space."""
    prefix, dot, setting = name.rpartition(".")
    owners = [
        (axis, index)
        for axis, records in axes.items()
        for index, record in enumerate(records)
        if setting in record.tunable and prefix in (axis.value, record.name)
    ]
    for axis, index in owners:
        record = axes[axis][index]
        narrowed = _common(f"{record.name}.{setting}", record.tunable[setting], tunable)
        axes[axis][index] = replace(record, tunable={**record.tunable, setting: narrowed})
    if owners:
        return
    if name not in SEARCHABLE:
        records = {record.name for chosen in axes.values() for record in chosen}
        what = "is unknown" if dot and prefix in records else "cannot be searched"
        raise ConfigError(f"space: {name} {what}; {_nearest(name, axes)}")
    owner = _owner_left_out(prefix, setting, axes, base)
    if owner:
        raise ConfigError(f"space: {name} belongs to {owner}, which the space leaves out; add {owner} or drop it")
    for value in tunable.values if isinstance(tunable, Choice) else (tunable.low, tunable.high):
        with_overrides(base, {name: value})
    free[name] = tunable


def _owner_left_out(
    part: str, setting: str, axes: Mapping[Axis, list[Registered]], base: TrainersSettings
) -> str | None:
    """Return a record that owns the setting, if neither the space nor the given settings use one that does."""
    if part not in set(Axis):
        return None
    axis = Axis(part)
    owners = [record.name for record in REGISTRIES[axis].records if setting in record.tunable]
    return str(owners[0]) if owners and (axis in axes or attrgetter(axis.setting)(base) not in owners) else None


def _common(name: str, registered: Tunable, wanted: Tunable) -> Tunable:
    """Return what two tunables have in common."""
    if isinstance(wanted, Choice):
        foreign = [value for value in wanted.values if value not in registered]
        if foreign:
            raise ConfigError(f"space: {name} cannot be {foreign[0]!r}; it may be {_words(registered)}")
        return wanted
    if isinstance(registered, Choice):
        raise ConfigError(f"space: {name} takes single values, not a range; it may be {_words(registered)}")
    low, high = max(registered.low, wanted.low), min(registered.high, wanted.high)
    if low > high:
        raise ConfigError(
            f"space: {_words(wanted)} leaves nothing of {name}, which may be {_words(registered)}; "
            f"change the range, or leave {name.split('.')[0]} out"
        )
    return replace(registered, low=low, high=high)


def _try_corners(space: SearchSpace, base: TrainersSettings) -> None:
    """Build the settings of every combination of names and values, so that no trial can be impossible."""
    for overrides in itertools.islice(_corners(space), MOST_CORNERS):
        try:
            with_overrides(base, overrides)
        except ConfigError as error:
            shown = ", ".join(f"{name.removesuffix('.name')} {value}" for name, value in overrides.items())
            raise ConfigError(f"space: the combination {shown} is impossible: {error}") from error


def _corners(space: SearchSpace) -> Iterator[dict[str, Any]]:
    names = [*(axis.setting for axis in space.axes), *space.free]
    values: list[tuple[Any, ...]] = [
        tuple(record.name for record in records if record.name != COMPOSED.name) or ("none",)
        for records in space.axes.values()
    ]
    values += [t.values if isinstance(t, Choice) else (t.low, t.high) for t in space.free.values()]
    for combination in itertools.product(*values):
        yield dict(zip(names, combination, strict=True))


def _nearest(name: str, axes: Mapping[Axis, list[Registered]]) -> str:
    known = SEARCHABLE | {f"{r.name}.{s}" for records in axes.values() for r in records for s in r.tunable}
    close = difflib.get_close_matches(name, known, n=3)
    if "." not in name:
        # Someone who leaves the part out means a setting's last name: learning_rate is optimizer.learning_rate.
        by_last_name = {setting.rpartition(".")[2]: setting for setting in sorted(SEARCHABLE)}
        close = [by_last_name[last] for last in difflib.get_close_matches(name, by_last_name, n=3)]
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(sorted(SEARCHABLE))}"


def _words(tunable: Tunable) -> str:
    if isinstance(tunable, Range):
        return f"{tunable.low:g}..{tunable.high:g}"
    return ", ".join(str(value) for value in tunable.values)
