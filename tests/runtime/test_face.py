"""What pipelines ask a denoiser for besides calls: a compiled one answers, or says what to do."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from torch import Tensor, nn

import fxquant
from fxquant import QuantizedModel
from fxquant.errors import ArtifactError, CallError, FaceError, FxquantError
from fxquant.runtime.face import Face, face_of
from fxquant.runtime.outline import Outline, is_same, outline
from tests import models
from tests.graph.test_unwrap import flux
from tests.runtime import compiled as c

REBUILD = r"on the float model, then compile that again"
DENOISERS = "unet|transformer(?:_2)?|prior|decoder|denoiser|super_res_first"
ASKED = re.compile(rf"\bself\.(?:{DENOISERS})((?:\.[A-Za-z_]\w*)+)")


@functools.cache
def asked_by_pipelines() -> tuple[str, ...]:
    """What diffusers' pipelines and loaders read of a denoiser: "config.in_channels", say."""
    root = Path(diffusers.__file__).parent
    files = [f for folder in ("pipelines", "loaders") for f in (root / folder).rglob("*.py")]
    found = {m[1][1:] for f in files for m in ASKED.finditer(f.read_text(encoding="utf-8"))}
    return tuple(sorted(found))


@functools.cache
def sdxl() -> tuple[nn.Module, QuantizedModel]:
    """An SDXL of one level, with its additional embeddings."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    ).eval()
    return model, c.compiled(model, models.calls(model, 2), c.float32())


def pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        norm_type="ada_norm_single",
    ).eval()


def cogvideo() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, text_embed_dim=16
    ).eval()


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, text_dim=16, ffn_dim=16
    ).eval()


MISSING = type("Missing", (), {})()
UNSAVED = ("_use_default_values", "_name_or_path")


def read(model: Any, chain: str) -> Any:
    """The end of a chain of attributes, or MISSING."""
    for name in chain.split("."):
        try:
            model = getattr(model, name)
        except AttributeError:
            return MISSING
    return model


def kind(value: Any) -> Any:
    """What must be the same of an answer."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, isinstance(value, nn.Parameter)
    if isinstance(value, nn.Module):
        return value.__class__, str(value)
    if isinstance(value, list | tuple):  # a saved config has lists for tuples
        return [kind(item) for item in value]
    if isinstance(value, Mapping):
        return {key: kind(value[key]) for key in value if key not in UNSAVED}
    if isinstance(value, bool | int | float | str):
        return value
    return "a function" if callable(value) else type(value)


def check_answers(model: nn.Module, ask: Any, chains: Iterable[str]) -> int:
    """Both say the same, or neither has it; the number of chains that both have."""
    answers = [(chain, read(model, chain), read(ask, chain)) for chain in chains]
    wrong = {chain for chain, old, new in answers if kind(old) != kind(new)}
    assert not wrong
    return sum(old is not MISSING for _, old, _ in answers)


@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")
def test_everything_that_pipelines_read_is_answered_as_by_the_original(tmp_path: Path) -> None:
    model, quantised = sdxl()
    chains = asked_by_pipelines()
    assert "add_embedding.linear_1.in_features" in chains
    assert len(chains) > 100
    own = {"__class__", "to", "dtype", "parameters", "modules", "named_modules", "named_children"}
    chains = tuple(chain for chain in chains if chain.split(".")[0] not in own)
    assert check_answers(model, quantised, chains) > 20
    quantised.save_pretrained(tmp_path)
    assert check_answers(model, fxquant.load(tmp_path), chains) > 20


@pytest.mark.parametrize("make", [flux, pixart, cogvideo, wan, lambda: c.unconditional()[0]])
@pytest.mark.filterwarnings("ignore:Accessing config attribute:FutureWarning")
def test_faces_of_transformers_answer_as_the_originals(make: Any) -> None:
    model = make()
    face = face_of(model)
    assert isinstance(face, Face)

    class Asked:
        def __getattr__(self, name: str) -> Any:
            return face.answer(name, nn.Module())

    assert check_answers(model, Asked(), asked_by_pipelines()) > 8


