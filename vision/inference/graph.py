"""A bundle's model as modules of plain tensor algebra, which other engines can compile.

    images uint8 [N, S, S, 3] -> ForwardGraph -> logits, maps, pooled, early -> DecisionGraph -> probabilities, maps,
                                                                                prediction set, distance

`ForwardGraph` is what a network must compute for a prediction; an engine runs it in place of torch. `DecisionGraph`
adds what needs no network: calibration, prediction set and the distance from the training images. Nothing here depends
on the number of images.
"""

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from records.bundles import BundleDocument, Geometry
from vision.calibration.conformal import thresholds_in_order
from vision.calibration.neighbours import Neighbours
from vision.explanations.closed_form import closed_form_of
from vision.inference.described import early_statistics, first_convolution, pooled_features
from vision.inference.fold import fold_batch_norm
from vision.inference.suitability import ImageChecks
from vision.preprocess import scale_pixels
from vision.views import mean_of_views, turned_back, viewed

IMAGES, LOGITS, MAPS, POOLED, EARLY = "images", "logits", "maps", "pooled", "early"
PROBABILITIES, PREDICTION_SET, OOD_SCORE = "probabilities", "prediction_set", "ood_score"


class ForwardGraph(nn.Module):
    """Pixels to logits, Grad-CAM of every class, and the features that are compared with training images.

    Args:
        network: as it was trained, in evaluation mode, fp32.
        geometry: of its input.
        checks: which features are outputs; None: none are.
        views: over which logits and maps are averaged, see `vision.views`.
    """

    def __init__(self, network: nn.Module, geometry: Geometry, checks: ImageChecks | None, views: int = 1) -> None:
        super().__init__()
        self._geometry, self._views = geometry, views
        self._features = fold_batch_norm(network.get_submodule("features")).requires_grad_(False)
        self._head = network.get_submodule("head").requires_grad_(False)
        self._closed_form = closed_form_of(self._head)
        self._is_checked = checks is not None
        # Folding changes the weights of the first convolution; the distances were fitted on the original responses.
        has_early = checks is not None and checks.early is not None
        self._first = first_convolution(network) if has_early else None
        self.names = (LOGITS, *self._optional())

    @property
    def has_maps(self) -> bool:
        """Whether the head's Grad-CAM has a closed form; there is no other way to a map in a graph."""
        return self._closed_form is not None

    def _optional(self) -> tuple[str, ...]:
        present = {MAPS: self.has_maps, POOLED: self._is_checked, EARLY: self._first is not None}
        return tuple(name for name, is_there in present.items() if is_there)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs in `names` for uint8 [N, S, S, 3]."""
        inputs = scale_pixels(images, self._geometry)
        features = self._features(inputs)
        of_views = [features, *(self._features(viewed(inputs, view)) for view in range(1, self._views))]
        outputs = {LOGITS: mean_of_views([self._head(each) for each in of_views])}
        if self._closed_form is not None:
            # As in `LoadedModel`: a map beside logits that are not finite would look valid.
            is_finite = torch.isfinite(outputs[LOGITS]).all(dim=1)[:, None, None, None]
            maps = [turned_back(self._closed_form.maps(each), view) for view, each in enumerate(of_views)]
            outputs[MAPS] = torch.where(is_finite, mean_of_views(maps), torch.nan)
        if self._is_checked:
            outputs[POOLED] = pooled_features(features)
        if self._first is not None:
            outputs[EARLY] = early_statistics(self._first, inputs)
        return outputs


class DecisionGraph(nn.Module):
    """A `ForwardGraph`, and what is computed from its outputs in float64, as the service does.

    Args:
        forward_graph: with the features that `checks` compares.
        document: of the bundle; its calibration, decision rule and conformal thresholds.
        checks: None: there is no distance from training images.
    """

    def __init__(self, forward_graph: ForwardGraph, document: BundleDocument, checks: ImageChecks | None) -> None:
        super().__init__()
        self._forward_graph = forward_graph
        self._temperature = document.calibration.temperature
        self.register_buffer("_bias", torch.tensor(document.calibration.bias, dtype=torch.float64))
        thresholds = thresholds_in_order(document.operating, document.taxonomy)
        # The 1e-12 of `prediction_set`: a threshold must include the lesion that it was taken from.
        self.register_buffer("_thresholds", torch.tensor(thresholds + 1e-12, dtype=torch.float64))
        weights = document.operating.decision.weights
        self._is_weighed = bool(weights)
        self.register_buffer("_weights", torch.tensor(weights, dtype=torch.float64))
        self._late = None if checks is None else _Distance(checks.features, checks.ood_threshold)
        self._early: nn.Module | None = None
        if checks is not None and checks.early is not None and checks.early_threshold is not None:
            self._early = _Distance(checks.early, checks.early_threshold)
        self.names = (
            LOGITS, PROBABILITIES, PREDICTION_SET,
            *((MAPS,) if forward_graph.has_maps else ()), *((OOD_SCORE,) if checks is not None else ()),
        )  # fmt: skip

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs in `names` for uint8 [N, S, S, 3]."""
        found = self._forward_graph(images)
        logits, thresholds = found[LOGITS], self.get_buffer("_thresholds")
        is_finite = torch.isfinite(logits).all(dim=1, keepdim=True)
        scaled = logits.double() / self._temperature + self.get_buffer("_bias")
        probabilities = torch.where(is_finite, torch.softmax(scaled, dim=1), torch.nan)
        outputs = {
            LOGITS: logits,
            PROBABILITIES: probabilities.float(),
            # A row that is not finite excludes no class.
            PREDICTION_SET: ~is_finite | self._with_label(1.0 - probabilities <= thresholds, probabilities),
        }
        if MAPS in found:
            outputs[MAPS] = found[MAPS]
        if self._late is not None:
            score = self._late(found[POOLED])
            outputs[OOD_SCORE] = (
                score if self._early is None else torch.maximum(score, self._early(found[EARLY]))
            ).float()
        return outputs

    def _with_label(self, sets: Tensor, probabilities: Tensor) -> Tensor:
        """Return sets as `vision.calibration.decision.sets_of` does: a rule with weights adds its label."""
        if not self._is_weighed:
            return sets
        products = probabilities * self.get_buffer("_weights")
        known = torch.where((products > 0).any(dim=1, keepdim=True), products, probabilities)
        classes = torch.arange(known.shape[1])
        return sets | ((classes == known.argmax(dim=1, keepdim=True)) & sets.any(dim=1, keepdim=True))


