"""Scores of records by a trained network: what evaluation, predictions, ensembles and folds start from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fastflower.arrays import Floats, Ints, Singles
from fastflower.config import DataConfig
from fastflower.data.batches import EvaluationBatches, WholePictures, choose_engine, evaluation_batches, whole_pictures
from fastflower.data.cache import Decoded
from fastflower.data.decoding import shapes_of
from fastflower.data.loader import Loading
from fastflower.data.records import Records
from fastflower.errors import UserError
from fastflower.evaluation.session import EvaluationSettings, Session
from fastflower.evaluation.trained_run import Planned, Trained
from fastflower.evaluation.views import Scorer, Views
from fastflower.runtime.checkpoint import first_non_finite, require_fit
from fastflower.runtime.device import Precision, choose_precision
from fastflower.runtime.distributed import Ranks
from fastflower.training.metrics import Evaluation, EvaluationSums
from fastflower.training.network import build_network
from fastflower.training.validate import outputs

OTHER = "give another checkpoint, or train again with a lower train.lr"
AT_ONCE = 2**22  # scores, of records times classes, that are looked at together: 16 MB in float32
LOADED = 4  # so many times as many are computed together, since each time a loader is built


def score(
    trained: Trained, data: DataConfig, records: Records, settings: EvaluationSettings, session: Session
) -> Singles:
    """Scores [n, num_classes] float32 of all records, on every rank; see `scored`."""
    scores = np.empty((len(records), len(trained.classes)), np.float32)
    for part, of_part in scored(trained, data, records, settings, session):
        scores[part] = of_part
    return scores


def scored(
    trained: Trained, data: DataConfig, records: Records, settings: EvaluationSettings, session: Session
) -> Iterator[tuple[slice, Singles]]:
    """Part by part of the records (see `parts`) their scores [n, num_classes] float32, on every rank.

    Args:
        trained: the run.
        data: geometry and resources of the loader.
        records: what to score.
        settings: how.
        session: where; the processes share the records.

    Raises:
        UserError: see `ready` and `Scoring.scores`.
        Stopped: a rank got a signal.
    """
    network, shapes = ready(trained, data, records, settings, session)
    scoring = Scoring(trained, data, settings, network)
    scoring.announce(len(records), session)
    for part in parts(len(records), len(trained.classes), LOADED):
        of_part = records.select(np.arange(part.start, part.stop))
        scores = scoring.scores(of_part, None if shapes is None else shapes[part], session)
        for piece in parts(*scores.shape):
            yield slice(part.start + piece.start, part.start + piece.stop), scores[piece]


class Scoring:
    """A network that is ready to look at pictures by some views, for any number of tables of records."""

    def __init__(
        self, trained: Trained, data: DataConfig, settings: EvaluationSettings, network: torch.nn.Module
    ) -> None:
        """`network` is that of `ready_network`; see `scored` for the rest."""
        self.trained, self.data, self.settings = trained, data, settings
        views = settings.views
        self._passes = views.passes(data)
        self._scorer = views.scorer(network.eval(), data.crop, compiled=settings.compiled)

    def announce(self, count: int, session: Session) -> None:
        """Show from now on how many of so many records are scored."""
        ranks = session.ranks
        session.display.task("score", len(self._passes) * len(range(ranks.rank, count, ranks.world_size)))

    @torch.no_grad()
    def scores(
        self, records: Records, shapes: Ints | None, session: Session, decoded: Decoded | None = None
    ) -> Singles:
        """Scores [n, num_classes] float32, whose softmax is class probabilities, on every rank.

        By one crop they are the network's logits, by more views the logarithm of the mean probability.

        Args:
            records: at least one.
            shapes: see `ready`.
            session: where; the processes share the records.
            decoded: the records' pixels, where they are in memory.

        Raises:
            UserError: a record cannot be decoded, or scores are not finite.
            Stopped: a rank got a signal.
        """
        trained, data, device = self.trained, self.data, session.device
        config = trained.config
        precision = choose_precision(config.amp, config.amp_dtype, device)
        engine = choose_engine(data, device, session.ranks)
        loading = Loading(trained.normalization, engine, device, session.ranks)
        size = self.settings.batch_size or config.train.pictures
        passes: list[Singles] = []
        for geometry in self._passes:
            batches: EvaluationBatches | WholePictures
            if shapes is None:
                batches = evaluation_batches(geometry, records, loading, batch_size=size, decoded=decoded)
            else:
                batches = whole_pictures(geometry, records, shapes, loading, batch_size=size, decoded=decoded)
            of_pass = _one_pass(self._scorer, batches, len(trained.classes), precision, session)
            sound = np.isfinite(of_pass).all(axis=1)
            if not sound.all():
                first = records.describe(int(np.argmin(sound)))
                raise UserError(
                    f"{trained.checkpoint} gives outputs that are not finite, in {precision}, and so no class, for "
                    f"{len(of_pass) - sound.sum()} of {len(of_pass)} records, the first being {first}: {OTHER}."
                )
            passes.append(of_pass)
        return passes[0] if len(passes) == 1 else _log_mean(passes)


def parts(records: int, classes: int, times: int = 1) -> list[slice]:
    """All of so many records, one part after another, each of at most so many times AT_ONCE scores."""
    size = max(1, times * AT_ONCE // classes)
    return [slice(start, min(start + size, records)) for start in range(0, records, size)]


def ready(
    planned: Planned, data: DataConfig, records: Records, settings: EvaluationSettings, session: Session
) -> tuple[torch.nn.Module, Ints | None]:
    """What scoring needs and can be refused before the first picture is: the network, and [n, 2] the heights and widths
    of the pictures where the views need them.

    Args:
        planned: the run; one that is not trained yet has seeded weights.
        data: geometry and resources of the loader.
        records: what to score.
        settings: how.
        session: where.

    Raises:
        UserError: views that do not fit the network or the pictures, a record that cannot be read, or weights that are
            not finite.
    """
    network = ready_network(planned, data, settings, session)
    shapes = None
    with session.ranks.together():
        if settings.views.whole:
            shapes = require_crops(shapes_of(records), records, data, settings.views)
    return network, shapes


def ready_network(
    planned: Planned, data: DataConfig, settings: EvaluationSettings, session: Session
) -> torch.nn.Module:
    """The network on its device, by views that fit it; see `ready`.

    Raises:
        UserError: views that do not fit the network, or weights that are not finite.
    """
    config, device, ranks = planned.config, session.device, session.ranks
    settings.views.check(data, config.model.name)
    choose_engine(data, device, ranks)
    network = build_network(config.model, len(planned.classes), seed=config.seed, device=device, ranks=ranks)
    if isinstance(planned, Trained):
        if name := first_non_finite(planned.weights):
            raise UserError(f"{planned.checkpoint} holds weights that are not finite ({name}): {OTHER}.")
        require_fit(network, planned.weights, planned.checkpoint)
        network.load_state_dict(planned.weights)
    return network


def require_crops(shapes: Ints, records: Records, data: DataConfig, views: Views) -> Ints:
    """The heights and widths that are given, [n, 2]; UserError where ten crops of a picture would be the same."""
    small = shapes.min(axis=1) <= data.crop
    if views.crops > 1 and data.val_resize is None and small.any():
        index = int(np.argmax(small))
        height, width = shapes[index]
        raise UserError(
            f"{records.describe(index)} is {width}×{height} pixels, of which there are no ten crops of {data.crop}: "
            "give larger stored sizes with --data.sizes, or --crops 1."
        )
    return shapes


def _one_pass(
    scorer: Scorer,
    batches: EvaluationBatches | WholePictures,
    classes: int,
    precision: Precision,
    session: Session,
) -> Singles:
    """[n, classes] float32, gathered from all ranks."""
    indices, scores = [], []
    together = session.ranks.lockstep(batches.once(), session.signals)
    for batch, logits in outputs(scorer, together, device=session.device, precision=precision):
        indices.append(batch.indices)
        scores.append(logits.float())
        session.display.advance(len(batch.indices))
    mine = (np.concatenate(indices), torch.cat(scores).cpu().numpy()) if scores else None
    gathered = np.full((len(batches.loader.records), classes), np.nan, np.float32)
    for part in session.ranks.gather(mine):
        if part:
            gathered[part[0]] = part[1]
    return gathered


def _log_mean(passes: list[Singles]) -> Singles:
    """Logarithm of the mean of the probabilities whose logarithms are given."""
    mean: Floats = np.logaddexp.reduce(np.stack(passes).astype(np.float64)) - np.log(len(passes))
    return mean.astype(np.float32)


def softmax(scores: Singles) -> Singles:
    """Class probabilities [n, num_classes] of scores, whose first greatest is that of the scores."""
    probabilities = np.empty_like(scores)
    for part in parts(*scores.shape):
        exact = torch.from_numpy(scores[part]).double().softmax(1).numpy()
        probabilities[part] = to_single(exact, scores[part].argmax(axis=1))
    return probabilities


def to_single(values: Floats, best: Ints) -> Singles:
    """Float64 [n, C] as float32, with `best` [n], each row's greatest, still the first of the greatest ones."""
    single = values.astype(np.float32)
    lost = np.flatnonzero(single.argmax(axis=1) != best)  # rounding has made an earlier one equal
    single[lost, best[lost]] = np.nextafter(single[lost].max(axis=1), np.float32(np.inf))
    return single


def metrics(scores: Singles | Floats, labels: Ints) -> Evaluation:
    """Loss, top-1, top-5 and macro F1 of scores [n, num_classes] against labels [n]."""
    sums = EvaluationSums(scores.shape[1], torch.device("cpu"))
    for part in parts(*scores.shape):
        sums.add(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    return sums.result(Ranks())
