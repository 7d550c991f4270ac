"""Same weights, same features as cn_clip and open_clip; same captions, same token ids."""

import random
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.peer_models import STRUCTURES, cn_clip_of
from training.model.clip import CLIP, build_clip
from training.model.config import (
    MODELS,
    ModelConfig,
    ModifiedResNetConfig,
    TextConfig,
    VisionTransformerConfig,
)
from training.model.tokenizer import Tokenizer, normalise
from training.weights.initialise import initialise
from training.weights.torchscript import write_torchscript
from training.weights.weights import is_image_side, save_checkpoint, state_for_file

TOLERANCE = 1e-5  # of unit-norm features, both sides in float32

TEXT = TextConfig(layers=2, width=64, heads=4, vocab_size=21128, max_positions=60)
PEERS = {
    "modified-resnet": ModelConfig(
        name="peer-rn",
        embed_dim=48,
        vision=ModifiedResNetConfig(image_size_px=96, blocks=(1, 2, 1, 2), width=512),
        text=TEXT,
    ),
    "vit": ModelConfig(
        name="peer-vit",
        embed_dim=48,
        vision=VisionTransformerConfig(image_size_px=56, patch_size_px=14, layers=3, width=160, heads=2),
        text=TEXT,
    ),
}

cn_clip = pytest.importorskip("cn_clip.clip", reason="cn_clip, Chinese CLIP's own code, is not installed")


def _cn_clip_model(config: ModelConfig) -> Any:
    """cn_clip's own class, with running statistics that fit, so that features differ between images."""
    reference = cn_clip_of(config, 0)
    with torch.no_grad():
        reference.train()
        for _ in range(10):
            reference.visual(_images(config, 8))
    return reference.eval()


def _images(config: ModelConfig, size: int) -> torch.Tensor:
    """Return noise images of different colours, because plain noise all looks alike to a network."""
    side = config.vision.image_size_px
    return torch.randn(size, 3, side, side) + 2 * torch.randn(size, 3, 1, 1)


