"""Engines: how SQLite and PostgreSQL connections are set up, and which locations are refused.

Write transactions are serialized on both: SQLite locks the file, PostgreSQL takes one advisory lock. So whatever a
transaction reads before it writes (the last audit event, the holder of a lease, the serving model) is still true when
it commits. On PostgreSQL, a transaction that names what it touches takes the shared form of that lock and one lock per
name, so it waits only for transactions that touch the same names.
"""

import json
import zlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import sqlalchemy as sa

from records.errors import ConfigError

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "webdav", "9p", "afs", "afpfs", "beegfs", "ceph", "glusterfs", "gpfs"}
    | {f"fuse.{kind}" for kind in ("sshfs", "s3fs", "gcsfuse", "rclone", "glusterfs", "ceph", "ceph-fuse")}
)  # fmt: skip
WRITE_OPTION = "relook_write"
TOUCHES_OPTION = "relook_touches"
READ_OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
"""Execution options that make a read transaction one consistent view, by kind of database."""
LOG_PAGES = 8000
"""Pages of 4 kB in SQLite's log before a commit empties it. A service empties it earlier, see `checkpoint`."""
_WRITER_LOCK = 7355608  # arbitrary; other users of the same database must not take it
_STRIPES = 4096  # names are hashed onto so many locks, since the server's lock table holds some thousands


def make_engine(url: str | sa.URL, *, durability: Literal["normal", "full"], busy_timeout_s: float) -> sa.Engine:
    """Return an engine that serializes writers; nothing is connected yet.

    Args:
        url: a SQLAlchemy URL, SQLite or PostgreSQL.
        durability: SQLite's synchronous mode.
        busy_timeout_s: how long a writer waits for another writer, seconds.
    Returns:
        The engine.
    Raises:
        ConfigError: the URL is malformed, of another database or without its driver, or names a SQLite
            file that is not an absolute path or lies on a network disk.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError as error:
        raise ConfigError(
            "records.database is not a database URL; use sqlite:////FOLDER/FILE or postgresql+psycopg://..."
        ) from error
    kind = parsed.get_backend_name()
    # NaN is not JSON. SQLite would store it and PostgreSQL refuse it; refused here, both behave the same.
    options: dict[str, Any] = {
        "pool_timeout": busy_timeout_s,
        "json_serializer": partial(json.dumps, allow_nan=False),
    }
    if kind == "postgresql":
        try:
            engine = sa.create_engine(parsed, pool_pre_ping=True, **options)
        except (ImportError, sa.exc.ArgumentError) as error:
            raise ConfigError(
                f"records.database needs a driver that is not here ({error}); "
                "pip install 'psycopg[binary]' and use postgresql+psycopg://..."
            ) from error
        _set_up_postgresql(engine, busy_timeout_s)
        return engine
    if kind != "sqlite":
        raise ConfigError(
            f"records.database is of kind {kind!r}; use sqlite:////FOLDER/FILE or postgresql+psycopg://..."
        )
    # Each connection to `:memory:` opens a separate database, and Ray changes the folder of relative paths.
    if not parsed.database or not Path(parsed.database).is_absolute():
        raise ConfigError(
            f"records.database has to name an absolute file, sqlite:////FOLDER/FILE, not {parsed.database!r}"
        )
    refuse_network_disk(Path(parsed.database))
    engine = sa.create_engine(parsed, connect_args={"timeout": busy_timeout_s, "check_same_thread": False}, **options)
    _set_up_sqlite(engine, durability)
    return engine


def checkpoint(engine: sa.Engine) -> None:
    """Copy SQLite's log into its file, beside readers and writers, so that no commit has to; PostgreSQL does it itself.

    Without it the commit that makes the log longer than `LOG_PAGES` waits until the disk has all of them, which takes
    the longer the more others write to the same disk.
    """
    if engine.dialect.name != "sqlite":
        return
    connection = engine.raw_connection()
    try:
        # On the driver's own cursor: a transaction of SQLAlchemy's would keep the log from being copied.
        connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    finally:
        connection.close()


def refuse_network_disk(path: Path) -> None:
    """Raise ConfigError if a SQLite file lies on a network file system, where its locks do not hold."""
    absolute = path.resolve()
    mounts = [p for p in psutil.disk_partitions(all=True) if absolute.is_relative_to(p.mountpoint)]
    # The longest mount point holds the file; of equal ones the last was mounted over the others.
    nearest = max(reversed(mounts), key=lambda p: len(p.mountpoint), default=None)
    if nearest is not None and nearest.fstype in NETWORK_FILE_SYSTEMS:
        raise ConfigError(
            f"records.database {str(absolute)!r} is on a network file system ({nearest.fstype}), where SQLite can lose "
            "data; use a local disk, or postgresql+psycopg://..."
        )


def _set_up_sqlite(engine: sa.Engine, durability: str) -> None:
    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        # sqlite3 would open transactions itself, as deferred ones: such a transaction that first reads and then
        # writes fails at once if another process wrote in between, whatever the timeout is.
        connection.isolation_level = None
        cursor = connection.cursor()
        # With a write-ahead log readers keep their view while a writer commits.
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={durability.upper()}")
        # The commit that makes the log longer than this copies it into the file and waits for the disk.
        cursor.execute(f"PRAGMA wal_autocheckpoint={LOG_PAGES}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        # IMMEDIATE takes the write lock before the first read, so nothing that was read can change before commit.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")


def _set_up_postgresql(engine: sa.Engine, busy_timeout_s: float) -> None:
    @sa.event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SET lock_timeout = {int(busy_timeout_s * 1000)}")
        cursor.close()
        connection.commit()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        if not _writes(connection):
            return
        # The server ends a transaction whose process stands still or cannot be reached, since all writers wait for it.
        # Such a process may have two in the queue, and both have to end before other writers give up.
        ends = f"SET LOCAL idle_in_transaction_session_timeout = {int(busy_timeout_s * 1000 / 3)}"
        touches = connection.get_execution_options().get(TOUCHES_OPTION)
        if touches is None:
            connection.exec_driver_sql(f"{ends}; SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
            return
        # Shared with other named transactions, exclusive against one that touches everything.
        connection.exec_driver_sql(f"{ends}; SELECT pg_advisory_xact_lock_shared({_WRITER_LOCK})")
        query = f"SELECT pg_advisory_xact_lock({_WRITER_LOCK}, stripe) FROM unnest(%s::int[]) AS stripe"
        connection.exec_driver_sql(query, (stripes(touches),))


def stripes(names: Iterable[str]) -> list[int]:
    """Return the numbers of the locks that stand for names, each once and sorted: one order cannot deadlock."""
    return sorted({zlib.crc32(name.encode()) % _STRIPES for name in names})


def _writes(connection: sa.Connection) -> bool:
    return bool(connection.get_execution_options().get(WRITE_OPTION, False))
