"""Image towers: built from our literals they are the architectures that timm registers."""

import pytest
import timm
import torch

from training.model.config import MODELS
from training.model.vision import build_image_tower

TIMM_NAMES = {
    "RN50": "resnet50_clip",
    "ViT-B-16": "vit_base_patch16_clip_quickgelu_224",
    "ViT-L-14": "vit_large_patch14_clip_quickgelu_224",
    "ViT-L-14-336": "vit_large_patch14_clip_quickgelu_336",
    "ViT-H-14": "vit_huge_patch14_clip_quickgelu_224",
}


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_towers_are_timms(name: str) -> None:
    config = MODELS[name]
    with torch.device("meta"):
        ours = build_image_tower(config.vision, config.embed_dim)
        theirs = timm.create_model(TIMM_NAMES[name], num_classes=config.embed_dim)
    expected = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    if name != "RN50":
        del expected["head.bias"]  # CLIP's projection has none, timm's classifier does
    assert {key: tensor.shape for key, tensor in ours.state_dict().items()} == expected


def test_same_weights_same_features_as_timm() -> None:
    torch.manual_seed(0)
    config = MODELS["RN50"]
    ours = build_image_tower(config.vision, config.embed_dim).eval()
    theirs = timm.create_model("resnet50_clip", num_classes=config.embed_dim).eval()
    theirs.load_state_dict(ours.state_dict())
    image_BCHW = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(image_BCHW), theirs(image_BCHW), atol=1e-5, rtol=1e-5)
