"""`relook drift`: which sources of images have changed since the model began to serve, and what changed.

In: the served predictions of the model that serves. Out: an alarm per source that changed (see `serving.drift`), which
the predictors read: they draw more of that source's images for the audit sample, with the reason `drift`. Each check
reads the predictions since the last one.
"""

import base64
import logging
from collections.abc import Iterator, Mapping

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

from images.decode import decode_frame
from images.overlay import image_png
from records import audit
from records.cursors import set_position
from records.errors import RelookError, UnavailableError, UnknownIdError
from records.frames import Frame
from records.ids import utc_now
from records.lease import hold
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.models import serving_model
from records.store import Store, read_image
from records.types import Consent, Cursor, Image, Prediction
from serving.drift import CURSOR, STATISTICS, DriftAlarm, Source, key_of, source_of
from serving.page.render import render
from serving.settings import ServingSettings
from serving.words import DISCLAIMER

logger = logging.getLogger(__name__)

FOUND, ACCEPTED = "drift.found", "drift.accepted"
LEASE = "serving.drift"
MAX_SOURCES = 500
"""Sources that are watched: their names come with requests, so anybody can make up more."""
_STATE = "serving.drift.state "
_READ_AT_ONCE = 5000
_SIDE_PX = 128


class SourceReport(BaseModel):
    """A source and whether it has changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    images: int = Field(ge=0, description="looked at, up to the alarm if there is one")
    alarm: DriftAlarm | None


class DriftReport(BaseModel):
    """The sources of the model that serves; those that changed come first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    sources: list[SourceReport]
    not_watched: int = Field(ge=0, description="images of this check from sources beyond those that are watched")


def check_drift(store: Store, settings: ServingSettings, *, wait_s: float = 60.0) -> DriftReport:
    """Read the predictions since the last check, and raise alarms.

    Args:
        store: with the predictions; its ledger keeps what was seen.
        settings: false-alarm rate.
        wait_s: how long to wait for another check, seconds.
    Returns:
        All watched sources.
    Raises:
        UnavailableError: no model serves.
        RefusedError: another process checks.
    """
    with hold(store.ledger, LEASE, wait_s=wait_s):
        # Read and written apart: a write transaction over so many rows would hold up the predictions.
        with store.ledger.read() as tx:
            model = serving_model(tx)
            if model is None:
                raise UnavailableError("no model serves yet, so there is nothing to compare; promote one first")
            main = tx.get(Cursor, CURSOR)
            is_known = main is not None and main.position["model"] == model.id
            watched = _Watch(tx if is_known else None, model.id, settings.drift_false_alarm)
            after = str(main.position["after"]) if main is not None and is_known else ""
            for prediction in _predictions(tx, model.id, after):
                after = prediction.id
                watched.see(prediction, store)
        changed = sorted(key for key, one in watched.sources.items() if one.alarm is not None)
        with store.ledger.begin() as tx:
            if not is_known:
                # Scores of another model are other numbers; what was found or accepted for it says nothing.
                _forget(tx)
            watched.save(tx)
            set_position(tx, CURSOR, {"model": model.id, "after": after, "sources": changed})
    names = _names(store, watched.sources)
    found = [SourceReport(source=names[key], images=s.images, alarm=s.alarm) for key, s in watched.sources.items()]
    ordered = sorted(found, key=lambda one: (one.alarm is None, one.source))
    return DriftReport(model_id=model.id, sources=ordered, not_watched=watched.not_watched)


def accept_drift(store: Store, source: str, *, actor: str) -> None:
    """Forget what is known of a source, so that its images of now become the ones that later ones are compared with.

    UnknownIdError if there is no such source.
    """
    with store.ledger.begin() as tx:
        main = tx.get(Cursor, CURSOR)
        # A source whose images were all erased is listed by its key.
        named = [key for key in (source, key_of(source)) if tx.get(Cursor, f"{_STATE}{key}") is not None]
        if main is None or not named:
            raise UnknownIdError(f"no source is called {source!r}; `relook drift` lists them")
        tx.connection.execute(sa.delete(TABLES[Cursor]).where(TABLES[Cursor].c.name == f"{_STATE}{named[0]}"))
        left = [key for key in main.position["sources"] if key != named[0]]
        tx.update(Cursor, CURSOR, position={**main.position, "sources": left})
        audit.append(tx, actor=actor, action=ACCEPTED, subject=named[0], details={"model": main.position["model"]})


