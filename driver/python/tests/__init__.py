"""Tests of the package that need no machine."""
