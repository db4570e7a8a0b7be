"""Breakpoints in a script."""

from firn.breakpoints import Debug
from firn.debug import DebugAbstract, DebugNop

__all__ = ["Debug", "DebugAbstract", "DebugNop"]
