"""The Tiny Recursive Model as a language decoder: what it sees, what it learns from, and what it says."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_glass.data.batch import Dialogue
from edge_glass.data.dialogue import Chat, Exchange
from edge_glass.decoders.decoder import Sampling
from edge_glass.decoders.recursion import Thought
from edge_glass.decoders.tokenizers import trained_tokenizer
from edge_glass.decoders.trm import TinyRecursiveModel, TRMDecoder, draw
from edge_glass.encoders.tokens import Tokens
from tests import mini

PREFIX = 3
WIDTH = 16


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(trained_tokenizer([*mini.names(), "Name it."], 300), 40)


def decoder(chat: Chat, **options) -> TRMDecoder:
    torch.manual_seed(0)
    made = TRMDecoder(chat.tokenizer, **{"width": WIDTH, "heads": 2, "latent_steps": 1, "exploration": 0.0, **options})
    return made.double().eval()


def prefix(batch: int, seed: int = 1, tokens: int = PREFIX) -> Tokens:
    values = torch.randn(batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Tokens(values, torch.ones(batch, tokens, dtype=torch.bool))


def exchanges(chat: Chat) -> list[Exchange]:
    return [
        chat.exchange("Name it.", "red circle"),
        chat.exchange("Name it, do.", "blue"),
        chat.exchange("It?", "a b c d"),
    ]


def logits_of(made: TRMDecoder, seen: Tokens, ids: Tensor) -> Tensor:
    """Scores after each token of whole sequences without padding, all supervision steps made at once."""
    question = made._question(seen, ids)
    sight = made.trm.recursion.sight(torch.ones(question.shape[:2], dtype=torch.bool))
    thought = made.trm.recursion.begin(question)
    for _ in range(made.trm.supervision):
        thought = made.trm.recursion(question, thought, sight)
    return made.trm.logits(thought.answer)


def test_the_loss_is_that_of_the_answer_and_its_end_alone(chat):
    made, dialogue = decoder(chat), chat.dialogue(exchanges(chat))
    found = made(prefix(3), dialogue)
    for row, exchange in enumerate(exchanges(chat)):
        ids = torch.tensor([exchange.prompt + exchange.answer])
        logits = logits_of(made, Tokens(prefix(3).tokens[row : row + 1], prefix(1).mask), ids)[0]
        before = PREFIX + len(exchange.prompt) - 1  # the token that says the first of the answer
        said = logits[before : before + len(exchange.answer)]
        expected = cross_entropy(said, torch.tensor(exchange.answer), reduction="sum")
        assert float(found.nll[row]) == pytest.approx(float(expected), rel=1e-6)
    assert not found.extra.any() and exchanges(chat)[0].answer[-1] == chat.tokenizer.eos_token_id


def test_padding_changes_no_loss(chat):
    made = decoder(chat)
    together = made(prefix(3), chat.dialogue(exchanges(chat))).nll
    alone = [
        made(Tokens(prefix(3).tokens[row : row + 1], prefix(1).mask), chat.dialogue([exchange])).nll
        for row, exchange in enumerate(exchanges(chat))
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_no_token_sees_a_later_one_with_padding_or_without(chat):
    made, dialogue = decoder(chat), chat.dialogue(exchanges(chat))
    changed = Dialogue(dialogue.ids.clone(), dialogue.real, dialogue.answer)
    places = dialogue.real.sum(1) - 1
    changed.ids[torch.arange(3), places] = 7  # the last token of each answer: only its own loss may change
    rows, columns = dialogue.answer.nonzero(as_tuple=True)
    earlier = columns < places[rows]

    def each(text: Dialogue) -> Tensor:
        question = made._question(prefix(3), text.ids)
        real = torch.cat([prefix(3).mask, text.real], dim=1)
        thought = made.trm.recursion(question, made.trm.recursion.begin(question), made.trm.recursion.sight(real))
        return made.trm.logits(thought.answer[rows[earlier], PREFIX + columns[earlier] - 1])

    torch.testing.assert_close(each(dialogue), each(changed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", range(PREFIX))
def test_masked_prefix_tokens_change_nothing_wherever_they_stand(chat, place):
    made, dialogue = decoder(chat), chat.dialogue(exchanges(chat))
    seen = prefix(3)
    seen.mask[:, place] = False
    rest = [i for i in range(PREFIX) if i != place]
    without = Tokens(seen.tokens[:, rest], seen.mask[:, rest])
    torch.testing.assert_close(made(seen, dialogue).nll, made(without, dialogue).nll)
    prompts = chat.dialogue([Exchange(e.prompt) for e in exchanges(chat)], left=True)
    assert made.generate(seen, prompts, Sampling(6)) == made.generate(without, prompts, Sampling(6))


def test_without_any_prefix_it_still_speaks(chat):
    made = decoder(chat)
    nothing = Tokens(torch.zeros(3, 0, WIDTH, dtype=torch.float64), torch.zeros(3, 0, dtype=torch.bool))
    masked = Tokens(prefix(3).tokens, torch.zeros(3, PREFIX, dtype=torch.bool))
    dialogue = chat.dialogue(exchanges(chat))
    torch.testing.assert_close(made(nothing, dialogue).nll, made(masked, dialogue).nll)


def said_without_cache(made: TRMDecoder, seen: Tokens, prompt: list[int], new: int) -> list[int]:
    """The likeliest tokens, the whole sequence computed anew for each."""
    ids = list(prompt)
    for _ in range(new):
        token = int(logits_of(made, seen, torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
        if token == made.tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("supervision", [1, 3])
def test_with_and_without_cache_it_says_the_same(chat, supervision):
    made = decoder(chat, supervision=supervision, cycles=2)
    asked = [exchange.prompt for exchange in exchanges(chat)]
    found = made._continue(prefix(3), chat.dialogue([Exchange(p) for p in asked], left=True), Sampling(8))
    for row, prompt in enumerate(asked):
        expected = said_without_cache(made, Tokens(prefix(3).tokens[row : row + 1], prefix(1).mask), prompt, 8)
        assert found[row, : len(expected)].tolist() == expected
        assert set(found[row, len(expected) :].tolist()) <= {chat.tokenizer.pad_token_id}


def test_the_prefix_is_seen_by_every_token_that_is_said(chat):
    made = decoder(chat)
    ids = torch.tensor([[*exchanges(chat)[0].prompt, 9, 10, 11, 12]])
    ours, others = (logits_of(made, prefix(1, seed), ids)[0, PREFIX:] for seed in (1, 2))
    assert (ours - others).abs().amax(1).min() > 1e-3
    # ... and in generation, where all but the first come from the cache.
    prompt = chat.dialogue([Exchange(exchanges(chat)[0].prompt)], left=True)
    seen = [made._continue(prefix(1, seed), prompt, Sampling(8)) for seed in range(40)]
    assert len({tuple(ids[0, 1:].tolist()) for ids in seen if int(ids[0, 0]) == int(seen[0][0, 0])}) > 1


def test_a_token_costs_the_same_however_many_were_said(chat):
    made, counted = decoder(chat), []
    made.trm.recursion.net[0].register_forward_hook(lambda _, inputs, __: counted.append(inputs[0].shape[1]))
    prompt = chat.dialogue([Exchange(exchanges(chat)[0].prompt)], left=True)
    steps = made.trm.supervision * made.trm.recursion.cycles * (made.trm.recursion.latent_steps + 1)
    said = made._continue(prefix(1), prompt, Sampling(6))
    assert counted[:steps] == [PREFIX + prompt.ids.shape[1]] * steps
    assert counted[steps:] == [1] * steps * (said.shape[1] - 1)


def test_training_averages_the_losses_of_the_supervision_steps(chat):
    made, dialogue, seen = decoder(chat, supervision=3).train(), chat.dialogue(exchanges(chat)), prefix(3)
    found = made(seen, dialogue)
    (found.nll.sum() + found.extra.sum()).backward()
    gradient = made.trm.words.weight.grad.clone()
    made.zero_grad()
    question, real = made._question(seen, dialogue.ids), torch.cat([seen.mask, dialogue.real], dim=1)
    sight, thought, total = made.trm.recursion.sight(real), made.trm.recursion.begin(question), 0.0
    for _ in range(3):
        thought = made.trm.recursion(question, thought.detach(), sight)
        losses, _ = made._losses(thought, dialogue, PREFIX)
        total = total + losses / 3
        wrong = torch.nn.functional.softplus(made.trm.done(thought, real))  # nothing is right yet
        (losses.sum() / 3 + 0.5 * wrong.sum() / 3).backward(retain_graph=True)
    torch.testing.assert_close(found.nll, total)
    torch.testing.assert_close(gradient, made.trm.words.weight.grad)
    assert found.figures["thinking/steps"] == 3
    made.eval()
    torch.testing.assert_close(made(seen, dialogue).nll, losses, msg="in evaluation the last step counts")


def test_a_sample_that_is_done_thinks_no_further(chat):
    made, dialogue = decoder(chat, supervision=3).train(), chat.dialogue(exchanges(chat))
    torch.nn.init.constant_(made.trm.halt.bias, 5.0)
    found = made(prefix(3), dialogue)
    assert found.figures["thinking/steps"] == 1
    one = decoder(chat, supervision=1).train()
    torch.testing.assert_close(found.nll, one(prefix(3), dialogue).nll)
    made.eval()
    three = decoder(chat, supervision=3)
    torch.testing.assert_close(made(prefix(3), dialogue).nll, three(prefix(3), dialogue).nll)


def test_exploration_makes_some_samples_think_longer():
    torch.manual_seed(0)
    model = TinyRecursiveModel(10, 8, 2, supervision=8, exploration=0.25)
    sure, steps = torch.full((4000,), 3.0), torch.ones(4000, dtype=torch.int64)
    assert float(model.halted(sure, steps).float().mean()) == pytest.approx(0.75, abs=0.03)
    # At step 5 those go on whose least number, drawn from 2 to 8, is larger: 3 of 7.
    assert float(model.halted(sure, 5 * steps).float().mean()) == pytest.approx(1 - 0.25 * 3 / 7, abs=0.03)
    assert model.halted(sure, 8 * steps).all() and model.halted(-sure, 8 * steps).all()
    assert not model.halted(-sure, 7 * steps).any()


def test_the_halting_head_learns_which_answers_are_right(chat):
    made, dialogue, seen = decoder(chat, supervision=2), chat.dialogue(exchanges(chat)[:1]), prefix(1)
    made.train()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(150):
        found = made(seen, dialogue)
        optimizer.zero_grad()
        (found.nll + found.extra).mean().backward()
        optimizer.step()
    assert found.figures["thinking/steps"] == 1  # it knows that it knows
    assert made.generate(seen, chat.dialogue([Exchange(exchanges(chat)[0].prompt)], left=True), Sampling(8)) == [
        "red circle"
    ]


def test_stablemax_is_the_papers_formula():
    torch.manual_seed(0)
    model = TinyRecursiveModel(10, 8, 2, scores="stablemax").double()
    answers = 3 * torch.randn(5, 8, dtype=torch.float64)
    x = model.head(answers)
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    torch.testing.assert_close(model.logits(answers).softmax(-1), s / s.sum(-1, keepdim=True))


def test_answers_are_the_same_in_a_batch_and_one_by_one(chat):
    made = decoder(chat)
    asked = [Exchange(exchange.prompt) for exchange in exchanges(chat)]
    together = made.generate(prefix(3), chat.dialogue(asked, left=True), Sampling(8))
    alone = [
        made.generate(Tokens(prefix(3).tokens[i : i + 1], prefix(1).mask), chat.dialogue([e], left=True), Sampling(8))[
            0
        ]
        for i, e in enumerate(asked)
    ]
    assert together == alone


def test_what_is_drawn_is_among_what_was_allowed():
    torch.manual_seed(0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(3000, -1)
    drawn = [draw(logits, Sampling(temperature=1.0, **limits)) for limits in ({}, {"top_k": 2}, {"top_p": 0.7})]
    assert [sorted(set(tokens.tolist())) for tokens in drawn] == [[0, 1, 2, 3], [0, 1], [0, 1]]
    assert float((drawn[0] == 0).float().mean()) == pytest.approx(float(logits[0].softmax(0)[0]), abs=0.03)
    assert draw(logits[:1], Sampling(temperature=1.0, top_k=1)) == draw(logits[:1], Sampling()) == 0
    cold = draw(logits, Sampling(temperature=0.25))
    assert float((cold == 0).float().mean()) == pytest.approx(1 / (1 + math.exp(-4) + math.exp(-8)), abs=0.03)


def test_an_answer_ends_before_a_stop_string(chat):
    made = decoder(chat)
    prompt = chat.dialogue([Exchange(exchanges(chat)[0].prompt)], left=True)
    said = made.generate(prefix(1), prompt, Sampling(12))[0]
    stop = said[len(said) // 2 : len(said) // 2 + 2]
    assert made.generate(prefix(1), prompt, Sampling(12, stop=[stop]))[0] == said[: said.find(stop)].strip()


def test_generation_leaves_the_mode_as_it_was(chat):
    made = decoder(chat).train()
    made.generate(prefix(1), chat.dialogue([Exchange([5, 6])], left=True), Sampling(1))
    assert made.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"causal": False}, "a language decoder is causal"),
        ({"supervision": 0}, "supervision=0"),
        ({"scores": "hardmax"}, "scores='hardmax'"),
        ({"exploration": 2.0}, r"exploration=2\.0"),
    ],
)
def test_values_that_cannot_work_are_refused(chat, options, words):
    with pytest.raises(ValueError, match=words):
        decoder(chat, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"stop": [""]}, "empty string"),
    ],
)
def test_samplings_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


def test_a_thought_is_taken_up_where_it_was_left(chat):
    recursion = decoder(chat).trm.recursion
    question = torch.randn(1, 4, WIDTH, dtype=torch.float64)
    sight, first = recursion.sight(torch.ones(1, 4, dtype=torch.bool)), recursion.begin(question)
    once = recursion(question, first, sight)
    again = recursion(question, Thought(once.answer.clone(), once.latent.clone()), sight)
    assert (again.answer - once.answer).abs().max() > 1e-3
