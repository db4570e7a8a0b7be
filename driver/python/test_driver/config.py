"""What a test consists of."""

from firn.config import DriverConfiguration, NodeConfiguration, load_driver_configuration

__all__ = ["DriverConfiguration", "NodeConfiguration", "load_driver_configuration"]
