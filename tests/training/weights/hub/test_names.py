"""Distinguishes paths from names, and the errors for words that are neither."""

from pathlib import Path

import pytest

from pipeline.core.records import InputError
from training.weights.hub.names import PUBLISHED, HubId, find_id, is_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ViT-B-16", HubId("OFA-Sys/chinese-clip-vit-base-patch16")),
        ("RN50", HubId("OFA-Sys/chinese-clip-rn50", "main", "clip_cn_rn50.pt")),
        (f"ViT-H-14@{COMMIT}", HubId("OFA-Sys/chinese-clip-vit-huge-patch14", COMMIT)),
        ("openai/clip-vit-base-patch16", HubId("openai/clip-vit-base-patch16")),
        ("laion/CLIP:pytorch_model.bin", HubId("laion/CLIP", "main", "pytorch_model.bin")),
        (f"a/b@{COMMIT}:sub/x.pt", HubId("a/b", COMMIT, "sub/x.pt")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("runs/model.safetensors", None),
        ("clip_cn_vit-b-16.pt", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("./a", None),
        ("s3://bucket/model.pt", None),
    ],
)  # fmt: skip
def test_names_and_paths(
    text: str, wanted: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_id(text) == wanted


def test_all_of_the_papers_models_are_published() -> None:
    assert set(PUBLISHED) == {"RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"}


def test_a_path_that_exists_always_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    (tmp_path / "openai").mkdir()
    assert find_id("ViT-B-16") is None
    assert not is_name("ViT-B-16")
    assert find_id("openai/clip") is None  # a typing error in a folder of one's own asks no hub
    assert find_id("openai/clip@main") == HubId("openai/clip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vit-b-16", "did you mean ViT-B-16"),
        ("ViT-B16", "did you mean ViT-B-16"),
        ("ViT-B/16", "no owner of models: did you mean ViT-B-16"),
        ("ViT-L-15", "did you mean ViT-L-14"),
        ("ViT-B-32", "no Chinese CLIP of this size is published"),
        ("tiny-vit", "no Chinese CLIP of this size is published"),
        ("nonsense", "no such file or folder, and no name of weights: give a path, one of RN50"),
        ("a/b@main/../x", "leave out"),
        ("a/b:../x.pt", None),
    ],
)
def test_what_is_neither(
    text: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if message is None:
        assert find_id(text) is None
        return
    with pytest.raises(InputError, match=message) as caught:
        find_id(text)
    assert "\n" not in str(caught.value)
