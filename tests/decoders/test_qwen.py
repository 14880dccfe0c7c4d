"""A transformers language model as decoder: what it learns from, what it says, and what it leaves on the disk."""

import importlib.util
import json
import logging
import socket
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from edge_glass.data.batch import Dialogue
from edge_glass.decoders.decoder import Sampling
from edge_glass.decoders.qwen import QwenDecoder
from edge_glass.decoders.tokenizers import pretrained_tokenizer, trained_tokenizer
from edge_glass.encoders.tokens import Tokens
from edge_glass.encoders.weights import WeightsNotFound
from tests.ranks import run_ranks

WIDTH = 32
PAIRS = [("what is this?", "red circle"), ("what", "a green square"), ("is this a circle?", "no, a blue cross")]
TOKENIZER = trained_tokenizer([text for pair in PAIRS for text in pair], 320)
TINY = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PRECISIONS = {"fp32": {}, "int8": {"load_in_8bit": True}, "nf4": {"load_in_4bit": True}}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
GREEDY = Sampling(max_new_tokens=8)

precisions = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loading from a folder must work on a plane; and a test must not wait for a hub."""
    connect = socket.socket.connect

    def refuse(*args, **kwargs):
        raise ConnectionError("no network in this test")

    def connect_here_only(self, address):
        return connect(self, address) if self.family == socket.AF_UNIX else refuse()

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_here_only)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A small Qwen2 as the hub keeps one, with settings that would spoil generation."""
    return write(tmp_path_factory.mktemp("qwen"))


def write(path: Path, tied: bool = False) -> str:
    torch.manual_seed(0)
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    config = Qwen2Config(vocab_size=len(TOKENIZER), tie_word_embeddings=tied, initializer_range=0.2, **TINY, **ids)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # else zero
            nn.init.normal_(parameter)
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, temperature=0.7, repetition_penalty=9.0, **ids)
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


def load(folder: str, precision: str = "fp32", lora: dict | None = LORA, adapter: str | None = None, **options):
    """A decoder in evaluation mode, its LoRA drawn at random (peft's own adds nothing at first) or from a folder."""
    torch.manual_seed(1)
    decoder = QwenDecoder.from_pretrained(TOKENIZER, folder, lora=lora, **PRECISIONS[precision], **options).eval()
    if adapter:
        decoder.load_adapter(adapter)
    else:
        for parameter in trained(decoder).values():
            nn.init.normal_(parameter, std=0.1)
    return decoder


def trained(decoder: QwenDecoder) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in decoder.named_parameters() if parameter.requires_grad}


