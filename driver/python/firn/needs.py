"""The parts that a script needs its machines to have: a screen, a keyboard, a tablet.

Machines whose scripts call nothing that needs one are made without: a screen costs time at each
boot. What is seen here are the names of the calls; a script that hides them says in its machines'
descriptions what it needs.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from firn._firn import Test

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


@dataclass(frozen=True)
class Need:
    """A place in a script that needs a part."""

    line: int
    column: int
    #: The call as written.
    call: str
    part: str
    #: The machine's variable; None if it may be any machine.
    variable: str | None


def needs(tree: ast.AST, variables: Iterable[str]) -> Iterator[Need]:
    """Find what a script needs; `variables` are those of the machines."""
    nodes = list(ast.walk(tree))
    # A name that the script reassigns may be any machine.
    rebound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    rebound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    known = set(variables) - rebound
    for node in nodes:
        match node:
            case ast.Attribute(attr=call, value=value) if call in CALLS:
                name = value.id if isinstance(value, ast.Name) else None
                variable = name if name in known else None
                yield Need(node.lineno, node.col_offset + 1, call, CALLS[call], variable)
            case ast.Constant(value=str(text)):
                for word, parts in COMMANDS.items():
                    if word in text:
                        for part in parts:
                            yield Need(node.lineno, node.col_offset + 1, word, part, None)


def needs_of(test: Test) -> list[Need]:
    """Find what a test's script needs; nothing if Python cannot parse it."""
    try:
        tree = ast.parse(test.script[0])
    except (SyntaxError, ValueError):
        return []
    return list(needs(tree, test.variables))


def supplied(test: Test, everything: bool = False) -> Test:
    """Add the parts that a test's script needs, or all parts, to its machines."""
    if everything:
        return test.supplied(PARTS)
    wanted = {(need.variable, need.part) for need in needs_of(test)}
    for variable, part in wanted:
        test = test.supplied([part], variable)
    return test


def parts_of(test: Test, everything: bool = False) -> list[str]:
    """Return the parts of machines that the script creates itself."""
    if everything:
        return list(PARTS)
    return sorted({need.part for need in needs_of(test)})
