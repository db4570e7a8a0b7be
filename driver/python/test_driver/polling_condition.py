"""Conditions that have to hold while a part of a script runs."""

from firn.errors import PollingConditionError
from firn.polling import PollingCondition

__all__ = ["PollingCondition", "PollingConditionError"]
