"""Figures of a finished run on a split with classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastflower.arrays import Singles
from fastflower.data.names import display_names
from fastflower.data.records import Records
from fastflower.evaluation.score import metrics, score
from fastflower.evaluation.session import EvaluationSettings, load_split, open_session, source
from fastflower.evaluation.trained_run import Trained, open_trained
from fastflower.training.metrics import Evaluation


@dataclass(frozen=True)
class Evaluated:
    """A run's scores on a split with classes."""

    trained: Trained
    split: str
    names: list[str]  # to show for the classes
    records: Records
    scores: Singles  # [n, num_classes], see `fastflower.evaluation.score.score`
    metrics: Evaluation
    source: dict[str, Any]  # which network, pictures and views; see `fastflower.evaluation.session.source`


def evaluate_run(
    run: Path, split: str, settings: EvaluationSettings, console: Console, names: str | None = None
) -> Evaluated:
    """Figures of a run's best checkpoint (or of the checkpoint file `run`) on a labelled split.

    Precision and batch are those of the run, so that the validation figures that it logged come out again; so are the
    seed, data.folds and data.val_share, where they divide the data, and data.skip, unless other folders than the run's
    are named. Every record counts, as in validation; with scales every picture, once. `names` is as
    `fastflower.data.names.display_names` takes it.

    Raises:
        UserError: no such run, or the data or the views do not fit it.
        Stopped: a signal came.
    """
    trained = open_trained(run)
    shown = display_names(trained.classes, names)
    with open_session(trained, settings, console) as session:
        data, records = load_split(trained, split, settings, session, once=bool(settings.views.scales))
        with session.ranks.together():
            records.require_classes(len(trained.classes))
        made_from = source(trained, data, records, settings, session)
        scores = score(trained, data, records, settings, session)
    return Evaluated(trained, split, shown, records, scores, metrics(scores, records.labels), made_from)
