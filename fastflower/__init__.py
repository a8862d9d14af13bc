"""Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fastflower.files import lend_cache as _lend_cache

if _TYPE_CHECKING:
    from fastflower.api import (
        build_model,
        cross_validate,
        ensemble,
        evaluate,
        fit_config,
        load,
        load_config,
        load_data,
        predict,
        resume,
        train,
    )
    from fastflower.errors import UserError

__all__ = [
    "UserError",
    "build_model",
    "cross_validate",
    "ensemble",
    "evaluate",
    "fit_config",
    "load",
    "load_config",
    "load_data",
    "predict",
    "resume",
    "train",
]

_lend_cache()  # before anything is imported that looks for a place


def __getattr__(name: str) -> _Any:
    """The functions of fastflower.api, which import torch and DALI when the first of them is asked for."""
    if name == "UserError":
        from fastflower.errors import UserError

        return UserError
    if name in __all__:
        from fastflower import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is here for users, whether it has been asked for or not."""
    return __all__
