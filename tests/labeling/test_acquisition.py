"""Rules by hand, as properties, and against scikit-activeml where it has them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeling.acquisition.diversity import badge_rows, k_center_rows, typical_rows
from labeling.acquisition.registry import RULES, Pool, acquisition_catalogue, choose, choose_mixed
from labeling.acquisition.scores import (
    at_equal_prevalence,
    bald_scores,
    entropy_scores,
    least_confidence_scores,
    margin_scores,
    miss_cost_scores,
    rare_margin_rows,
    suspicious_rows,
)
from records.arrays import FloatArray
from records.errors import ConfigError, ContractError

NAMES = sorted(RULES)


def a_pool(size: int, seed: int, *, num_groups: int | None = None) -> Pool:
    """A pool that every rule can work on."""
    chance = np.random.default_rng(seed)
    groups = chance.integers(0, num_groups or size, size) if num_groups else np.arange(size)
    return Pool(
        ids=[f"{number:05d}" for number in chance.permutation(size)],
        group_ids=[f"g{number}" for number in groups],
        probabilities=chance.dirichlet(np.ones(3), size),
        features=chance.normal(size=(size, 4)).astype(np.float32),
        samples=chance.dirichlet(np.ones(3), (5, size)),
        known_features=chance.normal(size=(2, 4)).astype(np.float32),
        miss_costs=np.array([5.0, 1.0, 20.0]),
        class_shares=np.array([0.1, 0.7, 0.2]),
        label_counts=np.array([30, 210, 60]),
    )


def _some(array: FloatArray | None) -> FloatArray:
    assert array is not None
    return array


@pytest.mark.parametrize("rule", NAMES)
@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 24), num_groups=st.integers(1, 12), budget=st.integers(0, 15), seed=st.integers(0, 999))
def test_every_rule_takes_one_of_a_group_whatever_the_order(
    rule: str, size: int, num_groups: int, budget: int, seed: int
) -> None:
    pool = a_pool(size, seed, num_groups=num_groups)
    chosen = choose(rule, pool, budget, seed=3)
    groups = [pool.group_ids[row] for row in chosen]
    assert len(set(groups)) == len(groups) == min(budget, len(set(pool.group_ids)))

    order = np.random.default_rng(seed + 1).permutation(size)
    shuffled = replace(
        pool,
        ids=[pool.ids[row] for row in order],
        group_ids=[pool.group_ids[row] for row in order],
        probabilities=_some(pool.probabilities)[order],
        features=None if pool.features is None else pool.features[order],
        samples=_some(pool.samples)[:, order],
    )
    again = choose(rule, shuffled, budget, seed=3)
    assert [shuffled.ids[row] for row in again] == [pool.ids[row] for row in chosen]


@pytest.mark.parametrize("rule", NAMES)
@settings(max_examples=15, deadline=None)
@given(bad=st.sets(st.integers(0, 11), max_size=6), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_is_chosen_first(rule: str, bad: set[int], value: float) -> None:
    pool = a_pool(12, 5)
    rows = sorted(bad)
    _some(pool.probabilities)[rows, 1] = value
    chosen = choose(rule, pool, 8)
    assert set(chosen[: len(bad)]) == bad
    assert len(chosen) == 8


def test_the_rules_are_named_and_say_what_they_need() -> None:
    assert len(acquisition_catalogue()) == 10
    with pytest.raises(ConfigError, match="no acquisition rule 'luck'; there are random"):
        choose("luck", a_pool(3, 0), 1)
    with pytest.raises(ContractError, match="bald needs samples"):
        choose("bald", replace(a_pool(3, 0), samples=None), 1)
    with pytest.raises(ContractError, match="budget"):
        choose("random", a_pool(3, 0), -1)
    with pytest.raises(ContractError, match="2 rows for 3"):
        choose("margin", replace(a_pool(3, 0), probabilities=np.full((2, 3), 1 / 3)), 1)


def test_random_chooses_every_lesion_with_the_same_chance() -> None:
    pool = Pool(ids=[f"{n:02d}" for n in range(12)], group_ids=["many"] * 10 + ["one", "other"])
    first = [pool.group_ids[choose("random", pool, 1, seed=seed)[0]] for seed in range(600)]
    # 200 expected; four standard deviations are 46.
    assert all(154 <= first.count(group) <= 246 for group in ("many", "one", "other"))


def test_a_mix_draws_its_audit_sample_first() -> None:
    pool = a_pool(40, 2, num_groups=25)
    mixed = choose_mixed({"entropy": 6, "k_center": 5, "random": 4}, pool, seed=9)
    assert [row for row, rule in mixed if rule == "random"] == choose("random", pool, 4, seed=9)
    assert [rule for _, rule in mixed] == ["random"] * 4 + ["entropy"] * 6 + ["k_center"] * 5
    groups = [pool.group_ids[row] for row, _ in mixed]
    assert len(set(groups)) == len(groups)


def test_k_center_by_hand() -> None:
    line = np.array([[0.0], [1.0], [4.0], [10.0]])
    assert k_center_rows(line, np.arange(4), 3, known=np.array([[0.0]])) == [3, 2, 1]
    assert k_center_rows(line, np.array([0, 1, 2, 2]), 3, known=np.array([[0.0]])) == [3, 1, 0]
    assert k_center_rows(line[:0], np.arange(0), 3) == []


def test_k_center_in_a_large_pool_equals_the_plain_algorithm() -> None:
    chance = np.random.default_rng(1)
    features = chance.normal(size=(9_000, 5)) * chance.exponential(size=(9_000, 1))
    groups = chance.integers(0, 4_000, 9_000).astype(np.intp)
    nearest, free, expected = np.square(features - features.mean(axis=0)).sum(axis=1), np.ones(9_000, dtype=bool), []
    for _ in range(60):
        expected.append(int(np.argmax(np.where(free, nearest, -1.0))))
        free &= groups != groups[expected[-1]]
        nearest = np.minimum(nearest, np.square(features - features[expected[-1]]).sum(axis=1))
    assert k_center_rows(features, groups, 60) == expected
    # All alike: every row is as far as any other, so the first free one is taken.
    assert k_center_rows(np.ones((9_000, 2)), np.arange(9_000), 3) == [0, 1, 2]


def test_badge_never_makes_its_matrix_but_measures_in_it() -> None:
    chance = np.random.default_rng(0)
    features, probabilities = chance.normal(size=(30, 4)), chance.dirichlet(np.ones(3), 30)
    errors = probabilities - np.eye(3)[probabilities.argmax(axis=1)]
    gradients = (errors[:, :, None] * features[:, None, :]).reshape(30, -1)
    chosen = badge_rows(features, probabilities, np.arange(30), 5, np.random.default_rng(7))
    assert chosen[0] == np.square(gradients).sum(axis=1).argmax()
    # The same draws from the same distances, by the definition.
    draws, expected = np.random.default_rng(7), [chosen[0]]
    for _ in range(4):
        distance = np.square(gradients[:, None] - gradients[expected]).sum(axis=2).min(axis=1)
        total = np.cumsum(np.where(np.isin(np.arange(30), expected), 0.0, distance))
        expected.append(int(np.searchsorted(total, draws.random() * total[-1], side="right")))
    assert chosen == expected


def test_typiclust_takes_one_of_each_clear_cluster() -> None:
    chance = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    features = np.concatenate([centre + chance.normal(size=(20, 2)) for centre in centres])
    chosen = typical_rows(features, np.arange(60), 3, seed=0)
    assert sorted(row // 20 for row in chosen) == [0, 1, 2]
    after = typical_rows(features, np.arange(60), 1, seed=0, known=centres[:2])
    assert after[0] // 20 == 2


def test_miss_cost_puts_a_likely_melanoma_before_a_tie_of_harmless_ones() -> None:
    scores = miss_cost_scores(np.array([[0.1, 0.9], [0.9, 0.1]]), np.array([1.0, 20.0]))
    assert scores.tolist() == pytest.approx([18.1, 2.9])
    with pytest.raises(ContractError, match="miss costs"):
        miss_cost_scores(np.array([[0.5, 0.5]]), np.array([1.0]))


# Rows of three classes, the third rare: at equal prevalence (shares 0.1, 0.7, 0.2) rows 0 to 2 are predicted as class
# 0, rows 3 to 5 as class 1, row 6 as class 2; within a class the first row has the least margin.
EVEN = np.array(
    [
        [0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.0, 0.9, 0.1],
        [0.2, 0.2, 0.6],
    ]
)  # fmt: skip
SHARES = np.array([0.1, 0.7, 0.2])


def natural(even: FloatArray) -> FloatArray:
    return np.asarray(even * SHARES / (even * SHARES).sum(axis=1, keepdims=True))


def test_rare_margin_takes_classes_in_turn_and_the_rarest_first() -> None:
    one_each = [f"{row}" for row in range(7)]
    assert rare_margin_rows(EVEN, np.array([9, 50, 2]), one_each, 7) == [6, 0, 3, 1, 4, 2, 5]
    assert rare_margin_rows(EVEN, np.array([50, 9, 9]), one_each, 4) == [3, 6, 0, 4]
    assert rare_margin_rows(EVEN, np.array([0, 0, 0]), one_each, 2) == [0, 3]
    # Rows 0 and 3 are of one lesion, and so are 1 and 2: the class that comes later takes its next one.
    assert rare_margin_rows(EVEN, np.array([1, 2, 3]), list("abbacde"), 9) == [0, 4, 6, 1, 5]
    assert rare_margin_rows(EVEN[:0], np.array([1, 2, 3]), [], 3) == []


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 60), classes=st.integers(2, 9), budget=st.integers(0, 70), seed=st.integers(0, 999))
def test_rare_margin_gives_equal_quotas(size: int, classes: int, budget: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    probabilities, counts = chance.dirichlet(np.ones(classes), size), chance.integers(0, 50, classes)
    taken = rare_margin_rows(probabilities, counts, [f"{row}" for row in range(size)], budget)
    predicted, margins = probabilities.argmax(axis=1), margin_scores(probabilities).round(12)
    there, quota = np.bincount(predicted, minlength=classes), np.bincount(predicted[taken], minlength=classes)
    assert len(taken) == min(budget, size)
    short = quota[quota < there]  # classes that had more to give
    assert not len(short) or max(quota) - min(short) <= 1
    for c in np.flatnonzero(quota < there):
        # What is left over went to classes with fewer labels, and within a class to the least margins.
        assert all(quota[other] <= quota[c] for other in np.flatnonzero(counts > counts[c]))
        left = [row for row in np.flatnonzero(predicted == c) if row not in taken]
        assert margins[left].max() <= min((margins[row] for row in taken if predicted[row] == c), default=1.0)


def test_rules_read_equal_prevalence_unless_told_otherwise() -> None:
    pool = Pool(list("abcdefg"), list("abcdefg"), natural(EVEN), class_shares=SHARES, label_counts=np.array([9, 50, 2]))
    plain = replace(pool, probabilities=EVEN, class_shares=None)
    np.testing.assert_allclose(at_equal_prevalence(natural(EVEN), SHARES), EVEN, atol=1e-12)
    for rule in ("margin", "entropy", "least_confidence", "rare_margin"):
        assert choose(rule, pool, 7) == choose(rule, plain, 7), rule
    as_calibrated = replace(pool, class_shares=None)
    assert (
        choose("margin", pool, 7, prevalence="natural")
        == choose("margin", as_calibrated, 7)
        != choose("margin", pool, 7)
    )
    assert choose("rare_margin", pool, 7, prevalence="natural") == [6, 0, 3, 1, 4, 2, 5]
    mixed = choose_mixed({"margin": 2}, pool, prevalence="natural")
    assert [row for row, _ in mixed] == choose("margin", pool, 2, prevalence="natural")


def test_samples_and_costs_are_read_at_equal_prevalence_too() -> None:
    chance = np.random.default_rng(4)
    samples = chance.dirichlet(np.ones(3), (5, 12))
    moved = samples / SHARES / (samples / SHARES).sum(axis=2, keepdims=True)
    ids = [f"{row:02}" for row in range(12)]
    costs = np.array([5.0, 1.0, 20.0])
    pool = Pool(ids, ids, samples[0], samples=samples, miss_costs=costs, class_shares=SHARES)
    assert choose("bald", pool, 12) == list(np.argsort(-bald_scores(moved), kind="stable"))
    assert choose("expected_miss_cost", pool, 12) == list(np.argsort(-(moved[0] @ costs), kind="stable"))


def test_a_class_without_a_share_keeps_probability_0_and_no_row_becomes_invalid() -> None:
    shares = np.array([0.5, 0.0, 0.5])
    moved = at_equal_prevalence(np.array([[0.3, 0.4, 0.3], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]), shares)
    assert moved.tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
    tiny = at_equal_prevalence(np.array([[0.5, 0.5]]), np.array([1.0, 5e-324]))
    assert tiny.tolist() == [[0.0, 1.0]]
    with pytest.raises(ContractError, match="class_shares must be 3 numbers"):
        choose("margin", replace(a_pool(3, 0), class_shares=np.array([0.5, 0.5])), 1)
    with pytest.raises(ContractError, match="label_counts must be 3 numbers of at least 0"):
        choose("rare_margin", replace(a_pool(3, 0), label_counts=np.array([1, -1, 0])), 1)
    with pytest.raises(ContractError, match="rare_margin needs label_counts"):
        choose("rare_margin", replace(a_pool(3, 0), label_counts=None), 1)


def test_scores_agree_with_scikit_activeml() -> None:
    from skactiveml.pool import uncertainty_scores

    probabilities = np.random.default_rng(1).dirichlet(np.ones(7), 200)
    for ours, method in (
        (least_confidence_scores, "least_confident"), (margin_scores, "margin_sampling"), (entropy_scores, "entropy"),
    ):  # fmt: skip
        np.testing.assert_allclose(ours(probabilities), uncertainty_scores(probabilities, method=method), atol=1e-12)


def test_bald_agrees_with_scikit_activeml() -> None:
    from skactiveml.pool._bald import batch_bald

    samples = np.random.default_rng(2).dirichlet(np.ones(4), (6, 50))
    theirs = batch_bald(samples, batch_size=1, random_state=0)[0]
    np.testing.assert_allclose(bald_scores(samples), theirs, atol=1e-9)


def test_k_center_agrees_with_scikit_activeml() -> None:
    from skactiveml.pool import k_greedy_center
    from skactiveml.utils import MISSING_LABEL

    chance = np.random.default_rng(3)
    known, pool = chance.normal(size=(4, 6)), chance.normal(size=(60, 6))
    labels = np.array([0.0] * 4 + [MISSING_LABEL] * 60)
    theirs, _ = k_greedy_center(np.concatenate([known, pool]), labels, batch_size=12, random_state=0)
    ours = k_center_rows(pool, np.arange(60), 12, known=known)
    assert ours == [row - 4 for row in theirs]


@pytest.mark.parametrize("seed", range(5))
def test_badge_starts_where_scikit_activeml_does(seed: int) -> None:
    # What it draws next it also keeps away from a gradient of zero, which the paper does not and we do not.
    from skactiveml.base import SkactivemlClassifier
    from skactiveml.pool import Badge

    class Fixed(SkactivemlClassifier):  # type: ignore[misc]
        """Predicts the same probabilities for every input."""

        def fit(self, X: object, y: object) -> "Fixed":  # noqa: N803 - a name of the library
            return self

        def predict_proba(self, X: object) -> FloatArray:  # noqa: N803
            return probabilities

    chance = np.random.default_rng(seed)
    features, probabilities = chance.normal(size=(40, 5)), chance.dirichlet(np.ones(3), 40)
    theirs = Badge(random_state=0).query(features, np.full(40, np.nan), Fixed(classes=[0, 1, 2]), fit_clf=False)
    assert badge_rows(features, probabilities, np.arange(40), 1, chance) == list(theirs)


def test_typiclust_agrees_with_scikit_activeml() -> None:
    from skactiveml.pool import TypiClust

    chance = np.random.default_rng(6)
    centres, sizes = np.array([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0], [90.0, 90.0]]), (45, 37, 31, 26)
    pool = np.concatenate([c + chance.normal(size=(n, 2)) for c, n in zip(centres, sizes, strict=True)])
    known = centres[1:2] + 0.5
    labels = np.array([0.0] + [np.nan] * len(pool))
    theirs = TypiClust(random_state=0, k=20).query(np.concatenate([known, pool]), labels, batch_size=3)
    assert typical_rows(pool, np.arange(len(pool)), 3, seed=0, known=known) == [row - 1 for row in theirs]


def test_half_of_planted_label_noise_is_found_at_a_precision_above_one_half() -> None:
    chance = np.random.default_rng(0)
    truth = chance.choice(7, 1400, p=[0.05, 0.07, 0.12, 0.03, 0.13, 0.57, 0.03])
    # A model that is right in about three quarters of cases, as an honest out-of-fold one may be.
    logits = chance.normal(size=(1400, 7)) + 2.8 * np.eye(7)[truth]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels, wrong = truth.copy(), chance.choice(1400, 70, replace=False)
    labels[wrong] = (truth[wrong] + chance.integers(1, 7, 70)) % 7
    found = suspicious_rows(labels, probabilities)
    hits = np.cumsum(np.isin(found, wrong))
    at_half = int(np.searchsorted(hits, 35)) + 1
    assert hits[-1] >= 35
    assert 35 / at_half >= 0.5


def test_suspicious_rows_of_unfit_input_are_refused_or_empty() -> None:
    assert suspicious_rows(np.array([2, 2]), np.full((2, 3), 1 / 3)) == []
    with pytest.raises(ContractError, match="not finite"):
        suspicious_rows(np.array([0, 1]), np.array([[np.nan, 1.0], [0.5, 0.5]]))
    with pytest.raises(ContractError, match="do not fit"):
        suspicious_rows(np.array([0]), np.full((2, 2), 0.5))
