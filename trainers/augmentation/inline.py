"""A policy in one line, so that a search can compose one and a command can repeat it.

    ops:rotate@0.4*0.5+cutout@0.25*0.2+d4@1

names each operation with the share of images that it changes and, where the operation has
parameters, its strength from 0 (barely visible) to 1 (the most that makes sense).

    ops:rotate@0.4*0.5+d4@1/5:rotate@0.4*0.62+d4@1

has other operations from epoch 5 on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from records.errors import ConfigError
from trainers.augmentation.operations import OPERATIONS
from trainers.augmentation.policy import Policy, parse_policy

PREFIX = "ops:"
_STEP = re.compile(r"(?P<name>[a-z0-9_]+)@(?P<probability>[0-9.]+)(?:\*(?P<strength>[0-9.]+))?")


@dataclass(frozen=True)
class Step:
    """One operation of a policy in one line.

    Args:
        operation: in `OPERATIONS`.
        probability: share of the images that it changes, above 0 to 1.
        strength: 0 to 1; None for an operation without parameters.
    """

    operation: str
    probability: float
    strength: float | None = None

    def __str__(self) -> str:
        """Return the step as it stands in the line."""
        strength = "" if self.strength is None else f"*{self.strength:g}"
        return f"{self.operation}@{self.probability:g}{strength}"


Phases = Sequence[tuple[int, Sequence[Step]]]
"""From which epoch on which steps hold; 1 is the first epoch."""


def format_steps(steps: Sequence[Step]) -> str:
    """Return the line of a policy; without steps the name of the policy that does nothing.

    >>> format_steps([Step("rotate", 0.4, 0.5), Step("d4", 1.0)])
    'ops:rotate@0.4*0.5+d4@1'
    """
    return PREFIX + "+".join(str(step) for step in steps) if steps else "none"


def format_phases(phases: Phases) -> str:
    """Return the line of a policy whose operations change with the epochs.

    >>> format_phases([(1, [Step("rotate", 0.4, 0.5)]), (5, [Step("rotate", 0.4, 0.62)])])
    'ops:rotate@0.4*0.5/5:rotate@0.4*0.62'
    """
    first, *later = phases
    return "/".join([format_steps(first[1]), *(f"{start}:{'+'.join(map(str, steps))}" for start, steps in later)])


def parse_steps(line: str) -> list[Step]:
    """Read the steps that a policy in one line begins with.

    Args:
        line: begins with `ops:`.
    Returns:
        Its steps of the first epoch, in order.
    Raises:
        ConfigError: a step is not `operation@probability[*strength]`, or out of range (names the step).
    """
    return list(parse_phases(line)[0][1])


def parse_phases(line: str) -> list[tuple[int, list[Step]]]:
    """Read the line of a policy.

    Args:
        line: begins with `ops:`.
    Returns:
        The epochs from which on its steps hold, 1 for the first, and the steps, in order.
    Raises:
        ConfigError: a step is not `operation@probability[*strength]`, or out of range (names the step); a later
            phase does not begin with its epoch.
    """
    first, *later = line.removeprefix(PREFIX).split("/")
    phases = [(1, _steps(first, line))]
    for text in later:
        start, colon, steps = text.partition(":")
        if not colon or not start.isdecimal():
            raise ConfigError(f"augmentation {line}: {text!r} does not begin with its epoch, as 5:rotate@0.4*0.5")
        phases.append((int(start), _steps(steps, line)))
    return phases


def _steps(part: str, line: str) -> list[Step]:
    steps = []
    for text in part.split("+"):
        found = _STEP.fullmatch(text)
        if found is None:
            raise ConfigError(f"augmentation {line}: {text!r} is not operation@probability*strength, as rotate@0.4*0.5")
        step = Step(found["name"], _number(found["probability"], line), _strength(found["strength"], line))
        takes_strength = OPERATIONS[step.operation].at_strength is not None
        if takes_strength is not (step.strength is not None):
            wanted = "needs a strength from 0 to 1" if takes_strength else "takes no strength"
            raise ConfigError(f"augmentation {line}: {step.operation} {wanted}")
        steps.append(step)
    return steps


def policy_of_line(line: str) -> Policy:
    """Return the policy that a line stands for.

    Args:
        line: begins with `ops:`.
    Returns:
        The checked policy; its name is the line, cut to what a name may have.
    Raises:
        ConfigError: the line cannot be read or a value is out of range.
    """
    (_, first), *later = parse_phases(line)
    phases = [{"from_epoch": start, "operations": [_operation(step) for step in steps]} for start, steps in later]
    document = {"name": line[:64], "operations": [_operation(step) for step in first], "phases": phases}
    return parse_policy(document, line)


def _operation(step: Step) -> dict[str, Any]:
    at_strength = OPERATIONS[step.operation].at_strength
    parameters = {} if at_strength is None or step.strength is None else at_strength(step.strength)
    return {"operation": step.operation, "probability": step.probability, "parameters": parameters}


def _number(text: str, line: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"augmentation {line}: {text!r} is not a number") from error


def _strength(text: str | None, line: str) -> float | None:
    if text is None:
        return None
    value = _number(text, line)
    if not 0 <= value <= 1:
        raise ConfigError(f"augmentation {line}: a strength of {value:g} is not from 0 to 1")
    return value
