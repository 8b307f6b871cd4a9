"""The whole demo on a head and two worker nodes; a worker node is killed in the search, in the fit and while it serves.

    .venv/bin/python -m bench.drills.three_nodes [--lesions 260] [--keep FOLDER] [--namespaces] [--tls]

Three raylets, each with the processes and folders of a node, run `relook demo`: on loopback, or with `--namespaces`
(root, Linux) each worker in a network namespace with an address, a loopback and a Ray folder of its own; `--tls`
encrypts the traffic between Ray's nodes, see docs/operate.md. The head only listens for HTTP. A node is killed with
all its processes (kill -9) three times: while it runs a trial of the search, while it runs a worker of the fit, and
while it holds the predictor under requests. Ten seconds later another node replaces it, as an autoscaler would.
The demo must succeed: no request of a caller who repeats it fails, no returned prediction is lost or doubled, and
the audit chain holds. Prints one JSON object; the exit code is 1 if something is wrong.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, run
from typing import Any

import psutil

from bench.drills.nodes import PREFIX, Namespaces, Nodes, prepare_ray
from bench.drills.two_nodes import trials_of

NODE_CPUS = 3
REPLACED_AFTER_S = 10.0
ENOUGH_PREDICTIONS = 20
STAGES = ("search", "fit", "serving")
SETTINGS = (
    "trainers.workers.count=2",
    "tuning.max_failures=3",
    "trainers.workers.max_failures=3",
    "serving.start_timeout_s=600",
    "serving.ingress_cpus=0",
    "demo.requests=150",
    "demo.retry_s=300",
)


def encrypt(folder: Path) -> None:
    """Make every process of Ray that is started from here use TLS, with a CA and a certificate of this run."""
    addresses = ",".join(["DNS:localhost", "IP:127.0.0.1", *(f"IP:{PREFIX}.{host}" for host in range(1, 10))])
    (folder / "node.ext").write_text(f"subjectAltName={addresses}")
    key = "-newkey rsa:2048 -nodes"
    for command in (
        f"req -x509 {key} -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        f"req {key} -subj /CN=node -keyout node.key -out node.csr",
        "x509 -req -in node.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile node.ext -out node.crt",
    ):
        run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    os.environ |= {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }


def has_process(raylet: int, *words: str) -> bool:
    """Return whether a worker of a raylet has one of these words in its title."""
    for process in psutil.Process(raylet).children(recursive=True):
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and any(word in title for word in words):
                return True
    return False


class Killer:
    """Kills a node in each stage of a demo and replaces it, all in the main thread, as Ray requires."""

    def __init__(self, nodes: Nodes, home: Path, demo: "Popen[bytes]") -> None:
        self._nodes, self._home, self._demo = nodes, home, demo
        self.kills: list[dict[str, Any]] = []

    def run(self) -> None:
        """Wait for one stage after the other, then for the end of the demo."""
        began_s = time.monotonic()
        conditions: dict[str, Callable[[int], bool]] = {
            "search": lambda raylet: bool(trials_of(raylet)),
            "fit": lambda raylet: has_process(raylet, "relook_fit") or has_process(raylet, "RayTrainWorker"),
            "serving": lambda raylet: has_process(raylet, "predictor") and self._predictions() >= ENOUGH_PREDICTIONS,
        }
        for stage in STAGES:
            name = self._wait_for(conditions[stage])
            if name is None:
                break
            time.sleep(2.0)  # into the stage, so that the kill interrupts work and not a start
            stored = self._predictions()
            processes = self._nodes.kill(name)
            self.kills.append(
                {
                    "stage": stage, "node": name, "processes": processes, "predictions_stored": stored,
                    "after_s": round(time.monotonic() - began_s, 1),
                }
            )  # fmt: skip
            time.sleep(REPLACED_AFTER_S)
            self._nodes.add()
        self._demo.wait()

    def _wait_for(self, condition: Callable[[int], bool]) -> str | None:
        while self._demo.poll() is None:
            for name, raylet in self._nodes.raylets.items():
                with suppress(psutil.NoSuchProcess):
                    if condition(raylet):
                        return name
            time.sleep(0.2)
        return None

    def _predictions(self) -> int:
        from records.settings import RecordsSettings
        from records.store import open_store
        from records.types import Prediction

        if not (self._home / "ledger.db").exists():
            return 0
        with closing(open_store(RecordsSettings(home=self._home))) as store, store.ledger.read() as tx:
            return tx.count(Prediction)


def start_demo(home: Path, address: str, lesions: int, root: Path, out: Path) -> "Popen[bytes]":
    """Start the demo on the cluster; what it prints goes to a file."""
    sets = [f"demo.synth_lesions={lesions}", f"cluster.ray_address={address}", *SETTINGS]
    command = [sys.executable, "-m", "cluster.cli", "demo", "--json"]
    environment = {**os.environ, "RELOOK_HOME": str(home), "RELOOK_LABELING__PORT": "0", "PYTHONPATH": str(root)}
    arguments = [part for setting in sets for part in ("--set", setting)]
    with out.open("wb") as file:
        return Popen([*command, *arguments], env=environment, stdout=file, cwd=root)


def find_faults(home: Path, summary: dict[str, Any], kills: list[dict[str, Any]]) -> list[str]:
    """Return the failed conditions."""
    wrong = []
    if (hit := [kill["stage"] for kill in kills]) != list(STAGES):
        wrong.append(f"nodes were killed in {hit}, not in {list(STAGES)}")
    if summary["served"]["failed"] or summary["swap"]["failed"]:
        wrong.append(f"requests failed: {summary['served']}, {summary['swap']}")
    asked = summary["label_studio"]
    if asked["lost"] or asked["duplicated"]:
        wrong.append(f"tasks were lost or doubled: {asked}")
    if not summary["gate"]["harmed_challenger_refused"]:
        wrong.append("the gate took the harmed challenger")
    if len(summary["rounds"]) != 2:
        wrong.append(f"{len(summary['rounds'])} rounds, not 2")
    doubled, stored = stored_twice(home)
    if doubled:
        wrong.append(f"{doubled} requests are stored twice")
    if stored < (succeeded := summary["served"]["requests"] - summary["served"]["failed"]):
        wrong.append(f"{succeeded} requests succeeded and {stored} are stored")
    return wrong


def stored_twice(home: Path) -> tuple[int, int]:
    """Return how many requests have more than one served prediction, and how many predictions there are."""
    from records.settings import RecordsSettings
    from records.store import open_store
    from records.types import Prediction

    with closing(open_store(RecordsSettings(home=home))) as store, store.ledger.read() as tx:
        served = [p for p in tx.find(Prediction) if p.served]
    return len(served) - len({p.idempotency_key for p in served}), len(served)


def main() -> int:
    """Run the demo on three nodes; exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lesions", type=int, default=260, help="lesions to generate")
    parser.add_argument("--keep", type=Path, help="empty folder that keeps the home; default: it is removed")
    parser.add_argument("--namespaces", action="store_true", help="a network of its own for every worker; needs root")
    parser.add_argument("--tls", action="store_true", help="encrypt what Ray's nodes say to each other")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    with (
        tempfile.TemporaryDirectory(prefix="relook-three-") as scratch,
        tempfile.TemporaryDirectory(prefix="rn", ignore_cleanup_errors=True) as ray_folder,
        Namespaces(Path(scratch)) if arguments.namespaces else nullcontext() as namespaces,
    ):
        folder = (arguments.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        home, said = folder / "home", folder / "summary.json"
        prepare_ray(Path(ray_folder), on_loopback=namespaces is None)
        if arguments.tls:
            encrypt(Path(scratch))
        nodes = Nodes(Path(ray_folder), namespaces, NODE_CPUS)
        began_s = time.monotonic()
        demo = start_demo(home, nodes.cluster.address, arguments.lesions, root, said)
        killer = Killer(nodes, home, demo)
        try:
            killer.run()
        finally:
            demo.terminate()
            demo.wait()
            nodes.cluster.shutdown()
        took_s = time.monotonic() - began_s
        if demo.returncode != 0:
            print(json.dumps({"wrong": [f"the demo ended with {demo.returncode}"], "kills": killer.kills}))
            return 1
        summary = json.loads(said.read_text())
        wrong = find_faults(home, summary, killer.kills)
        verify = [sys.executable, "-m", "cluster.cli", "audit", "verify"]
        checked = run(verify, env={**os.environ, "RELOOK_HOME": str(home)}, stdout=DEVNULL, cwd=root, check=False)
        if checked.returncode:
            wrong.append("the audit chain is broken")
    found = {
        "kills": killer.kills, "served": summary["served"], "swap": summary["swap"],
        "label_studio": summary["label_studio"], "rounds": summary["rounds"], "seconds": round(took_s), "wrong": wrong,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
