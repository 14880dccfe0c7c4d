"""Accumulated gradients against those of one batch that holds everything."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from edge_glass.data.batch import AudioClips, Batch
from edge_glass.models.losses import TriModalAlignmentLoss
from edge_glass.tasks.alignment import AlignmentTask
from edge_glass.training.accumulation import accumulate_exact
from tests.ranks import run_ranks


class NumpyNoise(nn.Module):
    """Drops features by numpy's generator, as Whisper's masking does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.random.rand(*x.shape) > 0.3).to(x) if self.training else x


class ToyModel(nn.Module):
    """Three small towers with what makes accumulation hard: dropout, batch statistics, other generators."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False, numpy_noise: bool = False) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Linear(12, 16),
            nn.BatchNorm1d(16) if batch_norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(16, 8),
        )
        self.audio = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), NumpyNoise() if numpy_noise else nn.Identity(), nn.Linear(16, 8)
        )
        self.text = nn.Sequential(nn.Embedding(20, 16), nn.Dropout(dropout), nn.Linear(16, 8))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        lengths = torch.tensor([len(caption) for caption in batch.text])
        embeddings = {"image": self.image(batch.image.flatten(1)), "text": self.text(lengths)}
        if batch.audio is not None:
            embeddings["audio"] = self.audio(batch.audio.waveform)
        return embeddings


def make_task(**options) -> AlignmentTask:
    torch.manual_seed(0)
    return AlignmentTask(ToyModel(**options), TriModalAlignmentLoss([8, 4]))


def make_batch(rows: int = 16, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (rows,), generator=generator).tolist()
    return Batch(
        sample_ids=[str(i) for i in range(rows)],
        concept_ids=torch.randint(6, (rows,), generator=generator),
        image=torch.randn(rows, 3, 2, 2, generator=generator),
        audio=AudioClips(torch.randn(rows, 6, generator=generator), torch.full((rows,), 6)),
        text=["x" * length for length in lengths],
    )


def seed_everything(seed: int = 5) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)


def next_random_numbers() -> tuple[float, float]:
    return torch.rand(()).item(), float(np.random.rand())


def gradients(task: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in task.named_parameters() if p.grad is not None}


def one_graph(task: AlignmentTask, micro_batches: list[Batch]) -> Tensor:
    """The reference: embed the micro-batches one after another, keep every graph, one loss over all."""
    parts = [task.encode(batch) for batch in micro_batches]
    embeddings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    loss, _ = task.loss_of(
        embeddings, {name: torch.cat([batch.ids()[name] for batch in micro_batches]) for name in embeddings}
    )
    loss.backward()
    return loss.detach()


def assert_same_gradients(task: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    found = gradients(task)
    assert set(found) == set(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_four_micro_batches_give_the_loss_and_gradient_of_a_batch_four_times_as_large():
    task, batch = make_task(), make_batch()
    reference = copy.deepcopy(task)
    expected, figures = reference(batch)
    expected.backward()
    loss, accumulated_figures = accumulate_exact(task, batch.split(4))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(accumulated_figures, figures)
    assert not loss.requires_grad
    assert_same_gradients(task, gradients(reference))
    scales = [name for name in gradients(task) if name.endswith("log_scale")]
    assert len(scales) == 3 and all(gradients(task)[name] != 0 for name in scales)


def test_the_mean_of_micro_batch_losses_would_be_another_gradient():
    task, batch = make_task(), make_batch()
    reference = copy.deepcopy(task)
    accumulate_exact(task, batch.split(4))
    for micro_batch in batch.split(4):
        (reference(micro_batch)[0] / 4).backward()
    name = "model.image.4.weight"
    difference = gradients(task)[name] - gradients(reference)[name]
    assert difference.norm() > 0.1 * gradients(task)[name].norm()


@pytest.mark.parametrize("parts", [1, 4])
def test_random_layers_act_as_if_each_micro_batch_was_embedded_once(parts):
    options = {"dropout": 0.4, "numpy_noise": True, "batch_norm": True}
    task, micro_batches = make_task(**options), make_batch().split(parts)
    reference = copy.deepcopy(task)
    seed_everything()
    expected = one_graph(reference, micro_batches)
    expected_randomness = next_random_numbers()
    seed_everything()
    loss, _ = accumulate_exact(task, micro_batches)
    assert next_random_numbers() == expected_randomness
    torch.testing.assert_close(loss, expected)
    assert_same_gradients(task, gradients(reference))
    # Running statistics of batch normalisation too: every micro-batch counts once.
    torch.testing.assert_close(dict(task.named_buffers()), dict(reference.named_buffers()))
    assert task.model.image[1].num_batches_tracked == parts


def test_gradients_add_to_what_is_there():
    task, batch = make_task(), make_batch()
    accumulate_exact(task, batch.split(4))
    once = {name: gradient.clone() for name, gradient in gradients(task).items()}
    accumulate_exact(task, batch.split(2))
    assert_same_gradients(task, {name: 2 * gradient for name, gradient in once.items()})


def test_a_frozen_tower_and_a_fixed_temperature_get_no_gradient():
    task, batch = make_task(), make_batch()
    task.model.text.requires_grad_(False)
    task.loss.requires_grad_(False)
    reference = copy.deepcopy(task)
    reference(batch)[0].backward()
    accumulate_exact(task, batch.split(4))
    assert_same_gradients(task, gradients(reference))
    assert not any(name.startswith(("model.text", "loss")) for name in gradients(task))


def test_two_modalities_are_enough():
    task, batch = make_task(), make_batch()
    batch.audio = None
    reference = copy.deepcopy(task)
    reference(batch)[0].backward()
    accumulate_exact(task, batch.split(4))
    assert_same_gradients(task, gradients(reference))


@pytest.mark.parametrize("parts", [1, 4])
def test_a_scaled_loss_gives_scaled_gradients_and_an_unscaled_value(parts):
    task, batch = make_task(), make_batch()
    reference = copy.deepcopy(task)
    expected = one_graph(reference, [batch])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
    loss, _ = accumulate_exact(task, batch.split(parts), scale=scaler.scale)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients(task)["model.image.0.weight"].norm() / 1024,
        gradients(reference)["model.image.0.weight"].norm(),
    )
    scaler.unscale_(optimizer)
    assert_same_gradients(task, gradients(reference))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reaches_both_passes(dtype):
    task, micro_batches = make_task(dropout=0.4), make_batch().split(4)
    autocast = partial(torch.autocast, "cpu", dtype)
    reference = copy.deepcopy(task)
    seed_everything()
    with autocast():
        one_graph(reference, micro_batches)
    seed_everything()
    precisions = []
    task.model.image.register_forward_hook(lambda module, inputs, output: precisions.append(output.dtype))
    accumulate_exact(task, micro_batches, autocast=autocast)
    assert precisions == 8 * [dtype]
    # The reference adds up gradients of a weight's low-precision copy; here each micro-batch adds to the
    # weight's own.
    for name, gradient in gradients(reference).items():
        assert (gradients(task)[name] - gradient).norm() <= 0.02 * gradient.norm() + 1e-4


def test_micro_batches_that_cannot_be_one_batch_are_refused():
    task, batch = make_task(), make_batch()
    with pytest.raises(ValueError, match="at least one"):
        accumulate_exact(task, [])
    first, second = batch.split(2)
    second.audio = None
    with pytest.raises(ValueError, match=r"same modalities.*\['audio', 'image', 'text'\], \['image', 'text'\]"):
        accumulate_exact(task, [first, second])


def _accumulate_in_ddp(batch: Batch) -> dict:
    """On each rank: half of the batch, in one and in four micro-batches, plain and with random layers."""
    rank, results = dist.get_rank(), {}
    mine = batch.split(2)[rank]
    for parts in (1, 4):
        task = DistributedDataParallel(make_task())
        for _ in range(2):  # a second step fails in DDP when the first left a parameter unreduced
            task.zero_grad()
            loss, _ = accumulate_exact(task, mine.split(parts))
        results[f"loss {parts}"], results[f"gradients {parts}"] = loss, gradients(task)

    reference = make_task(dropout=0.4, batch_norm=True, numpy_noise=True)
    task = DistributedDataParallel(copy.deepcopy(reference))
    for step in range(2):
        reference.zero_grad()
        task.zero_grad()
        seed_everything(2 * step + rank)
        expected = one_graph(reference, mine.split(4))
        for gradient in gradients(reference).values():
            dist.all_reduce(gradient)
            gradient /= 2
        seed_everything(2 * step + rank)
        loss, _ = accumulate_exact(task, mine.split(4))
        torch.testing.assert_close(loss, expected)
        assert_same_gradients(task, gradients(reference))

    mine.audio = None  # two temperatures are out of use, and the audio tower where there is one
    results["two modalities"] = []
    for parts in (1, 4):
        for audio_tower in (False, True):
            bare = make_task()
            if not audio_tower:
                del bare.model.audio
            task = DistributedDataParallel(bare, find_unused_parameters=audio_tower)
            for _ in range(2):
                task.zero_grad()
                accumulate_exact(task, mine.split(parts))
            results["two modalities"].append(gradients(task))
    return results


def test_two_ranks_with_micro_batches_give_the_gradient_of_one_process_with_everything():
    batch = make_batch()
    results = run_ranks(_accumulate_in_ddp, batch)
    reference = make_task()
    expected = one_graph(reference, [batch])
    for result in results:
        for parts in (1, 4):
            torch.testing.assert_close(result[f"loss {parts}"], expected)
            torch.testing.assert_close(result[f"gradients {parts}"], gradients(reference), rtol=1e-5, atol=1e-5)
    reference.zero_grad()
    batch.audio = None
    one_graph(reference, [batch])
    for result in results:
        for found in result["two modalities"]:
            used = {name: found[name] for name in gradients(reference)}
            torch.testing.assert_close(used, gradients(reference), rtol=1e-5, atol=1e-5)
