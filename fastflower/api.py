"""The steps of a run as functions, for notebooks and programs of your own: `import fastflower`.

Everything runs in this process and on its own; many GPUs are the command line's business (torchrun).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastflower.config import Config, Split, resolve
from fastflower.data.batches import Batches, open_batches
from fastflower.data.dataset import with_folders
from fastflower.errors import UserError, naming_arguments
from fastflower.evaluation import classifier, crossval
from fastflower.evaluation.answers import TOP
from fastflower.evaluation.classifier import Classifier
from fastflower.evaluation.combine import Method
from fastflower.evaluation.crossval import CrossValidation
from fastflower.evaluation.ensemble import Ensembled, ensemble_runs
from fastflower.evaluation.evaluate import evaluate_run
from fastflower.evaluation.predict import predict_run
from fastflower.evaluation.predictions import Predictions
from fastflower.evaluation.session import EvaluationSettings
from fastflower.evaluation.trained_run import StoredSizes
from fastflower.evaluation.views import Views
from fastflower.given import Count, Paths, Sizes, StrPath, path_of, paths_of, reading_arguments, text_of
from fastflower.layers import Layer, Layers, Recipe, split_recipe
from fastflower.runtime.checkpoint import load_trained
from fastflower.runtime.device import choose_device
from fastflower.runtime.distributed import Ranks
from fastflower.runtime.output import Console, Tolerant, without_decoders
from fastflower.runtime.progress import Display
from fastflower.runtime.run_folder import find_checkpoint
from fastflower.settings import find_config, flattened, load_yaml, merge, nested, to_plain
from fastflower.training.metrics import Evaluation
from fastflower.training.network import build_network
from fastflower.training.pretrained import load_pretrained, open_pretrained
from fastflower.training.run import settings_alone, train_run
from fastflower.training.setup import require_two_values

Settings = Mapping[str, Any]  # nested, as in a file, or by dotted keys
SETTINGS = "settings"  # what messages call those that are given as an argument


@naming_arguments()
def load_config(source: StrPath | None = None, settings: Settings | None = None) -> Config:
    """A configuration: the defaults, then a file's, then your own.

    Args:
        source: a YAML file, or the name of one that comes with fastflower ("demo", "resnet34", ...).
        settings: nested as in the file, {"data": {"root": "DATA"}}, or by dotted keys, {"train.epochs": 10}, or both.

    Raises:
        UserError: no such file, an unknown key, or a bad value; says which of the two has it.
    """
    if not isinstance(source, str | os.PathLike | None):
        raise UserError(f"source is {type(source).__name__}: give a file or a name, and your own settings as settings.")
    named = []
    if source is not None:
        path = find_config(Path(source))
        recipe, of_file = split_recipe(load_yaml(path), str(path))
        if recipe:
            raise UserError(f"{path} is a recipe, which needs pictures: call fit_config(root, recipe={recipe!r}).")
        named.append(Layer(str(path), of_file))
    config, sentences = Layers((*named, Layer(SETTINGS, _named(settings)))).compose()
    for sentence in sentences:
        warnings.warn(sentence, stacklevel=3)
    return resolve(config)


@naming_arguments()
@reading_arguments
def fit_config(
    root: Paths, settings: Settings | None = None, *, recipe: Recipe = "auto", quiet: bool = False
) -> Config:
    """A configuration that fits the pictures in a folder, or in several, as `fastflower train PICTURES` makes it.

    Args:
        root: the folder, or several that are taken together.
        settings: your own, as `load_config` takes them; the rest is fitted around them.
        recipe: finetune = from ImageNet's weights, scratch = without, auto = with them where they can be had.
        quiet: do not show what is chosen and why.

    Raises:
        UserError: bad data, a bad setting, no such recipe, or finetune without weights.
    """
    folders, own = [str(folder) for folder in paths_of(root) or ()], _named(settings)
    if "data.root" in flattened(own):
        raise UserError(f"{SETTINGS}: data.root names pictures beside root: leave it out.")
    named = merge(own, {"data": {"root": folders}})
    return settings_alone(Layers((Layer(SETTINGS, named),), recipe), _console(quiet))


@naming_arguments()
@without_decoders()
@reading_arguments
def load_data(config: Config | Settings) -> Batches:
    """Both splits: classes in `dataset.classes`, training batches of an epoch by `train.epoch(number)`, validation's by
    `val.once()`. A batch has `images` [N, 3, S, S], normalized and channels-last, `labels` [N] and `indices` [N].

    Raises:
        UserError: bad data, settings that do not fit it or this machine, or pretrained weights that cannot be had.
    """
    config, ranks = _configured(config), Ranks()
    display = Display(_console(quiet=True), shown=False)
    data = with_folders(config.data, ranks, display)
    pretrained = open_pretrained(config.model, lambda _: None)
    inherited = pretrained.normalization if pretrained else None
    device, batch_size = choose_device(config.device), config.train.pictures
    batches = open_batches(data, device, ranks, display, batch_size=batch_size, seed=config.seed, inherited=inherited)
    require_two_values(config, batches.train)
    return batches


@naming_arguments()
@reading_arguments
def build_model(config: Config | Settings, classes: Count) -> torch.nn.Module:
    """The configured network: logits [N, classes] for images [N, 3, H, W], with seeded or pretrained weights.

    Raises:
        UserError: settings that do not fit together, or pretrained weights that cannot be had.
    """
    config = _configured(config)
    device = choose_device(config.device)
    network = build_network(config.model, classes, seed=config.seed, device=device, ranks=Ranks())
    if pretrained := open_pretrained(config.model, lambda _: None):
        load_pretrained(network, pretrained)
    return network


@naming_arguments()
@without_decoders()
@reading_arguments
def train(config: Config | Settings, run: StrPath, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Train as `fastflower train` does; the run folder, with checkpoints, metrics.jsonl and TensorBoard's events.

    Args:
        config: a configuration; or settings as `load_config` takes them, of which what they do not name is fitted to
            the pictures in data.root, where they name those, as by `fit_config`.
        run: folder for the results.
        overwrite: replace a run that is already there.
        quiet: show no progress.

    Raises:
        UserError: the folder holds a run, bad data, settings that do not fit it, or a loss that is not finite.
        KeyboardInterrupt: by Ctrl-C or another signal to stop; all steps until then are saved.
    """
    return train_run(
        _layers(config), name="", run=Path(run), checkpoint=None, overwrite=overwrite, console=_console(quiet)
    )


