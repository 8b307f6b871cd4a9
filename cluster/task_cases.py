"""The confirmed cases of a task, found by the model that made the prediction under review, or by the one that serves.

`labeling` computes nothing on images, so what computes is made here and handed to it.
"""

import logging
import threading

from labeling.cases import TaskCase
from records.cases import FILE
from records.errors import RelookError
from records.models import bundle_folder, serving_model
from records.store import Store
from records.types import Image, ModelRecord, Prediction
from serving.explainer import Explainer
from serving.settings import ServingSettings
from serving.words import CONFIRMED_BY

logger = logging.getLogger(__name__)


class TaskCases:
    """A `labeling.cases.CaseSource`. Thread-safe; loads a model when the first task needs it.

    Args:
        store: with images and models.
        settings: of the service; number format and sizes are as beside a prediction.
        limit: setting `labeling.cases_shown`.
    """

    def __init__(self, store: Store, settings: ServingSettings, limit: int) -> None:
        self._store = store
        self._settings = settings
        self._limit = limit
        self._explainer: Explainer | None = None
        self._making = threading.Lock()

    def __call__(self, image: Image, content: bytes, prediction: Prediction | None) -> list[TaskCase]:
        """Return the cases like an image; none if its model has none, or they cannot be found."""
        with self._store.ledger.read() as tx:
            model = serving_model(tx) if prediction is None else tx.get(ModelRecord, prediction.model_id)
        if self._limit == 0 or model is None or not (bundle_folder(self._store, model) / FILE).is_file():
            return []
        precision = self._settings.precision if prediction is None else prediction.precision
        try:
            found = self._made().nearest_to(image, content, model.id, precision, self._limit)
        except RelookError as error:
            # They stand beside the image of a task, which is shown without them, too.
            logger.warning("image %s: its task shows no confirmed cases: %s", image.id[:12], error)
            return []
        return [
            TaskCase(case.image_id, case.label, CONFIRMED_BY[case.label_rank], case.distance, case.png)
            for case in found
        ]

    def _made(self) -> Explainer:
        with self._making:
            if self._explainer is None:
                self._explainer = Explainer(self._store, self._settings)
            return self._explainer