def test_the_tree_of_the_original_is_there_and_is_not_part_of_the_model() -> None:
    model, quantised = c.text_conditional()
    assert quantised.conv_in.out_channels == 16
    assert quantised.encoder_hid_proj is None
    assert quantised.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 2
    assert [n for n, _ in quantised.mid_block.named_parameters()] == [
        n for n, _ in model.mid_block.named_parameters()
    ]
    assert isinstance(quantised.conv_in, nn.Conv2d)
    assert quantised.conv_in.__class__ is nn.Conv2d
    assert str(quantised.down_blocks) == str(model.down_blocks)
    for names in (dict(quantised.named_modules()), quantised.state_dict()):
        assert all(not name or name.split(".")[0] in ("graph", "table") for name in names)


def test_what_the_compiled_model_has_itself_comes_first() -> None:
    model, quantised = c.text_conditional()
    assert (quantised.dtype, quantised.device) == (torch.float32, torch.device("cpu"))
    assert quantised.config == model.config
    assert quantised.num_parameters() == model.num_parameters()
    assert quantised.num_parameters(only_trainable=True) == 0
    assert quantised.get_memory_footprint() < 0.5 * model.get_memory_footprint()
    assert quantised.is_gradient_checkpointing is False


def test_hasattr_is_the_originals() -> None:
    model, quantised = c.text_conditional()
    for name in ("attn_processors", "enable_freeu", "cache_context", "nonsense", "_hf_hook"):
        assert hasattr(quantised, name) == hasattr(model, name), name
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense', nor has the UNet2DCond"):
        _ = quantised.nonsense
    assert getattr(quantised, "nonsense", 3) == 3


def test_a_face_holds_neither_the_original_nor_memory() -> None:
    model = c.mite()
    quantised = c.compile_mite(model=model)
    kept = [weakref.ref(tensor) for tensor in model.parameters()]
    del model
    gc.collect()
    assert not any(tensor() is not None for tensor in kept)
    assert type(quantised.conv.weight) is Outline
    assert quantised.conv.weight.shape == (16, 16, 3, 3)


CHANGES = [
    ("enable_freeu", (1.0, 1.0, 1.0, 1.0)),
    ("load_lora_adapter", ({},)),
    ("load_attn_procs", ("somewhere",)),
    ("_load_ip_adapter_weights", ([],)),
    ("_load_ip_adapter_loras", ([],)),
    ("set_adapters", (["style"],)),
    ("add_adapter", (None,)),
    ("fuse_lora", ()),
    ("unload_lora", ()),
    ("set_attn_processor", (AttnProcessor(),)),
    ("set_default_attn_processor", ()),
]


@pytest.mark.parametrize(("name", "args"), CHANGES)
def test_methods_that_change_the_module_say_where_to_do_that(name: str, args: Any) -> None:
    _, quantised = c.text_conditional()
    with pytest.raises(FaceError, match=rf"UNet2DConditionModel\.{name}\(\) (?s:.*){REBUILD}"):
        getattr(quantised, name)(*args)


@pytest.mark.parametrize(
    "name",
    [
        "enable_gradient_checkpointing",
        "enable_xformers_memory_efficient_attention",
        "set_attention_slice",
        "fuse_qkv_projections",
        "enable_layerwise_casting",
        "enable_group_offload",
        "set_attention_backend",
        "compile_repeated_blocks",
    ],
)
def test_methods_that_save_what_is_saved_already_are_refused_with_the_reason(name: str) -> None:
    _, quantised = c.text_conditional()
    with pytest.raises(FaceError, match=rf"{name}\(\) saves memory or time.*Leave the call out"):
        getattr(quantised, name)("auto")


def test_what_pipelines_call_on_their_own_works() -> None:
    _, quantised = c.text_conditional()
    call = models.calls(quantised, 1)[0]
    before = c.result(quantised, call)
    quantised.disable_freeu()
    quantised.set_attn_processor(quantised.attn_processors)
    quantised.set_attn_processor(AttnProcessor2_0())  # what it has
    quantised.disable_xformers_memory_efficient_attention()
    quantised.disable_gradient_checkpointing()
    assert quantised.eval() is quantised.requires_grad_(False) is quantised.to(torch.float32)
    quantised.zero_grad()
    assert torch.equal(c.result(quantised, call), before)


def test_a_context_of_caches_is_empty() -> None:
    face = face_of(flux())
    with face.answer("cache_context", nn.Module())("cond"):
        assert face.answer("is_cache_enabled", nn.Module()) is False
    face.answer("_reset_stateful_cache", nn.Module())()


