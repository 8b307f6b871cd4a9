"""A policy in one line: what it becomes, and what is refused."""

import pytest

from records.errors import ConfigError
from trainers.augmentation import OPERATIONS, load_policy
from trainers.augmentation.registry import Step, format_phases, format_steps, parse_phases, parse_steps, policy_of_line


def test_a_line_becomes_the_policy_it_says():
    policy = load_policy("ops:rotate@0.4*0.5+d4@1")

    assert [(step.operation, step.probability) for step in policy.operations] == [("rotate", 0.4), ("d4", 1.0)]
    assert policy.operations[0].parameters == {"limit_deg": 92.5}


def test_lines_and_steps_are_inverse():
    steps = [Step("crop", 0.25, 0.1), Step("vertical_flip", 0.5)]

    assert parse_steps(format_steps(steps)) == steps
    assert format_steps([]) == "none"


@pytest.mark.parametrize("name", OPERATIONS.names)
def test_every_operation_can_be_named_at_both_ends_of_its_strength(name):
    strengths = [None] if OPERATIONS[name].at_strength is None else [0.0, 1.0]

    for strength in strengths:
        assert policy_of_line(format_steps([Step(name, 0.5, strength)])).operations[0].operation == name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ops:rotate", "'rotate' is not operation@probability"),
        ("ops:magic@0.5", "unknown augmentation operation 'magic'"),
        ("ops:rotate@0.5", "rotate needs a strength from 0 to 1"),
        ("ops:d4@0.5*0.5", "d4 takes no strength"),
        ("ops:rotate@0.5*2", "a strength of 2 is not from 0 to 1"),
        ("ops:rotate@7*0.5", "probability"),
        ("ops:rotate@0.5.5*0.5", "is not a number"),
        ("ops:d4@1/rotate@0.5*0.5", "'rotate@0.5.0.5' does not begin with its epoch"),
        ("ops:d4@1/5:", "'' is not operation@probability"),
        ("ops:d4@1/1:d4@0.5", "phases.0.from_epoch is 1"),
        ("ops:d4@1/5:d4@0.5/5:d4@0.2", r"phases begin with the epochs \[5, 5\]"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(line, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(line)


def test_a_line_with_phases_is_a_policy_that_changes_with_the_epochs():
    line = "ops:rotate@0.4*0.5+d4@1/3:rotate@0.4*1/5:d4@0.5"
    policy = load_policy(line)

    assert [policy.operations_at(epoch)[0].parameters.get("limit_deg") for epoch in (1, 2, 3, 4, 5, 9)] == [
        *(92.5, 92.5),
        *(180.0, 180.0),
        *(None, None),
    ]
    assert format_phases(parse_phases(line)) == line
    assert parse_steps(line) == [Step("rotate", 0.4, 0.5), Step("d4", 1.0)]
    assert policy.content_hash() != load_policy("ops:rotate@0.4*0.5+d4@1").content_hash()
    assert policy.content_hash() != load_policy(line.replace("/3:", "/4:")).content_hash()
