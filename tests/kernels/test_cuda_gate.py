"""The gate: what nvcc compiles without a word and must not be used."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fxquant.kernels import jit
from fxquant.kernels.cuda import build, call, gate, nvcc
from fxquant.kernels.cuda.unit import Probe, Unit
from fxquant.kernels.cutlass import headers
from fxquant.kernels.cutlass.tiles import TILES

USERS_CACHE = jit.cache_dir()
KERNELS = Path(build.__file__).parents[1]
MISSING = (
    (None if nvcc.find() else nvcc.why_not_found())
    or (None if nvcc.find_tool("cuobjdump") and nvcc.find_tool("nvdisasm") else nvcc.why_no_tools())
    or (None if headers.find() else headers.why_not_found())
)
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

HOST = """
extern "C" __attribute__((visibility("default"))) int fxquant_abi_version() { return 1; }
extern "C" __attribute__((visibility("default"))) int fxquant_shared_memory() { return SHARED; }
extern "C" __attribute__((visibility("default"))) int fxquant_can_run(const int* c) { CAN_RUN; }
"""
PRODUCT = """
__global__ void kernel(int* out, const unsigned* in) {
  int c[4] = {0, 0, 0, 0};
  const unsigned* p = in + threadIdx.x * 8;
  PRODUCT
  out[threadIdx.x] = c[0] + c[1] + c[2] + c[3];
}
extern "C" void run(int* x) { kernel<<<1, 32>>>(x, (unsigned*)x); }
"""
MMA = """asm volatile(
    "mma.sync.aligned.m16n8kK.row.col.satfinite.s32.T.T.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},"
    "{%8,%9},{%0,%1,%2,%3};" : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
    : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(p[4]), "r"(p[5]));"""
S8, S4 = MMA.replace("kK", "k32").replace("T", "s8"), MMA.replace("kK", "k64").replace("T", "s4")
NO_PRODUCT = "c[0] = __dp4a((int)p[0], (int)p[1], c[0]);"
SPILL = (
    "unsigned many[256];\n"
    "#pragma unroll\nfor (int i = 0; i < 256; i++) many[i] = in[i * 32 + threadIdx.x];\n"
    "__syncthreads();\n"
    "#pragma unroll\nfor (int i = 0; i < 256; i++) c[i % 4] += many[i] * many[255 - i / 2];\n"
)
STACK = "int t[64] = {}; for (int i = 0; i < 99; i++) t[p[i] % 64] += i; c[1] = t[p[0] % 64];"
# What CUTLASS does for wgmma: the body is there only where the instruction is.
STUB = "#ifdef __CUDA_ARCH_FEAT_SM90_ALL\n" + S8 + "\n#endif\n"

IMMA = r"\bIMMA\.16832\.S8\.S8\b"
OF_S4 = r"\bIMMA\.16864\.S4\.S4\b"
ACCEPTED, REFUSED = Probe("n is 8", (("n", 8),), True), Probe("n is odd", (("n", 7),), False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and nothing known of any other."""
    monkeypatch.setenv("FXQUANT_CACHE", str(tmp_path / "cache"))
    build._shelf.cache_clear()


def planted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    product: str,
    unit: Unit,
    *,
    shared: int = 1024,
    can_run: str = "return c[12] % 8 ? 2 : 0",
    before: str = "",
) -> None:
    """Builds and gates, as `unit`, a source that has something wrong with it."""
    folder = tmp_path / "kernels" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    host = HOST.replace("SHARED", str(shared)).replace("CAN_RUN", can_run)
    (folder / "planted.cu").write_text(host + before + PRODUCT.replace("PRODUCT", product))
    monkeypatch.setattr(build, "_KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(build, "UNITS", (unit,))
    build.build(unit.archs)


def unit(*opcodes: str, arch: str = "80", probes: tuple[Probe, ...] = ()) -> Unit:
    return Unit("planted", "cuda/planted.cu", (arch,), opcodes=opcodes, probes=probes)


def refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, product: str, unit: Unit, **planted_: str | int
) -> str:
    with pytest.raises(jit.KernelBuildError, match=r"planted for .* fails the gate: ") as caught:
        planted(tmp_path, monkeypatch, product, unit, **planted_)  # type: ignore[arg-type]
    assert build.built() == []
    return str(caught.value).partition("the gate: ")[2]


@needs_nvcc
def test_what_is_right_passes(tmp_path, monkeypatch):
    planted(tmp_path, monkeypatch, S8, unit(IMMA, probes=(ACCEPTED, REFUSED)))
    (kept,) = build.built()
    assert (kept.name, kept.arch, kept.sound) == ("planted", "80", True)


@needs_nvcc
def test_a_missing_opcode(tmp_path, monkeypatch):
    said = refusal(tmp_path, monkeypatch, NO_PRODUCT, unit(IMMA))
    assert "no instruction is like" in said
    assert "kernel" in said
    assert "of its kind there are none" in said


@needs_nvcc
def test_another_opcode_is_told(tmp_path, monkeypatch):
    assert "there are IMMA.16832.S8.S8" in refusal(tmp_path, monkeypatch, S8, unit(OF_S4))


@needs_nvcc
def test_int4_products_that_90_only_emulates(tmp_path, monkeypatch):
    planted(tmp_path, monkeypatch, S4, unit(OF_S4))
    said = refusal(tmp_path, monkeypatch, S4, unit(OF_S4, arch="90"))
    assert "no instruction is like" in said