@naming_arguments()
@without_decoders()
@reading_arguments
def resume(run: StrPath, settings: Settings | None = None, *, quiet: bool = False) -> Path:
    """Go on with a run as `fastflower train --resume` does; the run folder.

    Args:
        run: a run folder (its last checkpoint) or a checkpoint file in one.
        settings: what is to be other than before, as `load_config` takes it, such as {"train.epochs": 20}.
        quiet: show no progress.

    Raises:
        UserError: there is nothing to go on from, or as `train`.
        KeyboardInterrupt: as of `train`.
    """
    checkpoint = find_checkpoint(os.fspath(run), None, "")
    if checkpoint is None:
        raise UserError(f"{run} is no run: give a run folder or a checkpoint file.")
    before: dict[str, Any] = load_trained(checkpoint)["config"]
    layers = Layers((Layer(str(checkpoint), before), Layer(SETTINGS, _named(settings))))
    layers.compose()  # what is wrong is said before anything is begun
    return train_run(layers, name="", run=None, checkpoint=checkpoint, overwrite=False, console=_console(quiet))


@naming_arguments()
@without_decoders()
@reading_arguments
def evaluate(
    run: StrPath,
    *,
    root: Paths | None = None,
    split: Split = "val",
    crops: int = 1,
    scales: Sizes = (),
) -> Evaluation:
    """The figures of a run's best checkpoint (or of a checkpoint file) on a split with classes.

    Args:
        run: a run folder or a checkpoint file.
        root: the data's folder, or several; None = the run's.
        split: train, val or test.
        crops: 1 = the center of each picture, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.

    Raises:
        UserError: no such run, or data or views that do not fit it.
    """
    settings = EvaluationSettings(paths_of(root), views=Views(crops, tuple(scales)))
    return evaluate_run(Path(run), split, settings, _console(quiet=True)).metrics


