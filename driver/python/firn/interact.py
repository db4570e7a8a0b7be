"""Connects the terminal to a machine's shell or serial console."""

import selectors
import subprocess
import sys
from socket import socket
from typing import TYPE_CHECKING

from firn.errors import MachineError

if TYPE_CHECKING:
    from firn.machine import QemuMachine


def shell(machine: "QemuMachine", address: str | None = None) -> None:
    """Connect the user to the root shell on hvc0 until Ctrl-D or Ctrl-C.

    The terminal keeps its line editing and echo, of which the shell has none. With an address it is
    socat's, not the terminal, that is connected to the shell.
    """
    machine.connect()
    console = machine.shell
    if console is None:
        raise MachineError(f"{machine.name} is not running")
    if address is not None:
        with console:
            _socat(address, console)
        return
    machine.log("Terminal is ready (there is no initial prompt); Ctrl-D leaves it:")
    with console, selectors.DefaultSelector() as ready:
        ready.register(sys.stdin, selectors.EVENT_READ)
        ready.register(console, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in ready.select():
                    if key.fileobj is console:
                        text = console.recv(65536)
                        if not text:
                            return
                        # Unfiltered: this is the guest's terminal now.
                        sys.stdout.flush()
                        sys.stdout.buffer.write(text)
                        sys.stdout.buffer.flush()
                    else:
                        line = sys.stdin.readline()
                        if not line:
                            return
                        console.sendall(line.encode())
        except KeyboardInterrupt:
            return


def _socat(address: str, console: socket) -> None:
    """Let socat connect an address to the shell until one of them ends."""
    try:
        subprocess.run(
            ["socat", address, f"FD:{console.fileno()}"], pass_fds=[console.fileno()], check=False
        )
    except FileNotFoundError:
        raise MachineError(f"socat is needed to connect {address} to the shell") from None
    except KeyboardInterrupt:
        pass


def console(machine: "QemuMachine") -> None:
    """Send what the user types to the serial console until Ctrl-D or Ctrl-C.

    What the guest prints there is in the log already.
    """
    machine.log("Terminal is ready (there is no prompt); Ctrl-D leaves it:")
    try:
        for line in sys.stdin:
            machine.send_console(line)
    except KeyboardInterrupt:
        pass
    machine.log("Closing connection to the console")
