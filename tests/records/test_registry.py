"""Registries: what a record is, what a tunable is, and that every tunable is a setting that accepts its bounds."""

import json

import pytest

from records.errors import ConfigError
from records.registry import Choice, Range, Registered, Registry
from trainers.cli.catalog import REGISTRIES, catalogue
from trainers.settings import TrainersSettings

COUNTS = {
    "models": 14,
    "optimizers": 4,
    "schedulers": 4,
    "augmentations": 8,
    "operations": 15,
    "losses": 5,
    "samplers": 3,
    "strategies": 5,
    "explanations": 4,
}
PART_OF = {"models": "model", "optimizers": "optimizer", "schedulers": "scheduler", "losses": "loss"}
RECORDS = [(kind, record) for kind, registry in REGISTRIES.items() for record in registry.records]


def test_how_many_there_are() -> None:
    assert {kind: len(registry) for kind, registry in REGISTRIES.items()} == COUNTS


@pytest.mark.parametrize(("kind", "record"), RECORDS, ids=[f"{kind}-{record.name}" for kind, record in RECORDS])
def test_every_record_describes_itself_and_tunes_real_settings(kind: str, record: Registered) -> None:
    assert record.description
    assert not record.description.endswith(".")
    for name, tunable in record.tunable.items():
        setting = f"{PART_OF[kind]}.{name}"
        assert setting in TrainersSettings().flat()
        for value in tunable.values if isinstance(tunable, Choice) else (tunable.low, tunable.high):
            TrainersSettings().with_values({setting: value})
    with pytest.raises(AttributeError):
        record.name = "other"  # type: ignore[misc]


def test_the_catalogue_is_json_with_the_keys_that_people_rely_on() -> None:
    whole = json.loads(json.dumps(catalogue(), allow_nan=False))
    assert {kind: len(rows) for kind, rows in whole.items()} == COUNTS | {"models": COUNTS["models"] + 1}
    model = next(row for row in whole["models"] if row["name"] == "resnet18")
    assert (model["parameters"], model["input_side"], model["gradcam"]) == (11_172_423, 64, "closed_form")
    sgd = next(row for row in whole["optimizers"] if row["name"] == "sgd")
    assert sgd["tunable"]["learning_rate"] == {"low": 3e-3, "high": 0.3, "log": True, "integer": False}
    assert all(row["description"] for rows in whole.values() for row in rows)


def test_ranges_and_choices_know_their_values() -> None:
    assert 0.5 in Range(0.0, 1.0)
    assert 1.5 not in Range(0.0, 1.0)
    assert "a" not in Range(0.0, 1.0)
    assert 2 in Range(1, 3, integer=True)
    assert 2.5 not in Range(1, 3, integer=True)
    assert True not in Range(0, 3, integer=True)
    assert True in Choice((False, True))
    assert Choice((1, 2)).as_dict() == {"values": [1, 2]}


def test_a_registry_reads_like_a_mapping() -> None:
    registry = Registry(
        "dish", (Registered(name="soup", description="hot"), Registered(name="cake", description="sweet"))
    )
    assert list(registry) == ["soup", "cake"]
    assert "soup" in registry
    assert len(registry) == 2
    assert registry["cake"].description == "sweet"
    with pytest.raises(ConfigError, match=r"unknown dish 'pie'; there are soup, cake"):
        registry["pie"]
