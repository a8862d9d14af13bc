"""Who said what of a run's settings: defaults, a resumed run, a file, the command line; and whether a recipe fits the
rest to the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from fastflower.config import Config
from fastflower.errors import UserError
from fastflower.settings import flattened, merge, nested, typed
from fastflower.together import first_misfit, settle

Recipe = Literal["auto", "finetune", "scratch"]
# What a recipe chooses (`fastflower.training.recipe`), where nobody has named it.
FITTED = (
    *("data.crop", "data.scale", "data.val_resize", "data.cache"),
    *("model.name", "model.pretrained"),
    *("train.epochs", "train.batch_size", "train.lr", "train.schedule", "train.warmup_epochs", "train.milestones"),
    *("train.label_smoothing", "train.nesterov"),
)
RECIPE = "recipe"  # the key of a YAML file that names one


@dataclass(frozen=True)
class Layer:
    """Settings that come from one place."""

    source: str  # for messages
    settings: Mapping[str, Any]  # nested, as in a YAML file


@dataclass(frozen=True)
class Layers:
    """Settings from several places, of which later ones win, and what is to be made of the others.

    A setting that does not fit another one, which only a later place named, follows it. Two that are named in one place
    and do not fit are refused.
    """

    named: tuple[Layer, ...] = ()
    recipe: Recipe | None = None  # fits to the data what nobody named

    @property
    def keys(self) -> set[str]:
        """The dotted keys that somebody named."""
        return {key for layer in self.named for key in flattened(layer.settings)}

    def typed(self) -> Config:
        """All that is named, over the defaults; whether it fits together is not asked.

        Raises:
            UserError: an unknown key or a bad value.
        """
        settings: dict[str, Any] = {}
        config = Config()
        for layer in self.named:
            settings = merge(settings, layer.settings)
            config = typed(settings, layer.source)
        return config

    def compose(self) -> tuple[Config, list[str]]:
        """The settings, and a sentence for each that follows another one that somebody named later.

        Raises:
            UserError: an unknown key, a bad value, or two that do not fit together.
        """
        config = self.typed()
        strength = {key: i for i, layer in enumerate(self.named, start=1) for key in flattened(layer.settings)}
        config, sentences = settle(config, strength)
        if rule := first_misfit(config):
            last = max(strength.get(key, 0) for key in rule.keys)
            raise UserError(f"{self.named[last - 1].source if last else 'defaults'}: {rule.problem(config)}.")
        return config, sentences

    def over(self, layer: Layer) -> Layers:
        """The same with `layer` below them all, and no recipe any more."""
        return replace(self, named=(layer, *self.named), recipe=None)


def for_other_pictures(demo: Layers) -> Layers:
    """The demo's settings where they are to train on other pictures than the built-in flowers.

    Its batch, and the rate for that, are for 2,400 pictures: with a few hundred the loss would explode.
    """
    (layer,) = demo.named
    flat = flattened(layer.settings)
    kept = {key: value for key, value in flat.items() if key not in ("train.batch_size", "train.lr")}
    return Layers((replace(layer, settings=nested(kept)),), recipe="scratch")


def split_recipe(settings: Mapping[str, Any], source: str) -> tuple[Recipe | None, dict[str, Any]]:
    """The recipe that a YAML file names, and the settings in it.

    Raises:
        UserError: there is no such recipe.
    """
    rest = {key: value for key, value in settings.items() if key != RECIPE}
    name = settings.get(RECIPE)
    if name is not None and name not in get_args(Recipe):
        raise UserError(f"{source}: {RECIPE} is {name!r}: choose one of {', '.join(get_args(Recipe))}.")
    return cast(Recipe | None, name), rest
