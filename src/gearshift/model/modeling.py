"""The decoder and the causal language model, as transformers knows them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gearshift.mixers.base import MixContext
from gearshift.mixers.norm import norm, norm_start
from gearshift.model.adapter_names import beside_adapters
from gearshift.model.block import Block, PredictionHead, named_modules
from gearshift.model.cache import GearshiftCache
from gearshift.model.config import GearshiftConfig
from gearshift.model.head import Head
from gearshift.model.start import EMBEDDING, start
from gearshift.model.stub import write_stub
from gearshift.plan import Initialiser
from gearshift.spec import Placement, resolve_placement

PlacementLike = str | Placement | Iterable[str]


@runtime_checkable
class Configured(Protocol):
    """A module that follows a setting of the run, such as `experts_implementation`, in the model's config."""

    def configure(self, config: GearshiftConfig) -> None:
        """Follow `config` from now on."""
        ...


class GearshiftPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Gearshift model, and the choice of a placement."""

    config_class = GearshiftConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ("Block",)

    def __init__(self, config: GearshiftConfig):
        super().__init__(config)
        self.spec = config.model_spec
        self._placement: Placement | None = None

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that modules without parameters of their own are started too: they answer for their children's."""
        return False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers', with `eager`, which runs everywhere, where nothing is asked for."""
        return super().get_correct_experts_implementation(requested_experts or "eager")

    @property
    def presets(self) -> dict[str, Placement]:
        """The named placements of this checkpoint."""
        return self.config.placements()

    def placement(self, value: PlacementLike | None = None) -> Placement:
        """The placement that `value` means: a preset's name, a Placement, names of mixers, or a list in text.

        None means what was last set, else the default preset, else main everywhere. ValueError if it does not fit.
        """
        if value is not None:
            return resolve_placement(value, self.presets, self.spec.choices)
        if self._placement is not None:
            return self._placement
        default = self.config.default_preset
        return self.presets[default] if default else self.spec.main

    def set_placement(self, value: PlacementLike | None) -> None:
        """Run `value` from now on wherever a call names no placement. None goes back to the config's default."""
        self._placement = None if value is None else self.placement(value)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the weights copied into memory of their own.

        Weights that are views of a memory-mapped file need not be aligned to cache lines; vectorised kernels then round
        otherwise, and equal weights would not give equal bits. The copy also lets go of the file.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        frozen = beside_adapters(model)
        for name, parameter in model.named_parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
            if name in frozen:
                parameter.requires_grad_(False)
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As transformers', and the stub that lets `trust_remote_code` load the folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_stub(save_directory)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a saved folder carries a stub (see `stub.py`), never a copy of this file."""

    def _init_weights(self, module: nn.Module) -> None:
        """Start a mixer, MLP, norm or table from its declared distributions. Transformers calls it for new weights."""
        start(module)


@dataclass
class DecoderOutput(BaseModelOutputWithPast):
    """transformers', and what the prediction heads make of it."""

    hidden_states_ahead: tuple[Tensor, ...] | None = None
    """Of each prediction head, [batch, tokens, hidden] after its norm."""


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """transformers', and what the prediction heads say."""

    prediction_logits: tuple[Tensor, ...] | None = None
    """Of each prediction head, [batch, tokens, vocabulary]: the first is about the token after the next one."""


