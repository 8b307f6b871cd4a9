"""Which augmentation policies are built in, and how one is found: by name, by line or in a file.

A line lets a search compose a policy and a command repeat it:

    ops:rotate@0.4*0.5+cutout@0.25*0.2+d4@1

names each operation with the share of images that it changes and, where it has parameters, its strength from 0 (barely
visible) to 1 (the most that makes sense). A line may change with the epochs; this one does at epoch 5:

    ops:rotate@0.4*0.5+d4@1/5:rotate@0.4*0.62+d4@1
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from records.errors import ConfigError
from records.registry import Registered, Registry
from trainers.augmentation.mixing import Mixing
from trainers.augmentation.operations import OPERATIONS
from trainers.augmentation.policy import Operation, Policy, parse_policy

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe(Registered):
    """A built-in policy."""

    operations: tuple[Operation, ...]
    mixing: Mixing | None = None

    @property
    def policy(self) -> Policy:
        """The policy document."""
        return Policy(name=self.name, operations=self.operations, mixing=self.mixing)

    def facts(self) -> dict[str, Any]:
        """Return the operations and the mixing, defaults written out."""
        return self.policy.model_dump(mode="json", include={"operations", "mixing"})


def _operation(name: str, probability: float, **parameters: Any) -> Operation:
    return Operation(operation=name, probability=probability, parameters=parameters)


_LIGHT = (
    _operation("d4", 1.0),
    _operation("crop", 0.5, area=(0.8, 1.0)),
    _operation("color_jitter", 0.3, hue=0.02),
)

POLICIES: Registry[PolicyRecipe] = Registry(
    "augmentation policy",
    (
        PolicyRecipe(name="none", description="images as they are", operations=()),
        PolicyRecipe(
            name="flips",
            description="mirrored left to right and top to bottom",
            operations=(_operation("horizontal_flip", 0.5), _operation("vertical_flip", 0.5)),
        ),
        PolicyRecipe(
            name="light",
            description="the eight symmetries of the square, a little crop and a little colour",
            operations=_LIGHT,
        ),
        PolicyRecipe(
            name="lesion",
            description="the eight symmetries of the square, a crop for most, colour and cutout for some",
            operations=(
                _operation("d4", 1.0),
                _operation("crop", 0.8, area=(0.6, 1.0)),
                _operation("color_jitter", 0.5, brightness=0.15, contrast=0.15, saturation=0.15, hue=0.03),
                _operation("cutout", 0.25),
            ),
        ),
        PolicyRecipe(
            name="dissertation",
            description="flips, rotation, blur, noise, crop, cutout with the mean, colour jitter",
            operations=(
                _operation("horizontal_flip", 0.5),
                _operation("vertical_flip", 0.5),
                _operation("rotate", 0.4, limit_deg=90),
                _operation("crop", 0.4, area=(0.7, 1.0)),
                _operation("color_jitter", 0.4, hue=0.15),
                _operation("gaussian_blur", 0.1),
                _operation("gaussian_noise", 0.1),
                _operation("cutout", 0.25),
            ),
        ),
        PolicyRecipe(
            name="dermatoscope",
            description="what differs between clinics: position, light, sharpness, compression, rim, hair, ruler",
            operations=(
                _operation("d4", 1.0),
                _operation("affine", 0.5),
                _operation("color_jitter", 0.5, brightness=0.15, contrast=0.15, saturation=0.15, hue=0.03),
                _operation("gaussian_blur", 0.1),
                _operation("downscale", 0.1),
                _operation("hair", 0.15),
                _operation("ruler", 0.1),
                _operation("vignette", 0.15),
                _operation("jpeg", 0.2),
            ),
        ),
        PolicyRecipe(
            name="mixup",
            description="light, and half of the batches mixed by MixUp",
            operations=_LIGHT,
            mixing=Mixing(kind="mixup", alpha=0.4),
        ),
        PolicyRecipe(
            name="cutmix",
            description="light, and half of the batches mixed by CutMix",
            operations=_LIGHT,
            mixing=Mixing(kind="cutmix", alpha=1.0),
        ),
    ),
)


def check_policy_name(name: str) -> None:
    """Refuse a name that is neither a built-in policy, nor a policy in one line, nor a YAML file's.

    Raises ConfigError: it is none of them; names the built-in ones.
    """
    if name.startswith(PREFIX):
        policy_of_line(name)
    elif not name.endswith(YAML_SUFFIXES):
        try:
            POLICIES[name]
        except ConfigError as error:
            raise ConfigError(f"{error}; or give the path of a YAML file") from None


def load_policy(name: str) -> Policy:
    """Find a policy by its built-in name, by its line (`ops:...`) or in a YAML file.

    Raises ConfigError: it does not exist, or the document cannot work.
    """
    check_policy_name(name)
    if name.startswith(PREFIX):
        return policy_of_line(name)
    if not name.endswith(YAML_SUFFIXES):
        return POLICIES[name].policy
    try:
        document = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"augmentation policy {name} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"augmentation policy {name} is not YAML: {' '.join(str(error).split())}") from error
    return parse_policy(document, name)


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
    """Read the first phase of a line, `ops:...`.

    Returns its steps of the first epoch, in order.
    Raises ConfigError: a step is not `operation@probability[*strength]`, or out of range (names the step).
    """
    return list(parse_phases(line)[0][1])


def parse_phases(line: str) -> list[tuple[int, list[Step]]]:
    """Read a line, `ops:...`, into pairs of first epoch (1 for the first pair) and steps.

    Raises ConfigError: a step is not `operation@probability[*strength]`, or out of range (names the step); a later
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

    Returns the checked policy; its name is the line, cut to what a name may have.
    Raises ConfigError: the line cannot be read or a value is out of range.
    """
    (_, first), *later = parse_phases(line)
    phases = [{"from_epoch": start, "operations": [_document_of(step) for step in steps]} for start, steps in later]
    # Through the same check as a YAML document: a line can express nothing that a file cannot.
    document = {"name": line[:64], "operations": [_document_of(step) for step in first], "phases": phases}
    return parse_policy(document, line)


def _document_of(step: Step) -> dict[str, Any]:
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
