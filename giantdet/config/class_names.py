"""Names of classes: the lists of public data sets, and which names of different data sets mean the same.

`categories.json` has the names as the annotation files write them, misspelt ones and blanks at the end among
them, in the order of the ids from 1 on. Objects365 v2: mmdetection 3.3, Ultralytics 8.4 (which corrects the
spelling) and two projects that list ids agree. LVIS v1: mmdetection 3.3 and Ultralytics 8.4 agree. Lists of
Open Images are left out: those of V4 and V7 differ in their names, and its files have codes ("/m/0k4j").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from giantdet.config.classes import Category

SYNONYMS: tuple[tuple[str, ...], ...] = (
    # COCO's names come last; before them those of Objects365, LVIS, Open Images and Pascal VOC.
    ("aeroplane", "airplane"),
    ("Wild Bird", "bird"),
    ("Bowl/Basin", "bowl"),
    ("bus_(vehicle)", "bus"),
    ("car_(automobile)", "car"),
    ("Cattle", "cow"),
    ("cellular_telephone", "Mobile phone", "cell phone"),
    ("sofa", "couch"),
    ("Dinning Table", "Kitchen & dining room table", "dining table"),
    ("doughnut", "donut"),
    ("fireplug", "fire hydrant"),
    ("Flying disc", "frisbee"),
    ("hair_dryer", "hair drier"),
    ("Handbag/Satchel", "handbag"),
    ("computer_keyboard", "keyboard"),
    ("laptop_computer", "laptop"),
    ("microwave_oven", "microwave"),
    ("motorbike", "motorcycle"),
    ("mouse_(computer_equipment)", "Computer mouse", "mouse"),  # Open Images has the animal as "Mouse"
    ("Orange/Tangerine", "orange_(fruit)", "orange"),
    ("Houseplant", "potted plant"),
    ("remote_control", "remote"),
    ("Skiboard", "ski", "skis"),
    ("Other Balls", "ball", "sports ball"),
    ("Luggage", "suitcase"),
    ("Stuffed Toy", "teddy bear"),
    ("necktie", "tie"),
    ("train_(railroad_vehicle)", "train"),
    ("Moniter/TV", "Monitor/TV", "television_set", "Television", "tvmonitor", "tv"),
    # Objects365's spelling, and the usual one.
    ("Bakset", "basket"),
    ("Ballon", "balloon"),
    ("Billards", "billiards"),
    ("Extention Cord", "extension cord"),
    ("Hotair ballon", "hot-air balloon"),
    ("Mushroon", "mushroom"),
    ("Tape Measur/ Ruler", "tape measure"),
    ("Campel", "camel"),
    ("Buttefly", "butterfly"),
    ("Table Teniis paddle", "table tennis paddle"),
)
"""Names of one class. Names that differ only in case, blanks and punctuation need no line.

Where a data set has two names of a line, the first is meant. Objects365 has no class that is all of COCO's
"sports ball", "skis" and "teddy bear", and nothing else: these are its nearest ones.
"""


PUBLISHED = ("lvis_v1", "objects365_v2")


def published(data_set: str) -> tuple[Category, ...]:
    """Return the ids and names of one of `PUBLISHED`. Raises KeyError for another name."""
    names: list[str] = json.loads((Path(__file__).parent / "categories.json").read_text())[data_set]
    return tuple(enumerate(names, 1))


def plain(name: str) -> str:
    """Return the letters and digits of a name in lower case: "hot-dog" and "Hot dog" are the same."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def same_classes(old: Sequence[str], new: Sequence[str]) -> list[int | None]:
    """Return, for each of the names `new`, the position in `old` of the name of the same class, or None.

    The same name comes first, then a line of `SYNONYMS`, then a name that differs in case, blanks and
    punctuation. Except for equal names, a position is given once, and names that are not distinct are left
    out.
    """
    by_name = {name: n for n, name in enumerate(old)}
    found = [by_name.get(name) for name in new]
    free = {plain(name): n for name, n in _distinct(old).items() if n not in found}
    open_ = {plain(name): n for name, n in _distinct(new).items() if found[n] is None}
    for group in _GROUPS:
        there = [name for name in group if name in free]
        here = [name for name in group if name in open_]
        if there and here:
            found[open_.pop(here[0])] = free.pop(there[0])
    for name, n in open_.items():
        found[n] = free.get(name)
    return found


def _distinct(names: Sequence[str]) -> dict[str, int]:
    """Return the positions of the names whose plain form is not empty and no other name has."""
    counts = Counter(map(plain, names))
    return {name: n for n, name in enumerate(names) if plain(name) and counts[plain(name)] == 1}


_GROUPS = tuple(tuple(map(plain, group)) for group in SYNONYMS)
