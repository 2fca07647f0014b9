"""What gpu_pack.sh and gpu_check.sh ask Python for.

names           packages to pack, for pip
missing FOLDER  those of its wheels that this Python lacks, or has too old, one a line
build           compile the GPU kernels that this machine's GPU could use and that are not there
prune           remove kernels of other sources from the cache
size PATH...    MiB of files and folders
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

# Each with the oldest version that does. Not torch, nor what every torch comes with; not SciPy and
# scikit-learn, which only evaluation imports and which are too large. constraints.txt has versions.
PACKAGES = {
    "diffusers": "0.35",
    "importlib_metadata": "1",
    "zipp": "1",
    "safetensors": "0.8",
    "huggingface_hub": "1.32",
    "httpx2": "2",
    "httpcore2": "2",
    "h11": "0.14",
    "anyio": "4",
    "truststore": "0.10",
    "idna": "3",
    "certifi": "2024",
    "filelock": "3",
    "fsspec": "2024",
    "packaging": "23",
    "PyYAML": "6",
    "tqdm": "4.60",
    "click": "8",
    "typing_extensions": "4.10",
    "requests": "2.28",
    "urllib3": "1.26",
    "charset-normalizer": "3",
    "regex": "2023",
    "pillow": "9",
    "rich": "13",
    "markdown-it-py": "2",
    "mdurl": "0.1",
    "Pygments": "2.13",
    "pytest": "8.2",
    "pluggy": "1.5",
    "iniconfig": "1",
    "pytest-xdist": "3",
    "execnet": "2",
    "hypothesis": "6",
    "sortedcontainers": "2",
    "torchao": "0.15",
    "nvidia-cutlass": "4.2",
}


def names() -> None:
    """For pip: no versions, the constraints have them."""
    print("\n".join(PACKAGES))


def missing(folder: str) -> None:
    """Wheels to unpack here."""
    wheels = {normal(f.name.split("-")[0]): f for f in sorted(Path(folder).glob("*.whl"))}
    for name, oldest in PACKAGES.items():
        if normal(name) in wheels and not is_there(name, oldest):
            print(wheels[normal(name)])


def is_there(name: str, oldest: str) -> bool:
    """Whether this Python has the package, new enough."""
    try:
        return numbers(metadata.version(name)) >= numbers(oldest)
    except metadata.PackageNotFoundError:
        return False


def numbers(version: str) -> list[int]:
    """Of its release: 1.2.3 of 1.2.3rc1+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in found[0].split(".")] if found else []


def normal(name: str) -> str:
    """A package's name as names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build() -> None:
    """Kernels that another nvcc built count; for 9.0 the mma.sync ones are wanted too."""
    import torch

    from fxquant.kernels.cuda import build as cuda

    major, minor = torch.cuda.get_device_capability()
    capability = f"{major}.{minor}"
    archs = cuda.loads(capability)[:2] if capability == "9.0" else cuda.to_build(capability)
    there = {(b.name, b.arch) for b in cuda.built()}
    failures: list[str] = []
    for arch in archs:
        wanted = [u.name for u in cuda.selected(arch)]
        lacking = [name for name in wanted if (name, arch) not in there]
        print(f"{arch}: {len(wanted) - len(lacking)} of {len(wanted)} libraries are there")
        if lacking:
            try:
                cuda.build([arch], only=lacking, progress=print)
            except cuda.KernelBuildError as error:
                failures.append(str(error))
    if failures:
        sys.exit("\n\n".join(failures))


def prune() -> None:
    """What the sources as they are now do not make."""
    from fxquant.kernels import jit
    from fxquant.kernels.cuda import build as cuda

    usable = {b.directory for b in cuda.built()}
    for found in jit.builds():
        if found.directory not in usable:
            print(f"removing {found.directory.name}")
            shutil.rmtree(found.directory)


def size(*paths: str) -> None:
    """Of all that is there, rounded up."""
    files = (f for p in map(Path, paths) for f in ([p] if p.is_file() else p.rglob("*")))
    print(-(-sum(f.stat().st_size for f in files if f.is_file()) // 2**20))


def main() -> None:
    """One command and its arguments."""
    commands: dict[str, Callable[..., None]] = {
        "names": names, "missing": missing, "build": build, "prune": prune, "size": size,
    }  # fmt: skip
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
