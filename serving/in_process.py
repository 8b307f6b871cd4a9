"""A replica in the process of its caller: on one machine a hop between two processes costs more than it buys.

In: the object that would run in a replica. Out: what stands in for the handle of its deployment. So the caller has one
code path, whether its calls leave the process or not.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of a handle."""

    call: Callable[..., Awaitable[Any]]

    def remote(self, *arguments: Any) -> Awaitable[Any]:
        """Call it here; the result is awaited as that of a handle is."""
        return self.call(*arguments)


def run_here(replica: type, *arguments: Any) -> "InProcessHandle":
    """Make a replica in this process and return its handle; the caller checks its health and stops it."""
    # An asynchronous `__del__` is for Ray Serve. Python would call it, too, and not wait for it.
    here = type(replica.__name__, (replica,), {"__del__": lambda self: None})
    return InProcessHandle(here(*arguments))


class InProcessHandle:
    """Stands in for a handle.

    Args:
        replica: whose methods are called, on the event loop of the caller.
    """

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    def __getattr__(self, name: str) -> _Method:
        """Return a method of the replica."""
        return _Method(getattr(self.replica, name))
