"""Replays against curves worked out by hand."""

import pytest

from bench.tune.replay import Outcome, compare_with_random, halving
from bench.tune.table import Row, best_score, read_table
from records.errors import DataError, IntegrityError

LINE = '{"overrides": {}, "scores": [0.1, 0.2], "seconds": [1.0, 1.0]}\n'


def row(*scores: float) -> Row:
    return Row({}, scores, tuple(1.0 for _ in scores))


def test_halving_by_hand():
    """Factor 2, rungs after epochs 1 and 2.

    The given settings get all 4 epochs. 0.5 is above their 0.3 and above 0.35 at rung 2: 4 epochs. 0.3 is below the
    median 0.4 of (0.3, 0.5): 1 epoch, though it would have reached 0.9. 0.6 goes on to 0.45 at rung 2, below the
    median 0.475 of (0.35, 0.6): 2 epochs.
    """
    rows = [row(0.3, 0.35, 0.4, 0.4), row(0.5, 0.6, 0.7, 0.8), row(0.3, 0.7, 0.9, 0.9), row(0.6, 0.45, 0.5, 0.5)]

    assert halving(rows, 1, 2) == Outcome(score=0.8, epochs=4 + 4 + 1 + 2)
    assert best_score(rows) == 0.9


def test_what_is_saved_and_what_is_lost():
    """Every search meets the given settings and the one good row, which halving never cuts off."""
    table = [row(0.1, 0.1, 0.1), *[row(0.2, 0.9, 0.9) for _ in range(4)], row(0.1, 0.2, 0.3)]
    found = compare_with_random(table, seeds=3, grace_epochs=1, factor=2)

    assert (found["configurations_met"], found["seeds"], found["epochs"]) == (4, 3, 3)
    assert found["score_lost_by_seed"] == [0.0, 0.0, 0.0]
    assert found["seeds_within_a_point"] == 3
    assert all(0 < share <= 1 for share in found["compute_over_random_by_seed"])


def test_a_table_of_two_says_nothing():
    with pytest.raises(DataError, match="a table of 2 configurations is too small"):
        compare_with_random([row(0.1), row(0.2)], seeds=1, grace_epochs=1, factor=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LINE + "{", "line 2 of the table .* is damaged"),
        (LINE + LINE.replace("0.2]", "0.2, 0.3]"), "has 3 epochs, not 2"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, message):
    path = tmp_path / "table.jsonl"
    path.write_text(text)

    with pytest.raises(IntegrityError, match=message):
        read_table(path)
