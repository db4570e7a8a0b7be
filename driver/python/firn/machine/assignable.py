"""Attributes that scripts may assign to. The types are in a stub: `typing` takes long to import."""


class assignable:
    """A computed attribute that a script may override by assigning to it."""

    def __init__(self, get):
        """Take the function that computes it."""
        self._get = get
        self.__doc__ = get.__doc__

    def __get__(self, machine, owner):
        """Compute the value."""
        return self if machine is None else self._get(machine)
