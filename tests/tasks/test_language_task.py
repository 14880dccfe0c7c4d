"""Towers, fusion, decoder and both losses as one task."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from edge_glass.data.batch import AudioClips, Batch
from edge_glass.data.dialogue import Chat
from edge_glass.decoders.decoder import Sampling
from edge_glass.decoders.tokenizers import trained_tokenizer
from edge_glass.decoders.trm import TRMDecoder
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.models.alignment import MultimodalAlignmentModel, Tower
from edge_glass.models.fusion import ConcatFusion, GatedFusion
from edge_glass.models.losses import TriModalAlignmentLoss
from edge_glass.models.pooling import SegmentPool
from edge_glass.models.projection import ProjectionHead
from edge_glass.models.recall import CaptionRecall
from edge_glass.tasks.language import LanguageTask
from edge_glass.training.accumulation import accumulate_exact
from tests import mini
from tests.ranks import run_ranks

NAMES = mini.names()[:12]


class ThreeTokens(Encoder):
    """Three tokens of width 4 from anything with twelve numbers; counts the samples it is asked about."""

    def __init__(self):
        super().__init__(torch.nn.Linear(12, 12), dim=4, frozen=False)
        self.asked: Counter[int] = Counter()

    def _encode(self, inputs) -> Tokens:
        if isinstance(inputs, AudioClips):
            inputs = inputs.waveform
        if isinstance(inputs, list):
            inputs = torch.tensor([[float(ord(letter)) for letter in f"{text:12.12}"] for text in inputs]) / 100
        self.asked[len(inputs)] += 1
        made = self.backbone(inputs.flatten(1)).unflatten(1, (3, 4))
        return Tokens(made, torch.ones(made.shape[:2], dtype=torch.bool))


def tower() -> Tower:
    return Tower(ThreeTokens(), None, SegmentPool(3), ProjectionHead(12, 8))


def make_chat() -> Chat:
    return Chat(trained_tokenizer([*NAMES, "What? Say it."], 300), 30)


DIMS = {"image": 4, "audio": 4, "embedding": 8}


def make_task(
    lm: float = 1.0, align: bool = True, train_towers: bool = True, fusion=ConcatFusion, dims=DIMS
) -> LanguageTask:
    torch.manual_seed(0)
    model = MultimodalAlignmentModel({name: tower() for name in ("image", "audio", "text")})
    decoder = TRMDecoder(make_chat().tokenizer, 8, 2, latent_steps=1, exploration=1.0)
    loss = TriModalAlignmentLoss([8, 4]) if align else None
    return LanguageTask(model, fusion(dims, 8, 2), decoder, loss, ["image", "audio"], lm, train_towers)


def make_batch(rows: range = range(8), lacking: dict[str, list[int]] | None = None) -> Batch:
    """Row i shows and says NAMES[i]; answers differ in length; some modalities are hidden from the decoder."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(len(NAMES), 2, 3, 2, 2, generator=generator)[list(rows)]
    chat, kept = make_chat(), {}
    for name, missing in (lacking or {}).items():
        kept[name] = torch.tensor([i for i, row in enumerate(rows) if row not in missing])
    everyone = torch.arange(len(rows))
    image, audio = kept.get("image", everyone), kept.get("audio", everyone)
    captions = [NAMES[row] for i, row in enumerate(rows) if "text" not in kept or i in kept["text"]]
    shown = {
        "image": torch.tensor([row % 3 != 0 and row not in (lacking or {}).get("image", []) for row in rows]),
        "audio": torch.tensor([row % 3 != 1 and row not in (lacking or {}).get("audio", []) for row in rows]),
    }
    return Batch(
        sample_ids=[str(row) for row in rows],
        concept_ids=torch.tensor(list(rows)),
        image=values[image, 0],
        audio=AudioClips(values[audio, 1].flatten(1), torch.full((len(audio),), 12)),
        text=captions,
        rows=kept,
        dialogue=chat.dialogue([chat.exchange("What?", f"{NAMES[row]} " * (1 + row % 3)) for row in rows]),
        shown=shown,
    )


