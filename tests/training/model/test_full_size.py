"""All models at full size: cn_clip's, transformers' and open_clip's weights in, the same features out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests.helpers.peer_models import STRUCTURES, cn_clip_model, hugging_face_model
from training.model.config import MODELS, VisionTransformerConfig
from training.model.preprocess import preprocess
from training.model.tokenizer import Tokenizer
from training.weights.formats import load_model
from training.weights.initialise import initialise
from training.weights.weights import state_for_file

TOLERANCE = 1e-5  # of unit-norm features, both sides in float32
CAPTIONS = [
    "一只橘猫。",
    "窗台上趴着一只橘色的小猫，它正看着窗外的雪",
    "红色的公交车驶过雨后的街道，" * 4,
    "山" * 128,
]
VITS = [name for name in STRUCTURES if name != "RN50"]

pytestmark = pytest.mark.slow  # up to minutes each; ViT-H/14 needs 12 GiB
cn_clip = pytest.importorskip("cn_clip.clip", reason="cn_clip, Chinese CLIP's own code, is not installed")


def _tokens() -> torch.Tensor:
    vocabulary = Tokenizer.load(str(Path(cn_clip.__file__).parent / "vocab.txt"))
    return torch.from_numpy(vocabulary.encode(CAPTIONS, 130)).long()


def _pictures(side: int) -> torch.Tensor:
    """Return two preprocessed images with edges and gradients."""
    y, x = np.mgrid[0:200, 0:300]
    one = np.stack([x * 255 // 299, y * 255 // 199, (x // 30 + y // 30) % 2 * 255], axis=-1)
    two = np.where(((x - 150) ** 2 + (y - 90) ** 2 < 4000)[..., None], [230, 40, 30], [20, 120, 60])
    encoded = []
    for pixels in (one, two):
        import io

        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    return preprocess(encoded, side)


@pytest.mark.parametrize("name", STRUCTURES)
def test_features_and_logits_equal_cn_clip(name: str, tmp_path: Path) -> None:
    """Saved by cn_clip as its training does, loaded here."""
    reference = cn_clip_model(name, seed=20 + len(name))
    image_BCHW, tokens_BL = _pictures(MODELS[name].vision.image_size_px), _tokens()
    with torch.no_grad():
        image_BD, text_BD, scale = reference(image_BCHW, tokens_BL)
        logits = scale * image_BD @ text_BD.T
    state = {f"module.{key}": value.half() for key, value in reference.state_dict().items()}
    torch.save(
        {"epoch": 1, "step": 2, "name": STRUCTURES[name], "state_dict": state}, tmp_path / "clip_cn.pt"
    )
    del reference, state
    model = load_model(str(tmp_path / "clip_cn.pt"))
    assert model.config == MODELS[name]
    with torch.no_grad():
        ours = model(image_BCHW, tokens_BL)
    torch.testing.assert_close(ours[0], image_BD, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours[1], text_BD, atol=TOLERANCE, rtol=0)
    # the scale of logits is 1/0.07 here, so they are as precise as the cosines
    torch.testing.assert_close(
        (model.logit_scale.exp() * ours[0] @ ours[1].T) / model.logit_scale.exp(),
        logits / scale,
        atol=TOLERANCE,
        rtol=0,
    )


@pytest.mark.parametrize("name", VITS)
def test_features_and_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    peer = hugging_face_model(MODELS[name], seed=30 + len(name))
    image_BCHW, tokens_BL = _pictures(MODELS[name].vision.image_size_px), _tokens()
    with torch.no_grad():
        theirs = peer(input_ids=tokens_BL, pixel_values=image_BCHW, attention_mask=tokens_BL.ne(0).long())
    peer.save_pretrained(tmp_path)
    del peer
    model = load_model(str(tmp_path))
    assert model.config == MODELS[name]
    with torch.no_grad():
        image_BD, text_BD = model(image_BCHW, tokens_BL)
    torch.testing.assert_close(image_BD, theirs.image_embeds, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(text_BD, theirs.text_embeds, atol=TOLERANCE, rtol=0)


OPEN_CLIP = {
    "RN50": "RN50-quickgelu",
    "ViT-B-32": "ViT-B-32-quickgelu",
    "ViT-B-16": "ViT-B-16-quickgelu",
    "ViT-L-14": "ViT-L-14-quickgelu",
    "ViT-L-14-336": "ViT-L-14-336-quickgelu",
    "ViT-H-14": "ViT-H-14-quickgelu",
}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_image_towers_equal_open_clip(name: str, tmp_path: Path) -> None:
    """OpenAI's and LAION's layouts; QuickGELU everywhere, as Chinese CLIP runs them."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    from training.model.clip import build_clip

    torch.manual_seed(40 + len(name))
    config = open_clip.get_model_config(OPEN_CLIP[name]) or open_clip.get_model_config(name)
    if config is None:
        pytest.skip(f"open_clip has no {OPEN_CLIP[name]}")
    config = {
        **config,
        "quick_gelu": True,
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
    }
    peer: Any = open_clip.model.CLIP(**config).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(parameter.half().float())
    image_BCHW = _pictures(MODELS[name].vision.image_size_px)
    with torch.no_grad():
        expected = F.normalize(peer.encode_image(image_BCHW), dim=-1)
    torch.save(peer.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    del peer
    model = build_clip(MODELS[name]).eval()
    initialise(model, image_weights=str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image_BCHW), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in ("RN50", "ViT-B-32")])
