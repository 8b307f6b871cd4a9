"""Inference with a bundle: pixels in, calibrated probabilities and heat maps out.

In: a bundle, and decoded pixels uint8 [N, S, S, 3]. Out: numpy arrays. A loaded model registers no hooks and keeps no
state between calls but the largest batch that fits a GPU, so threads may share it. A row whose logits are not finite
gets NaN probabilities and NaN maps, and no error: the caller decides what becomes of it. Decoding, batching, triage and
storage are elsewhere.
"""

import copy
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from images.decode import DECODE_VERSION
from records.arrays import Float32Array, FloatArray, IntArray, UInt8Array
from records.bundles import Bundle, DecisionRule, Geometry
from records.context import Known
from records.errors import IntegrityError, UnavailableError
from records.memory import keep_freed_memory
from records.taxonomy import Taxonomy
from vision.calibration.context import predict_in_context
from vision.calibration.scaling import apply_calibration
from vision.explanations.closed_form import ClosedForm, closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.inference.described import early_statistics, first_convolution, pooled_features
from vision.inference.fold import ChannelClamp, fold_batch_norm
from vision.inference.output import BatchOutput
from vision.inference.suitability import image_checks_of
from vision.networks import MODELS, build_model
from vision.precision import Precision, PrecisionChoice, autocast, resolve_precision
from vision.preprocess import check_pixels, scale_pixels, to_tensor
from vision.views import mean_of_views, turned_back, viewed

