"""Registry of acquisition rules, and their application to a pool.

In: a `Pool` of arrays. Out: row numbers. With every rule, rows that are not finite come first, at most one row of a
group is taken, and the choice does not depend on the order of the rows. Rules read probabilities at equal prevalence
unless they are told otherwise: these are the ones that balanced accuracy is decided by.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from labeling.acquisition.diversity import Features, badge_rows, k_center_rows, typical_rows
from labeling.acquisition.scores import (
    at_equal_prevalence,
    bald_scores,
    entropy_scores,
    least_confidence_scores,
    margin_scores,
    miss_cost_scores,
    one_per_group,
    rare_margin_rows,
)
from records.arrays import BoolArray, FloatArray, IntArray
from records.errors import ConfigError, ContractError

T = TypeVar("T")

Prevalence = Literal["equal", "natural"]
"""Class shares at which rules read probabilities: all alike, or those that the model was calibrated at."""


@dataclass(frozen=True)
class Pool:
    """Unlabelled images, one per row of every array.

    Args:
        ids: [N] image ids, all different.
        group_ids: [N]; images of one lesion share a group.
        probabilities: [N, C] calibrated, in class order; a row that is not finite is chosen first.
        features: [N, D], float16 to float64; may be memory-mapped.
        samples: [S, N, C] probabilities of S passes with dropout on.
        known_features: [M, D] of labelled images.
        miss_costs: [C] of the taxonomy.
        class_shares: [C] that the probabilities were calibrated at; without them they are read as they are.
        label_counts: [C] labelled images of each class.
    """

    ids: Sequence[str]
    group_ids: Sequence[str]
    probabilities: FloatArray | None = None
    features: Features | None = None
    samples: FloatArray | None = None
    known_features: Features | None = None
    miss_costs: FloatArray | None = None
    class_shares: FloatArray | None = None
    label_counts: IntArray | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Task:
    """Input of a rule: finite rows sorted by id, and the group number of each."""

    pool: Pool
    groups: NDArray[np.intp]
    budget: int
    seed: int


@dataclass(frozen=True)
class AcquisitionRule:
    """A rule that chooses rows of a pool.

    Args:
        name: as in `relook label select --rule`.
        description: one line, for `relook catalog`.
        needs: fields of the pool that must not be None.
        pick: returns rows, best first, one per group.
        always_equal: it reads probabilities at equal prevalence, whatever is asked for.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    pick: Callable[[_Task], list[int]]
    always_equal: bool = False


def choose(rule: str, pool: Pool, budget: int, *, seed: int = 0, prevalence: Prevalence = "equal") -> list[int]:
    """Return the rows that a rule chooses.

    Args:
        rule: name of the rule.
        pool: has the fields that the rule needs.
        budget: most rows to choose.
        seed: used by rules that draw at random.
        prevalence: class shares at which the rule reads probabilities.
    Returns:
        Row numbers, best first, at most one per group. Rows that are not finite come first.
    Raises:
        ConfigError: there is no such rule.
        ContractError: a field is missing or has another number of rows, or the budget is below 0.
    """
    found = rule_named(rule)
    _check(found, pool, budget)
    wrong = _non_finite(found, pool)
    # Sorted by id before the rule sees them, so that ties and random draws do not depend on the order of the pool.
    order = np.argsort(np.asarray(pool.ids, dtype=np.str_), kind="stable")
    groups = [str(group) for group in pool.group_ids]
    first = one_per_group(order[wrong[order]], groups, budget)
    blocked = {groups[row] for row in first}
    rows = np.array([row for row in order if not wrong[row] and groups[row] not in blocked], dtype=np.intp)
    if len(first) == budget or not len(rows):
        return first
    _, numbers = np.unique(np.asarray([groups[row] for row in rows]), return_inverse=True)
    finite = _taken(pool, rows)
    if prevalence == "equal" or found.always_equal:
        finite = _at_equal_prevalence(finite)
    picked = found.pick(_Task(finite, numbers.astype(np.intp), budget - len(first), seed))
    return first + [int(rows[row]) for row in picked]


DEFAULT_MIX: Mapping[str, float] = {"random": 0.1, "rare_margin": 0.6, "expected_miss_cost": 0.3}
"""Shares of the rules where nobody names one: the mix of protocol 2 (docs/protocols/acquisition_2.md)."""