def test_a_compiled_model_has_no_gradients() -> None:
    with pytest.raises(FaceError, match="Train the float model, then compile it again"):
        c.shared_mite().requires_grad_()


def assignments(model: Any) -> Iterator[Any]:
    yield lambda: setattr(model, "encoder_hid_proj", nn.Linear(1, 1))
    yield lambda: setattr(model, "class_embedding", 3)
    yield lambda: setattr(model.mid_block, "resnets", None)
    yield lambda: setattr(model.mid_block.attentions[0], "note", 1)
    yield lambda: delattr(model.mid_block, "resnets")
    yield lambda: model.down_blocks.append(nn.Linear(1, 1))
    yield lambda: model.mid_block._modules.pop("resnets")
    yield lambda: model.mid_block.register_forward_hook(print)
    yield model.mid_block.half
    yield lambda: model.mid_block.load_state_dict({})
    yield lambda: model.register_to_config(sample_size=9)
    yield lambda: setattr(model.conv_in.weight, "data", torch.zeros(16, 4, 3, 3))


@pytest.mark.parametrize("number", range(12))
def test_assignments_that_would_have_no_effect_are_refused(number: int) -> None:
    model = c.text_conditional()[1]
    assert len(list(assignments(model))) == 12
    with pytest.raises(FaceError, match=r"[Oo]n the float model|with the float model"):
        list(assignments(model))[number]()


def test_other_assignments_are_taken() -> None:
    _, shared = c.text_conditional()
    model = copy.deepcopy(shared)
    model.encoder_hid_proj = None  # as it is
    model.remark = "mine"
    assert model.remark == "mine"
    model._internal_dict = {**model.config, "sample_size": 64}  # as StableDiffusionPipeline does
    assert model.config["sample_size"] == 64
    assert shared.config["sample_size"] == 8


def values(weight: Any) -> Iterator[Any]:
    x = torch.zeros(1, 4, 8, 8)
    yield lambda: nn.functional.conv2d(x, weight)
    yield lambda: weight + 1
    yield lambda: weight.data.mul_(2)
    yield lambda: weight.sum().item()
    yield weight.clone
    yield weight.numpy
    yield weight.tolist
    yield lambda: weight.to(torch.float16)
    yield lambda: torch.nn.init.zeros_(weight)
    yield lambda: pickle.dumps(weight)


@pytest.mark.parametrize("number", range(10))
def test_weights_have_shapes_and_no_values(number: int) -> None:
    weight: Any = c.shared_mite().conv_in.weight
    assert len(list(values(weight))) == 10
    with pytest.raises(FaceError, match=r"conv_in\.weight.*Do this with the float model"):
        list(values(weight))[number]()
    assert (weight.shape, weight.dtype, weight.device.type) == ((16, 4, 3, 3), torch.float32, "cpu")


def test_layers_of_the_face_do_not_compute() -> None:
    with pytest.raises(FaceError, match=r"conv_in\.weight.*Do this with the float model"):
        c.shared_mite().conv_in(torch.zeros(1, 4, 8, 8))


def test_parts_without_weights_compute() -> None:
    """LTX2's pipelines ask for `transformer.rope.prepare_video_coords`."""
    rope = LTX2AudioVideoRotaryPosEmbed(dim=16)
    arguments = (1, 2, 4, 4, torch.device("cpu"))
    seen: Any = outline(rope)
    assert torch.equal(seen.prepare_video_coords(*arguments), rope.prepare_video_coords(*arguments))


def test_the_face_shows_what_was_compiled_not_what_the_class_makes() -> None:
    model = c.mite()
    model.conv = nn.Sequential(model.conv, nn.Identity())
    model.note = [1, {"deep": model.conv}]  # type: ignore[assignment]
    quantised = c.compile_mite(model=model)
    assert len(quantised.conv) == 2
    assert quantised.note[1]["deep"] is quantised.conv
    with pytest.raises(FaceError, match="append"):
        quantised.note.append(2)
    assert copy.deepcopy(quantised.note[:1]) == [1]


def test_a_wrapper_of_the_users_shows_what_is_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.scale = 2

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.inner(sample, timestep)[0]

    quantised = c.compile_mite(model=Wrapper(c.mite()))
    assert quantised.inner.conv_in.in_channels == 4
    assert (quantised.scale, quantised.dtype, quantised.config) == (2, torch.float32, None)
    with pytest.raises(FaceError, match=REBUILD):
        quantised.scale = 3


