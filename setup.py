"""Package of giantdet. Nothing to compile: pure Python on top of PyTorch and DeepSpeed."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="giantdet",
    version="0.1.0",
    description="Billion-parameter detectors trained with very large batches under DeepSpeed ZeRO",
    long_description=Path(__file__).with_name("README.md").read_text()
    if Path(__file__).with_name("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["giantdet", "giantdet.*"]),
    package_data={"giantdet": ["py.typed", "config/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.10",
        "torchvision>=0.25",
        "timm>=1.0.20",
        # The private attributes that optim/fragments.py reads are there since 0.19.7. 0.19.8 is the first to
        # skip non-finite steps at ZeRO-1 to 3 in float32 and at ZeRO-3 in bf16, which engine/faults.py needs.
        "deepspeed>=0.19.8",
        "pycocotools>=2.0.8",
        "einops>=0.8",
        "safetensors>=0.5",
        "pydantic>=2.9",
        "pillow>=10",
        "numpy>=1.26",
        "packaging",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy", "jsonschema", "ninja"]
    },
    entry_points={"console_scripts": ["giantdet=giantdet.cli:main"]},
)
