from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """No fsync in these tests (a busy disk takes a tenth of a second for each); returns the real one."""
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    return real
