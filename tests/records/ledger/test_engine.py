from pathlib import Path
from typing import Literal

import psutil
import pytest

from records.errors import ConfigError
from records.ledger import engine
from records.ledger.engine import make_engine, refuse_network_disk


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("not a url", "is not a database URL"),
        ("mysql://u:p@host/db", "is of kind 'mysql'; use sqlite:////FOLDER/FILE or postgresql"),
        ("sqlite://", "absolute file"),
        ("sqlite:///:memory:", "absolute file"),
        ("sqlite:///ledger.db", "absolute file, sqlite:////FOLDER/FILE, not 'ledger.db'"),
        ("postgresql+nothing://host/db", "driver that is not here"),
    ],
)
def test_urls_that_cannot_work_are_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(url, durability="normal", busy_timeout_s=1)


@pytest.mark.parametrize(("durability", "number"), [("normal", 1), ("full", 2)])
def test_sqlite_is_set_up_as_promised(tmp_path: Path, durability: Literal["normal", "full"], number: int) -> None:
    opened = make_engine(f"sqlite:///{tmp_path}/ledger.db", durability=durability, busy_timeout_s=2.5)
    with opened.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "busy_timeout")
        values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert values == ["wal", number, 2500]
    opened.dispose()


def test_a_network_disk_is_refused_through_a_link_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_network_disk(tmp_path / "ledger.db")
    mounts = [p for p in psutil.disk_partitions(all=True) if tmp_path.resolve().is_relative_to(p.mountpoint)]
    kind = max(reversed(mounts), key=lambda p: len(p.mountpoint)).fstype
    # The disk under the test folder is declared to be a network disk; everything else is real.
    monkeypatch.setattr(engine, "NETWORK_FILE_SYSTEMS", frozenset({kind}))
    link = Path("/dev/shm") / f"relook-test-{tmp_path.name}"
    for path in (tmp_path / "ledger.db", tmp_path / "not" / "there" / "ledger.db"):
        with pytest.raises(ConfigError, match=rf"network file system \({kind}\).*use a local disk, or postgresql"):
            refuse_network_disk(path)
    if link.parent.is_dir():
        link.symlink_to(tmp_path)
        try:
            with pytest.raises(ConfigError, match="network file system"):
                make_engine(f"sqlite:///{link}/ledger.db", durability="normal", busy_timeout_s=1)
        finally:
            link.unlink()
