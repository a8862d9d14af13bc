"""Package metadata. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import setup

setup(
    name="fastflower",
    version="0.1.0",
    description="Train image classifiers fast: DALI input, plain and residual networks, mixed precision, many GPUs",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "fastflower",
        "fastflower.configs",
        "fastflower.data",
        "fastflower.data.sources",
        "fastflower.evaluation",
        "fastflower.kernels",
        "fastflower.models",
        "fastflower.report",
        "fastflower.runtime",
        "fastflower.training",
    ],
    package_data={
        "fastflower": ["py.typed"],
        "fastflower.configs": ["*.yaml"],
        "fastflower.data": ["*.txt"],
        "fastflower.report": ["*.html"],
    },
    entry_points={"console_scripts": ["fastflower = fastflower.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "triton; platform_system == 'Linux'",  # the version that torch pins
        "nvidia-dali-cuda120>=2.0",
        "matplotlib>=3.8",
        "llvmlite",  # the version that numba pins
        "numba>=0.60",
        "numpy>=1.26",
        "rich>=13",
        "pydantic>=2.7",
        "typing-extensions>=4.6",  # TypedDict in the form that pydantic reads
        "pyyaml>=6",
        "pillow>=10",
        "pyarrow>=15",
        "tensorboard>=2.16",
        "safetensors>=0.4.3",
        "simplejpeg>=1.7.2",
        "google-crc32c>=1.5",
    ],
    extras_require={
        "heif": ["pillow-heif>=0.13"],  # what phones write as .heic
        "bench": ["tyro>=1.0", "torchvision", "timm"],  # options of bench/, and what its --peers are
        "test": [
            "pandas",
            "pillow-heif>=0.13",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "torchvision",
            "tfrecord",
            "tyro>=1.0",
            "scikit-learn",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "import-linter>=2.5",
            "types-PyYAML",
        ],
    },
)