def gradients(task: LanguageTask, batches: list[Batch], **options) -> tuple[dict[str, Tensor], Tensor, dict]:
    task.zero_grad()
    loss, figures = accumulate_exact(task, batches, **options)
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    return found, loss, figures


def test_the_loss_is_the_alignment_plus_the_weighted_mean_over_answer_tokens():
    task, batch = make_task(lm=2.0), make_batch()
    task.decoder.trm.supervision = 1
    loss, figures = task(batch)
    aligned, _ = task.loss_of(task.encode(batch), batch.ids())
    answers = task.decoder(task.prefix(batch, task.tokens(batch, True)).prefix, batch.dialogue)
    said = batch.dialogue.answer.sum(1)
    mean = answers.nll.sum() / said.sum()
    torch.testing.assert_close(loss, aligned + 2.0 * (mean + (said * answers.extra).sum() / said.sum()))
    torch.testing.assert_close(figures["loss/lm"], mean.detach())
    assert {"loss/image_text", "loss/audio_text", "loss/image_audio"} <= set(figures)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_micro_batches_give_the_gradient_of_the_whole_batch(align, parts, scale):
    task = make_task(align=align)
    batch = make_batch(lacking={"audio": [1, 4], "image": [2], "text": []})
    whole, loss, figures = gradients(task, [batch], scale=lambda value: scale * value)
    found, parts_loss, parts_figures = gradients(task, batch.split(parts), scale=lambda value: scale * value)
    assert found.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=2e-4, atol=scale * 1e-5, msg=name)
    torch.testing.assert_close(parts_loss, loss)
    torch.testing.assert_close(parts_figures["loss/lm"], figures["loss/lm"])


def _gradient_of_rank(parts: int) -> dict[str, Tensor]:
    from torch.distributed import get_rank
    from torch.nn.parallel import DistributedDataParallel

    task = make_task()
    wrapped = DistributedDataParallel(task, find_unused_parameters=task.leaves_out)
    rows = range(0, 4) if get_rank() == 0 else range(4, 8)
    batch = make_batch(rows)
    if get_rank() == 1:  # this rank's decoder sees no sound at all
        batch.shown.pop("audio")
    loss, figures = accumulate_exact(wrapped, batch.split(parts))
    found = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    return {**found, "loss": loss, "lm": figures["loss/lm"]}


@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_give_the_gradient_of_one_big_batch(parts):
    batch = make_batch()
    batch.shown["audio"][4:] = False
    whole, loss, _ = gradients(make_task(), [batch])
    ranks = run_ranks(_gradient_of_rank, parts)
    for found in ranks:
        for name in whole:
            torch.testing.assert_close(found[name], whole[name], rtol=2e-4, atol=1e-5, msg=name)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, loss)


def test_towers_that_stay_as_they_are_get_no_gradient_and_stay_in_evaluation():
    task, batch = make_task(align=False, train_towers=False), make_batch()
    task.train()
    assert not task.model.training and task.decoder.training and task.fusion.training
    found, _, figures = gradients(task, [batch])
    assert found and not any(name.startswith("model.") for name in found)
    assert any(name.startswith("fusion.") for name in found) and set(figures) == {"loss/lm", "thinking/steps"}
    with pytest.raises(ValueError, match="give only one of the two"):
        make_task(align=True, train_towers=False)


def test_only_what_the_decoder_sees_is_computed_when_nothing_is_aligned():
    task, batch = make_task(align=False), make_batch()
    batch.shown.pop("audio")
    task(batch)
    asked = {name: task.model.tower(name).encoder.asked for name in ("image", "audio", "text")}
    assert asked == {"image": {8: 1}, "audio": {}, "text": {}}


def test_what_is_hidden_from_the_decoder_changes_no_answer():
    task, batch = make_task(align=False).eval(), make_batch()
    hidden = ~batch.shown["audio"]
    first = task.answer_loss(batch, task.tokens(batch, True))[0].nll
    batch.audio.waveform[hidden] += 5.0
    second = task.answer_loss(batch, task.tokens(batch, True))[0].nll
    torch.testing.assert_close(first, second)
    batch.audio.waveform += 5.0
    third = task.answer_loss(batch, task.tokens(batch, True))[0].nll
    assert ((third - second).abs() > 1e-4).tolist() == batch.shown["audio"].tolist()


