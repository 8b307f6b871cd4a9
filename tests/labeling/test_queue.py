"""The queue is read in pages, by an index, whatever its length."""

from collections.abc import Sequence

from labeling.queue import Read, first_waiting, waiting_pages, waiting_reads
from labeling.reads import plan_reads
from labeling.settings import LabelingSettings
from records.ids import utc_now
from records.store import Store
from records.types import ReasonCode, ReviewItem, ReviewState
from tests.records.plans import scanned, sent

SHARED, ANNA, ANYONE = Read(False, None), Read(True, "anna@example.org"), Read(True, None)


def add(store: Store, priorities: Sequence[float], read: Read = SHARED, prefix: str = "") -> None:
    with store.ledger.begin() as tx:
        tx.add(
            *(
                ReviewItem(
                    id=f"{prefix}{number:03d}", created_at=utc_now(), image_id="0" * 64, reasons=[ReasonCode.REFER],
                    priority=priority, blind=read.blind, reader=read.reader,
                )
                for number, priority in enumerate(priorities)
            )
        )  # fmt: skip


def test_pages_hold_every_waiting_item_once_and_the_most_urgent_first(store: Store) -> None:
    add(store, [1.0, 7.0, 7.0, 7.0, 7.0, 3.0, 9.0, 0.1 + 0.2])
    add(store, [5.0, 6.0], ANNA, "a")
    add(store, [8.0], ANYONE, "b")
    with store.ledger.begin() as tx:
        assert waiting_reads(tx) == {SHARED: 8, ANNA: 2, ANYONE: 1}
        tx.update(ReviewItem, "005", state=ReviewState.WITHDRAWN)
    with sent(store.ledger) as statements:
        pages = []
        for page in waiting_pages(store, [SHARED], 3):
            pages.append([item.id for item in page])
            # What was sent, or became more urgent, meanwhile moves nothing: this one is found by the next push.
            with store.ledger.begin() as tx:
                tx.update(ReviewItem, page[0].id, state=ReviewState.PUSHED)
                tx.update(ReviewItem, "000", priority=99.0)
    assert pages == [["006", "001", "002"], ["003", "004", "007"]]
    assert [len(page) for page in waiting_pages(store, [ANNA, ANYONE], 2)] == [2, 1]
    assert list(waiting_pages(store, [], 2)) == []
    with store.ledger.read() as tx:
        assert [item.id for item in first_waiting(tx, [ANNA, ANYONE], 2)] == ["b000", "a001"]
        waiting_reads(tx)
    assert scanned(store.ledger, statements) == []


def test_a_plan_reads_no_item_that_it_need_not_change(store: Store) -> None:
    add(store, [1.0] * 20)
    settings = LabelingSettings(blind_share=0.0)
    with sent(store.ledger) as statements:
        assert plan_reads(store, settings) == 0
    assert len(statements) == 1, "and takes no lock of writers"
    assert scanned(store.ledger, statements) == []
    assert plan_reads(store, LabelingSettings(blind_share=1.0, readers=("anna@example.org",))) == 0
    with store.ledger.read() as tx:
        assert waiting_reads(tx) == {ANNA: 20}