GOLDEN_TOLERANCE: dict[Precision, float] = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference to the golden logits, as a share of the largest of them (or of 1, if that is larger)."""

logger = logging.getLogger(__name__)


class LoadedModel:
    """A bundle's network, ready for inference. Made by `load_model`."""

    engine = "torch"

    def __init__(self, bundle: Bundle, network: nn.Module, precision: Precision, device: str) -> None:
        self._document = bundle.document
        self._golden = bundle.golden()
        self._device = device
        # Batches of at most this many images fit into the memory of the device, as far as is known.
        self._fits = sys.maxsize
        self._features = _prepared(network.get_submodule("features"), precision, device)
        # The head stays fp32 in every precision: it is small, and the closed form of Grad-CAM reads its weights.
        self._head = network.get_submodule("head").to(device)
        self._closed_form: ClosedForm | None = closed_form_of(self._head)
        self.checks = image_checks_of(bundle)
        self._first = _first_of(network, device) if self.checks is not None and self.checks.early is not None else None
        self.model_id = bundle.id
        self.precision: Precision = precision

    @property
    def taxonomy(self) -> Taxonomy:
        """Classes, in the order of every output."""
        return self._document.taxonomy

    @property
    def geometry(self) -> Geometry:
        """What the network sees."""
        return self._document.geometry

    @property
    def decision(self) -> DecisionRule:
        """Which class is the label, see `vision.calibration.decision`."""
        return self._document.operating.decision

    @property
    def target_layer(self) -> str:
        """The layer whose output the Grad-CAM maps weigh."""
        return MODELS[self._document.architecture.name].target_layer

    @property
    def gradcam_is_exact(self) -> bool:
        """True if Grad-CAM comes from the closed form, without a backward pass."""
        return self._closed_form is not None

    def predict(
        self, pixels: UInt8Array, *, gradcam: bool = False, context: Sequence[Known] | None = None
    ) -> BatchOutput:
        """Predict a batch of images in one forward pass.

        Args:
            pixels: [N, S, S, 3], N >= 0.
            gradcam: also compute the maps of all classes.
            context: [N] what is known about each image; it counts where the bundle has a head for it.
        Returns:
            Logits, calibrated probabilities, and maps on request.
        Raises:
            ContractError: the pixels do not have the model's geometry.
        """
        check_pixels(pixels, self.geometry.side_px)
        parts: list[BatchOutput] = []
        first = 0
        while not parts or first < len(pixels):
            part = pixels[first : first + self._fits]
            try:
                parts.append(self._predict(part, gradcam))
            except torch.OutOfMemoryError as error:
                if len(part) <= 1:
                    raise UnavailableError(
                        f"the device {self._device} has too little free memory to predict one image; free some, or set "
                        "serving.device=cpu"
                    ) from error
                # Kept, so that not every batch finds it out again; a swapped model starts anew.
                self._fits = len(part) // 2
                torch.cuda.empty_cache()
                logger.warning("out of memory on %s: batches have at most %d images now", self._device, self._fits)
                continue
            first += len(part)
        return self._in_context(BatchOutput.joined(parts), context)

    def _in_context(self, output: BatchOutput, context: Sequence[Known] | None) -> BatchOutput:
        """Return an output with the probabilities that the context of its images gives."""
        head = self._document.context
        if head is None or context is None:
            return output
        found = predict_in_context(output.logits, self._document.calibration, head, context)
        return replace(output, probabilities=found.probabilities, without_context=found.without, context=found.uses)

    def warm_sizes(self, largest: int) -> tuple[int, ...]:
        """Return the batch sizes to compute once before requests come: a GPU chooses its kernels by size."""
        doubled = [2**power for power in range(largest.bit_length())] if self._device != "cpu" else []
        return tuple(sorted({1, largest, *doubled}))

    def _predict(self, pixels: UInt8Array, gradcam: bool) -> BatchOutput:
        with torch.inference_mode():
            inputs = self._inputs(pixels)
            features = self._feature_map(inputs)
            ood_scores = self._ood_scores(inputs, features)
            parts: list[Tensor] = [self._head(features)]
            maps_of_views = [self._maps(features, parts[0])] if gradcam else []
            # One view after the other: a batch takes no more memory, and distances are those of the image itself.
            for view in range(1, self._document.views):
                features = self._feature_map(viewed(inputs, view).contiguous(memory_format=torch.channels_last))
                parts.append(self._head(features))
                maps_of_views += [turned_back(self._maps(features, parts[-1]), view)] if gradcam else []
            logits = mean_of_views(parts)
            maps = mean_of_views(maps_of_views) if gradcam else None
        # Calibration in numpy and float64, outside the network: it is the same for every precision and device.
        logits_array = np.asarray(logits.cpu().numpy(), dtype=np.float32)
        probabilities = apply_calibration(logits_array, self._document.calibration)
        return BatchOutput(
            logits_array,
            probabilities,
            num_threads=torch.get_num_threads(),
            maps=None if maps is None else maps.contiguous().cpu().numpy(),
            ood_scores=ood_scores,
        )

    def describe(self, pixels: UInt8Array) -> Float32Array:
        """Describe images by a vector each, the pooled features of the last stage.

        Args:
            pixels: [N, S, S, 3], N >= 0.
        Returns:
            [N, D]; not finite where the network's features are not.
        Raises:
            ContractError: the pixels do not have the model's geometry.
        """
        check_pixels(pixels, self.geometry.side_px)
        with torch.inference_mode():
            vectors = pooled_features(self._feature_map(self._inputs(pixels)))
        return np.asarray(vectors.cpu().numpy(), dtype=np.float32)

    def dropout_samples(self, pixels: UInt8Array, passes: int, *, dropout: float = 0.2, seed: int = 0) -> FloatArray:
        """Predict several times, dropping other channels of the last stage each time (Gal and Ghahramani 2016).

        Args:
            pixels: [N, S, S, 3], N >= 0.
            passes: number of forward passes of the head, at least 1.
            dropout: share of channels dropped, 0 to below 1; the others are scaled up.
            seed: of the draws. A pass drops the same channels for all images.
        Returns:
            [passes, N, C] calibrated probabilities; NaN throughout a row whose logits are not finite.
        Raises:
            ContractError: the pixels do not have the model's geometry.
        """
        check_pixels(pixels, self.geometry.side_px)
        chance = torch.Generator().manual_seed(seed)
        samples = []
        with torch.inference_mode():
            inputs = self._inputs(pixels)
            # The features are computed once: dropping their channels is the only randomness.
            features = [self._feature_map(viewed(inputs, view)) for view in range(self._document.views)]
            for _ in range(passes):
                kept = torch.rand(features[0].shape[1], generator=chance) >= dropout
                mask = (kept.float() / (1.0 - dropout)).to(features[0].device)[None, :, None, None]
                mean = mean_of_views([self._head(each * mask) for each in features])
                logits = np.asarray(mean.cpu().numpy(), dtype=np.float32)
                samples.append(apply_calibration(logits, self._document.calibration))
        return np.stack(samples)

    def gradcam(self, pixels: UInt8Array, target: IntArray) -> Float32Array:
        """Compute Grad-CAM of one class per image, [N, h, w], not negative.

        Args:
            pixels: [N, S, S, 3], N >= 1.
            target: [N] class indices.
        Returns:
            [N, h, w]; `attribute` runs the other methods.
        Raises:
            ContractError: the pixels do not have the model's geometry.
        """
        every_class = np.asarray(self.predict(pixels, gradcam=True).maps, dtype=np.float32)
        return np.asarray(every_class[np.arange(len(target)), target])

    def check_golden(self) -> float:
        """Compare the logits of the bundle's golden images with the stored ones.

        Returns:
            The largest absolute difference of a logit.
        Raises:
            IntegrityError: it is above the tolerance of this precision (`GOLDEN_TOLERANCE`), or not finite.
        """
        difference, allowed = self._golden_difference()
        # Negated, so that NaN is refused as well.
        if not difference <= allowed:
            raise IntegrityError(
                f"model {self.model_id[:12]}: logits of its golden images differ by {difference:.3g} from those stored "
                f"(allowed in {self.precision}: {allowed:.3g}); it must not be served"
            )
        return difference

    def _golden_difference(self) -> tuple[float, float]:
        """Return the largest absolute difference of a golden logit, and the largest that is allowed."""
        expected = self._golden["logits"]
        difference = float(np.abs(self.predict(self._golden["inputs"]).logits - expected).max())
        return difference, GOLDEN_TOLERANCE[self.precision] * max(1.0, float(np.abs(expected).max()))

    def _why_not_its_precision(self) -> str | None:
        """Say why the model must not compute in its precision, or return None."""
        try:
            difference, allowed = self._golden_difference()
        except RuntimeError as error:
            # torch has operations without a kernel for bf16, which ones depends on release and device.
            return f"it fails: {' '.join(str(error).split())[:200]}"
        return None if difference <= allowed else f"its golden logits differ by {difference:.3g}"

    @property
    def faithfulness(self) -> dict[str, Any] | None:
        """Faithfulness of the Grad-CAM maps, measured when the bundle was made; None if it was not."""
        found = self._document.explanation.get("faithfulness")
        return found if isinstance(found, dict) else None

    @property
    def network(self) -> nn.Module:
        """Normalised images to logits, for methods that need the whole network; read-only."""
        return nn.Sequential(self._features, self._head)

    def inputs(self, pixels: UInt8Array) -> Tensor:
        """Return what the network sees, [N, 3, S, S]; ContractError if the pixels do not fit."""
        check_pixels(pixels, self.geometry.side_px)
        return self._inputs(pixels)

    def feature_map(self, pixels: UInt8Array) -> tuple[Tensor, nn.Module]:
        """Return the target layer's output [N, K, h, w] and the head that follows it."""
        with torch.inference_mode():
            return self._feature_map(self.inputs(pixels)), self._head

    def _inputs(self, pixels: UInt8Array) -> Tensor:
        tensor = to_tensor(pixels)
        # From pinned memory the copy needs no further one, and runs while the caller prepares what follows.
        tensor = (
            tensor.to(self._device)
            if self._device == "cpu"
            else tensor.pin_memory().to(self._device, non_blocking=True)
        )
        return scale_pixels(tensor, self.geometry)

    def _feature_map(self, inputs: Tensor) -> Tensor:
        with autocast(self.precision, self._device):
            features: Tensor = self._features(inputs)
        return features.float()

    def _ood_scores(self, inputs: Tensor, features: Tensor) -> FloatArray | None:
        if self.checks is None:
            return None
        # From a copy of the first convolution as trained: the distances were fitted on unfolded fp32 responses.
        early = early_statistics(self._first, inputs).cpu().numpy() if self._first is not None else None
        return self.checks.ood_scores(pooled_features(features).cpu().numpy(), early)

    def _maps(self, features: Tensor, logits: Tensor) -> Tensor:
        if self._closed_form is not None:
            maps = self._closed_form.maps(features)
        else:
            classes = range(logits.shape[1])
            maps = torch.stack([head_gradcam(self._head, features, _constant(logits, c)) for c in classes], dim=1)
        # Features may be finite where the head overflows; a map beside such logits would look valid.
        maps[~torch.isfinite(logits).all(dim=1)] = torch.nan
        return maps


