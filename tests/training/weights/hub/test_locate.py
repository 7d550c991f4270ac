"""Weights by name from a hub on loopback: every layout, what is downloaded, and every way it can fail."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from pipeline.core.records import InputError
from tests.helpers.hub_models import TINY, chinese_bert, chinese_clip, open_clip
from tests.helpers.hub_server import Hub
from training.encoder import load
from training.model.clip import build_clip
from training.model.tokenizer import Tokenizer
from training.weights.formats import load_model, read_weights
from training.weights.hub import transfer
from training.weights.hub.locate import (
    digest_of,
    local_path,
    locate,
    missing_bytes,
    obtain,
    pinned_id,
    pinned_path,
)
from training.weights.hub.pins import read_pins
from training.weights.image_tower import load_image_tower
from training.weights.initialise import initialise
from training.weights.weights import save_checkpoint, state_for_file

NAME = "OFA-Sys/chinese-clip-vit-base-patch16"


def serve(hub: Hub, tmp_path: Path, make: Any = chinese_clip, repo: str = NAME, **settings: Any) -> Path:
    folder = tmp_path / "served" / repo
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, **settings)
    hub.models[repo] = folder
    return folder


def one_line(text: str) -> str:
    with pytest.raises(InputError) as caught:
        local_path(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_chinese_clip_by_the_papers_name(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path)
    named, here = load("ViT-B-16"), load(str(folder))
    texts = ["一只猫", "红色的车"]
    assert np.array_equal(named.embed_texts(texts), here.embed_texts(texts))
    image_BCHW = torch.rand(2, 3, 32, 32)
    assert np.array_equal(named.embed_pixels(image_BCHW), here.embed_pixels(image_BCHW))
    path, origin = locate("ViT-B-16")
    assert origin == f"{NAME}@{hub.commit(NAME)}:model.safetensors"
    assert sorted(os.listdir(os.path.dirname(path))) == ["config.json", "model.safetensors", "vocab.txt"]
    assert read_weights(NAME).said.text_heads == TINY.text.heads  # config.json is read next to the file
    got = hub.asked("GET", ".safetensors") + hub.asked("GET", ".bin") + hub.asked("GET", "README.md")
    assert got == [""]  # the weights once, and nothing that is not needed


def test_weights_in_several_files(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path, repo="a/sharded", with_pickle=False)
    model = load_model(str(folder))
    from transformers import ChineseCLIPModel

    ChineseCLIPModel.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    for part in (tmp_path / "parts").glob("*.safetensors*"):
        shutil.copy(part, folder)
    loaded = load_model("a/sharded")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_open_clips_layout(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path, open_clip, "laion/CLIP-tiny")
    tower, here = load_image_tower("laion/CLIP-tiny"), load_image_tower(str(folder))
    image_BCHW = torch.rand(2, 3, 32, 32)
    assert torch.equal(tower.encode(image_BCHW), here.encode(image_BCHW))
    weights = read_weights("laion/CLIP-tiny:open_clip_pytorch_model.bin")
    assert (weights.format, weights.said.image_heads) == ("OpenCLIP, torch.save", 2)


def test_a_chinese_bert(hub: Hub, tmp_path: Path) -> None:
    serve(hub, tmp_path, chinese_bert, "hfl/chinese-roberta-wwm-ext")
    reference = chinese_bert(tmp_path)
    model = build_clip(TINY)
    initialise(model, text_weights="hfl/chinese-roberta-wwm-ext")
    words = model.state_dict()["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(words, reference.state_dict()["embeddings.word_embeddings.weight"])
    assert Tokenizer.load("hfl/chinese-roberta-wwm-ext").vocab_size == 6


def test_rn50_is_a_file_of_cn_clip(hub: Hub, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        torch.save({"state_dict": state_for_file(build_clip(TINY))}, folder / "clip_cn_rn50.pt")

    serve(hub, tmp_path, make, "OFA-Sys/chinese-clip-rn50")
    assert read_weights("RN50").format == "Chinese CLIP, torch.save"


def test_a_cut_download_is_resumed(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path)
    hub.cut_after = 50_000
    path = local_path(NAME)
    assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes()
    first, second = hub.asked("GET", ".safetensors")
    assert first == ""
    assert second == "bytes=50000-"


def test_a_killed_download_is_resumed(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path)
    program = "import sys; from training.weights.hub.locate import local_path; print(local_path(sys.argv[1]))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    # A download that dies after its first bytes: what it has written must be there for the next.
    dying = program.replace(
        "print(",
        "import os, training.weights.hub.transfer as t; t._ATTEMPTS = 1; "
        "t.time.sleep = lambda _: os._exit(9); print(",
    )
    hub.cut_after = 40_000
    killed = subprocess.run([sys.executable, "-c", dying, NAME], env=environment, timeout=120, check=False)
    assert killed.returncode == 9
    done = subprocess.run(
        [sys.executable, "-c", program, NAME],
        env=environment,
        timeout=120,
        check=True,
        capture_output=True,
        text=True,
    )
    assert hub.asked("GET", ".safetensors")[1:] == ["bytes=40000-"]
    assert Path(done.stdout.strip()).read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_server_without_ranges_begins_anew(hub: Hub, tmp_path: Path) -> None:
    folder = serve(hub, tmp_path)
    hub.cut_after, hub.ranges = 50_000, False
    assert Path(local_path(NAME)).read_bytes() == (folder / "model.safetensors").read_bytes()


def test_processes_of_a_machine_download_once(hub: Hub, tmp_path: Path) -> None:
    serve(hub, tmp_path)
    program = "import sys; from training.weights.hub.locate import local_path; print(local_path(sys.argv[1]))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, NAME], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(paths) == 1
    assert len(hub.asked("GET", ".safetensors")) == 1


def test_wrong_bytes_are_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    serve(hub, tmp_path)
    hub.corrupt = True
    assert "model.safetensors arrived with other bytes" in one_line(NAME)
    left = [
        path for path in (tmp_path / "cache").rglob("*") if path.stat().st_size > 50_000 and path.is_file()
    ]
    assert left == []
    hub.corrupt = False
    assert local_path(NAME)


def test_offline(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set, and" in one_line("ViT-B-16")
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    path = local_path("ViT-B-16")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert local_path("ViT-B-16") == path
    assert load("ViT-B-16").embed_texts(["猫"]).shape == (1, TINY.embed_dim)
    assert hub.requests == []
    os.remove(path)
    assert "HF_HUB_OFFLINE" in one_line("ViT-B-16")


def test_no_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(hub, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        message = one_line(NAME)
        assert message.startswith(f"{NAME}: http://127.0.0.1:9 cannot be reached: ")
        assert "set HF_ENDPOINT to a mirror" in message
    path = local_path(NAME)
    capfd.readouterr()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert local_path(NAME) == path
    assert "using the cached commit" in capfd.readouterr().err
    hub.busy = True
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert local_path(NAME) == path


def test_a_token_goes_to_the_hub_and_to_nobody_it_redirects_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = serve(hub, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.cdn, hub.cut_after = True, 30_000
    assert Path(local_path(NAME)).read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [span for _, path, span in hub.requests if path.startswith("/cdn/")] == ["", "bytes=30000-"]
    assert {token for _, token in hub.tokens} == {"Bearer hf_secret"}
    assert not [path for path, _ in hub.tokens if path.startswith("/cdn/")]


@pytest.mark.parametrize("digest", ["../../../../escaped", "0" * 40 + "/x", ""])
def test_a_digest_that_is_none_names_no_file(hub: Hub, tmp_path: Path, digest: str) -> None:
    serve(hub, tmp_path)
    hub.etags["model.safetensors"] = digest
    assert "names no digest of model.safetensors" in one_line(NAME)
    assert not list(tmp_path.rglob("escaped*"))


def test_what_a_hub_may_answer(hub: Hub, tmp_path: Path) -> None:
    serve(hub, tmp_path)
    assert "no model of this name" in one_line("OFA-Sys/nothing")
    assert f"{NAME}@v9: no revision v9 at {hub.url}" in one_line(f"{NAME}@v9")
    assert "no such file in" in one_line(f"{NAME}:other.pt")
    assert "it holds README.md, config.json, model.safetensors" in one_line(f"{NAME}:other.pt")
    hub.gated.add(NAME)
    assert f"gated: accept its owner's conditions at {hub.url}/{NAME}" in one_line(NAME)
    hub.busy = True
    assert "answers with status 503" in one_line(NAME)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("nothing")
    hub.models["a/bare"], hub.busy = tmp_path / "bare", False
    assert "holds no weights that cnclip reads" in one_line("a/bare")
    for name in ("one.pt", "two.pt"):
        (tmp_path / "bare" / name).write_bytes(b"x")
    assert "holds one.pt, two.pt: give one of them, as in a/bare:one.pt" in one_line("a/bare")


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(transfer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        assert "MiB free: free space or set HF_HOME" in one_line(NAME)

    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transfer, "_append", fails)
    assert "is full: free space or set HF_HOME" in one_line(NAME)


def test_a_run_is_bound_to_what_it_looked_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, run = serve(hub, tmp_path), str(tmp_path / "run")
    assert digest_of(run, "ViT-B-16") == "not looked up: ViT-B-16"
    assert hub.requests == []  # a plan asks nobody
    obtain(run, ["ViT-B-16", str(folder)], download_too=False)
    assert hub.asked("GET", ".safetensors") == []
    commit, digest = hub.commit(NAME), digest_of(run, "ViT-B-16")
    wanted, num_bytes = missing_bytes(run, "ViT-B-16") or (None, None)
    assert (str(wanted), num_bytes) == (NAME, (folder / "model.safetensors").stat().st_size)
    obtain(run, ["ViT-B-16"], download_too=True)
    assert missing_bytes(run, "ViT-B-16") is None
    assert pinned_id(run, "ViT-B-16") == f"{NAME}@{commit}:model.safetensors"
    assert {file.name for file in read_pins(run)["ViT-B-16"].files} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
    }

    chinese_clip(folder, seed=1)  # the name moves on, and another run sees it; this one does not
    assert hub.commit(NAME) != commit
    obtain(run, ["ViT-B-16"], download_too=True)
    assert digest_of(run, "ViT-B-16") == digest
    other = str(tmp_path / "other")
    obtain(other, ["ViT-B-16"], download_too=True)
    assert digest_of(other, "ViT-B-16") != digest

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = Path(pinned_path(run, "ViT-B-16"))
    path = path.resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(InputError, match=r"has other bytes than .*weights\.json says .*: remove the first"):
        pinned_path(run, "ViT-B-16")
    shutil.rmtree(tmp_path / "cache")
    assert digest_of(run, "ViT-B-16") == digest  # without cache and network
    Path(run, "weights.json").write_text("{}x")
    with pytest.raises(InputError, match=r"weights\.json: damaged .* looked up again"):
        digest_of(run, "ViT-B-16")


def test_a_file_here_is_read_as_before(hub: Hub, tmp_path: Path) -> None:
    path = str(tmp_path / "own.safetensors")
    save_checkpoint(path, build_clip(TINY), TINY, {})
    assert local_path(path) == path
    assert digest_of(str(tmp_path), path) == digest_of("", path)
    assert hub.requests == []
