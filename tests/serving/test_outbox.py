"""Predictions that several replicas write concurrently into a real PostgreSQL."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from records.errors import RefusedError, UnavailableError
from records.ids import new_id, sha256_hex, utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, Decision, Image, Prediction, ReasonCode, ReviewItem
from serving.outbox import PredictionRows, write_predictions

REASONS = (ReasonCode.REFER, ReasonCode.PREDICTION_SET, ReasonCode.LOW_CONFIDENCE, ReasonCode.AUDIT_SAMPLE)


def prediction_rows(number: int, reason: ReasonCode, key: str | None) -> PredictionRows:
    """Rows of a prediction for one of a few images, with a review item."""
    image_id, now = sha256_hex(str(number).encode()), utc_now()
    image = Image(
        id=image_id, uri="file:///none", format="jpeg", width_px=64, height_px=64, provenance="served",
        consent=Consent.TRAINING, created_at=now,
    )  # fmt: skip
    prediction = Prediction(
        id=new_id(), request_id=new_id(), created_at=now, idempotency_key=key, caller="local", image_id=image_id,
        consent=Consent.TRAINING, model_id="m", model_status="champion", engine="torch", precision="fp32",
        num_threads=1, settings_hash="s", decision=Decision.REVIEW, reasons=[reason], latency_ms=1.0,
    )  # fmt: skip
    item = ReviewItem(
        id=new_id(), created_at=now, prediction_id=prediction.id, image_id=image_id, reasons=[reason], priority=1.0
    )
    return PredictionRows(prediction, image, item)


def test_replicas_that_write_at_once_store_each_image_and_its_review_item_once(
    tmp_path: Path, new_database: Callable[..., str]
) -> None:
    settings = RecordsSettings(home=tmp_path / "home", database=new_database())
    accepted: list[str] = []
    failed: list[UnavailableError] = []

    def replica(place: int) -> None:
        store = open_store(settings)
        for turn in range(10):
            # Each pair of replicas writes the same images and keys, in different orders.
            batch = [prediction_rows((turn + place * step) % 6, REASONS[place], f"{turn} {step}") for step in (1, 2, 3)]
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
        predictions, items, images = tx.find(Prediction), tx.find(ReviewItem), tx.count(Image)
    store.close()
    assert failed == []
    assert sorted(one.idempotency_key or "" for one in predictions) == sorted(accepted)
    assert len(accepted) == 30, "of four replicas with the same three keys one succeeds"
    assert images == len({one.image_id for one in predictions})
    assert set(Counter(item.image_id for item in items).values()) == {1}
    reasons = {(one.image_id, reason) for one in predictions for reason in one.reasons}
    assert {(item.image_id, reason) for item in items for reason in item.reasons} == reasons
