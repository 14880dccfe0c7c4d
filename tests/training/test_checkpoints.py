import os
import pickle
import shutil
import threading
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.training.checkpoints import (
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointError,
    Checkpoints,
    load_state,
    load_weights,
    tower_identities,
    trained_state,
)


class Pixels(Encoder):
    """An encoder whose backbone is one linear layer and a running statistic."""

    def __init__(self, frozen: bool):
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), dim=4, frozen=frozen)

    def _encode(self, inputs):
        tokens = self.backbone(inputs)[:, None]
        return Tokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


def make_task(frozen: bool = False, width: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"encoder": Pixels(frozen), "projection": nn.Linear(4, width)})


def state_of(task: nn.Module) -> dict:
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for p in task.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "progress": {"step": 3, "skipped": {"a": "torn"}},
        "values": [1.5, None],
    }


def saved(run_dir, step: int, task: nn.Module, state=None, **options):
    """A checkpoint that is on the disk."""
    checkpoints = Checkpoints(run_dir, **options)
    checkpoints.save(step, task, state or {})
    return checkpoints.find("last")


def test_what_was_saved_is_loaded(tmp_path):
    task = make_task()
    state = state_of(task)
    folder = saved(tmp_path, 3, task, state)
    other = make_task(seed=1)
    load_weights(other, folder)
    torch.testing.assert_close(other.state_dict(), task.state_dict(), rtol=0, atol=0)
    again = load_state(folder)
    assert again["step"] == 3 and again["progress"] == state["progress"] and again["values"] == [1.5, None]
    torch.testing.assert_close(again["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path):
    folder = saved(tmp_path, 1, make_task())
    assert {(folder / name).stat().st_mode for name in (WEIGHTS, STATE, MANIFEST)} == {0o100666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    folder = saved(tmp_path, 1, make_task(), {"progress": {}})
    assert {file.name for file in folder.iterdir()} == {WEIGHTS, STATE, MANIFEST}
    assert not zipfile.is_zipfile(folder / WEIGHTS)  # safetensors, not torch's pickles
    torch.save({"harm": shutil.rmtree}, folder / STATE)
    with pytest.raises(pickle.UnpicklingError):
        load_state(folder)


def test_frozen_towers_are_not_stored_but_their_trained_neighbours_are(tmp_path):
    task = make_task(frozen=True)
    assert set(trained_state(task)) == {"projection.weight", "projection.bias"}
    assert "encoder.backbone.1.running_mean" in trained_state(make_task())
    folder = saved(tmp_path, 1, task)
    other = make_task(frozen=True, seed=1)
    before = other["encoder"].backbone[0].weight.clone()
    load_weights(other, folder)
    assert torch.equal(other["projection"].weight, task["projection"].weight)
    assert torch.equal(other["encoder"].backbone[0].weight, before)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (make_task(width=3), ["another model", "projection.bias"]),
        (make_task(frozen=True), ["another model", "encoder.backbone.0.bias", "too many"]),
        (nn.ModuleDict({"encoder": Pixels(False)}), ["projection.bias"]),
        (nn.ModuleDict({**make_task(), "more": nn.Linear(2, 2)}), ["lacks ['more.bias', 'more.weight']"]),
    ],
    ids=["wider", "frozen", "smaller", "larger"],
)
def test_weights_of_another_model_are_refused_and_nothing_changes(tmp_path, other, words):
    folder = saved(tmp_path, 1, make_task(seed=5))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError) as found:
        load_weights(other, folder)
    assert str(folder) in str(found.value)
    assert [word for word in words if word not in str(found.value)] == []
    torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints, task = Checkpoints(tmp_path, keep_last=2), make_task()
    for step in (10, 20, 30):
        checkpoints.save(step, task, {})
        if step == 10:
            checkpoints.mark_best(10, "val/R@1", 0.5)
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(40, task, {})
    assert checkpoints.steps() == [10, 30, 40]
    assert checkpoints.find("best").name == "step-0000010" and checkpoints.find("last").name == "step-0000040"
    checkpoints.mark_best(40, "val/R@1", 0.7)
    assert checkpoints.steps() == [30, 40]
    assert checkpoints.best() == {"step": 40, "metric": "val/R@1", "value": 0.7}
    assert checkpoints.find("best") == checkpoints.find("last")


