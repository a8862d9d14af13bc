"""Ensembles: against exact arithmetic, scikit-learn and a search of all weights; in any order of the members."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.metrics import accuracy_score, f1_score, log_loss, top_k_accuracy_score

from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.combine import Member, Method, combine, fit_weights, metrics_of
from fastflower.evaluation.ensemble import Row, members_table
from fastflower.evaluation.predictions import Predictions, read_predictions, write_predictions
from fastflower.evaluation.session import input_of
from fastflower.runtime.distributed import Ranks
from fastflower.training.metrics import EvaluationSums

METHODS: list[Method] = ["vote", "mean", "weighted"]


def predictions(probabilities: object, labels: object = None, split: str = "val") -> Predictions:
    rows = np.asarray(probabilities, np.float32)
    n, classes = rows.shape
    true = np.full(n, NO_LABEL) if labels is None else np.asarray(labels, np.int64)
    ids = np.array([f"{i:04}" for i in range(n)])
    return Predictions(split, [f"class {k}" for k in range(classes)], ids, rows, true)


def members_of(stacked: object, labels: object = None) -> list[Member]:
    return [Member(f"run {k}", predictions(rows, labels)) for k, rows in enumerate(np.asarray(stacked, np.float32))]


def softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=-1).numpy()


def random_members(seed: int, members: int, n: int, classes: int, skill: float = 2.0) -> list[Member]:
    """Networks of growing skill on the same pictures."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(members, n, classes)) * np.linspace(1, 3, members)[:, None, None]
    logits[:, np.arange(n), labels] += np.linspace(0, skill, members)[:, None]
    return members_of(softmax(logits.astype(np.float32)), labels)


@st.composite
def near_ties(draw: st.DrawFn) -> np.ndarray:
    """Probabilities [members, n, C] that are equal, or differ by a last place or two in single precision.

    Zeros stay zeros: beside 0.1 the last place of 0 is lost in double precision too.
    """
    members, n, classes = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 6))
    size = members * n * classes
    levels = draw(st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.7]), min_size=size, max_size=size))
    steps = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    values = np.array(levels, np.float32)
    for step in (1, 2):
        moved = (np.array(steps) >= step) & (values > 0)
        values = np.where(moved, np.nextafter(values, np.float32(1)), values)
    return values.reshape(members, n, classes)


def exactly(row: np.ndarray, method: Method, weights: list[int]) -> int:
    """The class that an ensemble of two members or more finds ([members, C]), without any rounding."""
    means = [sum(Fraction(float(p)) * w for p, w in zip(column, weights, strict=True)) for column in row.T]
    votes = [0] * row.shape[1]
    if method == "vote":
        for member in row:
            votes[int(member.argmax())] += 1
    return max(range(row.shape[1]), key=lambda k: (votes[k], means[k], -k))


@settings(max_examples=150, deadline=None)
@given(near_ties(), st.sampled_from(METHODS))
def test_the_class_is_that_of_exact_arithmetic_also_where_single_precision_ties(
    stacked: np.ndarray, method: Method
) -> None:
    # parts of a power of two, with which a double's products and sums of these values are exact
    weights = [1, 1, 2, 4, 8][: len(stacked)] if method == "weighted" else [1] * len(stacked)
    combined = combine(members_of(stacked), method, np.array(weights, float))
    assert combined.likeliest.tolist() == [exactly(stacked[:, i], method, weights) for i in range(stacked.shape[1])]


