from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records.errors import ContractError
from records.grouping import (
    SPLIT_SHARES,
    KnownGroup,
    Placement,
    draw_split,
    draw_stratified,
    group_id_of,
    place,
    position,
)
from records.types import Split

IMAGES = [f"image {n:02d}" for n in range(12)]
Link = tuple[str, str]
links = st.lists(st.tuples(st.sampled_from(IMAGES), st.sampled_from(IMAGES)), max_size=14)
quick = settings(max_examples=150, derandomize=True, deadline=None, database=None)


class Book:
    """What a ledger would remember: groups, their splits, merges, and where every image is."""

    def __init__(self, salt: str) -> None:
        self.salt = salt
        self.group_of: dict[str, str] = {}
        self.split: dict[str, Split | None] = {}
        self.merged: dict[str, str] = {}

    def now(self, image: str) -> str:
        group = self.group_of[image]
        while group in self.merged:
            group = self.merged[group]
        return group

    def import_(self, newcomers: Sequence[str], between: Sequence[Link], *, draw: bool) -> Placement:
        known = {p: KnownGroup(self.now(p), self.split[self.now(p)]) for p in self.group_of}
        inside = [link for link in between if all(p in known or p in newcomers for p in link)]
        placement = place(newcomers, inside, known)
        self.group_of |= placement.group_of
        self.split |= dict.fromkeys(placement.new_groups)
        self.merged |= placement.merged
        if draw:
            for group, split in self.split.items():
                if split is None and group not in self.merged:
                    self.split[group] = draw_split(group, self.salt)
        return placement


def test_links_make_groups_by_hand() -> None:
    known = {"k": KnownGroup("g" * 16, Split.TRAIN)}
    placement = place(["a", "b", "c", "d"], [("a", "b"), ("c", "k")], known)
    assert placement.group_of == {
        "a": group_id_of("a"),
        "b": group_id_of("a"),
        "c": "g" * 16,
        "d": group_id_of("d"),
    }
    assert placement.new_groups == tuple(sorted([group_id_of("a"), group_id_of("d")]))
    assert (placement.merged, placement.refused) == ({}, {})


def test_a_group_without_a_split_joins_the_one_with_a_split() -> None:
    known = {"k": KnownGroup("aaaa", None), "l": KnownGroup("zzzz", Split.GATE), "m": KnownGroup("bbbb", None)}
    placement = place(["a"], [("a", "k"), ("a", "l"), ("m", "a")], known)
    assert placement.group_of == {"a": "zzzz"}
    assert placement.merged == {"aaaa": "zzzz", "bbbb": "zzzz"}


def test_an_image_that_would_join_two_splits_is_refused_and_named() -> None:
    known = {"k": KnownGroup("kkkk", Split.TRAIN), "l": KnownGroup("llll", Split.TEST)}
    placement = place(["a", "b", "c"], [("a", "k"), ("b", "a"), ("b", "l")], known)
    assert placement.refused == {"a": ("kkkk", "llll"), "b": ("kkkk", "llll")}
    assert placement.group_of == {"c": group_id_of("c")}
    assert placement.merged == {}


def test_a_link_to_an_unknown_image_is_a_contract_error() -> None:
    with pytest.raises(ContractError, match="neither new nor known"):
        place(["a"], [("a", "nobody")], {})


@quick
@given(first=st.integers(1, 11), early=links, late=links, salt=st.text(min_size=1, max_size=3))
def test_adding_images_never_moves_a_placed_one(first: int, early: list[Link], late: list[Link], salt: str) -> None:
    book = Book(salt)
    book.import_(IMAGES[:first], early, draw=True)
    before = {p: (book.now(p), book.split[book.now(p)]) for p in book.group_of}
    placement = book.import_(IMAGES[first:], late, draw=False)
    for image, (group, split) in before.items():
        assert book.split[book.now(image)] == split
        if not placement.merged:
            assert book.now(image) == group
    assert set(placement.group_of) | set(placement.refused) == set(IMAGES[first:])


@quick
@given(
    cuts=st.lists(st.integers(1, 11), max_size=3), between=links, draws=st.lists(st.booleans(), min_size=4, max_size=4)
)
def test_no_link_is_between_two_splits(cuts: list[int], between: list[Link], draws: list[bool]) -> None:
    book, starts = Book("salt"), [0, *sorted(cuts)]
    refused: set[str] = set()
    for start, end, draw in zip(starts, [*starts[1:], 12], draws, strict=False):
        known_links = [link for link in between if not refused & set(link)]
        refused |= set(book.import_(IMAGES[start:end], known_links, draw=draw).refused)
    book.import_([], [], draw=True)
    for one, other in between:
        if not refused & {one, other}:
            assert book.now(one) == book.now(other)
            assert book.split[book.now(one)] == book.split[book.now(other)] is not None


@quick
@given(between=links, order=st.permutations(IMAGES), data=st.data())
def test_the_order_of_the_input_does_not_matter(between: list[Link], order: list[str], data: st.DataObject) -> None:
    known = {p: KnownGroup(f"group {n % 2}", [Split.TRAIN, None][n % 2]) for n, p in enumerate(IMAGES[:4])}
    newcomers = [p for p in order if p not in known]
    turned = [link[::-1] for link in data.draw(st.permutations(between))]
    assert place(newcomers, turned, known) == place(IMAGES[4:], between, known)


def test_shares_add_up() -> None:
    assert sum(SPLIT_SHARES.values()) == pytest.approx(1)
    assert set(SPLIT_SHARES) == set(Split)


@quick
@given(
    sizes=st.dictionaries(st.sampled_from("abcdefg"), st.integers(1, 90), min_size=1),
    salt=st.text(min_size=1, max_size=5),
)
def test_a_first_import_splits_every_class_within_one_group(sizes: dict[str, int], salt: str) -> None:
    class_of = {f"{code} {n}": code for code, size in sizes.items() for n in range(size)}
    splits = draw_stratified(class_of, salt)
    assert set(splits) == set(class_of)
    assert splits == draw_stratified(dict(reversed(class_of.items())), salt)
    # A handful of groups covers the splits first; `tests/images/test_small_splits.py` has the rule.
    if len(class_of) < 8:
        return
    counts = Counter((class_of[group], split) for group, split in splits.items())
    for code, size in sizes.items():
        for split, share in SPLIT_SHARES.items():
            assert abs(counts[code, split] - share * size) < 1


def test_later_draws_follow_the_shares_and_the_salt() -> None:
    groups = [group_id_of(str(n)) for n in range(20_000)]
    counts = Counter(draw_split(group, "relook") for group in groups)
    for split, share in SPLIT_SHARES.items():
        assert counts[split] / len(groups) == pytest.approx(share, abs=0.015)
    assert sum(draw_split(g, "relook") != draw_split(g, "other") for g in groups[:1000]) > 400
    assert all(0 <= position(g, "relook") <= 1 for g in groups[:1000])
