"""Finds the calls in a script that need parts of its machines."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from firn.parts import CALLS, COMMANDS


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


def needs_of_text(script: str, variables: Iterable[str]) -> list[Need]:
    """Find what a script needs; nothing if Python cannot parse it."""
    try:
        tree = ast.parse(script)
    except (SyntaxError, ValueError):
        return []
    return list(needs(tree, variables))
