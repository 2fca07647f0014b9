"""Damaged and forged models: each loads as it was or is refused, with the file and field named.

Nothing a file says may crash, hang, fill the memory, write or execute anything.
"""

from __future__ import annotations

import json
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import fxquant
from fxquant import QuantizedModel
from fxquant.errors import ArtifactError
from fxquant.runtime.manifest import FORMAT
from tests.runtime import compiled as c
from tests.runtime import saved
from tests.runtime.damage import Saved, damage, forged

SECONDS = 5
# Beyond what loading the undamaged model takes and twice the files: caches, the source lines that
# torch reads to explain an error, malloc's arenas. A size taken at its word would ask for more.
PYTHON_SLACK = 4 << 20
RESIDENT_SLACK = 16 << 20


class Trial:
    """A saved model, what loading it takes, and its result."""

    def __init__(self, model: QuantizedModel, call: c.Call, folder: Path):
        self.source = folder / "good"
        self.target = folder / "bad"
        self.call = call
        model.save_pretrained(self.source)
        self.truth = c.result(model, call)
        self.size = sum(len(content) for content in saved.files(self.source).values())
        fxquant.load(self.source)  # imports and caches
        with measured() as good:
            fxquant.load(self.source)
        self.good = good

    def run(self, seed: int) -> str:
        """Damage a copy, load it, and run it if it loads. What came of it, in a word."""
        done, fits = damage(self.source, self.target, seed)
        before = listing(self.target.parent)
        model: QuantizedModel | None = None
        complaint = str(self.target)
        with measured(heap=seed % 5 == 0) as spent, time_limit(SECONDS, f"{seed}: {done}"):
            try:
                model = fxquant.load(self.target)
            except ArtifactError as error:
                complaint = str(error)
        assert str(self.target) in complaint, (seed, done, complaint)
        self.check_memory(spent, f"{seed}: {done}")
        assert listing(self.target.parent) == before, (seed, done)
        return "refused" if model is None else self.check(model, fits, f"{seed}: {done}")

    def check_memory(self, spent: dict[str, int], done: str) -> None:
        """No more than loading the good one takes, and twice the files."""
        files = [p.stat().st_size for p in self.target.iterdir() if p.is_file()]
        allowed = 2 * max(self.size, sum(files))
        assert spent["python"] <= self.good["python"] + allowed + PYTHON_SLACK, (spent, done)
        assert spent["resident"] <= self.good["resident"] + allowed + RESIDENT_SLACK, (spent, done)

    def check(self, model: QuantizedModel, fits: bool, done: str) -> str:
        """What loads is what was saved, unless it was forged; then it must still run safely."""
        try:
            same = torch.equal(c.result(model, self.call), self.truth)
        except (fxquant.errors.CallError, RuntimeError):  # a forged signature or constant
            same = False
        assert same or fits, done
        return "same" if same else "other"


def listing(folder: Path) -> dict[str, Any]:
    """Every file below a folder with its size and time of change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


@contextmanager
def measured(heap: bool = True) -> Iterator[dict[str, int]]:
    """Peak growth of resident memory within, and of Python's heap, which takes longer to watch."""
    spent: dict[str, int] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what there is
    resident = memory("VmRSS")
    if heap:
        tracemalloc.start()
    try:
        yield spent
    finally:
        spent["python"] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        spent["resident"] = memory("VmHWM") - resident


