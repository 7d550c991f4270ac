"""mCLIP against the multilingual-clip package and open_clip on the same weights."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.core.records import InputError
from tests.helpers.mclip_files import write_mclip
from training.data.squares import SquareConfig
from training.model.clip import build_clip
from training.model.config import MODELS
from training.model.multilingual_clip import batches_by_length, load_text
from training.model.preprocess import standardise
from training.weights.image_tower import load_image_tower
from training.weights.weights import save_openai

TEXTS = [
    "一只黑色的猫",
    "两只白色的狗在草地上跑，蓝色的天空下有一座山",
    "a cat",
    "猫",
    "",
    "未登录的字：𠮷😀 ＡＢＣ",
]


@pytest.fixture(scope="module")
def mclip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    pytest.importorskip("multilingual_clip")
    folder = tmp_path_factory.mktemp("mclip")
    return folder, write_mclip(folder)


def _peer_tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.XLMRobertaTokenizer.from_pretrained(str(folder))


def test_text_features_are_the_packages(mclip: tuple[Path, Any]) -> None:
    folder, peer = mclip
    tokenizer = _peer_tokenizer(folder)
    assert len(tokenizer) > 40  # a tokenizer without its pieces would make every text <unk>
    with torch.inference_mode():
        expected = peer(TEXTS, tokenizer).numpy()
    text = load_text(str(folder), "cpu")
    assert text.tokens(TEXTS) == tokenizer(TEXTS)["input_ids"]
    found = text.embed(TEXTS)
    assert np.abs(found).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    unit = text.embed_texts(TEXTS)
    np.testing.assert_allclose(unit, F.normalize(torch.from_numpy(expected), dim=-1).numpy(), atol=1e-5)


def test_a_batch_changes_no_feature(mclip: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    text = load_text(str(mclip[0]), "cpu")
    whole = text.embed(TEXTS)
    monkeypatch.setattr("training.model.multilingual_clip.TOKENS_PER_BATCH", 1)
    np.testing.assert_allclose(text.embed(TEXTS), whole, atol=1e-5)


def test_a_text_longer_than_the_positions_is_cut(mclip: tuple[Path, Any]) -> None:
    text = load_text(str(mclip[0]), "cpu")
    (ids,) = text.tokens(["猫狗" * 100])
    assert len(ids) == 64
    assert ids[-1] == 2
    assert text.embed(["猫狗" * 100]).shape == (1, 32)


def test_batches_by_length() -> None:
    lengths = [5, 2, 9, 2, 30, 3]
    batches = list(batches_by_length(lengths, 12))
    assert sorted(row for batch in batches for row in batch) == list(range(6))
    assert batches == [[1, 3, 5], [0], [2], [4]]
    assert list(batches_by_length([], 12)) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
        (lambda f: (f / "sentencepiece.bpe.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda f: (f / "pytorch_model.bin").unlink(), "pytorch_model.bin: no such file"),
        (lambda f: torch.save({"a": torch.ones(2)}, f / "pytorch_model.bin"), "no tensor 'LinearTransf"),
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
    ],
)
def test_what_is_wrong_is_named(mclip: tuple[Path, Any], tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mclip[0], folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_text(str(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_pieces_of_another_model_are_refused(mclip: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mclip[0], folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = "transformer.embeddings.word_embeddings.weight"
    state[name] = state[name][:-1]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="give the SentencePiece model of these weights"):
        load_text(str(folder), "cpu")


def test_a_pickle_that_runs_code_is_refused(mclip: tuple[Path, Any], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "evil",)

    folder = tmp_path / "copy"
    shutil.copytree(mclip[0], folder)
    torch.save({"LinearTransformation.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="nothing was run"):
        load_text(str(folder), "cpu")
    assert not (tmp_path / "evil").exists()


def test_a_model_id_that_is_not_there() -> None:
    with pytest.raises(InputError, match="no such folder; give a Multilingual-CLIP folder, or a model id"):
        load_text("not/a/folder", "cpu")


def _picture(width: int, height: int) -> bytes:
    rng = np.random.default_rng(width)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(64, 40), (40, 65), (32, 32), (33, 100)])
def test_preprocessing_is_openais(size: tuple[int, int]) -> None:
    from torchvision import transforms

    peer = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    data = _picture(*size)
    expected = peer(Image.open(io.BytesIO(data)).convert("RGB"))
    square_BHWC = np.empty((1, 32, 32, 3), np.uint8)
    SquareConfig(image_size_px=32, fit="crop").open().read([data], square_BHWC)
    found = standardise(torch.from_numpy(square_BHWC).permute(0, 3, 1, 2))[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_image_tower_alone_is_the_whole_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("tiny-vit", "tiny-rn"):
        model = build_clip(MODELS[name]).eval()
        path = tmp_path / f"{name}.pt"
        save_openai(str(path), model, model.config)
        tower = load_image_tower(str(path))
        side = model.config.vision.image_size_px
        image = torch.rand(2, 3, tower.image_size_px, tower.image_size_px)
        assert (tower.image_size_px, tower.embed_dim) == (side, model.config.embed_dim)
        with torch.inference_mode():
            torch.testing.assert_close(tower.encode(image), model.encode_image(image), atol=1e-6, rtol=0)
    gelu = load_image_tower(str(tmp_path / "tiny-vit.pt"), activation="gelu")
    quick = load_image_tower(str(tmp_path / "tiny-vit.pt"))
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(gelu.encode(image), quick.encode(image), atol=1e-4)


def test_the_image_tower_is_open_clips(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    for quick, activation in ((True, "quick_gelu"), (False, "gelu")):
        torch.manual_seed(1)
        config = CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=8, image_size=40)
        peer = _build_vision_tower(24, config, quick_gelu=quick).eval()
        path = tmp_path / activation / "open_clip_pytorch_model.bin"
        path.parent.mkdir()
        torch.save({f"visual.{name}": tensor for name, tensor in peer.state_dict().items()}, path)
        with pytest.raises(InputError, match="the number of attention heads of its image tower is unknown"):
            load_image_tower(str(path))
        settings = {"vision_cfg": dataclasses.asdict(config), "quick_gelu": quick}
        (path.parent / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
        tower = load_image_tower(str(path.parent), activation=activation)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=f"its image tower has {activation}, not"):
            load_image_tower(str(path.parent), activation="gelu" if quick else "quick_gelu")
        assert (tower.image_size_px, tower.embed_dim) == (40, 24)  # a size of no model that is known by name
        image = torch.rand(2, 3, 40, 40)
        with torch.inference_mode():
            torch.testing.assert_close(
                tower.encode(image), F.normalize(peer(image), dim=-1), atol=1e-5, rtol=0
            )
    assert open_clip


def test_weights_without_an_image_tower(mclip: tuple[Path, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"bert.embeddings.word_embeddings.weight": torch.ones(3, 4)}, path)
    with pytest.raises(InputError, match=r"a\.pt"):
        load_image_tower(str(path))
    assert json.loads((mclip[0] / "config.json").read_text())["numDims"] == 32
