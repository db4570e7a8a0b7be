"""A test's configuration as the NixOS test framework writes it, under upstream's names."""

import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from firn._firn import Test


@dataclass
class NodeConfiguration:
    """A machine: its name, and the file that starts it."""

    name: str
    start_script: Path


@dataclass
class DriverConfiguration:
    """A test: its machines, networks, limits and script."""

    vms: dict[str, NodeConfiguration]
    test_script: Path
    containers: dict[str, NodeConfiguration] = field(default_factory=dict)
    vlans: list[int] = field(default_factory=list)
    global_timeout: float | None = None
    enable_ssh_backdoor: bool = False

    @classmethod
    def of(cls, test: Test) -> "DriverConfiguration":
        """Return a test's configuration. It lists the machines that have files of their own."""
        _, script, _ = test.script
        return cls(
            vms={name: NodeConfiguration(name, path) for name, path in test.files.items()},
            test_script=Path(script),
            vlans=test.vlans,
            global_timeout=test.global_timeout,
            enable_ssh_backdoor=test.ssh_backdoor,
        )


def load_driver_configuration(file_path: str | PathLike[str]) -> DriverConfiguration:
    """Read the file of `nixos-test-driver --config`."""
    return DriverConfiguration.of(Test.from_driver_file(file_path))


def read_test(path: Path) -> Test:
    """Read a test's description: a TOML file, or the file of `nixos-test-driver --config`."""
    return Test.from_toml_file(path) if path.suffix == ".toml" else Test.from_driver_file(path)


def pythonize_name(name: str) -> str:
    """Return the name of the script's variable for a machine of this name."""
    return re.sub(r"^[^A-Za-z_]|[^A-Za-z0-9_]", "_", name)
