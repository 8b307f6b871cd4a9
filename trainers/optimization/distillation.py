"""Distillation (Hinton et al. 2015): a student learns a teacher's probabilities beside the labels.

The loss is (1 - a) * loss of the labels + a * T^2 * KL(teacher || student), both softened by the temperature T. Like
every loss here it is a mean over the images of a batch, so parts of a batch add up to the whole.

The teacher sees every training image once, as it is, before the training: a step needs a few numbers per image. So the
teacher may take images of another side, a step costs no more, and any number of workers and feeders learn the same.
Nothing of it is stored; a resumed training asks the teacher again.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from records.arrays import Float32Array, IntArray

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.optimization.losses import LossSettings


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about the images to train on.

    Args:
        teacher_id: of the model.
        logits: [n, C] for the first n rows of the training data, which hold all images to train on.
    """

    teacher_id: str
    logits: Float32Array = field(repr=False)


class Distillation:
    """Adds a teacher's part to the loss of the labels.

    Args:
        lesson: of the teacher.
        settings: its share and the temperature.
    """

    def __init__(self, lesson: Lesson, settings: "LossSettings") -> None:
        import torch

        self._share, self._temperature = settings.distill_share, settings.distill_temperature
        self._targets = torch.softmax(torch.from_numpy(lesson.logits) / self._temperature, dim=1)

    def added(
        self, loss: "Tensor", logits: "Tensor", rows: IntArray, partners: IntArray | None, share: float
    ) -> "Tensor":
        """Return the whole loss of a batch.

        Args:
            loss: of the labels.
            logits: [n, C] of the student.
            rows: [n] positions in the training data.
            partners: [n] positions of what was mixed in; None if nothing was.
            share: of the images themselves in a mixed batch.
        Returns:
            The mean over the batch.
        """
        from torch.nn.functional import kl_div, log_softmax

        targets = self._targets[rows]
        if partners is not None:
            # What is mixed in has its own target, as it has its own label.
            targets = share * targets + (1.0 - share) * self._targets[partners]
        targets = targets.to(logits.device, non_blocking=True)
        student = log_softmax(logits / self._temperature, dim=1)
        apart = kl_div(student, targets, reduction="batchmean")
        return (1.0 - self._share) * loss + self._share * self._temperature**2 * apart


def build_distillation(lesson: Lesson | None, settings: "LossSettings") -> Distillation | None:
    """Return what adds a teacher's part to the loss, or None without a teacher."""
    return None if lesson is None else Distillation(lesson, settings)
