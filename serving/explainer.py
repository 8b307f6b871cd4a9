"""The explainer: a map for an answer that was given before, computed again by the model that gave it.

In: a stored prediction and a class. Out: a `HeatMap`. It holds the models it was asked about last, so
that explaining never disturbs predicting. It writes nothing.
"""

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from records.bundles import read_bundle
from records.errors import RefusedError, UnknownIdError
from records.store import Store
from records.stored import read_picture
from records.types import Consent, Image, ModelRecord, Prediction
from serving.messages import HeatMap, Method
from serving.pictures import gradcam_map
from serving.settings import ServingSettings
from trainers.data.decode import decode_square
from trainers.inference.loaded import LoadedModel, load_model
from trainers.precision import PrecisionChoice

MODELS_KEPT = 2


class Explainer:
    """Explains stored answers. Safe from several threads.

    Args:
        store: with pictures, predictions and models.
        settings: of this room.
    """

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._models: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()
        self._loading = threading.Lock()

    def explain(self, prediction: Prediction, method: Method, target: str | None) -> HeatMap:
        """Compute where the model that answered looked.

        Args:
            prediction: the stored answer.
            method: how.
            target: class code; None is the answer's label, or the first class if it has none.
        Returns:
            The map.
        Raises:
            TaxonomyError: the class is unknown.
            RefusedError: the picture was not stored, or the model has no finite answer for it.
        """
        wanted = target or prediction.label or self._store.taxonomy.codes[0]
        class_index = self._store.taxonomy.index_of(wanted)
        picture = self._picture(prediction)
        loaded = self._model(prediction)
        pixels = decode_square(picture, loaded.geometry.side_px)
        values = loaded.explain(pixels[None], method, np.array([class_index]))[0]
        if not np.isfinite(values).all():
            raise RefusedError("the model has no finite answer for this picture, so there is nothing to explain")
        side_px, alpha = self._settings.overlay_side_px, self._settings.overlay_alpha
        return gradcam_map(loaded, picture, values, wanted, side_px, alpha)

    def _picture(self, prediction: Prediction) -> bytes:
        with self._store.ledger.read() as tx:
            image = tx.get(Image, prediction.image_id)
        if image is None or image.erased_at is not None or prediction.consent is Consent.NONE:
            raise RefusedError(
                "the picture of this answer was not stored, so it cannot be explained afterwards; "
                "send it again with ?explain=gradcam"
            )
        if self._store.blobs.has(image.id):
            return self._store.blobs.get(image.id)
        return read_picture(self._store, image)

    def _model(self, prediction: Prediction) -> LoadedModel:
        key = (prediction.model_id, prediction.precision)
        with self._loading:
            if key not in self._models:
                self._models[key] = self._load(*key)
            self._models.move_to_end(key)
            while len(self._models) > MODELS_KEPT:
                self._models.popitem(last=False)
            return self._models[key]

    def _load(self, model_id: str, precision: str) -> LoadedModel:
        with self._store.ledger.read() as tx:
            record = tx.get(ModelRecord, model_id)
        if record is None:
            raise UnknownIdError(f"the model {model_id[:12]} that gave this answer is no longer registered")
        choice: PrecisionChoice = "bf16" if precision == "bf16" else "fp32"
        return load_model(read_bundle(Path(record.path), expected_id=model_id), precision=choice)
