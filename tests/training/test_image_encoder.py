"""Encoding many images: worker processes give the bits of this process, and a death is named."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.core.files.images import BadImageError
from pipeline.core.records import InputError
from tests.helpers.evaluation_files import png_bytes
from training import image_encoder
from training.data.squares import AnyImage, ImageRange, SquareConfig
from training.image_encoder import ImageEncoder, ImageFeatures

SIDE, DIM = 8, 5


def encoder(**settings: object) -> ImageEncoder:
    """Return one whose features depend on every pixel, and on the batch's shape where it is fixed."""
    weight = torch.randn(DIM, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0))

    def encode(image_BCHW: torch.Tensor) -> torch.Tensor:
        assert not settings.get("fixed_batches") or len(image_BCHW) == 4
        return F.normalize((image_BCHW.flatten(1) @ weight.T).float(), dim=1)

    return ImageEncoder(encode, SquareConfig(image_size_px=SIDE), "cpu", embed_dim=DIM, **settings)  # type: ignore[arg-type]


def all_kinds(tar: Path) -> list[AnyImage]:
    """Return 23 images: encoded, opened, in a tar, not to be read and not to be decoded."""
    images: list[AnyImage] = [png_bytes(seed) for seed in range(19)]
    tar.write_bytes(b"before" + png_bytes(19))
    images.insert(3, ImageRange(str(tar), 6, len(png_bytes(19)), "19.png"))
    images.insert(5, b"no image")
    images.insert(8, Image.fromarray(np.full((9, 7, 3), 200, np.uint8)))
    images.insert(22, BadImageError("no_file: gone"))
    return images


def joined(found: Iterator[ImageFeatures]) -> tuple[np.ndarray, dict[int, str]]:
    features, left_out, first = [], {}, 0
    for feature_BD, bad, num_images in found:
        features.append(feature_BD)
        left_out |= {first + row: reason for row, reason in bad.items()}
        first += num_images
    assert first == 23
    return np.concatenate(features), left_out


def test_workers_give_the_bits_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = all_kinds(tmp_path / "a.tar")
    here_ND, left_out = joined(encoder().features(images, 4))
    assert here_ND.shape == (21, DIM)
    assert left_out.keys() == {5, 22}
    assert left_out[22] == "no_file: gone"

    monkeypatch.setattr(image_encoder, "_FEW_IMAGES", 10)
    by_workers = encoder()
    for _ in range(2):  # the second time they are there already
        found_ND, left_out_too = joined(by_workers.features(iter(images), 4))
        np.testing.assert_array_equal(found_ND, here_ND)
        assert left_out_too == left_out
    assert by_workers._workers is not None
    pids = by_workers._workers.processes
    padded_ND, left_out_too = joined(encoder(fixed_batches=True).features(images, 4))
    np.testing.assert_allclose(padded_ND, here_ND, atol=1e-6)
    assert left_out_too == left_out
    del by_workers
    assert not any(map(psutil.pid_exists, pids))


def test_a_worker_that_dies_is_named_and_replaced_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_encoder, "_FEW_IMAGES", 4)
    endless = encoder()

    def images() -> Iterator[bytes]:
        while True:
            yield png_bytes(1)

    found = endless.features(images(), 4)
    next(found)
    assert endless._workers is not None
    pid = endless._workers.processes[0]
    os.kill(pid, signal.SIGKILL)
    message = rf"image worker 0 \(process {pid}\) was killed by SIGKILL: .* no memory left; if so, free some"
    with pytest.raises(InputError, match=message):
        for _ in found:
            pass
    again = endless.features(images(), 4)
    assert len(next(again).feature_BD) == 4
    pids = endless._workers.processes
    again.close()  # the rest is not wanted
    assert not any(map(psutil.pid_exists, pids))


def test_a_tar_that_ends_too_early_is_named_by_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_encoder, "_FEW_IMAGES", 1)
    (tmp_path / "a.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"a\.tar: ends inside 7\.jpg"):
        list(encoder().features([ImageRange(str(tmp_path / "a.tar"), 3, 99, "7.jpg")], 4))


def test_bf16_rounds_products_and_nothing_else(tmp_path: Path) -> None:
    images = all_kinds(tmp_path / "a.tar")
    exact_ND, _ = joined(encoder().features(images, 4))
    rounded_ND, _ = joined(encoder(precision="bf16").features(images, 4))
    assert rounded_ND.dtype == np.float32
    assert 1e-5 < np.abs(rounded_ND - exact_ND).max() < 0.02
    np.testing.assert_allclose(np.linalg.norm(rounded_ND, axis=1), 1, atol=1e-6)


def test_batches_without_an_image_have_no_features() -> None:
    found = list(encoder(fixed_batches=True).features([b"no", b"nor", b"this", b"one"], 4))
    assert [len(batch.feature_BD) for batch in found] == [0]
    assert found[0].left_out.keys() == {0, 1, 2, 3}
