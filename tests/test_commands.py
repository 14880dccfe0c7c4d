"""`python train.py` and `python evaluate.py`: what they print, what they leave, and how they fail."""

import os
import re
import signal
import socket

import pytest

from tests import mini
from tests.commands import in_a_process


def imported(stderr: str) -> set[str]:
    """The packages that `-X importtime` reports."""
    return {name.split(".")[0] for name in re.findall(r"^import time:.*\| +(\S+)$", stderr, re.MULTILINE)}


def no_network(*_, **__):
    raise OSError("no network in this test")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, ["backbone: pretrained, tiny", "encoder: audio_text", "training.resume=", "--cfg job"]),
        (["--cfg", "job"], 0, ["optimization:", "batch_size:", "_target_: edge_glass.models.build.build_tower"]),
        (["training.max_stepz=3"], 2, []),
        (["encoder.widths=[300]"], 2, []),
    ],
)
def test_nothing_heavy_is_imported_before_the_config_is_valid(tmp_path, arguments, code, words):
    outcome = in_a_process(tmp_path, "train.py", *arguments, flags=["-X", "importtime"])
    assert outcome.code == code, outcome.stderr[-2000:]
    assert [word for word in words if word not in outcome.stdout] == []
    assert "edge_glass" in imported(outcome.stderr)
    assert imported(outcome.stderr) & {"torch", "transformers", "numpy", "pyarrow", "matplotlib", "wandb"} == set()
    assert outcome.files == []


def test_evaluate_explains_itself_without_importing_torch(tmp_path):
    outcome = in_a_process(tmp_path, "evaluate.py", "--help", flags=["-X", "importtime"])
    assert outcome.code == 0 and "checkpoint: last" in outcome.stdout
    assert "torch" not in imported(outcome.stderr)
    assert outcome.files == []


def test_pretrained_towers_without_network_are_one_message(command, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    message = command("train.py", "backbone=pretrained").message()
    assert "No weights for 'openai/clip-vit" in message
    assert "backbone=tiny" in message and "HF_HOME" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["training.max_stepz=3"], ["training.max_stepz", "Did you mean training.max_steps?"]),
        (["backbone=tinny"], ["backbone/tinny", "tiny"]),
        (["training.max_steps="], ["training.max_steps"]),
        (["training.max_steps=[1"], ["training.max_steps=[1"]),
        (["training.max_steps=soon"], ["training.max_steps", "soon"]),
        (["encoder.widths=[9999,512]"], ["encoder.widths=[9999, 512]", "encoder.dim="]),
        (["encoder.image.projection.dropout=much"], ["encoder.image.projection.dropout='much'", "float"]),
        (["encoder=vision_text", "dataset=image_text"], ["dataset.image=<path>"]),
        (["encoder=vision_text", "dataset=image_text", "dataset.image=gone"], ["no data at 'gone'"]),
        (["optimization.optimizer._target_=torch.optim.Adan"], ["torch.optim.Adan"]),
        (["+backbone.audio.d_modell=32"], ["WhisperConfig has no option 'd_modell'", "'d_model'"]),
        (["backbone.image.model_type=resnt"], ["resnt"]),
        (["backbone.text.name=package:no_such_package/model"], ["no_such_package", "pip install"]),
        (["backbone.text.name=nowhere/at-all"], ["nowhere/at-all", "backbone=tiny"]),
        (["dataset.where={split: [trian]}"], ["trian", "train"]),
        (
            ["optimization.batch_size=100000"],
            ["rows do not fill one global batch of 100000", "optimization.batch_size"],
        ),
        (["training.resume=gone"], ["training.resume=gone", "no run there"]),
    ],
    ids=lambda value: " ".join(value) if "=" in value[0] else "",
)
def test_a_mistake_is_one_message_and_leaves_nothing(command, monkeypatch, arguments, words):
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    message = command("train.py", *arguments).message()
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["run"]),
        (["run=gone"], ["run=gone", "no run there"]),
        (["run=gone", "checkpoint=newest"], ["checkpoint='newest'", "'last' or 'best'"]),
        (["run=gone", "chekpoint=best"], ["chekpoint", "Did you mean checkpoint?"]),
    ],
    ids=" ".join,
)
def test_a_mistake_in_an_evaluation_is_one_message(command, arguments, words):
    message = command("evaluate.py", *arguments).message()
    assert [word for word in words if word not in message] == []
    assert len(message.strip().splitlines()) == 1


def test_a_defect_keeps_its_traceback(command, monkeypatch):
    def defect(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("edge_glass.launch.run", defect)
    with pytest.raises(ZeroDivisionError):
        command("train.py")


def test_a_run_is_trained_evaluated_again_and_taken_up_again(command, tmp_path, mini_data, text_tower, no_pictures):
    arguments = [*mini.overrides(mini_data, text_tower), "name=small", "training.max_steps=2", "training.eval_every=2"]
    first = command("train.py", *arguments)
    assert first.code == 0, first.stderr
    (run,) = [
        tmp_path / "here" / name[: -len("/summary.json")] for name in first.files if name.endswith("summary.json")
    ]
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/small-\d{6}-\d{6}", str(run.relative_to(tmp_path / "here")))
    assert "image → text" in first.stdout and "report.md" in first.stdout and "total" in first.stdout
    report = (run / "report.md").read_text()

    (run / "report.md").unlink()
    again = command("evaluate.py", f"run={run}")
    assert again.code == 0, again.stderr
    assert (run / "report.md").read_text().split("## ")[1] == report.split("## ")[1]

    more = command("train.py", f"training.resume={run}", "training.max_steps=4")
    assert more.code == 0, more.stderr
    steps = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert len(steps) == 4
    assert {name.split("/")[2] for name in more.files if name.count("/") > 1} == {run.name}

    wrong = command("train.py", f"training.resume={run}", "encoder.dim=32")
    assert wrong.code == 2 and "error: encoder.dim=32: a resumed run keeps its own config" in wrong.stderr
    typo = command("train.py", f"training.resume={run}", "training.max_stepz=32")
    assert typo.code == 2 and "training.max_stepz" in typo.stderr
    group = command("train.py", f"training.resume={run}", "logger=tensorboard")
    assert group.code == 2 and "logger=tensorboard" in group.stderr and "logger.tensorboard" in group.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_command_that_is_stopped_before_it_trains_says_so_by_its_code(command, monkeypatch, number, code):
    monkeypatch.setattr("edge_glass.launch.run", lambda *_: os.kill(os.getpid(), number))
    outcome = command("train.py")
    assert outcome.code == code and "Traceback" not in outcome.stderr
    assert outcome.files == []


@pytest.mark.parametrize(("rank", "said"), [("0", "error: Could"), ("1", "error: rank 1: Could")])
def test_a_rank_that_fails_alone_speaks_for_itself(command, monkeypatch, rank, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("edge_glass.cli.SECONDS_FOR_THE_FIRST_RANK", 0)
    assert said in command("train.py", "training.max_stepz=3").message()
