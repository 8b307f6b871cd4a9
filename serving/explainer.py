"""The explainer: heat maps for stored predictions, computed by the model that made the prediction.

In: a stored prediction and a class. Out: a `HeatMap`. It keeps its own copies of the models used last, so explaining
shares no network and no lock with predicting. It writes nothing.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from images.decode import decode_frame, decode_frames
from records.errors import DataError, RefusedError, UnavailableError, UnknownIdError
from records.memory import return_freed_memory
from records.models import bundle_folder, registered_bundle, serving_model
from records.store import Store, read_image
from records.types import Consent, Image, ModelRecord, Prediction
from serving.images import attribution_map, take_in
from serving.messages import FoundCase, HeatMap, Method
from serving.nearest import CaseFinder
from serving.settings import ServingSettings
from vision.calibration.decision import labels_of
from vision.explanations.methods import METHODS
from vision.inference.attribution import attribute
from vision.inference.loaded import LoadedModel, load_model
from vision.precision import PrecisionChoice

MODELS_KEPT = 3


class Explainer:
    """Explains stored predictions and unstored images. Thread-safe."""

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._models: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()
        self._loading = threading.Lock()
        self._cases = CaseFinder(store, settings.overlay_side_px)

    def explain(self, prediction: Prediction, method: Method, target: str | None, versus: str | None = None) -> HeatMap:
        """Return a heat map of a stored prediction.

        Args:
            prediction: whose image is stored.
            method: name in `METHODS`.
            target: class code; None is the predicted label, or the first class if there is none.
            versus: class code that the target is compared with, or None.
        Returns:
            The map with its overlay.
        Raises:
            TaxonomyError: a class is unknown.
            DataError: `target` and `versus` are the same class.
            RefusedError: the image was not stored, or the model's output for it is not finite.
        """
        wanted = target or prediction.label or self._store.taxonomy.codes[0]
        self._check_classes(wanted, versus)
        _, image = self._image(prediction)
        return self._map(self._model(prediction.model_id, prediction.precision, method), image, method, wanted, versus)

    def nearest(self, prediction: Prediction, limit: int) -> list[FoundCase]:
        """Return the confirmed cases that are most like the image of a stored prediction, to the model that made it.

        Args:
            prediction: whose image is stored.
            limit: number of cases, at most.
        Returns:
            The nearest first; fewer, or none, if the model has no more that may be shown.
        Raises:
            RefusedError: the image was not stored.
            UnknownIdError: the model is not registered any more.
            IntegrityError: the model's cases cannot be read.
        """
        about = [self._image(prediction)]
        return self.nearest_to_each(about, prediction.model_id, prediction.precision, limit)[0]

    def nearest_to_each(
        self, about: Sequence[tuple[Image, bytes]], model_id: str, precision: str, limit: int
    ) -> list[list[FoundCase]]:
        """Return the confirmed cases of a model that are most like each image to it; see `nearest`."""
        loaded = self._model(model_id, precision, "gradcam")
        with self._store.ledger.read() as tx:
            folder = bundle_folder(self._store, tx.require(ModelRecord, model_id))
        seen = [(own, decode_frame(data, loaded.geometry.frame)) for own, data in about]
        return self._cases.find(loaded, folder, seen, limit)

    def explain_image(self, image: bytes, method: Method, target: str | None, versus: str | None) -> HeatMap:
        """Return a heat map of an image by the model that serves now. Nothing is stored.

        Args:
            image: as sent.
            method: name in `METHODS`.
            target: class code; None is the label.
            versus: class code that the target is compared with, or None.
        Returns:
            The map with its overlay.
        Raises:
            ImageError: the image cannot be used.
            TaxonomyError: a class is unknown.
            DataError: `target` and `versus` are the same class.
            UnavailableError: no model serves.
        """
        stored = take_in(self._store, image, self._settings.max_pixels)
        with self._store.ledger.read() as tx:
            served = serving_model(tx)
        if served is None:
            raise UnavailableError("no model is to be served yet; promote one first")
        loaded = self._model(served.id, self._settings.precision, method)
        if target is None:
            probabilities = loaded.predict(decode_frame(stored.data, loaded.geometry.frame)[None]).probabilities
            target = self._store.taxonomy.codes[int(labels_of(probabilities, loaded.decision)[0])]
        self._check_classes(target, versus)
        return self._map(loaded, stored.data, method, target, versus)

    def _check_classes(self, target: str, versus: str | None) -> None:
        self._store.taxonomy.index_of(target)
        if versus is not None and self._store.taxonomy.index_of(versus) == self._store.taxonomy.index_of(target):
            raise DataError(f"versus: {versus!r} cannot be compared with itself; name another class")

    def _map(self, loaded: LoadedModel, image: bytes, method: Method, target: str, versus: str | None) -> HeatMap:
        index_of = self._store.taxonomy.index_of
        frame = loaded.geometry.frame
        shown = frame.shown(self._settings.overlay_side_px)
        decoded = decode_frames(image, {frame, shown})
        against = None if versus is None else index_of(versus)
        try:
            found = attribute(loaded, decoded[frame], method, index_of(target), against)
        finally:
            if METHODS[method].evaluations > 1:
                # A slow map leaves 50 to 100 MB behind in each thread that computes one.
                return_freed_memory()
        if not np.isfinite(found.values).all():
            raise RefusedError("the model has no finite output for this image, so there is nothing to explain")
        return attribution_map(loaded, found, decoded[shown], method, target, versus, self._settings.overlay_alpha)

    def _image(self, prediction: Prediction) -> tuple[Image, bytes]:
        with self._store.ledger.read() as tx:
            image = tx.get(Image, prediction.image_id)
        if image is None or image.erased_at is not None or prediction.consent is Consent.NONE:
            raise RefusedError(
                "the image of this prediction was not stored, so it cannot be explained afterwards; "
                "send it again with ?explain=gradcam"
            )
        if self._store.blobs.has(image.id):
            return image, self._store.blobs.get(image.id)
        return image, read_image(self._store, image)

    def _model(self, model_id: str, precision: str, method: Method) -> LoadedModel:
        # Some methods need fp32, whatever precision the prediction was computed in.
        key = (model_id, "fp32" if METHODS[method].needs_fp32 else precision)
        # Loaded under the lock: two requests for one model must not load it twice.
        with self._loading:
            if key not in self._models:
                self._models[key] = self._load(*key)
            self._models.move_to_end(key)
            # Least recently used first. A running explanation keeps its own reference to a model that is dropped here.
            while len(self._models) > MODELS_KEPT:
                self._models.popitem(last=False)
            return self._models[key]

    def _load(self, model_id: str, precision: str) -> LoadedModel:
        with self._store.ledger.read() as tx:
            record = tx.get(ModelRecord, model_id)
        if record is None:
            raise UnknownIdError(f"the model {model_id[:12]} that made this prediction is no longer registered")
        choice: PrecisionChoice = "auto" if precision == "auto" else "bf16" if precision == "bf16" else "fp32"
        return load_model(registered_bundle(self._store, record), precision=choice)
