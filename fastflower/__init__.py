"""Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fastflower.files import lend_cache as _lend_cache

if _TYPE_CHECKING:
    from fastflower.api import build_model, evaluate, load_config, load_data, train
    from fastflower.errors import UserError

__all__ = ["UserError", "build_model", "evaluate", "load_config", "load_data", "train"]

# In a checkout, `kernels/` and `configs/` lie beside this folder, where an installation has them inside it. Without
# this, starting Python in the checkout would find this folder first and miss them.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))


_lend_cache()  # before anything is imported that looks for a place


def __getattr__(name: str) -> _Any:
    """The functions of fastflower.api, which import torch and DALI when the first of them is asked for."""
    if name == "UserError":
        from fastflower.errors import UserError

        return UserError
    if name in __all__:
        from fastflower import api as library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
