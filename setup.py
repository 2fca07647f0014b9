"""Packaging. Compiles nothing, downloads nothing, imports nothing of fxquant.

The three source folders become one package: ``passes/`` is ``fxquant.passes`` and ``kernels/`` is
``fxquant.kernels``. Work on it through ``pip install -e .`` (strict editable installs do not work).
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PACKAGE_DIR = {"fxquant": "fxquant", "fxquant.passes": "passes", "fxquant.kernels": "kernels"}


def version() -> str:
    """The version in fxquant/_version.py, read as text."""
    text = (ROOT / "fxquant" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if not found:
        raise RuntimeError('fxquant/_version.py has no line __version__ = "..."')
    return found[1]


def long_description() -> str:
    """README.md, or nothing in a tree without it."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


def packages(name: str, folder: str) -> list[str]:
    """`name` and its sub-packages, by full dotted name: every folder below with an __init__.py."""
    base = ROOT / folder
    inner = sorted(init.parent.relative_to(base) for init in base.glob("**/__init__.py"))
    return [name, *(".".join((name, *path.parts)) for path in inner if path.parts)]


setup(
    name="fxquant",
    version=version(),
    description="Turns a diffusers UNet into the same module with native int8 arithmetic",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The fxquant authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir=PACKAGE_DIR,
    packages=[p for name, folder in PACKAGE_DIR.items() for p in packages(name, folder)],
    include_package_data=False,
    package_data={
        "fxquant": ["py.typed"],
        "fxquant.assets": ["**/*.safetensors", "**/*.json", "**/*.md"],
        "fxquant.kernels": ["**/*.cpp", "**/*.cu", "**/*.cuh", "**/*.h", "**/*.json"],
    },
    zip_safe=False,
    install_requires=[
        "torch>=2.11",
        "diffusers>=0.35,<1",
        "safetensors",
        "numpy",
        "scipy",
        "scikit-learn",
        "tqdm",
        "rich",
    ],
    extras_require={
        "cuda": ["nvidia-cutlass==4.2.0.0", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm"],
        "eval": ["torchmetrics", "torchvision", "torch-fidelity", "transformers"],
        "plots": ["matplotlib"],
        "bench": ["matplotlib", "openvino", "nncf", "onnx", "onnxruntime", "onnxscript", "torchao"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "matplotlib",
            "pdoc",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["fxquant = fxquant.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