def load_model(bundle: Bundle, *, precision: PrecisionChoice = "auto", device: str = "cpu") -> LoadedModel:
    """Build a bundle's network, load its weights and prepare it for inference.

    Batch norm is folded where that is exact, memory is channels-last, and convolutions are stored in the format
    they compute in.

    Args:
        bundle: its files were checked.
        precision: `auto` is bf16 where the hardware has it, torch can compute the network in it and the golden logits
            stay within tolerance (a batch norm of small variance magnifies rounding), else fp32.
        device: a torch device name.
    Returns:
        The model; call `check_golden` before it serves.
    Raises:
        IntegrityError: the weights do not fit the architecture, or the model belongs to another decoder.
        ConfigError: the architecture is not registered, or the precision unknown.
    """
    keep_freed_memory()
    model = LoadedModel(bundle, plain_network(bundle), resolve_precision(precision, device), device)
    # Only `auto` falls back: a precision that was asked for is used, and `check_golden` refuses what it breaks.
    if precision != "auto" or model.precision == "fp32":
        return model
    reason = model._why_not_its_precision()
    if reason is None:
        return model
    logger.warning("model %s computes in fp32, because in %s %s", bundle.id[:12], model.precision, reason)
    return LoadedModel(bundle, plain_network(bundle), "fp32", device)


