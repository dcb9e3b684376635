"""Fonts for the names of classes in overlays, in any script."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFont

logger = logging.getLogger("giantdet")
# Fonts of these names have the most characters; they are looked at first.
_LARGE = (
    "cjk",
    "unifont",
    "droidsansfallback",
    "wqy",
    "unicode",
    "noto",
    "malgun",
    "msyh",
    "simsun",
    "gothic",
)


class Written(NamedTuple):
    """A text as it can be drawn, with a font that has all of its characters."""

    text: str
    font: ImageFont.FreeTypeFont

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the text drawn at (0, 0), in pixels."""
        left, top, right, bottom = self.font.getbbox(self.text)
        return int(left), int(top), int(right + 0.999), int(bottom + 0.999)


def written(text: str, size: int) -> Written:
    """Return a text with a font of `size` pixels, for PIL.

    The font is DejaVu Sans, which matplotlib includes (Latin, Greek, Cyrillic, Arabic and others), or a font
    of this system that has all characters of the text. Characters that no font has are replaced by their
    numbers, as in Python (`\\u732b`), and a warning says so once.
    """
    path, shown = _font_of(text)
    return Written(shown, _loaded(path, size))


@functools.cache
def _loaded(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=4096)
def _font_of(text: str) -> tuple[str, str]:
    """Return the file of a font, and the text with what it lacks replaced."""
    # Marks of line ends and the like have no picture; surrogates stand for bytes that are not UTF-8.
    text = "".join(c if c.isprintable() else _number(c) for c in text)
    default = _default()
    if set(text) <= _characters(default):
        return default, text
    wanted = frozenset(text)
    for path in _system_fonts():
        if wanted <= _characters(path):
            return path, text
    lacking = sorted(wanted - _characters(default))
    _warn_of_fonts("".join(lacking)[:20])
    return default, "".join(_number(c) if c in lacking else c for c in text)


def _number(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


@functools.lru_cache(maxsize=1)
def _default() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@functools.lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    from matplotlib import font_manager

    paths = sorted(font_manager.findSystemFonts())
    return tuple(sorted(paths, key=lambda path: not any(name in path.lower() for name in _LARGE)))


@functools.cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters of a font file; none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        codes = FT2Font(path).get_charmap()
        ImageFont.truetype(path, 12)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(map(chr, codes))


_warned = False


def _warn_of_fonts(characters: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        shown = characters.encode("unicode_escape").decode("ascii")
        logger.warning(
            "no font of this system has the characters %s (%s) of class names: overlays show their numbers; "
            "install a font that has them, for example Noto Sans CJK",
            *(characters, shown),
        )
