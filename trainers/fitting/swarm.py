"""The network of peers, by hivemind: a distributed hash table of short records, and averaging of tensors.

Two processes are forked: one holds this peer's part of the table (and runs hivemind's network daemon), the other one
averages. Both end with the process that trains, however it ends; the daemon, some 30 s after one that was killed. What
other machines send is read with msgpack and protobuf, never unpickled. The clocks of all have to agree to a second.
"""

import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from records.errors import ConfigError, UnavailableError
from trainers.optimization.peers import PeersSettings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which hivemind decorates functions with
        import hivemind
        from hivemind.averaging import DecentralizedAverager
        from hivemind.p2p import P2PDaemonError, P2PHandlerError
        from hivemind.utils import get_dht_time
        from hivemind.utils.logging import use_hivemind_log_handler
except ModuleNotFoundError as error:
    raise ConfigError(
        f"strategy hivemind needs a package that is not installed ({error.name}); pip install 'relook[hivemind]' "
        "brings it"
    ) from error

ALIVE_S = 20.0
"""How long a record is valid; a peer that is silent for so long is gone."""
CHUNK_TIMEOUT_S = 30.0
START_TIMEOUT_S = 60.0
"""A busy machine may need that long to start the daemon; hivemind's own limit is 15."""
PR_SET_PDEATHSIG = 1
REQUEST_SHARE = 0.8
"""Of the time for matchmaking: how long a request to join waits. hivemind wants less than the whole."""

logger = logging.getLogger(__name__)


def _end_with_parent(parent: int) -> None:
    """Let the kernel end this process when the one that started it ends, killed ones included; and nothing before.

    A terminal sends Ctrl-C to all processes of a session: the network daemon would end before its peers were told.
    """
    os.setsid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _Table(hivemind.DHT):  # type: ignore[misc]
    def run(self) -> None:
        """Serve the table; see the module."""
        _end_with_parent(self._parent_pid)
        super().run()


class _Averager(DecentralizedAverager):  # type: ignore[misc]
    def __init__(self, state: Callable[[], bytes], *args: Any, **kwargs: Any) -> None:
        self._state = state
        super().__init__(*args, **kwargs)

    def run(self) -> None:
        """Serve averagings; see the module."""
        _end_with_parent(self._parent_pid)
        super().run()

    def get_current_state(self) -> tuple[Any, Sequence[Tensor], None]:
        """Return the state that this peer hands over, as one tensor of bytes; called in the process that trains."""
        # A byte more, because hivemind sends no empty tensor.
        content = bytearray(b"\0" + self._state())
        return {"bytes": len(content)}, [torch.frombuffer(content, dtype=torch.uint8)], None


class Swarm:
    """This process's place among the peers.

    Args:
        settings: addresses and times.
        prefix: peers of another prefix never average with this one.
        shapes: tensors, fp32 on the CPU, of the shapes that are averaged; they are used as memory.
        state: returns what this peer hands over to one that joins.
    Raises:
        UnavailableError: no peer is at the addresses, or the address to listen on is taken.
        ConfigError: this is not the main thread.
    """

    def __init__(
        self, settings: PeersSettings, prefix: str, shapes: Sequence[Tensor], state: Callable[[], bytes]
    ) -> None:
        self._settings = settings
        self._key = f"{settings.group}.standings"
        use_hivemind_log_handler("nowhere")
        # Its own tracebacks of averagings that found nobody; what matters of them is logged by `PeerGroup`.
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        with _own_interrupt():
            self._table = self._open_table()
            self.peer_id = str(self._table.peer_id)
            try:
                self._averager = self._open_averager(prefix, shapes, state)
            except BaseException:
                self._table.shutdown()
                raise

    def _open_averager(self, prefix: str, shapes: Sequence[Tensor], state: Callable[[], bytes]) -> Any:
        return _Averager(
            state,
            shapes,
            self._table,
            start=True,
            prefix=prefix,
            min_matchmaking_time=self._settings.matchmaking_s,
            request_timeout=REQUEST_SHARE * self._settings.matchmaking_s,
            allreduce_timeout=self._settings.averaging_timeout_s,
            next_chunk_timeout=CHUNK_TIMEOUT_S,
            allow_state_sharing=False,
            client_mode=not self._settings.listen,
        )

    def _open_table(self) -> Any:
        settings = self._settings
        try:
            return _Table(
                initial_peers=list(settings.addresses) or None,
                start=True,
                client_mode=not settings.listen,
                host_maddrs=[settings.listen] if settings.listen else None,
                announce_maddrs=list(settings.announce) or None,
                no_listen=not settings.listen,
                use_relay=False,
                nat_port_map=False,
                auto_nat=False,
                startup_timeout=START_TIMEOUT_S,
            )
        except (P2PDaemonError, P2PHandlerError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            where = f"peers {', '.join(settings.addresses)}" if settings.addresses else f"address {settings.listen}"
            raise UnavailableError(
                f"{where} cannot be used ({reason}); see that the other peer runs, that its port is reachable, and "
                "that nothing else listens on this one's"
            ) from error

    @property
    def addresses(self) -> list[str]:
        """Where other peers reach this one; empty if it only calls others."""
        return [str(address) for address in self._table.get_visible_maddrs()] if self._settings.listen else []

    def publish(self, text: str) -> None:
        """Tell the others a text about this peer, valid for `ALIVE_S` seconds."""
        expires = get_dht_time() + ALIVE_S
        self._table.store(self._key, subkey=self.peer_id, value=text, expiration_time=expires)

    def records(self) -> dict[str, str]:
        """Return what the other peers published last, by peer."""
        found = self._table.get(self._key, latest=True)
        entries = found.value if found is not None and isinstance(found.value, dict) else {}
        return {
            str(peer): entry.value
            for peer, entry in entries.items()
            if str(peer) != self.peer_id and isinstance(entry.value, str)
        }

    def hand_over(self, priority: int) -> None:
        """Offer the state to peers that join from now on; they take that of the highest priority."""
        if self._settings.listen:
            self._averager.state_sharing_priority = float(priority)
            self._averager.allow_state_sharing = True

    def download(self) -> bytes | None:
        """Return a peer's state, which may be empty; None if none could be had."""
        found = self._averager.load_state_from_peers(timeout=self._settings.averaging_timeout_s)
        if not found or len(found[1]) != 1:
            return None
        content: bytes = found[1][0].numpy().tobytes()
        return content[1:]

    def average(self, values: Sequence[Tensor], weight: float) -> tuple[list[Tensor], int]:
        """Average tensors with the peers that come within the time for matchmaking.

        Args:
            values: fp32 on the CPU, of the shapes that were given.
            weight: of this peer's values.
        Returns:
            The weighted mean, and how many peers it is of.
        Raises:
            UnavailableError: no peer came, or the averaging broke off.
        """
        with self._averager.get_tensors() as tensors:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        wait = 10 * self._settings.matchmaking_s + 10
        try:
            members = self._averager.step(weight=weight, timeout=wait)
        # hivemind raises what its parts raise, among them errors of its network that share no base class.
        except Exception as error:
            raise UnavailableError(" ".join(str(error).split())[:200] or type(error).__name__) from error
        if not members:
            raise UnavailableError("no group was found")
        with self._averager.get_tensors() as tensors:
            return [tensor.clone() for tensor in tensors], len(members)

    def close(self) -> None:
        """End both processes."""
        self._averager.shutdown()
        self._table.shutdown()


@contextmanager
def _own_interrupt() -> Iterator[None]:
    """Keep the process's own handling of Ctrl-C, which hivemind replaces when it starts a process."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("strategy hivemind trains in a process's main thread only; call it there")
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
