"""Breakpoints in a script."""

from firn.debug import Debug, DebugAbstract, DebugNop

__all__ = ["Debug", "DebugAbstract", "DebugNop"]
