"""What was meant by a name that there is not: names of other programs, and names that are nearly ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

# What other programs call it, and the options that it may be here, of which a command takes the first that it has.
MEANT = {
    "learning_rate": ["train.lr"],
    "lr0": ["train.lr"],
    "base_lr": ["train.lr"],
    "batch": ["train.batch_size", "batch_size"],
    "b": ["train.batch_size", "batch_size"],
    "bs": ["train.batch_size", "batch_size"],
    "batchsize": ["train.batch_size", "batch_size"],
    "batch_size": ["train.batch_size", "batch_size"],
    "imgsz": ["data.crop", "size"],
    "img": ["data.crop", "size"],
    "img_size": ["data.crop", "size"],
    "image_size": ["data.crop", "size"],
    "input_size": ["data.crop", "size"],
    "crop_size": ["data.crop"],
    "crop": ["data.crop", "crops"],
    "size": ["data.crop", "data.sizes"],
    "resize": ["data.val_resize"],
    "wd": ["train.weight_decay"],
    "arch": ["model.name"],
    "a": ["model.name"],
    "model": ["model.name", "run"],
    "network": ["model.name"],
    "backbone": ["model.name"],
    "epoch": ["train.epochs"],
    "e": ["train.epochs"],
    "num_epochs": ["train.epochs"],
    "workers": ["data.threads"],
    "num_workers": ["data.threads"],
    "j": ["data.threads"],
    "pretrained": ["model.pretrained"],
    "weights": ["model.pretrained", "run"],
    "checkpoint": ["resume", "run"],
    "ckpt": ["resume", "run"],
    "output": ["out", "run"],
    "out": ["run"],
    "output_dir": ["out", "run"],
    "out_dir": ["out", "run"],
    "o": ["out", "run"],
    "save_dir": ["out", "run"],
    "data": ["data.root", "root"],
    "dataset": ["data.root", "root"],
    "data_dir": ["data.root", "root"],
    "data_path": ["data.root", "root"],
    "d": ["data.root", "root"],
    "images": ["pictures", "data.root"],
    "input": ["pictures", "data.root"],
    "source": ["pictures", "data.root"],
    "warmup": ["train.warmup_epochs"],
    "opt": ["train.optimizer"],
    "scheduler": ["train.schedule"],
    "lr_scheduler": ["train.schedule"],
    "smoothing": ["train.label_smoothing"],
    "half": ["amp"],
    "fp16": ["amp"],
    "gpu": ["device"],
    "gpus": ["device"],
    "cfg": ["config"],
    "c": ["config"],
    "k": ["folds"],
}
COMMANDS = {
    "fit": "train",
    "evaluate": "eval",
    "val": "eval",
    "validate": "eval",
    "test": "eval",
    "infer": "predict",
    "inference": "predict",
    "predictions": "predict",
    "crossval": "cv",
    "compare": "report",
    "info": "doctor",
}


def meant(name: str, names: Collection[str]) -> str | None:
    """The one of the dotted names that a word certainly means: by what others call it, or by its last part alone.

    Args:
        name: with underscores, without dashes in front.
        names: those that there are, such as train.batch_size.
    """
    word = name.lower()
    for other in (word, word.rpartition(".")[2]):
        if known := next((dotted for dotted in MEANT.get(other, ()) if dotted in names), None):
            return known
        last = [dotted for dotted in names if dotted.rpartition(".")[2] == other]
        if len(last) == 1:
            return last[0]
    return None


def nearest(name: str, names: Collection[str]) -> str | None:
    """The dotted name that a word is most like, wherever it stands; None if it is like none."""
    word = name.lower()
    if certain := meant(name, names):
        return certain
    if near := difflib.get_close_matches(word, names, n=1):
        return near[0]
    by_last = {dotted.rpartition(".")[2]: dotted for dotted in names}
    return next((by_last[last] for last in difflib.get_close_matches(word, by_last, n=1)), None)


def nearest_command(word: str, names: Sequence[str]) -> str | None:
    """The command that was meant, such as "data check" for check."""
    if word.lower() in COMMANDS:
        return COMMANDS[word.lower()]
    by_last = {name.rpartition(" ")[2]: name for name in names} | {name: name for name in names}
    return next((by_last[last] for last in difflib.get_close_matches(word.lower(), by_last, n=1)), None)
