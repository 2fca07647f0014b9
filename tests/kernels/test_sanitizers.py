"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxquant.kernels import jit
from fxquant.kernels.machine import detect
from fxquant.kernels.x86 import build

HERE = Path(__file__).parent
KERNELS = ("attention", "gemm", "producers")
SUITES = {
    "attention": "test_attention.py",
    "gemm": "test_gemm.py",
    "producers": "test_producers.py",
}
COMPILER = jit.find_compiler()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        detect().arch != "x86_64" or COMPILER is None, reason="needs x86-64 and a compiler"
    ),
]


@pytest.mark.parametrize("kernel", KERNELS)
def test_addresses_and_undefined_behaviour(kernel: str, tmp_path: Path) -> None:
    runtime = _runtime("libasan.so")
    flags = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"
    environment = {
        **os.environ,
        "FXQUANT_CXXFLAGS": flags,
        "FXQUANT_CACHE": str(tmp_path),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python does not free everything
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = str(HERE / SUITES[kernel])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    command += ["-k", "not level and not older_cpus"]  # these compile again, for other CPUs
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert any("-fsanitize=address" in f.read_text() for f in tmp_path.glob(f"{kernel}-*/command*"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_races(kernel: str, tmp_path: Path) -> None:
    _runtime("libtsan.so")
    if subprocess.run(["setarch", "-R", "true"], check=False).returncode:
        pytest.skip("the address space cannot be fixed here")
    program = tmp_path / "races"
    source = Path(build.__file__).with_name(f"{kernel}.cpp")
    command = [str(COMPILER), *build.flags(), "-O1", "-g", "-fno-openmp", "-fsanitize=thread"]
    command += ["-pthread", "-DFXQUANT_PLAIN_THREADS", f'-DKERNEL="{source}"']
    command += [f"-D{kernel.upper()}", str(HERE / "races.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    # A fixed address space: newer kernels place things where old runtimes do not expect them.
    done = subprocess.run(
        ["setarch", "-R", str(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def _runtime(library: str) -> str:
    """The path of a sanitizer's runtime; skips where the compiler has none."""
    found = subprocess.run(
        [str(COMPILER), f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"the compiler has no {library}")
    return found
