"""The networks against torchvision's, against hand-written references and against the paper."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fastflower.errors import UserError
from fastflower.models import NETWORKS, Shortcut, create_model, find_network
from fastflower.models.layers import BNReLU
from fastflower.models.resnet import BasicBlock, Bottleneck, ResNet, ZeroPad

# torchvision's published counts, 1000 classes.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
RESNETS = tuple(PARAMETERS)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes more threads wait for each other longer than they work
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def make(name: str, num_classes: int = 10, **options: Any) -> ResNet:
    model = create_model(name, num_classes, **options)
    assert isinstance(model, ResNet)
    return model


def theirs(name: str, num_classes: int = 10) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return network


def randomize_norms(model: nn.Module) -> None:
    """Other values in every channel, so that a swapped or skipped norm shows; gamma keeps 50 summed blocks in range."""
    for norm in norms(model).values():
        nn.init.uniform_(norm.weight, 0.2, 0.6)
        nn.init.normal_(norm.bias, 0, 0.2)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def convs(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def blocks(model: nn.Module) -> dict[str, BasicBlock | Bottleneck]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BasicBlock | Bottleneck)}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value: the same kernels in the same order differ by rounding at most."""
    assert expected.isfinite().all()
    scale = expected.abs().max().item()
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale)


class TestAgainstTorchvision:
    @pytest.mark.parametrize("name", RESNETS)
    @torch.no_grad()
    def test_weights_load_strictly_both_ways_and_give_the_same_logits(self, name: str) -> None:
        ours, reference = make(name).eval(), theirs(name).eval()
        x = torch.randn(2, 3, 64, 64)

        randomize_norms(reference)
        ours.load_state_dict(reference.state_dict(), strict=True)
        first = ours(x)
        assert_close(first, reference(x))

        randomize_norms(ours)
        reference.load_state_dict(ours.state_dict(), strict=True)
        second = ours(x)
        assert_close(second, reference(x))
        assert not torch.allclose(first, second, rtol=0.01), "the norms' values must reach the logits"

    @pytest.mark.parametrize("name", RESNETS)
    def test_same_parameter_count_and_same_keys_shapes_and_types_in_the_same_order(self, name: str) -> None:
        def layout(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
            return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]

        with torch.device("meta"):
            ours, reference = make(name, num_classes=1000), theirs(name, num_classes=1000)
        assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
        assert layout(ours) == layout(reference)
        # an optimizer's state is stored by the position of its parameter
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in reference.named_parameters()]

    def test_training_gives_the_same_gradients_and_running_statistics(self) -> None:
        ours, reference = make("resnet18").double(), theirs("resnet18").double()
        ours.load_state_dict(reference.state_dict())
        x, target = torch.randn(4, 3, 32, 32, dtype=torch.double), torch.arange(4)
        for model in (ours, reference):
            F.cross_entropy(model(x), target).backward()
        grads, expected = ({key: p.grad for key, p in m.named_parameters()} for m in (ours, reference))
        torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(reference.named_buffers()))

    @torch.no_grad()
    def test_v1_is_torchvisions_network_with_the_strides_moved(self) -> None:
        ours, reference = make("resnet50", bottleneck_stride="1x1").eval(), theirs("resnet50").eval()
        for stage in ("layer2", "layer3", "layer4"):
            first = reference.get_submodule(f"{stage}.0")
            first.get_submodule("conv1").stride, first.get_submodule("conv2").stride = (2, 2), (1, 1)  # type: ignore[assignment]
        randomize_norms(reference)
        ours.load_state_dict(reference.state_dict(), strict=True)
        x = torch.randn(2, 3, 64, 64)
        assert_close(ours(x), reference(x))


