import json
import time

import pytest

from records.ids import canonical_json, hash_of, new_id, sha256_hex, utc_now


def test_ids_are_unique_hex_and_sort_by_time() -> None:
    first = new_id()
    time.sleep(0.002)
    second = new_id()
    many = [new_id() for _ in range(10_000)]  # several in each millisecond
    assert many == sorted(set(many))
    assert len(first) == 32
    assert int(first, 16) < int(second, 16)


def test_equal_values_give_equal_text() -> None:
    assert (
        canonical_json({"b": 1, "a": [1.5, None]})
        == canonical_json({"a": [1.5, None], "b": 1})
        == ('{"a":[1.5,null],"b":1}')
    )
    assert hash_of({"b": 1, "a": 2}) == sha256_hex(json.dumps({"a": 2, "b": 1}, separators=(",", ":")).encode())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_have_no_hash(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        hash_of({"x": value})


def test_now_is_utc() -> None:
    offset = utc_now().utcoffset()
    assert offset is not None
    assert offset.total_seconds() == 0
