"""Language: a decoder that reads what towers see and hear, alone or beside their alignment."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from edge_glass.data.batch import Batch, Dialogue
from edge_glass.decoders.decoder import AnswerLoss, LanguageDecoder, Sampling
from edge_glass.encoders.tokens import Tokens
from edge_glass.models.alignment import MultimodalAlignmentModel
from edge_glass.models.fusion import EMBEDDING, Fused, MultimodalFusion
from edge_glass.tasks.alignment import AlignmentTask, LossGradient
from edge_glass.tasks.task import Losses


class LanguageTask(AlignmentTask):
    """Answers questions about media; in training also aligns them, unless it has no loss for that.

    Args:
        model: the towers, whose tokens are read.
        fusion: to the decoder's prefix: the tokens of modalities, the embedding that they share (the mean over what a
            sample shows, of unit length), or both.
        decoder: prefix and prompt to an answer.
        loss: of the embeddings; see `AlignmentTask`; None to train the decoder alone.
        media: the modalities that the decoder may be shown, by their tokens, the embedding, or both: see `fusion`.
        weight: of the language loss, the mean over answer tokens, beside the alignment. What else a decoder trains on
            counts for each of a sample's answer tokens.
        train_towers: False leaves the towers as they are, in evaluation mode and without gradient.

    Raises:
        ValueError: towers that stay as they are, but should be aligned; or a fusion of modalities without a tower.
    """

    leaves_out = True  # what belongs to media that no sample of a batch shows

    def __init__(
        self,
        model: MultimodalAlignmentModel,
        fusion: MultimodalFusion,
        decoder: LanguageDecoder,
        loss: nn.Module | None,
        media: Sequence[str],
        weight: float = 1.0,
        train_towers: bool = True,
    ):
        super().__init__(model, nn.Identity() if loss is None else loss)
        if loss is not None and not train_towers:
            raise ValueError("the towers stay as they are, but there is a loss to align them; give only one of the two")
        missing = [
            name for name in dict.fromkeys([*media, *fusion.modalities]) if name not in (*model.towers, EMBEDDING)
        ]
        if missing:
            raise ValueError(
                f"the decoder reads {missing}, for which there is no tower; there are {list(model.towers)}"
            )
        self.compares = loss is not None
        self.fusion = fusion
        self.media = list(media)
        self.decoder = decoder
        self.weight = weight
        self.train_towers = train_towers
        if not train_towers:
            model.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "LanguageTask":
        super().train(mode)
        if not self.train_towers:
            self.model.eval()
        return self

    def terms(self, batch: Batch) -> int:
        """Answer tokens."""
        return 0 if batch.dialogue is None else int(batch.dialogue.answer.sum())

    def forward(self, batch: Batch, terms: float | None = None, gradient: LossGradient | None = None) -> Losses:
        """See `AlignmentTask.forward` and `Task`; the loss of the answers comes on top, `loss/lm` in the figures."""
        tokens = self.tokens(batch, self.compares)
        losses: list[Tensor] = []
        figures: dict[str, Tensor] = {}
        embeddings: dict[str, Tensor] = {}
        if self.compares:
            embeddings = {name: self.model.tower(name).embed(part) for name, part in tokens.items()}
            aligned, figures = self.alignment(embeddings, batch, gradient)
            losses.append(aligned)
        if batch.dialogue is not None:
            answers, said = self.answer_loss(batch, tokens, embeddings)
            tokens_said = batch.dialogue.answer.sum(1)
            count = max(self.terms(batch) if terms is None else terms, 1)
            further = self.weight * (answers.nll + tokens_said * answers.extra).sum() / count
            losses.append(further if gradient is None else gradient.scale(further))
            figures |= {"loss/lm": answers.nll.sum().detach() / count, **said}
        return torch.stack(losses).sum(), figures

    def tokens(self, batch: Batch, all_of_them: bool) -> dict[str, Tokens]:
        """The towers' tokens, of each modality of the batch or of those that the decoder sees."""
        wanted = [name for name in self.model.shared(batch) if all_of_them or name in batch.shown]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_towers):
            return {name: self.model.tower(name).tokens(batch.inputs(name)) for name in wanted}

    def answer_loss(
        self, batch: Batch, tokens: dict[str, Tokens], embeddings: dict[str, Tensor] | None = None
    ) -> tuple[AnswerLoss, dict[str, Tensor]]:
        """The loss of a batch's answers and figures for the log; see `prefix`."""
        assert batch.dialogue is not None
        fused = self.prefix(batch, tokens, embeddings)
        answers = self.decoder(fused.prefix, batch.dialogue)
        return answers, fused.figures | answers.figures

    def prefix(self, batch: Batch, tokens: dict[str, Tokens], embeddings: dict[str, Tensor] | None = None) -> Fused:
        """The decoder's prefix, `[batch, prefix, width]`: empty where it sees no media at all.

        Args:
            batch: the samples, and what is shown of them.
            tokens: of the towers, for what is shown.
            embeddings: modality -> `[inputs, out_dim]` as the towers give them, where they are known already.
        """
        seen = {
            name: _laid_out(tokens[name], batch.rows.get(name), batch.shown[name])
            for name in self.fusion.modalities
            if name in batch.shown
        }
        if EMBEDDING in self.fusion.modalities and batch.shown:
            seen[EMBEDDING] = self._embedding(batch, tokens, embeddings or {})
        if not seen:
            device = batch.concept_ids.device
            nothing = torch.zeros(len(batch), 0, self.decoder.width, device=device)
            return Fused(Tokens(nothing, torch.zeros(len(batch), 0, dtype=torch.bool, device=device)))
        return self.fusion(seen)

    def _embedding(self, batch: Batch, tokens: dict[str, Tokens], embeddings: dict[str, Tensor]) -> Tokens:
        """The shared embedding of what each sample shows, one token `[batch, 1, out_dim]` of unit length."""
        parts = []
        for name, shown in batch.shown.items():
            made = embeddings[name] if name in embeddings else self.model.tower(name).embed(tokens[name])
            own = len(batch.rows.get(name, batch.sample_ids))  # captions that belong to no sample come after those
            made = normalize(self.model.recalled(name, made[:own].float()), dim=-1)
            one = Tokens(made[:, None], torch.ones(len(made), 1, dtype=torch.bool, device=made.device))
            parts.append(_laid_out(one, batch.rows.get(name), shown))
        total = torch.stack([part.tokens * part.mask[..., None] for part in parts]).sum(0)
        return Tokens(normalize(total, dim=-1), torch.stack([part.mask for part in parts]).any(0))

    @torch.no_grad()
    def answer(self, batch: Batch, prompts: Dialogue, sampling: Sampling) -> list[str]:
        """What the decoder says to a prompt for each sample, in evaluation mode.

        Args:
            batch: the media, and which of them are `shown`.
            prompts: without answers, padded on the left.
            sampling: how text is drawn.
        """
        was_training = self.training
        self.eval()
        try:
            tokens = self.tokens(batch, all_of_them=False) if batch.shown else {}
            return self.decoder.generate(self.prefix(batch, tokens).prefix, prompts, sampling)
        finally:
            self.train(was_training)


def _laid_out(tokens: Tokens, rows: Tensor | None, shown: Tensor) -> Tokens:
    """Tokens with a row for every sample, masked where the sample has none or the decoder is not to see them."""
    values, mask = tokens.tokens, tokens.mask
    if rows is not None:
        whole = values.new_zeros(len(shown), *values.shape[1:])
        values = whole.index_copy(0, rows, values)
        mask = mask.new_zeros(len(shown), mask.shape[1]).index_copy(0, rows, mask)
    return Tokens(values, mask & shown[:, None])
