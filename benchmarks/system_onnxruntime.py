"""ONNX Runtime: exported, statically quantised (QDQ), the rest in float32."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnxruntime
from common import reset_peak, timed
from served import Arrays, Row, Served, Settings, added

FILE = "model.onnx"


def prepare(settings: Settings, place: Path) -> None:
    """Export, quantise convolutions and matrix products, save; weights lie beside the file.

    Each stage has a process of its own: together they hold a model many times over.
    """
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        exported, inferred = Path(folder) / "exported.onnx", Path(folder) / "inferred.onnx"
        _apart(_export, settings, exported)
        _apart(_infer_shapes, exported, inferred)
        _apart(_quantise, settings, inferred, place / FILE)


def _apart(function: Callable[..., None], *args: object) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(function, *args).result()


def _infer_shapes(exported: Path, inferred: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(exported, inferred, skip_symbolic_shape=True, save_as_external_data=True)


def _quantise(settings: Settings, inferred: Path, file: Path) -> None:
    from onnxruntime import quantization

    quantization.quantize_static(
        inferred,
        file,
        _reader(settings, inferred),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        use_external_data_format=True,
    )


def load(settings: Settings, place: Path) -> Served:
    """A session on what was saved."""
    call = settings.timed()
    reset_peak()
    session, seconds = timed(lambda: _session(settings, place))
    inputs = _named(session, call)
    return Served(
        lambda: session.run(None, inputs)[0],
        lambda: _profile(settings, place),
        {"load": seconds},
    )


def _export(settings: Settings, file: Path) -> None:
    import torch
    from system_torch import flat, tensors_of

    call = settings.timed()
    with torch.no_grad():
        torch.onnx.export(
            flat(settings.arch, call), tensors_of(call), file, dynamo=True, external_data=True
        )


def _reader(settings: Settings, file: Path) -> Any:
    """Calibration inputs, as the quantiser asks for them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            import onnx  # type: ignore[import-not-found, unused-ignore]

            model = onnx.load(file, load_external_data=False)
            names = [value.name for value in model.graph.input]
            calls = settings.calibration()
            self._calls = iter([dict(zip(names, c.values(), strict=True)) for c in calls])

        def get_next(self) -> Any:
            return next(self._calls, None)

    return Reader()


def _session(settings: Settings, place: Path, profile: Path | None = None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(place / FILE, options, ["CPUExecutionProvider"])


def _named(session: Any, call: Arrays) -> Arrays:
    return dict(zip((i.name for i in session.get_inputs()), call.values(), strict=True))


def _profile(settings: Settings, place: Path) -> list[Row]:
    """A second session, which writes down when each node ran."""
    session = _session(settings, place, place / "profile")
    session.run(None, _named(session, settings.timed()))
    file = Path(session.end_profiling())
    events = [e for e in json.loads(file.read_text()) if e.get("cat") == "Node"]
    file.unlink()
    nodes = [e for e in events if e["name"].endswith("_kernel_time")]
    return added([(e["args"]["op_name"], 1, e["dur"] / 1e6) for e in nodes])
