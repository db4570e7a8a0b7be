"""Networks."""

from firn._firn import VLan

__all__ = ["VLan"]
