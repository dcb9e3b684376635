"""Bad input and its outcome: the table of test_bad_input.py and of docs/bad-input.md."""

from __future__ import annotations

from bad_inputs.annotations import ANNOTATIONS
from bad_inputs.commands import COMMANDS
from bad_inputs.configurations import CONFIGURATIONS
from bad_inputs.images import IMAGES
from bad_inputs.maps import MAPS
from bad_inputs.weights import EXPORTS, WEIGHTS

TABLE = {
    "The JSON of a run": CONFIGURATIONS,
    "Annotations": ANNOTATIONS,
    "Images": IMAGES,
    "Semantic and panoptic data": MAPS,
    "Weights to start from": WEIGHTS,
    "Exports": EXPORTS,
    "Commands": COMMANDS,
}
