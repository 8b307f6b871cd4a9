import subprocess
import time
from collections.abc import Callable

import pytest

from records import lease
from records.errors import RefusedError
from records.ledger import Ledger


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of 0.6 seconds, so that the tests need not wait."""
    monkeypatch.setattr(lease, "LEASE_S", 0.6)


def test_one_holds_it_and_releases_it(ledger: Ledger) -> None:
    with lease.hold(ledger, "round") as holder:
        assert holder
        with pytest.raises(RefusedError, match="another process holds the round lease"), lease.hold(ledger, "round"):
            pass
        with lease.hold(ledger, "sync"):
            pass
    with lease.hold(ledger, "round") as other:
        assert other != holder


def test_it_is_renewed_for_as_long_as_the_block_runs(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for a renewal that is late on a busy machine.
    monkeypatch.setattr(lease, "LEASE_S", 3.0)
    with lease.hold(ledger, "round"):
        time.sleep(3.5)
        assert not ledger.lease("round", "somebody else", 1)


def test_it_is_released_after_an_error(ledger: Ledger) -> None:
    def fail() -> None:
        with lease.hold(ledger, "round"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ledger.lease("round", "somebody else", 1)


def test_waiting_outlasts_a_holder_that_was_killed(ledger: Ledger) -> None:
    assert ledger.lease("round", "killed", 0.3)
    with lease.hold(ledger, "round", wait_s=60):
        pass


def test_a_lease_that_another_process_took_is_reported(ledger: Ledger) -> None:
    def stand_still() -> None:
        with lease.hold(ledger, "round") as holder:
            ledger.release("round", holder)
            assert ledger.lease("round", "somebody else", 30)
            time.sleep(0.5)

    with pytest.raises(RefusedError, match="another process took the round lease"):
        stand_still()
    assert not ledger.lease("round", "a third", 1)


def test_a_holder_of_this_machine_that_is_gone_is_not_waited_for(
    ledger: Ledger, run_python: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 60.0)
    code = (
        "import os, sys\nfrom records.ledger import open_ledger\nfrom records.lease import hold\n"
        "with hold(open_ledger(sys.argv[1]), 'round'):\n    os._exit(9)\n"
    )
    killed = run_python(code, ledger.url)
    assert killed.wait(600) == 9
    with lease.hold(ledger, "round"):
        pass