def memory(what: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{what}:"))


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Of processor time, since other processes may keep us waiting."""

    def stop(*_: Any) -> None:
        raise TimeoutError(what)

    was = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, was)


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(saved.mite(), c.mite_calls(1)[0], tmp_path)


def test_150_damaged_models_load_right_or_not_at_all(trial: Trial) -> None:
    outcomes = [trial.run(seed) for seed in range(150)]
    assert outcomes.count("refused") > 100
    assert outcomes.count("same") + outcomes.count("other") > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_2000_damaged_models_load_right_or_not_at_all(part: int, tmp_path: Path) -> None:
    model, call = saved.mite(), c.mite_calls(1)[0]
    if part % 2:
        model, call = saved.toy("w4a8-fast"), c.mixed_call(3)
    trial = Trial(model, call, tmp_path)
    outcomes = [trial.run(1000 * (part + 1) + seed) for seed in range(500)]
    assert outcomes.count("refused") > 350


Change = Callable[[Saved], None]


def node(saved_model: Saved, op: str) -> dict[str, Any]:
    """The first node that calls an operator."""
    found: dict[str, Any] = next(n for n in saved_model.graph["nodes"] if n["op"] == op)
    return found


def added(*nodes: dict[str, Any]) -> Change:
    """Nodes put before all others."""

    def change(forged_model: Saved) -> None:
        forged_model.graph["nodes"][:0] = nodes

    return change


def argument(op: str, position: int, value: Any) -> Change:
    """Another argument of a call."""

    def change(forged_model: Saved) -> None:
        node(forged_model, op)["args"][position] = value

    return change


def renamed_tensor(name: str) -> Change:
    """A tensor under another name, everywhere."""

    def change(forged_model: Saved) -> None:
        old = "conv.weight"
        graph = json.dumps(forged_model.graph).replace(f'"{old}"', json.dumps(name))
        forged_model.graph = json.loads(graph)
        forged_model.header[f"graph.{name}"] = forged_model.header.pop(f"graph.{old}")

    return change


def manifest(path: str, value: Any) -> Change:
    """Another value in fxquant.json."""

    def change(forged_model: Saved) -> None:
        *owners, key = path.split(".")
        owner = forged_model.manifest
        for part in owners:
            owner = owner[part]
        owner[key] = value

    return change


def doubling(count: int) -> Change:
    """A size squared again and again."""
    nodes = [{"name": "n0", "op": "aten.sym_size.int", "args": [{"node": "sample"}, 0]}]
    for k in range(count):
        square = {"name": f"n{k + 1}", "op": "operator.mul", "args": [{"node": f"n{k}"}] * 2}
        nodes.append(square)
    return added(*nodes)


def stretched(header: Saved) -> None:
    header.header["graph.conv.weight"]["shape"] = [2**30, 2**30, 2**30]


def text(op: str, *args: Any) -> Change:
    return added({"name": "extra", "op": op, "args": list(args)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (argument("fxquant.conv2d.default", 2, 10**6), r"nodes\[\d+\]: x_index is not an integer"),
        (argument("fxquant.conv2d.default", 2, -1), r"x_index is not an integer from 0"),
        (argument("fxquant.conv2d.default", 15, 99), r"out_index is not an integer"),
        (argument("fxquant.conv2d.default", 11, 3), r"groups do not divide"),
        (argument("fxquant.conv2d.default", 8, [0, 0]), r"stride is not 2 integers from 1"),
        (argument("fxquant.conv2d.default", 7, [9, 9]), r"the weight is not"),
        (argument("fxquant.conv2d.default", -1, "onednn"), r"another kernel"),
        (argument("fxquant.conv2d.default", 1, {"node": "sample"}), r"does not read the input"),
        (argument("fxquant.conv2d.default", 3, {"tensor": "../x"}), r"no tensor is called '../x'"),
        (argument("fxquant.conv2d.default", 0, {"node": "later"}), r"no earlier node"),
        (text("os.system", "touch pwned"), r"nodes\[0\].op: \"os.system\" is no operator"),
        (text("aten.from_file.default", "/etc/passwd"), r"op: \"aten.from_file.default\""),
        (text("aten.ones.default", [2**40, 2**20]), r"nodes\[0\]"),
        (text("aten.ones.default", [2**30, 2**30]), r"elements"),
        (text("aten.zeros.default", [0, 2**40]), r"elements"),
        (text("aten.set_.source_Tensor", {"node": "sample"}, {"node": "row"}), r"is no operator"),
        (text("aten.as_strided.default", {"node": "sample"}, [99], [99]), r"is no operator"),
        (text("aten.empty.memory_format", [99]), r"is no operator"),
        (text("aten.__class__.default"), r"is no operator"),
        (text("aten.add.__class__", 1, 1), r"is no operator"),
        (text("aten._ops.default"), r"is no operator"),
        (text("prims.add.default", 1, 1), r"is no operator"),
        (text("aten._fft_r2c.default", {"node": "sample"}, [2**62], 0, True), r"are not there"),
        (text("aten.to_sparse.default", {"node": "sample"}), r"is no operator"),
        (text("aten.unique_dim.default", {"node": "sample"}, 0), r"depends on values"),
        (text("aten.sym_size.default", {"node": "sample"}), r"instead of a tensor"),
        (text("operator.pow", 10**9, 10**9), r"exponent"),
        (text("operator.lshift", 1, 2**40), r"exponent"),
        (text("math.floor", {"slice": [1, 2, 3]}), r"no size"),
        (text("operator.mul", "x" * 60, 2**60), r"no size"),
        (text("operator.getitem", {"node": "sample"}, 0), r"no list"),
        (doubling(64), r"too large"),
        (renamed_tensor("../../etc/passwd"), r"not a name that a tensor"),
        (renamed_tensor("graph.weight"), r"not a name that a tensor"),
        (renamed_tensor("forward"), r"not a name that a tensor"),
        (renamed_tensor("a\");import os;os.abort()#"), r"not a name that a tensor"),
        (manifest("model.name", "../model-0123456789abcdef.safetensors"), r"model.name"),
        (manifest("model.name", "/etc/passwd"), r"model.name"),
        (manifest("original.class", "os.system"), r"original.class"),
        (manifest("original.class", "diffusers.utils.Thing"), r"original.class"),
        (manifest("original.config", {"pop": 1}), r"original.config.pop"),
        (manifest("recipe.weight_bits", "eight"), r"recipe"),
        (manifest("recipe.nothing", 1), r"recipe"),
        (manifest("signature.ranks", [4, 9]), r"signature"),
        (manifest("surprise", 1), r"unknown key"),
        (stretched, r"spans"),
    ],
)  # fmt: skip
def test_forgeries_are_refused_by_field(change: Change, complaint: str, trial: Trial) -> None:
    forgery = Saved(trial.source)
    trial.target.mkdir()
    change(forgery)
    model = forgery.manifest.get("model", {}).get("name", "")
    forgery.write(trial.target)
    if isinstance(model, str) and ("/" in model):  # writing made it right again
        forgery.manifest["model"]["name"] = model
        (trial.target / "fxquant.json").write_text(forged(forgery.manifest))
    with measured() as spent, pytest.raises(ArtifactError, match=complaint):
        fxquant.load(trial.target)
    trial.check_memory(spent, complaint)


def test_names_are_never_executed(trial: Trial) -> None:
    """Node names end up in generated code."""
    for name in ("x = 1; raise SystemExit", "import", "a\nb", "print", "é", "__import__"):
        forgery = Saved(trial.source)
        shutil.rmtree(trial.target, ignore_errors=True)
        trial.target.mkdir()
        forgery.graph = json.loads(json.dumps(forgery.graph).replace('"conv2d"', json.dumps(name)))
        forgery.write(trial.target)
        with pytest.raises(ArtifactError, match="name"):
            fxquant.load(trial.target)


def test_a_newer_format_is_refused_with_a_remedy(trial: Trial) -> None:
    path = trial.source / "fxquant.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    with pytest.raises(ArtifactError, match="pip install -U fxquant"):
        fxquant.load(trial.source)


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "holds no saved model"),
        ({"config.json": "{}", "diffusion_pytorch_model.safetensors": ""}, "a diffusers model"),
        ({"model_index.json": "{}"}, "diffusers pipeline"),
        ({"fxquant.json": '{"hello": 1}'}, "lacks 'format'"),
    ],
)
def test_foreign_folders_are_recognised(
    files: dict[str, str], complaint: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ArtifactError, match=complaint) as caught:
        fxquant.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    if "config.json" in files or "model_index.json" in files:
        assert "fxquant.compile" in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        fxquant.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a folder"):
        fxquant.load(tmp_path / "file")


def test_another_models_tensors_do_not_fit(trial: Trial, tmp_path: Path) -> None:
    saved.toy().save_pretrained(tmp_path / "other")
    forgery, other = Saved(trial.source), Saved(tmp_path / "other")
    trial.target.mkdir()
    forgery.header, forgery.data = other.header, other.data
    forgery.write(trial.target)
    with pytest.raises(ArtifactError, match="the graph does not use"):
        fxquant.load(trial.target)
