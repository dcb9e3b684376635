"""The Hugging Face hub, without long waits where there is no network."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants

_SECONDS = 5.0


@contextmanager
def hub() -> Iterator[None]:
    """Let the hub's library read only its cache while this context lasts, if the hub does not answer.

    The library tries each file six times, for half a minute, even those that it has in its cache. Raises
    OSError, instead of its error, if a file is not there.
    """
    if constants.HF_HUB_OFFLINE or answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # the library has a type for each kind of failure
        raise OSError(
            f"{constants.ENDPOINT} does not answer, and the cache {constants.HF_HUB_CACHE} does not have it"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def answers(url: str, seconds: float = _SECONDS) -> bool:
    """Return whether the host of a URL takes a connection; True behind a proxy, which is not asked."""
    if urllib.request.getproxies():
        return True
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname, parts.port or parts.scheme), seconds).close()
    except OSError:
        return False
    return True