def drift_html(store: Store, found: DriftReport) -> str:
    """Return the page of a report: what changed in each source, with images from before and after."""
    changed = [
        {
            "source": one.source,
            "alarm": one.alarm,
            "what": STATISTICS[one.alarm.statistic],
            "before": _images(store, one.alarm.images_before),
            "after": _images(store, one.alarm.images_after),
        }
        for one in found.sources
        if one.alarm is not None
    ]
    same = [one for one in found.sources if one.alarm is None]
    return render("drift", report=found, changed=changed, same=same, disclaimer=DISCLAIMER, now=utc_now())


class _Watch:
    """The sources of one check by their keys, with what is known of them; `tx` is None to begin anew."""

    def __init__(self, tx: Transaction | None, model_id: str, false_alarm: float) -> None:
        self._model_id = model_id
        self._false_alarm = false_alarm
        self._seen, self._raised = set[str](), list[str]()
        self.not_watched = 0
        known = [] if tx is None else [one for one in tx.find(Cursor) if one.name.startswith(_STATE)]
        self.sources = {c.name.removeprefix(_STATE): Source(false_alarm, c.position) for c in known}

    def see(self, prediction: Prediction, store: Store) -> None:
        """Take a prediction."""
        key = key_of(source_of(prediction.organisation, prediction.context))
        if key not in self.sources:
            if len(self.sources) == MAX_SOURCES:
                self.not_watched += 1
                return
            self.sources[key] = Source(self._false_alarm)
        self._seen.add(key)
        if self.sources[key].see(prediction, store.taxonomy):
            self._raised.append(key)

    def save(self, tx: Transaction) -> None:
        """Keep what was seen; alarms are audited."""
        for key in sorted(self._seen):
            set_position(tx, f"{_STATE}{key}", self.sources[key].state())
        for key in self._raised:
            alarm = self.sources[key].alarm
            details = {"statistic": alarm.statistic if alarm else "", "model": self._model_id}
            audit.append(tx, actor="relook drift", action=FOUND, subject=key, details=details)


def _predictions(tx: Transaction, model_id: str, after: str) -> Iterator[Prediction]:
    table = TABLES[Prediction]
    while True:
        query = sa.select(table).where(table.c.model_id == model_id, table.c.served.is_(True), table.c.id > after)
        rows = tx.connection.execute(query.order_by(table.c.id).limit(_READ_AT_ONCE)).mappings().all()
        for row in rows:
            yield Prediction.model_validate(dict(row))
        if len(rows) < _READ_AT_ONCE:
            return
        after = rows[-1]["id"]


def _names(store: Store, sources: Mapping[str, Source]) -> dict[str, str]:
    """Return the name of each source, read from its last predictions; its key where all of them were erased."""
    with store.ledger.read() as tx:
        last = tx.find(Prediction, where={"id": {one for source in sources.values() for one in source.last}})
    named = {key_of(name): name for name in (source_of(one.organisation, one.context) for one in last)}
    return {key: named.get(key, key) for key in sources}


def _forget(tx: Transaction) -> None:
    names = [cursor.name for cursor in tx.find(Cursor) if cursor.name.startswith(_STATE)]
    tx.connection.execute(sa.delete(TABLES[Cursor]).where(TABLES[Cursor].c.name.in_(names)))


def _images(store: Store, prediction_ids: list[str]) -> list[str]:
    """Return the images of predictions as base64, as far as they are stored and may be shown."""
    with store.ledger.read() as tx:
        kept = [p for p in tx.find(Prediction, where={"id": prediction_ids}) if p.consent is not Consent.NONE]
        images = tx.find(Image, where={"id": {p.image_id for p in kept}, "erased_at": None})
    drawn = []
    for image in images:
        try:
            drawn.append(base64.b64encode(image_png(decode_frame(read_image(store, image), Frame(_SIDE_PX)))).decode())
        except RelookError as error:
            logger.warning("image %s is not shown: %s", image.id[:12], error)
    return drawn
