"""QEMU's key names by the characters that they type on a US keyboard."""

from firn._firn import CHAR_TO_KEY

__all__ = ["CHAR_TO_KEY"]
