"""Names of the same class in several data sets, against the published lists and a published mapping."""

from __future__ import annotations

import itertools

import pytest
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from giantdet.config.class_names import SYNONYMS, plain, published, same_classes

# torchvision's list also has the ids that COCO skips.
COCO = [n for n in MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:] if not n.startswith("N/A")]
OBJECTS365 = [name for _, name in published("objects365_v2")]
LVIS = [name for _, name in published("lvis_v1")]
D_FINE = (
    *(0, 46, 5, 58, 114, 55, 116, 65, 21, 40, 176, 127, 249, 24, 56, 139, 92, 78, 99, 96, 144, 295, 178, 180),
    *(38, 39, 13, 43, 120, 219, 148, 173, 165, 154, 137, 113, 145, 146, 204, 8, 35, 10, 88, 84, 93, 26, 112),
    *(82, 265, 104, 141, 152, 234, 143, 150, 97, 2, 50, 25, 75, 98, 153, 37, 73, 115, 132, 106, 61, 163, 134),
    *(277, 81, 133, 18, 94, 30, 169, 70, 328, 226),
)
"""Objects365's class, counted from 0, for each of COCO's: `obj365_ids` of D-FINE (Peng et al. 2024)."""
OTHERS = {"aeroplane", "sofa", "motorbike", "tvmonitor"} | {  # Pascal VOC, and Open Images V4 to V7
    *("Cattle", "Mobile phone", "Kitchen & dining room table", "Flying disc", "Computer mouse", "Houseplant"),
    *("Television", "Ball", "Computer keyboard", "Microwave oven", "Remote control", "Ski", "Hair dryer"),
}


def test_lists_are_complete_and_distinct() -> None:
    for names, count in ((COCO, 80), (OBJECTS365, 365), (LVIS, 1203)):
        assert len(names) == len(set(map(plain, names))) == count
    assert published("objects365_v2")[354] == (355, "Table Teniis paddle")
    assert [dict(published("lvis_v1"))[number] for number in (1, 80, 793, 1077, 1203)] == [
        *("aerosol_can", "cow", "person", "television_set", "zucchini")
    ]
    with pytest.raises(KeyError):
        published("open_images")


def test_objects365_has_all_of_cocos_classes() -> None:
    found = same_classes(OBJECTS365, COCO)
    differ = {
        name: OBJECTS365[ours] if ours is not None else None
        for name, ours, theirs in zip(COCO, found, D_FINE, strict=True)
        if ours != theirs
    }
    # D-FINE takes "Skating and Skiing shoes" and "Baseball".
    assert differ == {"skis": "Skiboard", "sports ball": "Other Balls"}
    back = same_classes(COCO, OBJECTS365)
    assert all(back[number] == n for n, number in enumerate(found) if number is not None)
    assert sum(number is not None for number in back) == 80


def test_lvis_and_coco() -> None:
    found = dict(zip(COCO, same_classes(LVIS, COCO), strict=True))
    assert {name for name, number in found.items() if number is None} == {"hot dog", "potted plant"}
    pairs = {name: LVIS[number] for name, number in found.items() if number is not None}
    assert pairs["mouse"] == "mouse_(computer_equipment)" and pairs["tie"] == "necktie"
    assert pairs["sports ball"] == "ball" and pairs["stop sign"] == "stop_sign"


def test_every_synonym_is_a_class_of_a_public_data_set() -> None:
    known = set(map(plain, [*COCO, *OBJECTS365, *LVIS, *OTHERS]))
    names = [plain(name) for name in itertools.chain.from_iterable(SYNONYMS)]
    assert len(names) == len(set(names)), "each name is in one line only"
    for group in SYNONYMS:
        strange = [name for name in group if plain(name) not in known]
        # No list contains the usual spelling of Objects365's names, which has its own.
        assert len(strange) <= (group[0] in OBJECTS365), group


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        pytest.param(["a", "b"], ["b", "c", "a"], [1, None, 0], id="equal names"),
        pytest.param(["Hot dog", "STOP-SIGN"], ["stop sign", "hot_dog"], [1, 0], id="case and punctuation"),
        pytest.param(["car", "Car"], ["CAR", "Car"], [None, 1], id="names that are not distinct"),
        pytest.param(["car"], ["Car", "car"], [None, 0], id="equal names come first"),
        pytest.param(["Mouse", "Computer mouse"], ["mouse"], [1], id="Open Images has two of a line"),
        pytest.param(["mouse"], ["Mouse", "Computer mouse"], [None, 0], id="and takes one"),
        pytest.param(["sofa", "tvmonitor"], ["Monitor/TV", "Couch"], [1, 0], id="neither is COCO's"),
        pytest.param(["screen", "screen"], ["screen", "screen"], [1, 1], id="a name that occurs twice"),
        pytest.param(["?", "!"], ["!!", "-"], [None, None], id="names without letters"),
        pytest.param(["猫"], ["猫 "], [0], id="letters of any script"),
    ],
)
def test_matching_name(old: list[str], new: list[str], found: list[int | None]) -> None:
    assert same_classes(old, new) == found
