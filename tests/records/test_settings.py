import pytest
from pydantic import ValidationError

from records.settings import RecordsSettings


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
