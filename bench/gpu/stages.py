"""The stages of the check in their order: what needs torch alone, then what needs DALI, each by how much it tells.

The last ones compile for long and tell least: they get what time the others leave.
"""

from __future__ import annotations

from bench.gpu.task import Stage

TESTS = ("pytest",)
DALI = (
    "nvidia.dali",
    "nvidia.nvimgcodec",
    "numba",
    "pydantic",
    "tyro",
    "rich",
    "yaml",
    "PIL",
    "pyarrow",
    "google_crc32c",
)

STAGES = (
    Stage("exact", "the kernels against float64", "bench.gpu.layers:exact", 60),
    Stage("steps", "training steps in fp16 and bf16, compiled, in CUDA graphs", "bench.gpu.steps:steps", 90),
    Stage("resnet50", "resnet50 at 224 beside torchvision's, compiled", "bench.gpu.networks:resnet50", 130),
    Stage("resnet18", "resnet18 at 224 beside torchvision's, compiled", "bench.gpu.networks:resnet18", 50),
    Stage("kernel_rates", "four layers beside torch, inductor, cuDNN, apex", "bench.gpu.layers:rates", 60),
    Stage("idle", "gaps between kernels, by torch's profiler", "bench.gpu.idle:gaps", 45),
    Stage("graphs", "CUDA graphs on batches of 32", "bench.gpu.networks:graphs", 60),
    Stage("two_gpus", "two processes on two GPUs", "bench.gpu.ranks:two", 45),
    Stage("doctor", "what fastflower doctor finds", "bench.gpu.loading:doctor", 20, DALI),
    Stage("pixels", "the loader's pixels beside the CPU's, streams, caches", "bench.gpu.loading:pixels", 40, DALI),
    Stage("loader", "the loader's images/s by its settings", "bench.gpu.loading:rates", 60, DALI),
    Stage("launches", "what the loader takes from launches", "bench.gpu.loading:launching", 40, DALI),
    Stage("end_to_end", "training from records to weights", "bench.gpu.loading:end_to_end", 90, DALI),
    Stage(
        "gpu_tests", "the tests of training and loading on a GPU", "bench.gpu.suite:product_tests", 90,
        (*TESTS, "hypothesis", *DALI),
    ),
    Stage("resnet34", "resnet34 at 224 beside torchvision's, compiled", "bench.gpu.networks:resnet34", 75),
    Stage("kernel_tests", "the tests of the kernels", "bench.gpu.suite:kernel_tests", 90, TESTS),
    Stage("autotuned", "torch's longest search for kernels", "bench.gpu.networks:autotuned", 180),
)  # fmt: skip
