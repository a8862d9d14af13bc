"""Who computes relu(batch_norm(x) + residual): torch, torch.compile, our kernels, cuDNN's graphs, NVIDIA's apex.

apex's cudnn_gbn is not among them: it normalizes only, by cuDNN, and leaves addition and ReLU to passes of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.batch_norm.layers import Data, Forward, Problem
from bench.harness.missing import MissingError
from fastflower.environment import find_apex
from fastflower.errors import UserError
from fastflower.kernels.batch_norm import bn_relu
from fastflower.kernels.tiles import Tiles


@dataclass(frozen=True)
class Contender:
    """An implementation. build raises MissingError, or what the library raises, where it cannot be measured."""

    name: str
    build: Callable[[Problem, Data], Forward]
    required: bool = False  # an exception ends the run
    judged: bool = False  # errors beyond eager's fail the run
    during: Callable[[], AbstractContextManager[Any]] = nullcontext  # entered while it runs


def all_contenders(tiles: Sequence[str]) -> list[Contender]:
    """Those of a run; UserError for tiles that are not like 32x64x4, or cannot be."""
    return [
        Contender("eager", eager, required=True),
        Contender("compile", compiled),
        Contender("ours", ours, required=True, judged=True),
        Contender("cudnn", cudnn_graphs),
        Contender("apex groupbn", apex_groupbn),
        *(Contender(f"ours {name}", ours, judged=True, during=partial(_tiles, parse_tiles(name))) for name in tiles),
    ]


def parse_tiles(name: str) -> Tiles:
    """32x64x4 = 32 rows, 64 channels, 4 warps."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name)
    rows, channels, warps = map(int, match.groups()) if match else (0, 0, 0)
    if channels < 8 or any(number.bit_count() != 1 for number in (rows, channels, warps)):
        raise UserError(
            f"--tiles {name} is not ROWSxCHANNELSxWARPS in powers of 2, with 8 channels or more: give for example "
            "32x64x4."
        )
    return Tiles(rows, channels, warps)


@contextmanager
def _tiles(tiles: Tiles) -> Iterator[None]:
    from fastflower.kernels import launch  # imports Triton, which a CPU does not need

    def choose_tiles(m: int, c: int, dtype: torch.dtype) -> Tiles:
        return tiles

    with mock.patch.object(launch, "choose_tiles", choose_tiles):
        yield


def eager(problem: Problem, data: Data) -> Forward:
    """nn.BatchNorm2d, addition, ReLU; autograd adds the gradients of two uses."""

    def forward(data: Data) -> tuple[Tensor, ...]:
        return _tuple(problem.norm(data.x, data.residual, problem.residual_norm))

    return forward


def compiled(problem: Problem, data: Data) -> Forward:
    """The same by torch.compile.

    The gradient of the second use is added inside, where the compiler fuses it: as in a network compiled whole.
    """
    torch.compiler.reset()  # compiled code is kept by function, and only for a few shapes

    def function(x: Tensor, residual: Tensor | None, dy2: Tensor | None) -> Tensor:
        y = _tuple(problem.norm(x, residual, problem.residual_norm))[0]
        return y if dy2 is None else _SecondUse.apply(y, dy2)

    fast = torch.compile(function, dynamic=False, fullgraph=True)
    return lambda data: (fast(data.x, data.residual, data.dys[1] if problem.layer.fork else None),)


