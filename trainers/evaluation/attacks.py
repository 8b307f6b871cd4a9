"""FGSM and PGD on pixel values: the gradient goes through calibration, network and scaling back to the image.

In: pixel values [N, 3, S, S] in [0, 1] and their classes. Out: changed values, within epsilon of the old ones
and inside the valid range. They are not rounded to whole colour values, so a file of them would be a
little weaker. (Goodfellow et al. 2015; Madry et al. 2018; computed by captum.robust.)
"""

import warnings
from collections.abc import Callable

import torch
from captum.robust import FGSM, PGD
from torch import Tensor, nn

from records.bundles import Calibration, Geometry

PGD_STEPS = 10
STEP_SHARE = 2.5
"""A PGD step is this times epsilon over the number of steps, so that the border can be reached and left."""

Attack = Callable[[Tensor, Tensor, float], Tensor]
"""(values [N, 3, S, S], labels [N], epsilon as a share of the pixel range) -> changed values"""


class PixelNetwork(nn.Module):
    """A network behind its scaling and calibration: pixel values in [0, 1] in, calibrated logits out.

    Args:
        network: [N, 3, S, S], scaled -> logits [N, C], fp32; put into evaluation mode, its parameters need no gradient.
        geometry: which scaling.
        calibration: temperature and bias; None leaves the logits as they are.
    """

    def __init__(self, network: nn.Module, geometry: Geometry, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self._is_min_max = geometry.scaling == "min_max"
        self._mean = torch.tensor(geometry.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(geometry.std).view(1, 3, 1, 1)
        self._temperature = calibration.temperature if calibration else 1.0
        self._bias = torch.tensor(calibration.bias) if calibration else torch.zeros(())

    def forward(self, values: Tensor) -> Tensor:
        """Return calibrated logits [N, C] of pixel values [N, 3, S, S] in [0, 1]; differentiable."""
        if self._is_min_max:
            low = values.amin(dim=(1, 2, 3), keepdim=True)
            high = values.amax(dim=(1, 2, 3), keepdim=True)
            scaled = (values - low) / (high - low).clamp(min=1.0 / 255.0)
        else:
            scaled = (values - self._mean) / self._std
        logits: Tensor = self.network(scaled.contiguous(memory_format=torch.channels_last))
        return logits / self._temperature + self._bias


def attacks_on(model: PixelNetwork, pgd_steps: int = PGD_STEPS) -> dict[str, Attack]:
    """Return the attacks by name.

    Args:
        model: that is attacked with full knowledge.
        pgd_steps: gradient steps of PGD, at least 1.
    Returns:
        `fgsm` (one step of length epsilon) and `pgd` (small steps, kept within epsilon of the image).
    """
    fgsm = FGSM(model, loss_func=_loss, lower_bound=0.0, upper_bound=1.0)
    pgd = PGD(model, loss_func=_loss, lower_bound=0.0, upper_bound=1.0)
    # captum leaves pixels alone whose gradient is below 1e-6; some networks would look robust by that alone.
    fgsm.zero_thresh = pgd.fgsm.zero_thresh = 0.0

    def by_fgsm(values: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        return _quietly(lambda: fgsm.perturb(values.clone(), epsilon, labels))

    def by_pgd(values: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        step = STEP_SHARE * epsilon / pgd_steps
        return _quietly(lambda: pgd.perturb(values.clone(), epsilon, step, pgd_steps, labels))

    return {"fgsm": by_fgsm, "pgd": by_pgd}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """How far all other classes together are ahead of the right one, [N].

    The cross-entropy is log(1 + exp(this)), so both give the same signs; but its gradient vanishes in fp32
    where the network is sure, and such a network would look robust by that alone.
    """
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(dim=1) - logits.gather(1, labels[:, None])[:, 0]


def _quietly(perturb: Callable[[], Tensor]) -> Tensor:
    with warnings.catch_warnings():
        # captum asks for the gradient of its own copies, and warns that it does.
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require gradients")
        return perturb().detach()
