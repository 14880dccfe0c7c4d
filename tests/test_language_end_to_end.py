"""Runs with a decoder, from the config to what it says of a user's own files."""

import json

import pytest
import soundfile
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from edge_glass.config import to_experiment
from edge_glass.data.rows import read_rows
from edge_glass.decoders.tokenizers import CHAT_TEMPLATE
from edge_glass.experiments.build import open_run
from edge_glass.runs import read_metrics
from tests import mini

LONG_ENOUGH = (
    "training.max_steps=110",
    "training.eval_every=55",
    "training.save_every=55",
    "optimization.batch_size=12",
)


def figures(folder) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, mini_data, text_tower):
    """A run that was aligned and taught to speak at once."""
    folder = tmp_path_factory.mktemp("runs") / "taught"
    mini.run(mini.experiment(mini_data, text_tower, *mini.DECODER, *LONG_ENOUGH, "fusion.modality_dropout=0.5"), folder)
    return folder


@pytest.fixture
def media(tmp_path):
    """A drawing and a clip that are in no data set."""
    mini.drawing(1, size=40, inset=0.15).save(tmp_path / "square.png")
    soundfile.write(tmp_path / "square.wav", mini.tone(1, octave=1.01), mini.RATE)
    (tmp_path / "no.png").write_bytes(b"no picture")
    return tmp_path


def test_a_run_with_a_decoder_reads_its_prefix(taught):
    found = figures(taught)
    for media in ("image", "audio", "image_audio"):
        own, other, none = (
            found[f"test/{media}_caption/{loss}"] for loss in ("loss", "loss_shuffled_prefix", "loss_without_prefix")
        )
        assert own < 0.8 * min(other, none), (media, own, other, none)
        assert found[f"test/{media}_caption/exact_match"] > 2 / mini.CONCEPTS
    assert 0 <= found["test/audio_caption/WER"] < 1 and found["test/mean/exact_match"] > 0
    assert found["test/image_to_text/R@1"] > 0.2  # and is aligned beside


def test_its_log_report_and_picture_tell_of_the_answers(taught):
    rows = list(read_metrics(taught))
    lm = [row["loss/lm"] for row in rows if row["kind"] == "train"]
    assert sum(lm[-10:]) < 0.5 * sum(lm[:10])
    assert {"thinking/steps", "loss/image_text"} <= set(rows[0])
    assert any("val/mean/exact_match" in row for row in rows if row["kind"] == "eval")
    report = (taught / "report.md").read_text()
    assert "## Answers: test" in report and "| loss of the caption | own prefix | another's | none |" in report
    assert (taught / "figures" / "answers.png").stat().st_size > 10_000
    parts = {row["part"] for row in json.loads((taught / "summary.json").read_text())["parameters"]}
    assert {"fusion", "decoder", "image.encoder"} <= parts


def test_evaluate_says_the_same_again(command, taught):
    before = figures(taught)
    again = command("evaluate.py", f"run={taught}")
    assert again.code == 0, again.stderr
    assert figures(taught) == pytest.approx(before)
    assert "image + audio" in again.stdout and "exact" in again.stdout


