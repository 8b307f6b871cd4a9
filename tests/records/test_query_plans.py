"""What runs over millions of rows finds them by an index; on PostgreSQL the same is in test_postgresql."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from records.ids import new_id
from records.store import Store
from records.types import Consent, Decision, Image, Prediction, ReviewItem, ReviewState
from serving.access.keys import LOCAL
from serving.events import gather
from serving.metrics import Metrics
from serving.outbox import PredictionRows, find_repeated, reviews_of, write_predictions
from serving.responses import read_page
from serving.waiting import ReviewWaits
from tests.records.plans import full_scans, led_astray, scanned, sent


def test_trace_listing_monitor_retention_and_metrics_scan_no_large_table(
    store: Store, sample: Callable[..., Any]
) -> None:
    assert full_scans(store, sample) == []
    with sent(store.ledger) as statements, store.ledger.read() as tx:
        tx.find(ReviewItem, where={"blind": True})
    assert len(scanned(store.ledger, statements)) == 1, "a scan is found"


def test_a_page_of_predictions_sends_as_many_queries_as_a_single_one(store: Store, sample: Callable[..., Any]) -> None:
    decisions = [Decision.REVIEW, Decision.REVIEW, Decision.ANSWERED, Decision.URGENT, Decision.REVIEW, Decision.REVIEW]
    with store.ledger.begin() as tx:
        for number, decision in enumerate(decisions):
            # The last two are of the image of the first: one has its reasons merged into that one's item.
            image = f"{number % 4:064x}"
            tx.add(
                sample(Prediction, number, id=f"{number:032x}", image_id=image, decision=decision, context_effect=None)
            )
        for name, of, image, state in (
            ("a", 0, 0, ReviewState.PUSHED), ("b", 1, 1, ReviewState.WITHDRAWN), ("c", 2, 2, ReviewState.NEW),
            ("d", None, 3, ReviewState.NEW), ("e", None, 1, ReviewState.NEW), ("f", 5, 1, ReviewState.ANSWERED),
            ("g", 5, 1, ReviewState.WITHDRAWN),
        ):  # fmt: skip
            own = None if of is None else f"{of:032x}"
            tx.add(sample(ReviewItem, id=name, prediction_id=own, image_id=f"{image:064x}", state=state))
    counts = []
    for limit in (1, 6):
        with sent(store.ledger) as statements:
            page = read_page(store, LOCAL, None, None, limit)
        counts.append(len(statements))
    assert counts[0] == counts[1] == 2
    assert [one.id for one in page.items] == [f"{number:032x}" for number in (5, 4, 3, 2, 1, 0)]
    with store.ledger.read() as tx:
        found = reviews_of(tx, tx.find(Prediction))
    # An own item that was withdrawn is not replaced by one of the image, which number 1 shows.
    assert {int(key, 16): item.id for key, item in found.items()} == {0: "a", 2: "c", 3: "d", 4: "a", 5: "f"}
    assert scanned(store.ledger, statements) == []


def test_ids_are_looked_up_by_their_index_however_many_items_wait(store: Store, sample: Callable[..., Any]) -> None:
    batch = []
    for number in range(16):
        image = sample(Image, number, provenance="served", erased_at=None, expired_at=None, consent=Consent.REVIEW)
        prediction = sample(
            Prediction, number, id=f"{number:032x}", image_id=image.id, idempotency_key=f"{number}",
            consent=Consent.REVIEW, served=True, context_effect=None,
        )  # fmt: skip
        item = sample(
            ReviewItem, number, image_id=image.id, prediction_id=prediction.id, state=ReviewState.NEW, blind=False
        )
        batch.append(PredictionRows(prediction, image, item))
    with sent(store.ledger) as statements:
        items = write_predictions(store, batch)
        again = [replace(rows, prediction=_anew(rows.prediction)) for rows in batch]
        assert [item and item.id for item in write_predictions(store, again)] == [item and item.id for item in items]
        open_items = ReviewWaits(store, 1)._look([item.id for item in items if item is not None])
        assert len(open_items) == len(batch)
        find_repeated(store, batch[3].prediction.caller, "3")
    assert len(statements) >= 6
    assert led_astray(store.ledger, statements) == scanned(store.ledger, statements) == []
    # What SQLite does by itself, and that the check finds it.
    query = "SELECT id FROM review_items WHERE review_items.image_id IN (?, ?, ?) AND review_items.state IN (?, ?)"
    assert led_astray(store.ledger, [(query, ("a", "b", "c", "new", "pushed"))])


def _anew(prediction: Prediction) -> Prediction:
    return prediction.model_copy(update={"id": new_id(), "idempotency_key": None})


def test_overdue_items_are_found_by_their_date_however_many_wait(store: Store) -> None:
    with sent(store.ledger) as statements:
        Metrics(store).text()
        gather(store)
    about_due = [(text, parameters) for text, parameters in statements if "due < ?" in text]
    assert len(about_due) == 2
    with store.ledger.read() as tx:
        for text, parameters in about_due:
            steps = tx.connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters).all()
            assert any("review_items" in step[-1] and "(state=? AND due<?)" in step[-1] for step in steps), steps
