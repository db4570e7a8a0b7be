"""Breakpoints in a script, where debugging is on."""

import contextlib
import fcntl
import ipaddress
import os
import pdb
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from firn._firn import Logger
from firn.debug import DebugAbstract

#: The ioctl that returns the user namespace that owns another namespace.
NS_GET_USERNS = 0xB701


class Debug(DebugAbstract):
    """Debugging is on."""

    def __init__(self, log: Logger, attach: str) -> None:
        """Take the command with which people attach to the script's namespaces."""
        self._log = log
        self._attach = attach
        self._marks: list[subprocess.Popen[bytes]] = []

    def breakpoint(self, host: str = "127.0.0.1", port: int = 4444) -> None:
        """Wait here for a connection to this address, and serve pdb on it.

        On a loopback address only this user and root are served: who gets a debugger runs code.
        """
        # The attaching command finds our namespaces by a process whose argument nobody else has.
        mark = str(random.randrange(1_000_000, 10_000_000))
        shell = os.environ | {"bashInteractive": shutil.which("bash") or "/bin/sh"}
        with socket.create_server((host, port), backlog=1) as server:
            self._marks.append(subprocess.Popen(["sleep", mark], env=shell))
            self._log.log_test_error(f"Breakpoint reached, run '{self._attach} {mark}'")
            self._log.info(f"the debugger listens on {host}:{port}")
            connection = self._accept(server)
        RemotePdb(connection).debug(sys._getframe().f_back)

    def _accept(self, server: socket.socket) -> socket.socket:
        """Wait for a connection by a user who may run code here."""
        while True:
            connection, peer = server.accept()
            own = connection.getsockname()
            user = user_of(peer, own)
            # Who listens on other addresses wants other hosts too; their users cannot be checked.
            local = ipaddress.ip_address(own[0]).is_loopback
            if user in users() or (user is None and not local):
                return connection
            connection.close()
            who = "an unknown user" if user is None else f"user {user}"
            self._log.warning(f"the debugger refused a connection by {who}")

    def close(self) -> None:
        """End the processes that mark our namespaces."""
        for process in self._marks:
            process.kill()
            process.wait()
        self._marks.clear()


class RemotePdb(pdb.Pdb):
    """A debugger served over a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Take the connection. It is closed when the debugger ends."""
        with connection:
            typed = connection.makefile("r")
            # Telnet's line ends.
            shown = connection.makefile("w", newline="\r\n")
        shown.reconfigure(line_buffering=True)
        super().__init__(stdin=typed, stdout=shown)

    def debug(self, frame: FrameType | None) -> None:
        """Stop in `frame`, unless the user has left."""
        # Calls made from here on would be traced, so there are none.
        try:  # noqa: SIM105
            self.set_trace(frame)
        except ConnectionError:
            pass


def user_of(peer: tuple[str, int], own: tuple[str, int]) -> int | None:
    """Return the user at the other end of a connection, if that is on this host."""
    ends = [spelled(peer), spelled(own)]
    # The other end may be an IPv6 socket.
    for table, prefix in (("tcp", ""), ("tcp6", "0000000000000000FFFF0000")):
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                user, inode = fields[7], fields[9]
                # A closed end has no inode, and would be taken for root's.
                if fields[1:3] == [prefix + end for end in ends] and inode != "0":
                    return int(user)
    return None


def spelled(end: tuple[str, int]) -> str:
    """Write an address as the kernel's tables do."""
    address = int.from_bytes(socket.inet_aton(end[0]), sys.byteorder)
    return f"{address:08X}:{end[1]:04X}"


def users() -> set[int]:
    """Return the users who may run code as this one."""
    all_of_them = {0, os.getuid()}
    unmapped = int(Path("/proc/sys/kernel/overflowuid").read_text())
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = [map(int, line.split()) for line in lines]
    if any(first <= unmapped < first + length for first, _, length in ranges):
        return all_of_them
    # In a sandbox users from outside have no number. Where the network is the sandbox's own, only
    # root could bring them there: as who attaches to a build of Nix.
    with open("/proc/self/ns/net") as network, open("/proc/self/ns/user") as own:
        owner = fcntl.ioctl(network, NS_GET_USERNS)
        try:
            if os.path.sameopenfile(owner, own.fileno()):
                all_of_them.add(unmapped)
        finally:
            os.close(owner)
    return all_of_them
