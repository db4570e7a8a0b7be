"""The variables of UEFI firmware: there is none here, which is said when something is used."""

from typing import Any, NoReturn

from firn.errors import NotHere


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def __new__(cls: type, *_arguments: object, **_named: object) -> NoReturn:
        raise NotHere(f"test_driver.efi.{name} is not for firn: its machines have no UEFI firmware")

    return type(name, (), {"__new__": __new__, "__doc__": "Not here."})
