"""The two-tower model: features, initial values, locking, activation checkpointing."""

import copy
import math

import pytest
import torch

from training.model.clip import CLIP, build_clip
from training.model.config import MODELS


def _model(name: str) -> CLIP:
    torch.manual_seed(0)
    return build_clip(MODELS[name], vocab_size=40)


def _batch(model: CLIP, size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    side = model.config.vision.image_size_px
    generator = torch.Generator().manual_seed(1)
    image_BCHW = torch.randn(size, 3, side, side, generator=generator)
    return image_BCHW, torch.randint(1, 40, (size, 6), generator=generator)


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_features_are_unit_norm_float32(name: str) -> None:
    model = _model(name).eval()
    image_BD, text_BD = model(*_batch(model))
    assert image_BD.shape == text_BD.shape == (3, MODELS[name].embed_dim)
    assert image_BD.dtype == text_BD.dtype == torch.float32
    torch.testing.assert_close(image_BD.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text_BD.norm(dim=-1), torch.ones(3))


def test_padding_changes_nothing() -> None:
    model = _model("tiny-vit").eval()
    tokens_BL = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    padded_BL = torch.nn.functional.pad(tokens_BL, (0, 5))
    torch.testing.assert_close(model.encode_text(padded_BL), model.encode_text(tokens_BL))
    torch.testing.assert_close(model.encode_text(tokens_BL)[1:], model.encode_text(tokens_BL[1:, :3]))
    assert torch.equal(model.encode_text(tokens_BL.int()), model.encode_text(tokens_BL))


@pytest.mark.parametrize(("name", "init_std"), [("tiny-rn", 0.09), ("tiny-vit", 0.02)])
def test_initial_values_are_those_of_appendix_a2(name: str, init_std: float) -> None:
    torch.manual_seed(0)
    model = build_clip(MODELS[name])
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert model.text_projection.std().item() == pytest.approx(MODELS[name].text.width ** -0.5, rel=0.05)
    assert model.bert.get_parameter("embeddings.word_embeddings.weight").std().item() == pytest.approx(
        init_std, rel=0.02
    )


def test_image_projection_from_scratch_has_unit_gain() -> None:
    torch.manual_seed(0)
    model = build_clip(MODELS["tiny-rn"])
    projection = model.visual.get_parameter("head.proj.weight")
    assert projection.std().item() == pytest.approx(projection.shape[1] ** -0.5, rel=0.02)


def test_vocabulary_size_of_the_corpus_replaces_the_configured_one() -> None:
    model = _model("tiny-vit")
    assert (
        model.config.text.vocab_size
        == len(model.bert.get_parameter("embeddings.word_embeddings.weight"))
        == 40
    )
    assert MODELS["tiny-vit"].text.vocab_size == 1000


def test_locked_image_tower_keeps_every_bit_while_the_rest_trains() -> None:
    model = _model("tiny-rn")
    model.lock_image_tower()
    model.train()
    assert model.training
    assert model.bert.training
    assert not any(module.training for module in model.visual.modules())
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    image_BD, text_BD = model(*_batch(model))
    (model.logit_scale.exp() * (image_BD * text_BD).sum()).backward()
    optimizer.step()
    after = model.state_dict()
    unchanged = {name for name in after if torch.equal(after[name], before[name])}
    assert {name for name in after if name.startswith("visual.")} <= unchanged
    assert {"text_projection", "logit_scale"}.isdisjoint(unchanged)
    assert not image_BD.requires_grad
    assert all(parameter.grad is None for parameter in model.visual.parameters())


def test_unlocked_batch_norm_learns_its_statistics() -> None:
    model = _model("tiny-rn")
    before = copy.deepcopy(model.visual.state_dict())
    model.encode_image(_batch(model)[0])
    name = "stem.conv1.bn.running_mean"
    assert not torch.equal(model.visual.state_dict()[name], before[name])


@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_activation_checkpointing_changes_no_gradient_and_no_statistic(name: str) -> None:
    plain = _model(name)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_activation_checkpointing(True)
    losses = []
    for model in (plain, checkpointed):
        torch.manual_seed(2)  # the same dropout in both
        image_BD, text_BD = model(*_batch(model, size=4))
        loss = (image_BD @ text_BD.T).square().sum()
        loss.backward()
        losses.append(loss)
    assert torch.equal(losses[0], losses[1])
    gradients = {key: parameter.grad for key, parameter in checkpointed.named_parameters()}
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[key], parameter.grad, rtol=0, atol=0)
    statistics = dict(checkpointed.named_buffers())
    assert all(torch.equal(buffer, statistics[key]) for key, buffer in plain.named_buffers())


def test_activation_checkpointing_stores_less_and_can_be_switched_off() -> None:
    def bytes_stored(model: CLIP) -> int:
        stored = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal stored
            stored += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(*_batch(model))
        return stored

    model = _model("tiny-rn")
    plain = bytes_stored(model)
    model.set_activation_checkpointing(True)
    checkpointed = bytes_stored(model)
    model.set_activation_checkpointing(False)
    assert checkpointed < 0.7 * plain
    assert bytes_stored(model) == plain
