"""The steps of a run as functions, for notebooks and programs of your own: `import fastflower`.

Everything runs in this process and on its own; many GPUs are the command line's business (torchrun).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastflower.config import Config, resolve
from fastflower.data.batches import Batches, open_batches
from fastflower.data.dataset import with_folders
from fastflower.evaluation.evaluate import evaluate_run
from fastflower.evaluation.session import EvaluationSettings
from fastflower.evaluation.views import Views
from fastflower.runtime.device import choose_device
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.output import Console, Tolerant
from fastflower.runtime.progress import Display
from fastflower.settings import build, find_config, load_yaml, merge
from fastflower.training.metrics import Evaluation
from fastflower.training.network import build_network
from fastflower.training.pretrained import load_pretrained, open_pretrained
from fastflower.training.run import train_run
from fastflower.training.setup import require_two_values


def load_config(source: str | Path | None = None, settings: Mapping[str, Any] | None = None) -> Config:
    """A configuration: the defaults, then a file's, then your own.

    Args:
        source: a YAML file, or the name of one that comes with fastflower ("demo", "resnet34", ...).
        settings: nested, as in the file: {"data": {"root": "DATA"}, "train": {"epochs": 10}}.

    Raises:
        UserError: no such file, an unknown key, or a bad value.
    """
    path = find_config(source) if source else None
    merged = merge(load_yaml(path) if path else {}, settings or {})
    return resolve(build(merged, str(path or "settings")))


def load_data(config: Config) -> Batches:
    """Both splits: classes in `dataset.classes`, training batches of an epoch by `train.epoch(number)`, validation's by
    `val.once()`. A batch has `images` [N, 3, S, S], normalized and channels-last, `labels` [N] and `indices` [N].

    Raises:
        UserError: bad data, settings that do not fit it or this machine, or pretrained weights that cannot be had.
    """
    ranks = Ranks()
    display = Display(_console(quiet=True), shown=False)
    data = with_folders(config.data, ranks, display)
    pretrained = open_pretrained(config.model, lambda _: None)
    inherited = pretrained.normalization if pretrained else None
    device, batch_size = choose_device(config.device), config.train.batch_size
    batches = open_batches(data, device, ranks, display, batch_size=batch_size, seed=config.seed, inherited=inherited)
    require_two_values(config, batches.train)
    return batches


def build_model(config: Config, classes: int) -> torch.nn.Module:
    """The configured network: logits [N, classes] for images [N, 3, H, W], with seeded or pretrained weights.

    Raises:
        UserError: settings that do not fit together, or pretrained weights that cannot be had.
    """
    device = choose_device(config.device)
    network = build_network(config.model, classes, seed=config.seed, device=device, ranks=Ranks())
    if pretrained := open_pretrained(config.model, lambda _: None):
        load_pretrained(network, pretrained)
    return network


def train(config: Config, run: str | Path, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Train as `fastflower train` does; the run folder, with checkpoints, metrics.jsonl and TensorBoard's events.

    Args:
        config: the settings.
        run: folder for the results.
        overwrite: replace a run that is already there.
        quiet: show no progress.

    Raises:
        UserError: the folder holds a run, bad data, settings that do not fit it, or a loss that is not finite.
        KeyboardInterrupt: by Ctrl-C or another signal to stop; all steps until then are saved.
    """
    console = _console(quiet)
    return train_run(config, name="", run=Path(run), checkpoint=None, overwrite=overwrite, console=console)


def evaluate(
    run: str | Path,
    *,
    root: str | Path | None = None,
    split: str = "val",
    crops: int = 1,
    scales: Sequence[int] = (),
) -> Evaluation:
    """The figures of a run's best checkpoint (or of a checkpoint file) on a split with classes.

    Args:
        run: a run folder or a checkpoint file.
        root: the data's folder; None = the run's.
        split: train, val or test.
        crops: 1 = the center of each picture, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.

    Raises:
        UserError: no such run, or data or views that do not fit it.
    """
    settings = EvaluationSettings((Path(root),) if root else None, views=Views(crops, tuple(scales)))
    return evaluate_run(Path(run), split, settings, _console(quiet=True)).metrics


def _console(quiet: bool) -> Console:
    """Where progress is shown, in whatever encoding that is."""
    stream: Any = sys.stdout and Tolerant(sys.stdout)
    return Console(file=stream, quiet=quiet)
