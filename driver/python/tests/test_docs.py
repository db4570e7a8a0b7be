"""Whether what scripts can use says what it is, and is what its stub says."""

import importlib
import inspect
import pydoc
import unittest
from collections.abc import Iterator

MODULES = ("firn._firn", "firn.machine", "firn.driver", "firn.logger", "firn.polling", "firn.retry")


def public(module_name: str) -> Iterator[tuple[str, object]]:
    """Give the public names of a module of ours, and those of its classes."""
    module = importlib.import_module(module_name)
    for name, value in inspect.getmembers(module):
        ours = str(getattr(value, "__module__", "")).startswith("firn")
        if name.startswith("_") or not ours or not callable(value):
            continue
        yield f"{module_name}.{name}", value
        if inspect.isclass(value):
            for member, what in vars(value).items():
                if not member.startswith("_"):
                    yield f"{module_name}.{name}.{member}", what


class TestDocs(unittest.TestCase):
    """Docstrings."""

    def test_everything_public_says_what_it_is(self) -> None:
        """Each name has a docstring of its own."""
        seen, bare = 0, []
        for module in MODULES:
            for name, value in public(module):
                seen += 1
                # A field's default value says nothing of itself.
                plain = value is None or isinstance(value, int | str | float | tuple | list | dict)
                if not plain and not (getattr(value, "__doc__", None) or "").strip():
                    bare.append(name)
        self.assertEqual(bare, [])
        self.assertGreater(seen, 100)

    def test_help_teaches(self) -> None:
        """What a reader of help() needs to know is there."""
        machine = importlib.import_module("firn.machine").QemuMachine
        for method, words in {
            "succeed": ["commands, timeout=None", "RequestedAssertionFailed", "machine.succeed("],
            "execute": ["timeout=900", "seconds or a timedelta", "124", "MachineError"],
            "wait_for_unit": ["timeout=900", "RequestedAssertionFailed"],
            "forward_port": ["host_port=8080, guest_port=80", "MachineError"],
            "pause": ["resume()", "MachineError", "database.pause()"],
            "resume": ["pause()", "MachineError"],
        }.items():
            text = pydoc.plain(pydoc.render_doc(getattr(machine, method)))
            for word in words:
                self.assertIn(word, text, method)


if __name__ == "__main__":
    unittest.main()
