"""Several networks' predictions of the same pictures as one: by votes, the mean or a weighted mean of probabilities.

No result depends on the order in which the members are given: numbers are added in the order of their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from fastflower.arrays import Floats, Ints, Strings
from fastflower.data.records import NO_LABEL
from fastflower.errors import UserError
from fastflower.evaluation.predictions import Predictions, in_order_of, refuse_repeated, some, sort_by_id
from fastflower.evaluation.score import metrics, to_single
from fastflower.evaluation.session import input_of
from fastflower.training.metrics import Evaluation

Method = Literal["vote", "mean", "weighted"]

FLOOR = float(np.finfo(np.float32).tiny)  # below what a probability counts as, since 0 has no logarithm
TOLERANCE = 1e-10  # of the mean log likelihood
ITERATIONS = 10_000


@dataclass(frozen=True)
class Member:
    """What one network says."""

    name: str  # for messages and tables: its run folder or file
    predictions: Predictions


def combine(members: Sequence[Member], method: Method, weights: Floats | None = None) -> Predictions:
    """The ensemble's predictions, joined by id.

    - vote: the class that is the likeliest for most members; of those with equally many votes the one whose mean
      probability is the highest. The probabilities are (votes + mean probability) / (members + 1).
    - mean: the mean of the members' probabilities.
    - weighted: their mean by `weights` ([members], at least 0), of which only the ratios count.

    Of classes that are equal in all this the first is taken. A true class that some members know is known.

    Raises:
        UserError: fewer than two members, one that is given twice, or members that are not of the same pictures,
            split and classes; names them, and the ids.
    """
    joined = join(members)
    stacked = np.stack([member.probabilities for member in joined]).astype(np.float64)  # [members, n, C]
    ordered = sorted(range(len(members)), key=lambda k: members[k].name)
    source: dict[str, Any] = {"method": method}
    source["members"] = {members[k].name: members[k].predictions.source for k in ordered}
    if method == "vote":
        mean = _sum(stacked) / len(joined)
        likeliest = np.stack([member.likeliest for member in joined])
        votes = (likeliest[:, :, None] == np.arange(stacked.shape[2])).sum(axis=0)
        best = np.where(votes == votes.max(axis=1, keepdims=True), mean, -1).argmax(axis=1)
        probabilities = (votes + mean) / (len(joined) + 1)
    elif method == "mean":
        probabilities = _sum(stacked) / len(joined)
        best = probabilities.argmax(axis=1)
    else:
        if weights is None or len(weights) != len(joined):
            raise ValueError("a weighted ensemble needs a weight for each member")
        shares = weights / _sum(weights)
        probabilities = _sum(shares[:, None, None] * stacked)
        best = probabilities.argmax(axis=1)
        source["weights"] = {members[k].name: float(shares[k]) for k in ordered}
    return Predictions(
        split=max(member.split for member in joined),  # where some do not say, what the others do
        classes=joined[0].classes,
        ids=joined[0].ids,
        probabilities=to_single(probabilities, best),
        labels=true_classes(joined),
        source=source,
    )


def fit_weights(members: Sequence[Member]) -> Floats:
    """Weights [members], summing to one, for which the weighted mean makes the true classes the likeliest.

    Maximum likelihood of the mixture's weights by expectation maximization from equal ones. The mean log likelihood is
    concave in the weights, so it cannot exceed the one reached by more than the largest slope towards a single member,
    max over members of mean(p_member / p_mixture) - 1: the iteration ends where that is below TOLERANCE.

    Raises:
        UserError: as `combine`; or a picture's true class is unknown.
    """
    joined, labels = join_labelled(members)
    true = np.stack([member.probabilities[np.arange(len(labels)), labels] for member in joined]).astype(np.float64)
    # members by value: whatever order they are given in, the sums below are the same
    order = sorted(range(len(joined)), key=lambda k: true[k].tolist())
    likelihoods = np.maximum(true[order], FLOOR)  # [members, n]
    weights = np.full(len(joined), 1 / len(joined))
    for _ in range(ITERATIONS):
        mixture = (weights[:, None] * likelihoods).sum(axis=0)
        slopes = (likelihoods / mixture).mean(axis=1)
        if slopes.max() < 1 + TOLERANCE:
            break
        weights = weights * slopes
    fitted = np.empty_like(weights)
    fitted[order] = weights / weights.sum()
    return fitted


def metrics_of(predictions: Predictions) -> Evaluation:
    """What `fastflower eval` says of the network whose softmax these probabilities are.

    Raises:
        UserError: a picture's true class is unknown.
    """
    classes = len(predictions.classes)
    _require_labels(predictions.ids, predictions.labels, classes)
    logs = np.log(np.maximum(predictions.probabilities.astype(np.float64), FLOOR))
    return metrics(logs, predictions.labels)


def join(members: Sequence[Member]) -> list[Predictions]:
    """The members' predictions, row by row of the same ids.

    Raises:
        UserError: see `combine`.
    """
    if len(members) < 2:
        raise UserError(f"an ensemble needs two members or more, not {len(members)}: name more runs or files.")
    for one, other in combinations(members, 2):
        if one.name == other.name:
            raise UserError(f"{one.name} is given twice and would count twice: name each member once.")
        if _same(one.predictions, other.predictions):
            raise UserError(
                f"{one.name} and {other.name} are the predictions of one network, which would count twice: "
                "name one of them."
            )
    for member in members:
        refuse_repeated(member.predictions.ids, member.name)
    every = set().union(*(member.predictions.ids.tolist() for member in members))
    for member in members:
        if missing := every.difference(member.predictions.ids.tolist()):
            raise UserError(
                f"{member.name} lacks {some(missing)}, which other members have: predict the same pictures with each."
            )
    joined = [sort_by_id(predictions) for predictions in _of_one_order(members)]
    for (one, a), (other, b) in combinations(zip(members, joined, strict=True), 2):
        if (differ := (a.labels != b.labels) & (a.labels != NO_LABEL) & (b.labels != NO_LABEL)).any():
            raise UserError(
                f"{one.name} and {other.name} have different true classes for {some(a.ids[differ].tolist())}: "
                "predict with each from the same data."
            )
    splits = {member.predictions.split: member.name for member in members if member.predictions.split}
    if len(splits) > 1:
        named = " and ".join(f"{name} of {split}" for split, name in sorted(splits.items()))
        raise UserError(f"the members are of several splits, {named}: predict the same split with each.")
    return joined


def join_labelled(members: Sequence[Member]) -> tuple[list[Predictions], Ints]:
    """The same, and the true classes [n], all of which must be known."""
    joined = join(members)
    labels = true_classes(joined)
    _require_labels(joined[0].ids, labels, len(joined[0].classes))
    return joined, labels


def true_classes(joined: Sequence[Predictions]) -> Ints:
    """True classes [n] as far as one of the members knows them, each of which must have the same ids."""
    labels: Ints = np.max([member.labels for member in joined], axis=0)  # NO_LABEL is below every class
    return labels


def _same(a: Predictions, b: Predictions) -> bool:
    """Whether two hold what one network says by one kind of views: copies of a file or run, or a run and its file."""
    networks = input_of(a.source)
    if not a.source or networks != input_of(b.source):
        return False
    if "method" not in {**a.source, **b.source} and all("weights" in network for network in networks):
        return True  # in another precision the probabilities differ a little
    return bool(np.isnan(a.probabilities - b.probabilities).any()) or np.array_equal(a.probabilities, b.probabilities)


def _of_one_order(members: Sequence[Member]) -> list[Predictions]:
    """The members' predictions with their classes in one order, which no order of the members has a say in.

    Raises:
        UserError: the classes are not the same.
    """
    lists = [member.predictions.classes for member in members]
    classes = min(lists, key=lambda names: (sum(map(len, names)), names))  # 7 rather than 007
    ordered = []
    for member in members:
        predictions = in_order_of(classes, member.predictions)
        if predictions is None:
            raise UserError(
                f"{_difference(members[lists.index(classes)], member)}: combine networks of the same classes."
            )
        ordered.append(predictions)
    return ordered


def _difference(one: Member, other: Member) -> str:
    a, b = one.predictions.classes, other.predictions.classes
    if len(a) != len(b):
        return f"{one.name} has {len(a)} classes and {other.name} {len(b)}"
    return f"{one.name} has the class {next(name for name in a if name not in b)!r}, which {other.name} lacks"


def _require_labels(ids: Strings, labels: Ints, classes: int) -> None:
    unknown = (labels < 0) | (labels >= classes)
    if unknown.any():
        raise UserError(
            f"nothing can be measured or fitted without a true class of 0..{classes - 1} for "
            f"{some(ids[unknown].tolist())}: predict a split that has classes, such as val."
        )


def _sum(values: Floats) -> Floats:
    """Sum along the first axis, the same for any order along it."""
    total: Floats = np.sort(values, axis=0).sum(axis=0)
    return total