class TestShortcuts:
    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    def test_a_has_no_parameters(self, name: str) -> None:
        with torch.device("meta"):
            a, b = make(name, shortcut="A"), make(name)
        assert not [key for key in a.state_dict() if "downsample" in key]
        assert list(a.state_dict()) == [key for key in b.state_dict() if "downsample" not in key]

    @pytest.mark.parametrize(
        ("name", "block", "inputs", "outputs", "stride"),
        [("resnet18", "layer2.0", 64, 128, 2), ("resnet50", "layer1.0", 64, 256, 1)],
    )
    @torch.no_grad()
    def test_a_subsamples_and_pads_with_zero_channels(
        self, name: str, block: str, inputs: int, outputs: int, stride: int
    ) -> None:
        # a branch of zeros leaves relu(shortcut); 7 x 8 has an odd side, which the 3x3 convolution rounds up
        module = make(name, shortcut="A", zero_init_gamma=True).get_submodule(block)
        x = torch.randn(2, inputs, 7, 8)
        expected = torch.zeros(2, outputs, math.ceil(7 / stride), math.ceil(8 / stride))
        for row in range(expected.shape[2]):
            for column in range(expected.shape[3]):
                expected[:, :inputs, row, column] = x[:, :, stride * row, stride * column].clamp(min=0)
        assert torch.equal(module(x), expected)

    def test_a_passes_the_gradient_to_the_pixels_it_took_and_keeps_the_layout(self) -> None:
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, 4, 5, 6).to(memory_format=layout).requires_grad_()
            grads: list[torch.Tensor] = []
            inner = x * 1  # a leaf's gradient is restrided to the leaf's layout; an inner one shows what arrived
            inner.register_hook(grads.append)
            out = ZeroPad(4, 2)(inner)
            upstream = torch.randn_like(out)
            out.backward(upstream)
            expected = torch.zeros(2, 4, 5, 6)
            expected[:, :, ::2, ::2] = upstream[:, :4]
            assert torch.equal(grads[0], expected)
            assert out.is_contiguous(memory_format=layout)
            assert grads[0].is_contiguous(memory_format=layout)

    @pytest.mark.parametrize("name", ["resnet18", "resnet50"])
    def test_c_projects_in_every_block(self, name: str) -> None:
        with torch.device("meta"):
            model = make(name, shortcut="C")
        assert len(blocks(model)) == sum(find_network(name).depths)
        for block in blocks(model).values():
            assert isinstance(block.downsample, nn.Sequential)
            projection, norm = block.downsample
            assert isinstance(projection, nn.Conv2d)
            assert type(norm) is nn.BatchNorm2d
            assert projection.kernel_size == (1, 1)
            assert projection.bias is None
            assert projection.in_channels == block.conv1.in_channels
            assert projection.out_channels == norm.num_features == block.conv2.out_channels * block.expansion
            assert projection.stride[0] == block.conv1.stride[0] * block.conv2.stride[0]


def test_strides_of_v1_and_v1_5() -> None:
    """Table 1 halves the size in the first block of stages 2 to 4 (conv3_1, conv4_1, conv5_1) and nowhere else."""
    for where, subsampling in (("1x1", "conv1"), ("3x3", "conv2")):
        with torch.device("meta"):
            model = make("resnet50", bottleneck_stride=where)
        strided = {name for name, conv in convs(model).items() if conv.stride == (2, 2)}
        expected = {f"layer{s}.0.{conv}" for s in (2, 3, 4) for conv in (subsampling, "downsample.0")}
        assert strided == {"conv1"} | expected


