"""A trained run as everything after training takes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from fastflower.config import Config, DataConfig
from fastflower.data.view import Normalization
from fastflower.errors import UserError
from fastflower.files import digest
from fastflower.runtime.checkpoint import load_trained, weights_of
from fastflower.runtime.run_folder import RunFolder
from fastflower.settings import build

StoredSizes = Literal["all"] | tuple[int, ...]


@dataclass(frozen=True)
class Planned:
    """What is known of a run before it is trained, by which its data is looked at."""

    config: Config
    classes: list[str]

    def data(self, roots: tuple[Path, ...] | None, sizes: StoredSizes | None) -> DataConfig:
        """The run's data, in other folders or at other stored sizes where they are given.

        What the run leaves out (data.skip) is listed by file, and so not left out of folders that it does not know.
        """
        data = self.config.data
        if sizes is not None:
            data = replace(data, sizes=sizes)
        if roots is None:
            return data
        own = set(data.root or ())
        data = replace(data, root=roots).absolute()
        return data if own.issuperset(data.root or ()) else replace(data, skip=None)

    def trains_on(self, split: str, roots: tuple[Path, ...] | None) -> bool:
        """Whether the run trains on a split; not on that of folders that it does not know."""
        data = self.config.data
        own = roots is None or set(data.root or ()).issuperset(replace(data, root=roots).absolute().root or ())
        return own and split in data.train_on.split("+")


@dataclass(frozen=True)
class Trained(Planned):
    """A checkpoint and what belongs to it."""

    checkpoint: Path
    normalization: Normalization
    weights: dict[str, torch.Tensor]

    @property
    def folder(self) -> Path:
        """The run's; of a checkpoint that lies elsewhere, the one that it lies in."""
        parent = self.checkpoint.absolute().parent
        return parent.parent if parent.name == "checkpoints" else parent

    def result(self, path: Path) -> Path:
        """Where a result of this checkpoint goes, as `path` of its folder; of the best one just there, of another one
        with the checkpoint's name in it.
        """
        if self.checkpoint.absolute() == RunFolder(self.folder).best:
            return path
        return path.with_name(f"{path.stem}-{self.checkpoint.stem}{path.suffix}")


def open_trained(run: Path) -> Trained:
    """The best checkpoint of a run folder, or a checkpoint file.

    Raises:
        UserError: no such run or checkpoint.
    """
    path = run if run.is_file() else RunFolder(run).best
    if not path.is_file():
        raise UserError(_without_checkpoint(run, path))
    saved = load_trained(path)
    config = build(saved["config"], str(path))
    return Trained(config, saved["classes"], path, Normalization.of(saved["normalization"]), weights_of(saved))


def _without_checkpoint(run: Path, path: Path) -> str:
    """What to say of a folder that has no best checkpoint: it may be one of cross-validation, or one of runs."""
    folds = sorted(fold.parents[1] for fold in run.glob("fold-*/checkpoints/best.pt"))
    if folds:
        figures = ", ".join(map(str, sorted(run.glob("cv*.json"))))
        there = f"; its figures are in {figures}" if figures else ""
        return f"{run} holds the folds of a cross-validation{there}: give one of them, such as {folds[0]}."
    runs = sorted(checkpoint.parents[1] for checkpoint in run.glob("*/checkpoints/best.pt"))
    if runs:
        return f"{run} holds {len(runs)} run{'s' * (len(runs) > 1)}: give one of them, such as {runs[0]}."
    return f"{run} has no {path}: give a run folder that has finished an epoch, or a checkpoint file."


def weights_digest(trained: Trained) -> str:
    """Tells the weights apart from those of any other checkpoint."""
    parts: list[bytes | memoryview] = []
    for name, tensor in trained.weights.items():
        parts += [name.encode(), tensor.contiguous().view(-1).view(torch.uint8).numpy().data]
    return digest(*parts).hex()