@naming_arguments()
@reading_arguments
def load(
    run: StrPath,
    *,
    crops: int = 1,
    scales: Sizes = (),
    names: StrPath | None = None,
    device: Literal["run", "auto", "cpu", "cuda"] = "run",
    batch_size: Count | None = None,
) -> Classifier:
    """A run's network (of its best checkpoint, or of a checkpoint file) that is ready for pictures.

    Its `predict` takes paths, arrays or PIL's pictures, its `classes` are the names in the order of the network's
    outputs, and its `network` is the torch module, on its device and in evaluation mode.

    Args:
        run: a run folder or a checkpoint file.
        crops: 1 = the center of each picture, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.
        names: of the classes: a JSON list, a text file with one a line, or "kaggle104"; None = the data's.
        device: where the network runs; run = as in training.
        batch_size: crops at once; None = as in training.

    Raises:
        UserError: no such run, views that do not fit it, or names that are not the classes'.
    """
    settings = EvaluationSettings(views=Views(crops, tuple(scales)), device=device, batch_size=batch_size)
    return classifier.load(Path(run), settings, text_of(names))


@naming_arguments()
@without_decoders()
@reading_arguments
def predict(
    run: StrPath,
    pictures: Paths | None = None,
    *,
    split: Split | None = None,
    root: Paths | None = None,
    sizes: StoredSizes | None = None,
    crops: int = 1,
    scales: Sizes = (),
    out: StrPath | None = None,
    top: Count = TOP,
    submission: StrPath | None = None,
    sample: StrPath | None = None,
    names: StrPath | None = None,
) -> Predictions:
    """Class probabilities of pictures, or of a split of the run's data, as `fastflower predict` gives them.

    Args:
        run: a run folder or a checkpoint file.
        pictures: a file, a folder, a pattern, or several of them; None = a split is predicted.
        split: train, val or test; None = test, where no pictures are given.
        root: the split's data folder, or several; None = the run's.
        sizes: stored sizes of the split to take (pixels), or "all"; None = see `fastflower predict --help`.
        crops: 1 = the center of each picture, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.
        out: file of the predictions, .csv, .json or .parquet; None = no file, or of a split
            predictions-SPLIT.parquet in the run folder.
        top: classes of each picture in .csv and .json, the likeliest first.
        submission: the competition's CSV of a split; None = none is written.
        sample: a sample submission.
        names: of the classes, as `load` takes them.

    Returns:
        `ids` [n], paths or a split's ids; `probabilities` [n, num_classes] float32; `names` [n], the likeliest classes;
        and files that cannot be read, with the reason of each, in `unreadable`, of which a warning is given.

    Raises:
        UserError: no such run, pictures, data or views that do not fit it, or a file that cannot be written.
        KeyboardInterrupt: by Ctrl-C.
    """
    settings = EvaluationSettings(paths_of(root), sizes, Views(crops, tuple(scales)))
    console, shown = _console(quiet=True), text_of(names)
    given, of_split = paths_of(pictures), (split, root, sizes, submission, sample)
    if given is not None:
        if not given:
            raise UserError("pictures is empty: give paths, or none at all to predict a split.")
        classifier.refuse_split(*of_split)
        return classifier.collect_pictures(Path(run), given, settings, console, names=shown, out=path_of(out), top=top)
    predictions, classes = predict_run(
        Path(run),
        split or "test",
        settings,
        console,
        out=path_of(out),
        submission=path_of(submission),
        sample=path_of(sample),
        names=shown,
        top=top,
    )
    return replace(predictions, classes=classes)


