"""Hands the terminal to a machine's shell or serial console."""

import selectors
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firn._firn import Machine


def shell(machine: "Machine") -> None:
    """Let the user talk to the root shell on hvc0 until Ctrl-D or Ctrl-C.

    The terminal keeps its line editing and echo, of which the shell has none.
    """
    machine.connect()
    machine.log("Terminal is ready (there is no initial prompt); Ctrl-D leaves it:")
    console = machine.shell
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


def console(machine: "Machine") -> None:
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
