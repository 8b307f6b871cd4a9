import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from records.errors import ConfigError
from records.ids import utc_now
from records.ledger import Ledger, migrate, open_ledger
from records.ledger.migrate import alembic_config, schema_versions, upgrade
from records.ledger.tables import CONSENSUS, METADATA, SCHEMA_FLOOR
from records.types import Consent, Cursor, Image

EVERYTHING: Any = [METADATA, SCHEMA_FLOOR.metadata, CONSENSUS.metadata]


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let new ledgers be migrated here, where other tests copy one."""
    monkeypatch.setattr("records.ledger.ledger.upgrade", upgrade)


def test_migrations_make_exactly_the_tables_of_the_record_types(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), EVERYTHING) == []
        names = set(sa.inspect(connection).get_table_names())
    assert names == {*METADATA.tables, SCHEMA_FLOOR.name, CONSENSUS.name, "alembic_version"}


def test_the_version_of_this_program_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_current_head() == migrate.HEAD


def test_an_index_that_only_one_of_them_has_would_be_found(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        connection.exec_driver_sql("DROP INDEX ux_round_steps_round_id_step")
        (found,) = compare_metadata(MigrationContext.configure(connection), EVERYTHING)
        connection.rollback()
    assert found[0] == "add_index"


def test_opening_again_keeps_rows_and_schema(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    first = open_ledger(url)
    with first.begin() as tx:
        tx.add(Cursor(name="x", position={"a": 1}))
    first.close()
    second = open_ledger(url)
    with second.read() as tx:
        assert tx.require(Cursor, "x").position == {"a": 1}
    assert len(set(schema_versions(second.engine))) == 1
    second.close()


def test_a_newer_schema_that_does_not_say_who_may_use_it_is_refused_and_left_alone(ledger: Ledger) -> None:
    with ledger.engine.connect() as connection:
        connection.exec_driver_sql("DROP TABLE schema_floor")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(ConfigError, match=r"'9999' is newer than this program knows .*install the newer version"):
        upgrade(ledger.engine)
    assert schema_versions(ledger.engine)[0] == "9999"


NEXT = """
import sqlalchemy as sa
from alembic import op

revision = "next"
down_revision = "{head}"


def upgrade():
    op.add_column("cursors", sa.Column("later", sa.Text(), nullable=True))
    op.add_column("images", sa.Column("later", sa.Integer(), nullable=False, server_default="7"))
    op.create_table("later", sa.Column("id", sa.Text(), primary_key=True))
    if {breaks}:
        op.execute("UPDATE schema_floor SET oldest = 'next'")
"""


def upgraded_by_a_newer_program(ledger: Ledger, folder: Path, *, breaks: bool) -> None:
    """Open the ledger as a made-up next release does: it has one migration more, which adds a column and a table."""
    (folder / "next").mkdir()
    head = schema_versions(ledger.engine)[1]
    (folder / "next" / "next.py").write_text(NEXT.format(head=head, breaks=breaks))

    def config_of_the_next_release() -> Config:
        config = alembic_config()
        ours = Path(config.get_main_option("script_location") or "") / "versions"
        config.set_main_option("path_separator", "os")
        config.set_main_option("version_locations", os.pathsep.join(map(str, (ours, folder / "next"))))
        return config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrate, "alembic_config", config_of_the_next_release)
        patch.setattr(migrate, "HEAD", "next")
        newer = open_ledger(ledger.engine.url)
        assert schema_versions(newer.engine) == ("next", "next")
        newer.close()


def test_the_previous_program_goes_on_with_a_schema_that_was_only_added_to(ledger: Ledger, tmp_path: Path) -> None:
    with ledger.begin() as tx:
        tx.add(Cursor(name="before", position={"a": 1}))
    upgraded_by_a_newer_program(ledger, tmp_path, breaks=False)
    again = open_ledger(ledger.engine.url)
    image = Image(
        id="a" * 64, uri="blob:a", format="png", width_px=8, height_px=8, provenance="generated",
        consent=Consent.TRAINING, created_at=utc_now(),
    )  # fmt: skip
    with again.begin() as tx:
        tx.add(Cursor(name="after", position={"a": 2}), image)
        tx.update(Cursor, "before", position={"a": 3})
    with again.read() as tx:
        assert {c.name: c.position for c in tx.find(Cursor)} == {"before": {"a": 3}, "after": {"a": 2}}
        assert tx.require(Image, image.id) == image
    head = schema_versions(ledger.engine)[1]
    assert schema_versions(again.engine) == ("next", head)
    again.close()


def test_the_previous_program_is_refused_where_the_schema_says_so(ledger: Ledger, tmp_path: Path) -> None:
    upgraded_by_a_newer_program(ledger, tmp_path, breaks=True)
    with pytest.raises(ConfigError, match="install the newer version"):
        open_ledger(ledger.engine.url)


def test_a_migration_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade_to_head = command.upgrade

    def fail_at_the_end(*arguments: Any) -> None:
        upgrade_to_head(*arguments)
        raise RuntimeError("power cut")

    monkeypatch.setattr(command, "upgrade", fail_at_the_end)
    with pytest.raises(RuntimeError, match="power cut"):
        open_ledger(f"sqlite:///{tmp_path}/ledger.db")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()


@pytest.mark.parametrize("change", ["UPDATE alembic_version SET version_num = '0007'", "DROP TABLE review_items"])
def test_tables_that_are_not_those_of_the_version_are_said_and_left_alone(ledger: Ledger, change: str) -> None:
    before = "UPDATE alembic_version SET version_num = '0007'"
    with ledger.engine.begin() as connection:
        for statement in dict.fromkeys((before, change)):
            connection.exec_driver_sql(statement)
        tables = sorted(sa.inspect(connection).get_table_names())
    with pytest.raises(ConfigError, match=r"says that its schema is '0007', and its tables are others \(.*\); nothing"):
        upgrade(ledger.engine)
    assert schema_versions(ledger.engine)[0] == "0007"
    with ledger.engine.connect() as connection:
        assert sorted(sa.inspect(connection).get_table_names()) == tables


def test_processes_that_start_together_run_the_migration_once(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    code = "import sys; from records.ledger import open_ledger; open_ledger(sys.argv[1]).close()"
    started = [run_python(code, f"sqlite:///{tmp_path}/ledger.db") for _ in range(2)]
    for process in started:
        _, complaint = process.communicate(timeout=600)
        assert process.returncode == 0, complaint


def test_a_per_cent_sign_in_the_path_of_the_program_is_no_placeholder() -> None:
    assert Path(alembic_config().get_main_option("script_location") or "").is_dir()
