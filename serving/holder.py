"""The model that serves: loading, verification, and replacement without a pause.

In: the ledger, which names the serving model. Out: `ModelHolder.current`. A new model is loaded while the old one
serves, must reproduce its golden logits and is warmed up; then one reference changes. Requests that were decoded for
the old model are still computed by it. Nothing is promoted here.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import torch
from pydantic import BaseModel, ConfigDict, Field

from records.arrays import UInt8Array
from records.bundles import BundleDocument
from records.errors import RelookError, UnavailableError
from records.ids import utc_now
from records.models import generation, registered_bundle, serving_model
from records.store import Store
from records.types import ModelRecord
from serving.context import context_info
from serving.messages import ServingState
from serving.schemas import ClassInfo, ServedModelInfo
from serving.settings import ServingSettings, compute_threads
from serving.words import status_text
from vision.inference.engines import load_engine, resolve_device
from vision.inference.loaded import LoadedModel, load_model
from vision.precision import PrecisionChoice

logger = logging.getLogger(__name__)

RETRY_BROKEN_S = 30.0
"""Time until a model that could not be loaded is tried again."""
RUNS = 5
"""Forward passes that each number of threads is measured with; the shortest of them counts."""
WORTH = 1.25
"""How many times as fast all cores have to be: below it the other cores do more for other requests."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded model that passed its golden images."""

    id: str
    status: str
    loaded: LoadedModel
    document: BundleDocument
    loaded_at: datetime
    golden_difference: float
    all_cores_from: int
    """size from which a batch is computed on all cores, while no other one is"""

    def info(self) -> ServedModelInfo:
        """Return its public description."""
        document = self.document
        classes = [ClassInfo(code=c.code, name=c.name, malignant=c.malignant) for c in document.taxonomy.classes]
        return ServedModelInfo(
            id=self.id,
            status=self.status,
            status_text=status_text(self.status),
            architecture=document.architecture.name,
            dataset_id=document.dataset_id,
            engine=self.loaded.engine,
            precision=self.loaded.precision,
            side_px=document.geometry.side_px,
            crop=document.geometry.crop,
            classes=classes,
            loaded_at=self.loaded_at,
            golden_difference=self.golden_difference,
            metrics=document.metrics,
            context=context_info(document),
            views=document.views,
        )


class ModelHolder:
    """Holds the serving model. `refresh` runs in one thread at a time; `current` in any."""

    def __init__(self, store: Store, settings: ServingSettings) -> None:
        self._store = store
        self._settings = settings
        self._current: ServedModel | None = None
        self._detail = "no model is to be served yet; promote one first"
        self._broken: dict[str, float] = {}
        self._refreshing = threading.Lock()
        self.generation = 0
        """of the ledger when it named the model that serves here; see `records.models.generation`"""
        self.follows = False
        """whether the last `refresh` left here what the ledger names"""
        self.is_stuck = False
        """whether the ledger names a model that could not be loaded here"""

    @property
    def current(self) -> ServedModel:
        """The serving model; UnavailableError if there is none."""
        if self._current is None:
            raise UnavailableError(self._detail)
        return self._current

    def state(self) -> ServingState:
        """Return which model serves, or why none does."""
        current = self._current
        return ServingState(current.info() if current else None, self._detail)

    def refresh(self) -> bool:
        """Load the model that the ledger names, if it is another one, and take over its status.

        A model that cannot be loaded or fails its golden images is logged, and the current one keeps serving.

        Returns:
            True if another model serves from now on.
        """
        with self._refreshing:
            self.follows = False
            try:
                with self._store.ledger.read() as tx:
                    named, number = serving_model(tx), generation(tx)
                self.is_stuck = named is not None
                changed = named is not None and self._follow(named, number)
                if named is None or (self._current is not None and self._current.id == named.id):
                    self.generation, self.follows, self.is_stuck = number, True, False
                return changed
            except Exception as error:  # noqa: BLE001 - whatever is broken in a bundle
                # Neither an unreachable ledger nor a broken new model may stop the current one from serving.
                self._detail = str(error)
                logger.error("the serving model stays as it is: %s", error)
                return False

    def _follow(self, named: ModelRecord, number: int) -> bool:
        current = self._current
        if current is not None and current.id == named.id:
            # Promotion of the serving model changes only its status, so nothing is loaded again.
            if current.status != named.status:
                self._current = replace(current, status=named.status.value)
            self._detail = "ready"
            return False
        # Loading takes seconds of CPU; tried at each poll, a broken model would slow the current one down.
        if time.monotonic() < self._broken.get(named.id, 0.0):
            return False
        try:
            loaded = load_served(self._store, named, self._settings)
        except Exception:
            self._broken[named.id] = time.monotonic() + RETRY_BROKEN_S
            raise
        self._broken.pop(named.id, None)
        # The generation first: who gets a prediction of the new model has to get its generation, too. Assigning a
        # reference is atomic: readers in other threads get the old model or the new one.
        self.generation = number
        self._current = loaded
        self._detail = "ready"
        logger.info("model %s (%s) serves from now on", named.id[:12], named.status)
        return True


