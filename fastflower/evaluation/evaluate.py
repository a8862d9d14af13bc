"""Figures of a finished run on a split with classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastflower.arrays import Ints, Singles
from fastflower.data.names import display_names
from fastflower.data.records import Records
from fastflower.errors import UserError
from fastflower.evaluation.score import scored, softmax
from fastflower.evaluation.session import EvaluationSettings, load_split, open_session, source, trained_on
from fastflower.evaluation.trained_run import Trained, open_trained
from fastflower.files import is_writable
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.run_folder import RunFolder
from fastflower.training.metrics import Evaluation, EvaluationSums


@dataclass(frozen=True)
class Evaluated:
    """What a run makes of a split with classes."""

    trained: Trained
    split: str
    names: list[str]  # to show for the classes
    records: Records
    predicted: Ints  # [n], of equally likely classes the first
    confidence: Singles  # [n], the probability of that class
    metrics: Evaluation
    source: dict[str, Any]  # which network, pictures and views; see `fastflower.evaluation.session.source`
    folder: Path  # for what is written of it


def evaluate_run(
    run: Path,
    split: str,
    settings: EvaluationSettings,
    console: Console,
    names: str | None = None,
    *,
    out: Path | None = None,
    write: bool = False,
) -> Evaluated:
    """Figures of a run's best checkpoint (or of the checkpoint file `run`) on a labelled split.

    Precision and batch are those of the run, so that the validation figures that it logged come out again; so are the
    seed, data.folds and data.val_share, where they divide the data, and data.skip, unless other folders than the run's
    are named. Every record counts, as in validation; with scales every picture, once. `names` is as
    `fastflower.data.names.display_names` takes it.

    Memory does not grow with records times classes: scores are looked at part by part.

    Args:
        run: a run folder or a checkpoint file.
        split: train, val or test.
        settings: which data, and by which views.
        console: where progress is shown, and a warning where the network has trained on these pictures.
        names: see above.
        out: folder for what is written of it later; None = eval-SPLIT of the run folder, with the views in its name.
        write: look now whether that can be written.

    Raises:
        UserError: no such run, the data or the views do not fit it, or the folder cannot be written.
        Stopped: a signal came.
    """
    trained = open_trained(run)
    shown = display_names(trained.classes, names)
    folder = out or trained.result(RunFolder(trained.folder).evaluation(split, settings.views.suffix))
    with open_session(trained, settings, console) as session:
        with session.ranks.together():
            if write and session.ranks.is_main and not is_writable(folder):
                raise UserError(f"{folder} cannot be written: name a folder with --out where there is permission.")
        data, records = load_split(trained, split, settings, session, once=bool(settings.views.scales))
        with session.ranks.together():
            records.require_classes(len(trained.classes))
        made_from = source(trained, split, data, records, settings, session)
        if split == "val" and trained_on(made_from):
            session.display.say(
                f"{run} trained on val too (data.train_on train+val): these figures are of pictures that it has seen, "
                "and say nothing of new ones."
            )
        sums = EvaluationSums(len(trained.classes), torch.device("cpu"))
        predicted, confidence = np.empty(len(records), np.int64), np.empty(len(records), np.float32)
        for part, scores in scored(trained, data, records, settings, session):
            sums.add(torch.from_numpy(scores), torch.from_numpy(records.labels[part]))
            probabilities = softmax(scores)
            predicted[part], confidence[part] = probabilities.argmax(axis=1), probabilities.max(axis=1)
    figures = sums.result(Ranks())
    return Evaluated(trained, split, shown, records, predicted, confidence, figures, made_from, folder)
