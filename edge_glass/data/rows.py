"""Rows of a data set on disk: a parquet file, or a folder with metadata.json / metadata.jsonl beside its media."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from edge_glass.errors import UserError

# Other spellings of a column -> the name used here.
ALIASES = {
    "caption": "text",
    "image_path": "image",
    "audio_path": "audio",
    "voice": "source",
    "id": "sample_id",
    "system_prompt": "system",  # this and the next two: OpenOrca
    "question": "instruction",
    "response": "output",
}
IDS = ("sample_id", "concept_id")
REPOSITORY = Path(__file__).resolve().parents[2]


class DataError(UserError):
    """A data set that cannot be read as it was asked for."""


@dataclass
class Rows:
    """A table of samples whose media are read only when asked for.

    Attributes:
        table: columns `sample_id`, `concept_id`, and any of `text`, `image`, `audio`, `group`, `source`, `split` ...
            `image` and `audio` hold a struct of `bytes` and `path` (the Hugging Face `Image`/`Audio` layout), bytes, or
            a path relative to `folder`.
        folder: what relative media paths start from.
        files: what the table was read from.
        made_up: id columns that the files lack, so that they mean nothing outside this table.
    """

    table: pa.Table
    folder: Path
    files: list[Path] = field(default_factory=list)
    made_up: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    @property
    def origin(self) -> str:
        """What the rows were read from, for messages."""
        return ", ".join(map(str, self.files)) or "the captions"

    def column(self, name: str) -> list[Any]:
        """All values of a column.

        Raises:
            DataError: there is no such column.
        """
        self.require(name)
        return self.table.column(name).to_pylist()

    def require(self, name: str) -> None:
        """Make sure that there is a column, without reading it.

        Raises:
            DataError: there is no such column.
        """
        if name not in self.columns:
            raise DataError(f"no column {name!r} in {self.origin}; it has {sorted(self.columns)}")

    def media(self, modality: str, row: int) -> bytes:
        """The encoded bytes of a row's image or audio.

        Raises:
            FileNotFoundError: the row names no media, or a file that is not there.
        """
        value = self.table.column(modality)[row].as_py()
        if isinstance(value, dict):
            if value.get("bytes"):
                return value["bytes"]
            value = value.get("path")
        if isinstance(value, bytes):
            return value
        if not value:
            raise FileNotFoundError(f"no {modality} in this row")
        return (self.folder / value).read_bytes()

    def media_stamp(self, modality: str) -> str:
        """A short hash of the size and time of change of the files that rows point to; `data_hash` knows the rest."""
        digest = hashlib.sha256()
        for value in self.table.column(modality):
            found = value.as_py() if not isinstance(value.type, pa.StructType) else _path_alone(value)
            if isinstance(found, str):
                try:
                    about = (self.folder / found).stat()
                    digest.update(f"{found} {about.st_size} {about.st_mtime_ns}\n".encode())
                except OSError:
                    digest.update(f"{found} missing\n".encode())
        return digest.hexdigest()[:16]

    def where(self, conditions: dict[str, Any] | None) -> "Rows":
        """The rows whose columns hold one of the given values.

        Args:
            conditions: column -> a value or a list of values; `None` or empty keeps every row.

        Raises:
            DataError: an unknown column, or nothing left.
        """
        if not conditions:
            return self
        keep = [True] * len(self)
        for name, wanted in conditions.items():
            values = set(wanted) if isinstance(wanted, list | tuple | set) else {wanted}
            keep = [kept and value in values for kept, value in zip(keep, self.column(name), strict=True)]
        if not any(keep):
            found = {name: sorted(set(map(str, self.column(name))))[:20] for name in conditions}
            raise DataError(f"no row of {self.origin} has {dict(conditions)}; the values there are {found}")
        return replace(self, table=self.table.filter(pa.array(keep)))


def resolve(path: str | Path) -> Path:
    """The path as given, or, if it is not there, the same path below the repository's root."""
    given = Path(path).expanduser()
    if not given.exists() and not given.is_absolute() and (REPOSITORY / given).exists():
        return REPOSITORY / given
    return given


def read_rows(path: str | Path, shares: dict[str, float] | None = None, pair_by: str = "concept_id") -> Rows:
    """Read a data set's rows.

    Args:
        path: a parquet file, a folder of parquet files, a `metadata.json` / `metadata.jsonl` file, or a folder
            that holds one. JSON rows have the keys `image_path`, `audio_path` (relative to the folder), `caption` or
            `text`, `instruction`, `input`, `output`, `sample_id`.
        shares: for a set without a `split` column: the share of concepts that goes to each split other than
            `train`, say `{"val": 0.05, "test": 0.05}`; chosen by a hash of the concept, so that rows of one concept
            stay together and the choice survives new rows.
        pair_by: `text` lets the text say which rows are one concept, even where there are concept ids.

    Returns:
        Rows with `sample_id` and `concept_id` always present: rows without a concept id share one when their texts
        are equal, so that a caption used twice is no false negative.

    Raises:
        DataError: nothing there, nothing readable, or a sample id that names two rows.
    """
    found = resolve(path)
    if not found.exists():
        raise DataError(f"no data at {str(path)!r}: neither {found.absolute()} nor {REPOSITORY / Path(path)} exists")
    if found.is_dir():
        candidates = [found / "metadata.jsonl", found / "metadata.json", *sorted(found.glob("*.parquet"))]
        files = [file for file in candidates if file.is_file()]
        if not files:
            raise DataError(f"{found} holds no metadata.jsonl, no metadata.json and no *.parquet")
        files = files if files[0].suffix == ".parquet" else files[:1]
    else:
        files = [found]
    tables = [_read_table(file) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise DataError(f"the files of {found} do not fit together: {error}") from error
    table = table.rename_columns(
        [
            ALIASES[name] if name in ALIASES and ALIASES[name] not in table.column_names else name
            for name in table.column_names
        ]
    )
    if table.num_rows == 0:
        raise DataError(f"{found} has no rows")
    made_up = [name for name in IDS if name not in table.column_names]
    rows = Rows(_with_ids(table, shares or {}, pair_by), files[0].parent, files, made_up)
    sample, times = Counter(rows.column("sample_id")).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{times} rows of {rows.origin} have the sample_id {sample!r}; it names one row. What belongs together "
            "shares its text or its concept_id"
        )
    return rows


