"""A failing test on the lab prints what the services said meanwhile."""

from tests.lab.telling import pytest_runtest_makereport as pytest_runtest_makereport
