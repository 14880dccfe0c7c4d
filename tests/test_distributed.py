import pytest
import torch

from edge_glass.distributed import Ranks, all_mean, barrier, current_ranks, gather, is_main
from tests.ranks import run_ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return monkeypatch


def test_without_a_launcher_there_is_one_process(environment):
    assert current_ranks() == Ranks(rank=0, local_rank=0, world_size=1)
    assert is_main()


def test_ranks_are_read_from_the_launchers_environment(environment):
    for variable, value in zip(VARIABLES, ("5", "1", "8"), strict=True):
        environment.setenv(variable, value)
    assert current_ranks() == Ranks(rank=5, local_rank=1, world_size=8)
    assert not is_main()


def test_in_one_process_collectives_change_nothing(environment):
    tensor = torch.randn(3, 2, requires_grad=True)
    assert gather(tensor) is tensor
    assert all_mean(2.5) == 2.5
    assert torch.equal(all_mean(tensor), tensor) and not all_mean(tensor).requires_grad
    barrier()


def test_ranks_that_were_never_connected_do_not_train_apart_silently(environment):
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE=2.*init_process_group"):
        gather(torch.zeros(1, 1))


def _collectives() -> dict:
    ranks = current_ranks()
    mine = (torch.arange(4.0).reshape(2, 2) + 10 * ranks.rank).requires_grad_()
    everyones = gather(mine)
    # Each rank weighs the copies differently; what comes back to a row is the sum over ranks.
    weights = torch.arange(8.0).reshape(4, 2) * (ranks.rank + 1)
    (everyones * weights).sum().backward()
    added = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2, requires_grad=True)
    ((gather(added[0]) + gather(added[1])) * weights).sum().backward()  # both gathers get one and the same gradient
    uneven = torch.full((1 + 2 * ranks.rank, 2), float(ranks.rank), requires_grad=True)
    gather(uneven).square().sum().backward()
    try:
        gather(torch.zeros(2, 3 + ranks.rank))
        misfit = "no error"
    except ValueError as error:
        misfit = str(error)
    barrier()
    return {
        "ranks": ranks,
        "main": is_main(),
        "gathered": everyones.detach(),
        "gradients": [mine.grad, added[0].grad, added[1].grad],
        "uneven": gather(uneven).detach(),
        "uneven gradient": uneven.grad,
        "ids": gather(torch.tensor([ranks.rank])),
        "mean of numbers": all_mean(float(ranks.rank)),
        "mean of tensors": all_mean(torch.tensor([1.0, 3.0 * ranks.rank])),
        "misfit": misfit,
    }


def test_ranks_exchange_rows_and_gradients():
    first, second = run_ranks(_collectives)
    assert (first["ranks"], second["ranks"]) == (Ranks(0, 0, 2), Ranks(1, 1, 2))
    assert first["main"] and not second["main"]
    weights = torch.arange(8.0).reshape(4, 2)
    for rank, result in enumerate((first, second)):
        block = torch.arange(4.0).reshape(2, 2)
        assert torch.equal(result["gathered"], torch.cat([block, block + 10]))
        for gradient in result["gradients"]:
            assert torch.equal(gradient, 3 * weights[2 * rank : 2 * rank + 2])
        assert torch.equal(result["uneven"], torch.tensor([0.0, 1.0, 1.0, 1.0])[:, None].expand(4, 2))
        assert torch.equal(result["uneven gradient"], torch.full((1 + 2 * rank, 2), 4.0 * rank))
        assert torch.equal(result["ids"], torch.tensor([0, 1]))
        assert result["mean of numbers"] == 0.5
        assert torch.equal(result["mean of tensors"], torch.tensor([1.0, 1.5]))
        assert "numbers per row by rank: [3, 4]" in result["misfit"]
