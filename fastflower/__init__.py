"""Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs."""

from pathlib import Path as _Path

# In a checkout, `kernels/` and `configs/` lie beside this folder, where an installation has them inside it. Without
# this, starting Python in the checkout would find this folder first and miss them.
_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").is_file() and (_checkout / "kernels" / "__init__.py").is_file():
    __path__.append(str(_checkout))
