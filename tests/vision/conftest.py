"""Fixtures of the vision tests; what they share with others is in `tests/models.py`."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread(one_thread: None) -> None:
    """Let networks of this room's tests compute on one thread."""
