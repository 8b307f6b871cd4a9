"""What runs over millions of rows finds them by an index; on PostgreSQL the same is in test_postgresql."""

from collections.abc import Callable
from typing import Any

from records.store import Store
from records.types import Decision, Prediction, ReviewItem, ReviewState
from serving.access.keys import LOCAL
from serving.outbox import reviews_of
from serving.responses import read_page
from tests.records.plans import full_scans, scanned, sent


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
