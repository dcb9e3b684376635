"""The hub without a network: its cache is read at once, and what is not there is one line."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from giantdet.config.architectures.common import BackboneConfig
from giantdet.layers import hub as module
from giantdet.layers.backbone import build_backbone
from giantdet.layers.hub import answers, hub
from giantdet.layers.weights import load_backbone_weights


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub at a port of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_file_of_the_cache_needs_no_hub(unreachable: Path) -> None:
    """A cache as the hub's library writes it."""
    snapshot = unreachable / "models--user--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (unreachable / "models--user--tiny/refs").mkdir()
    (unreachable / "models--user--tiny/refs/main").write_text("0" * 40)
    with hub():
        found = huggingface_hub.hf_hub_download("user/tiny", "config.json", cache_dir=unreachable)
    assert Path(found).read_text() == "{}"
    assert constants.HF_HUB_OFFLINE is False, "other parts of the process may have a network later"


def test_weights_out_of_reach_are_one_line_without_retries(
    unreachable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BackboneConfig(name="resnet18", pretrained=True)
    with pytest.raises(ValueError, match="cannot get timm's weights of 'timm/resnet18") as raised:
        load_backbone_weights(build_backbone(config, (64, 64)), config)
    assert f"does not answer, and the cache {unreachable} does not have it" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [text for text in caplog.messages if "Retrying" in text]


def test_a_hub_that_answers_is_asked(monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(module.urllib.request, "getproxies", dict)
        assert answers(url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        with pytest.raises(KeyError), hub():
            assert not constants.HF_HUB_OFFLINE
            raise KeyError("not of the network: it stays as it is")
    monkeypatch.setattr(module.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert answers("http://127.0.0.1:1"), "a proxy may reach what this machine cannot"
