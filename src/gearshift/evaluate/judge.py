"""The judge: many placements of one model, measured on the same held-out sequences in one pass."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from gearshift.data import TokenSequences
from gearshift.evaluate.vocabulary import Targets, Totals
from gearshift.evaluate.walk import Stop, route, walk
from gearshift.model import GearshiftForCausalLM
from gearshift.progress import Advance, silent
from gearshift.spec import Placement, Spec


class JudgeSettings(Spec):
    """How placements are measured."""

    batch: int = Field(default=2, ge=1)
    """Sequences run at a time. Memory grows with layers x batch x length x hidden size."""
    skip: int = Field(default=0, ge=0)
    """The first positions of every sequence, in tokens, that are not judged: what lies beyond a window then counts."""
    stride: int = Field(default=1, ge=1)
    """Only every `stride`-th position is judged. A large vocabulary makes the head as dear as many layers."""
    chunk: int = Field(default=512, ge=1)
    """Positions whose logits are in memory at a time."""
    teacher_bytes: int = Field(default=256 * 2**20, ge=0)
    """Memory for the teacher's probabilities, in bytes; those that do not fit are made again for every placement."""


@dataclass(frozen=True)
class Score:
    """How good a placement is, averaged over the judged positions."""

    placement: Placement
    """What was judged."""
    divergence: float
    """Forward KL divergence KL(teacher || placement), nats a token. Lower is better, 0 is the teacher."""
    perplexity: float
    """exp of the mean negative log-likelihood of the text. Lower is better."""
    agreement: float
    """Share of positions whose likeliest token is the teacher's. Higher is better."""


class Judge:
    """Measures placements of a model on token sequences, all metrics at once.

    The teacher is the model itself under its main placement, or another model. What it says is kept from the first call
    on: if what the main placement uses is trained meanwhile, make a new judge.

    For every batch of sequences the placements are visited depth first through the trie they form, so that a layer is
    run once for all placements which agree up to it (see `walk`).
    """

    def __init__(
        self,
        model: GearshiftForCausalLM,
        sequences: TokenSequences,
        settings: JudgeSettings | None = None,
        teacher: GearshiftForCausalLM | None = None,
    ):
        """ValueError if no position would be judged, or if the teacher has another vocabulary.

        Args:
            model: the supernet (or any Gearshift model).
            sequences: held-out text.
            settings: how to measure.
            teacher: a separate reference model; it runs under its own current placement. None: the model itself.
        """
        self.model = model
        self.sequences = sequences
        self.settings = settings or JudgeSettings()
        self.teacher = teacher
        self.layer_evaluations = 0
        """Layers run so far, each over all sequences."""
        self.layer_evaluations_saved = 0
        """How many more a plain forward of every placement would have run."""
        if teacher is not None and teacher.spec.vocab_size != model.spec.vocab_size:
            raise ValueError(
                f"the teacher has a vocabulary of {teacher.spec.vocab_size} tokens, the model one of"
                f" {model.spec.vocab_size}: they cannot be compared"
            )
        # The last token of a sequence has no successor to be judged on.
        self._judged = torch.arange(sequences.length - 1)[self.settings.skip :: self.settings.stride]
        if not len(self._judged) or not len(sequences):
            raise ValueError(
                f"no position is left to judge: {len(sequences)} sequences of {sequences.length} tokens,"
                f" the first {self.settings.skip} of each skipped"
            )
        self._targets: list[Targets] = []

    @property
    def positions(self) -> int:
        """How many positions are judged, in all sequences together."""
        return len(self.sequences) * len(self._judged)

    def planned(self, placements: Iterable[Placement]) -> int:
        """The layer evaluations that `score` will need for these placements: what its `advance` adds up to."""
        return sum(stop.layer_evaluations for stop in self._route(set(placements)))

    def score(self, placements: Iterable[Placement], advance: Advance = silent) -> list[Score]:
        """Measure placements; the scores are in the order asked for. ValueError if one does not fit the model.

        `advance` is told of progress in layer evaluations over all sequences; the sum is `planned(placements)`.
        """
        asked = list(placements)
        wanted = set(asked)
        stops = self._route(wanted)
        totals = {placement: [0.0, 0.0, 0.0] for placement in wanted}
        batches = self.sequences.tokens.split(self.settings.batch)
        with torch.inference_mode(), _evaluating(self.model):
            for number, tokens in enumerate(batches):
                for stop, counted in self._visit(number, tokens.to(self.model.device), stops):
                    if stop.placement in wanted:
                        totals[stop.placement] = [a + b for a, b in zip(totals[stop.placement], counted, strict=True)]
                    advance(stop.layer_evaluations / len(batches))
        evaluated = sum(stop.layer_evaluations for stop in stops)
        self.layer_evaluations += evaluated
        self.layer_evaluations_saved += len(stops) * len(self.model.spec.choices) - evaluated
        scores = {placement: self._score(placement, Totals(*counted)) for placement, counted in totals.items()}
        return [scores[placement] for placement in asked]

    def _route(self, wanted: set[Placement]) -> list[Stop]:
        """The way through `wanted`; until the teacher is known, it begins with it, if that is the model itself."""
        batches = math.ceil(len(self.sequences) / self.settings.batch)
        unknown = self.teacher is None and len(self._targets) < batches
        return route(self.model.spec, wanted | {self.model.spec.main} if wanted and unknown else wanted)

    def _visit(self, number: int, tokens: Tensor, stops: list[Stop]) -> Iterator[tuple[Stop, Totals]]:
        """Each stop with its totals over one batch of sequences, [batch, length]."""
        if self.teacher is not None and number == len(self._targets):
            with _evaluating(self.teacher):
                outputs = self.teacher.model(tokens.to(self.teacher.device), placement=self.teacher.placement())
            self._learn_targets(tokens, self._select(outputs.last_hidden_state).to(tokens.device), self.teacher)
        for stop, hidden in zip(stops, walk(self.model.model, tokens, stops), strict=True):
            normed = self.model.model.norm(self._select(hidden))
            if number == len(self._targets):
                self._learn_targets(tokens, normed, self.model)
            yield stop, self._targets[number].compare(normed, self.model.lm_head)

    def _select(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden] -> the judged positions, [batch * positions, hidden]."""
        return hidden[:, self._judged.to(hidden.device)].flatten(0, 1)

    def _learn_targets(self, tokens: Tensor, hidden: Tensor, teacher: GearshiftForCausalLM) -> None:
        """Keep what the teacher says of the next batch: `hidden` [positions, hidden] is its final states."""
        labels = tokens[:, self._judged.to(tokens.device) + 1].flatten()
        row = 4 * self.model.spec.vocab_size
        kept = sum(len(targets.labels) for targets in self._targets if targets.keep)
        keep = (kept + len(labels)) * row <= self.settings.teacher_bytes
        self._targets.append(Targets(hidden, labels, teacher.lm_head, self.settings.chunk, keep))

    def _score(self, placement: Placement, totals: Totals) -> Score:
        mean = Totals(*(total / self.positions for total in totals))
        surprise = mean.negative_log_likelihood
        perplexity = math.exp(surprise) if surprise < 700 else math.inf
        return Score(placement, mean.divergence, perplexity, mean.agreements)


@contextmanager
def _evaluating(model: GearshiftForCausalLM) -> Iterator[None]:
    """The model in evaluation mode, and back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
