"""giantdet: billion-parameter detectors trained with very large batches under DeepSpeed ZeRO."""

__version__ = "0.1.0"
