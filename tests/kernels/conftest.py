"""What tests of Triton kernels share: a device, and memory that shows what was not written."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU, on which tests/conftest.py has Triton interpret."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer, until something is written to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
