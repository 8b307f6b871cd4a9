"""Policies as documents: what parses, what is refused and in which words, what the hash covers."""

from pathlib import Path
from typing import Any

import pytest

from records.errors import ConfigError
from trainers.augmentation import OPERATIONS, POLICIES, Operation, Policy, load_policy
from trainers.augmentation.mixing import Mixing
from trainers.augmentation.policy import parse_policy


def one_operation(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "operations": [{"operation": "rotate", **changes}]}


def mixed(**changes: Any) -> dict[str, Any]:
    return {"name": "mine", "mixing": {"kind": "mixup", **changes}}


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (one_operation(operation="spin"), "there is no operation 'spin'; there are horizontal_flip, "),
        (one_operation(probability=1.5), "operations.0.probability is 1.5: .*; a valid value is 0.5"),
        (one_operation(probability=0), "operations.0.probability is 0: "),
        (one_operation(parameters={"limit_deg": 999}), r"limit_deg cannot be 999: .* 180; a valid value is 45.0"),
        (one_operation(parameters={"limit": 9}), "rotate has no parameter 'limit'; it takes limit_deg"),
        (one_operation(operation="d4", parameters={"p": 1}), "d4 has no parameter 'p'; it takes none"),
        (
            one_operation(operation="crop", parameters={"area": [0.9, 0.2]}),
            r"crop.area cannot be \[0.9, 0.2\]: .* runs backwards; .*; a valid value is \[0.7, 1.0\]",
        ),
        (
            one_operation(operation="cutout", parameters={"side": [0.1, 3]}),
            r"cutout.side cannot be .* from 0.01 to 0.9; a valid value is \[0.1, 0.3\]",
        ),
        (
            one_operation(chance=0.5),
            "operations.0.chance is 0.5: there is no such field; there are operation, probability, parameters",
        ),
        (
            one_operation(operation="jpeg", parameters={"quality": [0, 90]}),
            r"jpeg.quality cannot be \[0, 90\]: both ends should be from 5 to 100; a valid value is \[40, 90\]",
        ),
        (
            one_operation(operation="hair", parameters={"count": [1.5, 3]}),
            r"hair.count cannot be 1.5: .* integer.*; a valid value is \[3, 12\]",
        ),
        (
            one_operation(operation="rotate", parameters={"limit_deg": float("nan")}),
            "rotate.limit_deg cannot be nan: .*; a valid value is 45.0",
        ),
        (mixed(kind="blend"), "mixing.kind is 'blend': Input should be 'mixup' or 'cutmix'"),
        (mixed(alpha=0), "mixing.alpha is 0: .* greater than 0; a valid value is 0.2"),
        (mixed(probability=2), "mixing.probability is 2: .*; a valid value is 0.5"),
        (mixed(beta=1), "mixing.beta is 1: there is no such field; there are kind, alpha, probability"),
        ({"name": "mine", "steps": []}, r"steps is \[\]: there is no such field; there are name, operations, mixing"),
        (
            {"name": "mine", "phases": [{"epoch": 3}]},
            "phases.0.from_epoch: Field required",
        ),
        (
            {"name": "mine", "phases": [{"from_epoch": 3, "operations": [{"operation": "d4", "chance": 1}]}]},
            "phases.0.operations.0.chance is 1: there is no such field; there are operation, probability, parameters",
        ),
        ({"operations": []}, "name: Field required"),
        (["rotate"], "the document is "),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(document: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^augmentation policy mine.yaml: .*{sentence}") as caught:
        parse_policy(document, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_yaml_file_is_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\noperations:\n  - {operation: rotate, probability: 0.3, parameters: {limit_deg: 20}}\n")
    policy = load_policy(str(path))
    assert policy.operations == (Operation(operation="rotate", probability=0.3, parameters={"limit_deg": 20}),)
    path.write_text("name: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_policy(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(str(tmp_path / "none.yml"))


def test_an_unknown_name_lists_the_built_in_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"there are none, flips, light, lesion, dissertation, .*; or give the path of a YAML file"
    ):
        load_policy("strong")


def test_the_hash_covers_what_is_done_and_not_the_name() -> None:
    plain = Policy(name="a", operations=(Operation(operation="rotate"),))
    written_out = Policy(
        name="b", operations=(Operation(operation="rotate", probability=0.5, parameters={"limit_deg": 45.0}),)
    )
    assert plain.content_hash() == written_out.content_hash()
    assert plain.content_hash() != Policy(name="a", operations=(Operation(operation="d4"),)).content_hash()
    assert plain.content_hash() != plain.model_copy(update={"mixing": Mixing(kind="mixup")}).content_hash()
    hashes = {recipe.policy.content_hash() for recipe in POLICIES.records}
    assert len(hashes) == len(POLICIES) == 8


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_its_own_document(name: str) -> None:
    policy = load_policy(name)
    assert parse_policy(policy.model_dump(mode="json"), name) == policy


def test_the_dissertations_policy_does_what_it_says() -> None:
    operations = {step.operation: step.parameters for step in load_policy("dissertation").operations}
    named = {"horizontal_flip", "vertical_flip", "rotate", "gaussian_blur", "gaussian_noise", "crop", "cutout"}
    assert set(operations) == named | {"color_jitter"}
    assert set(operations) <= set(OPERATIONS)
    assert operations["color_jitter"] == {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.15}


def test_phases_are_shortened_as_the_training_is() -> None:
    policy = load_policy("ops:d4@1/5:d4@0.5/6:d4@0.4/11:d4@0.2")

    shortened = policy.shortened(0.5)

    assert [(phase.from_epoch, phase.operations[0].probability) for phase in shortened.phases] == [(3, 0.4), (6, 0.2)]
    assert policy.shortened(1.0) == policy
