import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import Result
from typer.testing import CliRunner

from records import audit
from records.cli import app
from records.errors import IntegrityError, TaxonomyError, UnknownIdError
from records.ledger.tables import TABLES
from records.store import Store
from records.types import AuditEvent


def _run(store: Store, *arguments: str) -> Result:
    def loader(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(records=store.settings)

    return CliRunner().invoke(app, arguments, obj=loader)


@pytest.fixture
def chain(store: Store) -> Store:
    """A store with two audit events."""
    for subject in ("a", "b"):
        with store.ledger.begin() as tx:
            audit.append(tx, actor="me", action="test.read", subject=subject)
    return store


def test_a_taxonomy_is_shown_in_order(store: Store) -> None:
    result = _run(store, "taxonomy", "check", "ham10000", "--json")
    shown = json.loads(result.stdout)
    assert [c["code"] for c in shown["classes"]] == list(store.taxonomy.codes)
    assert shown["hash"] == store.taxonomy.hash
    assert "Melanoma" in _run(store, "taxonomy", "check", "ham10000").stdout


def test_a_malformed_taxonomy_names_the_field(store: Store, tmp_path: Path) -> None:
    (tmp_path / "birds.yaml").write_text("name: birds\nversion: 1\nclasses: []\n")
    result = _run(store, "taxonomy", "check", str(tmp_path / "birds.yaml"))
    assert isinstance(result.exception, TaxonomyError)
    assert "classes: " in str(result.exception)


def test_an_intact_chain_is_reported_as_intact(chain: Store) -> None:
    assert json.loads(_run(chain, "audit", "verify", "--json").stdout) == {
        "whole": True,
        "faults": [],
        "unkeyed_up_to": 0,
        "anchored_up_to": None,
    }
    assert _run(chain, "audit", "verify").stdout == "the audit chain is whole\n"


def test_a_broken_chain_fails_and_names_the_event(chain: Store) -> None:
    with chain.ledger.begin() as tx:
        tx.connection.execute(sa.delete(TABLES[AuditEvent]).where(TABLES[AuditEvent].c.number == 2))
    result = _run(chain, "audit", "verify")
    assert isinstance(result.exception, IntegrityError)
    assert "the audit chain is broken: the chain was cut off: event 2" in str(result.exception)


def test_a_trace_is_shown_or_refused(store: Store, sample: Any) -> None:
    from records.types import Image

    image = sample(Image, erased_at=None, expired_at=None)
    with store.ledger.begin() as tx:
        tx.add(image)
    shown = json.loads(_run(store, "trace", image.id[:8], "--json").stdout)
    assert (shown["kind"], shown["subject"], [s["kind"] for s in shown["steps"]]) == ("image", image.id, ["image"])
    assert "image" in _run(store, "trace", image.id).stdout
    assert isinstance(_run(store, "trace", "ffffffff").exception, UnknownIdError)