def dialogue(*pairs: tuple[str, str | None], length: int = 0, left: bool = False) -> Dialogue:
    """Prompts and answers (None: to be generated), padded to the longest or to `length`, on the right or left."""
    prompts = [TOKENIZER.encode(f"<user>{prompt}<assistant>") for prompt, _ in pairs]
    answers = [[] if answer is None else TOKENIZER.encode(f"{answer}<end>") for _, answer in pairs]
    length = max(length, *(len(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)))
    ids = torch.full((len(pairs), length), TOKENIZER.pad_token_id)
    real, carries = torch.zeros(2, *ids.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = length - len(prompt + answer) if left else 0
        end = start + len(prompt + answer)
        ids[row, start:end] = torch.tensor(prompt + answer)
        real[row, start:end] = True
        carries[row, end - len(answer) : end] = True
    return Dialogue(ids, real, carries)


def questions(*prompts: str, **padding) -> Dialogue:
    return dialogue(*((prompt, None) for prompt in prompts), left=True, **padding)


def random_prefix(batch: int = 3, tokens: int = 4, seed: int = 0) -> Tokens:
    drawn = torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return Tokens(drawn, torch.ones(batch, tokens, dtype=torch.bool))


def scattered(prefix: Tokens) -> Tokens:
    """The same prefix with masked tokens before, amid and behind, which hold no numbers at all."""
    batch, count = prefix.mask.shape
    places = torch.tensor([1, *range(3, 2 + count), 3 + count])[:count]
    tokens = torch.full((batch, count + 5, WIDTH), float("nan"))
    mask = torch.zeros(batch, count + 5, dtype=torch.bool)
    tokens[:, places], mask[:, places] = prefix.tokens, True
    return Tokens(tokens, mask)


def logits_of(decoder: QwenDecoder, prefix: Tokens, text: Dialogue, row: int) -> Tensor:
    """`[real tokens, vocabulary]` of one sample alone, without any padding or mask."""
    model = decoder.language_model
    words = model.get_input_embeddings()(text.ids[row][text.real[row]])
    sequence = torch.cat([prefix.tokens[row][prefix.mask[row]].to(words.dtype), words])
    return model(inputs_embeds=sequence[None]).logits[0]


def plain_nll(decoder: QwenDecoder, prefix: Tokens, text: Dialogue) -> Tensor:
    """The loss of each sample's answer, the plain way."""
    losses = []
    for row in range(len(text)):
        answer = text.ids[row][text.answer[row]]
        logits = logits_of(decoder, prefix, text, row)[-len(answer) - 1 : -1]
        losses.append(cross_entropy(logits.float(), answer, reduction="sum"))
    return torch.stack(losses)


def argmax_answer(decoder: QwenDecoder, prefix: Tokens, prompt: str, tokens: int) -> list[int]:
    """The likeliest tokens, each from the whole sequence anew."""
    text, said = questions(prompt), []
    for _ in range(tokens):
        said.append(int(logits_of(decoder, prefix, text, 0)[-1].argmax()))
        ids = torch.cat([text.ids, torch.tensor([said[-1:]])], dim=1)
        text = Dialogue(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        if said[-1] == TOKENIZER.eos_token_id:
            break
    return said


def text_of(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True).strip()


def count_steps(decoder: QwenDecoder) -> list[int]:
    """A list that grows with each pass through the language model, by the number of its tokens."""
    steps: list[int] = []
    decoder.language_model.model.norm.register_forward_hook(lambda _, inputs, __: steps.append(inputs[0].shape[1]))
    return steps


def gradients(decoder: QwenDecoder, prefix: Tokens, text: Dialogue) -> dict[str, Tensor]:
    """Of the mean loss, for what is trained and the prefix."""
    inputs = {**trained(decoder), "prefix": prefix.tokens.requires_grad_()}
    found = torch.autograd.grad(decoder(prefix, text).nll.mean(), list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def train(decoder: QwenDecoder, prefix: Tokens, text: Dialogue, steps: int, lr: float = 2e-2) -> list[float]:
    decoder.train()
    optimizer = torch.optim.AdamW(trained(decoder).values(), lr)
    losses = []
    for _ in range(steps):
        loss = decoder(prefix, text)
        total = loss.nll.mean() + loss.extra.mean()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    decoder.eval()
    return losses


# The loss


@precisions
def test_the_loss_is_that_of_the_answers_tokens_each_from_what_stands_before_it(folder, precision):
    # In training: in evaluation int8 looks for outliers among all tokens of a batch.
    decoder, prefix, text = load(folder, precision).train(), random_prefix(), dialogue(*PAIRS)
    loss = decoder(prefix, text)
    assert loss.nll.shape == (3,) and loss.nll.dtype == torch.float32
    assert loss.extra.tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(loss.nll, plain_nll(decoder, prefix, text))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_other_language_models_have_the_same_loss(model_type):
    options = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2} if model_type == "gpt2" else {**TINY, "head_dim": 8}
    options |= {"final_logit_softcapping": 0.1} if model_type == "gemma2" else {}
    decoder = QwenDecoder.from_config(TOKENIZER, model_type, **options).eval()
    assert decoder.language_model.config.bos_token_id is None  # the tokenizer has none
    prefix, text = random_prefix(), dialogue(*PAIRS)
    torch.testing.assert_close(decoder(scattered(prefix), text).nll, plain_nll(decoder, prefix, text))


@precisions
def test_masked_prefix_tokens_change_nothing_wherever_they_stand(folder, precision):
    decoder, prefix, text = load(folder, precision), random_prefix(), dialogue(*PAIRS)
    torch.testing.assert_close(decoder(scattered(prefix), text).nll, decoder(prefix, text).nll)
    prompts, odd = questions("what is this?", "what", "is this a circle?"), scattered(prefix)
    assert decoder.generate(odd, prompts, GREEDY) == decoder.generate(prefix, prompts, GREEDY)


def test_a_masked_prefix_token_has_no_gradient(folder):
    decoder, prefix = load(folder), scattered(random_prefix())
    found = gradients(decoder, prefix, dialogue(*PAIRS))["prefix"]
    assert torch.equal(found.abs().sum(2) > 0, prefix.mask)
    assert found.isfinite().all()


def test_an_absent_prefix_is_like_none(folder):
    decoder, text = load(folder), dialogue(*PAIRS)
    none = random_prefix(tokens=0)
    masked = Tokens(random_prefix().tokens, torch.zeros(3, 4, dtype=torch.bool))
    torch.testing.assert_close(decoder(none, text).nll, plain_nll(decoder, none, text))
    torch.testing.assert_close(decoder(masked, text).nll, decoder(none, text).nll)
    prompts = questions("what is this?", "what", "is this a circle?")
    assert decoder.generate(masked, prompts, GREEDY) == decoder.generate(none, prompts, GREEDY)


@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_loss_and_no_gradient(folder, left):
    decoder, prefix = load(folder), random_prefix()
    expected = gradients(decoder, prefix, dialogue(*PAIRS))
    torch.testing.assert_close(gradients(decoder, prefix, dialogue(*PAIRS, length=40, left=left)), expected)


def test_an_answer_may_follow_the_prefix_at_once(folder):
    decoder, prefix, whole = load(folder), scattered(random_prefix()), dialogue(PAIRS[0])
    bare = Dialogue(*(part[whole.answer][None] for part in (whole.ids, whole.real, whole.answer)))
    one = Tokens(prefix.tokens[:1], prefix.mask[:1])
    torch.testing.assert_close(decoder(one, bare).nll, plain_nll(decoder, one, bare))
    with pytest.raises(ValueError, match="an answer has neither prefix nor prompt before it"):
        decoder(random_prefix(1, 0), bare)


def test_samples_without_an_answer_cost_nothing(folder):
    decoder, prefix = load(folder), random_prefix(2)
    mixed = decoder(prefix, dialogue(PAIRS[0], ("what", None))).nll
    assert mixed[0] > 0 and mixed[1] == 0
    nothing = gradients(decoder, prefix, dialogue(("what", None), ("is this?", None)))
    assert all((gradient == 0).all() for gradient in nothing.values())


def test_logits_are_computed_only_where_an_answer_is_predicted_from(folder):
    decoder, prefix, text = load(folder), random_prefix(), dialogue(("what " * 30, "red"), ("what " * 30, "green"))
    shapes = []
    head = decoder.language_model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, logits: shapes.append(logits.shape))
    decoder(Tokens(prefix.tokens[:2], prefix.mask[:2]), text)
    assert shapes == [(2, int(text.answer.sum(1).max()), len(TOKENIZER))]


def test_under_autocast_the_loss_is_fp32_and_near(folder):
    decoder, prefix, text = load(folder), random_prefix(), dialogue(*PAIRS)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(decoder, prefix, text)
        loss = decoder(prefix, text).nll
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, decoder(prefix, text).nll, rtol=0.03, atol=0.0)
    for name, expected in gradients(decoder, prefix, text).items():
        assert torch.cosine_similarity(found[name].flatten(), expected.flatten(), dim=0) > 0.98, name


