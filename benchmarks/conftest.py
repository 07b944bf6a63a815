"""Options of `pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="tiny shapes: does it run at all?")