class GearshiftModel(GearshiftPreTrainedModel):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: GearshiftConfig):
        super().__init__(config)
        spec = self.spec
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        owners = dict(zip(spec.decoder.weight_keys, spec.decoder.layers, strict=True))
        # A block with shared weights is one entry here, whatever the number of layers that run it.
        self.layers = named_modules({key: Block(block, spec.hidden_size) for key, block in owners.items()})
        self.norm = norm(spec.final_norm, spec.hidden_size)
        self.prediction_heads = nn.ModuleList(PredictionHead(head, spec.hidden_size) for head in spec.prediction_heads)
        for module in self.modules():
            if isinstance(module, Configured):
                module.configure(config)
        # Transformers reads it, and hands it up to the models that hold this one.
        self._keep_in_fp32_modules_strict = {
            name for module in self.modules() for name in getattr(module, "keep_in_float32", ())
        }
        self.post_init()

    def starts(self) -> dict[str, Initialiser]:
        """The table and the norm; blocks answer for themselves."""
        return {"embed_tokens.weight": EMBEDDING, "norm.weight": norm_start(self.spec.final_norm)}

    @property
    def blocks(self) -> list[Block]:
        """The block of every layer, first layer first. Shared blocks come again."""
        return [self.layers[key] for key in self.spec.decoder.weight_keys]  # type: ignore[misc]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [batch, tokens] -> [batch, tokens, hidden], what the first block reads."""
        hidden = self.embed_tokens(tokens)
        if not self.spec.scale_embeddings:
            return hidden
        return hidden * torch.tensor(self.spec.hidden_size**0.5, dtype=self.embed_tokens.weight.dtype).item()

    def context(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past: int = 0,
    ) -> MixContext:
        """What the layers share in a forward over `hidden` [batch, tokens, ...] after `past` cached tokens."""
        batch, tokens = hidden.shape[:2]
        padding = _padding(attention_mask, batch, past + tokens)
        cu_seqlens = _boundaries(cu_seqlens, batch, tokens, past, padding, hidden.device)
        if position_ids is None:
            position_ids = _positions(padding, cu_seqlens, past, tokens, hidden.device)
        return MixContext(
            positions=position_ids.expand(batch, -1),
            past=past,
            padding=padding,
            cu_seqlens=cu_seqlens,
            max_positions=self.spec.max_positions,
            attn_implementation=self.config._attn_implementation,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GearshiftCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        placement: PlacementLike | None = None,
        cu_seqlens: Tensor | None = None,
        prediction_heads: bool = False,
        **kwargs: Any,
    ) -> DecoderOutput:
        """input_ids [batch, tokens] or inputs_embeds [batch, tokens, hidden] -> last_hidden_state after the final norm.

        `placement` names the mixers to run; `cu_seqlens` [documents + 1] packs documents into a batch of one. With
        `prediction_heads`, also the hidden states of the heads for tokens further ahead, which have no cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed(input_ids)
        hidden = inputs_embeds
        chosen = self.placement(placement)
        cache = past_key_values
        if cache is None and use_cache:
            cache = GearshiftCache(self.spec, chosen)
        if cache is not None:
            _check_cache(cache, chosen)
        past = 0 if cache is None else cache.get_seq_length()
        if cache is not None and cu_seqlens is not None:
            raise ValueError("packed documents cannot be used with a cache: pass use_cache=False or separate documents")
        if prediction_heads and cache is not None:
            raise ValueError("prediction heads cannot be used with a cache: pass use_cache=False")
        context = self.context(hidden, attention_mask, position_ids, cu_seqlens, past)
        states = [None] * len(chosen) if cache is None else cache.states
        for block, mixer, state in zip(self.blocks, chosen, states, strict=True):
            trunk = hidden
            hidden = block(hidden, context, mixer, state)
        ahead = tuple(head(trunk, context) for head in self.prediction_heads) if prediction_heads else None
        if cache is not None:
            cache.advance(context.tokens)
        return DecoderOutput(last_hidden_state=self.norm(hidden), past_key_values=cache, hidden_states_ahead=ahead)


class GearshiftForCausalLM(GearshiftPreTrainedModel, GenerationMixin):
    """A decoder with a language-modelling head. `placement=` selects the mixers, in `forward` and in `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected: list[str] | None = None

    def __init__(self, config: GearshiftConfig):
        super().__init__(config)
        self.model = GearshiftModel(config)
        self.lm_head = Head(self.spec.hidden_size, self.spec.vocab_size, self.spec.logit_softcap)
        self.post_init()

    def starts(self) -> dict[str, Initialiser]:
        """The head."""
        return {"lm_head.weight": EMBEDDING}

    def set_placement(self, value: PlacementLike | None) -> None:
        super().set_placement(value)
        self.model.set_placement(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GearshiftCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        placement: PlacementLike | None = None,
        cu_seqlens: Tensor | None = None,
        prediction_heads: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """input_ids [batch, tokens] -> logits [batch, tokens, vocabulary] (the last `logits_to_keep` of them, 0: all).

        With `labels` [batch, tokens] also the mean cross-entropy of the next token, in nats; with `prediction_heads`
        also `prediction_logits`, of the heads for tokens further ahead.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            placement=placement,
            cu_seqlens=cu_seqlens,
            prediction_heads=prediction_heads,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        ahead = outputs.hidden_states_ahead
        if ahead is not None:
            ahead = tuple(self.lm_head(hidden[:, keep]) for hidden in ahead)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.spec.vocab_size, **kwargs)
        return CausalLMOutput(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, prediction_logits=ahead
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers'; spelled out so that `generate` lets `placement=` pass."""
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache that the placement asks for, unless the caller brought one."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={wanted!r} is not supported: Gearshift's mixers keep their own state"
            )
        placement = self.placement(model_kwargs.get("placement"))
        model_kwargs["past_key_values"] = GearshiftCache(self.spec, placement)


def _padding(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The padding mask as booleans [batch, length], None if it hides nothing."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be [batch, all tokens so far] = [{batch}, {length}], not {list(mask.shape)}"
        )
    padding = mask.bool()
    if padding.all():
        return None
    if not bool((padding.int().diff(dim=1) >= 0).all()):
        raise ValueError(
            "attention_mask must pad on the left: recurrent mixers cannot skip tokens in the middle or end"
        )
    return padding


def _boundaries(
    cu_seqlens: Tensor | None, batch: int, tokens: int, past: int, padding: Tensor | None, device: torch.device
) -> Tensor | None:
    """cu_seqlens checked and on the device."""
    if cu_seqlens is None:
        return None
    if batch != 1 or past or padding is not None:
        raise ValueError("packed documents (cu_seqlens) need a batch of one, no cache and no padding")
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or sorted(set(bounds)) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, not {bounds}")
    return cu_seqlens.to(device=device, dtype=torch.int32)


def _positions(
    padding: Tensor | None, cu_seqlens: Tensor | None, past: int, tokens: int, device: torch.device
) -> Tensor:
    """The position of each token in its sequence or document: [1 or batch, tokens]."""
    if padding is not None:
        return (padding.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
    index = torch.arange(past, past + tokens, device=device)
    if cu_seqlens is not None:
        index = index - torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=tokens)
    return index[None]


def _check_cache(cache: Any, placement: Placement) -> None:
    if not isinstance(cache, GearshiftCache):
        raise ValueError(
            f"past_key_values must be a GearshiftCache, not a {type(cache).__name__}: leave it out to get one"
        )
    if cache.placement != placement:
        raise ValueError(
            f"this cache was filled under the placement {cache.placement}, not {placement}: start a new one"
        )
