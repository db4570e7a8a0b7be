"""Windows on a guest's screen, listed by commands to its X server."""

from __future__ import annotations

from firn._firn import Machine
from firn.retry import retry_on

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re

    from firn.duration import Duration

#: The name of a window, in a line of xwininfo.
_NAME = r'0x[0-9a-f]+ "(.*?)"'


class Windows(Machine):
    """A machine's methods about its X server."""

    def wait_for_x(self, timeout: Duration = 900) -> None:
        """Wait until the guest's X server takes connections and its session has started.

        timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed
        after it.
        """
        session = (
            'journalctl -b SYSLOG_IDENTIFIER=systemd | grep "Reached target Current graphical"'
        )

        def ready(_last: bool) -> bool:
            return self.execute(f"{session} && test -e /tmp/.X11-unix/X0")[0] == 0

        with self.nested("waiting for the X11 server"):
            retry_on(lambda: self._now, ready, timeout)

    def get_window_names(self) -> list[str]:
        """Return the names of all windows of the guest's X server. Needs xwininfo in the guest."""
        import re

        lines = self.succeed("xwininfo -root -tree").splitlines()
        return [found[1] for line in lines if (found := re.search(_NAME, line))]

    def wait_for_window(self, regexp: str | re.Pattern[str], timeout: Duration = 900) -> None:
        """Wait until there is a window whose name matches a regular expression.

        timeout: seconds or a timedelta; 900 seconds by default. Raises RequestedAssertionFailed
        after it.
        """
        import re

        pattern = re.compile(regexp)

        def visible(last: bool) -> bool:
            names = self.get_window_names()
            if last:
                self.log(
                    f"Last chance to match {pattern.pattern} on the window list, "
                    f"which currently contains: {', '.join(names)}"
                )
            return any(pattern.search(name) for name in names)

        with self.nested("waiting for a window to appear"):
            retry_on(lambda: self._now, visible, timeout)