@settings(max_examples=60, deadline=None)
@given(near_ties(), st.sampled_from(METHODS), st.integers(0, 2**32 - 1))
def test_no_bit_depends_on_the_order_of_the_members(stacked: np.ndarray, method: Method, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stacked = (stacked * rng.random(stacked.shape)).astype(np.float32)  # magnitudes whose sums do round
    labels = rng.integers(0, stacked.shape[2], stacked.shape[1])
    members, weights = members_of(stacked, labels), rng.random(len(stacked))
    order = rng.permutation(len(members))
    one = combine(members, method, weights)
    other = combine([members[k] for k in order], method, weights[order])
    assert one.probabilities.tobytes() == other.probabilities.tobytes()
    assert json.dumps(one.source) == json.dumps(other.source)
    fitted = fit_weights(members)
    assert fit_weights([members[k] for k in order]).tobytes() == fitted[order].tobytes()


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)))
def test_classes_with_the_same_numbers_from_other_members_tie_and_the_first_is_taken(order: list[int]) -> None:
    # of 0.3 + 2e-17 nothing is left in a double, of 0.3 + (2e-17 + 2e-17 + ...) something
    values = np.array([2e-17, 2e-17, 0.3, 2e-17, 2e-17], np.float32)
    stacked = np.stack([values[order], values], axis=1)[:, None, :]  # the second class has the first one's, permuted
    assert combine(members_of(stacked), "mean").likeliest.tolist() == [0]
    assert combine(members_of(stacked), "weighted", np.full(5, 0.1)).likeliest.tolist() == [0]


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_distributions_of_the_documented_kind(method: Method) -> None:
    members = random_members(1, 4, 300, 7)
    weights = np.array([1.0, 0, 2, 5])
    combined = combine(members, method, weights)
    stacked = np.stack([member.predictions.probabilities for member in members]).astype(np.float64)
    votes = np.eye(7)[stacked.argmax(axis=2)].sum(axis=0)
    expected = {
        "mean": stacked.mean(axis=0),
        "weighted": np.average(stacked, axis=0, weights=weights),
        "vote": (votes + stacked.mean(axis=0)) / 5,
    }[method]
    np.testing.assert_allclose(combined.probabilities, expected, rtol=2e-7)
    np.testing.assert_allclose(combined.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert combined.probabilities.dtype == np.float32
    if method == "vote":
        assert (votes[np.arange(300), combined.likeliest] == votes.max(axis=1)).all()


def test_a_vote_counts_members_not_certainty() -> None:
    sure, unsure = [0.0, 1.0, 0.0], [0.4, 0.3, 0.3]
    assert combine(members_of([[sure], [unsure], [unsure]]), "vote").likeliest.tolist() == [0]
    assert combine(members_of([[sure], [unsure], [unsure]]), "mean").likeliest.tolist() == [1]
    assert combine(members_of([[sure], [unsure]]), "vote").likeliest.tolist() == [1]  # a tie: the mean decides


@pytest.mark.parametrize("method", METHODS)
def test_members_are_joined_by_id_and_know_each_others_classes(method: Method, tmp_path: Path) -> None:
    members = random_members(2, 3, 50, 5)
    expected = combine(members, method, np.array([1.0, 2, 3]))
    shuffled = []
    for k, member in enumerate(members):
        order = np.random.default_rng(k).permutation(50)
        whole = member.predictions
        labels = np.where(np.arange(50) % 3 == k, whole.labels, NO_LABEL)[order]  # each knows a third
        part = replace(whole, ids=whole.ids[order], probabilities=whole.probabilities[order], labels=labels)
        shuffled.append(Member(member.name, replace(part, split="val" if k == 1 else "")))
    combined = combine(shuffled, method, np.array([1.0, 2, 3]))
    for name in ("ids", "probabilities", "labels"):
        np.testing.assert_array_equal(getattr(combined, name), getattr(expected, name))
    assert combined.split == "val"
    write_predictions(tmp_path / "ensemble.parquet", combined)
    again = read_predictions(tmp_path / "ensemble.parquet")
    np.testing.assert_array_equal(again.likeliest, expected.likeliest)
    assert again.source == combined.source
    assert list(again.source["members"]) == ["run 0", "run 1", "run 2"]
    assert sum(again.source.get("weights", {"": 1}).values()) == pytest.approx(1)


def altered(**columns: object) -> Predictions:
    """Three pictures of two classes, otherwise as given."""
    plain = predictions([[0.2, 0.8], [0.7, 0.3], [0.6, 0.4]], [1, 0, 0])
    return replace(plain, **{name: np.array(x) if name != "classes" else x for name, x in columns.items()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (altered(ids=["0000", "0001", "0009"]), "a lacks id 0009, which other members have"),
        (altered(ids=["0000", "0001", "0001"]), "b has id 0001 more than once"),
        (predictions([[0.2, 0.8], [0.7, 0.3]], [1, 0]), "b lacks id 0002, which other members have"),
        (predictions([[0.2, 0.3, 0.5]] * 3, [1, 0, 0]), "a has 2 classes and b 3"),
        (altered(classes=["class 0", "rose"]), "b has the class 'rose', which a lacks"),
        (altered(classes=["class 1", "class 0"]), "a and b have different true classes for ids 0000, 0001, 0002"),
        (altered(labels=[1, 0, 1]), "a and b have different true classes for id 0002"),
        (altered(labels=[0, NO_LABEL, 1]), "a and b have different true classes for ids 0000, 0002"),
        (predictions([[0.2, 0.8]] * 3, [1, 0, 0], "train"), "several splits, b of train and a of val"),
    ],
)
def test_members_that_do_not_belong_together_are_refused(other: Predictions, sentence: str) -> None:
    members = [Member("a", altered()), Member("b", other)]
    with pytest.raises(UserError) as refused:
        combine(members, "mean")
    assert sentence in str(refused.value)
    for ask in (lambda: combine(members[::-1], "vote"), lambda: fit_weights(members)):
        with pytest.raises(UserError):
            ask()


def test_a_network_is_counted_once() -> None:
    with pytest.raises(UserError, match="two members or more, not 1"):
        combine([Member("a", altered())], "mean")
    with pytest.raises(UserError, match="a is given twice"):
        combine([Member("a", altered()), Member("b", altered()), Member("a", altered())], "mean")
    trained = replace(altered(), source={"run": "runs/a"})
    with pytest.raises(UserError, match="a and copy are the predictions of one network"):
        combine([Member("a", trained), Member("copy", trained)], "vote")
    later = replace(trained, probabilities=trained.probabilities[::-1])  # trained anew under the same name
    assert len(combine([Member("a", trained), Member("b", later)], "vote").ids) == 3


def mean_log_likelihood(members: list[Member], weights: np.ndarray) -> float:
    true = [m.predictions.probabilities[np.arange(len(m.predictions.labels)), m.predictions.labels] for m in members]
    return float(np.log(np.maximum(weights @ np.array(true, np.float64), 1e-300)).mean())


def test_two_fitted_weights_are_those_of_a_search() -> None:
    members = random_members(5, 2, 400, 6, skill=0.5)
    grid = np.linspace(0, 1, 10_001)
    best = max(grid, key=lambda w: mean_log_likelihood(members, np.array([w, 1 - w])))
    assert 0.05 < best < 0.95  # neither alone is best, so that it is a search
    np.testing.assert_allclose(fit_weights(members), [best, 1 - best], atol=2e-4)


@pytest.mark.parametrize("seed", range(4))
def test_fitted_weights_are_as_likely_as_any(seed: int) -> None:
    members = random_members(seed, 5, 300, 10, skill=0.4 + seed)
    fitted = fit_weights(members)
    assert fitted.min() >= 0
    assert fitted.sum() == pytest.approx(1, abs=1e-14)
    reached = mean_log_likelihood(members, fitted)
    rng = np.random.default_rng(seed)
    others = [np.full(5, 0.2), *np.eye(5), *rng.dirichlet(np.ones(5), 300), *rng.dirichlet(1e4 * fitted + 1e-3, 300)]
    assert reached >= max(mean_log_likelihood(members, other) for other in others) - 1e-9
    # and it is the loss that the ensemble is then said to have
    assert metrics_of(combine(members, "weighted", fitted)).loss == pytest.approx(-reached, rel=1e-6)


def test_a_member_that_thinks_the_truth_impossible_loses_its_weight() -> None:
    labels = np.zeros(20, np.int64)
    wrong, right, same = [[0.0, 1.0]] * 20, [[0.6, 0.4]] * 20, [[0.6, 0.4]] * 20
    np.testing.assert_allclose(fit_weights(members_of([wrong, right, same], labels)), [0, 0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(fit_weights(members_of([wrong, wrong], labels)), [0.5, 0.5])


def test_what_has_no_classes_cannot_be_measured() -> None:
    members = [Member("a", altered(labels=[1, NO_LABEL, 0])), Member("b", altered(labels=[NO_LABEL] * 3))]
    for ask in (lambda: fit_weights(members), lambda: metrics_of(combine(members, "mean"))):
        with pytest.raises(UserError, match=r"without a true class of 0\.\.1 for id 0001"):
            ask()
    with pytest.raises(UserError, match="id 0002"):
        metrics_of(altered(labels=[1, 0, 2]))


@pytest.mark.parametrize("classes", [3, 5, 30])
def test_figures_are_scikit_learns_and_those_of_an_evaluation(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(500, classes)).astype(np.float32) * 3
    labels = rng.integers(0, classes - 1, 500)  # the last class never occurs as a true one
    evaluation = metrics_of(predictions(softmax(logits), labels))
    probabilities = softmax(logits.astype(np.float64))
    guesses = probabilities.argmax(axis=1)
    assert evaluation.n == 500
    assert evaluation.loss == pytest.approx(log_loss(labels, probabilities, labels=range(classes)), rel=1e-5)
    assert evaluation.accuracy == pytest.approx(accuracy_score(labels, guesses))
    assert evaluation.macro_f1 == pytest.approx(f1_score(labels, guesses, average="macro"))
    top5 = 1 if classes <= 5 else top_k_accuracy_score(labels, probabilities, k=5, labels=range(classes))
    assert evaluation.top5 == pytest.approx(top5)
    sums = EvaluationSums(classes, torch.device("cpu"))
    sums.add(torch.from_numpy(logits), torch.from_numpy(labels))
    assert asdict(evaluation) == pytest.approx(asdict(sums.result(Ranks())), rel=1e-5)


def test_figures_count_the_likeliest_class_also_where_logarithms_tie() -> None:
    low, high = np.float32(0.05), np.nextafter(np.float32(0.05), np.float32(1))
    while np.float32(np.log(float(low))) != np.float32(np.log(float(high))):
        low, high = high, np.nextafter(high, np.float32(1))
    best = np.arange(200) % 19
    rows = np.full((200, 19), low)
    rows[np.arange(200), best] = high
    evaluation = metrics_of(predictions(rows, best))
    assert evaluation.accuracy == 1
    assert evaluation.macro_f1 == pytest.approx(1)


def test_figures_stay_finite_where_the_truth_was_thought_impossible() -> None:
    evaluation = metrics_of(predictions([[1, 0], [0, 1]], [1, 1]))
    assert evaluation.accuracy == 0.5
    assert 10 < evaluation.loss < 100


def test_the_input_of_several_networks_is_told_whatever_they_are_called() -> None:
    networks = [{"weights": text, "run": "a", "data": {"root": [text]}, "precision": "fp32"} for text in "xyz"]
    together = {"method": "mean", "members": {"run": networks[0], "data": {"folds": networks[1:]}}}
    assert input_of(together) == [{"weights": text} for text in "xyz"]
    assert input_of(networks[0]) == [{"weights": "x"}]


def test_the_table_shows_weights_only_where_there_are_some() -> None:
    evaluation = metrics_of(random_members(3, 2, 100, 8)[1].predictions)

    def shown(rows: list[Row]) -> str:
        console = Console(file=StringIO(), width=100)
        console.print(members_table(rows))
        assert isinstance(console.file, StringIO)
        return console.file.getvalue()

    plain = shown([Row("runs/[red]a", "10 crops", evaluation), Row("ensemble", "", evaluation)])
    assert "runs/[red]a" in plain
    assert "weight" not in plain
    assert "10 crops" in plain
    assert f"{evaluation.accuracy:.1%}" in plain
    weighted = shown([Row("a", "", evaluation, 0.25), Row("b", "", evaluation, 0.75), Row("c", "", evaluation)])
    assert "weight" in weighted
    assert "0.250" in weighted
