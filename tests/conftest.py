"""Options and settings every test shares."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples on every run and no time limit: a busy machine must not turn a test red.
settings.register_profile("edgeprune", deadline=None, derandomize=True)
settings.load_profile("edgeprune")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/*.txt from what is computed now"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Return whether golden files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))