@pytest.mark.parametrize(("name", "depths"), [("plain18", (2, 2, 2, 2)), ("plain34", (3, 4, 6, 3))])
@torch.no_grad()
def test_plain_is_the_residual_networks_chain_of_convolutions(name: str, depths: tuple[int, ...]) -> None:
    model = make(name).eval()
    randomize_norms(model)
    weights = model.state_dict()
    with torch.device("meta"):
        residual = make(name.replace("plain", "resnet")).state_dict()
    shapes = {key: value.shape for key, value in residual.items() if "downsample" not in key}
    assert {key: value.shape for key, value in weights.items()} == shapes

    def conv_norm_relu(x: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        statistics = (weights[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics).clamp(min=0)

    images = torch.randn(2, 3, 64, 64)
    x = F.max_pool2d(conv_norm_relu(images, "conv1", "bn1", 2), 3, 2, 1)
    for stage, depth in enumerate(depths, 1):
        for i in range(depth):
            block = f"layer{stage}.{i}"
            x = conv_norm_relu(x, f"{block}.conv1", f"{block}.bn1", 2 if stage > 1 and i == 0 else 1)
            x = conv_norm_relu(x, f"{block}.conv2", f"{block}.bn2", 1)
    assert_close(model(images), F.linear(x.mean((2, 3)), weights["fc.weight"], weights["fc.bias"]))


class TestInitialization:
    @pytest.mark.parametrize("name", ["plain18", "resnet18", "resnet50"])
    def test_convolutions_are_he_normal_and_norms_the_identity(self, name: str) -> None:
        model = make(name)
        for key, conv in convs(model).items():
            weight = conv.weight.detach()
            std = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
            # five standard errors of the estimates from n normal draws; fan_in is off by 1.4 where width doubles
            n = weight.numel()
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), key
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(n), key
        for key, norm in norms(model).items():
            assert (norm.weight == 1).all(), key
            assert (norm.bias == 0).all(), key

    @pytest.mark.parametrize(
        ("name", "shortcut"), [("resnet18", "A"), ("resnet18", "B"), ("resnet18", "C"), ("resnet50", "B")]
    )
    @torch.no_grad()
    def test_zero_gamma_makes_every_block_its_shortcut(self, name: str, shortcut: Shortcut) -> None:
        model = make(name, shortcut=shortcut, zero_init_gamma=True)
        zeros = {key for key, norm in norms(model).items() if (norm.weight == 0).all()}
        last = "bn3" if find_network(name).bottlenecks else "bn2"
        assert zeros == {f"{key}.{last}" for key in blocks(model)}
        assert all((norm.weight == 1).all() for key, norm in norms(model).items() if key not in zeros)
        for block in blocks(model).values():
            x = torch.randn(2, block.conv1.in_channels, 4, 4)
            assert block.downsample is not None
            assert torch.equal(block(x), block.downsample(x).relu())


@pytest.mark.parametrize(
    "options",
    [
        {"name": "plain18"},
        *({"name": "resnet18", "shortcut": shortcut} for shortcut in ("A", "B", "C")),
        {"name": "resnet50", "shortcut": "A"},  # pads without subsampling, too
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_channels_last_is_kept_through_every_layer(options: dict[str, Any]) -> None:
    model = make(**options).to(memory_format=torch.channels_last)
    seen: set[str] = set()

    def check(name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 4 and tensor.shape[2] > 1:  # at 1 x 1 both layouts are the same
            assert tensor.is_contiguous(memory_format=torch.channels_last), f"{name}: {tensor.stride()}"
        seen.add(name)

    def hook(name: str, module: nn.Module, out: torch.Tensor) -> None:
        check(f"output of {name}", out)
        if isinstance(module, nn.Conv2d):  # (global pooling's gradient has no layout of its own)
            out.register_hook(lambda grad: check(f"gradient of {name}", grad))

    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, _args, out, name=name: hook(name, module, out))
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)  # the last stage is 2 x 2
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert {f"output of {name}" for name, _ in model.named_modules()} <= seen
    for name, conv in convs(model).items():
        assert f"gradient of {name}" in seen
        assert conv.weight.grad is not None, name
        assert conv.weight.grad.isfinite().all(), name
        assert conv.weight.grad.abs().max() > 0, name


class TestBNReLU:
    @pytest.mark.parametrize("with_residual", [False, True])
    @pytest.mark.parametrize("training", [True, False])
    def test_is_batch_norm_plus_residual_then_relu(self, training: bool, with_residual: bool) -> None:
        module = BNReLU(6).train(training)
        with torch.no_grad():
            randomize_norms(module)
        assert module.running_mean is not None
        assert module.running_var is not None
        mean, var = module.running_mean.clone(), module.running_var.clone()
        x = torch.randn(3, 6, 5, 4).requires_grad_()
        residual = torch.randn(3, 6, 5, 4).requires_grad_() if with_residual else None

        normalized = F.batch_norm(x, mean, var, module.weight, module.bias, training, momentum=0.1, eps=1e-5)
        expected = F.relu(normalized if residual is None else normalized + residual)
        actual = module(x) if residual is None else module(x, residual)
        assert torch.equal(actual, expected)
        assert torch.equal(module.running_mean, mean)
        assert torch.equal(module.running_var, var)
        assert module.num_batches_tracked == int(training)

        leaves = [x, module.weight, module.bias] + ([] if residual is None else [residual])
        grads, expected_grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (actual, expected))
        torch.testing.assert_close(grads, expected_grads)

    def test_state_dict_is_batch_norms(self) -> None:
        ours, norm = BNReLU(4), nn.BatchNorm2d(4)
        assert list(ours.state_dict()) == list(norm.state_dict())
        ours.load_state_dict(norm.state_dict(), strict=True)
        norm.load_state_dict(ours.state_dict(), strict=True)


class TestRunningStatistics:
    @torch.no_grad()
    def test_one_step_moves_them_once(self) -> None:
        """Running = 0.9 * old + 0.1 * batch (unbiased variance), for every norm of the network."""
        model = make("resnet18", shortcut="C")
        inputs: dict[str, torch.Tensor] = {}
        for name, norm in norms(model).items():
            norm.register_forward_hook(lambda _m, args, _out, name=name: inputs.__setitem__(name, args[0]))
        model(torch.randn(4, 3, 64, 64))
        for name, norm in norms(model).items():
            x = inputs[name]
            torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
            torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))
            assert norm.num_batches_tracked == 1, name

    def test_three_steps_compiled_are_three_steps_eager(self) -> None:
        eager, compiled = make("resnet18"), make("resnet18")
        compiled.load_state_dict(eager.state_dict())
        batches = torch.randn(3, 4, 3, 64, 64)
        torch._dynamo.reset()
        one_graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)
        for model, call in ((eager, eager), (compiled, one_graph)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for x in batches:
                optimizer.zero_grad()
                F.cross_entropy(call(x), torch.arange(4)).backward()
                optimizer.step()
        # the same operations in the same order; one update more or less would move them by 10 %
        torch.testing.assert_close(dict(compiled.named_buffers()), dict(eager.named_buffers()))
        assert all(norm.num_batches_tracked == 3 for norm in norms(compiled).values())


class TestRegistry:
    @pytest.mark.parametrize("name", ["plain18", "plain34", *RESNETS])
    def test_every_name_takes_the_defaults(self, name: str) -> None:
        with torch.device("meta"):
            model = create_model(name, 7, shortcut="B", bottleneck_stride="3x3", zero_init_gamma=False)
        assert len(blocks(model)) == sum(find_network(name).depths)
        assert model.state_dict()["fc.weight"].shape == (7, 2048 if find_network(name).bottlenecks else 512)

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("resnet43", "resnet34"), ("ResNet50", "resnet50"), ("plain-18", "plain18"), ("zzz", None)],
    )
    def test_unknown_name_suggests_the_nearest_and_lists_all(self, name: str, nearest: str | None) -> None:
        with pytest.raises(UserError) as error:
            create_model(name, 10)
        message = str(error.value)
        assert repr(name) in message
        assert ", ".join(NETWORKS) in message
        assert (f"did you mean {nearest}?" in message) if nearest else ("did you mean" not in message)

    @pytest.mark.parametrize(
        ("name", "options", "key"),
        [
            ("plain18", {"shortcut": "A"}, "model.shortcut"),
            ("plain34", {"shortcut": "C"}, "model.shortcut"),
            ("plain34", {"zero_init_gamma": True}, "model.zero_init_gamma"),
            ("plain18", {"bottleneck_stride": "1x1"}, "model.bottleneck_stride"),
            ("resnet34", {"bottleneck_stride": "1x1"}, "model.bottleneck_stride"),
        ],
    )
    def test_option_without_effect_is_refused(self, name: str, options: dict[str, Any], key: str) -> None:
        with pytest.raises(UserError, match=f"{key} .*has no effect on {name}"):
            create_model(name, 10, **options)

    def test_names_cost_no_torch_import(self) -> None:
        code = "import sys, fastflower.models; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60).returncode == 0