def test_steps_are_ordered_as_numbers(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in (9, 12_345_678, 100):
        checkpoints.save(step, make_task(), {})
    assert checkpoints.steps() == [9, 100, 12_345_678]
    assert checkpoints.find("last").name == "step-12345678"


@pytest.mark.parametrize("call", ["torch.save", "edge_glass.training.checkpoints.save_file", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_disk_that_is_full_costs_that_checkpoint_only(tmp_path, monkeypatch, caplog, call, error):
    checkpoints, task = Checkpoints(tmp_path, keep_last=1), make_task()
    checkpoints.save(1, task, {"mark": "whole"})
    checkpoints.wait()

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        checkpoints.save(2, task, {"mark": "half"})
        checkpoints.wait()
    assert checkpoints.failures == 1 and checkpoints.steps() == [1]
    assert "step 2 could not be written" in caplog.text and "the newest is of step 1" in caplog.text
    assert load_state(checkpoints.find("last"))["mark"] == "whole"
    checkpoints.mark_best(2, "val/R@1", 0.5)
    assert checkpoints.best() is None
    checkpoints.save(2, task, {"mark": "new"})
    checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000002"]


def test_a_checkpoint_holds_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    checkpoints, task = Checkpoints(tmp_path), make_task()
    state = state_of(task)
    expected = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    moments = torch.clone(state["optimizer"]["state"][0]["exp_avg"])
    begun, changed = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert changed.wait(60)
        return save_file(*arguments)

    monkeypatch.setattr("edge_glass.training.checkpoints.save_file", slow)
    checkpoints.save(1, task, state)
    assert begun.wait(60)
    with torch.no_grad():  # training goes on while the disk is busy
        for tensor in (*task.parameters(), state["optimizer"]["state"][0]["exp_avg"]):
            tensor.zero_()
    changed.set()
    again = make_task(seed=1)
    load_weights(again, checkpoints.find("last"))
    torch.testing.assert_close(again.state_dict(), expected, rtol=0, atol=0)
    torch.testing.assert_close(load_state(checkpoints.find("last"))["optimizer"]["state"][0]["exp_avg"], moments)


def spoil(file, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("file", [WEIGHTS, STATE, MANIFEST])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, file, how):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_task(seed=step), {"mark": step})
    assert checkpoints.newest_whole().name == "step-0000002"
    spoil(tmp_path / "checkpoints" / "step-0000002" / file, how)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.find("last")
    assert load_state(checkpoints.newest_whole())["mark"] == 1
    assert "step-0000002 is damaged" in caplog.text and file in caplog.text
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_task(seed=2), {"mark": 2})  # the run comes by again
    assert load_state(checkpoints.newest_whole())["mark"] == 2
    for step in (1, 2):
        spoil(tmp_path / "checkpoints" / f"step-{step:07d}" / file, how)
    assert checkpoints.newest_whole() is None


def test_weights_on_top_of_another_frozen_tower_are_refused(tmp_path):
    task = make_task(frozen=True)
    checkpoints = Checkpoints(tmp_path, facts={"towers": tower_identities(task)})
    checkpoints.save(1, task, {})
    folder = checkpoints.find("last")
    load_weights(make_task(frozen=True), folder)
    other = make_task(frozen=True)
    with torch.no_grad():
        other["encoder"].backbone[0].weight[0, 0] += 1e-6
    with pytest.raises(CheckpointError, match="other weights of the frozen encoder"):
        load_weights(other, folder)
    assert tower_identities(make_task(frozen=False)) == {}


def test_no_checkpoint_is_a_clear_error(tmp_path):
    for which in ("last", "best"):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*checkpoints"):
            Checkpoints(tmp_path).find(which)
    folder = saved(tmp_path, 1, make_task())
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*model\.safetensors"):
        load_weights(make_task(), folder)


def test_without_a_best_the_last_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_task(), {})
    folder = checkpoints.find("last")
    assert checkpoints.best() is None and checkpoints.find("best") == folder
