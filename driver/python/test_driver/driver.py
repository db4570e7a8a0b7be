"""A test run."""

from firn.assertions import Case as AssertionTester
from firn.config import (
    DriverConfiguration,
    NodeConfiguration,
    load_driver_configuration,
    pythonize_name,
)
from firn.driver import Driver
from firn.driver import VhostVsock as VHostDeviceVsock
from firn.polling import PollingCondition
from firn.retry import retry

__all__ = [
    "AssertionTester",
    "Driver",
    "DriverConfiguration",
    "NodeConfiguration",
    "PollingCondition",
    "VHostDeviceVsock",
    "load_driver_configuration",
    "pythonize_name",
    "retry",
]
