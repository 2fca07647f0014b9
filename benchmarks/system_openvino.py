"""OpenVINO: the model as it converts it, and what NNCF makes of that; the rest in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino
from common import reset_peak, timed
from numpy.typing import NDArray
from served import Row, Served, Settings, added

FILE = "model.xml"


def prepare_bf16(settings: Settings, place: Path) -> None:
    """Convert and save."""
    openvino.save_model(_converted(settings), place / FILE)


def prepare_int8(settings: Settings, place: Path) -> None:
    """Convert, quantise every operator that NNCF knows, save."""
    import nncf

    calls = [list(call.values()) for call in settings.calibration()]
    quantised = nncf.quantize(
        _converted(settings),
        nncf.Dataset(calls),
        subset_size=len(calls),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        fast_bias_correction=True,
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
        ),
    )
    openvino.save_model(quantised, place / FILE)


def load(settings: Settings, place: Path) -> Served:
    """Compile for this processor what was saved."""
    inputs = list(settings.timed().values())
    reset_peak()
    model, seconds = timed(lambda: _compiled(settings, place))
    request = model.create_infer_request()

    def step() -> NDArray[Any]:
        return request.infer(inputs)[0]

    return Served(step, lambda: _profile(settings, place, inputs), {"load": seconds})


def _converted(settings: Settings) -> Any:
    """The float32 model, its shapes fixed."""
    import torch
    from system_torch import flat, tensors_of

    call = settings.timed()
    with torch.no_grad():
        return openvino.convert_model(
            flat(settings.arch, call),
            example_input=tensors_of(call),
            input=[list(array.shape) for array in call.values()],
        )


def _compiled(settings: Settings, place: Path, **more: str) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": str(settings.threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(place / FILE, "CPU", options | more)


def _profile(settings: Settings, place: Path, inputs: list[NDArray[Any]]) -> list[Row]:
    """A second copy, which keeps count."""
    request = _compiled(settings, place, PERF_COUNT="YES").create_infer_request()
    for _ in range(2):
        request.infer(inputs)
    rows = [
        (f"{i.node_type} {i.exec_type}", 1, i.real_time.total_seconds())
        for i in request.get_profiling_info()
        if i.real_time
    ]
    return added(rows)
