"""Predictions and heat maps of images that a caller has in hand, without a service; nothing is stored.

In: a bundle and its loaded model, and images as `images.given` takes them. Out: predictions with the decisions that
the service would make, or a heat map over its image.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from images.decode import decode_frame
from images.given import GivenImage, given_list, given_name, image_bytes
from images.overlay import overlay, resized_strength
from records.arrays import Float32Array, UInt8Array
from records.bundles import Bundle
from records.context import Known
from records.errors import ConfigError, DataError, ImageError
from records.frames import Frame
from records.taxonomy import Taxonomy
from records.types import Decision
from serving.bulk import Decoded, decode_for, verdicts_of
from serving.context import effect_of, known_given
from serving.settings import ServingSettings
from serving.triage import Verdict, malignant_probability
from vision.calibration.decision import labels_of
from vision.explanations import FILE_OVERLAY_SIDE_PX
from vision.explanations.methods import METHODS
from vision.inference.attribution import explain
from vision.inference.loaded import LoadedModel, load_model

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Args:
        image: its path, else `image N`, counted from 0.
        label: code of the class by the model's rule; None if the image is too poor to judge, or its output is not
            finite.
        confidence: its probability; None where the label is.
        probabilities: by class code, calibrated; empty if the output is not finite.
        prediction_set: codes of the classes that cannot be ruled out.
        decision: what the service would do: answered, review, urgent or retake; None for an image that cannot be read.
        reasons: of the decision.
        p_malignant: summed probability of the malignant classes; None where there are no probabilities.
        ood_score: distance from the training images; above 1 is out of distribution; None if it is not known.
        quality_reason: what is wrong with the image; None: nothing.
        error: why the image could not be read, or None.
        heat_map: [S, S] in 0 to 1, over what the model sees of the image; None if it was not asked for.
        context_effect: which columns of the context counted, and label and probabilities without it; None if none was
            given that the model uses.
    """

    image: str
    label: str | None = None
    confidence: float | None = None
    probabilities: dict[str, float] = field(default_factory=dict)
    prediction_set: tuple[str, ...] = ()
    decision: Decision | None = None
    reasons: tuple[str, ...] = ()
    p_malignant: float | None = None
    ood_score: float | None = None
    quality_reason: str | None = None
    error: str | None = None
    heat_map: Float32Array | None = field(default=None, repr=False, compare=False)
    context_effect: dict[str, Any] | None = field(default=None, repr=False)


class Predictions(list[Prediction]):
    """Predictions in the order of the images.

    Args:
        rows: one per image.
        classes: class codes, in their order.
    """

    def __init__(self, rows: Iterable[Prediction], classes: Sequence[str]) -> None:
        super().__init__(rows)
        self.classes = tuple(classes)

    def to_frame(self) -> "pd.DataFrame":
        """Return a table with a row per image and a column `p_CLASS` for each class."""
        import pandas as pd

        columns = [
            "image", "decision", "label", "confidence", "p_malignant", "reasons", "prediction_set", "ood_score",
            "quality_reason", "error",
        ]  # fmt: skip
        rows = [
            {
                **{name: getattr(one, name) for name in columns},
                "decision": None if one.decision is None else one.decision.value,
                "reasons": " ".join(one.reasons),
                "prediction_set": " ".join(one.prediction_set),
                **{f"p_{code}": one.probabilities.get(code) for code in self.classes},
            }
            for one in self
        ]
        return pd.DataFrame(rows, columns=[*columns, *(f"p_{code}" for code in self.classes)])


@dataclass(frozen=True)
class Explanation:
    """A heat map of one image.

    Args:
        target: code of the class that is explained.
        versus: code of the class that it is compared with, or None.
        method: that computed the map.
        probabilities: by class code, calibrated.
        heat_map: [H, W] in 0 to 1; 1 is what spoke most for the class.
        image: uint8 [H, W, 3], what the model sees of the image, in its proportions: the centre square, or all.
        values: [h, w] as computed; signed for all methods but Grad-CAM.
        layer: whose map it is; None: the pixels.
        exact: computed in closed form, without differentiating.
        completeness_error: by how much the values miss the sum that they promise, a share; None if none is promised.
    """

    target: str
    versus: str | None
    method: str
    probabilities: dict[str, float]
    heat_map: Float32Array = field(repr=False)
    image: UInt8Array = field(repr=False)
    values: Float32Array = field(repr=False)
    layer: str | None
    exact: bool
    completeness_error: float | None

    def overlay(self, alpha: float = 0.6) -> UInt8Array:
        """Return the image with its heat map drawn over it, uint8 [H, W, 3]; alpha is the opacity of its maximum."""
        return overlay(self.image, self.values, alpha)