# Training


@precisions
def test_training_lowers_the_loss_and_changes_the_lora_alone(folder, precision):
    decoder, prefix, text = load(folder, precision), random_prefix(), dialogue(*PAIRS)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    losses = train(decoder, prefix, text, steps=8)
    changed = {name for name, tensor in decoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert losses[-1] < 0.8 * losses[0]
    assert changed == set(trained(decoder))
    assert all(".lora_" in name for name in changed)
    assert len(changed) == 2 * 2 * len(LORA["target_modules"])
    assert {parameter.dtype for parameter in trained(decoder).values()} == {torch.float32}


@precisions
def test_gradients_reach_the_prefix_without_lora_too(folder, precision):
    decoder = load(folder, precision, lora=None)
    assert trained(decoder) == {} and decoder.adapted
    assert (gradients(decoder, random_prefix(), dialogue(*PAIRS))["prefix"].abs().sum(2) > 0).all()


@precisions
def test_gradient_checkpointing_changes_no_gradient_and_keeps_the_cache_of_generation(folder, precision):
    plain, checkpointed = (load(folder, precision, gradient_checkpointing=knob).train() for knob in (False, True))
    prefix, text = random_prefix(), dialogue(*PAIRS)
    computed = []
    first = checkpointed.language_model.model.layers[0].input_layernorm
    first.register_forward_hook(lambda *_: computed.append(1))
    torch.testing.assert_close(gradients(checkpointed, prefix, text), gradients(plain, prefix, text))
    assert len(computed) == 2  # forward, and once more in backward
    prompts, steps = questions(*(prompt for prompt, _ in PAIRS)), count_steps(checkpointed)
    assert checkpointed.generate(prefix, prompts, GREEDY) == plain.generate(prefix, prompts, GREEDY)
    assert steps == [4 + prompts.ids.shape[1]] + [1] * (len(steps) - 1)


def test_a_model_from_a_config_learns_to_answer_from_the_prefix():
    torch.manual_seed(0)
    decoder = QwenDecoder.from_config(TOKENIZER, **TINY)
    config = decoder.language_model.config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (len(TOKENIZER), 0, 1)
    assert not decoder.adapted
    assert len(trained(decoder)) == len(list(decoder.parameters()))
    prefix = random_prefix()
    losses = train(decoder, prefix, dialogue(*(("what is this?", answer) for _, answer in PAIRS)), steps=60, lr=1e-2)
    assert losses[-1] < 0.1
    prompts = questions(*["what is this?"] * 3)
    assert decoder.generate(prefix, prompts, Sampling(max_new_tokens=16)) == [answer for _, answer in PAIRS]


def test_every_parameter_of_a_model_from_a_config_gets_a_gradient():
    decoder = QwenDecoder.from_config(TOKENIZER, gradient_checkpointing=True, **TINY).train()
    assert all(gradient.abs().sum() > 0 for gradient in gradients(decoder, random_prefix(), dialogue(*PAIRS)).values())


@pytest.mark.parametrize("choice", ["bf16", "auto"])
def test_weights_are_kept_in_the_type_that_is_asked_for_and_lora_in_fp32(folder, tmp_path, choice):
    if choice == "auto":
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
        folder = str(tmp_path)
    decoder = load(folder, dtype=choice)
    frozen = {parameter.dtype for parameter in decoder.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained(decoder).values()} == {torch.float32}
    prefix, text = scattered(random_prefix()), dialogue(*PAIRS)
    losses = train(decoder, prefix, text, steps=8)
    assert losses[-1] < 0.8 * losses[0]
    assert decoder(prefix, text).nll.dtype == torch.float32
    assert len(decoder.generate(prefix, questions("a", "b", "what is this?"), GREEDY)) == 3
    merged = QwenDecoder(TOKENIZER, decoder.merged(), adapted=True).eval()
    torch.testing.assert_close(merged(prefix, text).nll, decoder(prefix, text).nll, rtol=0.05, atol=0.0)


@pytest.mark.parametrize(("choice", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_4_bit_layers_are_nf4_and_compute_in_the_type_that_is_asked_for(folder, choice, expected):
    decoder = load(folder, "nf4", dtype=choice)
    layer = decoder.language_model.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert decoder.language_model.model.norm.weight.dtype == torch.float32  # whatever is not quantised
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, expected)


def test_8_bit_layers_do_not_log_every_multiplication(folder, caplog):
    decoder = load(folder, "int8")
    with caplog.at_level(logging.WARNING):
        decoder(random_prefix(), dialogue(*PAIRS))
    assert caplog.text == ""


class MeanLoss(nn.Module):
    """A decoder as DistributedDataParallel sees it: one module whose forward is the loss."""

    def __init__(self, decoder: QwenDecoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, prefix: Tokens, text: Dialogue) -> Tensor:
        loss = self.decoder(prefix, text)
        return loss.nll.mean() + loss.extra.mean()


def _gradients_of_a_rank(folder: str, adapter: str) -> dict[str, dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    found = {}
    for precision in ("int8", "nf4"):
        decoder = load(folder, precision, adapter=adapter, gradient_checkpointing=True).train()
        prefix, text = random_prefix(4), dialogue(*PAIRS, ("what is", "nothing"))
        ranks = DistributedDataParallel(MeanLoss(decoder))
        ranks(Tokens(prefix.tokens[mine], prefix.mask[mine]), text[mine]).backward()
        found[precision] = {name: parameter.grad for name, parameter in trained(decoder).items()}
    return found


def test_two_ranks_give_the_gradient_of_one_big_batch(folder, tmp_path):
    load(folder).save_adapter(tmp_path)
    results = run_ranks(_gradients_of_a_rank, folder, str(tmp_path))
    for precision in ("int8", "nf4"):
        decoder = load(folder, precision, adapter=str(tmp_path)).train()
        expected = gradients(decoder, random_prefix(4), dialogue(*PAIRS, ("what is", "nothing")))
        del expected["prefix"]
        for result in results:
            torch.testing.assert_close(result[precision], expected)


# Generation


@precisions
def test_greedy_answers_are_the_likeliest_tokens_of_the_whole_sequence(folder, precision):
    decoder = load(folder, precision)
    for prompt, seed in (("what is this?", 0), ("is this a circle?", 1)):
        prefix = random_prefix(1, seed=seed)
        expected = argmax_answer(decoder, prefix, prompt, 8)
        assert decoder.generate(prefix, questions(prompt), GREEDY) == [text_of(expected)]


@precisions
def test_a_batch_is_answered_as_its_rows_are_alone(folder, precision):
    decoder, prefix = load(folder, precision), random_prefix()
    prefix.mask[1, 3] = False  # a gap between prefix and padding
    prompts = ["what is this?", "what", "is this a circle or a square?"]
    together = decoder.generate(prefix, questions(*prompts, length=40), GREEDY)
    for row, prompt in enumerate(prompts):
        alone = Tokens(prefix.tokens[row : row + 1], prefix.mask[row : row + 1])
        assert decoder.generate(alone, questions(prompt), GREEDY) == together[row : row + 1]


def test_the_prefix_is_seen_at_every_step(folder):
    decoder, first, second = load(folder), random_prefix(1, seed=0), random_prefix(1, seed=1)
    said = argmax_answer(decoder, first, "what", 8)
    assert len(said) == 8
    for length in range(1, 8):  # the same words so far, another picture
        ids = torch.cat([questions("what").ids, torch.tensor([said[:length]])], dim=1)
        text = Dialogue(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool))
        one = Sampling(max_new_tokens=8 - length)
        assert decoder.generate(first, text, one) == [text_of(said[length:])]
        assert decoder.generate(second, text, one) != [text_of(said[length:])]


def test_drawing_among_one_token_takes_the_likeliest(folder):
    decoder, prefix, prompts = load(folder), random_prefix(), questions(*(prompt for prompt, _ in PAIRS))
    greedy = decoder.generate(prefix, prompts, GREEDY)
    for limits in ({"top_k": 1}, {"top_p": 1e-6}):
        drawn = decoder.generate(prefix, prompts, Sampling(max_new_tokens=8, temperature=1.0, **limits))
        assert drawn == greedy


def test_draws_follow_the_temperature_and_torchs_random_numbers_not_the_checkpoints_settings(folder):
    decoder, prefix, prompts = load(folder), random_prefix(), questions(*(prompt for prompt, _ in PAIRS))

    def draw(seed: int, temperature: float) -> list[str]:
        torch.manual_seed(seed)
        return decoder.generate(prefix, prompts, Sampling(max_new_tokens=8, temperature=temperature))

    assert draw(0, 2.0) == draw(0, 2.0)
    assert draw(0, 2.0) != draw(1, 2.0)  # the checkpoint would draw among one token
    assert decoder.language_model.generation_config.top_k == 1  # as before
    assert draw(0, 1e-4) == draw(1, 1e-4) == decoder.generate(prefix, prompts, GREEDY)


def test_an_answer_ends_before_a_stop_string_while_others_go_on(folder):
    decoder, prefix, prompts = load(folder), random_prefix(), questions(*(prompt for prompt, _ in PAIRS))
    whole = decoder.generate(prefix, prompts, GREEDY)
    stop = whole[0][3:5]
    stopped = decoder.generate(prefix, prompts, Sampling(max_new_tokens=8, stop=[stop, "never said"]))
    assert stopped == [answer.split(stop)[0].strip() for answer in whole]
    assert stopped[0] != whole[0] and stopped[1:] == whole[1:]


def test_no_more_is_computed_after_a_stop_string(folder):
    decoder, prefix, prompt = load(folder), random_prefix(1), questions("what")
    first = TOKENIZER.decode(argmax_answer(decoder, prefix, "what", 1))
    steps = count_steps(decoder)
    assert decoder.generate(prefix, prompt, Sampling(max_new_tokens=8, stop=[first])) == [""]
    assert len(steps) == 1


def test_a_special_token_can_stop_an_answer_and_is_no_part_of_it(folder):
    decoder, prefix, prompts = load(folder), random_prefix(1), questions("what")
    first, second = argmax_answer(decoder, prefix, "what", 2)
    with torch.no_grad():  # from now on the model says <system> where it said its second token
        head = decoder.language_model.get_output_embeddings().weight
        exchanged = [second, TOKENIZER.convert_tokens_to_ids("<system>")]
        head[exchanged] = head[exchanged[::-1]]
    steps = count_steps(decoder)
    stopping = Sampling(max_new_tokens=8, stop=["<system>"])
    assert decoder.generate(prefix, prompts, stopping) == [text_of([first])]
    assert len(steps) == 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_an_answer_has_no_more_than_the_most_tokens(folder, tokens):
    decoder, prefix = load(folder), random_prefix(1)
    said = argmax_answer(decoder, prefix, "what", tokens)
    assert len(said) == tokens
    assert decoder.generate(prefix, questions("what"), Sampling(max_new_tokens=tokens)) == [text_of(said)]


def test_generation_is_without_dropout_or_gradient_and_training_goes_on_after_it(folder):
    decoder = load(folder, lora={**LORA, "dropout": 0.9})
    prefix, prompts = random_prefix(), questions(*(prompt for prompt, _ in PAIRS))
    expected = decoder.generate(prefix, prompts, GREEDY)
    assert not any(module.training for module in decoder.modules())
    decoder.train()
    with torch.no_grad():
        first, second = (decoder(prefix, dialogue(*PAIRS)).nll for _ in range(2))
    assert not torch.allclose(first, second)
    assert decoder.generate(prefix, prompts, GREEDY) == expected
    assert all(module.training for module in decoder.modules())
    with pytest.raises(ValueError, match="wide"):
        decoder.generate(Tokens(prefix.tokens[..., :8], prefix.mask), prompts, GREEDY)
    assert decoder.training


# What is left on the disk


@precisions
def test_a_saved_adapter_gives_the_same_answers_when_loaded(folder, tmp_path, precision):
    decoder, prefix, text = load(folder, precision), random_prefix(), dialogue(*PAIRS)
    train(decoder, prefix, text, steps=2)
    decoder.save_adapter(tmp_path)
    again = load(folder, precision)
    assert not torch.allclose(again(prefix, text).nll, decoder(prefix, text).nll, rtol=1e-3)
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(prefix, text).nll, decoder(prefix, text).nll)
    assert trained(again).keys() == trained(decoder).keys()
    prompts = questions(*(prompt for prompt, _ in PAIRS))
    assert again.generate(prefix, prompts, GREEDY) == decoder.generate(prefix, prompts, GREEDY)


def test_a_saved_adapter_is_one_that_peft_loads_itself(folder, tmp_path):
    decoder, prefix, text = load(folder), random_prefix(), dialogue(*PAIRS)
    decoder.save_adapter(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert plain.peft_config["default"].base_model_name_or_path == folder
    theirs = QwenDecoder(TOKENIZER, plain, adapted=True).eval()
    torch.testing.assert_close(theirs(prefix, text).nll, decoder(prefix, text).nll)


def test_an_adapter_names_the_model_as_the_config_does_not_where_it_was_found(folder, tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "qwen").symlink_to(folder)
    monkeypatch.syspath_prepend(tmp_path)
    load("package:some_weights/qwen").save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == (
        "package:some_weights/qwen"
    )
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()


@precisions
def test_the_trained_parameters_alone_restore_a_decoder(folder, precision):
    decoder, prefix, text = load(folder, precision), random_prefix(), dialogue(*PAIRS)
    train(decoder, prefix, text, steps=2)
    stored = {name: parameter.detach().clone() for name, parameter in trained(decoder).items()}
    again = load(folder, precision)
    again(prefix, text)  # bitsandbytes moves weights about in its first pass
    missing, unexpected = again.load_state_dict(stored, strict=False)
    assert not unexpected and not set(missing) & set(stored)
    assert torch.equal(again(prefix, text).nll, decoder(prefix, text).nll)


def test_trained_parameters_are_called_alike_in_every_precision(folder):
    names = [set(trained(load(folder, precision))) for precision in PRECISIONS]
    names.append(set(trained(load(folder, gradient_checkpointing=True))))
    assert all(others == names[0] for others in names)
    assert "backbone.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in names[0]


# int8 rounds activations too, which the merged model does not.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("nf4", 1e-4), ("int8", 0.05)])
def test_the_merged_model_says_what_the_decoder_says_and_loads_without_peft(folder, tmp_path, precision, tolerance):
    decoder, prefix, text = load(folder, precision), random_prefix(), dialogue(*PAIRS)
    train(decoder, prefix, text, steps=4)
    before = decoder(prefix, text).nll
    decoder.merged().save_pretrained(tmp_path)
    assert torch.equal(decoder(prefix, text).nll, before)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.float32}
    assert not hasattr(plain.config, "quantization_config")
    assert plain.generation_config.repetition_penalty == 9.0  # the checkpoint's own advice
    merged = QwenDecoder(TOKENIZER, plain, adapted=True).eval()
    for row in range(3):
        theirs, ours = (logits_of(one, prefix, text, row) for one in (merged, decoder))
        assert (theirs - ours).abs().max() < tolerance * ours.abs().max()
    untrained = load(folder, precision, lora=None)
    assert (untrained(prefix, text).nll - before).abs().max() > 1  # so the LoRA is in it


def test_tied_embeddings_are_neither_missed_nor_untied(tmp_path):
    tied = write(tmp_path / "tied", tied=True)
    assert "lm_head.weight" not in load_file(f"{tied}/model.safetensors")
    decoder, prefix, text = load(tied, "nf4"), random_prefix(), dialogue(*PAIRS)
    decoder.merged().save_pretrained(tmp_path / "merged")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    again = load(str(tmp_path / "merged"), lora=None)
    torch.testing.assert_close(again(prefix, text).nll, decoder(prefix, text).nll)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit are both true"),
        ({"attention": "flash"}, r"attention='flash': give one of \['sdpa', 'flash_attention_2', 'eager'\]"),
        ({"dtype": "float32"}, r"dtype='float32': give one of \['auto', 'fp32', 'bf16', 'fp16'\]"),
        ({"lora": {"r": 4}}, r"lora has \['r'\]: give it r, alpha, dropout, target_modules"),
        (
            {"lora": {**LORA, "target_modules": ["q_proj", "c_attn", "embed_tokens"]}},
            "no linear layers 'c_attn', 'embed_tokens'; it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj, or give all-linear",
        ),
        ({"lora": {**LORA, "target_modules": []}}, "it has down_proj"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        QwenDecoder.from_pretrained(TOKENIZER, folder, **options)


def test_flash_attention_is_refused_where_it_cannot_work(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    for installed, message in ((False, "pip install flash-attn"), (True, "needs a GPU, and there is none")):
        found = object() if installed else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, f=found: f if name == "flash_attn" else find_spec(name)
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=f"{message}.*attention=sdpa"):
            QwenDecoder.from_pretrained(TOKENIZER, folder, attention="flash_attention_2")


def test_quantisation_without_bitsandbytes_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        QwenDecoder.from_pretrained(TOKENIZER, folder, load_in_4bit=True)


def test_every_kind_of_attention_gives_the_same_loss(folder):
    prefix, text = scattered(random_prefix()), dialogue(*PAIRS, left=True)
    sdpa, eager = (load(folder, attention=kind) for kind in ("sdpa", "eager"))
    assert eager.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(prefix, text).nll, sdpa(prefix, text).nll)


def test_targets_may_be_all_linear_or_one_layer(folder):
    layers = {name.split(".lora_")[0] for name in trained(load(folder, lora={**LORA, "target_modules": "all-linear"}))}
    assert len(layers) == 2 * 7
    one = load(folder, lora={**LORA, "target_modules": ["layers.1.self_attn.q_proj"]})
    assert len(trained(one)) == 2


@pytest.mark.parametrize("quantised", [False, True])
def test_a_checkpoint_that_lacks_weights_is_refused(folder, tmp_path, quantised):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of Qwen2ForCausalLM, such as 'model\.layers\.1\.mlp\.up_proj"
    ):
        QwenDecoder.from_pretrained(TOKENIZER, str(tmp_path), load_in_4bit=quantised)


