"""Figures are those of all records, whatever the batches and the processes: against scikit-learn and numpy."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from fastflower.arrays import Floats
from fastflower.evaluation.analysis import analyse
from fastflower.evaluation.score import metrics, softmax
from fastflower.runtime.distributed import Ranks
from fastflower.training.metrics import ClassCounts, Evaluation, EvaluationSums, TrainingSums
from tests.evaluation.test_analysis import binned_gaps

CPU = torch.device("cpu")


@dataclass
class Together:
    """In place of ranks that add up: whoever asks last gets the sum over all."""

    so_far: Any = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.so_far = self.so_far + tensor
        return cast(torch.Tensor, self.so_far)


@dataclass
class Case:
    """Records, and how they are dealt to ranks and cut into batches."""

    scores: np.ndarray  # [n, C] float32
    labels: np.ndarray  # [n] int64
    world_size: int
    batch: int

    def evaluation(self) -> Evaluation:
        together = Together()
        for rank in range(self.world_size):
            sums = EvaluationSums(self.scores.shape[1], CPU)
            mine = np.arange(rank, len(self.labels), self.world_size)
            for start in range(0, len(mine), self.batch):
                part = mine[start : start + self.batch]
                sums.add(torch.from_numpy(self.scores[part]), torch.from_numpy(self.labels[part]))
            evaluation = sums.result(cast(Ranks, together))
        return evaluation


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few or many classes, of which only some occur; levels so coarse that scores tie; sure and unsure networks."""
    classes = draw(st.sampled_from([2, 3, 4, 5, 6, 7, 20, 104, 300]))
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    used = rng.permutation(classes)[: draw(st.integers(1, classes))]
    labels = rng.choice(used, n)
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    scores = rng.integers(0, levels, (n, classes)) * draw(st.sampled_from([1e-9, 1e-3, 1.0, 30.0]))
    helped = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    scores[helped, labels[helped]] += draw(st.sampled_from([0.0, 2.0]))
    return Case(scores.astype(np.float32), labels, draw(st.integers(1, 4)), draw(st.integers(1, 70)))


def exact_softmax(scores: np.ndarray) -> Floats:
    """In float64."""
    powers: Floats = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    probabilities: Floats = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def of_all(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The figures over all records at once; of equally likely classes the first comes first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    losses = np.log(np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True)).sum(axis=1))
    losses -= scores[np.arange(len(labels)), labels].astype(np.float64) - scores.max(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, where there are more classes than records
        return {
            "n": len(labels),
            "loss": losses.mean(),
            "accuracy": accuracy_score(labels, order[:, 0]),
            "top5": (order[:, :5] == labels[:, None]).any(axis=1).mean(),
            "macro_f1": f1_score(labels, order[:, 0], average="macro"),
        }


@settings(max_examples=200, deadline=None)
@given(cases())
def test_figures_are_those_of_all_records_whatever_batches_and_ranks(case: Case) -> None:
    expected = of_all(case.scores, case.labels)
    evaluation = case.evaluation()
    assert asdict(evaluation) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    at_once = metrics(case.scores, case.labels)
    for count in ("n", "accuracy", "top5", "macro_f1"):
        assert getattr(evaluation, count) == getattr(at_once, count), count
    assert evaluation.loss == pytest.approx(at_once.loss, rel=1e-13)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_analysis_counts_what_the_figures_count(case: Case) -> None:
    """Probabilities are rounded; the class that is called is the same."""
    n, classes = case.scores.shape
    given_out = softmax(case.scores)
    np.testing.assert_allclose(given_out, exact_softmax(case.scores), rtol=1e-6, atol=1e-37)
    names = [str(k) for k in range(classes)]
    analysis = analyse(case.labels, given_out.argmax(axis=1), given_out.max(axis=1), np.arange(n).astype(str), names)
    matrix = analysis.matrix(np.arange(classes))
    evaluation = metrics(case.scores, case.labels)
    assert matrix.sum() == n
    assert matrix.trace() / n == evaluation.accuracy
    columns = (matrix.sum(axis=1), matrix.sum(axis=0), matrix.diagonal().copy())
    counts = ClassCounts(*(torch.from_numpy(column).double() for column in columns))
    assert (float(counts.accuracy), float(counts.macro_f1)) == (evaluation.accuracy, evaluation.macro_f1)
    either = matrix.sum(axis=0) + analysis.support > 0
    assert analysis.f1[either].mean() == pytest.approx(evaluation.macro_f1, rel=1e-12)
    confidence = given_out.max(axis=1).astype(np.float64)
    correct = case.scores.argmax(axis=1) == case.labels
    assert analysis.ece == pytest.approx(binned_gaps(confidence, correct), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(cases(), st.integers(1, 4), st.integers(0, 70))
def test_training_figures_are_those_of_all_pictures_also_over_a_change_of_ranks(
    case: Case, then: int, stop: int
) -> None:
    """Batches with unequal numbers of pictures, some before a checkpoint and some after it by `then` ranks."""

    def train(ranks: list[TrainingSums], indices: np.ndarray) -> None:
        for k in range(0, len(indices), case.batch):
            part = indices[k : k + case.batch]
            logits, labels = torch.from_numpy(case.scores[part]), torch.from_numpy(case.labels[part])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            ranks[k // case.batch % len(ranks)].add(loss, logits, labels, step=0, lr=0.1)

    everyone, before = np.arange(len(case.labels)), [TrainingSums(CPU) for _ in range(case.world_size)]
    train(before, everyone[:stop])
    state = [rank_sums.state(Ranks())[0] for rank_sums in before]
    after = [TrainingSums(CPU) for _ in range(then)]
    for rank, sums in enumerate(after):
        sums.load_state(state, Ranks(rank, then))
    train(after, everyone[stop:])
    total = TrainingSums(CPU)
    total.load_state([rank_sums.state(Ranks())[0] for rank_sums in after], Ranks())
    expected = of_all(case.scores, case.labels)
    assert total.means() == pytest.approx((expected["loss"], expected["accuracy"]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1])  # the true class's logit, another one's
def test_outputs_that_are_not_finite_leave_no_figure_that_looks_like_one(value: float, at: int) -> None:
    scores = np.zeros((7, 4), np.float32)
    scores[5, at] = value
    assert np.isnan(metrics(scores, np.zeros(7, np.int64)).loss)
