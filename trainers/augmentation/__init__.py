"""Augmentation as data: operations with ranges, policies as documents, and what runs them.

`operations` says which operations exist and which parameters they take, `policy` what a policy
document is, `registry` which policies are built in, `runner` applies one with albumentations.
"""

from trainers.augmentation.operations import OPERATIONS
from trainers.augmentation.policy import Operation, Policy
from trainers.augmentation.registry import POLICIES, load_policy
from trainers.augmentation.runner import Augmenter

__all__ = ["OPERATIONS", "POLICIES", "Augmenter", "Operation", "Policy", "load_policy"]
