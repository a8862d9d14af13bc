"""Devices and number types as they are chosen for a machine."""

from __future__ import annotations

import pytest
import torch
from nvidia.dali import backend

from fastflower.config import DataConfig
from fastflower.data.batches import choose_engine
from fastflower.errors import UserError
from fastflower.runtime.device import choose_device, choose_precision
from fastflower.runtime.distributed import Ranks

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_is_bf16_from_ampere_on_and_fp16_before(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert choose_precision(True, "auto", GPU).dtype == dtype
    assert choose_precision(False, "auto", GPU).dtype is None
    assert choose_precision(True, "fp16", GPU).dtype == torch.float16


def test_a_cpu_uses_bf16_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "fastflower.runtime.device.cpu_has_bf16"
    monkeypatch.setattr(module, lambda: True)
    assert choose_precision(True, "auto", CPU).dtype == torch.bfloat16
    monkeypatch.setattr(module, lambda: False)
    without = choose_precision(True, "auto", CPU)
    assert without.dtype is None
    assert without.note
    assert choose_precision(True, "bf16", CPU).dtype == torch.bfloat16


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(UserError, match="finds 0 GPUs"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    assert choose_device("cpu", 1) == CPU
    with pytest.raises(UserError, match="process 2 of this machine finds 2 GPUs"):
        choose_device("auto", 2)


def test_a_cpu_decodes_what_is_needed_and_a_gpu_all_of_a_picture_unless_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "GetCUDADeviceCount", lambda: 1)
    for device, decoder, auto in ((CPU, "auto", "scaled"), (GPU, "auto", "whole"), (GPU, "cpu", "scaled")):
        for setting, wanted in (("auto", auto), ("region", "region"), ("whole", "whole")):
            engine = choose_engine(DataConfig(decoder=decoder, decode=setting), device, Ranks())  # type: ignore[arg-type]
            assert engine.decode == wanted
            assert engine.device == ("gpu" if device == GPU and decoder == "auto" else "cpu")


def test_the_decoder_shares_the_machine_and_refuses_a_gpu_that_is_not_there() -> None:
    engine = choose_engine(DataConfig(), CPU, Ranks(local_world_size=1000))
    assert (engine.device, engine.device_id, engine.threads) == ("cpu", None, 1)
    assert choose_engine(DataConfig(threads=3, prefetch=5), CPU, Ranks()).threads == 3
    with pytest.raises(UserError, match=r"data\.decoder is gpu"):
        choose_engine(DataConfig(decoder="gpu"), CPU, Ranks())


def test_threads_are_a_share_of_the_cores_up_to_what_the_decoder_has_a_use_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastflower.data.batches.backend.GetCUDADeviceCount", lambda: 8)
    gpu = torch.device("cuda", 5)
    for cores, quota, ranks, on_cpu, on_gpu in (
        (224, None, Ranks(), 32, 16),
        (224, None, Ranks(5, 8, 5, 8), 28, 16),
        (224, None, Ranks(5, 8, 5, 8, sharing=1), 32, 16),  # bound to processors of its own
        (56, None, Ranks(5, 8, 5, 8, sharing=4), 14, 14),  # beside three others on its GPU's node
        (224, 8, Ranks(5, 8, 5, 8), 1, 1),
        (56, 80, Ranks(5, 8, 5, 8, sharing=4), 10, 10),
        (2, None, Ranks(), 2, 2),
    ):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setattr("fastflower.machine.cpu_quota", lambda _, quota=quota: quota)
        assert choose_engine(DataConfig(), CPU, ranks).threads == on_cpu
        assert choose_engine(DataConfig(), gpu, ranks).threads == on_gpu
        assert choose_engine(DataConfig(decoder="cpu"), gpu, ranks).threads == on_cpu
        assert choose_engine(DataConfig(threads=100), gpu, ranks).threads == 100
