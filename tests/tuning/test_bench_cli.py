"""`python -m bench tune`: the table of learning curves is trained once, extended and searched on. It needs no Ray."""

from bench.tune.cli import _replayed
from bench.tune.table import read_table
from cluster.settings import Settings


def test_a_table_is_trained_once_extended_and_searched_on(labelled, trainers, tmp_path):
    store, dataset = labelled
    settings = Settings(trainers=trainers.model_copy(update={"epochs": 2}))
    path = tmp_path / "table.jsonl"

    _replayed(store, settings, dataset, path, configurations=3, images=40, seeds=1)
    first = read_table(path)
    figures = _replayed(store, settings, dataset, path, configurations=4, images=40, seeds=2)

    assert read_table(path)[:3] == first
    assert [len(row.scores) for row in read_table(path)] == [2, 2, 2, 2]
    assert first[0].overrides == {}, "the given settings come first"
    assert 0 < figures["compute_over_random"] <= 1
    assert (figures["configurations"], figures["seeds"]) == (4, 2)
