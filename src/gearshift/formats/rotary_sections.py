"""Rotary positions as Fast-LLM's configs describe them: a type, and parameters under names of its own."""

from gearshift.formats.fates import Fixed, Mapped, mapped
from gearshift.formats.sections import Section, SectionFate, Stated
from gearshift.mixers.attention import RotarySpec

_OURS = tuple(name for name in RotarySpec.model_fields if name not in ("type", "theta", "share"))


def _rotary(type: str, *fates: Mapped) -> Section:
    """The section of one type; `fates` are those of its own parameters."""
    own = {path for fate in fates for path in fate.paths}
    plain: tuple[SectionFate, ...] = (
        mapped("theta", "theta", default=10000.0),
        Fixed("type", type),
        Fixed("share", 1.0),
        # By what it is computed.
        Stated("triton"),
    )
    return Section(
        f"rotary positions of type {type!r}",
        RotarySpec,
        (*plain, *fates, *(Fixed(name, None) for name in _OURS if name not in own)),
    )


PLAIN = _rotary("default")
LLAMA3 = _rotary(
    "llama3",
    mapped("scale_factor", "factor", default=8.0),
    mapped("low_frequency_factor", "low_freq_factor", default=1.0),
    mapped("high_frequency_factor", "high_freq_factor", default=4.0),
    mapped("original_context_length", "original_max_position_embeddings", default=8192),
)
YARN = _rotary(
    "yarn",
    mapped("scale_factor", "factor", default=8.0),
    Mapped("attention_factor", ("attention_factor",), default=None, omit_none=True),
    mapped("beta_fast", "beta_fast", default=32.0),
    mapped("beta_slow", "beta_slow", default=1.0),
    mapped("original_context_length", "original_max_position_embeddings", default=8192),
)
