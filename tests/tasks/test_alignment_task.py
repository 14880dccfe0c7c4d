import torch
from torch import Tensor, nn

from edge_glass.data.batch import Batch
from edge_glass.models.losses import TriModalAlignmentLoss
from edge_glass.tasks.alignment import AlignmentTask, LossGradient


class PixelModel(nn.Module):
    """The smallest aligner: one linear map of the pixels, one embedding a caption length."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(12, 8)
        self.text = nn.Embedding(20, 8)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "image": self.image(batch.image.flatten(1)),
            "text": self.text(torch.tensor([len(caption) for caption in batch.text])),
        }


def task_and_batch() -> tuple[AlignmentTask, Batch]:
    torch.manual_seed(0)
    task = AlignmentTask(PixelModel(), TriModalAlignmentLoss([8, 4], pair_weights={"image_text": 1.0}))
    batch = Batch(
        sample_ids=list("abcde"),
        concept_ids=torch.tensor([1, 2, 3, 1, 4]),
        image=torch.randn(5, 3, 2, 2),
        text=["a", "bb", "ccc", "a", "eeeee"],
    )
    return task, batch


def gradients(task: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in task.named_parameters()}
    task.zero_grad()
    return found


def test_forward_is_the_loss_of_the_encoded_batch():
    task, batch = task_and_batch()
    embeddings = task.encode(batch)
    assert {name: embedding.shape for name, embedding in embeddings.items()} == {
        "image": (5, 8),
        "text": (5, 8),
    }
    loss, figures = task(batch)
    again, _ = task.loss_of(embeddings, batch.ids())
    assert torch.equal(loss, again)
    assert set(figures) == {"loss/image_text", "scale/image_text"}


def test_the_stand_in_for_a_loss_has_the_gradient_of_the_loss():
    task, batch = task_and_batch()
    loss, _ = task(batch)
    loss.backward()
    expected = gradients(task)

    embeddings = {name: x.detach().requires_grad_() for name, x in task.encode(batch).items()}
    loss, _ = task.loss_of(embeddings, batch.ids())
    sources = [*embeddings.values(), *task.loss_parameters()]
    image, text, *of_the_loss = torch.autograd.grad(loss, sources)
    stand_in, _ = task(batch, gradient=LossGradient({"image": image, "text": text}, of_the_loss))
    assert stand_in == 0
    stand_in.backward()
    torch.testing.assert_close(gradients(task), expected)


def test_a_temperature_that_is_not_trained_is_no_parameter_of_the_loss():
    task, _ = task_and_batch()
    assert len(task.loss_parameters()) == 1
    task.loss.requires_grad_(False)
    assert task.loss_parameters() == []
