"""Narrow or widen the search space, by texts of the command line or YAML files of the same.

    optimizer=sgd,adam                   only these
    optimizer.learning_rate=1e-4..1e-2   a part of every optimizer's own range
    sgd.momentum=0.85..0.95              of one record only
    batch_size=32,64,128                 a setting that no registry offers joins the space

A name is an axis, a dotted setting, or `record.setting`. In YAML the same names stand before a list, `low..high`, or
{low, high, log, integer}. Every corner of the narrowed space is a valid TrainersSettings, or it is refused.
"""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml

from records.errors import ConfigError
from records.registry import Choice, Range, Registered, Tunable
from trainers.settings import MACHINERY, TrainersSettings
from tuning.settings import Axis
from tuning.space import COMPOSED, REGISTRIES, SearchSpace, derive_space, with_overrides

SUFFIXES = (".yaml", ".yml")
LOG_FROM = 20.0
"""A range of positive numbers that spans this factor is sampled in the logarithm unless it says otherwise."""
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_space(items: Sequence[str]) -> dict[str, Tunable]:
    """Read how the space is narrowed.

    Raises ConfigError: a text or file cannot be read, or a range is empty.
    """
    found: dict[str, Tunable] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if equals:
            found[name.strip()] = _tunable(name.strip(), text)
        elif item.endswith(SUFFIXES):
            found |= _from_file(Path(item))
        else:
            raise ConfigError(f"--space {item!r} is neither name=values nor a YAML file, as optimizer=sgd,adam")
    return found


def _from_file(path: Path) -> dict[str, Tunable]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the space {path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the space {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"the space {path} has to map names to values, as `optimizer: [sgd, adam]`")
    return {str(name): _tunable(str(name), value) for name, value in document.items()}


def _tunable(name: str, value: Any) -> Tunable:
    if isinstance(value, dict):
        return _range(name, **_range_fields(name, value))
    if isinstance(value, list):
        return _choice(name, [_plain(v) if isinstance(v, str) else v for v in value])
    if not isinstance(value, str):
        return _choice(name, [value])
    if ".." in value:
        low, _, high = value.partition("..")
        ends = [_plain(low), _plain(high)]
        return _range(name, *ends)
    return _choice(name, [_plain(part) for part in value.split(",") if part.strip()])


def _range_fields(name: str, value: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(value) - {"low", "high", "log", "integer"})
    if unknown or not {"low", "high"} <= set(value):
        raise ConfigError(f"space: {name} needs low and high, and may have log and integer; it has {sorted(value)}")
    return {key: _plain(part) if isinstance(part, str) else part for key, part in value.items()}


def _range(name: str, low: Any, high: Any, log: bool | None = None, integer: bool | None = None) -> Range:
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise ConfigError(f"space: {name} runs from {low!r} to {high!r}, and both ends have to be numbers")
    if not low < high:
        raise ConfigError(f"space: the range of {name} is empty ({low}..{high}); write the smaller number first")
    whole = isinstance(low, int) and isinstance(high, int)
    return Range(
        low,
        high,
        log=(low > 0 and high / low >= LOG_FROM and not whole) if log is None else bool(log),
        integer=whole if integer is None else bool(integer),
    )


def _choice(name: str, values: list[Any]) -> Choice:
    if not values:
        raise ConfigError(f"space: {name} has no value left; name at least one")
    if any(isinstance(value, list | dict) for value in values):
        raise ConfigError(f"space: {name} takes single values, not lists or mappings: {values}")
    return Choice(tuple(dict.fromkeys(values)))


def _plain(text: str) -> Any:
    """Read one value as YAML does, and 1e-4 as the number that YAML 1.1 does not see in it."""
    text = text.strip()
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        return text


SEARCHABLE = frozenset(
    name
    for name in TrainersSettings().flat()
    if name.partition(".")[0] not in MACHINERY | {"epochs", "seed", "precision", "early_stop_patience_epochs"}
) - {axis.setting for axis in Axis}
MOST_CORNERS = 4096


def narrow(space: SearchSpace, base: TrainersSettings, wanted: Mapping[str, Tunable]) -> SearchSpace:
    """Narrow a space, and let settings that no registry offers join it.

    Raises ConfigError: a name is unknown, a range has nothing in common with a registered one, or a combination of
    values can never be trained (names it, with the fix).
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
    # Only names and ends of free settings are combined, and at most so many: a check of what a person typed, not a
    # proof.
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
