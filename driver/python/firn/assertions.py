"""The script's assertions."""

import unittest

from firn.errors import RequestedAssertionFailed


class Case(unittest.TestCase):
    """The script's `t`, whose methods are assertions."""

    failureException = RequestedAssertionFailed


__all__ = ["Case"]
