"""The keys of an American keyboard by the characters that they type, as QEMU names keys."""

from firn._firn import CHAR_TO_KEY

__all__ = ["CHAR_TO_KEY"]