@needs_nvcc
def test_spilled_registers(tmp_path, monkeypatch):
    bounds = "#define kernel __launch_bounds__(1024, 2) kernel\n"
    said = refusal(tmp_path, monkeypatch, SPILL + S8, unit(IMMA), before=bounds)
    assert re.search(r"kernel.* keeps [1-9]\d* bytes on a stack|kernel.* spills: it has STL", said)


@needs_nvcc
def test_an_array_on_the_stack(tmp_path, monkeypatch):
    assert "it must have 0" in refusal(tmp_path, monkeypatch, STACK + S8, unit(IMMA))


@needs_nvcc
def test_a_driver_for_90a_built_for_plain_90(tmp_path, monkeypatch):
    """nvcc makes a stub of it, with status 0 and no warning."""
    planted(tmp_path, monkeypatch, STUB, unit(IMMA, arch="90a"))
    assert "no instruction is like" in refusal(tmp_path, monkeypatch, STUB, unit(IMMA, arch="90"))


@needs_nvcc
def test_another_architecture_than_it_is_called(tmp_path, monkeypatch):
    planted(tmp_path, monkeypatch, S8, unit(IMMA))
    (kept,) = build.built()
    with pytest.raises(jit.KernelBuildError, match="hold kernels for 90a, and holds 80"):
        gate.check(kept.directory / "library.so", unit(IMMA), "90a")


@needs_nvcc
@pytest.mark.parametrize(
    ("can_run", "said"),
    [
        ("return 0", "accepts a call with: n is odd"),
        ("return 2", r"refuses (status 2) a call with: n is 8"),
    ],
)
def test_what_the_library_says_of_shapes(tmp_path, monkeypatch, can_run, said):
    asked = unit(IMMA, probes=(ACCEPTED, REFUSED))
    assert said in refusal(tmp_path, monkeypatch, S8, asked, can_run=can_run)


@needs_nvcc
def test_too_much_shared_memory(tmp_path, monkeypatch):
    asked = unit(IMMA, arch="86", probes=(ACCEPTED,))
    said = refusal(tmp_path, monkeypatch, S8, asked, shared=100 * 1024)
    assert "a block takes 102400 bytes of shared memory; a GPU of 86 gives 101376" in said


@needs_nvcc
def test_another_abi(tmp_path, monkeypatch):
    other = dataclasses.replace(unit(IMMA), abi_version=7)
    with pytest.raises(jit.KernelBuildError, match="ABI version 1, this fxquant needs 7"):
        planted(tmp_path, monkeypatch, S8, other)


def test_the_structs_are_those_of_call_h() -> None:
    text = (KERNELS / "cuda" / "call.h").read_text()
    assert f"#define FXQUANT_ABI {call.ABI}\n" in text
    for struct in (call.Epilogue, call.Call):
        body = re.search(rf"struct {struct.__name__} {{(.*?)}};", text, re.DOTALL)
        assert body
        fields = re.findall(
            r"^\s*(?:const )?(\w+\*?) ([\w, ]+);", re.sub(r"//.*", "", body[1]), re.MULTILINE
        )
        declared = [(name, kind) for kind, names in fields for name in names.split(", ")]
        sizes = {"int32_t": 4, "int64_t": 8, "Epilogue": None}
        mirrored = [(name, None if name == "epilogue" else kind) for name, kind in struct._fields_]
        assert [name for name, _ in declared] == [name for name, _ in mirrored]
        for (name, kind), (_, mirror) in zip(declared, mirrored, strict=True):
            wanted = 8 if kind.endswith("*") else sizes[kind]
            assert (call.ctypes.sizeof(mirror) if mirror else None) == wanted, name
    numbers = dict(re.findall(r"\bk(\w+) = (\d+)", text))
    assert (int(numbers["Ok"]), int(numbers["Version"])) == (call.OK, call.VERSION)
    kinds = [int(numbers[kind]) for kind in ("Float32", "Float16", "BFloat16", "Int8")]
    assert kinds == [call.FLOAT32, call.FLOAT16, call.BFLOAT16, call.INT8]


FAMILIES = (
    "gemm_sm80_s8_128x128x64",
    "conv_sm80_s8_128x128x64",
    "gemm_sm90a_s8_out_f16_128x128x128",
    "conv_sm90a_s8_out_f16_128x128x128",
)


@needs_nvcc
def test_one_library_of_each_family(monkeypatch):
    """Kept in the user's cache, where the next run finds them."""
    monkeypatch.setenv("FXQUANT_CACHE", str(USERS_CACHE))
    made = build.build(["80", "90a"], jobs=2, only=["producers", "weights", *FAMILIES])
    for directory in made:
        name, arch, *_ = directory.name.split("-")
        gate.check(directory / "library.so", build._named(name), arch)
    assert build.available("9.0") >= {name for name in FAMILIES if "90a" in name}


@pytest.mark.slow
@needs_nvcc
def test_every_library_of_both_generations(monkeypatch):
    monkeypatch.setenv("FXQUANT_CACHE", str(USERS_CACHE))
    build.build(["80", "90a"])
    assert build.available("8.0") == {t.name for t in TILES if "80" in t.unit.archs} | {
        "producers",
        "weights",
    }


@needs_nvcc
def test_the_real_90a_driver_built_for_plain_90(monkeypatch):
    real = next(tile.unit for tile in TILES if tile.family == "gemm_sm90a")
    monkeypatch.setattr(build, "UNITS", (dataclasses.replace(real, archs=("90",)),))
    with pytest.raises(jit.KernelBuildError, match=r"fails the gate: .*IGMMA"):
        build.build(["90"])
    assert build.built() == []
