"""What a batch is compared with: smoothing, class weights, mixup and cutmix, against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastflower.config import TrainConfig
from fastflower.training.loss import Criterion, Targets, _neighbors, mix, power_weights

LABELS = torch.tensor([0, 2, 2, 1, 2])
LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
PLACE = {"seed": 1, "epoch": 2, "position": 64}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([5 / 3, 5 / 3, 5 / 9])])
def test_loss_of_a_mixture_is_that_of_mixed_targets(smoothing: float, weights: torch.Tensor | None) -> None:
    others = LABELS.roll(1)
    share = 0.7
    loss = Criterion(smoothing, weights)(LOGITS, Targets(LABELS, others, share))
    logs = LOGITS.log_softmax(1)
    wanted = torch.zeros(())
    for labels, part in ((LABELS, share), (others, 1 - share)):
        target = F.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
        wanted += part * -(target * logs * (torch.ones(3) if weights is None else weights)).sum(1).mean()
    torch.testing.assert_close(loss, wanted)


def test_without_choices_it_is_cross_entropy() -> None:
    assert torch.equal(Criterion()(LOGITS, Targets(LABELS)), F.cross_entropy(LOGITS, LABELS))


def test_weights_of_power_one_are_inverse_sizes_with_mean_one() -> None:
    weights = power_weights(np.array([0, 0, 0, 0, 0, 0, 2, 2]), 4, 1.0)  # two classes have no record
    torch.testing.assert_close(weights[[0, 2]], torch.tensor([8 / 12, 8 / 4]))
    assert weights[[0] * 6 + [2] * 2].mean() == 1
    assert torch.isfinite(weights).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.floats(0, 1))
def test_weights_fall_with_a_power_of_the_size(classes: list[int], power: float) -> None:
    weights = power_weights(np.array(classes), 9, power).tolist()
    assert sum(weights[c] for c in classes) / len(classes) == pytest.approx(1, rel=1e-5)
    for a in classes:
        ratio = (classes.count(a) / classes.count(classes[0])) ** -power
        assert weights[a] == pytest.approx(weights[classes[0]] * ratio, rel=1e-5)
    assert np.isfinite(weights).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_the_ends_of_the_power_are_plain_and_balanced(classes: list[int]) -> None:
    assert bool((power_weights(np.array(classes), 9, 0.0) == 1).all())
    sizes = np.bincount(classes, minlength=9)
    balanced = np.float32(len(classes) / (np.count_nonzero(sizes) * np.maximum(sizes, 1)))
    assert power_weights(np.array(classes), 9, 1.0).numpy().tolist() == balanced.tolist()  # bit for bit


def pictures(n: int = 5, side: int = 32) -> torch.Tensor:
    """Picture i has the value i + 1 everywhere."""
    values = torch.arange(1.0, n + 1).view(-1, 1, 1, 1)
    return values.expand(n, 3, side, side).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_have_the_share_that_the_pixels_have(options: dict[str, Any]) -> None:
    shares, kinds = [], set()
    for position in range(40):
        labels = torch.arange(5)
        images, targets = mix(pictures(), labels, TrainConfig(**options), seed=0, epoch=0, position=position)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert targets.others is not None
        assert 0.5 <= targets.share <= 1
        wanted = targets.share * (targets.labels + 1) + (1 - targets.share) * (targets.others + 1)
        torch.testing.assert_close(images.mean((1, 2, 3)), wanted.float())
        assert {frozenset(pair) for pair in zip(targets.labels.tolist(), targets.others.tolist(), strict=True)} == {
            frozenset({i, (i - 1) % 5}) for i in range(5)
        }
        shares.append(targets.share)
        if targets.share < 1:
            kinds.add("cutmix" if set(images[0].unique().tolist()) == {1.0, 5.0} else "mixup")
    assert len(set(shares)) > 20
    assert kinds == set(options)


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("region", [(0, 8, 0, 8), (2, 5, 1, 8), (3, 3, 2, 6)])
def test_neighbors_are_what_rolling_gives(n: int, region: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = region
    images = torch.randn(n, 3, 8, 8).contiguous(memory_format=torch.channels_last)[:, :, top:bottom, left:right]
    assert torch.equal(_neighbors(images), images.roll(1, 0))


def test_a_mixture_is_a_function_of_its_place() -> None:
    train = TrainConfig(mixup=0.2, cutmix=1.0)
    first, targets = mix(pictures(), torch.arange(5), train, **PLACE)
    again, same = mix(pictures(), torch.arange(5), train, **PLACE)
    assert torch.equal(first, again)
    assert targets.share == same.share
    others = {mix(pictures(), torch.arange(5), train, **PLACE | {key: 3})[1].share for key in PLACE}
    assert len(others | {targets.share}) == 4


def test_nothing_is_mixed_where_nothing_is_asked_for_or_there_is_no_neighbor() -> None:
    images = pictures()
    kept, targets = mix(images, LABELS, TrainConfig(), **PLACE)
    assert kept is images
    assert targets.others is None
    assert mix(pictures(1), LABELS[:1], TrainConfig(mixup=1.0), **PLACE)[1].others is None


def test_parts_keep_labels_beside_their_partners() -> None:
    parts = list(Targets(LABELS, LABELS.roll(1), 0.8).split(2))
    assert [part.labels.tolist() for part in parts] == [[0, 2, 2], [1, 2]]
    assert [part.others.tolist() for part in parts if part.others is not None] == [[2, 0, 2], [2, 1]]
    assert [part.share for part in parts] == [0.8, 0.8]
