"""The catalogue: every registry of the trainers as plain values.

Rooms above add their own kinds (`relook catalog` merges the dicts); nothing is written down twice.
"""

from typing import Any

from records.registry import Registry
from trainers.augmentation import OPERATIONS, POLICIES
from trainers.optimization.losses import LOSSES
from trainers.optimization.optimizers import OPTIMIZERS
from trainers.optimization.samplers import SAMPLERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.optimization.strategies import STRATEGIES
from vision.explanations.methods import METHODS
from vision.networks import MODELS

Catalogue = dict[str, list[dict[str, Any]]]

REGISTRIES: dict[str, Registry[Any]] = {
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "schedulers": SCHEDULERS,
    "augmentations": POLICIES,
    "operations": OPERATIONS,
    "losses": LOSSES,
    "samplers": SAMPLERS,
    "strategies": STRATEGIES,
    "explanations": METHODS,
}
"""Kind, as the command line names it, to its registry."""


def catalogue() -> Catalogue:
    """Return every kind of the trainers with its records, as JSON values."""
    return {kind: registry.catalogue() for kind, registry in REGISTRIES.items()}