def predict_given(
    bundle: Bundle,
    loaded: LoadedModel,
    images: GivenImage | Iterable[GivenImage],
    settings: ServingSettings,
    *,
    heat_maps: bool = False,
    keep: bool = False,
    context: Known | Sequence[Known] | None = None,
) -> Predictions:
    """Predict images.

    Args:
        bundle: the model.
        loaded: the same, loaded.
        images: one or several.
        settings: batch size, largest image and rules of triage.
        heat_maps: also compute Grad-CAM of each predicted class.
        keep: an image that cannot be read gets a prediction with the reason, and stops no other.
        context: what is known about each image, or about all of them.
    Returns:
        One prediction per image, in their order.
    Raises:
        DataError: an image cannot be read, and `keep` is false.
    """
    given = given_list(images)
    known = known_given(context, len(given))
    found: list[Prediction] = []
    for start in range(0, len(given), settings.max_batch_size):
        names = [given_name(image, start + i) for i, image in enumerate(given[start : start + settings.max_batch_size])]
        read: list[Decoded | DataError] = []
        for name, image in zip(names, given[start:], strict=False):
            try:
                read.append(_decoded(image, name, loaded.geometry.frame, settings.max_pixels))
            except DataError as error:
                if not keep:
                    raise
                read.append(error)
        usable = [one for one in read if isinstance(one, Decoded)]
        about = [known[start + i] for i, one in enumerate(read) if isinstance(one, Decoded)]
        rows = _predicted(bundle, loaded, usable, about, settings, heat_maps)
        for name, one in zip(names, read, strict=True):
            found.append(
                Prediction(name, **next(rows)) if isinstance(one, Decoded) else Prediction(name, error=str(one))
            )
    return Predictions(found, loaded.taxonomy.codes)


def explain_given(
    loaded: LoadedModel, image: GivenImage, method: str, target: str | None, versus: str | None
) -> Explanation:
    """Explain the prediction of one image; see `vision.inference.attribution.explain`.

    Args:
        loaded: in fp32.
        image: a path, bytes, a Pillow image or an array.
        method: a name in `METHODS`.
        target: code of the class; None is the label.
        versus: code of the class to compare it with, or None.
    Returns:
        The heat map over its image.
    Raises:
        ConfigError: there is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    data = image_bytes(image)
    frame = loaded.geometry.frame
    found = explain(loaded, decode_frame(data, frame), method, target, versus)
    values, shown = found.attribution.values, decode_frame(data, frame.shown(FILE_OVERLAY_SIDE_PX))
    return Explanation(
        target=found.target,
        versus=found.versus,
        method=method,
        probabilities=found.probabilities,
        heat_map=resized_strength(values, *shown.shape[:2]),
        image=shown,
        values=values,
        layer=found.attribution.layer,
        exact=found.attribution.exact,
        completeness_error=found.attribution.completeness_error,
    )


def _decoded(image: GivenImage, name: str, frame: Frame, max_pixels: int) -> Decoded:
    try:
        return decode_for(image_bytes(image), frame, frame, max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {error}", error.code) from error


def _predicted(
    bundle: Bundle,
    loaded: LoadedModel,
    usable: Sequence[Decoded],
    known: Sequence[Known],
    settings: ServingSettings,
    heat_maps: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the fields of a prediction for each image of a batch."""
    if not usable:
        return
    pixels = np.stack([one.pixels for one in usable])
    output = loaded.predict(pixels, gradcam=heat_maps, context=known)
    verdicts = verdicts_of(bundle, loaded, output, pixels, [one.shorter_px for one in usable], settings)
    for row, verdict in enumerate(verdicts):
        values = output.probabilities[row]
        heat_map = None
        if output.maps is not None and output.finite[row]:
            side_px = loaded.geometry.side_px
            target = int(labels_of(output.probabilities[row : row + 1], loaded.decision)[0])
            heat_map = resized_strength(output.maps[row, target], side_px, side_px)
        effect = effect_of(output, row, bundle.document)
        yield {
            **_fields(verdict, values, bool(output.finite[row]), loaded.taxonomy),
            "heat_map": heat_map,
            "context_effect": None if effect is None else effect.model_dump(),
        }


