"""Where jobs are placed in tests."""

from dataclasses import replace
from typing import Any

import pytest

from flap_stream.engine import placement


def placed(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Place jobs as usual, except for `changes`."""
    find = placement.place
    monkeypatch.setattr(placement, "place", lambda *arguments: replace(find(*arguments), **changes))
