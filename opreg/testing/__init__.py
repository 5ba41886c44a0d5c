"""Checks of operators, for `opreg check`, for `Op.check()`, for our tests and for plug-ins' tests."""

from .check import check_op as check_op
from .report import Line as Line
from .report import Report as Report
from .report import summary as summary

__all__ = ["Line", "Report", "check_op", "summary"]
