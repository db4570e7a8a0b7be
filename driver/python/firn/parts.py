"""The parts that a script needs its machines to have: a screen, a keyboard, a tablet.

Machines whose scripts call nothing that needs one are made without: a screen costs time at each
boot. What is seen here are the names of the calls; a script that hides them says in its machines'
descriptions what it needs.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from firn._firn import Test
    from firn.needs import Need

#: All such parts.
PARTS = ("screen", "keyboard", "tablet")

#: Methods of machines, and the parts each needs. An X server needs a screen to start.
CALLS = {
    "get_screen_text": "screen",
    "get_screen_text_variants": "screen",
    "get_window_names": "screen",
    "screenshot": "screen",
    "send_chars": "keyboard",
    "send_key": "keyboard",
    "wait_for_text": "screen",
    "wait_for_window": "screen",
    "wait_for_x": "screen",
}

#: Commands of QEMU's monitors, and the parts each needs.
COMMANDS = {
    "input-send-event": ("keyboard", "tablet"),
    "screendump": ("screen",),
    "send-key": ("keyboard",),
    "sendkey": ("keyboard",),
}


def needs_of(test: Test, text: str) -> list[Need]:
    """Find what a script of this text needs; nothing if Python cannot parse it."""
    # Most scripts need nothing, and reading one as Python takes longer than all else at the start.
    if not any(word in text for word in (*CALLS, *COMMANDS)):
        return []
    from firn.needs import needs_of_text

    return needs_of_text(text, test.variables)


def supplied(test: Test, everything: bool = False, more: Iterable[str] = ()) -> Test:
    """Add the parts that a test's script and `more` texts need, or all parts, to its machines."""
    if everything:
        return test.supplied(PARTS)
    texts = (test.script[0], *more)
    wanted = {(need.variable, need.part) for text in texts for need in needs_of(test, text)}
    for variable, part in wanted:
        test = test.supplied([part], variable)
    return test


def parts_of(test: Test, everything: bool = False) -> list[str]:
    """Return the parts of machines that the script creates itself."""
    if everything:
        return list(PARTS)
    return sorted({need.part for need in needs_of(test, test.script[0])})
