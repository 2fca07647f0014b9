"""Building GPU libraries ahead of time, with a script in nvcc's place."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fxquant.kernels import jit
from fxquant.kernels.cuda import build, gate, nvcc
from fxquant.kernels.cuda.unit import ARCHES, Unit
from fxquant.kernels.cutlass import headers
from fxquant.kernels.cutlass.tiles import TILES

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SOURCE = (
    'extern "C" int fxquant_abi_version() { return 1; }\nextern "C" int size() { return SIZE; }'
)
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "release $RELEASE, V$RELEASE.88"; exit; fi
here=$(dirname "$0")
for word; do case "$word" in *.cu) source=$word;; esac; out=$word; done
case "$*" in *SIZE=13*) echo "unlucky.cu(1): error: bad luck" >&2; exit 1;; esac
case "$*" in *SIZE=99*) touch $here/asleep; sleep 60;; esac
echo $(basename $source) $* >> $here/compiled
exec g++ -shared -fPIC $(for word; do case "$word" in -D*) echo $word;; esac; done) \
  -x c++ "$source" -o "$out"
"""
UNITS = (
    Unit("one", "cuda/small.cu", ("80", "90"), (("SIZE", 1),)),
    Unit("two", "cuda/small.cu", ("80", "90a"), (("SIZE", 2),)),
    Unit("mm", "cutlass/mm.cu", ("90a",), (("SIZE", 3),)),
)
IN_A_PROCESS = """
import sys
from pathlib import Path
from fxquant.kernels.cuda import build, gate
from fxquant.kernels.cuda.unit import Unit
build._KERNELS, gate.check = Path(sys.argv[1]), lambda *_, **__: None
build.UNITS = (
    Unit("one", "cuda/small.cu", ("80",), (("SIZE", 1),)),
    Unit("slow", "cuda/small.cu", ("80",), (("SIZE", 99),)),
)
build.build(["80"], jobs=1)
"""


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a false nvcc 13.0, and all that is compiled: three units of two sources."""
    folder, kernels, cutlass = tmp_path / "bin", tmp_path / "kernels", tmp_path / "cutlass"
    for made in (folder, kernels / "cuda", kernels / "cutlass"):
        made.mkdir(parents=True)
    for name in ("nvcc", "cuobjdump", "nvdisasm"):
        (folder / name).write_text(NVCC)
        (folder / name).chmod(0o755)
    (kernels / "cuda" / "small.cu").write_text(SOURCE)
    (kernels / "cutlass" / "mm.cu").write_text(SOURCE)
    use_cutlass(cutlass, "4, 2, 0")
    monkeypatch.setenv("RELEASE", "13.0")
    monkeypatch.setenv("CUDACXX", str(folder / "nvcc"))
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FXQUANT_CUTLASS", str(cutlass))
    monkeypatch.setattr(build, "_KERNELS", kernels)
    monkeypatch.setattr(build, "UNITS", UNITS)
    monkeypatch.setattr(gate, "check", lambda library, unit, arch: None)
    return folder


def use_cutlass(folder: Path, version: str) -> None:
    """Headers of a version."""
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split(", "), strict=True)
    text = "".join(f"#define CUTLASS_{part} {number}\n" for part, number in parts)
    (folder / "cutlass" / "util").mkdir(parents=True, exist_ok=True)
    (folder / "cutlass" / "version.h").write_text(text)
    (folder / "cutlass" / "util" / "packed_stride.hpp").touch()


def compiled(tools: Path) -> int:
    """How often something was compiled."""
    log = tools / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def release(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The false nvcc becomes another one."""
    monkeypatch.setenv("RELEASE", version)
    nvcc._says.cache_clear()
    build._shelf.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> None:
    """Every test finds its own nvcc and cache."""
    nvcc._says.cache_clear()
    build._shelf.cache_clear()


def test_all_units_of_the_architectures_are_built_once(tools: Path) -> None:
    said: list[str] = []
    made = build.build(["80", "90a"], jobs=2, progress=said.append)
    assert [d.name.rpartition("-")[0] for d in made] == [
        "one-80-nvcc13.0.88",
        "two-80-nvcc13.0.88",
        "two-90a-nvcc13.0.88",
        "mm-90a-nvcc13.0.88_cutlass4.2.0",
    ]
    assert said[0] == "4 libraries to build, 0 there already"
    assert said[-1].startswith("[4/4] ")
    assert all(" built in " in line for line in said[1:])
    assert build.build(["80", "90a"]) == made
    assert compiled(tools) == 4
    assert {b.name: b.arch for b in build.built() if b.arch != "80"} == {"two": "90a", "mm": "90a"}
    assert (made[3] / "command.txt").read_text().startswith(os.environ["CUDACXX"])


def test_only_what_is_asked_for(tools: Path) -> None:
    assert len(build.build(["80", "90a"], only=["tw", "mm"])) == 3
    assert compiled(tools) == 3
    with pytest.raises(jit.KernelBuildError, match="no unit has 'tow' in its name"):
        build.build(["80"], only=["tow"])
    with pytest.raises(jit.KernelBuildError, match="no kernels for architecture 91"):
        build.build(["91"])


