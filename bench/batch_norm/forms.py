"""Every form in which the launchers run a kernel, found without a GPU.

A form is a kernel with the types of its arguments, those that are None, and its constants. The launchers are called
with tensors that have no memory, and what they would compile is written down: so each form is one that really occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from fastflower.kernels import launch, triton_bn
from fastflower.kernels.norm import Norm, Running

ACTIVATIONS = {"x_ptr", "r_ptr", "y_ptr", "dy_ptr", "dy2_ptr", "dx_ptr", "dr_ptr"}
ROWS = (256 * 56 * 56, 7 * 7)  # pixels of a large batch, merged from many blocks, and of one small picture
RANKS = 8  # whose moments are merged
TUNED = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")  # what a launcher may choose besides arguments


@dataclass(frozen=True)
class Form:
    """A kernel as a launcher calls it, and what Triton's compiler needs to make it."""

    kernel: str
    given: str  # the optional arguments, in words
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def tile(self) -> str:
        """Rows x channels that a program works on at once; blocks x channels where blocks are merged."""
        return f"{self.constants.get('ROWS') or self.constants['BLOCKS']}x{self.constants['CHANNELS']}"

    @property
    def reads_activation(self) -> bool:
        """Whether it depends on the activation's type."""
        return not ACTIVATIONS.isdisjoint(self.signature)


class _NoDriver:
    """Stands in for a GPU's driver where nothing is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)  # arguments are specialized alike for all

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def list_forms(dtype: torch.dtype, c: int) -> list[Form]:
    """Every form that the launchers run on activations of `dtype` with c channels, each once.

    Raises:
        RuntimeError: a kernel or an optional argument occurs in none, so the launches below are not all.
    """
    triton.runtime.driver.set_active(_NoDriver())
    forms: dict[str, Form] = {}
    for m in ROWS:
        for given, call in _launches(torch.empty(m, c, 1, 1, dtype=dtype, device="meta")):
            for form in _launched(given, call):
                forms.setdefault(repr((form.kernel, form.signature, form.constants, form.options)), form)
    launched = {(form.kernel, name) for form in forms.values() for name in form.signature if name not in form.constants}
    kernels = {name: value for name, value in vars(triton_bn).items() if hasattr(value, "arg_names") and name[0] != "_"}
    pointers = {(name, arg) for name, kernel in kernels.items() for arg in kernel.arg_names if arg.endswith("_ptr")}
    if missing := sorted(pointers - launched):
        raise RuntimeError(f"no launch in {__file__} gives {missing}")
    return list(forms.values())


def _launched(given: str, call: Callable[[], object]) -> list[Form]:
    forms: list[Form] = []

    def write_down(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        signature = compile["signature"]
        constants = {list(signature)[index]: value for (index,), value in compile["constants"].items()}
        options = {name: compile[name] for name in TUNED}
        forms.append(Form(fn.name.rpartition(".")[2], given, signature, constants, compile["configs"][0], options))
        return True  # done: neither compile nor launch

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = write_down
        call()
    return forms


def _launches(x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way in which the launchers are called for x [N, C, H, W], with words for what is given."""
    c = x.shape[1]
    v = x.new_empty(c, dtype=torch.float32)
    norm = Norm(v, v, v, v, eps=1e-5, batch_count=v[:1])
    bare = norm._replace(weight=None, bias=None)
    moments, sums = v.new_empty(RANKS, 3, c), v.new_empty(3, c)
    bits = x.new_empty(x.shape[0], -(-c // 8), dtype=torch.uint8)
    running = Running(v, v, v[:1].to(torch.int64), momentum=0.1)
    yield "", partial(launch.moments, x)
    yield "", partial(launch.statistics, x, Running(None, None, None, momentum=0.0))
    yield "running", partial(launch.statistics, x, running)
    yield "cumulative", partial(launch.statistics, x, running._replace(momentum=None))
    yield "ranks", partial(launch.merge, moments, running)
    yield "bare", partial(launch.forward, x, bare, None, None, save_mask=False)
    yield "bare", partial(launch.reduce_gradient, x, None, x, bare, None, None, None)
    yield "bare", partial(launch.input_gradient, x, None, x, bare, None, None, sums, masked=False)
    yield "add", partial(launch.forward, x, norm, x, None, save_mask=False)
    yield "add mask", partial(launch.forward, x, norm, x, None, save_mask=True)
    for fork, dy2 in (("", None), (" fork", x)):
        yield f"add{fork}", partial(launch.reduce_gradient, x, dy2, x, norm, None, None, bits)
    for training, count in (("", v[:1]), (" eval", None)):
        one = norm._replace(batch_count=count)
        yield f"add{training}", partial(launch.input_gradient, x, None, x, one, None, None, sums, masked=True)
        for word, residual, two in (("", None, None), ("dual", x, one)):
            yield word, partial(launch.forward, x, norm, residual, two, save_mask=False)
            for fork, dy2 in (("", None), (" fork", x)):
                yield word + fork, partial(launch.reduce_gradient, x, dy2, x, norm, residual, two, None)
                yield (
                    word + fork + training,
                    partial(launch.input_gradient, x, dy2, x, one, residual, two, sums, masked=False),
                )
