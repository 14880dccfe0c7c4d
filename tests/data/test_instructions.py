import numpy as np
import pytest

from edge_glass.data.batch import SkippedRow
from edge_glass.data.datasets import TriModalDataset
from edge_glass.data.decode import decode_image
from edge_glass.data.dialogue import Chat, Prompts
from edge_glass.data.instructions import DialogueDataset, InstructionDataset
from edge_glass.data.loader import Collate
from edge_glass.data.rows import DataError, read_rows, read_tables
from edge_glass.data.samples import Decoding
from edge_glass.decoders.tokenizers import trained_tokenizer
from tests import mini

MEDIA = ("image", "audio")


def decoding() -> Decoding:
    return Decoding(image_size=16, seconds=1.0)


def chat(max_tokens: int = 200) -> Chat:
    return Chat(trained_tokenizer([*mini.names(), "What is drawn? Add. What is said?"], 400), max_tokens)


def written(sample) -> str:
    return chat().tokenizer.decode(sample.exchange.prompt + sample.exchange.answer)


def instruction_rows():
    return [
        {
            "sample_id": "a",
            "instruction": "What is drawn?",
            "output": "A red circle.",
            "image": {"bytes": mini.png(mini.drawing(0))},
        },
        {"sample_id": "b", "instruction": "Add.", "input": "2 + 2", "output": "4"},
        {
            "sample_id": "c",
            "instruction": "What is heard?",
            "output": "Two notes.",
            "audio": {"bytes": mini.wav(mini.tone(0))},
        },
        {"sample_id": "d", "instruction": "Say nothing.", "output": " "},
    ]


@pytest.fixture
def instructions(tmp_path):
    """The rows as parquet, with nulls where a row has no such part."""
    names = {name for row in instruction_rows() for name in row}
    rows = [{name: row.get(name) for name in names} for row in instruction_rows()]
    return InstructionDataset(read_rows(mini.write_parquet(tmp_path / "rows.parquet", rows)), decoding(), chat(), MEDIA)


def test_instructions_come_with_the_media_they_speak_of(instructions):
    drawn, sums, heard = (instructions[0, place] for place in range(3))
    assert written(drawn) == "<user> What is drawn?<assistant> A red circle.<end>"
    assert drawn.image.shape == (3, 16, 16) and drawn.audio is None
    assert written(sums) == "<user> Add.\n\n2 + 2<assistant> 4<end>"
    assert (sums.image, sums.audio, sums.shown) == (None, None, ())
    assert drawn.shown == ("image",) and heard.shown == ("audio",)
    assert heard.image is None and heard.audio.shape == (4000,)


def test_an_instruction_without_answer_is_a_broken_row(instructions):
    sample = instructions[0, 3]
    assert sample.sample_id in "abc"
    assert sample.skipped[0] == SkippedRow("d", "output: empty, so there is nothing to learn from")


def test_instructions_may_lie_in_a_folder_with_their_media(tmp_path):
    folder = mini.write_jsonl(
        tmp_path / "rows",
        [
            {"instruction": "Add.", "output": "4"},
            {"instruction": "What is drawn?", "output": "A red circle.", "image_path": "a.png"},
        ],
    )
    (folder / "a.png").write_bytes(mini.png(mini.drawing(0)))
    dataset = InstructionDataset(read_rows(folder), decoding(), chat(), MEDIA)
    assert dataset[0, 0].image is None
    np.testing.assert_array_equal(dataset[0, 1].image, decode_image((folder / "a.png").read_bytes(), 16))
    with pytest.raises(DataError, match="no column 'output'"):
        InstructionDataset(read_rows(mini.write_jsonl(tmp_path / "no", [{"instruction": "x"}])), decoding(), chat())


PROMPTS = Prompts(
    {
        "image": [{"ask": "See?"}],
        "audio": [{"ask": "Hear?"}],
        "image_audio": [{"ask": "Both?"}, {"ask": "Is it {other}?", "answer": "No, {text}."}],
    }
)


@pytest.fixture
def captions(tmp_path):
    folder = mini.write_data(tmp_path)
    tables = read_tables(folder / "images.parquet", folder / "speech.parquet")
    return TriModalDataset(tables, decoding())


def epoch(dataset, number: int = 0) -> list:
    return [dataset[number, place] for place in range(len(dataset))]


def test_a_modality_is_hidden_as_often_as_asked_and_one_always_stays(captions):
    for dropout, shares in ((0.0, (0, 0, 1)), (0.5, (3 / 8, 3 / 8, 1 / 4)), (1.0, (1 / 2, 1 / 2, 0))):
        dataset = DialogueDataset(captions, PROMPTS, chat(), MEDIA, dropout)
        shown = [sample.shown for number in range(12) for sample in epoch(dataset, number)]
        sets = [("image",), ("audio",), ("image", "audio")]
        for one, share in zip(sets, shares, strict=True):
            assert shown.count(one) / len(shown) == pytest.approx(share, abs=0.06)
        assert set(shown) <= set(sets)


