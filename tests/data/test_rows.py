import json

import pytest

from edge_glass.data.rows import REPOSITORY, DataError, Rows, data_hash, read_rows, read_tables
from tests import mini

SHARES = {"val": 0.2, "test": 0.1}


def caption_rows(count=40, repeats=1):
    return [
        {"sample_id": f"s{i}-{r}", "caption": f"thing {i}", "image_path": f"{i}.png"}
        for i in range(count)
        for r in range(repeats)
    ]


def splits(rows):
    return dict(zip(rows.column("sample_id"), rows.column("split"), strict=True))


@pytest.fixture
def three_forms(tmp_path):
    """The same rows as metadata.jsonl, as metadata.json and as parquet with the bytes inside."""
    rows = [{"sample_id": str(i), "caption": mini.names()[i], "image_path": f"pictures/{i}.png"} for i in range(4)]
    for form in ("jsonl", "json"):
        (tmp_path / form / "pictures").mkdir(parents=True)
        for i in range(4):
            (tmp_path / form / "pictures" / f"{i}.png").write_bytes(mini.png(mini.drawing(i)))
    mini.write_jsonl(tmp_path / "jsonl", rows)
    (tmp_path / "json" / "metadata.json").write_text(json.dumps(rows))
    (tmp_path / "parquet").mkdir()
    inside = [
        {
            "sample_id": str(i),
            "text": mini.names()[i],
            "image": {"bytes": mini.png(mini.drawing(i)), "path": f"{i}.png"},
        }
        for i in range(4)
    ]
    mini.write_parquet(tmp_path / "parquet" / "rows.parquet", inside)
    return tmp_path


def test_parquet_json_and_jsonl_give_the_same_rows(three_forms):
    forms = [read_rows(three_forms / form) for form in ("jsonl", "json", "parquet")]
    for name in ("sample_id", "text", "concept_id"):
        assert forms[0].column(name) == forms[1].column(name) == forms[2].column(name)
    for row in range(4):
        assert len({rows.media("image", row) for rows in forms}) == 1


@pytest.mark.parametrize("file", ["jsonl/metadata.jsonl", "json/metadata.json", "parquet/rows.parquet"])
def test_a_file_may_be_named_in_the_place_of_its_folder(three_forms, file):
    whole = read_rows((three_forms / file).parent)
    assert read_rows(three_forms / file).table.equals(whole.table)
    assert read_rows(three_forms / file).media("image", 2) == whole.media("image", 2)


def test_a_folder_of_parquet_files_is_one_table(tmp_path):
    mini.write_parquet(tmp_path / "b.parquet", [{"text": "two", "split": "val"}])
    mini.write_parquet(tmp_path / "a.parquet", [{"text": "one"}])
    rows = read_rows(tmp_path)
    assert rows.column("text") == ["one", "two"]
    assert rows.column("split") == [None, "val"]
    assert rows.column("sample_id") == ["row-0", "row-1"]


def test_parquet_may_hold_plain_bytes_or_paths_beside_it(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    mini.write_parquet(tmp_path / "bytes.parquet", [{"text": "a", "image": b"picture"}])
    mini.write_parquet(tmp_path / "path.parquet", [{"text": "a", "image": {"bytes": None, "path": "a.png"}}])
    for file in ("bytes.parquet", "path.parquet"):
        assert read_rows(tmp_path / file).media("image", 0) == b"picture"


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("caption", "text"),
        ("image_path", "image"),
        ("audio_path", "audio"),
        ("voice", "source"),
        ("id", "sample_id"),
    ],
)
def test_other_spellings_of_a_column_are_understood(tmp_path, alias, name):
    folder = mini.write_jsonl(tmp_path / "rows", [{alias: "value", "other": 1}])
    assert read_rows(folder).column(name) == ["value"]


def test_a_spelling_never_hides_the_column_of_that_name(tmp_path):
    folder = mini.write_jsonl(tmp_path / "rows", [{"caption": "long caption", "text": "text"}])
    rows = read_rows(folder)
    assert rows.column("text") == ["text"]
    assert rows.column("caption") == ["long caption"]


def test_keys_that_the_first_row_lacks_are_read(tmp_path):
    folder = mini.write_jsonl(tmp_path / "rows", [{"text": "a"}, {"text": "b", "audio_path": "b.wav"}])
    assert read_rows(folder).column("audio") == [None, "b.wav"]


def test_captions_may_hold_any_character_and_the_file_a_byte_order_mark(tmp_path):
    caption = "a line\u2028broken, é, 🙂\x85"
    line = json.dumps({"text": caption}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + line + "\n\n", encoding="utf-8")
    assert read_rows(tmp_path).column("text") == [caption]


def test_numbers_as_ids_and_captions_become_strings(tmp_path):
    rows = read_rows(mini.write_jsonl(tmp_path / "rows", [{"sample_id": 7, "text": 1984}]))
    assert rows.column("sample_id") == ["7"]
    assert rows.column("text") == ["1984"]