def test_a_loaded_model_of_no_known_class_says_so(tmp_path: Path) -> None:
    c.shared_mite().save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert not hasattr(loaded, "conv_in")
    with pytest.raises(AttributeError, match=r"'conv_in'.*only if a class of this diffusers"):
        _ = loaded.conv_in
    loaded.remark = "mine"
    assert loaded.remark == "mine"


def test_a_loaded_model_whose_class_cannot_be_made_again_says_so(tmp_path: Path) -> None:
    _, shared = c.text_conditional()
    model = copy.deepcopy(shared)
    model.config = {**model.config, "down_block_types": ["NoBlock"]}
    model.save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    with pytest.raises(AttributeError, match=r"'conv_in'.*could not be made again.*NoBlock"):
        _ = loaded.conv_in


def test_a_loaded_half_precision_face_has_that_dtype(tmp_path: Path) -> None:
    model = copy.deepcopy(c.unconditional()[0]).to(torch.bfloat16)
    c.compiled(model, models.calls(model, 2)).save_pretrained(tmp_path)
    loaded = fxquant.load(tmp_path)
    assert (loaded.conv_in.weight.dtype, loaded.conv_in.weight.device.type) == (
        torch.bfloat16,
        "cpu",
    )


@pytest.mark.parametrize("write", [pickle.dumps, lambda model: torch.save(model, io.BytesIO())])
def test_pickling_says_how_to_save(write: Any) -> None:
    with pytest.raises(ArtifactError, match=r"save_pretrained\(folder\).*fxquant\.load\(folder\)"):
        write(c.shared_mite())


def test_a_state_dict_is_pickled() -> None:
    buffer = io.BytesIO()
    torch.save(c.shared_mite().state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer).keys() == c.shared_mite().state_dict().keys()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy])
def test_copies_serve_and_have_the_face(make: Any) -> None:
    model, call = c.shared_mite(), c.mite_calls()[1]
    copied = make(model)
    assert torch.equal(c.result(copied, call), c.result(model, call))
    assert copied.conv_in.in_channels == 4
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_torch_compile_takes_a_compiled_model_and_its_face() -> None:
    model, call = c.shared_mite(), c.mite_calls()[1]
    again = torch.compile(model, backend="eager")
    assert torch.equal(c.result(again, call), c.result(model, call))
    assert again.conv_in.in_channels == 4


@functools.cache
def grouped() -> QuantizedModel:
    return c.compile_mite(c.float32(timestep_groups=2))


@pytest.mark.parametrize("make", [c.shared_mite, grouped])
def test_a_compiled_model_is_exported(make: Any) -> None:
    model = make()
    call = c.mite_calls()[1]
    batch = torch.export.Dim("batch")
    shapes = {"sample": {0: batch}, "timestep": None}
    program = torch.export.export(model.exportable(), (), call, dynamic_shapes=shapes)
    for call in c.mite_calls(4, batch=3):
        assert torch.equal(program.module()(**call).sample, model(**call).sample)


def test_exporting_the_model_itself_says_what_to_export() -> None:
    with pytest.raises(FaceError, match=r"export model\.exportable\(\) instead"):
        torch.export.export(c.shared_mite(), (), c.mite_calls()[0])


def test_exporting_timesteps_that_differ_says_what_to_do() -> None:
    call = {**c.mite_calls()[0], "timestep": torch.tensor([1.0, 900.0])}
    with pytest.raises(CallError, match=r"one timestep for a whole batch.*timestep_groups=1"):
        torch.export.export(grouped().exportable(), (), call)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (1, 1, True),
        (1, True, False),
        ([1, (2,)], (1, [2]), True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": 1}, {"b": 1}, False),
        (AttnProcessor(), AttnProcessor(), True),
        (AttnProcessor(), AttnProcessor2_0(), False),
        (print, len, False),
        (nn.Linear(1, 1), nn.Linear(1, 1), False),
        (torch.ones(1), torch.ones(1), False),
    ],
)
def test_sameness(old: Any, new: Any, same: bool) -> None:
    assert is_same(old, new) is same
    assert is_same(old, old)


def test_every_refusal_is_an_error_of_ours() -> None:
    assert issubclass(FaceError, FxquantError)
    assert not issubclass(FaceError, AttributeError)  # hasattr would hide what it says
