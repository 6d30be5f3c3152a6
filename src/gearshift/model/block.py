"""The decoder block and the stochastic mixer."""

from collections.abc import Mapping

from torch import Tensor, nn

from gearshift.mixers.base import MixContext, Mixer, MixerState
from gearshift.mixers.norm import norm, norm_start
from gearshift.plan import Initialiser
from gearshift.spec import MIXERS, MLPS, BlockSpec, PredictionHeadSpec, StochasticMixerSpec


def named_modules(modules: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """A ModuleDict. ValueError for a name that PyTorch keeps for itself."""
    try:
        return nn.ModuleDict(modules)
    except KeyError as error:
        raise ValueError(f"PyTorch keeps this name for itself, choose another one: {error.args[0]}") from None


def norm_names(spec: BlockSpec) -> tuple[str, ...]:
    """The norms that a block has, by name."""
    before, behind = ("mixer_norm", "mlp_norm"), ("mixer_output_norm", "mlp_output_norm")
    return {"before": before, "after": behind, "around": before + behind}[spec.norm_placement]


class StochasticMixer(nn.Module):
    """Several named mixers. Which one runs comes in with the call."""

    def __init__(self, spec: StochasticMixerSpec, hidden_size: int):
        super().__init__()
        self.main = spec.main
        self.mixers = named_modules({name: MIXERS[m.type].load()(m, hidden_size) for name, m in spec.mixers.items()})


class PredictionHead(nn.Module):
    """A block and a norm that make of what the last layer reads the hidden states of a token further ahead."""

    def __init__(self, spec: PredictionHeadSpec, hidden_size: int):
        super().__init__()
        self.spec = spec
        self.block = Block(spec.block, hidden_size)
        self.norm = norm(spec.norm, hidden_size)

    def starts(self) -> dict[str, Initialiser]:
        """The norm; the block answers for itself."""
        return {"norm.weight": norm_start(self.spec.norm)}

    def forward(self, hidden: Tensor, context: MixContext) -> Tensor:
        """[batch, tokens, hidden] before the last layer -> [batch, tokens, hidden] before the model's head."""
        return self.norm(self.block(hidden, context, self.spec.block.main))


class Block(nn.Module):
    """norm, mixer, residual; norm, MLP, residual. The norms may also come behind the mixer and the MLP, or both."""

    def __init__(self, spec: BlockSpec, hidden_size: int):
        super().__init__()
        self.spec = spec
        self.hidden_size = hidden_size
        norms = {name: norm(spec.norm, hidden_size) for name in norm_names(spec)}
        self.mixer_norm = norms.get("mixer_norm", nn.Identity())
        self.mixer_output_norm = norms.get("mixer_output_norm", nn.Identity())
        if isinstance(spec.mixer, StochasticMixerSpec):
            self.mixer: nn.Module = StochasticMixer(spec.mixer, hidden_size)
        else:
            self.mixer = MIXERS[spec.mixer.type].load()(spec.mixer, hidden_size)
        self.mlp_norm = norms.get("mlp_norm", nn.Identity())
        self.mlp_output_norm = norms.get("mlp_output_norm", nn.Identity())
        self.mlp = MLPS[spec.mlp.type].load()(spec.mlp, hidden_size)
        if spec.lora is not None:
            from gearshift.model.lora import adapt  # it needs a package that other models do without

            adapt(self, spec.lora)

    def starts(self) -> dict[str, Initialiser]:
        """The norms and the MLP; mixers answer for themselves."""
        mlp = MLPS[self.spec.mlp.type].load().initialisers(self.spec.mlp, self.hidden_size)
        norms = {f"{name}.weight": norm_start(self.spec.norm) for name in norm_names(self.spec)}
        return {**norms, **{f"mlp.{name}": initialiser for name, initialiser in mlp.items()}}

    def mixer_named(self, name: str) -> Mixer:
        """The mixer that a placement calls `name`."""
        if isinstance(self.mixer, StochasticMixer):
            return self.mixer.mixers[name]  # type: ignore[return-value]
        assert name == self.spec.main, f"the block's only mixer is {self.spec.main}"
        return self.mixer  # type: ignore[return-value]

    @property
    def learning(self) -> dict[str, Mixer]:
        """The mixers that have a parameter to learn, by name."""
        mixers = {name: self.mixer_named(name) for name in self.spec.mixers}
        return {name: mixer for name, mixer in mixers.items() if any(p.requires_grad for p in mixer.parameters())}

    def mix(self, hidden: Tensor, context: MixContext, mixer: str, state: MixerState | None = None) -> Tensor:
        """The first half: `hidden` and what `mixer` adds to it. All shapes [batch, tokens, hidden]."""
        return self.add_mixed(hidden, self.mixer_named(mixer)(self.mixer_norm(hidden), context, state))

    def add_mixed(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """The end of the first half: `hidden` and what a mixer's output `mixed` adds to it."""
        return hidden + self.mixer_output_norm(mixed)

    def feed(self, hidden: Tensor) -> Tensor:
        """The second half: `hidden` and what the MLP adds to it."""
        return self.add_fed(hidden, self.mlp(self.mlp_norm(hidden)))

    def add_fed(self, hidden: Tensor, fed: Tensor) -> Tensor:
        """The end of the second half: `hidden` and what the MLP's output `fed` adds to it."""
        return hidden + self.mlp_output_norm(fed)

    def forward(self, hidden: Tensor, context: MixContext, mixer: str, state: MixerState | None = None) -> Tensor:
        """[batch, tokens, hidden] -> [batch, tokens, hidden], with `mixer` mixing the tokens."""
        return self.feed(self.mix(hidden, context, mixer, state))
