"""Ports of this machine: free, held by a process of this kit, or by somebody else's."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from samaritan.operate.checks.finding import Finding, fine, missing

_LISTENING = "0A"


@dataclass(frozen=True)
class Listener:
    """A socket that waits for connections.

    Attributes:
        address: That it is bound to.
        uid: Of its owner.
        inode: By which /proc names it.
    """

    address: str
    uid: int
    inode: str

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        return ipaddress.ip_address(self.address).is_loopback


def listeners(port: int) -> list[Listener]:
    """Who listens at a TCP port in this network, of either family."""
    found = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/self/net/{name}").read_text("ascii").splitlines()[1:]:
                words = line.split()
                address, _, number = words[1].rpartition(":")
                if words[3] == _LISTENING and int(number, 16) == port:
                    found.append(Listener(_address(address), int(words[7]), words[9]))
    return found


def port(
    what: str,
    number: int,
    address: str,
    processes: Iterable[int],
    hint: str,
    users: frozenset[int] = frozenset(),
) -> Finding:
    """Whether a port is free or in the hands of this kit.

    Args:
        what: Its name in the settings.
        number: Of the port.
        address: On which it is meant to be.
        processes: That belong to this kit, with all they have started.
        hint: How another one is chosen.
        users: Whose processes count as this kit's where they may not be looked at.
    """
    taken = listeners(number)
    if not taken:
        return _bindable(what, number, address, hint)
    own, hidden = _sockets(processes)
    foreign = [f for f in taken if f.inode not in own and f.uid not in hidden | users]
    if foreign:
        return missing(
            what,
            "SAM-N641",
            f"{number} is in use by a process that is not of this kit (user {foreign[0].uid}, "
            f"address {foreign[0].address})",
            hint,
        )
    return fine(what, f"{number}, in use by this kit")


def local_only(what: str, number: int) -> Finding | None:
    """Whether a port that is in use is hidden from other machines; None where nobody listens."""
    taken = listeners(number)
    if not taken:
        return None
    if open_to_all := [found.address for found in taken if not found.is_local]:
        return missing(
            what,
            "SAM-N642",
            f"{number} listens on {open_to_all[0]}, and other machines may reach it",
            "Stop the server, and find out who has started that process with another address: "
            "whoever reaches this port goes around the proxy.",
        )
    return fine(what, f"{number} can be reached from this machine alone")


def _bindable(what: str, number: int, address: str, hint: str) -> Finding:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((address, number))
        except OSError as error:
            return missing(
                what, "SAM-N643", f"{number} cannot be had on {address}: {error.strerror}", hint
            )
    return fine(what, f"{number} is free")


def _sockets(processes: Iterable[int]) -> tuple[set[str], set[int]]:
    """Inodes of the sockets that processes hold, and users whose processes may not be looked at."""
    inodes, hidden = set(), set()
    for process in processes:
        folder = Path(f"/proc/{process}")
        try:
            for link in (folder / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed in between
                    inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
        except PermissionError:
            with contextlib.suppress(FileNotFoundError):
                hidden.add(folder.stat().st_uid)
        except OSError:
            pass  # the process has ended
    return inodes, hidden


def _address(text: str) -> str:
    """An address of /proc/net: words of four bytes in the order of this machine."""
    words = [bytes.fromhex(text[start : start + 8]) for start in range(0, len(text), 8)]
    if sys.byteorder == "little":
        words = [word[::-1] for word in words]
    found = ipaddress.ip_address(b"".join(words))
    mapped = getattr(found, "ipv4_mapped", None)
    return str(mapped or found)