def test_what_we_write_cn_clips_loader_takes(name: str, tmp_path: Path) -> None:
    from training.model.clip import build_clip
    from training.weights.export import save_cn_clip

    torch.manual_seed(50)
    model = build_clip(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    save_cn_clip(str(tmp_path / f"clip_cn_{name.lower()}.pt"), model)
    ours = state_for_file(model)
    reference, _ = cn_clip.load_from_name(name, device="cpu", download_root=str(tmp_path))
    theirs = reference.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key].float(), value) for key, value in ours.items())


def test_224_to_336_equals_cn_clip(tmp_path: Path) -> None:
    """cn_clip's resize of ViT-L/14 to 336, run on the image tower's whole features."""
    from cn_clip.clip.model import resize_pos_embed  # type: ignore[import-untyped]

    small, large = cn_clip_model("ViT-L-14", seed=60), cn_clip_model("ViT-L-14-336", seed=61)
    torch.save({"state_dict": small.state_dict()}, tmp_path / "small.pt")
    state = dict(small.state_dict())
    resize_pos_embed(state, large)
    large.load_state_dict(state)
    del small, state
    image_BCHW = _pictures(336)
    with torch.no_grad():
        expected = F.normalize(large.encode_image(image_BCHW), dim=-1)
    del large
    model = load_model(str(tmp_path / "small.pt"), image_size_px=336)
    assert isinstance(model.config.vision, VisionTransformerConfig)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image_BCHW), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16", "ViT-H-14"])
def test_onnx_at_full_size(name: str, tmp_path: Path) -> None:
    """ViT-H/14's image tower is too large for a protobuf, so its weights are in a second file."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
    from training.weights.export import save_onnx

    torch.save({"state_dict": cn_clip_model(name, seed=70).state_dict()}, tmp_path / "clip_cn.pt")
    model = load_model(str(tmp_path / "clip_cn.pt"))
    differences = save_onnx(f"{tmp_path}/clip.", model)
    assert max(differences.values()) <= 1e-4
    assert (tmp_path / "clip.image.onnx.data").exists() == (name == "ViT-H-14")
    inputs = {"image": _pictures(224)[[0, 1, 0]], "text": _tokens()}
    for side, encode in (("image", model.encode_image), ("text", model.encode_text)):
        session = runtime.InferenceSession(tmp_path / f"clip.{side}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run([f"{side}_features"], {side: inputs[side].numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), encode(inputs[side]), atol=1e-4, rtol=0)
        del session