def load_served(store: Store, named: ModelRecord, settings: ServingSettings) -> ServedModel:
    """Load a registered model, check its golden images and warm it up.

    Args:
        store: whose taxonomy the model must have.
        named: its record.
        settings: engine, device, precision and batch sizes.
    Returns:
        The model, ready to serve.
    Raises:
        IntegrityError: the bundle was altered, or does not reproduce its golden logits.
        TaxonomyError: it was trained for other classes.
    """
    bundle = registered_bundle(store, named)
    store.taxonomy.require_same(bundle.document.taxonomy_hash, f"model {named.id[:12]}")
    loaded = load_engine(
        bundle, settings.engine, precision=settings.precision, device=settings.device,
        cores=compute_threads(settings.predictor_cpus),
    )  # fmt: skip
    difference = loaded.check_golden()
    golden = bundle.golden()["inputs"]
    # The first forward pass of a batch size allocates memory and chooses kernels; requests should not wait for that.
    for size in loaded.warm_sizes(settings.max_batch_size):
        loaded.predict(golden[[0] * size], gradcam=True)
    size = all_cores_from(loaded, golden[:1], cores_of(settings), settings.max_batch_size)
    return ServedModel(named.id, named.status.value, loaded, bundle.document, utc_now(), difference, size)


def cores_of(settings: ServingSettings) -> int:
    """Return how many batches compute at once; on a GPU one does, and the next one is gathered meanwhile."""
    on_cpu = settings.engine == "openvino" or resolve_device(settings.device) == "cpu"
    return compute_threads(settings.predictor_cpus) if on_cpu else 1


def all_cores_from(
    loaded: LoadedModel, image: UInt8Array, cores: int, largest: int, clock: Callable[[], float] = time.perf_counter
) -> int:
    """Return from which batch size on all cores are worth it, by measuring batches of 1, 2, 4 and so on.

    Threads wait for each other at every operator: a few images of a small network lose more by that than they gain.

    Args:
        loaded: warmed up.
        image: [1, S, S, 3].
        cores: of the replica.
        largest: batch size.
        clock: seconds.
    Returns:
        The first size that all cores compute `WORTH` times as fast as one; `largest` + 1 if none is.
    """
    size, before = 1, torch.get_num_threads()
    try:
        while cores > 1 and size <= largest:
            shortest = {1: float("inf"), cores: float("inf")}
            # In turn, so that what else the machine does meets both alike.
            for threads in [*shortest] * RUNS:
                torch.set_num_threads(threads)
                began_s = clock()
                loaded.predict(image[[0] * size], gradcam=True)
                shortest[threads] = min(shortest[threads], clock() - began_s)
            if shortest[cores] * WORTH <= shortest[1]:
                break
            size *= 2
    finally:
        torch.set_num_threads(before)
    return min(size, largest + 1)


class VerifiedModel(BaseModel):
    """Result of verifying one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    status: str
    precision: str | None = Field(description="of the computation; null if the model could not be loaded")
    golden_difference: float | None = Field(description="largest difference from a golden logit; null if not checked")
    problem: str | None = Field(description="one sentence; null if there is none")


def verify_models(
    store: Store,
    records: Sequence[ModelRecord],
    precision: PrecisionChoice,
    on_done: Callable[[], None] = lambda: None,
) -> list[VerifiedModel]:
    """Check that registered models still reproduce their golden logits, for example after an upgrade of torch.

    Returns one result per model, in order; a model that fails does not keep the next one from being checked. `on_done`
    is called after each.
    """
    found = []
    for record in records:
        found.append(_verify(store, record, precision))
        on_done()
    return found


def _verify(store: Store, record: ModelRecord, precision: PrecisionChoice) -> VerifiedModel:
    computed_in, difference, problem = None, None, None
    try:
        model = load_model(registered_bundle(store, record), precision=precision)
        computed_in = model.precision
        difference = model.check_golden()
    except UnavailableError:
        raise
    except RelookError as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001 - whatever is broken in a bundle, the next model is checked
        problem = f"the bundle cannot be loaded ({type(error).__name__}: {error})"
    return VerifiedModel(
        id=record.id, status=record.status, precision=computed_in, golden_difference=difference, problem=problem
    )
