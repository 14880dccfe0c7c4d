"""A Tiny Recursive Model with words: what it is asked, what it answers, and whether it is done.

"Less is More: Recursive Reasoning with Tiny Networks" (Jolicoeur-Martineau 2025, https://arxiv.org/abs/2510.04871).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, rms_norm
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from edge_glass.data.batch import Dialogue
from edge_glass.decoders.decoder import AnswerLoss, LanguageDecoder, Sampling
from edge_glass.decoders.recursion import EPSILON, KeyValueCache, Recursion, Thought, linear, truncated_normal
from edge_glass.encoders.tokens import Tokens

HALTING_WEIGHT = 0.5  # of the halting loss beside the cross-entropy, as in the paper's code


class TinyRecursiveModel(nn.Module):
    """Tokens in, thinking in several supervision steps, scores of tokens out.

    Args:
        vocabulary: how many tokens there are.
        width: of the tokens.
        heads: attention heads.
        layers: blocks of the net.
        latent_steps: `n` of the paper.
        cycles: `T` of the paper; all but the last run without gradient.
        supervision: the most supervision steps, each with a loss of its own and a thought taken over from the one
            before without its history.
        mlp_ratio: see `Recursion`.
        causal: whether a token sees only those before it.
        recursive: False: the net is applied once, a plain transformer, to compare with.
        scores: what turns the head's output into probabilities: `softmax`, or `stablemax` (Prieto et al. 2025,
            https://arxiv.org/abs/2501.04697), whose scores grow linearly: s(x) = x + 1 for x >= 0, else 1 / (1 - x).
        exploration: probability that a training sample must think for a random number of steps, however soon the
            halting head thinks it is done.

    Raises:
        ValueError: a value that cannot work.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        layers: int = 2,
        latent_steps: int = 6,
        cycles: int = 3,
        supervision: int = 16,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        recursive: bool = True,
        scores: Literal["softmax", "stablemax"] = "softmax",
        exploration: float = 0.1,
    ):
        super().__init__()
        if supervision < 1:
            raise ValueError(f"supervision={supervision}: give at least 1 step")
        if scores not in ("softmax", "stablemax"):
            raise ValueError(f"scores={scores!r}: give softmax or stablemax")
        if not 0 <= exploration <= 1:
            raise ValueError(f"exploration={exploration}: give a probability in 0..1")
        self.supervision = supervision
        self.scores = scores
        self.exploration = exploration
        self.recursion = Recursion(width, heads, layers, latent_steps, cycles, mlp_ratio, causal, recursive)
        self.words = nn.Embedding(vocabulary, width)
        truncated_normal(self.words.weight, 1.0)
        self.head = linear(width, vocabulary)
        self.halt = nn.Linear(width, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -5.0)  # hardly ever done, until it has learned when

    def logits(self, answer: Tensor) -> Tensor:
        """Logits `[..., vocabulary]`, float32, of thought answers `[..., width]`; their softmax are probabilities."""
        scores = self.head(answer)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        if self.scores == "stablemax":  # s(x) / sum s is the softmax of log s(x) = sign(x) log(1 + |x|)
            scores = scores.sign() * scores.abs().log1p()
        return scores

    def done(self, thought: Thought, real: Tensor) -> Tensor:
        """How sure the model is that its answer is right, a logit `[batch]`, read from the mean of the real tokens."""
        weights = real.to(thought.answer.dtype)
        mean = (weights[:, None, :] @ thought.answer).squeeze(1) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.halt(mean).squeeze(-1).float()

    def halted(self, done: Tensor, steps: Tensor) -> Tensor:
        """Which training samples end after `steps` `[batch]` supervision steps; the last step ends all."""
        fewest = torch.randint_like(steps, 2, max(self.supervision, 2) + 1)
        explores = torch.rand(steps.shape, device=steps.device) < self.exploration
        return (steps >= self.supervision) | ((done > 0) & ~(explores & (steps < fewest)))


