"""The text form: what it shows, what it never shows, and that it is the same everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxquant.graph.capture import capture
from fxquant.graph.dump import diff, dump, line, records
from fxquant.graph.nodes import write_note
from fxquant.graph.runner import clone
from fxquant.quant.spec import QuantSpec
from tests import models
from tests.toy import story

ROOT = Path(__file__).parents[2]
STAGES = ("capture", "mark_timestep_only", "annotate", "group_units", "select_kernels")


def text_of(name: str, start: str) -> str:
    """The line of a dump that begins with %start:."""
    found = [x for x in dump(story()[name]).splitlines() if x.startswith(f"  %{start}: ")]
    assert len(found) == 1
    return found[0].strip()


def test_sizes_are_called_batch_height_width_and_prompt_length() -> None:
    assert text_of("capture", "sample") == "%sample: f32[Bx4x2hx2w] = input"
    assert text_of("capture", "encoder_hidden_states").startswith("%encoder_hidden_states: f32[BxL")
    assert "f32[Bx(h*w)x16]" in dump(story()["strip_noops"])


def test_no_tracer_symbol_is_left() -> None:
    for name in STAGES:
        assert not re.search(r"\bs\d+\b", dump(story()[name])), name


def test_weights_are_named_inside_their_user() -> None:
    assert text_of("strip_noops", "conv2d") == (
        "%conv2d: f32[Bx16x2hx2w] = conv2d(%sample, conv_in.weight, conv_in.bias, [1, 1], [1, 1])"
    )


def test_quantised_edges_carry_their_spec_and_float_ones_do_not() -> None:
    operands = "(%silu_1:u8/t, down_resnet.conv1.weight:i8/c0, down_resnet.conv1.bias, "
    assert operands in text_of("annotate", "conv2d_1")
    assert ":u8" not in text_of("annotate", "conv2d")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (QuantSpec(8, symmetric=True), ":i8/t"),
        (QuantSpec(4), ":u4/t"),
        (QuantSpec(16, symmetric=True, channel_axis=1), ":i16/c1"),
    ],
    ids=str,
)
def test_a_spec_shows_bits_symmetry_and_granularity(spec: QuantSpec, text: str) -> None:
    gm = clone(story()["annotate"])
    layer = next(n for n in gm.graph.nodes if n.name == "conv2d_1")
    write_note(layer, quant={"input": spec.to_json(), "weight": QuantSpec().to_json()})
    assert f"(%silu_1{text}, down_resnet.conv1.weight:u8/t, " in line(layer)


def test_nodes_that_read_the_timestep_alone_are_marked() -> None:
    assert text_of("mark_timestep_only", "linear").endswith("# timestep only")
    assert "timestep only" not in text_of("mark_timestep_only", "conv2d")


def test_headings_name_modules_and_later_units() -> None:
    assert "# down_resnet.conv1  Conv2d\n" in dump(story()["annotate"])
    lowered = dump(story()["select_kernels"])
    assert "# unit down_resnet  ResnetBlock2D\n" in lowered
    assert "# unit conv_in  Conv2d\n" in lowered


def test_neutral_arguments_of_lowered_operators_are_left_out_and_others_named() -> None:
    add = text_of("select_kernels", "add_1")
    assert "residual=%conv2d" in add
    assert "kernel=gemm" in add
    assert not re.search(r"channel_add|activation|out_index|stride|dilation|weight_scale", add)
    assert "stride=[2, 2]" in text_of("select_kernels", "conv2d_3")


@pytest.mark.parametrize("name", STAGES)
def test_every_node_but_weights_and_sizes_has_one_line(name: str) -> None:
    gm = story()[name]
    shown = [x for x in dump(gm).splitlines() if not x.startswith("#")]
    nodes = [
        n
        for n in gm.graph.nodes
        if n.op != "get_attr" and not isinstance(n.meta.get("val"), (int, torch.SymInt))
    ]
    assert len(shown) == len(nodes)
    for text, node in zip(shown, nodes, strict=True):
        assert text.startswith("  return" if node.op == "output" else f"  %{node.name}: ")


@pytest.mark.parametrize("name", STAGES)
def test_a_unit_filter_keeps_the_lines_of_that_unit_alone(name: str) -> None:
    whole, part = dump(story()[name]).splitlines(), dump(story()[name], "down_resnet").splitlines()
    headings = [x for x in part if x.startswith("#")]
    assert headings
    assert all(x.removeprefix("# ").removeprefix("unit ").startswith("down_") for x in headings)
    assert 0 < len(part) < len(whole)
    assert set(part) <= set(whole)


def test_a_unit_that_does_not_exist_leaves_nothing() -> None:
    assert dump(story()["annotate"], "no_such_block").strip() == ""
    assert records(story()["annotate"], "no_such_block") == []


@pytest.mark.parametrize("name", STAGES)
def test_no_paths_addresses_or_calibrated_numbers(name: str) -> None:
    text = dump(story()[name])
    assert str(ROOT) not in text
    assert "site-packages" not in text
    assert ".py" not in text
    assert not re.search(r"\b0x[0-9a-f]{6}", text)
    table = story().fake.table.values[0, :, 0].tolist()
    assert not [s for s in table if f"{s:g}" in text]


def test_the_text_does_not_depend_on_the_values_of_weights() -> None:
    other = capture(models.build("toy", seed=1), (), models.calls("toy", 1)[0]).graph_module
    assert dump(other) == dump(story()["capture"])


SCRIPT = """
from fxquant.graph.dump import dump, records
from fxquant.graph.options import Options
from fxquant.graph.runner import run
from fxquant.graph.capture import capture
from fxquant.passes import pipelines
from tests import models
gm = capture(models.build("toy"), (), models.calls("toy", 1)[0]).graph_module
gm = run((*pipelines.PREPARE, *pipelines.OBSERVE), gm, Options())
print(dump(gm), records(gm))
"""


def test_processes_with_other_hash_seeds_write_the_same_text() -> None:
    def start(seed: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    running = [start("0"), start("4242")]
    first, second = (process.communicate()[0] for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert "%observe_0" in first
    assert first == second


def test_equal_dumps_have_no_diff() -> None:
    text = dump(story()["annotate"])
    assert diff(text, text) == ""


def test_a_diff_names_both_sides_and_shows_the_lines_that_changed() -> None:
    before, after = dump(story()["strip_noops"]), dump(story()["annotate"])
    found = diff(before, after, ("strip_noops", "annotate")).splitlines()
    assert found[:2] == ["--- strip_noops", "+++ annotate"]
    removed = [x[1:] for x in found[2:] if x.startswith("-")]
    added = [x[1:] for x in found[2:] if x.startswith("+")]
    assert removed
    assert added
    assert set(removed) <= set(before.splitlines()) - set(after.splitlines())
    assert set(added) <= set(after.splitlines()) - set(before.splitlines())


@pytest.mark.parametrize("name", STAGES)
def test_records_survive_json_and_say_what_the_dump_says(name: str) -> None:
    gm = story()[name]
    rows = records(gm)
    assert json.loads(json.dumps(rows)) == rows
    shown = [x.strip() for x in dump(gm).splitlines() if not x.startswith("#")]
    assert [row["text"] for row in rows] == shown


def test_records_hold_inputs_and_notes() -> None:
    rows = {row["name"]: row for row in records(story()["group_units"])}
    row = rows["conv2d_1"]
    assert row["op"] == "conv2d"
    assert row["value"] == "f32[Bx16x2hx2w]"
    assert row["inputs"][0] == "fq_0"
    assert row["notes"]["unit"] == ["down_resnet", "ResnetBlock2D"]
    assert row["notes"]["quant"]["input"]["bits"] == 8


def test_records_of_a_unit_are_those_of_the_dump_of_it() -> None:
    gm = story()["group_units"]
    lines = [x.strip() for x in dump(gm, "up_resnet").splitlines() if not x.startswith("#")]
    assert [row["text"] for row in records(gm, "up_resnet")] == lines


def test_one_node_can_be_shown_alone() -> None:
    node = next(n for n in story()["capture"].graph.nodes if n.name == "silu")
    assert re.fullmatch(r"%silu: f32\[\w+x32\] = silu\(%linear\)", line(node))


def test_operators_with_several_results_and_other_dtypes_are_shown() -> None:
    class Model(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            low, high = sample.half().chunk(2, dim=1)
            return (low > high).to(torch.int64)

    text = dump(capture(Model(), (torch.ones(2, 4, 8, 8),)).graph_module)
    assert "(f16[Bx2xhxw], f16[Bx2xhxw]) = chunk(" in text
    assert "bool[Bx2xhxw] = gt(" in text
    assert "i64[Bx2xhxw]" in text