def choose_mixed(
    budgets: Mapping[str, int], pool: Pool, *, seed: int = 0, prevalence: Prevalence = "equal"
) -> list[tuple[int, str]]:
    """Return the rows that several rules choose one after the other.

    Args:
        budgets: most rows by rule name; `random` goes first, the others follow in the given order.
        pool: has the fields that the rules need.
        seed: used by rules that draw at random.
        prevalence: class shares at which the rules read probabilities.
    Returns:
        (row, rule) pairs, at most one per group over all rules.
    Raises:
        ConfigError: there is no such rule.
        ContractError: as in `choose`.
    """
    # The audit sample must be random among all rows; after another rule it would be random among what that rule left.
    names = sorted(budgets, key=lambda name: name != "random")
    chosen: list[tuple[int, str]] = []
    blocked: set[str] = set()
    for name in names:
        rows = np.flatnonzero([group not in blocked for group in pool.group_ids])
        for row in choose(name, _taken(pool, rows), budgets[name], seed=seed, prevalence=prevalence):
            chosen.append((int(rows[row]), name))
            blocked.add(pool.group_ids[int(rows[row])])
    return chosen


def interleaved(chosen: Sequence[tuple[int, str]]) -> list[int]:
    """Return rows so that every first part of them has the rules in the shares of the whole.

    Args:
        chosen: (row, rule) pairs of `choose_mixed`.
    Returns:
        The rows; those of one rule keep their order.

    >>> interleaved([(7, "random"), (1, "margin"), (2, "margin"), (3, "margin")])
    [1, 7, 2, 3]
    """
    totals = Counter(rule for _, rule in chosen)
    taken: Counter[str] = Counter()
    placed: list[tuple[float, int]] = []
    for row, rule in chosen:
        taken[rule] += 1
        placed.append(((taken[rule] - 0.5) / totals[rule], row))
    return [row for _, row in sorted(placed, key=lambda one: one[0])]


def budgets_of(shares: Mapping[str, float], count: int) -> dict[str, int]:
    """Share a budget among rules; what rounding leaves goes to the rule with the largest share.

    >>> budgets_of({"random": 0.1, "margin": 0.9}, 14)
    {'random': 1, 'margin': 13}
    """
    found = {rule: int(share * count + 1e-9) for rule, share in shares.items()}
    found[max(shares, key=shares.__getitem__)] += count - sum(found.values())
    return found


def rule_named(name: str) -> AcquisitionRule:
    """Return a rule by name; the ConfigError for an unknown name lists the rules."""
    try:
        return RULES[name]
    except KeyError:
        raise ConfigError(f"there is no acquisition rule {name!r}; there are {', '.join(RULES)}") from None


def acquisition_catalogue() -> list[dict[str, Any]]:
    """Return the rules as rows for `relook catalog`."""
    return [{"name": r.name, "needs": list(r.needs), "description": r.description} for r in RULES.values()]


def _check(rule: AcquisitionRule, pool: Pool, budget: int) -> None:
    if budget < 0:
        raise ContractError(f"the budget must be at least 0, got {budget}")
    if len(set(pool.ids)) != len(pool.ids) or len(pool.group_ids) != len(pool):
        raise ContractError("a pool needs unique ids, and one group for each id")
    for name in rule.needs:
        if getattr(pool, name) is None:
            raise ContractError(f"rule {rule.name} needs {name}, which this pool does not have")
    sizes = {"probabilities": pool.probabilities, "features": pool.features}
    for name, values in sizes.items():
        if values is not None and len(values) != len(pool):
            raise ContractError(f"{name} has {len(values)} rows for {len(pool)} images")
    classes = None if pool.probabilities is None else pool.probabilities.shape[1]
    for name, values in {"class_shares": pool.class_shares, "label_counts": pool.label_counts}.items():
        if values is not None and classes is not None and (values.shape != (classes,) or not (values >= 0).all()):
            raise ContractError(f"{name} must be {classes} numbers of at least 0, got {values.tolist()}")
    if pool.samples is not None and (pool.samples.ndim != 3 or pool.samples.shape[1] != len(pool)):
        raise ContractError(f"samples must be [S, {len(pool)}, C], got {list(pool.samples.shape)}")


def _non_finite(rule: AcquisitionRule, pool: Pool) -> BoolArray:
    """Return a mask [N] of rows with non-finite probabilities, or non-finite values in a field that the rule needs."""
    wrong = np.zeros(len(pool), dtype=bool)
    if pool.probabilities is not None:
        wrong |= ~np.isfinite(pool.probabilities).all(axis=1)
    if pool.samples is not None and "samples" in rule.needs:
        wrong |= ~np.isfinite(pool.samples).all(axis=(0, 2))
    if pool.features is not None and "features" in rule.needs:
        for at in range(0, len(pool), 65_536):
            part = pool.features[at : at + 65_536]
            wrong[at : at + len(part)] |= ~np.isfinite(part).all(axis=1)
    return wrong


