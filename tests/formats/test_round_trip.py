"""Configs as they are published, older layouts, and what a native checkpoint keeps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift.formats import FORMATS, NativeConfig, open_checkpoint
from gearshift.formats.gearshift import STUB_CODE
from gearshift.spec import ModelSpec
from tests.formats.families import ROPES, families
from tests.formats.folders import CLASSES, SIZES, convert, save

FAMILIES = families()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", CLASSES)
def test_both_layouts_of_rope_are_read(family: str, rope: str) -> None:
    parameters = dict(ROPES[rope])
    new = {**SIZES, "rope_parameters": parameters}
    theta = parameters.pop("rope_theta")
    older = {**SIZES, "rope_theta": theta, "rope_scaling": parameters, "torch_dtype": "float32"}
    oldest = {**older, "rope_scaling": {"type": parameters["rope_type"], **parameters}}
    del oldest["rope_scaling"]["rope_type"]
    if rope == "theta":
        oldest["rope_scaling"] = None
    expected = FORMATS[family].to_native({**new, "rope_parameters": ROPES[rope]})
    for raw in (older, oldest):
        assert FORMATS[family].to_native(raw) == expected


REAL_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama 2": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    },
    "SmolLM2": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 49152,
    },
    "Mistral 7B": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "Qwen2.5 0.5B": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen3 0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Ministral 8B": {
        "architectures": ["MinistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 9,
        "max_position_embeddings": 131072,
        "model_type": "ministral",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.0",
        "use_cache": True,
        "vocab_size": 131072,
    },
    "Gemma 3 1B": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "initializer_range": 0.02,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "use_cache": True,
        "vocab_size": 262144,
    },
    "Gemma 3 270M": {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0.dev0",
        "use_bidirectional_attention": False,
        "use_cache": True,
        "vocab_size": 262144,
    },
}


@pytest.mark.parametrize("name", REAL_CONFIGS)
def test_configs_as_they_are_published(name: str) -> None:
    raw = REAL_CONFIGS[name]
    family = FORMATS.for_model_type(raw["model_type"])
    native = family.to_native(raw)
    config_class = FAMILIES[family.name].config_class
    # A config file has been through JSON; transformers turns dtypes into torch's, and drops what it does not know.
    before, after = (
        config_class(**json.loads(json.dumps(config))).to_dict() for config in (raw, family.to_config(native))
    )
    ignored = {"transformers_version", "is_llama_config", "rope_interleaved", "transformers.js_config", "_name_or_path"}
    ignored |= {"use_mrope"}
    assert {k: v for k, v in before.items() if k not in ignored} == {k: v for k, v in after.items() if k not in ignored}


def test_what_the_native_config_says() -> None:
    native = FORMATS["llama"].to_native(REAL_CONFIGS["Llama 3.2"])
    block = native.spec.decoder.layers[5]
    assert native.dtype == "bfloat16"
    assert native.extras["eos_token_id"] == [128001, 128008, 128009]
    assert (native.spec.hidden_size, native.spec.decoder.num_layers, native.spec.tie_embeddings) == (2048, 16, True)
    assert (block.mixer.heads, block.mixer.kv_heads, block.mixer.head_dim, block.mixer.window) == (32, 8, 64, None)
    assert (block.mixer.rotary.type, block.mixer.rotary.theta, block.mixer.rotary.factor) == ("llama3", 500000.0, 32.0)


def test_a_native_checkpoint_survives_transformers(tmp_path: Path) -> None:
    save(tmp_path / "source")
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "native")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    model.save_pretrained(tmp_path / "saved")
    saved, native = (open_checkpoint(tmp_path / name) for name in ("saved", "native"))
    # Transformers moves this one to generation_config.json.
    expected = {key: value for key, value in native.native.extras.items() if key != "use_cache"}
    assert saved.native == replace(native.native, extras=expected)
    assert FORMATS["llama"].to_config(saved.native)["initializer_range"] == 0.02


def test_presets_are_kept() -> None:
    raw = FORMATS["llama"].to_native(SIZES).spec.model_dump(mode="json")
    main = raw["decoder"]["blocks"]["layer"]["mixer"]
    narrow = {**main, "window": 16}
    raw["decoder"]["blocks"]["layer"]["mixer"] = {
        "type": "stochastic",
        "main": "full",
        "mixers": {"full": main, "narrow": narrow},
    }
    config = {"model_type": "gearshift", "spec": raw, "presets": {"fast": "full,narrow*2"}, "default_preset": "fast"}
    native = NativeConfig.from_json_dict(config)
    assert tuple(native.presets["fast"]) == ("full", "narrow", "narrow")
    assert NativeConfig.from_json_dict(json.loads(json.dumps(native.to_json_dict()))) == native
    assert native.spec == ModelSpec.model_validate(raw)


def test_the_stub_loads_the_model_where_nothing_imported_gearshift(tmp_path: Path) -> None:
    save(tmp_path / "source")
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "native")
    program = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "assert 'gearshift' not in sys.modules\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "torch.save(model(torch.arange(9)[None]).logits, sys.argv[2])\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [sys.executable, "-c", program, tmp_path / "native", tmp_path / "logits"]
    subprocess.run(arguments, check=True, env=environment)
    reference = CLASSES["llama"][1].from_pretrained(tmp_path / "source")
    torch.testing.assert_close(torch.load(tmp_path / "logits"), reference(torch.arange(9)[None]).logits)


def test_the_stub_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gearshift.model")
    monkeypatch.setitem(sys.modules, "gearshift", None)
    with pytest.raises(ImportError, match="pip install gearshift"):
        exec(STUB_CODE, {})
