"""The pure functions' shape annotations are checked at run time while the tests run."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator

# The tests' models are small; on a busy machine two threads wait for each other far longer than one works.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

# jaxtyping's hook takes the checker by name. This one reads "float" as PEP 484 does, so that clip=1 is fine.
_checker = types.ModuleType("guerdon_test_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules[_checker.__name__] = _checker

# Only modules of pure functions and plain dataclasses: tensorclasses and nn.Modules stay as they are. Modules
# imported before this line would go unchecked, hence at the top of conftest and never in a plugin.
CHECKED = ["guerdon.objectives", "guerdon.credit", "guerdon.policies.schedule"]
jaxtyping.install_import_hook(CHECKED, "guerdon_test_checker.check")

# the machine may be busy: a slow example is no failure
hypothesis.settings.register_profile("guerdon", deadline=None, max_examples=50)
hypothesis.settings.load_profile("guerdon")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checker, which would speak first: for tests of the sentences that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
