"""The first message between workers, with a limit: workers that cannot reach each other say so instead of waiting.

The backend's own limit is half an hour, and it names no interface. Ranks meet over one address (the rendezvous) and
compute over others, which NCCL and gloo choose themselves; in containers and on machines with several networks they
may choose one that the others cannot reach.
"""

import os
import socket
import threading

import psutil
import torch
from torch import distributed as dist

from records.errors import UnavailableError


def require_contact(device: torch.device, timeout_s: float) -> None:
    """Add up a number over all workers, or say within the limit that they cannot talk.

    Raises UnavailableError: some worker did not respond; names the interface and the variable that chooses another.
    """
    failed: list[Exception] = []
    done = threading.Event()

    def add_up() -> None:
        try:
            total = torch.ones(1, device=device)
            dist.all_reduce(total)
            # On a GPU the call above only queues the sum; reading it waits for the others.
            total.item()
        except Exception as error:  # noqa: BLE001 - passed on by the caller's thread
            failed.append(error)
        finally:
            done.set()

    # In a daemon thread, because neither backend can be interrupted; the process ends with the error below.
    threading.Thread(target=add_up, name="first contact", daemon=True).start()
    if done.wait(timeout_s) and not failed:
        return
    backend = dist.get_backend()
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    chosen = os.environ.get(variable)
    used = f"{variable}={chosen}" if chosen else f"interface {_interface()}, as {variable} is not set"
    why = f" ({' '.join(str(failed[0]).split())[:200]})" if failed else f" within {timeout_s:g} s"
    raise UnavailableError(
        f"worker {dist.get_rank()} of {dist.get_world_size()} reaches the others not by {backend}{why}, with {used}; "
        f"set {variable} on every machine to the interface that connects them (here there are {', '.join(_names())})"
        + ("; NCCL_DEBUG=INFO shows what it tries" if backend == "nccl" else "")
    )


def _interface() -> str:
    """Return the name of the interface with this machine's own address, or that address if none has it."""
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "of this machine's name, which has no address"
    found = [name for name, addresses in psutil.net_if_addrs().items() if own in {each.address for each in addresses}]
    return found[0] if found else own


def _names() -> list[str]:
    return sorted(psutil.net_if_addrs())
