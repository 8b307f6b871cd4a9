import os
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from records.settings import RecordsSettings, RoomSettings, environment, first_problem


def test_every_field_says_what_it_means() -> None:
    assert [name for name, info in RecordsSettings.model_fields.items() if not info.description] == []


def test_the_database_url_is_not_shown() -> None:
    assert "secret" not in repr(RecordsSettings(database="postgresql+psycopg://u:secret@host/db"))


@pytest.mark.parametrize(
    ("field", "value"), [("durability", "none"), ("busy_timeout_s", 0), ("split_salt", ""), ("unknown", 1)]
)
def test_wrong_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        RecordsSettings.model_validate({field: value})


def test_the_first_problem_names_the_field_and_the_reason() -> None:
    for values, expected in (
        ({"busy_timeout_s": 0}, ("busy_timeout_s", "Input should be greater than 0")),
        (
            {"keep_images_days": 9, "keep_predictions_days": 2},
            (
                "",
                "keep_predictions_days is 2 and keep_images_days 9; a prediction has to be kept at least as long as "
                "its image",
            ),
        ),
    ):
        with pytest.raises(ValidationError) as caught:
            RecordsSettings.model_validate(values)
        assert first_problem(caught.value) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 1}, ("size", "Input should be 'auto' or greater than or equal to 2")),
        (
            {"size": "large"},
            ("size", "Input should be 'auto' or a valid integer, unable to parse string as an integer"),
        ),
        ({"size": 2, "inner": {"shares": [0.5, -1]}}, ("inner.shares.1", "Input should be greater than or equal to 0")),
        (
            {"size": "auto", "inner": {"limit": []}},
            ("inner.limit", "Input should be a valid integer or a valid string"),
        ),
    ],
)
def test_the_member_of_a_union_is_no_part_of_the_field(values: dict[str, object], expected: tuple[str, str]) -> None:
    class Inner(RoomSettings):
        shares: tuple[Annotated[float, Field(ge=0)], ...] = ()
        limit: int | str | None = None

    class Outer(RoomSettings):
        size: Literal["auto"] | Annotated[int, Field(ge=2)]
        inner: Inner = Inner()

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(values)
    assert first_problem(caught.value) == expected


def test_environment_variables_hold_for_a_block_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOOK_A", "before")
    monkeypatch.delenv("RELOOK_B", raising=False)

    def fail_in_the_block() -> None:
        with environment({"RELOOK_A": "1", "RELOOK_B": "2"}):
            assert (os.environ["RELOOK_A"], os.environ["RELOOK_B"]) == ("1", "2")
            raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"):
        fail_in_the_block()
    assert os.environ["RELOOK_A"] == "before"
    assert "RELOOK_B" not in os.environ