def test_a_gpu_takes_the_libraries_that_it_runs(tools: Path) -> None:
    build.build(["80", "90", "90a"])
    assert build.available("8.0") == build.available("8.9") == {"one", "two"}
    assert build.available("9.0") == {"one", "two", "mm"}
    assert build.available("12.0") == frozenset()
    assert build.opened("two", "8.6").size() == 2
    assert build.opened("mm", "9.0").size() == 3
    with pytest.raises(jit.KernelBuildError, match=r"no library mm for .* 8\.9; .*89"):
        build.opened("mm", "8.9")
    with pytest.raises(jit.KernelBuildError, match=r"capability 12\.0; none can be built"):
        build.opened("one", "12.0")


@pytest.mark.parametrize(
    ("capability", "runs", "to_build"),
    [
        ("7.5", (), ()),
        ("8.0", ("80",), ("80",)),
        ("8.6", ("86", "80"), ("86",)),
        ("8.7", ("86", "80"), ("86",)),
        ("8.9", ("89", "86", "80"), ("89",)),
        ("9.0", ("90a", "90"), ("90a", "90")),
        ("10.0", (), ()),
    ],
)
def test_what_runs_where(capability: str, runs: tuple[str, ...], to_build: tuple[str, ...]) -> None:
    assert build.loads(capability) == runs
    assert build.to_build(capability) == to_build