@naming_arguments()
@without_decoders()
@reading_arguments
def ensemble(
    members: Sequence[StrPath],
    method: Method = "vote",
    *,
    split: Split = "test",
    root: Paths | None = None,
    crops: int = 1,
    scales: Sizes = (),
    mix_views: bool = False,
    fit_on: Sequence[StrPath] = (),
    out: StrPath | None = None,
    submission: StrPath | None = None,
    sample: StrPath | None = None,
) -> Ensembled:
    """Combine networks as `fastflower ensemble` does.

    Args:
        members: run folders, checkpoints, folders of cross-validation or predictions files, at least two.
        method: vote, mean or weighted.
        split: which of a run's.
        root: the data's folder, or several, for what is predicted now; None = each run's.
        crops: 1 = runs are predicted by the center of each picture, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.
        mix_views: combine members that were predicted by other crops or scales than others.
        fit_on: predictions to fit the weights on, one for each member; empty = the runs' val.
        out: a file of the predictions, .csv, .json or .parquet; None = none is written.
        submission: the competition's CSV; None = none is written.
        sample: a sample submission.

    Returns:
        `predictions` of the ensemble, `rows` with the figures of each member and of all, and `notes`.

    Raises:
        UserError: members that cannot be had or combined, or a file that cannot be written.
    """
    return ensemble_runs(
        paths_of(members) or (),
        method,
        split,
        _console(quiet=True),
        roots=paths_of(root),
        views=Views(crops, tuple(scales)),
        mix_views=mix_views,
        fit_on=paths_of(fit_on) or (),
        out=path_of(out),
        submission=path_of(submission),
        sample=path_of(sample),
    )


@naming_arguments()
@without_decoders()
@reading_arguments
def cross_validate(
    config: Config | Settings,
    run: StrPath,
    *,
    folds: Count | None = None,
    overwrite: bool = False,
    crops: int = 1,
    scales: Sizes = (),
    test: bool = False,
    submission: StrPath | None = None,
    quiet: bool = False,
) -> CrossValidation:
    """Cross-validate as `fastflower cv` does; the same call again goes on where it was stopped.

    Args:
        config: the settings: a configuration, or a dict as `load_config` takes it.
        run: folder for the folds, and for what they give together.
        folds: how many; None = data.folds, or else 5.
        overwrite: begin anew, and replace the folds that are already there.
        crops: 1 = each picture is predicted by its center, or 10.
        scales: shorter sides (pixels) at which all positions are averaged; empty = crops.
        test: also predict the test split, by the mean of the folds' networks.
        submission: write those predictions as the competition's CSV; None = none is written.
        quiet: show no progress.

    Returns:
        The figures of the `folds`, their `mean` and `std`, and those of all predictions together, `whole`.

    Raises:
        UserError: as `train`; or the folder holds folds of other settings.
        KeyboardInterrupt: as of `train`.
    """
    layers = _layers(config)
    folds = (layers.typed().data.folds or 5) if folds is None else folds
    divided = Layer("config", {"data": {"folds": folds, "fold": 0}})
    return crossval.cross_validate(
        replace(layers, named=(*layers.named, divided)),
        name="",
        run=Path(run),
        overwrite=overwrite,
        views=Views(crops, tuple(scales)),
        test=test,
        submission=path_of(submission),
        console=_console(quiet),
    )


def _configured(config: Any) -> Config:
    """A configuration, which may be given as its settings."""
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return load_config(settings=config)
    raise UserError(f"config is {type(config).__name__}: give what load_config returns, or a dict of settings.")


def _layers(config: Any) -> Layers:
    """What is to be trained: a configuration as it is, and a dict that names pictures with the recipe's rest."""
    if isinstance(config, Mapping) and flattened(named := _named(config)).get("data.root"):
        return Layers((Layer("config", named),), recipe="auto")
    return Layers((Layer("config", to_plain(_configured(config))),))


def _named(settings: Settings | None) -> dict[str, Any]:
    if not isinstance(settings, Mapping | None):
        raise UserError(f"settings is {type(settings).__name__}: give a dict, such as {{'train.epochs': 10}}.")
    return nested(settings or {}, SETTINGS)


def _console(quiet: bool) -> Console:
    """Where progress is shown, in whatever encoding that is."""
    stream: Any = sys.stdout and Tolerant(sys.stdout)
    return Console(file=stream, quiet=quiet)
