"""What a decoder is asked about media, and what it should answer: templates, and their token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from edge_glass.data.batch import MODALITIES, Dialogue
from edge_glass.data.rows import DataError

FIELDS = ("text", "keyword", "other")


class TooLong(Exception):
    """A prompt that leaves no room for its answer."""


@dataclass
class Exchange:
    """A prompt and its answer, as token ids.

    Attributes:
        prompt: up to where the answer begins, chat markers included.
        answer: with the end token, unless it was cut; empty where an answer is to be found.
    """

    prompt: list[int]
    answer: list[int] = field(default_factory=list)


class Chat:
    """Writes exchanges in the tokens and the chat format of a decoder.

    Args:
        tokenizer: with a chat template and an end token.
        max_tokens: the most tokens of prompt and answer together.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int):
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def exchange(self, prompt: str, answer: str | None = None, system: str = "") -> Exchange:
        """A prompt with its answer; without one, the prompt alone.

        The answer ends with the tokenizer's end token. What is longer than `max_tokens` is cut at the end of the
        answer, whose end token then goes too: nothing says that the answer is over.

        Raises:
            TooLong: no token of the answer (or, without one, not even the prompt) would be left.
        """
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        written = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        asked = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        room = self.max_tokens - len(asked)
        if room < (1 if answer is not None else 0):
            raise TooLong(
                f"the prompt has {len(asked)} tokens, which leaves no room for the answer in {self.max_tokens}"
            )
        if answer is None:
            return Exchange(asked)
        said = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return Exchange(asked, [*said, self.tokenizer.eos_token_id][:room])

    def dialogue(self, exchanges: Sequence[Exchange], left: bool = False) -> Dialogue:
        """Exchanges as a batch, padded on the right, as for training, or on the left, as for generation."""
        length = max((len(e.prompt) + len(e.answer) for e in exchanges), default=0)
        ids = torch.full((len(exchanges), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        answer = torch.zeros(ids.shape, dtype=torch.bool)
        for row, exchange in enumerate(exchanges):
            tokens = exchange.prompt + exchange.answer
            begin = length - len(tokens) if left else 0
            ids[row, begin : begin + len(tokens)] = torch.tensor(tokens)
            real[row, begin : begin + len(tokens)] = True
            answer[row, begin + len(exchange.prompt) : begin + len(tokens)] = True
        return Dialogue(ids, real, answer)


@dataclass
class Template:
    """A question about media, and its answer.

    Attributes:
        ask: the prompt.
        answer: what is right. In both, `{text}` is the sample's caption, `{keyword}` one of its keywords, and
            `{other}` the caption of another concept.
    """

    ask: str
    answer: str = "{text}"

    def fields(self) -> set[str]:
        """The names in braces."""
        return {name for part in (self.ask, self.answer) for _, name, _, _ in Formatter().parse(part) if name}


class Prompts:
    """Templates for every set of media that a decoder may be shown.

    Args:
        templates: `image`, `audio`, `image_audio` ... -> templates, each with `ask` and maybe `answer`. The first of
            each is what evaluation asks.

    Raises:
        DataError: a set of media that there is not, one without templates, or a field that is no column.
    """

    def __init__(self, templates: Mapping[str, Sequence[Mapping[str, str]]]):
        self.templates: dict[str, list[Template]] = {}
        for name, entries in templates.items():
            if not entries:
                raise DataError(f"dataset.prompts.{name} is empty: give at least one template")
            if [part for part in MODALITIES if part in name.split("_")] != name.split("_"):
                raise DataError(f"dataset.prompts.{name}: no set of media has that name; say image, audio, image_audio")
            self.templates[name] = [self._template(name, entry) for entry in entries]

    @staticmethod
    def _template(name: str, entry: Mapping[str, str]) -> Template:
        unknown = sorted(set(entry) - {"ask", "answer"})
        if unknown or "ask" not in entry:
            raise DataError(f"dataset.prompts.{name}: a template has `ask` and maybe `answer`, not {dict(entry)}")
        template = Template(**entry)
        wrong = sorted(template.fields() - set(FIELDS))
        if wrong:
            raise DataError(f"dataset.prompts.{name}: {{{wrong[0]}}} is no field of a template; there are {FIELDS}")
        return template

    def of(self, shown: Sequence[str]) -> list[Template]:
        """The templates for these media.

        Raises:
            DataError: there are none.
        """
        name = "_".join(part for part in MODALITIES if part in shown)
        if name not in self.templates:
            raise DataError(
                f"dataset.prompts has nothing to ask about {name}; it has prompts for {sorted(self.templates)}"
            )
        return self.templates[name]

    def texts(self) -> list[str]:
        """Every prompt and answer as written, for a vocabulary."""
        return [part for entries in self.templates.values() for entry in entries for part in (entry.ask, entry.answer)]

    def draw(
        self,
        shown: Sequence[str],
        text: str,
        keywords: Sequence[str],
        other: str | None,
        generator: np.random.Generator,
    ) -> tuple[str, str]:
        """A prompt and its answer for a sample.

        Args:
            shown: media that the decoder sees.
            text: the sample's caption.
            keywords: may be empty; then templates with `{keyword}` are passed over.
            other: the caption of another concept, or None; then templates with `{other}` are passed over.
            generator: of the sample.
        """
        lacking = {name for name, value in (("keyword", keywords), ("other", other)) if not value}
        usable = [template for template in self.of(shown) if not template.fields() & lacking]
        if not usable:
            raise DataError(f"no template for {sorted(shown)} does without {sorted(lacking)}, which this sample lacks")
        template = usable[generator.integers(len(usable))]
        values = {"text": text, "other": other or "", "keyword": ""}
        if "keyword" in template.fields():
            values["keyword"] = keywords[int(generator.integers(len(keywords)))]
        return template.ask.format(**values), template.answer.format(**values)
