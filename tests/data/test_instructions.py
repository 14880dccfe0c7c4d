import numpy as np
import pytest

from edge_glass.data.batch import SkippedRow
from edge_glass.data.decode import decode_image
from edge_glass.data.dialogue import Chat
from edge_glass.data.instructions import InstructionDataset
from edge_glass.data.rows import DataError, read_rows
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
