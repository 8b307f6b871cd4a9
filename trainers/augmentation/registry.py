"""Which augmentation policies are built in, and how one is found by name, line or file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from records.errors import ConfigError
from records.registry import Registered, Registry
from trainers.augmentation.inline import PREFIX, policy_of_line
from trainers.augmentation.mixing import Mixing
from trainers.augmentation.policy import Operation, Policy, parse_policy

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe(Registered):
    """A built-in policy.

    Args:
        operations: what it does to images.
        mixing: what it does to batches.
    """

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

    Args:
        name: what settings say; no file is read.
    Raises:
        ConfigError: it is none of them; names the built-in ones.
    """
    if name.startswith(PREFIX):
        policy_of_line(name)
    elif not name.endswith(YAML_SUFFIXES):
        try:
            POLICIES[name]
        except ConfigError as error:
            raise ConfigError(f"{error}; or give the path of a YAML file") from None


def load_policy(name: str) -> Policy:
    """Find a policy.

    Args:
        name: of a built-in policy, a policy in one line (`ops:...`), or the path of a YAML file.
    Returns:
        The checked policy.
    Raises:
        ConfigError: it does not exist, or the document cannot work.
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
