"""The confirmed cases of a task, found by the model that made the prediction under review, or by the one that serves.

`labeling` computes nothing on images, so what computes is made here and handed to it.
"""

import logging
import threading
from collections.abc import Sequence

from labeling.cases import AboutTask, TaskCase
from records.cases import FILE
from records.errors import ImageError, RelookError
from records.models import bundle_folder, serving_model
from records.store import Store
from records.types import Image, ModelRecord
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

    def __call__(self, about: Sequence[AboutTask]) -> list[list[TaskCase]]:
        """Return the cases like each image; none if its model has none, or they cannot be found."""
        found: list[list[TaskCase]] = [[] for _ in about]
        for (model_id, precision), rows in self._by_model(about).items():
            for row, cases in zip(rows, self._find([about[row][:2] for row in rows], model_id, precision), strict=True):
                found[row] = cases
        return found

    def _by_model(self, about: Sequence[AboutTask]) -> dict[tuple[str, str], list[int]]:
        """Return the places of images whose model has cases, by model and number format."""
        with self._store.ledger.read() as tx:
            serving = serving_model(tx)
            wanted = {prediction.model_id for _, _, prediction in about if prediction is not None}
            models = {model.id: model for model in tx.find(ModelRecord, where={"id": wanted})}
        rows: dict[tuple[str, str], list[int]] = {}
        for row, (_, _, prediction) in enumerate(about):
            model = serving if prediction is None else models.get(prediction.model_id)
            if self._limit > 0 and model is not None and (bundle_folder(self._store, model) / FILE).is_file():
                precision = self._settings.precision if prediction is None else prediction.precision
                rows.setdefault((model.id, precision), []).append(row)
        return rows

    def _find(self, about: Sequence[tuple[Image, bytes]], model_id: str, precision: str) -> list[list[TaskCase]]:
        try:
            found = self._made().nearest_to_each(about, model_id, precision, self._limit)
        except RelookError as error:
            if isinstance(error, ImageError) and len(about) > 1:
                return [self._find([one], model_id, precision)[0] for one in about]
            # They stand beside the image of a task, which is shown without them, too.
            logger.warning("image %s: its task shows no confirmed cases: %s", about[0][0].id[:12], error)
            return [[] for _ in about]
        return [
            [TaskCase(one.image_id, one.label, CONFIRMED_BY[one.label_rank], one.distance, one.png) for one in cases]
            for cases in found
        ]

    def _made(self) -> Explainer:
        with self._making:
            if self._explainer is None:
                self._explainer = Explainer(self._store, self._settings)
            return self._explainer
