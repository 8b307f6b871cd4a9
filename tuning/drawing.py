"""Draw a value from a Range or a Choice by chance."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from records.registry import Choice, Range, Tunable


def random_chooser(random: np.random.Generator) -> Callable[[str, Tunable], Any]:
    """Return what decides by chance; the generator's state decides the result."""

    def choose(name: str, tunable: Tunable) -> Any:
        return draw(tunable, random)

    return choose


def draw(tunable: Tunable, random: np.random.Generator) -> Any:
    """Draw one value.

    Args:
        tunable: what it may be.
        random: source of chance.
    Returns:
        The value; numbers that are not whole have four digits, which is enough for a setting and can be typed.
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
