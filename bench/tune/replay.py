"""Searches replayed on a table of whole learning curves: epochs saved by halving, and score lost.

In: rows of a table. Out: the best score that a search saw, and the epochs that it paid for. The judge is the one of a
real search.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.tune.table import Row, best_score
from records.errors import DataError
from tuning.judge import Halving, Judge

SHARE = 2 / 3
"""Of the table's configurations that the searches of one seed meet."""
POINT = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a replayed search ended with.

    Args:
        score: the best one that it saw.
        epochs: that it paid for.
    """

    score: float
    epochs: int


def halving(rows: Sequence[Row], grace_epochs: int, factor: int) -> Outcome:
    """Replay a search with successive halving, one trial after the other.

    Args:
        rows: in the order of the trials; the first one is the given settings and is never cut off.
        grace_epochs: the first rung.
        factor: at each rung the best 1/factor go on.
    Returns:
        Its outcome.
    """
    budget = len(rows[0].scores)
    judge = Judge(Halving(grace_epochs, factor, budget), budget, lambda number: number == 0)
    best, epochs = 0.0, 0
    for number, row in enumerate(rows):
        for epoch, score in enumerate(row.scores, start=1):
            best, epochs = max(best, score), epochs + 1
            if not judge.decide(number, epoch, score).goes_on:
                break
    return Outcome(best, epochs)


def compare_with_random(table: Sequence[Row], seeds: int, grace_epochs: int, factor: int) -> dict[str, object]:
    """Let random search with whole budgets and halving meet the same configurations, for some seeds.

    Args:
        table: at least 3 rows; the first one is the given settings.
        seeds: how many draws of configurations and of their order.
        grace_epochs: the first rung.
        factor: at each rung the best 1/factor go on.
    Returns:
        `compute_over_random` (mean share of random's epochs), and per seed the share and the score lost.
    Raises:
        DataError: there are fewer rows.
    """
    if len(table) < 3:
        raise DataError(f"a table of {len(table)} configurations is too small to replay a search on; train at least 3")
    shares, lost = [], []
    for seed in range(seeds):
        others = np.random.default_rng(seed).permutation(len(table) - 1)[: round(SHARE * len(table)) - 1] + 1
        met = [table[0], *(table[row] for row in others)]
        ours = halving(met, grace_epochs, factor)
        shares.append(ours.epochs / (len(met) * len(met[0].scores)))
        lost.append(best_score(met) - ours.score)
    return {
        "compute_over_random": round(float(np.mean(shares)), 3),
        "compute_over_random_by_seed": [round(share, 3) for share in shares],
        "score_lost_by_seed": [round(points, 4) for points in lost],
        "seeds_within_a_point": sum(points <= POINT for points in lost),
        "seeds": seeds,
        "configurations": len(table),
        "configurations_met": round(SHARE * len(table)),
        "epochs": len(table[0].scores),
    }