def test_generate_answers_about_files_of_ones_own(command, taught, media):
    names = set(mini.names())
    picture = command("generate.py", f"run={taught}", f"image={media}/square.png")
    assert picture.code == 0 and picture.stdout.strip() in names, picture
    both = command(
        "generate.py",
        f"run={taught}",
        f"image=[{media}/square.png,{media}/square.png]",
        f"audio=[{media}/square.wav,{media}/square.wav]",
        "prompt='Say it.'",
    )
    assert both.code == 0, both.stderr
    lines = both.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"{media}/square.png + {media}/square.wav: ") for line in lines)
    drawn = [
        command(
            "generate.py", f"run={taught}", f"audio={media}/square.wav", "generation.temperature=5.0", f"seed={seed}"
        )
        for seed in (0, 0, 1, 2)
    ]
    assert drawn[0].stdout == drawn[1].stdout and len({outcome.stdout for outcome in drawn}) > 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["image=null audio=null", "image=cat.png"]),
        (["image=gone.png"], ["image=gone.png", "No such file"]),
        (["image={media}/no.png"], ["no.png", "image"]),
        (
            ["image=[{media}/square.png,{media}/square.png]", "audio={media}/square.wav"],
            ["as many pictures as recordings"],
        ),
        (["image={media}/square.png", "generation.top_q=1"], ["generation.top_q", "top_p"]),
        (["image={media}/square.png", "generation.top_p=3"], ["top_p=3"]),
        (["image={media}/square.png", "prompt='" + "long " * 60 + "'"], ["prompt", "decoder.max_tokens"]),
        (["run=nowhere", "image={media}/square.png"], ["run=nowhere", "no run there"]),
    ],
)
def test_generate_refuses_with_one_message(command, taught, media, arguments, words):
    given = [argument.replace("{media}", str(media)) for argument in arguments]
    run = [] if any(argument.startswith("run=") for argument in given) else [f"run={taught}"]
    message = command("generate.py", *run, *given).message()
    assert [word for word in words if word not in message] == []


def test_a_run_without_a_decoder_says_that_it_cannot_speak(
    command, tmp_path, mini_data, text_tower, media, no_pictures
):
    mini.run(mini.experiment(mini_data, text_tower, "training.max_steps=1"), tmp_path / "mute")
    refused = command("generate.py", f"run={tmp_path}/mute", f"image={media}/square.png").message()
    assert "this run has no decoder" in refused and "decoder=trm" in refused
    refused = command("export.py", f"run={tmp_path}/mute", "to=out").message()
    assert "runs with decoder=qwen have one" in refused


def test_a_decoder_is_taught_on_top_of_an_aligned_run(tmp_path, mini_data, text_tower, no_pictures):
    aligned, taught = tmp_path / "aligned", tmp_path / "taught"
    mini.run(mini.experiment(mini_data, text_tower, *LONG_ENOUGH), aligned)
    settings = [*mini.DECODER, *LONG_ENOUGH, "objective=instruction", f"objective.init_from={aligned}"]
    config = mini.experiment(mini_data, text_tower, *settings)
    value = mini.run(config, taught)
    found = figures(taught)
    assert value == found["val/mean/exact_match"]  # the figure that such a run is judged by
    retrieval = {name: value for name, value in figures(aligned).items() if "_to_" in name}
    assert retrieval == {name: value for name, value in found.items() if "_to_" in name}  # the towers are as they were
    assert found["test/image_caption/loss"] < 0.8 * found["test/image_caption/loss_shuffled_prefix"]
    weights = [load_file(next(folder.glob("checkpoints/step-*/model.safetensors"))) for folder in (aligned, taught)]
    for name, tensor in weights[0].items():
        if name.startswith("model."):
            assert tensor.equal(weights[1][name]), name


def test_towers_of_another_shape_are_not_taken_over(tmp_path, mini_data, text_tower, no_pictures):
    mini.run(mini.experiment(mini_data, text_tower, "training.max_steps=1"), tmp_path / "aligned")
    settings = [*mini.DECODER, "objective=instruction", f"objective.init_from={tmp_path}/aligned", "encoder.dim=8"]
    config = mini.experiment(mini_data, text_tower, *settings, "encoder.widths=[8,4]")
    with pytest.raises(Exception, match="does not hold the towers of this config"):
        mini.run(config, tmp_path / "run")
    gone = mini.experiment(mini_data, text_tower, *mini.DECODER, "objective=instruction", "objective.init_from=gone")
    with pytest.raises(Exception, match=r"objective\.init_from=gone: no run there"):
        mini.run(gone, tmp_path / "run")


