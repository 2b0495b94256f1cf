"""What the tests of the operator share: the backends, and a fixed seed.

Enters: REGARD_REQUIRE_NATIVE, set where the compiled kernels must be there. Leaves: fixtures. Floor: above the tests.
"""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("regard", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("regard")


def need_native() -> None:
    try:
        from regard import _kernels  # noqa: F401
    except ImportError:
        if os.environ.get("REGARD_REQUIRE_NATIVE"):
            raise
        pytest.skip("needs tool: the compiled kernels (pip install -e .)")


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        need_native()
    return request.param


@pytest.fixture
def native() -> str:
    need_native()
    return "native"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20240607)