@pytest.mark.parametrize("fusion", [ConcatFusion, GatedFusion])
def test_samples_without_any_media_are_answered_from_their_words_alone(fusion):
    task = make_task(align=False, fusion=fusion).eval()
    some = make_batch(lacking={"image": [0, 3], "audio": [0, 3], "text": [0, 3]})
    nll = task.answer_loss(some, task.tokens(some, True))[0].nll
    bare = make_batch(range(0, 1))
    bare.image, bare.audio, bare.text, bare.shown = None, None, None, {}
    torch.testing.assert_close(task.answer_loss(bare, {})[0].nll[0], nll[0])
    loss, _ = task(some)
    assert loss.isfinite()


def test_what_it_is_taught_to_say_it_says():
    torch.manual_seed(0)
    task, chat = make_task(), make_chat()
    batch = make_batch(range(4))
    batch.dialogue = chat.dialogue([chat.exchange("What?", NAMES[row]) for row in range(4)])
    optimizer = torch.optim.Adam(task.parameters(), lr=0.003)
    for _ in range(240):
        optimizer.zero_grad()
        accumulate_exact(task, [batch])
        optimizer.step()
    prompts = chat.dialogue([chat.exchange("What?") for _ in range(4)], left=True)
    assert task.answer(batch, prompts, Sampling(8)) == NAMES[:4]
    assert task.training


def test_a_fusion_of_a_modality_without_a_tower_is_refused():
    model = MultimodalAlignmentModel({"image": tower(), "text": tower()})
    decoder = TRMDecoder(make_chat().tokenizer, 8, 2)
    with pytest.raises(ValueError, match=r"the decoder reads .*'audio'.*, for which there is no tower"):
        LanguageTask(model, ConcatFusion({"image": 4, "audio": 4}, 8, 2), decoder, None, ["image", "audio"])


def test_the_shared_embedding_is_the_mean_of_what_is_shown_and_captions_can_stand_in_for_media():
    task = make_task(dims={"embedding": 8}).eval()
    batch = make_batch(range(4))
    batch.shown = {
        "image": torch.tensor([True, True, False, False]),
        "audio": torch.tensor([False, True, True, False]),
        "text": torch.tensor([False, False, False, True]),
    }
    batch.extra_text, batch.extra_ids = ["green cross"], torch.tensor([99])  # belongs to no sample
    tokens = task.tokens(batch, True)
    unit = {name: normalize(task.model.embed(name, part), dim=-1) for name, part in tokens.items()}
    expected = [
        unit["image"][0],
        normalize(unit["image"][1] + unit["audio"][1], dim=0),
        unit["audio"][2],
        unit["text"][3],
    ]
    found = task._embedding(batch, tokens, {})
    torch.testing.assert_close(found.tokens[:, 0], torch.stack(expected))
    raw = {name: task.model.tower(name).embed(part) for name, part in tokens.items()}
    torch.testing.assert_close(task._embedding(batch, tokens, raw).tokens, found.tokens)
    assert task.prefix(batch, tokens).prefix.mask.all()


def test_the_decoder_reads_embeddings_as_they_are_recalled_and_alignment_as_they_are():
    task = make_task(dims={"embedding": 8})
    batch = make_batch(range(4))
    memory = torch.eye(8)[:3]
    task.model.recall = CaptionRecall(memory, 100.0)
    tokens = task.tokens(batch, True)
    made = task._embedding(batch, tokens, {}).tokens[:, 0]
    shown = batch.shown["image"] ^ batch.shown["audio"]  # of one medium: near one of the captions
    cosines = normalize(made[shown], dim=-1) @ memory.T
    assert cosines.amax(1).min() > 0.7
    plain = task.loss_of(task.encode(batch), batch.ids())[0]
    torch.testing.assert_close(task.alignment(task.encode(batch), batch, None)[0], plain)
