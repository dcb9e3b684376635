"""giantdet: billion-parameter detectors trained with very large batches under DeepSpeed ZeRO."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["__version__", "load_detector", "load_predictor"]


def __getattr__(name: str) -> Any:
    """Import on first use: `giantdet --help` should not wait for torch."""
    if name == "load_predictor":
        from giantdet.engine.predict import load_predictor

        return load_predictor
    if name == "load_detector":
        from giantdet.export import load_detector

        return load_detector
    raise AttributeError(f"module 'giantdet' has no attribute {name!r}")
