"""Engines: how SQLite and PostgreSQL are opened, and which places are refused."""

from pathlib import Path
from typing import Any, Literal

import psutil
import sqlalchemy as sa

from records.errors import ConfigError

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "glusterfs", "fuse.sshfs", "fuse.s3fs"}
)
WRITE_OPTION = "relook_write"


def make_engine(url: str, *, durability: Literal["normal", "full"], busy_timeout_s: float) -> sa.Engine:
    """Make an engine with the settings that the ledger's promises rest on.

    Args:
        url: a SQLAlchemy URL, SQLite or PostgreSQL.
        durability: SQLite's synchronous mode.
        busy_timeout_s: how long a writer waits for another, seconds.
    Returns:
        The engine; nothing is connected yet.
    Raises:
        ConfigError: the URL is malformed, of another database, or a SQLite file on a network disk.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError(
            "records.database is not a database URL; use sqlite:///FILE or postgresql+psycopg://..."
        ) from error
    if parsed.get_backend_name() == "postgresql":
        return sa.create_engine(parsed, pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise ConfigError(
            f"records.database is of kind {parsed.get_backend_name()!r}; use sqlite:///FILE or postgresql+psycopg://..."
        )
    refuse_network_disk(Path(parsed.database))
    engine = sa.create_engine(parsed, connect_args={"timeout": busy_timeout_s, "check_same_thread": False})
    _set_up_sqlite(engine, durability)
    return engine


def refuse_network_disk(path: Path) -> None:
    """Refuse a SQLite file on a network file system, where its locks do not hold.

    Args:
        path: the database file; it need not exist.
    Raises:
        ConfigError: the file would lie on a network file system.
    """
    absolute = path.absolute()
    mounts = [p for p in psutil.disk_partitions(all=True) if absolute.is_relative_to(p.mountpoint)]
    nearest = max(mounts, key=lambda p: len(p.mountpoint), default=None)
    if nearest is not None and nearest.fstype in NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"records.database {str(absolute)!r} is on a network file system ({nearest.fstype}), where SQLite can lose "
            "data; use a local disk, or postgresql+psycopg://..."
        )


def _set_up_sqlite(engine: sa.Engine, durability: str) -> None:
    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # The driver must not open transactions by itself, or a read that turns into a write
        # could fail at once instead of waiting for its turn.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={durability.upper()}")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get(WRITE_OPTION, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
