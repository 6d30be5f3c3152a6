"""`--format auto`: a mix of attention and window becomes a native Transformers class where one has windows by layer."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gearshift import GearshiftForCausalLM
from gearshift.conversion import convert, export
from gearshift.surgery import Surgery
from tests.formats.families import families

SURGERY = Surgery.model_validate(
    {
        "edits": [
            {"wrap": {"main": "attention"}},
            {"add": {"name": "window", "mixer": {"type": "attention", "window": 5}}},
            {"add": {"name": "gdn", "mixer": {"type": "gated_delta_net"}}},
        ]
    }
)


@pytest.mark.parametrize(
    ("family", "becomes"),
    [
        ("llama", "ministral"),
        ("mistral", "ministral"),
        ("ministral", "ministral"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_windows_by_layer(tmp_path: Path, family: str, becomes: str) -> None:
    settings = {"sliding_window": None} if family == "mistral" else {}
    settings |= {"layer_types": ["full_attention"] * 3} if family == "ministral" else {}
    families()[family].save(tmp_path / "source", **settings)
    convert(tmp_path / "source", [SURGERY]).write(tmp_path / "supernet")
    conversion = export(tmp_path / "supernet", "window,attention,window")
    assert conversion.format == becomes
    conversion.write(tmp_path / "exported")

    ids = torch.randint(3, 60, (2, 30))
    supernet = GearshiftForCausalLM.from_pretrained(tmp_path / "supernet").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert theirs.config.model_type == becomes
    with torch.no_grad():
        expected = supernet(ids, placement="window,attention,window").logits
        assert (theirs(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert export(tmp_path / "supernet", "attention").format == family
    assert export(tmp_path / "supernet", "gdn,attention,window").format == "gearshift"


def test_two_windows_stay_ours(tmp_path: Path) -> None:
    families()["llama"].save(tmp_path / "source")
    more = Surgery.model_validate({"edits": [{"add": {"name": "wide", "mixer": {"type": "attention", "window": 9}}}]})
    convert(tmp_path / "source", [SURGERY, more]).write(tmp_path / "supernet")
    conversion = export(tmp_path / "supernet", "window,wide,window")
    assert conversion.format == "gearshift"
    assert "block 'wide' has mixer.window 9 where block 'window' has 5" in conversion.reason


def test_mamba2_and_attention_become_bamba(tmp_path: Path) -> None:
    families()["llama"].save(tmp_path / "source", rms_norm_eps=3e-4)
    edits = [
        {"layout": {"copies": {"ssm": "layer"}, "pattern": ["ssm", "layer"]}},
        {"replace": {"blocks": ["ssm"], "mixer": {"type": "mamba2"}}},
    ]
    convert(tmp_path / "source", [Surgery.model_validate({"edits": edits})]).write(tmp_path / "hybrid")
    conversion = export(tmp_path / "hybrid")
    assert conversion.format == "bamba"
    conversion.write(tmp_path / "exported")
    ids = torch.randint(3, 60, (2, 30))
    ours = GearshiftForCausalLM.from_pretrained(tmp_path / "hybrid").eval()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    if reason := families()["bamba"].runs_otherwise(theirs):
        pytest.skip(reason)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
