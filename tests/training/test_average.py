import torch
from torch import nn

from edge_glass.training.average import WeightAverage


def make_task() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_the_average_is_the_geometric_sum_of_the_weights_so_far():
    task = make_task()
    seen = [task[0].weight.detach().clone()]
    average = WeightAverage(task, 0.8)
    for _ in range(4):
        with torch.no_grad():
            task[0].weight.add_(torch.randn(2, 2))
        average.update()
        seen.append(task[0].weight.detach().clone())
    expected = 0.8**4 * seen[0] + sum(0.2 * 0.8 ** (4 - step) * seen[step] for step in range(1, 5))
    torch.testing.assert_close(average.weights["0.weight"], expected)


def test_running_statistics_are_taken_as_they_are():
    task = make_task()
    average = WeightAverage(task, 0.9)
    task(torch.randn(8, 2))
    average.update()
    assert torch.equal(average.weights["1.running_mean"], task[1].running_mean)
    assert average.weights["1.num_batches_tracked"] == 1


def test_the_task_has_the_average_only_while_it_is_asked_for():
    task = make_task()
    average = WeightAverage(task, 0.5)
    start = task[0].weight.detach().clone()
    with torch.no_grad():
        task[0].weight.add_(1.0)
    average.update()
    own = task[0].weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(task[0].weight, start + 0.5)
    assert torch.equal(task[0].weight, own)
