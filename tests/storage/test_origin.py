from __future__ import annotations

from pathlib import Path

import pytest

from dora_convert.storage.origin import identity, origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("path", "repo"),
    [
        (f"/home/me/.cache/huggingface/hub/models--org--name/snapshots/{COMMIT}", "org/name"),
        (f"/c/models--org--name/snapshots/{COMMIT}/sub/model.safetensors", "org/name"),
        (f"models--org--na-me.v2/snapshots/{COMMIT}/config.json", "org/na-me.v2"),
        (f"/c/models--gpt2/snapshots/{COMMIT}", "gpt2"),
    ],
)
def test_the_hubs_cache(path: str, repo: str) -> None:
    assert origin(Path(path)) == (repo, COMMIT)
    assert identity(Path(path)) == f"{repo}@{COMMIT}"


@pytest.mark.parametrize(
    "path",
    [
        "/models/org/name",
        f"/c/datasets--org--name/snapshots/{COMMIT}",
        "/c/models--org--name/snapshots/main",
        f"/c/models--org--name/snapshots/{COMMIT}0",
        f"/c/models--org--name/blobs/{COMMIT}",
        f"/c/my-models--org--name/snapshots/{COMMIT}",
    ],
)
def test_other_places(path: str) -> None:
    assert origin(Path(path)) is None
    assert identity(Path(path)) is None
