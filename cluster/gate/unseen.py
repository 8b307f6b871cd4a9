"""The images that the gate may compare on: those that neither the challenger nor a rival was trained on.

Models share their splits as a rule. They do not where one comes from another home, or was trained on a version whose
splits were others; an image that only one of two models has learned would decide for that one.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.gate.contenders import Contender
from cluster.gate.report import Check
from records.arrays import BoolArray, IntArray
from records.errors import DataError
from trainers.evaluation.slices import subset

NAME = "unseen images"


def on_unseen(
    challenger: Contender, rivals: Sequence[tuple[str, Contender]]
) -> tuple[Contender, list[tuple[str, Contender]], list[Check]]:
    """Leave out the images that a model was trained on, or on others of their group.

    Args:
        challenger: with predictions on the gate split.
        rivals: (role, contender) pairs, with predictions of the same images.
    Returns:
        The contenders on the images that are left, and a check that says which. A rival that has seen all of them is
        left out, and its check is undecided.
    Raises:
        DataError: the challenger was trained on every image.
    """
    left = ~_seen(challenger)
    if not left.any():
        raise DataError(
            f"model {challenger.model_id[:12]} was trained on all {len(left)} images of the gate split, or on others "
            "of their groups, so the gate cannot judge it; train it on a version of the same splits"
        )
    checks, kept = [], []
    for role, rival in rivals:
        if (left & ~_seen(rival)).any():
            left &= ~_seen(rival)
            kept.append((role, rival))
        else:
            text = f"the {role} was trained on all images of the gate split that are left, so nothing compares the two"
            checks.append(Check(name=f"{NAME} of the {role}", outcome="undecided", text=text))
    all_contenders = [("challenger", challenger), *kept]
    checks.insert(0, Check(name=NAME, outcome="pass", text=_sentence(all_contenders, left)))
    rows = np.flatnonzero(left)
    return _on(challenger, rows), [(role, _on(rival, rows)) for role, rival in kept], checks


def _sentence(contenders: Sequence[tuple[str, Contender]], left: BoolArray) -> str:
    """Say which images are compared on."""
    unknown = [role for role, one in contenders if one.predictions.seen is None]
    counts = [(role, int(_seen(one).sum())) for role, one in contenders]
    said = f"{int(left.sum())} of {len(left)} images of the gate split are compared on"
    dropped = [f"the {role} was trained on {count}, or on others of their groups" for role, count in counts if count]
    if dropped:
        said += f"; {', and '.join(dropped)}"
    if unknown:
        said += f"; what the {' and the '.join(unknown)} was trained on is not in this home, so nobody can tell"
    elif not dropped:
        said += "; no model was trained on them"
    return said


def _seen(contender: Contender) -> BoolArray:
    seen = contender.predictions.seen
    return np.zeros(len(contender.predictions.image_ids), dtype=np.bool_) if seen is None else seen


def _on(contender: Contender, rows: IntArray) -> Contender:
    return replace(contender, predictions=subset(contender.predictions, rows))
