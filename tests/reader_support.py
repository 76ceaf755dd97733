"""What the tests of readers share."""

from __future__ import annotations

import pytest

from pt2_core.errors import PT2Error


def refused(words: str):
    """One line with these words."""
    return pytest.raises(PT2Error, match=rf"^[^\n]*{words}[^\n]*$")
