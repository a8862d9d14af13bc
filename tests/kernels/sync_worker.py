"""Statistics over ranks, checked in processes of their own against one float64 computation of all batches."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastflower.kernels.batch_norm import bn_relu
from fastflower.models import create_model
from fastflower.runtime.distributed import processes

CHANNELS = 5


def fresh_norm(seed: int) -> nn.BatchNorm2d:
    """A normalization with random weight and bias, the same on every rank."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(CHANNELS)
    nn.init.uniform_(norm.weight, -1, 2)
    nn.init.normal_(norm.bias)
    return norm


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that gathers a gradient."""
    return tensor.detach().clone().requires_grad_()


def check_operation(form: str, sizes: list[int], height: int) -> None:
    """Rank r has sizes[r] pictures; everything equals what one process finds on all of them."""
    rank = dist.get_rank()
    norms = [fresh_norm(1), fresh_norm(2)]
    doubles = [copy.deepcopy(norm).double() for norm in norms]
    torch.manual_seed(3)
    everything = [3 + torch.randn(sum(sizes), CHANNELS, height, 2, dtype=torch.float64) for _ in range(3)]
    everything[0] *= torch.arange(1, sum(sizes) + 1).view(-1, 1, 1, 1)  # ranks' statistics differ much
    x, r = (leaf(tensor) for tensor in everything[:2])
    shortcut = {"plain": 0.0, "residual": r, "dual": doubles[1](r)}[form]
    F.relu(doubles[0](x) + shortcut).backward(everything[2])

    mine, mine_r, dy = (tensor.float().split(sizes)[rank] for tensor in everything)
    mine, mine_r = leaf(mine), leaf(mine_r)
    y = bn_relu(
        mine, norms[0], None if form == "plain" else mine_r, norms[1] if form == "dual" else None, sync=True
    )  # fmt: skip
    assert isinstance(y, torch.Tensor)
    y.backward(dy)
    shares = {"x": (mine.grad, x.grad)} | ({} if form == "plain" else {"r": (mine_r.grad, r.grad)})
    for name, (grad, expected) in shares.items():
        assert grad is not None
        assert expected is not None
        torch.testing.assert_close(grad.double(), expected.split(sizes)[rank], rtol=1e-5, atol=1e-5, msg=name)
    for norm, double in zip(norms[: 2 if form == "dual" else 1], doubles, strict=False):
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            statistic = getattr(norm, buffer)
            torch.testing.assert_close(statistic.double(), getattr(double, buffer).double(), rtol=1e-6, atol=1e-6)
        for name in ("weight", "bias"):  # a rank's own share, as of any parameter
            gradient = getattr(norm, name).grad
            dist.all_reduce(gradient)
            torch.testing.assert_close(gradient.double(), getattr(double, name).grad, rtol=1e-5, atol=1e-5)


def two_stages(network: nn.Module) -> nn.Module:
    """A ResNet's first half, which has every form of block."""
    network.layer3, network.layer4, network.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 3)
    return network


def check_network(compiled: bool) -> None:
    """A residual network behind DDP, three steps on halves of each batch, as in float64 on the whole."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    double = two_stages(create_model("resnet18", 3)).double()
    network = two_stages(create_model("resnet18", 3, norm="triton", sync_norm=True))
    network.load_state_dict(double.state_dict())
    network.to(memory_format=torch.channels_last)
    wrapped: Callable[[torch.Tensor], torch.Tensor] = DistributedDataParallel(network)
    if compiled:
        wrapped = torch.compile(wrapped, backend="aot_eager", dynamic=False)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.001) for model in (double, network)]
    for _ in range(3):
        images, labels = torch.randn(4 * ranks, 3, 64, 64, dtype=torch.float64), torch.randint(3, (4 * ranks,))
        part = slice(4 * rank, 4 * rank + 4)
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(double(images), labels).backward()
        F.cross_entropy(wrapped(images[part].float()), labels[part]).backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, expected), tensor in zip(double.state_dict().items(), network.state_dict().values(), strict=True):
        error = (tensor.double() - expected).norm() / expected.double().norm()
        assert error < 0.05, f"{name}: {error}"  # with local statistics the worst is above 1


def check_evaluation_is_local() -> None:
    """Running statistics need no other rank: one rank alone may evaluate."""
    if dist.get_rank() == 0:
        norm = fresh_norm(1).eval()
        y = cast(torch.Tensor, bn_relu(leaf(torch.randn(2, CHANNELS, 3, 3)), norm, sync=True))
        y.sum().backward()


def check_no_thread_is_left() -> None:
    """A thread of gloo that runs while Python exits may abort the process."""
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


def main() -> None:
    torch.set_num_threads(1)
    with processes(torch.device("cpu")):
        torch.optim.SGD(nn.Linear(1, 1).parameters())  # imports parts of torch that could hold on to the group
        check_evaluation_is_local()
        for form in ("plain", "residual", "dual"):
            check_operation(form, sizes=[3, 1], height=3)
        check_operation("dual", sizes=[1, 1], height=1)  # two values a rank
        if sys.argv[1:] == ["networks"]:
            check_network(compiled=False)
            check_network(compiled=True)
    check_no_thread_is_left()


if __name__ == "__main__":
    main()