def test_another_nvcc_builds_its_own_and_serves_where_there_is_no_other(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = build.build(["80"], only=["one"])
    release(monkeypatch, "13.1")
    assert build.opened("one", "8.0") is jit.opened(old, 1)
    (new,) = build.build(["80"], only=["one"])
    assert "nvcc13.1.88" in new.name
    assert build.opened("one", "8.0") is jit.opened(new, 1)
    release(monkeypatch, "13.0")
    assert build.opened("one", "8.0") is jit.opened(old, 1)
    monkeypatch.setenv("CUDACXX", "no-such-program")
    build._shelf.cache_clear()
    assert build.available("8.0") == {"one"}, "it needs no nvcc"


def test_other_sources_headers_or_cutlass_are_built_anew(tools: Path) -> None:
    kernels = build._KERNELS
    build.build(["90a"])
    (kernels / "cutlass" / "epilogue.h").write_text("// only for what uses CUTLASS\n")
    build.build(["90a"])
    assert compiled(tools) == 3
    (kernels / "cuda" / "numbers.cuh").write_text("// for all\n")
    build._shelf.cache_clear()
    assert build.available("9.0") == frozenset()
    build.build(["90a"])
    assert compiled(tools) == 5
    use_cutlass(Path(os.environ["FXQUANT_CUTLASS"]), "4, 2, 1")
    build.build(["90a"])
    assert compiled(tools) == 6


def test_what_another_gate_let_through_is_built_anew(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(str(gate.__file__)) in build._GATE
    file = tools / "gate.py"
    file.write_text("# a lax gate\n")
    monkeypatch.setattr(build, "_GATE", (file,))
    build.build(["80"], only=["one"])
    file.write_text("# a strict gate\n")
    build._shelf.cache_clear()
    assert build.available("8.0") == frozenset()
    build.build(["80"], only=["one"])
    assert compiled(tools) == 2
    assert build.available("8.0") == {"one"}


def test_what_fails_is_told_last_and_is_all_that_is_left(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Unit("bad", "cuda/small.cu", ("80",), (("SIZE", 13),))
    lost = Unit("lost", "cuda/lost.cu", ("80",), (("SIZE", 5),))
    monkeypatch.setattr(build, "UNITS", (bad, lost, *UNITS))
    said: list[str] = []
    with pytest.raises(jit.KernelBuildError, match="2 of 4 libraries failed") as caught:
        build.build(["80"], jobs=1, progress=said.append)
    assert "error: bad luck" in str(caught.value)
    assert "lost has no source: " in str(caught.value)
    assert sum("FAILED" in line for line in said) == 2
    assert build.available("8.0") == {"one", "two"}
    (build._KERNELS / "cuda" / "lost.cu").write_text(SOURCE)
    with pytest.raises(jit.KernelBuildError, match="1 of 2 libraries failed"):
        build.build(["80"])
    assert build.available("8.0") == {"one", "two", "lost"}


def test_a_source_edited_meanwhile_is_not_kept(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = jit._compile

    def edit(target: jit.Target, library: Path) -> None:
        compile_(target, library)
        (build._KERNELS / "cuda" / "numbers.cuh").write_text("// edited\n")

    monkeypatch.setattr(jit, "_compile", edit)
    with pytest.raises(jit.KernelBuildError, match="one: its sources changed while it compiled"):
        build.build(["80"], only=["one"])
    assert jit.builds() == []


def test_what_fails_the_gate_is_not_kept(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(library: Path, unit: Unit, arch: str) -> None:
        assert library.stat().st_size
        raise jit.KernelBuildError(f"{unit.name} for {arch}: no IMMA")

    monkeypatch.setattr(gate, "check", refuse)
    with pytest.raises(jit.KernelBuildError, match="one for 80: no IMMA"):
        build.build(["80"], only=["one"])
    assert [p.name for p in jit.cache_dir().iterdir()] == ["build.lock"]


def test_a_second_build_waits_for_the_first(tools: Path) -> None:
    jit.cache_dir().mkdir()
    said: list[str] = []
    waits = threading.Event()

    def note(line: str) -> None:
        said.append(line)
        waits.set()

    with (jit.cache_dir() / "build.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(target=build.build, args=(["90"],), kwargs={"progress": note})
        second.start()
        assert waits.wait(60)
        assert "another build is at work" in said[0]
        assert compiled(tools) == 0
    second.join(60)
    assert compiled(tools) == 1


def test_a_killed_build_is_taken_up_where_it_was(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subprocess.Popen([sys.executable, "-c", IN_A_PROCESS, str(build._KERNELS)])
    deadline = time.monotonic() + 120
    while not (tools / "asleep").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    slow = Unit("slow", "cuda/small.cu", ("80",), (("SIZE", 98),))
    monkeypatch.setattr(build, "UNITS", (UNITS[0], slow))
    monkeypatch.setattr(build, "ARCHES", ("80",))
    said: list[str] = []
    build.build(["80"], progress=said.append)
    assert said[0] == "1 libraries to build, 1 there already"


def test_compilations_run_together_only_while_their_memory_lasts() -> None:
    memory, together, most = build._Memory(5.0), [0.0], [0.0]

    def work(gibibytes: float) -> None:
        with memory.taken(gibibytes):
            together[0] += gibibytes
            most[0] = max(most[0], together[0])
            time.sleep(0.02)
            together[0] -= gibibytes

    threads = [threading.Thread(target=work, args=(g,)) for g in (4.0, 4.0, 1.0, 2.0, 3.0, 9.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most[0] == 9.0, "the one that is too large ran, alone"
    assert build._free_gibibytes() > 0


def test_what_is_missing_is_named(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXQUANT_CUTLASS", str(tools))
    with pytest.raises(jit.KernelBuildError, match=r"has no cutlass/version\.h"):
        build.build(["90a"])
    old = tools.parent / "cutlass"
    (old / "cutlass" / "util" / "packed_stride.hpp").unlink()
    monkeypatch.setenv("FXQUANT_CUTLASS", str(old))
    with pytest.raises(jit.KernelBuildError, match="tools/util/include is missing beside"):
        build.build(["90a"])
    use_cutlass(old, "3, 9, 2")
    with pytest.raises(jit.KernelBuildError, match=r"CUTLASS 3\.9\.2, the kernels are.* for 4\.2"):
        build.build(["90a"])
    monkeypatch.delenv("FXQUANT_CUTLASS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(jit.KernelBuildError, match=r"CUTLASS's headers were not found: .*\[cuda\]"):
        build.build(["90a"])
    (tools / "nvdisasm").unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(jit.KernelBuildError, match=r"No nvdisasm was found.* pip install"):
        build.build(["80"])
    monkeypatch.setenv("CUDACXX", "no-such-program")
    with pytest.raises(jit.KernelBuildError, match=r"No nvcc was found: \$CUDACXX is 'no-such-"):
        build.build(["80"])


def test_where_nvcc_is_looked_for(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert nvcc.find() is None
    assert "install the CUDA toolkit" in nvcc.why_not_found()
    monkeypatch.setenv("CUDA_HOME", str(tools.parent))
    assert nvcc.find() == str(tools / "nvcc")
    monkeypatch.setenv("NVCC", str(tools / "cuobjdump"))
    assert nvcc.find() == str(tools / "cuobjdump")
    monkeypatch.setenv("CUDACXX", shutil.which("true", path="/bin:/usr/bin") or "")
    with pytest.raises(jit.KernelBuildError, match="tells no version of nvcc"):
        nvcc.version(str(nvcc.find()))


def test_cutlass_is_found_and_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FXQUANT_CUTLASS", raising=False)
    folder = headers.find()
    if folder is None:
        pytest.skip("needs nvidia-cutlass")
    assert (folder / "cute").is_dir()
    (_, util), version = headers.includes()
    assert (util / "cutlass" / "util" / "packed_stride.hpp").is_file()
    assert version == headers.version(folder)
    assert "cutlass_library" not in sys.modules


def test_the_table_keeps_within_its_limits() -> None:
    names = [tile.name for tile in TILES]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    for arch in ARCHES:
        assert sum(arch in tile.unit.archs for tile in TILES) <= 24
    assert not [t.name for t in TILES if t.types == "s4" and {"90", "90a"} & set(t.unit.archs)]
    assert {out for tile in TILES for out in tile.outs} == {"f32", "f16", "bf16", "s8"}
    for tile in TILES:
        sizes = dict(tile.unit.defines)
        assert [sizes[f"FXQUANT_TILE_{x}"] for x in "MNK"] == [tile.m, tile.n, tile.k]