def test_the_question_fits_what_is_shown_and_the_answer_is_the_caption(captions):
    for sample in epoch(DialogueDataset(captions, PROMPTS, chat(), MEDIA, 0.5)):
        assert sample.image is not None and sample.audio is not None  # hidden from the decoder only
        said = written(sample)
        if sample.shown == ("image", "audio"):
            usual = f"<user> Both?<assistant> {sample.text}<end>"
            assert said == usual or (said.endswith(f"No, {sample.text}.<end>") and f"Is it {sample.text}?" not in said)
        else:
            asked = {"image": "See?", "audio": "Hear?"}[sample.shown[0]]
            assert said == f"<user> {asked}<assistant> {sample.text}<end>"


def test_a_dialogue_depends_on_seed_epoch_and_place_alone(captions):
    first, again, other = (DialogueDataset(captions, PROMPTS, chat(), MEDIA, 0.5, seed=seed) for seed in (0, 0, 1))
    assert [written(first[1, place]) for place in (5, 3)] == [written(again[1, place]) for place in (5, 3)]
    assert [written(s) for s in epoch(first)] != [written(s) for s in epoch(first, 1)]
    assert [written(s) for s in epoch(first)] != [written(s) for s in epoch(other)]


def test_instructions_are_mixed_in_at_their_share(captions, instructions):
    dataset = DialogueDataset(captions, PROMPTS, chat(), MEDIA, instructions=instructions, share=0.25)
    assert len(dataset) == round(len(captions) / 0.75)
    mixed = [sample.concept_id < 0 or bool(sample.skipped) for sample in epoch(dataset)]  # a broken one is replaced
    assert sum(mixed) == len(dataset) - len(captions)
    with pytest.raises(DataError, match="above 0 just where"):
        DialogueDataset(captions, PROMPTS, chat(), MEDIA, share=0.25)
    with pytest.raises(DataError, match="above 0 just where"):
        DialogueDataset(captions, PROMPTS, chat(), MEDIA, instructions=instructions)


def test_a_prompt_too_long_for_an_answer_is_a_broken_row_that_is_counted(tmp_path):
    rows = [
        {"sample_id": "long", "instruction": "What is drawn? " * 30, "output": "x"},
        {"sample_id": "short", "instruction": "Add.", "output": "4"},
    ]
    dataset = InstructionDataset(read_rows(mini.write_jsonl(tmp_path / "rows", rows)), decoding(), chat(40), MEDIA)
    sample = dataset[0, 0]
    assert sample.sample_id == "short"
    assert sample.skipped[0].sample_id == "long" and "leaves no room for the answer in 40" in sample.skipped[0].reason


def test_rows_of_openorca_are_read_as_they_are(tmp_path):
    row = {"id": "flan.1", "system_prompt": "Be brief.", "question": "Add.", "response": "4"}
    dataset = InstructionDataset(read_rows(mini.write_jsonl(tmp_path / "rows", [row])), decoding(), chat())
    assert written(dataset[0, 0]) == "<system> Be brief.<user> Add.<assistant> 4<end>"
    assert dataset[0, 0].sample_id == "flan.1"


def test_a_batch_says_whose_media_it_holds_and_splits_with_them(captions, instructions):
    dialogues = DialogueDataset(captions, PROMPTS, chat(), MEDIA)
    samples = [instructions[0, 1], dialogues[0, 0], instructions[0, 0], dialogues[0, 1]]  # text, both, image, both
    batch = Collate([0.0] * 3, [1.0] * 3, chat=chat())(samples)
    assert batch.rows["image"].tolist() == [1, 2, 3] and batch.rows["audio"].tolist() == [1, 3]
    assert batch.rows["text"].tolist() == [1, 3] and len(batch.text) == 2
    assert batch.shown["image"].tolist() == [False, True, True, True]
    assert batch.shown["audio"].tolist() == [False, True, False, True]
    assert batch.ids()["image"].tolist() == [samples[row].concept_id for row in (1, 2, 3)]
    assert batch.ids()["text"].tolist() == [samples[row].concept_id for row in (1, 3)]
    first, second = batch.split(2)
    assert first.rows["image"].tolist() == [1] and second.rows["image"].tolist() == [0, 1]
    assert first.rows["audio"].tolist() == [1] and second.rows["audio"].tolist() == [1]
    np.testing.assert_array_equal(second.image, batch.image[1:])
    np.testing.assert_array_equal(second.audio.waveform, batch.audio.waveform[1:])
    assert [part.text for part in (first, second)] == [[text] for text in batch.text]
    np.testing.assert_array_equal(second.dialogue.ids, batch.dialogue.ids[2:])


def test_captions_alone_are_shown_as_often_as_asked(captions):
    prompts = Prompts({"image_audio": [{"ask": "Both?"}], "text": [{"ask": "Say it."}]})
    dataset = DialogueDataset(captions, prompts, chat(), MEDIA, caption_share=0.25)
    samples = [sample for number in range(8) for sample in epoch(dataset, number)]
    alone = [sample for sample in samples if sample.shown == ("text",)]
    assert len(alone) / len(samples) == pytest.approx(0.25, abs=0.06)
    assert all(written(s) == f"<user> Say it.<assistant> {s.text}<end>" and s.image is not None for s in alone)
    with pytest.raises(DataError, match=r"dataset\.caption_share=2"):
        DialogueDataset(captions, prompts, chat(), MEDIA, caption_share=2)
