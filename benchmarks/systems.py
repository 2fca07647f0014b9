"""The systems that are compared, by name; run as a script, the process that serves one.

A system whose modules are imported only in the process that serves it costs the others nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from common import digest_of_sources, installed, resident, timed, write_json
from served import Served, Settings, System
from workers import NotMeasured, answer

FP32, BF16 = "fp32 eager", "bf16 eager"


def _late(module: str, function: str) -> Callable[..., Any]:
    """The function, its module imported when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), function)(*args, **kwargs)

    return call


def _fxquant(recipe: str, attention: str = "float") -> System:
    prepare = partial(_late("system_fxquant", "prepare"), recipe=recipe, attention=attention)
    return System(_late("system_fxquant", "load"), prepare, opens=0.6)


SYSTEMS = {
    FP32: System(_late("system_torch", "fp32"), opens=1.3),
    BF16: System(_late("system_torch", "bf16"), opens=1.3),
    "bf16 torch.compile": System(_late("system_torch", "bf16_compiled"), opens=2.0),
    "PT2E Inductor int8": System(
        _late("system_torch", "pt2e_int8"), packages=("torchao",), opens=3.0
    ),
    "OpenVINO bf16": System(
        _late("system_openvino", "load"),
        _late("system_openvino", "prepare_bf16"),
        ("openvino",),
        opens=1.5,
    ),
    "OpenVINO int8": System(
        _late("system_openvino", "load"),
        _late("system_openvino", "prepare_int8"),
        ("openvino", "nncf"),
        opens=1.0,
    ),
    "ONNX Runtime int8": System(
        _late("system_onnxruntime", "load"),
        _late("system_onnxruntime", "prepare"),
        ("onnx", "onnxscript", "onnxruntime"),
        opens=1.0,
    ),
    "fxquant W8A8": _fxquant("w8a8-fast"),
    "fxquant W8A8, int8 attention": _fxquant("w8a8-fast", "int8"),
    "fxquant W4A8": _fxquant("w4a8-fast"),
}


def slug(name: str) -> str:
    """A system's name in names of files."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


def check_installed(name: str) -> None:
    """Refuse a system whose packages are missing.

    Raises:
        NotMeasured: naming them.
    """
    missing = [p for p in SYSTEMS[name].packages if installed(p) is None]
    if missing:
        raise NotMeasured(f"{', '.join(missing)}: not installed (make bench installs it)")


class Process:
    """The commands of a serving process; each answers with something for JSON."""

    def __init__(self) -> None:
        self.served: Served | None = None

    def prepare(self, name: str, settings: dict[str, Any]) -> float:
        """Write what the system loads, unless it is there; the seconds that it took."""
        chosen = Settings(**settings)
        place, system = _place(name, chosen), SYSTEMS[name]
        assert system.prepare is not None
        file, state = place / "prepared.json", _state(system, chosen)
        known = json.loads(file.read_text()) if file.exists() else {}
        if known.get("state") != state:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            _, seconds = timed(partial(system.prepare, chosen, place))
            known = {"state": state, "seconds": seconds}
            write_json(file, known)
        return float(known["seconds"])

    def load(self, name: str, settings: dict[str, Any]) -> dict[str, float]:
        """Make it ready; seconds by stage."""
        chosen = Settings(**settings)
        self.served = SYSTEMS[name].load(chosen, _place(name, chosen))
        return self.served.seconds

    def step(self) -> float:
        """Seconds of a step."""
        return timed(self._served.step)[1]

    def forget_peak(self) -> int:
        """Start the peak again; what it was."""
        peak = resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")
        return peak

    def memory(self) -> dict[str, int]:
        """Bytes: resident, of that not of a file, most that was resident."""
        return {
            "resident": resident(),
            "resident_anonymous": resident("RssAnon"),
            "peak": resident("VmHWM"),
        }

    def output(self, file: str) -> list[int]:
        """Write the result of a step; its shape."""
        result = self._served.step()
        np.save(file, result)
        return list(result.shape)

    def profile(self) -> list[tuple[str, int, float]]:
        """Time by kind of operator."""
        return self._served.profile()

    @property
    def _served(self) -> Served:
        assert self.served is not None, "load first"
        return self.served


def _place(name: str, settings: Settings) -> Path:
    return settings.file(f"{slug(name)}-{settings.prepared_key}")


def _state(system: System, settings: Settings) -> dict[str, Any]:
    """What else decides how a system is prepared: if it changed, it is prepared again."""
    versions = {package: installed(package) for package in system.packages}
    return {"calls": settings.calls, "by": versions or {"fxquant": digest_of_sources()}}


def main() -> None:
    """Serve until the pipe is closed."""
    process = Process()
    names = ("prepare", "load", "step", "forget_peak", "memory", "output", "profile")
    answer({name: getattr(process, name) for name in names})


if __name__ == "__main__":
    main()
