"""A decoder's words: a vocabulary learned from the captions at hand, or a pretrained one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from edge_glass.encoders.weights import load_checkpoint

PAD, END, SYSTEM, USER, ASSISTANT = "<pad>", "<end>", "<system>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def trained_tokenizer(texts: list[str], vocabulary: int = 2048) -> PreTrainedTokenizerBase:
    """A byte-level BPE (Sennrich et al. 2016) of these texts, with a chat template of one token a role.

    Any text can be written in it: what it has no word for is spelt in bytes. Equal texts give equal tokenizers.

    Args:
        texts: captions and prompts.
        vocabulary: the most entries, the 256 bytes and five markers included.

    Raises:
        ValueError: a vocabulary too small for bytes and markers.
    """
    special = [PAD, END, SYSTEM, USER, ASSISTANT]
    if vocabulary < 256 + len(special):
        raise ValueError(f"vocabulary={vocabulary}: give at least {256 + len(special)}, the bytes and the markers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a name is one word, wherever it stands
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def pretrained_tokenizer(texts: list[str], name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Args:
        texts: not needed; every tokenizer of a config is given them.
        name: a folder, `package:<package>/<folder>`, or a hub name.

    Raises:
        WeightsNotFound: no such checkpoint.
        ValueError: a tokenizer without chat template or end token.
    """
    tokenizer = load_checkpoint(name, AutoTokenizer.from_pretrained)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no chat template or no end token: give an instruction model")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    return tokenizer