def plain_network(bundle: Bundle) -> nn.Module:
    """Build a bundle's network as it was trained, in evaluation mode: fp32, nothing folded, a new copy per call.

    Args:
        bundle: its files were checked.
    Returns:
        The network, with the parts `features` and `head`.
    Raises:
        IntegrityError: the weights do not fit the architecture, or the model belongs to another decoder.
    """
    document = bundle.document
    # Another decoder yields other pixels: predictions would be skewed, and golden images, which are generated and
    # never decoded, would not show it.
    if document.geometry.decode_version != DECODE_VERSION:
        raise IntegrityError(
            f"model {bundle.id[:12]} was trained with images of decoder {document.geometry.decode_version}, and this "
            f"release has decoder {DECODE_VERSION}; train the model again or use the release that has its decoder"
        )
    network = build_model(document.architecture.name, len(document.taxonomy.codes), **document.architecture.options)
    load_weights(network, bundle.weights(), bundle.id)
    return network.eval().requires_grad_(False)


def load_weights(network: nn.Module, weights: Mapping[str, NDArray[Any]], model_id: str) -> None:
    """Copy stored weights into a network.

    Args:
        network: with exactly these parameters and buffers.
        weights: arrays by name of parameter or buffer.
        model_id: for the error message.
    Raises:
        IntegrityError: a name is missing or unknown, or a shape differs.
    """
    try:
        network.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
    except RuntimeError as error:
        # torch lists every name that does not fit, on lines of its own; the first ones are enough in one sentence.
        reason = " ".join(str(error).split())[:300]
        raise IntegrityError(f"the weights of model {model_id[:12]} do not fit its architecture: {reason}") from error


def reference_logits(network: nn.Module, pixels: UInt8Array, geometry: Geometry, views: int = 1) -> Float32Array:
    """Compute logits in fp32 with nothing folded. Golden logits are made with it.

    Args:
        network: in evaluation mode, on the CPU.
        pixels: [N, S, S, 3].
        geometry: of the network.
        views: over which the logits are averaged, see `vision.views`.
    Returns:
        [N, C].
    """
    check_pixels(pixels, geometry.side_px)
    with torch.inference_mode():
        inputs = scale_pixels(to_tensor(pixels), geometry)
        logits = mean_of_views([network(viewed(inputs, view)) for view in range(views)])
        return np.asarray(logits.numpy(), dtype=np.float32)


def _prepared(features: nn.Module, precision: Precision, device: str) -> nn.Module:
    # Folded before the conversion, because folding in bf16 would round the scales.
    folded = fold_batch_norm(features).to(device).to(memory_format=torch.channels_last)
    if precision == "bf16":
        # Autocast would convert these weights anew in every call. It computes norms in fp32 and fails on mixed formats,
        # so their weights and statistics stay fp32.
        for module in folded.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | ChannelClamp):
                module.to(torch.bfloat16)
    return folded.requires_grad_(False)


def _first_of(network: nn.Module, device: str) -> nn.Module:
    """Copy the first convolution as it was trained; folding changes its weights."""
    return copy.deepcopy(first_convolution(network)).to(device).requires_grad_(False)


def _constant(logits: Tensor, class_index: int) -> Tensor:
    return torch.full((len(logits),), class_index, dtype=torch.int64, device=logits.device)
