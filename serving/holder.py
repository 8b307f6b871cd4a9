"""The model that answers, and its exchange for the next one without a pause.

In: the ledger, which names the one model that answers. Out: `ModelHolder.current`. A new model is loaded
beside the old one, must answer its golden images and is warmed up; then one reference changes.
Who asked before goes on with the old one. It promotes nothing.
"""

import logging
import threading
import time
from dataclasses import dataclass, replace
from datetime import datetime

from records.bundles import BundleDocument
from records.errors import RelookError, UnavailableError
from records.ids import utc_now
from records.models import registered_bundle, serving_model
from records.store import Store
from records.types import ModelRecord
from serving.messages import ServingState
from serving.schemas import ClassInfo, ServedModelInfo
from serving.settings import ServingSettings
from serving.words import status_text
from vision.inference.loaded import LoadedModel, load_model
from vision.precision import PrecisionChoice

logger = logging.getLogger(__name__)

RETRY_BROKEN_S = 30.0
"""A model that could not be loaded is tried again after this long."""


@dataclass(frozen=True)
class ServedModel:
    """A model that may answer."""

    id: str
    status: str
    loaded: LoadedModel
    document: BundleDocument
    loaded_at: datetime
    golden_difference: float

    def info(self) -> ServedModelInfo:
        """Return what callers may know of it."""
        document = self.document
        classes = [ClassInfo(code=c.code, name=c.name, malignant=c.malignant) for c in document.taxonomy.classes]
        return ServedModelInfo(
            id=self.id,
            status=self.status,
            status_text=status_text(self.status),
            architecture=document.architecture.name,
            dataset_id=document.dataset_id,
            precision=self.loaded.precision,
            side_px=document.geometry.side_px,
            classes=classes,
            loaded_at=self.loaded_at,
            golden_difference=self.golden_difference,
            metrics=document.metrics,
        )


class ModelHolder:
    """Holds the model that answers. `refresh` runs in one thread at a time; `current` in any.

    Args:
        store: with the ledger that names the model.
        settings: precision and the batch size to warm up with.
    """

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._current: ServedModel | None = None
        self._detail = "no model is to be served yet; promote one first"
        self._broken: dict[str, float] = {}
        self._refreshing = threading.Lock()

    @property
    def current(self) -> ServedModel:
        """The model that answers now; UnavailableError if there is none."""
        if self._current is None:
            raise UnavailableError(self._detail)
        return self._current

    def state(self) -> ServingState:
        """Return which model answers, or why none does."""
        current = self._current
        return ServingState(current.info() if current else None, self._detail)

    def refresh(self) -> bool:
        """Follow the ledger: load the model it names, if it is another one or has another status.

        Returns:
            True if another model answers from now on. A model that cannot be loaded or fails its
            golden images is logged, and the one before goes on answering.
        """
        with self._refreshing:
            try:
                with self._store.ledger.read() as tx:
                    named = serving_model(tx)
                return named is not None and self._follow(named)
            except (RelookError, OSError) as error:
                # Whatever is wrong with the ledger or with a new model is no reason to stop answering.
                self._detail = str(error)
                logger.error("the model that answers stays as it is: %s", error)
                return False

    def _follow(self, named: ModelRecord) -> bool:
        current = self._current
        if current is not None and current.id == named.id:
            if current.status != named.status:
                self._current = replace(current, status=named.status.value)
            self._detail = "ready"
            return False
        if time.monotonic() < self._broken.get(named.id, 0.0):
            return False
        try:
            self._current = load_served(self._store, named, self._settings)
        except Exception:
            self._broken[named.id] = time.monotonic() + RETRY_BROKEN_S
            raise
        self._broken.pop(named.id, None)
        self._detail = "ready"
        logger.info("model %s (%s) answers from now on", named.id[:12], named.status)
        return True


def load_served(store: Store, named: ModelRecord, settings: ServingSettings) -> ServedModel:
    """Load a registered model, ask it its golden images and warm it up.

    Args:
        store: whose taxonomy it must have.
        named: the model.
        settings: precision and the batch sizes to warm up with.
    Returns:
        The model, ready to answer.
    Raises:
        IntegrityError: it was altered, or does not answer its golden images.
        TaxonomyError: it was made for other classes.
    """
    bundle = registered_bundle(store, named)
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {named.id[:12]}")
    precision: PrecisionChoice = settings.precision
    loaded = load_model(bundle, precision=precision)
    difference = loaded.check_golden()
    golden = bundle.golden()["inputs"]
    for size in (1, settings.max_batch_size):
        loaded.predict(golden[[0] * size], gradcam=True)
    return ServedModel(named.id, named.status.value, loaded, bundle.document, utc_now(), difference)
