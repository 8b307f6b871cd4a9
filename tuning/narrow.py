"""Read how a person narrows the space: texts of the command line, or a YAML file of the same.

    optimizer=sgd,adam                   only these
    optimizer.learning_rate=1e-4..1e-2   a part of every optimizer's own range
    sgd.momentum=0.85..0.95              of one record only
    batch_size=32,64,128                 a setting that no registry offers joins the space

In YAML the same names stand before a list, `low..high`, or {low, high, log, integer}. Out: name to
Choice or Range. What the names mean is decided by `tuning.space`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from records.errors import ConfigError
from records.registry import Choice, Range, Tunable

SUFFIXES = (".yaml", ".yml")
LOG_FROM = 20.0
"""A range of positive numbers that spans this factor is sampled in the logarithm unless it says otherwise."""
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def read_space(items: Sequence[str]) -> dict[str, Tunable]:
    """Read how the space is narrowed.

    Args:
        items: `name=values` texts and paths of YAML files; what comes later replaces what came before.
    Returns:
        Name to what it may be.
    Raises:
        ConfigError: a text or file cannot be read, or a range is empty.
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
    return Choice(tuple(dict.fromkeys(values)))


def _plain(text: str) -> Any:
    """Read one value as YAML does, and 1e-4 as the number that YAML 1.1 does not see in it."""
    text = text.strip()
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    return yaml.safe_load(text) if text else None
