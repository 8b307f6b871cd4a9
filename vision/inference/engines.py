"""Which engine computes a model that serves: PyTorch, or OpenVINO from the same graph.

An engine is a `LoadedModel` whose `predict` runs elsewhere; explanations that differentiate still run in torch, whose
weights it keeps. OpenVINO computes logits, Grad-CAM of every class and the features that are compared with the
training images in one graph (`vision.inference.graph.ForwardGraph`); calibration and distances follow in numpy, as for
torch. Before it may serve, its outputs for the golden images are compared with torch's in fp32.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from records.arrays import Float32Array, FloatArray, UInt8Array
from records.bundles import Bundle
from records.context import Known
from records.errors import ConfigError, IntegrityError, RelookError
from vision.calibration.scaling import apply_calibration
from vision.inference.graph import EARLY, LOGITS, MAPS, POOLED, ForwardGraph, export_program
from vision.inference.loaded import GOLDEN_TOLERANCE, LoadedModel, load_model, plain_network
from vision.inference.output import BatchOutput
from vision.inference.rounding import ROUNDING, rounding_of_scores
from vision.precision import Precision, PrecisionChoice, resolve_precision
from vision.preprocess import check_pixels

EngineChoice = Literal["torch", "openvino", "auto"]
DeviceChoice = Literal["auto", "cpu", "cuda"]

logger = logging.getLogger(__name__)


class OpenVinoModel(LoadedModel):
    """A bundle's network, computed by OpenVINO on CPUs; made by `load_engine`.

    Args:
        bundle: its files were checked.
        precision: that OpenVINO is asked for; it computes in fp32 where the hardware has no bf16.
        cores: threads that may predict at the same time.
    """

    engine = "openvino"

    def __init__(self, bundle: Bundle, precision: Precision, cores: int) -> None:
        super().__init__(bundle, plain_network(bundle), "fp32", "cpu")
        import openvino

        graph = ForwardGraph(plain_network(bundle), self.geometry, self.checks, bundle.document.views).eval()
        if not graph.has_maps:
            raise ConfigError(
                f"model {bundle.id[:12]} has no closed form of Grad-CAM, which OpenVINO needs; use serving.engine=torch"
            )
        self._names, self._cores, self._core = graph.names, cores, openvino.Core()
        self._graph = openvino.convert_model(export_program(graph, self._golden["inputs"][[0, 0]]))
        self._asked = "bf16" if precision == "bf16" else "f32"
        self._compiled: dict[int, _Compiled] = {}
        self._compiling = threading.Lock()
        self.precision = self._compiled_for(1).precision

    def predict(
        self, pixels: UInt8Array, *, gradcam: bool = False, context: Sequence[Known] | None = None
    ) -> BatchOutput:
        """Predict a batch as `LoadedModel.predict` does, with the calling thread's number of torch threads."""
        check_pixels(pixels, self.geometry.side_px)
        if len(pixels) == 0:
            return super().predict(pixels, gradcam=gradcam, context=context)
        num_threads = torch.get_num_threads()
        found = self._compiled_for(num_threads).run(pixels)
        logits = found[LOGITS]
        scores = None if self.checks is None else self.checks.ood_scores(found[POOLED], found.get(EARLY))
        output = BatchOutput(
            logits,
            apply_calibration(logits, self._document.calibration),
            num_threads=num_threads,
            maps=found[MAPS] if gradcam else None,
            ood_scores=scores,
        )
        return self._in_context(output, context)

    def check_parity(self, rounding: float) -> None:
        """Compare all outputs for the golden images with torch's in fp32.

        Args:
            rounding: what rounding alone changes of the distances, see `rounding_of_scores`.
        Raises:
            IntegrityError: one differs by more than the tolerance of the golden logits allows, or is not finite.
        """
        images, allowed = self._golden["inputs"], GOLDEN_TOLERANCE[self.precision]
        ours, torchs = self.predict(images, gradcam=True), LoadedModel.predict(self, images, gradcam=True)
        differences = {
            "logits": _difference(ours.logits, torchs.logits, 1.0),
            "heat maps": _difference(ours.maps, torchs.maps, 1e-6),
            "distances from the training images": _difference(ours.ood_scores, torchs.ood_scores, 1.0)
            - ROUNDING * rounding,
        }
        for name, difference in differences.items():
            # Negated, so that NaN is refused as well.
            if not difference <= allowed:
                raise IntegrityError(
                    f"model {self.model_id[:12]}: OpenVINO's {name} differ from torch's by {difference:.3g} of the "
                    f"largest, where {allowed:g} is allowed in {self.precision}; use serving.engine=torch"
                )

    def _compiled_for(self, num_threads: int) -> "_Compiled":
        with self._compiling:
            if num_threads not in self._compiled:
                # Batches that compute at the same time use one thread each; one that computes alone uses all.
                streams = self._cores if num_threads == 1 else 1
                options = {
                    "INFERENCE_PRECISION_HINT": self._asked,
                    "NUM_STREAMS": streams,
                    "INFERENCE_NUM_THREADS": streams * num_threads,
                    # Pinned threads of several processes would meet on the same cores.
                    "ENABLE_CPU_PINNING": False,
                }
                self._compiled[num_threads] = _Compiled(
                    self._core.compile_model(self._graph, "CPU", options), self._names
                )
            return self._compiled[num_threads]


