"""Nodes of a Ray cluster on one machine: a head and workers, on loopback or each in a network namespace (root, Linux).

A node has the processes and the folders of a node. In a namespace it also has an address, a loopback and a Ray folder
of its own, so that nothing can be reached that is not reached between machines; disk and clock are shared.
"""

import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from subprocess import Popen, run
from typing import Any, Self

import psutil

ROOT = Path(__file__).resolve().parents[2]
PREFIX, BRIDGE, HOSTS = "10.98.0", "relook-bridge", Path("/etc/netns")
HEAD = f"{PREFIX}.1"
RAY = """
from ray.scripts.scripts import main
from cluster.daemons import time_for_a_slow_node
with time_for_a_slow_node():
    main()
"""


def prepare_ray(folder: Path, *, on_loopback: bool = True) -> None:
    """Set what Ray reads when it is imported: a token of this run's own, and on request no address but loopback."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    (folder / "ray").mkdir()
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Where a head notes its address; Ray makes this folder only for sessions that it starts by itself.
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": str(int(not on_loopback)),
    }


class Namespaces:
    """Networks of their own for worker nodes, joined by a bridge. Everything is removed at the end.

    Args:
        scratch: a folder of its own for every node is made here.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._names: list[str] = []

    def __enter__(self) -> Self:
        """Make the bridge, which is the head's network."""
        _ip(f"link add {BRIDGE} type bridge")
        _ip(f"addr add {HEAD}/24 dev {BRIDGE}")
        _ip(f"link set {BRIDGE} up")
        return self

    def __exit__(self, *_: object) -> None:
        """End every node and remove every network."""
        for name in self._names:
            self.kill(name)
            _ip(f"netns del {name}")
            shutil.rmtree(HOSTS / name)
        _ip(f"link del {BRIDGE}")

    def start(self, name: str, number: int, head: str, temp_dir: Path, cpus: int) -> "Popen[bytes]":
        """Start a worker node in a network of its own, with a folder of its own at Ray's path."""
        address, own = f"{PREFIX}.{number + 1}", self._scratch / name
        own.mkdir()
        (HOSTS / name).mkdir(parents=True)
        # Training workers find each other by the name of their machine, which all share here.
        (HOSTS / name / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        self._names.append(name)
        _ip(f"netns add {name}")
        _ip(f"link add {name} type veth peer name eth0 netns {name}")
        _ip(f"link set {name} master {BRIDGE} up")
        for what in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _ip(f"-n {name} {what}")
        ray = f"{sys.executable} -c {shlex.quote(RAY)} start --address={head} --node-ip-address={address}"
        inside = f"mount --bind {own} {temp_dir} && exec {ray} --num-cpus={cpus} --block"
        with (self._scratch / f"{name}.log").open("wb") as log:
            return Popen(["ip", "netns", "exec", name, "sh", "-c", inside], cwd=ROOT, stdout=log, stderr=log)

    def raylet(self, name: str) -> int | None:
        """Return the process id of a node's raylet, once it has started."""
        for process in self._processes(name):
            with suppress(psutil.Error):
                if process.name() == "raylet":
                    return process.pid
        return None

    def kill(self, name: str) -> int:
        """Kill everything in a network namespace; return the number of processes."""
        dying = self._processes(name)
        for process in dying:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        return len(dying)

    @staticmethod
    def _processes(name: str) -> list[psutil.Process]:
        found = []
        for pid in _ip(f"netns pids {name}").split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found


def _ip(arguments: str) -> str:
    return run(["ip", *arguments.split()], check=True, capture_output=True, text=True).stdout


class Nodes:
    """A head without CPUs and two workers, which can be killed and replaced.

    Args:
        ray_folder: for Ray's sockets and logs; short, because of the sockets' paths. Its folder `t` is made here.
        namespaces: where every worker gets a network of its own; None is loopback for all.
        cpus: of a worker, as Ray counts them.
    """

    def __init__(self, ray_folder: Path, namespaces: Namespaces | None, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        from cluster.daemons import time_for_a_slow_node

        self._namespaces, self._cpus = namespaces, cpus
        self._temp_dir = ray_folder / "t"
        self._temp_dir.mkdir()
        self._common = {
            "node_ip_address": HEAD if namespaces else "127.0.0.1", "temp_dir": str(self._temp_dir),
            "include_dashboard": False,
        }  # fmt: skip
        # Any: half of the methods of Ray's test cluster have no annotations.
        with time_for_a_slow_node():
            self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0} | self._common)
        self._workers: dict[str, Any] = {}
        self._made = 0
        for _ in range(2):
            self.add()

    @property
    def raylets(self) -> dict[str, int]:
        """Process ids of the workers' raylets that have started, by node."""
        found = {}
        for name, node in self._workers.items():
            if self._namespaces is None:
                found[name] = node.all_processes["raylet"][0].process.pid
            elif raylet := self._namespaces.raylet(name):
                found[name] = raylet
        return found

    def wait(self, timeout_s: float = 600.0) -> None:
        """Wait until both workers have joined; Ray has to be initialised.

        Args:
            timeout_s: how long.
        Raises:
            TimeoutError: they did not in time.
        """
        import ray

        deadline_s = time.monotonic() + timeout_s
        while ray.cluster_resources().get("CPU", 0.0) < self._cpus * len(self._workers):  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the worker nodes have not joined after {timeout_s:g} s")
            time.sleep(0.2)

    def add(self) -> None:
        """Start a worker node."""
        from cluster.daemons import time_for_a_slow_node

        self._made += 1
        name = f"relook{self._made}"
        if self._namespaces is None:
            with time_for_a_slow_node():
                self._workers[name] = self.cluster.add_node(wait=False, num_cpus=self._cpus, **self._common)
        else:
            where = (self.cluster.address, self._temp_dir)
            self._workers[name] = self._namespaces.start(name, self._made, *where, self._cpus)

    def kill(self, name: str) -> int:
        """Kill a node with everything on it; return the number of processes."""
        node = self._workers.pop(name)
        if self._namespaces is not None:
            return self._namespaces.kill(name)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        dying = [*raylet.children(recursive=True), raylet]
        for process in dying:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        return len(dying)