def _fields(verdict: Verdict, values: Any, finite: bool, taxonomy: Taxonomy) -> dict[str, Any]:
    quality = verdict.suitability.quality_reason
    return {
        "label": verdict.label,
        "confidence": verdict.confidence,
        # Also of an image too poor to judge: whoever compares models wants the output of all of them.
        "probabilities": dict(zip(taxonomy.codes, values.tolist(), strict=True)) if finite else {},
        "prediction_set": verdict.prediction_set,
        "decision": verdict.decision,
        "reasons": tuple(reason.value for reason in verdict.reasons),
        "p_malignant": malignant_probability(values, taxonomy) if finite else None,
        "ood_score": verdict.suitability.ood_score,
        "quality_reason": None if quality is None else quality.value,
    }


class Model:
    """A trained model. Made by `train`, `tune` and `load_model`; the network is loaded at its first use.

    Args:
        bundle: its files, which were checked.
        settings: of the service: number format, batches, rules of triage.
    """

    def __init__(self, bundle: Bundle, settings: ServingSettings) -> None:
        self.bundle = bundle
        self._settings = settings

    @property
    def id(self) -> str:
        """64 hex characters, the hash of its files."""
        return self.bundle.id

    @property
    def path(self) -> Path:
        """The folder of the bundle."""
        return self.bundle.path

    @property
    def report(self) -> Path:
        """The page with its figures on val, or on calibration if it was trained on val; written by `train`."""
        return self.bundle.path / "report" / "report.html"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class codes, in the order of every output."""
        return self.bundle.document.taxonomy.codes

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures of the training, and of a split that chose something, so `evaluate` on test measures the model."""
        return self.bundle.document.metrics

    def predict(
        self,
        images: GivenImage | Iterable[GivenImage],
        *,
        heat_maps: bool = False,
        errors: Literal["raise", "keep"] = "raise",
        context: Known | Sequence[Known] | None = None,
    ) -> Predictions:
        """Predict images with the decisions of the service; nothing is stored.

        Args:
            images: one or several: paths, bytes of files, Pillow images, or arrays uint8 [H, W, 3].
            heat_maps: also compute Grad-CAM of each predicted class.
            errors: `raise` stops at an image that cannot be read; `keep` gives its prediction the reason as `error`.
            context: what is known, such as `{"age": 61, "sex": "male"}`, for all images or one per image; models that
                use no context ignore it.
        Returns:
            A prediction per image, in their order; `to_frame()` makes a table of them.
        Raises:
            ImageError: an image cannot be read.
            ConfigError: the context does not fit the images, or names a column that does not exist.
            IntegrityError: the model does not reproduce its golden logits.
        """
        if errors not in ("raise", "keep"):
            raise ConfigError(f"errors is {errors!r}; it must be raise or keep")
        return predict_given(
            self.bundle,
            self._loaded,
            images,
            self._settings,
            heat_maps=heat_maps,
            keep=errors == "keep",
            context=context,
        )

    def explain(
        self, image: GivenImage, *, method: str = "gradcam", target: str | None = None, versus: str | None = None
    ) -> Explanation:
        """Explain the prediction of an image; see `relook.explain`."""
        return explain_given(self._precise, image, method, target, versus)

    @cached_property
    def _loaded(self) -> LoadedModel:
        loaded = load_model(self.bundle, precision=self._settings.precision)
        loaded.check_golden()
        return loaded

    @cached_property
    def _precise(self) -> LoadedModel:
        # Gradients need fp32.
        return load_model(self.bundle, precision="fp32")

    def __repr__(self) -> str:
        return f"Model({self.id[:12]!r}, {self.bundle.document.architecture.name}, {len(self.classes)} classes)"
