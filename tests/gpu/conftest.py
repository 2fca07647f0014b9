"""Tests that need a GPU: skipped, with the reason, where PyTorch has none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    """Skip where there is no GPU; float32 is float32, not TF32."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and PyTorch can use none here (torch.cuda.is_available())")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _context(_gpu: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """After a kernel that reads what is not its own, nothing runs on this process's GPU: say so,
    and stop instead of failing all that follows. A worker of pytest-xdist is replaced."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        what = f"{request.node.nodeid}: the CUDA context is lost: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            os.write(2, f"{what}\n".encode())
            os._exit(3)
        pytest.exit(what, returncode=3)
