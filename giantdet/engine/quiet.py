"""Keep messages of libraries to their own developers off the screen of a run.

Only messages that a user of giantdet can do nothing about are named here. Errors, warnings of giantdet, and
all other warnings of libraries are shown.
"""

from __future__ import annotations

import logging
import sys
import warnings

_LIBRARIES = r"(torch|torchvision|timm|deepspeed|triton)(\.|$)"
_DEEPSPEED = (
    # The run names its optimizer, and tests train with each of them.
    "You are using ZeRO with an untested optimizer",
)


def quieten() -> None:
    """Hide the deprecation warnings that libraries cause themselves, and the messages of DeepSpeed above.

    A warning of `-W` or PYTHONWARNINGS comes first.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            # `module` is the one that the warning blames: libraries', not ours.
            warnings.filterwarnings("ignore", category=category, module=_LIBRARIES)
    logger = logging.getLogger("DeepSpeed")
    if not any(isinstance(known, _Named) for known in logger.filters):
        logger.addFilter(_Named())


class _Named(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _DEEPSPEED)