class _SecondUse(torch.autograd.Function):
    """The identity, which adds the gradient of another use on the way back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy2: Tensor) -> Tensor:
        ctx.save_for_backward(dy2)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (dy2,) = ctx.saved_tensors
        return dy + dy2, None


def ours(problem: Problem, data: Data) -> Forward:
    """Our kernels, or on a CPU their plain-torch implementation."""

    def forward(data: Data) -> tuple[Tensor, ...]:
        return _tuple(bn_relu(data.x, problem.norm, data.residual, problem.residual_norm, fork=problem.layer.fork))

    return forward


def apex_groupbn(problem: Problem, data: Data) -> Forward:
    """NVIDIA apex's persistent kernels, without a group.

    A residual is normalized by a kernel of its own before; autograd adds the gradients of two uses.
    """
    _require_half_on_cuda(problem, torch.float16)
    if find_apex() != "nvidia":
        raise MissingError("not installed (NVIDIA's apex, built from source with its groupbn)")
    try:
        from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC
    except ImportError as error:
        raise MissingError("apex was built without its groupbn") from error

    def module(norm: nn.BatchNorm2d, relu: bool) -> nn.Module:
        fused: nn.Module = BatchNorm2d_NHWC(norm.num_features, fuse_relu=relu).to(problem.device).train()
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused

    main = module(problem.norm, relu=True)
    shortcut = module(problem.residual_norm, relu=False) if problem.residual_norm else nn.Identity()

    def forward(data: Data) -> tuple[Tensor, ...]:
        added = () if data.residual is None else (shortcut(data.residual.permute(0, 2, 3, 1)),)
        y = main(data.x.permute(0, 2, 3, 1), *added).permute(0, 3, 1, 2)
        return (y,) * len(data.dys)

    return forward


def cudnn_graphs(problem: Problem, data: Data) -> Forward:
    """The fused engines of cuDNN, through NVIDIA's cudnn-frontend.

    A residual is normalized by a graph of its own before; autograd adds the gradients of two uses.
    """
    _require_half_on_cuda(problem, torch.bfloat16, torch.float16)
    try:
        import cudnn
    except ImportError as error:
        raise MissingError("not installed (pip install nvidia-cudnn-frontend)") from error
    x, added = data.x.detach(), problem.layer.added
    if x.shape[1] % 8:
        raise MissingError("takes channels in multiples of 8, for the bits of its mask")
    handle = _cudnn_handle()
    try:
        main = CudnnBatchNorm(cudnn, handle, problem.norm, x, added=added, relu=True)
        shortcut = None
        if problem.residual_norm is not None:
            shortcut = CudnnBatchNorm(cudnn, handle, problem.residual_norm, x, added=False, relu=False)
    except cudnn.cudnnGraphNotSupportedError as error:
        raise MissingError("this cuDNN has no such graph for this GPU") from error

    def forward(data: Data) -> tuple[Tensor, ...]:
        residual = data.residual
        if residual is not None and shortcut is not None:
            residual = shortcut(residual, None)
        return (main(data.x, residual),) * len(data.dys)

    return forward


@cache
def _cudnn_handle() -> Any:
    import cudnn

    return cudnn.create_handle()


def _require_half_on_cuda(problem: Problem, *dtypes: torch.dtype) -> None:
    if problem.device.type != "cuda":
        raise MissingError("runs on CUDA only")
    if problem.dtype not in dtypes:
        raise MissingError(f"does not take {str(problem.dtype).removeprefix('torch.')}")


def _tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


class CudnnBatchNorm:
    """relu(norm(x) + residual), or without residual or ReLU: one graph forward, one backward.

    The backward graph reads ReLU's mask, which the forward one wrote as bits: channel c is bit c % 8 of byte c // 8.
    """

    def __init__(self, cudnn: Any, handle: Any, norm: nn.BatchNorm2d, x: Tensor, *, added: bool, relu: bool) -> None:
        """Build both graphs for inputs like x; raises cudnn.cudnnGraphNotSupportedError where there is none."""
        self.cudnn, self.handle, self.norm, self.added, self.relu = cudnn, handle, norm, added, relu
        self.scalars = {
            "epsilon": torch.full((1, 1, 1, 1), norm.eps),
            "momentum": torch.full((1, 1, 1, 1), norm.momentum or 0.0),
            "zero": torch.zeros((1, 1, 1, 1), dtype=x.dtype),
        }
        self.data_type = {
            torch.bfloat16: cudnn.data_type.BFLOAT16,
            torch.float16: cudnn.data_type.HALF,
        }[x.dtype]
        self.forward_graph, self.forward_ports = self._forward(x)
        self.backward_graph, self.backward_ports = self._backward(x)
        self.workspaces = [self._finish(graph, x) for graph in (self.forward_graph, self.backward_graph)]

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """[N, C, H, W] to the same."""
        output: Tensor = _CudnnFunction.apply(x, residual, self.norm.weight, self.norm.bias, self)
        return output

    def _new_graph(self) -> Any:
        float_ = self.cudnn.data_type.FLOAT
        return self.cudnn.pygraph(
            io_data_type=self.data_type, intermediate_data_type=float_, compute_data_type=float_, handle=self.handle
        )

    def _forward(self, x: Tensor) -> tuple[Any, dict[str, Any]]:
        float_, graph = self.cudnn.data_type.FLOAT, self._new_graph()
        parameter = torch.empty(1, x.shape[1], 1, 1, device=x.device)
        ports = {"x": graph.tensor_like(x)}
        for name in ("scale", "bias", "in_running_mean", "in_running_var"):
            ports[name] = graph.tensor_like(parameter)
        for name in ("epsilon", "momentum"):
            ports[name] = graph.tensor_like(self.scalars[name])
        inputs = {"input" if name == "x" else name: port for name, port in ports.items()}
        y, *statistics = graph.batchnorm(name="bn", **inputs)
        names = ("mean", "inv_variance", "out_running_mean", "out_running_var")
        for name, port in zip(names, statistics, strict=True):
            ports[name] = port.set_output(True).set_data_type(float_)
        y.set_data_type(self.data_type)
        if self.added:
            ports["residual"] = graph.tensor_like(x)
            y = graph.add(name="add", a=y, b=ports["residual"])
            y.set_data_type(self.data_type)
        if self.relu:
            y = graph.relu(name="relu", input=y)
            y.set_data_type(self.data_type)
            ports["zero"] = graph.tensor_like(self.scalars["zero"])
            mask = graph.cmp_gt(name="mask", input=y, comparison=ports["zero"])
            ports["mask"] = mask.set_output(True).set_data_type(self.cudnn.data_type.BOOLEAN)
        ports["y"] = y.set_output(True)
        return graph, ports

    def _backward(self, x: Tensor) -> tuple[Any, dict[str, Any]]:
        float_, graph = self.cudnn.data_type.FLOAT, self._new_graph()
        parameter = torch.empty(1, x.shape[1], 1, 1, device=x.device)
        ports = {"x": graph.tensor_like(x), "dy": graph.tensor_like(x)}
        for name in ("scale", "mean", "inv_variance"):
            ports[name] = graph.tensor_like(parameter)
        gradient = ports["dy"]
        if self.relu:
            ports["mask"] = graph.tensor(
                name="mask", dim=list(x.shape), stride=list(x.stride()), data_type=self.cudnn.data_type.BOOLEAN
            )
            gradient = graph.mul(name="relu_backward", a=gradient, b=ports["mask"])
            gradient.set_data_type(self.data_type)
            if self.added:
                ports["dr"] = gradient.set_output(True)
        dx, dscale, dbias = graph.batchnorm_backward(
            name="bn_backward", grad=gradient, input=ports["x"], scale=ports["scale"], mean=ports["mean"],
            inv_variance=ports["inv_variance"],
        )  # fmt: skip
        ports["dx"] = dx.set_output(True).set_data_type(self.data_type)
        ports["dscale"] = dscale.set_output(True).set_data_type(float_)
        ports["dbias"] = dbias.set_output(True).set_data_type(float_)
        return graph, ports

    def _finish(self, graph: Any, x: Tensor) -> Tensor:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)

    def execute_forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """y, mean and 1 / standard deviation [1, C, 1, 1], mask; updates the running statistics."""
        norm, (n, c, h, w) = self.norm, x.shape
        y = torch.empty_like(x)
        mean, inv_variance = (torch.empty(1, c, 1, 1, device=x.device) for _ in range(2))
        mask = None
        if self.relu:
            mask = torch.empty((n, c // 8, h, w), dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
        running_mean, running_var = _by_channel(norm.running_mean), _by_channel(norm.running_var)
        tensors = {
            "x": x, "scale": _by_channel(norm.weight), "bias": _by_channel(norm.bias), **self.scalars,
            "in_running_mean": running_mean, "in_running_var": running_var,
            "out_running_mean": running_mean, "out_running_var": running_var,
            "mean": mean, "inv_variance": inv_variance, "residual": residual, "mask": mask, "y": y,
        }  # fmt: skip
        self._execute(self.forward_graph, self.forward_ports, tensors, self.workspaces[0])
        return y, mean, inv_variance, mask

    def execute_backward(
        self, dy: Tensor, x: Tensor, mean: Tensor, inv_variance: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """dx, the residual's gradient where one was added, dscale and dbias [C]."""
        dx, dr = torch.empty_like(x), torch.empty_like(x) if self.added else None
        dscale, dbias = torch.empty_like(mean), torch.empty_like(mean)
        tensors = {
            "x": x, "dy": dy, "scale": _by_channel(self.norm.weight), "mean": mean, "inv_variance": inv_variance,
            "mask": mask, "dx": dx, "dr": dr, "dscale": dscale, "dbias": dbias,
        }  # fmt: skip
        self._execute(self.backward_graph, self.backward_ports, tensors, self.workspaces[1])
        return dx, dr, dscale.flatten(), dbias.flatten()

    def _execute(self, graph: Any, ports: dict[str, Any], tensors: dict[str, Any], workspace: Tensor) -> None:
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        buffers = {port: tensors[name].detach() for name, port in ports.items()}  # DLPack takes none with gradients
        graph.execute(buffers, workspace, handle=self.handle)


class _CudnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, graphs: CudnnBatchNorm
    ) -> Tensor:
        y, *saved = graphs.execute_forward(x, residual)
        ctx.save_for_backward(x, *saved)
        ctx.graphs = graphs
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dr, dscale, dbias = ctx.graphs.execute_backward(dy, *ctx.saved_tensors)
        return dx, dr, dscale, dbias, None


def _by_channel(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter.detach().view(1, -1, 1, 1)