def _difference(
    found: FloatArray | Float32Array | None, expected: FloatArray | Float32Array | None, least: float
) -> float:
    """Return the largest difference as a share of the largest value, or of `least` if that is larger."""
    if found is None or expected is None:
        return 0.0
    return float(np.abs(found - expected).max()) / max(least, float(np.abs(expected).max()))


class _Compiled:
    """A compiled graph, and its idle requests; a request computes for one thread at a time."""

    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        self._model, self._names = model, names
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        hint = model.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision: Precision = "bf16" if hint == "bf16" else "fp32"

    def run(self, pixels: UInt8Array) -> dict[str, Float32Array]:
        """Compute the outputs by name; the arrays are the caller's own."""
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._model.create_infer_request()
        try:
            request.infer([np.ascontiguousarray(pixels)])
            # Copied: the next call overwrites a request's outputs.
            return {name: np.array(request.get_output_tensor(row).data) for row, name in enumerate(self._names)}
        finally:
            self._idle.put(request)


def load_engine(
    bundle: Bundle,
    engine: EngineChoice = "torch",
    *,
    precision: PrecisionChoice = "auto",
    device: DeviceChoice = "auto",
    cores: int = 1,
) -> LoadedModel:
    """Load a bundle for serving.

    Args:
        bundle: its files were checked.
        engine: `auto` is OpenVINO where it is installed, the device is a CPU and its outputs are torch's, else torch.
        precision: see `load_model`.
        device: see `resolve_device`.
        cores: threads that may predict at the same time.
    Returns:
        The model; call `check_golden` before it serves.
    Raises:
        ConfigError: the engine is not installed, or cannot compute this model or on this device.
        IntegrityError: as of `load_model`, or OpenVINO's outputs are not torch's.
    """
    place = resolve_device(device)
    if engine == "torch" or (engine == "auto" and place != "cpu"):
        return load_model(bundle, precision=precision, device=place)
    if place != "cpu" and device == "cuda":
        raise ConfigError("serving.engine openvino computes on CPUs; set serving.device=cpu or serving.engine=torch")
    try:
        return _load_openvino(bundle, precision, cores)
    except (RelookError, RuntimeError) as error:
        if engine == "openvino":
            raise
        logger.warning("model %s is computed by torch: %s", bundle.id[:12], " ".join(str(error).split())[:300])
        return load_model(bundle, precision=precision, device=place)


def resolve_device(choice: DeviceChoice) -> str:
    """Return the torch device of `auto`, `cpu` or `cuda`; ConfigError if a GPU is asked for and there is none."""
    if choice == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if choice == "cuda":
        raise ConfigError("serving.device is cuda, and torch finds no CUDA device here; set serving.device=cpu or auto")
    return "cpu"


def _load_openvino(bundle: Bundle, precision: PrecisionChoice, cores: int) -> LoadedModel:
    try:
        import openvino  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "serving.engine openvino needs the package openvino; install it with: pip install 'relook[openvino]'"
        ) from error
    wanted = resolve_precision(precision, "cpu")
    model = OpenVinoModel(bundle, wanted, cores)
    rounding = rounding_of_scores(bundle, load_model(bundle, precision="fp32")) if model.checks is not None else 0.0
    try:
        model.check_parity(rounding)
    except IntegrityError as error:
        if precision != "auto" or model.precision == "fp32":
            raise
        logger.warning("model %s computes in fp32: %s", bundle.id[:12], error)
        model = OpenVinoModel(bundle, "fp32", cores)
        model.check_parity(rounding)
    return model