def data_hash(tables: Iterable[Rows]) -> str:
    """A short hash of the files that the tables were read from (not of media files that JSON rows point to)."""
    digest = hashlib.sha256()
    for path in sorted({file for rows in tables for file in rows.files}):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _path_alone(value: pa.StructScalar) -> str | None:
    """The path of a struct of `bytes` and `path` that holds no bytes."""
    holds_bytes = "bytes" in value and value["bytes"].is_valid
    return None if holds_bytes or "path" not in value else value["path"].as_py()


def _read_table(file: Path) -> pa.Table:
    try:
        if file.suffix == ".parquet":
            return pq.read_table(file)
        rows = list(_json_rows(file))
        names = dict.fromkeys(name for row in rows for name in row)  # pyarrow would take the first row's keys alone
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{file} cannot be read as {file.suffix[1:]} rows: {error}") from error


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError(f"expected a list of rows, found {type(rows).__name__}")
        for number, row in enumerate(rows, start=1):
            yield _json_row(row, f"row {number}")
        return
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a caption
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            yield _json_row(row, f"line {number}")


def _json_row(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with keys such as image_path and caption, found {row!r}")
    return row


def _with_ids(table: pa.Table, shares: dict[str, float], pair_by: str) -> pa.Table:
    given = table.column_names
    for name in ("sample_id", "text"):
        if name in given and not pa.types.is_string(table.schema.field(name).type):
            table = table.set_column(given.index(name), name, table.column(name).cast(pa.string()))
    if "sample_id" not in given:
        table = table.append_column("sample_id", pa.array([f"row-{row}" for row in range(table.num_rows)]))
    if "split" not in given and shares:
        keys = ("text", "sample_id") if pair_by == "text" else ("concept_id", "text", "sample_id")
        key = next(name for name in keys if name in (*given, "sample_id"))
        splits = [_split_of(_normal(value), shares) for value in table.column(key).to_pylist()]
        table = table.append_column("split", pa.array(splits))
    if "concept_id" not in given:
        key = "text" if "text" in given else "sample_id"
        ids = table.column(key).combine_chunks().dictionary_encode().indices.cast(pa.int64())
        table = table.append_column("concept_id", ids)
    return table


def _normal(value: Any) -> str:
    """A key without what people do not mean by it: case and outer blanks."""
    return str(value).strip().casefold()


def _split_of(key: str, shares: dict[str, float]) -> str:
    position = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return "train"


def read_tables(
    image: str | Path | None,
    audio: str | Path | None,
    pair_by: str = "concept_id",
    shares: dict[str, float] | None = None,
) -> dict[str, Rows]:
    """The tables of a data set, with concept ids that mean the same thing in each.

    Args:
        image: path of the rows with images, or None.
        audio: path of the rows with audio, or None; may be the same file.
        pair_by: what makes rows of the two tables belong together: `concept_id`, `sample_id`, or `text` (compared
            without case and outer blanks) for sets that have no triplets in common.
        shares: see `read_rows`.

    Returns:
        `image` and/or `audio` -> rows.

    Raises:
        DataError: no path at all, or a table without the column `pair_by`.
    """
    paths = {name: path for name, path in (("image", image), ("audio", audio)) if path is not None}
    if not paths:
        raise DataError("this data set names no rows: set dataset.image or dataset.audio to a file or folder")
    tables = {name: read_rows(path, shares, pair_by) for name, path in paths.items()}
    for name, rows in tables.items():
        rows.require(name)
        rows.require(pair_by)
        _require_texts(rows)
        if pair_by in rows.made_up and len(set(map(resolve, paths.values()))) > 1:
            raise DataError(
                f"dataset.pair_by={pair_by}: {rows.origin} has no column {pair_by!r}, so nothing says which of its "
                f"rows belong to those of the other table; it has {sorted(rows.columns)}. dataset.pair_by=text pairs "
                "by text"
            )
    if pair_by == "concept_id" and all(_has_numbers(rows) for rows in tables.values()):
        return tables
    numbers: dict[str, int] = {}
    return {name: _renumbered(rows, pair_by, numbers) for name, rows in tables.items()}


def _require_texts(rows: Rows) -> None:
    blank = [
        sample
        for sample, text in zip(rows.column("sample_id"), rows.column("text"), strict=True)
        if not (text and text.strip())
    ]
    if blank:
        raise DataError(
            f"{len(blank)} of {len(rows)} rows of {rows.origin} have no text, such as {blank[:5]}; write one or leave "
            "the rows out"
        )


def _has_numbers(rows: Rows) -> bool:
    return pa.types.is_integer(rows.table.schema.field("concept_id").type)


def _renumbered(rows: Rows, pair_by: str, numbers: dict[str, int]) -> Rows:
    ids = pa.array([numbers.setdefault(_normal(key), len(numbers)) for key in rows.column(pair_by)])
    return replace(rows, table=rows.table.set_column(rows.columns.index("concept_id"), "concept_id", ids))