def export_program(graph: nn.Module, images: NDArray[np.uint8]) -> torch.export.ExportedProgram:
    """Trace a graph of this package; the number of images stays open.

    Args:
        graph: `ForwardGraph` or `DecisionGraph`, in evaluation mode.
        images: uint8 [2, S, S, 3]; one image would fix the number at one.
    Returns:
        The program.
    """
    with warnings.catch_warnings():
        # About torch's own functions that it will replace; nothing that a caller could change.
        warnings.simplefilter("ignore")
        batch = torch.export.Dim("batch")
        return torch.export.export(graph, (torch.tensor(images),), dynamic_shapes={IMAGES: {0: batch}})


class _Distance(nn.Module):
    """`Neighbours.distance` over a threshold, [N, D] -> [N]."""

    def __init__(self, neighbours: Neighbours, threshold: float) -> None:
        super().__init__()
        projection = neighbours.projection.astype(np.float64)
        directions = neighbours.projection / np.linalg.norm(neighbours.projection, axis=0)
        arrays: Mapping[str, NDArray[np.floating]] = {
            "_mean": neighbours.mean,
            "_projection": projection,
            "_directions": directions,
            "_reference": neighbours.reference,
        }
        for name, values in arrays.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))
        self._residual_scale, self._rank, self._threshold = neighbours.residual_scale, neighbours.rank, threshold

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the distance to the k-th nearest stored vector, over the threshold."""
        mean, projection, directions, reference = map(
            self.get_buffer, ("_mean", "_projection", "_directions", "_reference")
        )
        centred = vectors.double() - mean
        inside = centred @ projection
        rest = torch.zeros_like(inside[:, :1])
        if self._residual_scale > 0:
            outside = centred - (centred @ directions) @ directions.T
            rest = (outside**2).sum(dim=1, keepdim=True).sqrt() / self._residual_scale
        projected = torch.cat([inside, rest], dim=1)
        squares = (projected**2).sum(dim=1, keepdim=True) - 2.0 * projected @ reference.T + (reference**2).sum(dim=1)
        nearest = torch.topk(squares, self._rank, dim=1, largest=False).values[:, -1]
        distance = nearest.clamp(min=0.0).sqrt() / self._threshold
        return torch.where(torch.isfinite(vectors).all(dim=1), distance, torch.nan)