def test_instructions_without_media_are_learned_beside_the_captions(tmp_path, mini_data, text_tower, no_pictures):
    rows = [{"instruction": f"What follows {n}?", "output": str(n + 1)} for n in range(8)]
    mini.write_jsonl(tmp_path / "orca", rows)
    settings = [*mini.DECODER, f"dataset.instructions={tmp_path}/orca", "dataset.instruction_share=0.5"]
    config = mini.experiment(mini_data, text_tower, *settings, "fusion=gated")
    mini.run(config, tmp_path / "run")
    rows_read = read_rows(tmp_path / "orca")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_rows"]["of"] == 24 * 5 + len(rows_read)
    assert all(row["loss"] == row["loss"] for row in read_metrics(tmp_path / "run") if row["kind"] == "train")


@pytest.mark.parametrize("fusion", ["concat", "cross_attention", "gated"])
@pytest.mark.parametrize("encoder", ["trimodal", "vision_text", "audio_text"])
def test_every_fusion_trains_with_every_set_of_towers(tmp_path, mini_data, text_tower, no_pictures, fusion, encoder):
    settings = [*mini.DECODER, f"fusion={fusion}", "training.max_steps=2", "training.eval_every=2"]
    absent = {"vision_text": ["encoder.audio=null"], "audio_text": ["encoder.image=null"], "trimodal": []}[encoder]
    dataset = {"vision_text": "ImageTextDataset", "audio_text": "AudioTextDataset", "trimodal": "TriModalDataset"}[
        encoder
    ]
    target = f"dataset.train._target_=edge_glass.data.datasets.{dataset}"
    mini.run(mini.experiment(mini_data, text_tower, *settings, *absent, target), tmp_path / "run")
    asked = {name.split("/")[1] for name in figures(tmp_path / "run") if "_caption/" in name}
    assert (
        asked
        == {
            "trimodal": {"image_caption", "audio_caption", "image_audio_caption"},
            "vision_text": {"image_caption"},
            "audio_text": {"audio_caption"},
        }[encoder]
    )
    if fusion != "concat":
        (row, *_) = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
        assert {name for name in row if name.startswith("gate/")} <= {"gate/image", "gate/audio", "gate/embedding"}
        assert any(name.startswith("gate/") for name in row)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A Qwen2 of 32 dimensions with random weights, in the hub's own format."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = Qwen2Tokenizer().train_new_from_iterator([[*mini.names(), "Name it."]], 300)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<end>", tokenizer.eos_token)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_qwen(folder) -> list[str]:
    """The overrides that put a language model on disk into the place of Qwen2.5-7B."""
    return ["language_model@backbone.decoder=pretrained", f"backbone.decoder.name={folder}"]


def lora_run(folder, name: str, mini_data, text_tower, qwen_folder, *more: str):
    """A run of the small Qwen2 with LoRA, as `backbone=pretrained` would have it."""
    settings = ["decoder=qwen", *small_qwen(qwen_folder), "backbone.decoder.model.load_in_8bit=false"]
    settings += ["backbone.decoder.model.lora.r=4", "fusion.model.hidden_dim=16"]
    mini.run(mini.experiment(mini_data, text_tower, *settings, *more), folder / name)
    return folder / name


