"""Upload exports to the Hugging Face hub; `giantdet.export_folder` loads them from there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from giantdet import __version__
from giantdet.errors import InputError
from giantdet.export import read_export_config
from giantdet.export_folder import CONFIG, INDEX, export_folder
from giantdet.tools.model_card import model_card

FILES = ("*.safetensors", CONFIG, INDEX)


def push(source: Path, repository: str, private: bool = False, revision: str | None = None) -> str:
    """Upload an export with a model card to the repository OWNER/NAME, and return its address.

    `source` is a run or an export. A README.md in the export's folder is uploaded instead of a card made from
    the run. The repository is made if it does not exist. Raises InputError for a folder that is no export and
    for what the hub refuses.
    """
    folder = export_folder(source)
    if read_export_config(folder).left_out is not None:
        raise InputError(f"{folder} leaves its backbone out; an export for others has all weights")
    card = folder / "README.md"
    text = card.read_bytes() if card.is_file() else model_card(source, repository).encode()
    files = [path for pattern in FILES for path in sorted(folder.glob(pattern))]
    operations = [CommitOperationAdd("README.md", text), *(CommitOperationAdd(f.name, f) for f in files)]
    api = HfApi()
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        message = f"Upload by giantdet {__version__}"
        api.create_commit(repository, operations, commit_message=message, revision=revision)
    except (HfHubHTTPError, HFValidationError) as error:
        first = str(error).strip().splitlines()[0]
        advice = "; log in with: hf auth login" if "401" in first else ""
        raise InputError(f"{repository}: the hub refuses it ({first}){advice}") from error
    return address


def write_card(source: Path, repository: str) -> Path:
    """Write the model card into the export's folder, to be edited before `push`, and return its path."""
    card = export_folder(source) / "README.md"
    card.write_text(model_card(source, repository))
    return card
