import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from edge_glass.data.batch import Batch, SkippedRow
from edge_glass.models.losses import TriModalAlignmentLoss
from edge_glass.runs import CHECKPOINTS, read_metrics
from edge_glass.tasks.alignment import AlignmentTask
from edge_glass.training.checkpoints import Checkpoints, load_state, load_weights
from edge_glass.training.logs import JsonLines
from edge_glass.training.loop import Limits, Trainer, TrainingError, describe_skipped
from edge_glass.training.optimization import parameter_groups
from edge_glass.training.schedule import warmup_cosine
from tests.ranks import run_ranks

WORDS = ["", "a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg"]


class ToyModel(nn.Module):
    """Pixels and caption lengths to one space."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(12, 16), nn.BatchNorm1d(16) if batch_norm else nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8)
        )
        self.text = nn.Embedding(len(WORDS), 8)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        lengths = torch.tensor([len(caption) for caption in batch.text])
        return {"image": self.image(batch.image.flatten(1)), "text": self.text(lengths)}


def make_task(**options) -> AlignmentTask:
    torch.manual_seed(0)
    return AlignmentTask(ToyModel(**options), TriModalAlignmentLoss([8, 4]))


def batch_of(number: int, rows: int = 8, skipped: int = 0, broken: bool = False) -> Batch:
    """The batch that comes as number `number` of a run: each concept is a fixed picture with some noise."""
    torch_random = torch.Generator().manual_seed(number)
    centres = torch.randn(len(WORDS), 3, 2, 2, generator=torch.Generator().manual_seed(99))
    concepts = torch.arange(rows) % len(WORDS)
    image = centres[concepts] + 0.2 * torch.randn(rows, 3, 2, 2, generator=torch_random)
    if broken:
        image[3] = math.nan
    return Batch(
        sample_ids=[f"batch{number}/row{row}" for row in range(rows)],
        concept_ids=concepts,
        image=image,
        text=[WORDS[concept] for concept in concepts],
        skipped=[SkippedRow(f"torn{number}-{row}", "image: torn") for row in range(skipped)],
    )


def batches_of(rows: int = 8, broken=(), skipped=None):
    """An endless source of batches as `Trainer` wants it; those at the places `broken` hold a NaN."""

    def from_place(first: int):
        number = first
        while True:
            yield batch_of(number, rows, (skipped or {}).get(number, 0), number in broken)
            number += 1

    return from_place


def make_trainer(task=None, batches=None, rate=lambda step: 1 / (1 + step), **options) -> Trainer:
    task = task or make_task()
    limits = {
        "max_steps": 12,
        "max_seconds": None,
        "eval_every": 5,
        "save_every": 100,
        "log_every": 1,
        "max_bad_share": 0.01,
        **{name: options.pop(name) for name in list(options) if name in Limits.__dataclass_fields__},
    }
    optimizer = torch.optim.AdamW(parameter_groups(task, 0.01), lr=0.05)
    return Trainer(task, optimizer, LambdaLR(optimizer, rate), batches or batches_of(), 4, Limits(**limits), **options)


def steady(step: int) -> float:
    return 1.0


def weights(task: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


class Rows:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def write(self, row) -> None:
        self.rows.append(dict(row))

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]


def test_training_lowers_the_loss_and_says_how():
    rows = Rows()
    trainer = make_trainer(rate=steady, max_steps=40, sinks=[rows], log_every=4)
    assert trainer.run() == "max_steps"
    logged = rows.of("train")
    assert [row["step"] for row in logged] == list(range(4, 41, 4))
    assert [row["epoch"] for row in logged] == [step / 4 for step in range(4, 41, 4)]
    assert logged[-1]["loss"] < 0.3 * logged[0]["loss"]
    expected = {"loss", "lr", "gradient_norm", "samples_per_second", "seconds", "loss/image_text", "scale/image_text"}
    assert expected <= set(logged[0])
    assert trainer.progress.samples == 40 * 8


def test_a_logged_loss_is_the_mean_since_the_last_one():
    every, seldom = Rows(), Rows()
    for rows, log_every in ((every, 1), (seldom, 5)):
        make_trainer(max_steps=12, sinks=[rows], log_every=log_every).run()
    losses = [row["loss"] for row in every.of("train")]
    means = [row["loss"] for row in seldom.of("train")]
    assert means == pytest.approx([np.mean(part) for part in (losses[:5], losses[5:10], losses[10:])], rel=1e-5)


def test_evaluation_comes_every_so_often_and_at_the_end_and_names_the_best(tmp_path):
    values = iter([0.2, 0.6, 0.4])
    rows, checkpoints = Rows(), Checkpoints(tmp_path)
    make_trainer(
        evaluate=lambda task: {"val/R@1": next(values)},
        monitor="val/R@1",
        checkpoints=checkpoints,
        sinks=[rows],
    ).run()
    assert [(row["step"], row["val/R@1"]) for row in rows.of("eval")] == [(5, 0.2), (10, 0.6), (12, 0.4)]
    assert checkpoints.best() == {"step": 10, "metric": "val/R@1", "value": 0.6}
    assert checkpoints.steps() == [10, 12]


def test_training_goes_on_in_training_mode_after_an_evaluation():
    task = make_task(dropout=0.5)
    modes = []

    def evaluate(task):
        task.train(False)
        return {}

    trainer = make_trainer(task, evaluate=evaluate, eval_every=1, max_steps=3)
    task.model.image.register_forward_hook(lambda module, *_: modes.append(module.training))
    trainer.run()
    assert modes == [True, True, True]


def test_a_monitor_that_is_no_figure_is_named_with_those_that_are(tmp_path):
    trainer = make_trainer(
        evaluate=lambda task: {"val/R@1": 1.0}, monitor="val/recall", checkpoints=Checkpoints(tmp_path)
    )
    with pytest.raises(TrainingError, match=r"training\.monitor=val/recall.*\['val/R@1'\]"):
        trainer.run()


def test_checkpoints_come_every_so_often(tmp_path):
    make_trainer(checkpoints=Checkpoints(tmp_path, keep_last=9), save_every=3, eval_every=100).run()
    assert Checkpoints(tmp_path).steps() == [3, 6, 9, 12]


def test_a_run_that_is_out_of_time_evaluates_saves_and_ends(tmp_path):
    rows = Rows()
    trainer = make_trainer(
        max_seconds=1e-9, evaluate=lambda task: {"val/R@1": 0.1}, checkpoints=Checkpoints(tmp_path), sinks=[rows]
    )
    assert trainer.run() == "max_seconds"
    assert [(row["kind"], row["step"]) for row in rows.rows] == [("train", 1), ("eval", 1)]
    assert Checkpoints(tmp_path).steps() == [1]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(precision):
    rows = Rows()
    trainer = make_trainer(rate=steady, max_steps=40, precision=precision, sinks=[rows])
    trainer.run()
    losses = [row["loss"] for row in rows.of("train")]
    assert np.mean(losses[-5:]) < 0.4 * losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.task.parameters())


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    norms = {}
    for clip in (None, 1e-3):
        task, rows = make_task(), Rows()
        start = weights(task)
        trainer = make_trainer(task, max_steps=1, clip_norm=clip, sinks=[rows])
        trainer.optimizer = torch.optim.SGD(task.parameters(), lr=1.0)
        trainer.run()
        change = torch.cat([(task.state_dict()[name] - start[name]).flatten() for name in start]).norm()
        norms[clip] = (float(change), rows.of("train")[0]["gradient_norm"])
    assert norms[None][0] == pytest.approx(norms[None][1], rel=1e-3)
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1e-3][1] == pytest.approx(norms[None][1], rel=1e-5)


def test_two_micro_batches_train_as_one_batch_twice_as_large():
    tasks, figures = [], []
    for accumulation in (1, 2):
        task, rows = make_task(), Rows()
        make_trainer(task, batches_of(rows=16), accumulation=accumulation, sinks=[rows]).run()
        tasks.append(task.state_dict())
        figures.append([[row[name] for name in ("loss", "gradient_norm")] for row in rows.of("train")])
    torch.testing.assert_close(tasks[0], tasks[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(figures[0], figures[1], rtol=1e-4)


def test_a_step_without_a_number_is_left_out_and_counted():
    task = make_task(batch_norm=True)
    trainer = make_trainer(task, batches_of(broken=[3]), max_steps=3, eval_every=100)
    trainer.run()
    before, moments = weights(task), copy.deepcopy(trainer.optimizer.state_dict()["state"])
    trainer.limits.max_steps = 4
    trainer.run()
    torch.testing.assert_close(weights(task), before, rtol=0, atol=0)  # running statistics too
    torch.testing.assert_close(trainer.optimizer.state_dict()["state"], moments, rtol=0, atol=0)
    assert trainer.progress.nonfinite_steps == 1 and trainer.progress.step == 4
    trainer.limits.max_steps = 6
    trainer.run()
    assert trainer.progress.nonfinite_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(task).values())
    assert not torch.equal(weights(task)["model.text.weight"], before["model.text.weight"])


def train_with_a_broken_batch_on_rank_1() -> tuple[dict, int, int]:
    broken = [3] if dist.get_rank() == 1 else []
    trainer = make_trainer(batches=batches_of(broken=broken), max_steps=6, eval_every=100)
    trainer.run()
    return weights(trainer.task), trainer.progress.nonfinite_steps, trainer.progress.step


def test_all_ranks_leave_out_the_step_that_one_of_them_cannot_take():
    first, second = run_ranks(train_with_a_broken_batch_on_rank_1)
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    assert all(torch.isfinite(tensor).all() for tensor in first[0].values())
    assert first[1:] == second[1:] == (1, 6)


def test_too_many_steps_without_a_number_stop_the_run_and_name_the_rows():
    trainer = make_trainer(batches=batches_of(broken=range(4, 99)), max_steps=50, max_nonfinite=3)
    with pytest.raises(TrainingError, match=r"4 steps in a row.*optimization\.optimizer\.lr.*batch7/row0"):
        trainer.run()
    now_and_then = make_trainer(batches=batches_of(broken=range(0, 99, 2)), max_steps=20, max_nonfinite=3)
    now_and_then.run()
    assert now_and_then.progress.nonfinite_steps == 10


def test_a_few_undecodable_rows_are_counted_and_named():
    trainer = make_trainer(batches=batches_of(skipped={2: 1, 5: 2}))
    trainer.run()
    assert trainer.progress.skips == 3
    assert trainer.progress.skipped == {f"torn{name}": "image: torn" for name in ("2-0", "5-0", "5-1")}


def test_too_many_undecodable_rows_stop_the_run_with_the_list():
    trainer = make_trainer(batches=batches_of(skipped=dict.fromkeys(range(99), 4)), max_steps=50)
    with pytest.raises(TrainingError) as found:
        trainer.run()
    message = str(found.value)
    assert "dataset.max_bad_share=0.01" in message
    assert "12 x image" in message and "torn2-3: image: torn" in message
    tolerant = make_trainer(batches=batches_of(skipped=dict.fromkeys(range(99), 4)), max_steps=50, max_bad_share=0.5)
    assert tolerant.run() == "max_steps"


def test_a_long_list_of_undecodable_rows_is_cut():
    rows = [SkippedRow(f"row{i}", "audio: torn" if i % 3 else "image: torn") for i in range(30)]
    text = describe_skipped(rows, most=5)
    assert text.splitlines()[:3] == ["  20 x audio", "  10 x image", "  row0: image: torn"]
    assert text.splitlines()[-1] == "  ... and 25 more" and len(text.splitlines()) == 2 + 5 + 1


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_never_stopped(tmp_path):
    whole = make_task(dropout=0.3)
    make_trainer(whole, max_steps=9, eval_every=100).run()

    def trainer_of(task, max_steps):
        return make_trainer(
            task, max_steps=max_steps, eval_every=100, save_every=4, checkpoints=Checkpoints(tmp_path, keep_last=9)
        )

    trainer_of(make_task(dropout=0.3), 6).run()
    torch.manual_seed(77)  # another process, with other random states
    np.random.seed(77)
    resumed = make_task(dropout=0.3)
    trainer = trainer_of(resumed, 9)
    folder = tmp_path / CHECKPOINTS / "step-0000004"
    load_weights(resumed, folder)
    trainer.restore(load_state(folder))
    trainer.run()
    assert trainer.progress.step == 9 and trainer.progress.samples == 72
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_carries_the_random_states(tmp_path):
    def draws():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]

    trainer = make_trainer(checkpoints=Checkpoints(tmp_path))
    trainer.save()
    expected = draws()
    draws()
    trainer.restore(load_state(trainer.checkpoints.find("last")))
    assert draws() == expected


def test_the_log_is_one_json_object_a_line_and_survives_a_torn_end(tmp_path):
    make_trainer(sinks=[JsonLines(tmp_path)], max_steps=3, evaluate=lambda task: {"val/R@1": 0.5}).run()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(json.loads(line)["kind"], json.loads(line)["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("eval", 3),
    ]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert len(list(read_metrics(tmp_path))) == 4


def test_the_rate_warms_up_to_its_peak_and_falls_to_its_floor():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_cosine(optimizer, max_steps=100, warmup=0.1, floor=0.05)
    rates = []
    for _ in range(120):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05 * 2 + 0.95 * 2 * 0.5, rel=1e-3)  # halfway down
    assert rates[100:] == pytest.approx([0.1] * 20)


def test_matrices_decay_and_biases_norms_and_temperatures_do_not():
    task = make_task(batch_norm=True)
    task.model.text.weight.requires_grad_(False)
    decayed, others = parameter_groups(task, 0.3)
    names = {id(p): name for name, p in task.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"model.image.0.weight", "model.image.3.weight"}
    trained = {names[id(p)] for group in (decayed, others) for p in group["params"]}
    assert trained == {name for name, p in task.named_parameters() if p.requires_grad}
    assert any("log_scale" in names[id(p)] for p in others["params"])