@pytest.mark.parametrize("precision", ["load_in_8bit", "load_in_4bit", None])
def test_lora_on_a_quantised_qwen_trains_resumes_and_is_exported(
    command, tmp_path, mini_data, text_tower, qwen_folder, no_pictures, precision
):
    more = [] if precision is None else [f"backbone.decoder.model.{precision}=true"]
    run = lora_run(tmp_path, "run", mini_data, text_tower, qwen_folder, *more)
    stored = load_file(next((run / "checkpoints").glob("step-*6/model.safetensors")))
    decoder = {name for name in stored if name.startswith("decoder.")}
    assert decoder and all("lora_" in name for name in decoder)  # the base is where it came from
    assert "test/image_caption/exact_match" in figures(run)
    again = command("evaluate.py", f"run={run}")
    assert again.code == 0, again.stderr
    adapter = command("export.py", f"run={run}", f"to={tmp_path}/adapter")
    assert adapter.code == 0 and (tmp_path / "adapter" / "adapter_config.json").is_file(), adapter.stderr
    merged = command("export.py", f"run={run}", f"to={tmp_path}/merged", "merge=true")
    assert merged.code == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.config.model_type == "qwen2" and "AutoTokenizer reads" not in merged.stderr
    written, read = (AutoTokenizer.from_pretrained(folder) for folder in (qwen_folder, tmp_path / "merged"))
    assert written("red circle")["input_ids"] == read("red circle")["input_ids"]
    taken = command("export.py", f"run={run}", f"to={tmp_path}/merged")
    assert "that is there already" in taken.stderr


@pytest.mark.parametrize("name", ["vision_text_qwen", "trimodal_qwen", "trimodal_trm"])
def test_the_published_settings_run_with_small_towers(
    command, tmp_path, mini_data, text_tower, qwen_folder, no_pictures, name
):
    settings = [f"experiment={name}", "backbone=tiny", "dataset=emoji_speech", *mini.overrides(mini_data, text_tower)]
    settings += ["optimization.batch_size=4", "decoder.max_tokens=48", "decoder.generation.max_new_tokens=4"]
    settings += [
        "training.workers=0",
        "dataset.caption_share=0.0",
        "fusion.model.tokens=4",
        "fusion.model.hidden_dim=16",
    ]
    if name == "trimodal_trm":
        settings += ["decoder.model.width=32", "decoder.model.heads=2", "decoder.tokenizer.vocabulary=300"]
        settings += ["decoder.model.supervision=2", "decoder.model.latent_steps=2"]
    else:
        settings += small_qwen(qwen_folder)
    if name == "trimodal_qwen":
        settings += ["fusion.model.dim=16"]
    run = mini.run(to_experiment(mini.composed(*settings)), tmp_path / "run")
    found = figures(tmp_path / "run")
    assert run == found["val/mean/R@1"] and "test/image_caption/exact_match" in found
    again = command("evaluate.py", f"run={tmp_path}/run")
    assert again.code == 0 and figures(tmp_path / "run") == pytest.approx(found)


def test_a_small_qwen_from_scratch_trains_on_the_same_command(tmp_path, mini_data, text_tower, no_pictures):
    small = [
        "hidden_size=32",
        "intermediate_size=32",
        "num_hidden_layers=1",
        "num_attention_heads=2",
        "num_key_value_heads=1",
    ]
    settings = ["decoder=qwen", *(f"backbone.decoder.model.{option}" for option in small), "fusion.model.hidden_dim=16"]
    config = mini.experiment(mini_data, text_tower, *settings, "backbone.decoder.tokenizer.vocabulary=300")
    mini.run(config, tmp_path / "run")
    _, experiment, _ = open_run(str(tmp_path / "run"))
    assert experiment.decoder() is not None and "test/mean/exact_match" in figures(tmp_path / "run")


def test_puzzles_are_solved_and_drawn(command, tmp_path):
    folder = tmp_path / "run"
    value = mini.run(mini.puzzle_experiment("training.max_steps=60", "training.eval_every=30"), folder)
    found = figures(folder)
    assert value == found["val/exact_match"] and found["test/cell_accuracy"] > 0.3
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["exact_match_by_step"]) == 12 and summary["parameters"][-1]["part"] == "total"
    for name in ("accuracy_by_step", "puzzles", "training_curves"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5_000
    report = (folder / "report.md").read_text()
    assert "`test/exact_match`" in report and "retrieval" not in report.split("## Settings")[0]
    again = command("evaluate.py", f"run={folder}")
    assert again.code == 0 and figures(folder) == pytest.approx(found)
