"""Prompts and answers as a decoder's tokens."""

from collections import Counter

import numpy as np
import pytest

from edge_glass.data.dialogue import Chat, Exchange, Prompts, TooLong
from edge_glass.data.rows import DataError
from edge_glass.decoders.tokenizers import trained_tokenizer
from tests import mini


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer([*mini.names(), "Name it."], 400)


def words(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_an_answer_follows_its_prompt_in_the_chat_format_and_ends(tokenizer):
    exchange = Chat(tokenizer, 50).exchange("Name it.", "red circle", system="Be brief.")
    assert words(tokenizer, exchange.prompt) == "<system> Be brief.<user> Name it.<assistant>"
    assert words(tokenizer, exchange.answer) == " red circle<end>"


def test_the_tokens_are_those_of_the_chat_template_as_a_whole(tokenizer):
    exchange = Chat(tokenizer, 50).exchange("Name it.", "red circle")
    messages = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": "red circle"}]
    assert exchange.prompt + exchange.answer == tokenizer.apply_chat_template(messages, return_dict=False)


def test_a_long_answer_is_cut_and_does_not_pretend_to_end(tokenizer):
    whole = Chat(tokenizer, 50).exchange("Name it.", "red circle")
    cut = Chat(tokenizer, len(whole.prompt) + 1).exchange("Name it.", "red circle")
    assert cut.prompt == whole.prompt and cut.answer == whole.answer[:1]
    assert tokenizer.eos_token_id not in cut.answer


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(tokenizer):
    length = len(Chat(tokenizer, 50).exchange("Name it.").prompt)
    with pytest.raises(TooLong, match=f"the prompt has {length} tokens"):
        Chat(tokenizer, length).exchange("Name it.", "red circle")
    assert Chat(tokenizer, length).exchange("Name it.").answer == []
    with pytest.raises(TooLong):
        Chat(tokenizer, length - 1).exchange("Name it.")


def test_training_pads_on_the_right_and_generation_on_the_left(tokenizer):
    chat = Chat(tokenizer, 50)
    exchanges = [Exchange([5, 6], [7]), Exchange([8], [])]
    right, left = chat.dialogue(exchanges), chat.dialogue(exchanges, left=True)
    pad = tokenizer.pad_token_id
    assert right.ids.tolist() == [[5, 6, 7], [8, pad, pad]]
    assert right.real.tolist() == [[True, True, True], [True, False, False]]
    assert right.answer.tolist() == [[False, False, True], [False, False, False]]
    assert left.ids.tolist() == [[5, 6, 7], [pad, pad, 8]] and left.real[1].tolist() == [False, False, True]


def test_each_set_of_media_has_its_own_prompts():
    prompts = Prompts({"image": [{"ask": "See?"}], "image_audio": [{"ask": "Both?", "answer": "It is {text}."}]})
    generator = np.random.default_rng(0)
    assert prompts.draw(["image"], "a cat", [], None, generator) == ("See?", "a cat")
    assert prompts.draw(["audio", "image"], "a cat", [], None, generator) == ("Both?", "It is a cat.")
    with pytest.raises(DataError, match=r"nothing to ask about audio; it has prompts for \['image', 'image_audio'\]"):
        prompts.of(["audio"])
    assert sorted(prompts.texts()) == ["Both?", "It is {text}.", "See?", "{text}"]


def test_templates_that_need_what_a_sample_lacks_are_passed_over():
    ask = [
        {"ask": "Is it {other}?", "answer": "No, {text}."},
        {"ask": "One word?", "answer": "{keyword}"},
        {"ask": "What?"},
    ]
    prompts, generator = Prompts({"image": ask}), np.random.default_rng(0)
    plain = {prompts.draw(["image"], "a cat", [], None, generator) for _ in range(20)}
    assert plain == {("What?", "a cat")}
    drawn = Counter(prompts.draw(["image"], "a cat", ["cat", "pet"], "a dog", generator) for _ in range(600))
    assert set(drawn) == {
        ("Is it a dog?", "No, a cat."),
        ("One word?", "cat"),
        ("One word?", "pet"),
        ("What?", "a cat"),
    }
    assert all(150 < count < 250 for count in (drawn["What?", "a cat"], drawn["Is it a dog?", "No, a cat."]))
    with pytest.raises(DataError, match=r"does without \['keyword', 'other'\]"):
        Prompts({"image": ask[:2]}).draw(["image"], "a cat", [], None, generator)


@pytest.mark.parametrize(
    ("templates", "words"),
    [
        ({"image": []}, r"dataset\.prompts\.image is empty"),
        ({"audio_image": [{"ask": "?"}]}, "no set of media has that name"),
        ({"video": [{"ask": "?"}]}, "no set of media has that name"),
        ({"image": [{"answer": "x"}]}, "a template has `ask` and maybe `answer`"),
        ({"image": [{"ask": "?", "anwser": "x"}]}, "a template has `ask` and maybe `answer`"),
        ({"image": [{"ask": "{caption}?"}]}, r"\{caption\} is no field of a template"),
    ],
)
def test_templates_that_cannot_be_are_refused(templates, words):
    with pytest.raises(DataError, match=words):
        Prompts(templates)


def test_equal_texts_give_equal_words_and_any_text_can_be_written():
    first, second = (trained_tokenizer([*mini.names(), *order], 400) for order in (["a", "b"], ["b", "a"]))
    assert first.get_vocab() == second.get_vocab() and len(first) <= 400
    for text in ("red circle", "straße ☂ 日本", "new\nline  two blanks"):
        assert first.decode(first(text)["input_ids"]).removeprefix(" ") == text
    with pytest.raises(ValueError, match="vocabulary=100: give at least 261"):
        trained_tokenizer(["a"], 100)
