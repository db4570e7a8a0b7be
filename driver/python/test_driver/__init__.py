"""The names under which test scripts import firn's classes."""
