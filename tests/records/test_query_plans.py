"""What runs over millions of rows finds them by an index; on PostgreSQL the same is in test_postgresql."""

from collections.abc import Callable
from typing import Any

from records.store import Store
from records.types import ReviewItem
from tests.records.plans import full_scans, scanned, sent


def test_trace_listing_monitor_retention_and_metrics_scan_no_large_table(
    store: Store, sample: Callable[..., Any]
) -> None:
    assert full_scans(store, sample) == []
    with sent(store.ledger) as statements, store.ledger.read() as tx:
        tx.find(ReviewItem, where={"blind": True})
    assert len(scanned(store.ledger, statements)) == 1, "a scan is found"
