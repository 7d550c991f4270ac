"""Image files in folders: special files neither stop nor slow what reads a folder."""

import os
import socket
from pathlib import Path

import pytest

from pipeline.core.files import image_files
from pipeline.core.files.image_files import find_images, read_image, summary
from pipeline.core.files.images import BadImageError

ENDINGS = (".jpg", ".png")


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    for name in (
        "a.jpg",
        "B.PNG",
        "sub/c.png",
        "notes.txt",
        "._a.jpg",
        "__MACOSX/a.jpg",
        ".cache/x.jpg",
        "plain",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    os.mkfifo(tmp_path / "p.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "linked.jpg").symlink_to("a.jpg")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # an address of a socket is short
        server.bind("s.jpg")
        found = find_images(str(tmp_path), ENDINGS)
    names = {os.path.relpath(path, tmp_path) for path in found.paths}
    assert names == {"a.jpg", "B.PNG", "sub/c.png", "linked.jpg"}
    assert {os.path.relpath(path, tmp_path): reason for path, reason in found.passed_over} == {
        "p.jpg": "no_file: a FIFO",
        "s.jpg": "no_file: a socket",
        "zero.jpg": "no_file: a device",
        "gone.jpg": "no_file: a link to nothing",
        "sub/up": "a link to a folder above it",
        "._a.jpg": "hidden",
        "__MACOSX": "hidden",
        ".cache": "hidden",
    }
    assert found.other_endings == {".txt": 1, "without ending": 1}


@pytest.fixture(autouse=True)
def _same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(".")


def test_reading_never_waits_and_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x" * 100)
    os.mkfifo(tmp_path / "p.jpg")
    assert read_image(str(tmp_path / "a.jpg")) == b"x" * 100
    monkeypatch.setattr(image_files, "MAX_IMAGE_BYTES", 99)
    for name, reason in (
        ("a.jpg", "too_large: more than 64 MiB"),
        ("p.jpg", "no_file: a FIFO"),
        ("none.jpg", "no_file: no such file"),
        ("", "no_file: a folder"),
        ("a.jpg\0", "unreadable: "),
    ):
        with pytest.raises(BadImageError, match=reason):
            read_image(os.path.join(tmp_path, name))
    with pytest.raises(BadImageError, match="no_file: a device"):
        read_image("/dev/zero")


def test_a_summary_names_the_first(tmp_path: Path) -> None:
    items = [(f"{n}.jpg", "truncated") for n in range(1200)]
    assert summary(items, shown=2) == "0.jpg: truncated; 1.jpg: truncated; and 1,198 more"
    assert summary(items[:1]) == "0.jpg: truncated"