def _take_over(model: CLIP, reference: Any, path: Path) -> None:
    """Load the reference's weights: the image side as an archive, the text side by its own names."""
    state = {name: tensor for name, tensor in reference.state_dict().items() if "bert.pooler" not in name}
    image_side = {name: tensor for name, tensor in state.items() if is_image_side(name)}
    write_torchscript(str(path), image_side, {})
    initialise(model, image_weights=str(path))
    text = {name.removeprefix("bert."): tensor for name, tensor in state.items() if name.startswith("bert.")}
    model.bert.load_state_dict(text)
    with torch.no_grad():
        model.text_projection.copy_(state["text_projection"])


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS.keys())
def test_both_towers_equal_cn_clip(config: ModelConfig, tmp_path: Path) -> None:
    reference, model = _cn_clip_model(config), build_clip(config).eval()
    _take_over(model, reference, tmp_path / "reference.pt")
    captions = ["一只红色的猫", "a blue square", "“两个”黄色的圆形，很大。" * 4, ""]
    tokens_BL = cn_clip.tokenize(captions)
    image_BCHW = _images(config, 3)
    with torch.no_grad():
        image_features = torch.nn.functional.normalize(reference.encode_image(image_BCHW), dim=-1)
        text_features = torch.nn.functional.normalize(reference.encode_text(tokens_BL), dim=-1)
        torch.testing.assert_close(model.encode_image(image_BCHW), image_features, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens_BL), text_features, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp(), reference.logit_scale.exp().reshape(1))
    assert image_features.std(dim=0).max() > 0.01  # features that differ between pictures


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_paper_models_have_cn_clips_tensors_and_heads(name: str) -> None:
    from cn_clip.clip.utils import create_model  # type: ignore[import-untyped]

    with torch.device("meta"):
        model, reference = build_clip(MODELS[name]), create_model(STRUCTURES[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # meta tensors have no bytes to move
        ours = {key: tensor.shape for key, tensor in state_for_file(model).items()}
    state = reference.state_dict()
    assert ours == {key: tensor.shape for key, tensor in state.items() if "bert.pooler" not in key}
    config, text = MODELS[name], reference.bert_config
    assert config.text.heads == text.num_attention_heads
    assert (config.text.dropout, config.text.max_positions) == (
        text.hidden_dropout_prob,
        text.max_position_embeddings,
    )
    if isinstance(config.vision, VisionTransformerConfig):
        assert config.vision.heads == reference.visual.transformer.resblocks[0].attn.num_heads
    else:
        assert config.vision.heads == reference.visual.attnpool.num_heads


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS.keys())
def test_checkpoints_have_cn_clips_names_and_values(config: ModelConfig, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    reference, model = _cn_clip_model(config), build_clip(config)
    _take_over(model, reference, tmp_path / "reference.pt")
    save_checkpoint(str(tmp_path / "ours.safetensors"), model, model.config, {})
    ours = load_file(tmp_path / "ours.safetensors")
    theirs = {name: tensor for name, tensor in reference.state_dict().items() if "bert.pooler" not in name}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("config", PEERS.values(), ids=PEERS.keys())
def test_gradients_equal_cn_clip(config: ModelConfig, tmp_path: Path) -> None:
    """The image tower in training mode, where batch norms use the batch; the text tower without dropout.

    The residual network in double precision: batch norms over three pictures blow rounding up to a hundredth
    of the gradient. The transformer in single, since the reference's layer norm knows nothing else.
    """
    reference, model = _cn_clip_model(config), build_clip(config).eval()
    _take_over(model, reference, tmp_path / "reference.pt")
    if config.vision.kind == "modified_resnet":
        reference.double(), model.double()
    reference.visual.train(), model.visual.train()
    tokens_BL = cn_clip.tokenize(["一只红色的猫", "两个圆", "三角形"])
    image_BCHW = _images(config, 3).to(model.text_projection.dtype)
    image_features, text_features, scale = reference(image_BCHW, tokens_BL)
    (scale * (image_features * text_features).sum()).backward()
    image_BD, text_BD = model(image_BCHW, tokens_BL)
    (model.logit_scale.exp() * (image_BD * text_BD).sum()).backward()
    with torch.no_grad():
        for parameter in [*model.parameters(), *reference.parameters()]:
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
    ours = state_for_file(model)
    theirs = {
        name: parameter.data for name, parameter in reference.named_parameters() if parameter.grad is not None
    }
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    errors = {name: float((ours[name] - gradient).norm() / total) for name, gradient in theirs.items()}
    assert max(errors.values()) < TOLERANCE, max(errors, key=errors.__getitem__)


def _captions() -> list[str]:
    """Captions from all over Unicode, with what trips tokenizers: accents, controls, spaces, brackets."""
    generator = random.Random(0)
    ranges = [(0x20, 0x2FF), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x2000, 0x30FF), (0xE000, 0xFFFD)]
    ranges += [(0x20000, 0x2CFFF), (0x2F800, 0x2FA1F), (0x1F000, 0x1FAFF), (0xD800, 0xDFFF)]
    characters = [chr(generator.randint(*generator.choice(ranges))) for _ in range(2000)]
    characters += list("aeiouAEIOUΣσςİıßẞ 　\t\n\x85\u2028“”‘’\"'#[]一二红猫") * 10
    captions = ["".join(generator.choices(characters, k=generator.randint(0, 80))) for _ in range(10_000)]
    return [*captions, "[SEP] [MASK] 你好", "", "   ", "a" * 200, "a" * 201, "ΑΣ ΑΣ.", "Ⅷ ﬁ ㍿", "“引号”"]


def test_token_ids_equal_cn_clip() -> None:
    tokenizer = Tokenizer.load(str(Path(cn_clip.__file__).parent / "vocab.txt"))
    captions = _captions()
    # the reference's data loaders, not its tokenizer, lower and fold quotes
    prepared = [caption.lower().replace("“", '"').replace("”", '"') for caption in captions]
    reference = cn_clip.tokenize(prepared, context_length=52).numpy()
    assert (tokenizer.encode(captions, 52) == reference).all()
    lengths = [len(cn_clip._tokenizer.tokenize(caption)) for caption in prepared]
    assert tokenizer.num_truncated(captions, 52) == sum(length > 50 for length in lengths) > 0


def _differing_characters(code_points: range) -> list[str]:
    split = cn_clip._tokenizer.basic_tokenizer.tokenize
    characters = [chr(code_point) for code_point in code_points if not 0xD800 <= code_point <= 0xDFFF]
    return [
        unicodedata.name(character, hex(ord(character)))
        for character in characters
        if character not in "“”" and normalise(f"a{character}b").split() != split(f"a{character}b".lower())
    ]


def test_every_common_character_is_normalised_as_cn_clip_does() -> None:
    assert _differing_characters(range(0x3400)) == []
    assert _differing_characters(range(0xE000, 0x10000)) == []


@pytest.mark.slow  # a million characters
def test_every_character_is_normalised_as_cn_clip_does() -> None:
    assert _differing_characters(range(0x110000)) == []


def test_an_archive_that_torch_made_of_open_clip_is_taken_over(tmp_path: Path) -> None:
    """open_clip keeps OpenAI's names; traced, halved and saved by torch it is what OpenAI published."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    config = MODELS["tiny-vit"]
    vision = config.vision
    assert isinstance(vision, VisionTransformerConfig)
    torch.manual_seed(0)
    peer = open_clip.model.CLIP(
        embed_dim=config.embed_dim,
        vision_cfg=open_clip.CLIPVisionCfg(
            layers=vision.layers,
            width=vision.width,
            head_width=vision.width // vision.heads,
            patch_size=vision.patch_size_px,
            image_size=vision.image_size_px,
        ),
        text_cfg=open_clip.CLIPTextCfg(context_length=8, vocab_size=16, width=16, heads=2, layers=1),
        quick_gelu=True,
    ).eval()
    peer.half().float()  # values that half precision holds
    image_BCHW = _images(config, 2)
    with torch.no_grad():
        expected = peer.encode_image(image_BCHW, normalize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and wary of the peer's assertions
        trace: Any = torch.jit.trace
        traced = trace(peer, (image_BCHW, torch.ones(2, 8, dtype=torch.long)), check_trace=False)
        torch.jit.save(traced.half(), str(tmp_path / "peer.pt"))

    model = build_clip(config, vocab_size=30).eval()
    provenance = initialise(model, image_weights=str(tmp_path / "peer.pt"))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image_BCHW), expected, atol=TOLERANCE, rtol=0)
    assert {item.tensor for item in provenance if item.outcome == "dropped"} >= {"token_embedding.weight"}