def test_weights_are_never_read_from_pickle(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsNotFound, match=r"model\.safetensors"):
        QwenDecoder.from_pretrained(TOKENIZER, str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    with pytest.raises(ValueError, match="the tokenizer has 330 tokens and Qwen2ForCausalLM embeddings for 299: give"):
        QwenDecoder.from_pretrained(trained_tokenizer([str(number) for number in range(999)], 330), folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hiden_size": 8}, "Qwen2Config has no option 'hiden_size'; did you mean 'hidden_size'"),
        ({"vocab_size": 8}, f"vocab_size: leave this to the tokenizer, which says {len(TOKENIZER)}"),
        ({"model_type": "resnet"}, "'resnet' is no causal language model"),
        ({"model_type": "qwen0"}, "transformers has no model type 'qwen0'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QwenDecoder.from_config(TOKENIZER, **options)


def test_without_lora_there_is_nothing_to_save_load_or_merge(folder, tmp_path):
    for decoder in (load(folder, lora=None), QwenDecoder.from_config(TOKENIZER, **TINY)):
        for act in (
            lambda d=decoder: d.save_adapter(tmp_path),
            lambda d=decoder: d.load_adapter(tmp_path),
            decoder.merged,
        ):
            with pytest.raises(ValueError, match=r"this decoder has no LoRA to .*: build it with from_pretrained"):
                act()


def test_an_adapter_that_does_not_fit_is_refused(folder, tmp_path):
    decoder = load(folder)
    with pytest.raises(WeightsNotFound, match=r"There is no .*adapter_config\.json: give a folder that save_adapter"):
        decoder.load_adapter(tmp_path)
    decoder.save_adapter(tmp_path)
    for key, value, told in (
        ("r", 8, "r=4.*8"),
        ("alpha", 9, "lora_alpha=8.*9"),
        ("target_modules", ["o_proj"], "o_proj"),
    ):
        with pytest.raises(ValueError, match=f"has {told}" if key != "target_modules" else told):
            load(folder, lora={**LORA, key: value}).load_adapter(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"was trained on {Path(folder)}; its weights do not fit"):
        decoder.load_adapter(tmp_path)


def write_tokenizer(path: Path, **changes) -> str:
    """The folder of a checkpoint, without weights."""
    tokenizer = trained_tokenizer(["red circle"], 300)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    LlamaConfig().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_the_tokenizer_of_a_checkpoint_is_the_one_that_was_saved(tmp_path):
    saved, loaded = trained_tokenizer(["red circle"], 300), pretrained_tokenizer([], write_tokenizer(tmp_path))
    assert loaded.encode("a red circle <end>") == saved.encode("a red circle <end>")
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<end>")
    turns = [{"role": "user", "content": "what is this?"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == saved.apply_chat_template(turns, tokenize=False)


def test_a_tokenizer_without_padding_token_pads_with_its_end_token(tmp_path):
    assert pretrained_tokenizer([], write_tokenizer(tmp_path, pad_token=None)).pad_token == "<end>"


@pytest.mark.parametrize("part", ["chat_template", "eos_token"])
def test_a_tokenizer_that_cannot_hold_a_dialogue_is_refused(tmp_path, part):
    with pytest.raises(ValueError, match="no chat template or no end token: give an instruction model"):
        pretrained_tokenizer([], write_tokenizer(tmp_path, **{part: None}))
