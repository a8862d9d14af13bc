"""A trained network at work on pictures of any origin: files, folders and patterns, or pixels in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console

from fastflower.arrays import Bytes, Singles
from fastflower.data.cache import Decoded
from fastflower.data.converted import UnreadableError, rgb
from fastflower.data.decoding import shapes_of
from fastflower.data.names import display_names
from fastflower.data.records import NO_LABEL, Records
from fastflower.data.sources.files import records_of_files
from fastflower.data.stamp import Stamp
from fastflower.errors import UserError, naming_arguments
from fastflower.evaluation.answers import answers_writer, require_form, require_top
from fastflower.evaluation.pictures import Pictures, faults, find_pictures, leave_out, read_pictures, require_some
from fastflower.evaluation.predictions import Predictions
from fastflower.evaluation.score import Scoring, ready_network, require_crops, softmax
from fastflower.evaluation.session import EvaluationSettings, Session, open_session, source
from fastflower.evaluation.trained_run import Trained, open_trained
from fastflower.runtime.output import without_decoders

KEY = "file"  # what the ids of pictures are called where they are written
AT_ONCE = 1024  # pictures of which a loader is made, and that are scored again where one turns out to be bad
PIXELS_AT_ONCE = 2**28  # bytes of pixels in memory that are copied at once

Picture = str | os.PathLike[str] | Bytes | Image.Image


@dataclass(frozen=True)
class Classifier:
    """A trained network that is ready for pictures (see `fastflower.load`)."""

    trained: Trained
    settings: EvaluationSettings
    classes: list[str]  # what the network tells apart, by the names to show, in the order of its outputs
    network: torch.nn.Module  # in evaluation mode, on its device: logits [N, num_classes] of images [N, 3, H, W]

    def __repr__(self) -> str:
        return f"Classifier({str(self.trained.checkpoint)!r}, {len(self.classes)} classes)"

    @naming_arguments()
    @without_decoders()
    def predict(self, pictures: Picture | Iterable[Picture]) -> Predictions:
        """Class probabilities of pictures.

        Args:
            pictures: one, or several in a list or another iterable. Either paths of files, folders and patterns, as
                `fastflower predict` takes them; or pixels: arrays uint8 RGB [H, W, 3], an array [N, H, W, 3], or PIL's
                pictures, which are turned upright by EXIF.

        Returns:
            In the order given `ids` [n], which are paths, or numbers from 0; `probabilities` [n, num_classes] float32;
            and `names` [n], the likeliest classes. Files that cannot be read are not among them, but in `unreadable`
            with the reason of each, and a warning says so.

        Raises:
            UserError: nothing can be read, or something is neither a path nor such pixels.
            KeyboardInterrupt: by Ctrl-C.
        """
        paths, pixels = _told_apart(pictures)
        with open_session(self.trained, self.settings, Console(quiet=True)) as session:
            if pixels:
                found, predicted = Pictures(), [*self._of_pixels(pixels, session)]
            else:
                found, records = find(paths, session)
                predicted = [
                    *self.of_files(records, found, session, source_of(self.trained, records, self.settings, session))
                ]
        return joined(predicted, self.classes, found.unreadable, above=4)

    def of_files(
        self, records: Records, pictures: Pictures, session: Session, made_from: dict[str, Any]
    ) -> Iterator[Predictions]:
        """Part by part, on every rank, the predictions of the pictures that `find` has found.

        What turns out to be none that can be decoded goes to what is unreadable.

        Args:
            records: the files.
            pictures: what was named.
            session: where; the processes share the records.
            made_from: where predictions come from, as they say it.

        Raises:
            UserError: nothing can be decoded, or scores are not finite.
            Stopped: a rank got a signal.
        """
        scoring = self._scoring()
        scoring.announce(len(records), session)
        count = 0
        for start in range(0, len(records), AT_ONCE):
            part = records.select(np.arange(start, min(start + AT_ONCE, len(records))))
            while len(part):
                try:
                    scores = self._scores(scoring, part, session)
                except UserError:
                    reasons = session.ranks.gather(faults(part) if session.ranks.is_main else None)[0]
                    if not reasons:
                        raise
                    part = leave_out(part, reasons, pictures)
                else:
                    yield self._predictions(part, scores, made_from)
                    break
            count += len(part)
        require_some(count, pictures)

    def _scores(self, scoring: Scoring, records: Records, session: Session, decoded: Decoded | None = None) -> Singles:
        views, shapes = self.settings.views, None
        if views.whole:
            with session.ranks.together():
                shapes = decoded.shapes if decoded else shapes_of(records)
                require_crops(shapes, records, scoring.data, views)
        return scoring.scores(records, shapes, session, decoded)

    def _of_pixels(self, pictures: Sequence[Bytes], session: Session) -> Iterator[Predictions]:
        """Part by part the predictions of pixels, uint8 RGB [H, W, 3] each."""
        scoring = self._scoring()
        start = 0
        for part in _portions(pictures):
            paths = [Path(f"picture {start + k}") for k in range(len(part))]
            ids = np.array([str(start + k) for k in range(len(part))])
            nowhere = [Stamp(0, 0, 0, 0)] * len(part)
            records = records_of_files(paths, nowhere, ids, np.full(len(part), NO_LABEL), mend="")
            yield self._predictions(records, self._scores(scoring, records, session, _together(part)), {})
            start += len(part)

    def _scoring(self) -> Scoring:
        return Scoring(self.trained, self.trained.data(None, None), self.settings, self.network)

    def _predictions(self, records: Records, scores: Singles, made_from: dict[str, Any]) -> Predictions:
        return Predictions("", self.trained.classes, records.ids, softmax(scores), records.labels, made_from)


def open_classifier(
    trained: Trained, settings: EvaluationSettings, session: Session, names: str | None = None
) -> Classifier:
    """A run's network on the session's device; `names` is as `fastflower.data.names.display_names` takes it.

    Raises:
        UserError: names that are not the classes', views that do not fit the network, or weights that are not finite.
    """
    shown = display_names(trained.classes, names)
    network = ready_network(trained, trained.data(None, None), settings, session)
    return Classifier(trained, settings, shown, network.eval())


def load(run: Path, settings: EvaluationSettings, names: str | None = None) -> Classifier:
    """A run's best checkpoint (or the checkpoint file `run`) for pictures; see `open_classifier`.

    Raises:
        UserError: no such run; or see there.
    """
    trained = open_trained(run)
    with open_session(trained, settings, Console(quiet=True)) as session:
        return open_classifier(trained, settings, session, names)


def find(given: Sequence[str | Path], session: Session) -> tuple[Pictures, Records]:
    """What is named by files, folders and patterns, and the records of what can be read of it, on every rank.

    Raises:
        UserError: nothing can be read.
    """
    with session.ranks.together():
        result = None
        if session.ranks.is_main:
            pictures = find_pictures(given)
            result = pictures, read_pictures(pictures, session.display.follow("read pictures"))
    found = session.ranks.gather(result)[0]
    assert found
    return found


def source_of(trained: Trained, records: Records, settings: EvaluationSettings, session: Session) -> dict[str, Any]:
    """Where predictions of pictures come from; see `fastflower.evaluation.session.source`."""
    return source(trained, None, trained.data(None, None), records, settings, session)


def predict_pictures(
    run: Path,
    given: Sequence[str | Path],
    settings: EvaluationSettings,
    console: Console,
    *,
    take: Callable[[Predictions, list[str]], None],
    names: str | None = None,
    out: Path | None = None,
    top: int,
) -> Pictures:
    """Predict pictures by a run's best checkpoint (or the checkpoint file `run`); see `find_pictures` for `given`.

    However many there are, what is kept of them meanwhile is bounded.

    Args:
        run: a run folder or a checkpoint file.
        given: files, folders and patterns.
        settings: by which views, and where.
        console: where progress is shown.
        take: gets predictions part by part, on every rank, and the names to show for the classes.
        names: see `open_classifier`.
        out: a file of them; see `fastflower.evaluation.answers.answers_writer`.
        top: how many classes of a picture are written into CSV and JSON.

    Returns:
        What was named, and what of it could not be read.

    Raises:
        UserError: no such run, names that are not the classes', views that do not fit, a file that cannot be written,
            or nothing can be read.
        Stopped: a signal came; there is no file then.
    """
    require_top(top)
    trained = open_trained(run)
    shown = display_names(trained.classes, names)
    with open_session(trained, settings, console) as session:
        with session.ranks.together():
            if out and session.ranks.is_main:
                require_form(out)
        pictures, records = find(given, session)
        classifier = open_classifier(trained, settings, session, names)
        made_from = source_of(trained, records, settings, session)
        form = Predictions(
            "", trained.classes, records.ids[:0], np.empty((0, len(shown)), np.float32), records.labels[:0], made_from
        )
        with answers_writer(out if session.ranks.is_main else None, form, shown, KEY, top) as write:
            for part in classifier.of_files(records, pictures, session, made_from):
                write(part)
                take(part, shown)
    return pictures


def collect_pictures(
    run: Path,
    given: Sequence[str | Path],
    settings: EvaluationSettings,
    console: Console,
    *,
    names: str | None = None,
    out: Path | None = None,
    top: int,
) -> Predictions:
    """What `predict_pictures` gives, as a whole, by the names to show for the classes.

    Raises:
        UserError: see there.
        Stopped: see there.
    """
    parts: list[Predictions] = []
    classes: list[str] = []

    def take(part: Predictions, shown: list[str]) -> None:
        parts.append(part)
        classes[:] = shown

    pictures = predict_pictures(run, given, settings, console, take=take, names=names, out=out, top=top)
    return joined(parts, classes, pictures.unreadable, above=6)


def refuse_split(*given: object) -> None:
    """Raise UserError where pictures are named and any of what is about a split is given too."""
    if any(given):
        raise UserError(
            "--split, --submission, --sample, --data.root and --data.sizes are about a split: drop them, or the "
            "pictures."
        )


def joined(
    predicted: Sequence[Predictions], classes: list[str], unreadable: dict[str, str], *, above: int
) -> Predictions:
    """Parts, of which there is at least one, as a whole, with other names for the classes; a warning names files that
    are not among them, in the frame that is so many `above` this one.
    """
    if unreadable:
        reasons = "; ".join(f"{name}: {why}" for name, why in unreadable.items())
        warnings.warn(f"{len(unreadable)} cannot be read as pictures: {reasons}.", stacklevel=1 + above)
    return replace(
        predicted[0],
        classes=classes,
        ids=np.concatenate([part.ids for part in predicted]),
        probabilities=np.concatenate([part.probabilities for part in predicted]),
        labels=np.concatenate([part.labels for part in predicted]),
        unreadable=unreadable,
    )


def _told_apart(pictures: Picture | Iterable[Picture]) -> tuple[list[Path], list[Bytes]]:
    """Paths or pixels, one of the two lists being empty; UserError where neither or both are given."""
    single = isinstance(pictures, str | os.PathLike | Image.Image) or getattr(pictures, "ndim", None) in (2, 3)
    try:
        given: list[Any] = [pictures] if single else list(pictures)  # type: ignore[arg-type]
    except TypeError:
        given = [pictures]
    paths = [Path(picture) for picture in given if isinstance(picture, str | os.PathLike)]
    pixels = [_pixels(picture) for picture in given if not isinstance(picture, str | os.PathLike)]
    if any(isinstance(picture, str) and not picture for picture in given):
        raise UserError("a path is empty: name the pictures, or a dot for the folder you are in.")
    if bool(paths) == bool(pixels):
        what = "both paths and pixels" if paths else "no pictures"
        raise UserError(f"pictures has {what}: give paths, or arrays, in a list.")
    return paths, pixels


def _pixels(picture: Any) -> Bytes:
    """A picture's pixels, uint8 RGB [H, W, 3]; UserError where it is no picture."""
    if isinstance(picture, Image.Image):
        try:
            return rgb(ImageOps.exif_transpose(picture))
        except UnreadableError as error:
            raise UserError(f"a picture of PIL's mode {picture.mode} has no colors ({error}): convert it.") from error
        except OSError as error:  # its file is read only now
            raise UserError(f"a picture of PIL's cannot be decoded ({error}): leave it out.") from error
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{type(picture).__name__} is no picture: give a path, an array uint8 [H, W, 3] or PIL's.")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UserError(f"an array of {picture.dtype} {list(picture.shape)} is no picture: give uint8 RGB [H, W, 3].")
    return picture


def _portions(pictures: Sequence[Bytes]) -> Iterator[list[Bytes]]:
    """All pictures, so many together as PIXELS_AT_ONCE and AT_ONCE allow, but at least one."""
    portion: list[Bytes] = []
    size = 0
    for picture in pictures:
        if portion and (size + picture.nbytes > PIXELS_AT_ONCE or len(portion) == AT_ONCE):
            yield portion
            portion, size = [], 0
        portion.append(picture)
        size += picture.nbytes
    yield portion


def _together(pictures: Sequence[Bytes]) -> Decoded:
    """Pictures [H, W, 3] as loaders take pixels in memory."""
    sizes = np.array([picture.size for picture in pictures], np.int64)
    shapes = np.array([picture.shape[:2] for picture in pictures], np.int64)
    return Decoded(shapes, np.cumsum(sizes) - sizes, np.concatenate([picture.reshape(-1) for picture in pictures]))