def test_rows_of_one_text_are_one_concept_and_given_concepts_stay(tmp_path):
    texts = [{"text": text} for text in ("cat", "dog", "cat")]
    first, second, third = read_rows(mini.write_jsonl(tmp_path / "made", texts)).column("concept_id")
    assert first == third != second
    given = [row | {"concept_id": number} for row, number in zip(texts, (5, 6, 7), strict=True)]
    assert read_rows(mini.write_jsonl(tmp_path / "given", given)).column("concept_id") == [5, 6, 7]


def test_splits_have_their_shares(tmp_path):
    rows = read_rows(mini.write_jsonl(tmp_path / "rows", caption_rows(2000)), SHARES)
    found = rows.column("split")
    assert found.count("val") == pytest.approx(400, abs=60)
    assert found.count("test") == pytest.approx(200, abs=45)
    assert set(found) == {"train", "val", "test"}


def test_rows_of_one_text_never_straddle_a_split(tmp_path):
    texts = [form for i in range(50) for form in (f"thing {i}", f" Thing {i} ")]
    rows = read_rows(mini.write_jsonl(tmp_path / "rows", [{"text": text} for text in texts]), SHARES)
    found = rows.column("split")
    assert found[::2] == found[1::2]


def test_rows_of_one_concept_never_straddle_a_split_whatever_their_captions_are(tmp_path):
    captions = [{"text": f"caption {i}", "concept_id": i // 4} for i in range(200)]
    rows = read_rows(mini.write_jsonl(tmp_path / "rows", captions), SHARES)
    by_concept = {}
    for concept, split in zip(rows.column("concept_id"), rows.column("split"), strict=True):
        by_concept.setdefault(concept, set()).add(split)
    assert all(len(found) == 1 for found in by_concept.values())


def test_a_row_keeps_its_split_when_others_come_and_go(tmp_path):
    rows = caption_rows(60)
    before = splits(read_rows(mini.write_jsonl(tmp_path / "before", rows), SHARES))
    more = [{"sample_id": "new", "caption": "a new thing", "image_path": "n.png"}, *reversed(rows[10:])]
    after = splits(read_rows(mini.write_jsonl(tmp_path / "after", more), SHARES))
    assert {sample: after[sample] for sample in after if sample != "new"} == dict(list(before.items())[10:])


def test_a_split_column_is_taken_as_it_is(tmp_path):
    folder = mini.write_jsonl(tmp_path / "rows", [{"text": "a", "split": "mine"}])
    assert read_rows(folder, SHARES).column("split") == ["mine"]


def test_where_keeps_the_rows_that_meet_every_condition(tmp_path):
    rows = read_rows(mini.write_parquet(tmp_path / "rows.parquet", mini.speech_rows()))
    kept = rows.where({"source": "low", "concept_id": [1, 2]})
    assert kept.column("sample_id") == ["low/1", "low/2"]
    assert kept.media("audio", 1) == rows.media("audio", 2)
    assert rows.where({}) is rows and rows.where(None) is rows
    with pytest.raises(DataError, match=r"\['high', 'low', 'mid'\]"):
        rows.where({"source": ["nobody"]})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, ["holds no metadata.jsonl", "metadata.json", "parquet"]),
        ({"metadata.jsonl": ""}, ["has no rows"]),
        ({"metadata.json": "[]"}, ["has no rows"]),
        ({"metadata.json": '{"text": "a"}'}, ["expected a list", "dict"]),
        ({"metadata.jsonl": '{"text": "a"}\n{"text": '}, ["line 2"]),
        ({"metadata.jsonl": '{"text": "a"}\n["b"]'}, ["line 2", "['b']"]),
        ({"metadata.jsonl": '{"text": "a"}\n{"text": {"b": 1}}'}, ["metadata.jsonl"]),
        ({"metadata.jsonl": '{"sample_id": "a"}\n{"sample_id": "a"}'}, ["2 rows", "sample_id 'a'", "concept_id"]),
        ({"rows.parquet": "no parquet"}, ["rows.parquet"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, words):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as found:
        read_rows(tmp_path)
    assert str(tmp_path) in str(found.value)
    assert all(word in str(found.value) for word in words)


def test_parquet_files_that_do_not_fit_together_are_named(tmp_path):
    mini.write_parquet(tmp_path / "a.parquet", [{"text": "a"}])
    mini.write_parquet(tmp_path / "b.parquet", [{"text": 1}])
    with pytest.raises(DataError, match="do not fit together"):
        read_rows(tmp_path)


def test_a_missing_file_is_named_with_both_places_that_were_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as found:
        read_rows("data/nothing.parquet")
    assert str(tmp_path / "data/nothing.parquet") in str(found.value)
    assert str(REPOSITORY / "data/nothing.parquet") in str(found.value)


def test_shipped_data_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(read_rows("data/emoji_speech/images.parquet")) > 1000


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    folder = mini.write_jsonl(tmp_path / "rows", [{"text": "a", "picture": "a.png"}])
    with pytest.raises(DataError, match=r"no column 'image'.*\['concept_id', 'picture', 'sample_id', 'text'\]"):
        read_tables(folder, None)
    with pytest.raises(DataError, match=r"dataset\.image or dataset\.audio"):
        read_tables(None, None)


def test_media_that_a_row_does_not_have_are_a_missing_file(tmp_path):
    rows = read_rows(mini.write_jsonl(tmp_path / "rows", [{"text": "a", "image": "gone.png"}, {"text": "b"}]))
    for row in range(2):
        with pytest.raises(FileNotFoundError):
            rows.media("image", row)


def test_pairing_through_text_unifies_concepts_without_case_and_outer_blanks(tmp_path):
    images = mini.write_jsonl(tmp_path / "i", [{"text": t, "image": "x"} for t in ("Cat", "dog", "bird")])
    speech = mini.write_jsonl(tmp_path / "a", [{"text": t, "audio": "x"} for t in ("fish", " dog ", "cat")])
    tables = read_tables(images, speech, "text")
    ids = {
        name: dict(zip(rows.column("text"), rows.column("concept_id"), strict=True)) for name, rows in tables.items()
    }
    assert ids["image"]["Cat"] == ids["audio"]["cat"]
    assert ids["image"]["dog"] == ids["audio"][" dog "]
    assert len({*ids["image"].values(), *ids["audio"].values()}) == 4


def test_pairing_through_text_splits_both_tables_alike(tmp_path):
    images = [{"text": f"thing {i}", "image": "x", "concept_id": i} for i in range(60)]
    speech = [{"text": f"Thing {i}", "audio": "x", "concept_id": 1000 + i} for i in range(60)]
    tables = read_tables(
        mini.write_jsonl(tmp_path / "i", images), mini.write_jsonl(tmp_path / "a", speech), "text", SHARES
    )
    assert tables["image"].column("split") == tables["audio"].column("split")
    assert tables["image"].column("concept_id") == tables["audio"].column("concept_id")


def test_pairing_through_samples_makes_each_triplet_a_concept(tmp_path):
    rows = [{"sample_id": f"t{i}", "text": "same", "image": "x", "audio": "y"} for i in range(3)]
    folder = mini.write_jsonl(tmp_path / "rows", rows)
    tables = read_tables(folder, folder, "sample_id")
    assert tables["image"].column("concept_id") == tables["audio"].column("concept_id") == [0, 1, 2]


def test_one_file_without_ids_pairs_its_own_rows(tmp_path):
    folder = mini.write_jsonl(tmp_path / "rows", [{"text": f"t{i}", "image": "x", "audio": "y"} for i in range(3)])
    for pair_by in ("sample_id", "concept_id"):
        tables = read_tables(folder, folder, pair_by)
        assert tables["image"].column("concept_id") == tables["audio"].column("concept_id")


@pytest.mark.parametrize("pair_by", ["sample_id", "concept_id"])
def test_two_files_without_the_ids_that_pair_them_are_refused(tmp_path, pair_by):
    images = mini.write_jsonl(tmp_path / "i", [{"text": "cat", "image": "x"}, {"text": "dog", "image": "x"}])
    speech = mini.write_jsonl(tmp_path / "a", [{"text": "dog", "audio": "x"}, {"text": "cat", "audio": "x"}])
    with pytest.raises(DataError, match=rf"no column '{pair_by}'.*dataset\.pair_by=text"):
        read_tables(images, speech, pair_by)


def test_concepts_may_be_named_by_words(tmp_path):
    images = mini.write_jsonl(tmp_path / "i", [{"concept_id": c, "text": c, "image": "x"} for c in ("cat", "dog")])
    speech = mini.write_jsonl(
        tmp_path / "a", [{"concept_id": c, "text": c, "audio": "x"} for c in ("dog", "eel", "cat")]
    )
    tables = read_tables(images, speech)
    cat, dog = tables["image"].column("concept_id")
    assert tables["audio"].column("concept_id")[::2] == [dog, cat]
    assert isinstance(cat, int)


def test_rows_without_text_are_named(tmp_path):
    rows = [{"sample_id": "a", "text": "a", "image": "x"}, {"sample_id": "b", "text": " ", "image": "x"}]
    folder = mini.write_jsonl(tmp_path / "rows", [*rows, {"sample_id": "c", "image": "x"}])
    with pytest.raises(DataError, match=r"2 of 3 rows of .* have no text, such as \['b', 'c'\]"):
        read_tables(folder, None)


def test_the_hash_follows_the_content_of_the_files(tmp_path):
    first = read_rows(mini.write_jsonl(tmp_path / "a", [{"text": "a"}]))
    copy = read_rows(mini.write_jsonl(tmp_path / "b", [{"text": "a"}]))
    other = read_rows(mini.write_jsonl(tmp_path / "c", [{"text": "b"}]))
    assert data_hash([first]) == data_hash([copy]) == data_hash([first, first])
    assert len({data_hash(tables) for tables in ([first], [other], [first, other])}) == 3


def test_pictures_are_not_read_to_find_out_that_there_are_some(tmp_path, monkeypatch):
    read = []
    column = Rows.column
    monkeypatch.setattr(Rows, "column", lambda rows, name: read.append(name) or column(rows, name))
    read_tables(mini.write_parquet(tmp_path / "rows.parquet", mini.image_rows()), None, "text")
    assert read and "image" not in read
