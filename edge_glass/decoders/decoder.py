"""What every language decoder promises."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from edge_glass.data.batch import Dialogue
from edge_glass.encoders.tokens import Tokens


@dataclass
class AnswerLoss:
    """How well a decoder says the answers.

    Attributes:
        nll: `[batch]` float32, the negative log-likelihood of each sample's answer tokens, summed over them, in nats.
        extra: `[batch]`, a further loss to train on (zeros in evaluation), such as that of a halting head.
        figures: for the log, without gradient.
    """

    nll: Tensor
    extra: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Sampling:
    """How text is drawn.

    Attributes:
        max_new_tokens: the most tokens of an answer.
        temperature: of the softmax; 0 takes the likeliest token each time.
        top_k: draw among this many of the likeliest tokens; None among all.
        top_p: draw among the likeliest tokens that together have this probability; None among all.
        stop: strings that end an answer, beside the tokenizer's end token; they are no part of it.

    Raises:
        ValueError: a value that makes no sense.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: give at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: give 0 for the likeliest tokens, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a probability above 0, or null for all tokens")
        if "" in self.stop:
            raise ValueError("stop holds an empty string, which every answer begins with")


class LanguageDecoder(nn.Module, ABC):
    """Says text after a prefix of vectors.

    The sequence is prefix, prompt, answer; each token sees the real tokens before it, the prefix at every step. Masked
    tokens of the prefix, wherever they stand, change nothing: positions count real tokens only.

    Args:
        tokenizer: with a chat template, a padding token and an end token.
        width: of the prefix.
        adapted: whether most weights stay as they were loaded: only those that are trained go into checkpoints.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, adapted: bool):
        super().__init__()
        self.tokenizer = tokenizer
        self.width = width
        self.adapted = adapted

    @abstractmethod
    def forward(self, prefix: Tokens, text: Dialogue) -> AnswerLoss:
        """The loss of the answers.

        Args:
            prefix: `[batch, prefix, width]` and mask.
            text: prompts with answers, padded on the right.
        """

    @abstractmethod
    def generate(self, prefix: Tokens, text: Dialogue, sampling: Sampling) -> list[str]:
        """An answer to each prompt, in evaluation mode, without gradient.

        Draws from torch's random numbers unless the temperature is 0.

        Args:
            prefix: `[batch, prefix, width]` and mask.
            text: prompts without answers, padded on the left.
            sampling: how.
        """