def _taken(pool: Pool, rows: NDArray[np.intp]) -> Pool:
    """Return some rows of a pool, without copying if they are all rows in order: features may be a large file."""
    if len(rows) == len(pool) and bool((rows == np.arange(len(pool))).all()):
        return pool
    return replace(
        pool,
        ids=[pool.ids[row] for row in rows],
        group_ids=[pool.group_ids[row] for row in rows],
        probabilities=None if pool.probabilities is None else pool.probabilities[rows],
        features=None if pool.features is None else pool.features[rows],
        samples=None if pool.samples is None else pool.samples[:, rows],
    )


def _at_equal_prevalence(pool: Pool) -> Pool:
    if pool.class_shares is None:
        return pool
    return replace(
        pool,
        probabilities=None
        if pool.probabilities is None
        else at_equal_prevalence(pool.probabilities, pool.class_shares),
        samples=None if pool.samples is None else at_equal_prevalence(pool.samples, pool.class_shares),
        class_shares=None,
    )


def _by_score(score: Callable[[Pool], FloatArray]) -> Callable[[_Task], list[int]]:
    def pick(task: _Task) -> list[int]:
        # Rounded, so that equal scores stay equal whatever the order of summation was.
        order = np.argsort(-score(task.pool).round(12), kind="stable")
        return one_per_group(order, list(task.pool.group_ids), task.budget)

    return pick


def _random(task: _Task) -> list[int]:
    # Groups are ranked, not images: a lesion with many images is not chosen more often.
    groups = list(task.pool.group_ids)
    order = np.random.default_rng(task.seed).permutation(len(groups))
    ranks = np.random.default_rng(task.seed + 1).permutation(int(task.groups.max()) + 1)
    order = order[np.argsort(ranks[task.groups[order]], kind="stable")]
    return one_per_group(order, groups, task.budget)


def _given(value: T | None) -> T:
    if value is None:
        raise ContractError("a rule reads a field that is not among its `needs`")
    return value


def _k_center(task: _Task) -> list[int]:
    return k_center_rows(_given(task.pool.features), task.groups, task.budget, task.pool.known_features)


def _badge(task: _Task) -> list[int]:
    chance = np.random.default_rng(task.seed)
    probabilities = _given(task.pool.probabilities)
    return badge_rows(_given(task.pool.features), probabilities, task.groups, task.budget, chance)


def _typiclust(task: _Task) -> list[int]:
    known = task.pool.known_features
    return typical_rows(_given(task.pool.features), task.groups, task.budget, task.seed, known)


def _rare_margin(task: _Task) -> list[int]:
    probabilities, counts = _given(task.pool.probabilities), _given(task.pool.label_counts)
    return rare_margin_rows(probabilities, counts, list(task.pool.group_ids), task.budget)


def _miss_cost(pool: Pool) -> FloatArray:
    return miss_cost_scores(_given(pool.probabilities), _given(pool.miss_costs))


_ALL = (
    AcquisitionRule("random", "every lesion with the same chance", (), _random),
    AcquisitionRule(
        "least_confidence", "the best class is least probable", ("probabilities",),
        _by_score(lambda pool: least_confidence_scores(_given(pool.probabilities))),
    ),
    AcquisitionRule(
        "margin", "the two best classes are closest", ("probabilities",),
        _by_score(lambda pool: margin_scores(_given(pool.probabilities))),
    ),
    AcquisitionRule(
        "entropy", "the probabilities are most spread", ("probabilities",),
        _by_score(lambda pool: entropy_scores(_given(pool.probabilities))),
    ),
    AcquisitionRule(
        "bald", "passes with dropout disagree most", ("samples",),
        _by_score(lambda pool: bald_scores(_given(pool.samples))),
    ),
    AcquisitionRule("k_center", "farthest from all labelled and taken images", ("features",), _k_center),
    AcquisitionRule("badge", "large and different gradients", ("features", "probabilities"), _badge),
    AcquisitionRule("typiclust", "typical of its cluster; for a cold start", ("features",), _typiclust),
    AcquisitionRule(
        "expected_miss_cost", "a miss would cost most", ("probabilities", "miss_costs"), _by_score(_miss_cost)
    ),
    AcquisitionRule(
        "rare_margin", "as many of each predicted class, those with few labels first; the least margins of each",
        ("probabilities", "label_counts"), _rare_margin, always_equal=True,
    ),
)  # fmt: skip
RULES: Mapping[str, AcquisitionRule] = {rule.name: rule for rule in _ALL}
