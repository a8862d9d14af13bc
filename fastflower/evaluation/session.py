"""What everything after training works on: the records of a split, and the processes that look at them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fastflower.config import DataConfig
from fastflower.data.contents import require_pictures
from fastflower.data.identity import identity
from fastflower.data.records import Records, miscounted
from fastflower.data.selection import largest_of_each
from fastflower.data.splits import leave_out, load_records
from fastflower.evaluation.trained_run import Planned, StoredSizes, Trained, weights_digest
from fastflower.evaluation.views import Views
from fastflower.files import to_json
from fastflower.runtime.device import choose_device, choose_precision
from fastflower.runtime.distributed import Ranks, processes
from fastflower.runtime.launcher import local_rank
from fastflower.runtime.progress import Display
from fastflower.runtime.repeatable import repeatable
from fastflower.runtime.signals import Signals

SHOWN = 5  # ids that are there twice, on screen
NOT_THE_INPUT = ("run", "checkpoint", "data", "precision")  # of a source: where weights and pictures lay, and how exact


@dataclass(frozen=True)
class EvaluationSettings:
    """The pictures to score and how, where not as in the run's own validation."""

    roots: tuple[Path, ...] | None = None  # data folders; None = the run's
    sizes: StoredSizes | None = None  # stored sizes to take; None: see `load_split`
    views: Views = field(default_factory=Views)
    device: Literal["run", "auto", "cpu", "cuda"] = "run"
    batch_size: int | None = None  # crops at once, over all ranks; None = as in training
    compiled: bool = False  # by torch.compile


@dataclass(frozen=True)
class Session:
    """Where scores are computed, by which processes, and who is told."""

    device: torch.device
    ranks: Ranks
    signals: Signals
    display: Display


@contextlib.contextmanager
def open_session(trained: Trained, settings: EvaluationSettings, console: Console) -> Iterator[Session]:
    """Join the other processes, listen to signals and show progress until the block ends.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    choice = trained.config.device if settings.device == "run" else settings.device
    device = choose_device(choice, local_rank())
    with (
        processes(device) as ranks,
        repeatable(trained.config.train.deterministic, device),
        Signals() as signals,
        Display(console, shown=ranks.is_main) as display,
    ):
        yield Session(device, ranks, signals, display)


def load_split(
    planned: Planned, split: str, settings: EvaluationSettings, session: Session, *, once: bool
) -> tuple[DataConfig, Records]:
    """The records to score, and how they are loaded.

    Args:
        planned: the run, trained or not.
        split: train, val or test.
        settings: which data.
        session: where.
        once: take each picture once, from its largest record; unless `settings` names sizes, of all that are stored,
            or, where stored pictures are cropped as they are, of those that the run was validated at.

    Raises:
        UserError: bad data, or data that does not fit the run.
    """
    stored_as_is = planned.config.data.val_resize is None and not settings.views.scales
    sizes: StoredSizes | None = settings.sizes or ("all" if once and not stored_as_is else None)
    data = planned.data(settings.roots, sizes)
    with session.ranks.main_first():
        read = session.display.follow("read pictures")
        records = load_records(replace(data, skip=None), split, planned.classes, planned.config.seed, read)
        if data.skip:
            everything, records = records, leave_out(records, data.skip)
            if left := len(everything) - len(records):
                session.display.say(f"Left out {left} records of {split} that {data.skip} lists.")
        if once:
            records, again = largest_of_each(records)
            for note in again[:SHOWN]:
                session.display.say(note)
            if len(again) > SHOWN:
                session.display.say(f"… and {len(again) - SHOWN} more ids that are there more than once.")
        for note in miscounted(records):
            session.display.say(note)
        (records,) = require_pictures([records], read)
    return data, records


def source(
    trained: Trained,
    split: str | None,
    data: DataConfig,
    records: Records,
    settings: EvaluationSettings,
    session: Session,
) -> dict[str, Any]:
    """What a result says of where it comes from, as JSON has it: network, pictures (by their bytes), and views.

    Two results of which this is the same, but for NOT_THE_INPUT, are of the same weights and the same input. Single
    pictures are of no split.

    Raises:
        UserError: a record cannot be read.
    """
    contents, config, place = None, trained.config, None
    if split:
        roots = data.root and [str(folder) for folder in data.root]
        seen = trained.trains_on(split, settings.roots)
        place = {"root": roots, "split": split, "sizes": data.sizes, "trained_on": seen}
    with session.ranks.together():
        if session.ranks.is_main:
            contents = identity(records, session.display.follow("read the pictures"))
    made_from = {
        "run": trained.folder.name,
        "checkpoint": trained.checkpoint.name,
        "data": place,
        "weights": weights_digest(trained),
        "model": config.model.name,
        "records": session.ranks.gather(contents)[0],
        "views": asdict(settings.views),
        "geometry": {"crop": data.crop, "val_resize": data.val_resize},
        "normalization": asdict(trained.normalization),
        "precision": str(choose_precision(config.amp, config.amp_dtype, session.device)),
    }
    plain: dict[str, Any] = json.loads(to_json(made_from))
    return plain


def input_of(made_from: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a source says of weights and input alone, of one network or of each of several."""
    networks = single_sources(made_from)
    return [{key: value for key, value in network.items() if key not in NOT_THE_INPUT} for network in networks]


def single_sources(made_from: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The source of each network, of one or of several together; what says nothing is one too."""
    several = made_from.get("folds") or list(made_from.get("members", {}).values())
    return [single for part in several for single in single_sources(part)] if several else [made_from]


def views_of(made_from: Mapping[str, Any]) -> str:
    """By which views predictions of this source were made, in words: "10 crops"; empty where it does not say."""
    views = [single["views"] for single in single_sources(made_from) if "views" in single]
    return " and ".join(dict.fromkeys(Views(one["crops"], tuple(one["scales"])).title for one in views))


def trained_on(made_from: Mapping[str, Any]) -> bool:
    """Whether a network of this source has trained on the pictures that it predicts."""
    return any((single.get("data") or {}).get("trained_on", False) for single in single_sources(made_from))