class TRMDecoder(LanguageDecoder):
    """A language decoder that thinks before each token: causal, so that every recursion step can be cached.

    In training all supervision steps are made in one pass, from one prefix, and their losses averaged; a sample leaves
    them when the halting head calls it done. In evaluation all steps are made: `exploration` must be large enough to
    keep the later ones in training, too.

    Args:
        tokenizer: the words.
        width: of the tokens and of the prefix.
        heads: attention heads.
        layers: blocks of the net.
        latent_steps: `n` of the paper.
        cycles: `T` of the paper.
        supervision: supervision steps.
        mlp_ratio: see `Recursion`.
        causal: must be true; the other use is `edge_glass.tasks.puzzle.PuzzleTask`.
        scores: see `TinyRecursiveModel`.
        exploration: see `TinyRecursiveModel`.

    Raises:
        ValueError: a value that cannot work.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        width: int,
        heads: int,
        layers: int = 2,
        latent_steps: int = 2,
        cycles: int = 2,
        supervision: int = 2,
        mlp_ratio: float = 4.0,
        causal: bool = True,
        scores: Literal["softmax", "stablemax"] = "softmax",
        exploration: float = 0.5,
    ):
        super().__init__(tokenizer, width, adapted=False)
        if not causal:
            raise ValueError(
                "causal=false: each token would see the ones it is to predict; a language decoder is causal, and "
                "decoder=trm_solver solves puzzles without"
            )
        self.trm = TinyRecursiveModel(
            len(tokenizer),
            width,
            heads,
            layers,
            latent_steps,
            cycles,
            supervision,
            mlp_ratio,
            causal,
            scores=scores,
            exploration=exploration,
        )

    def forward(self, prefix: Tokens, text: Dialogue) -> AnswerLoss:
        trm = self.trm
        question, real = self._question(prefix, text.ids), torch.cat([prefix.mask, text.real], dim=1)
        sight = trm.recursion.sight(real)
        thought = trm.recursion.begin(question)
        rows = torch.arange(len(text), device=real.device)  # samples that are still thinking
        nll = torch.zeros(len(text), device=real.device)
        halting = torch.zeros(len(text), device=real.device)
        steps = torch.zeros(len(text), device=real.device, dtype=torch.int64)
        for step in range(trm.supervision):
            thought = trm.recursion(question[rows], thought.detach(), sight.take(rows))
            if not self.training and step < trm.supervision - 1:
                continue
            losses, right = self._losses(thought, text[rows], prefix.mask.shape[1])
            nll = nll.to(losses.dtype).index_add(0, rows, losses)
            steps = steps.index_fill(0, rows, step + 1 if self.training else 1)
            if not self.training:
                break
            done = trm.done(thought, real[rows])
            halting = halting.index_add(
                0, rows, binary_cross_entropy_with_logits(done, right.float(), reduction="none")
            )
            go_on = ~trm.halted(done.detach(), steps[rows])
            rows, thought = rows[go_on], Thought(thought.answer[go_on], thought.latent[go_on])
            if not len(rows):
                break
        figures = {"thinking/steps": steps.float().mean()} if self.training else {}
        return AnswerLoss(nll / steps, HALTING_WEIGHT * halting / steps, figures)

    def _question(self, prefix: Tokens, ids: Tensor) -> Tensor:
        words = self.trm.words(ids)
        # Prefix tokens of the size that words have, so that neither drowns the other.
        scaled = rms_norm(prefix.tokens, (self.width,), eps=EPSILON)
        return torch.cat([scaled.to(words.dtype), words], dim=1)

    def _losses(self, thought: Thought, text: Dialogue, prefix: int) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each answer `[batch]`, and whether each of its tokens is the likeliest."""
        rows, places = text.answer.nonzero(as_tuple=True)
        logits = self.trm.logits(thought.answer[rows, prefix + places - 1])  # the token before says the next
        targets = text.ids[rows, places]
        nll = cross_entropy(logits, targets, reduction="none")
        wrong = (logits.argmax(-1) != targets).to(nll.dtype)
        zeros = nll.new_zeros(len(text))
        return zeros.index_add(0, rows, nll), zeros.index_add(0, rows, wrong.detach()) == 0

    @torch.no_grad()
    def generate(self, prefix: Tokens, text: Dialogue, sampling: Sampling) -> list[str]:
        was_training = self.training
        self.eval()
        try:
            ids = self._continue(prefix, text, sampling)
        finally:
            self.train(was_training)
        return [_cut(said, sampling.stop) for said in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _continue(self, prefix: Tokens, text: Dialogue, sampling: Sampling) -> Tensor:
        """The tokens said, `[batch, new]`; padding after an end."""
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        real = torch.cat([prefix.mask, text.real], dim=1)
        cache = KeyValueCache(real.shape[1] + sampling.max_new_tokens)
        question = self._question(prefix, text.ids)
        ended = torch.zeros(len(text), dtype=torch.bool, device=real.device)
        said = text.ids[:, :0]
        for _ in range(sampling.max_new_tokens):
            token = draw(self._next(question, real, cache), sampling).masked_fill(ended, pad)
            said = torch.cat([said, token[:, None]], dim=1)
            ended = ended | (token == end) | self._stopped(said, sampling.stop)
            if ended.all():
                break
            real = torch.cat([real, real.new_ones(len(text), 1)], dim=1)
            question = self.trm.words(token[:, None])
        return said

    def _next(self, question: Tensor, real: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits `[batch, vocabulary]` of the token after these, the cache holding those before them."""
        cache.begin(question.shape[1])
        sight = self.trm.recursion.sight(real, cache)
        thought = self.trm.recursion.begin(question)
        for _ in range(self.trm.supervision):
            thought = self.trm.recursion(question, thought, sight)
        cache.end()
        return self.trm.logits(thought.answer[:, -1])

    def _stopped(self, said: Tensor, stop: list[str]) -> Tensor:
        if not stop:
            return torch.zeros(len(said), dtype=torch.bool, device=said.device)
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return torch.tensor([any(word in text for word in stop) for text in texts], device=said.device)


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each row, `[batch]`, from logits `[batch, vocabulary]`."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    warp = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k is not None:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    warped = warp(torch.empty(0, dtype=torch.int64), logits)  # type: ignore[arg-type]
    return torch.multinomial(warped.softmax(-1), 1).squeeze(1)


def _cut(text: str, stop: list[str]) -> str:
    """The text before the first of the stop strings."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(places, default=len(text))].strip()
