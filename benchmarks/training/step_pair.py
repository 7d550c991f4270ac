"""Compare a step of both sides in float32: losses, gradients, and seconds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import in_turns, medians, seconds
from benchmarks.peers import Peer, cn_clip_loss, named_as_chinese_clip, open_clip_loss
from benchmarks.training.step_models import Kind, config_of, make_batch, models_of
from training.engine.towers import Towers
from training.model.clip import CLIP, build_clip
from training.model.preprocess import normalise
from training.weights.weights import state_for_file

BATCH = 8
TOLERANCE = 1e-4  # of losses; of a gradient relative to its length ten times that
CACHE_TOLERANCE = 2e-3  # of the loss on float16 features
# Gradients shorter than this share of the longest are rounding (those of keys' biases are 0 by formula).
NOISE = 1e-4
LOSSES: dict[Peer, Callable[..., Tensor]] = {"cn_clip": cn_clip_loss, "open_clip": open_clip_loss}


class Pair:
    """Both sides in float32, with the same weights, on one batch of 8."""

    def __init__(self, model: str, kind: Kind, device: str, peer: Peer = "cn_clip") -> None:
        self.config = config_of(kind, BATCH)
        self._device = device
        self.clip, self.peer = models_of(model, kind, peer)
        self._loss_of_peer = LOSSES[peer]
        self.clip.to(device)
        self.peer.to(device)
        self.towers = Towers(self.clip, num_samples_of_ranks=(BATCH,), config=self.config).to(device)
        image_BCHW, self._tokens_BL = make_batch(model, BATCH)
        self._image: Tensor = image_BCHW.to(device)
        self._pixel_BCHW = normalise(self._image)
        if kind == "cached":
            with torch.no_grad():
                self._image = self.clip.encode_image(self._pixel_BCHW).half()
        self._tolerance = CACHE_TOLERANCE if kind == "cached" else TOLERANCE
        self.gradients_apart = float("nan")

    def our_step(self) -> Tensor:
        features = self.towers(self._image, self._tokens_BL)
        loss = self.towers.loss(features, SimpleNamespace(image_id_B=None, caption_id_B=None))  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def peer_step(self) -> Tensor:
        loss = self._loss_of_peer(self.peer, self._pixel_BCHW, self._tokens_BL.to(self._device))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def agree(self) -> bool:
        """Return whether the loss and every gradient are the same; also the warm-up."""
        losses = [self.our_step(), self.peer_step()]
        ours, theirs = gradients_of(self.clip), gradients_of(self.peer)
        assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
        noise = NOISE * max(float(gradient.norm()) for gradient in theirs.values())
        self.gradients_apart = max(
            float((ours[name] - gradient).norm()) / max(float(gradient.norm()), noise)
            for name, gradient in theirs.items()
        )
        for model in (self.clip, self.peer):
            model.zero_grad()
        loss_apart = abs(losses[0] - losses[1]).item()
        return bool(loss_apart < self._tolerance and self.gradients_apart < 10 * self._tolerance)

    def seconds(self, rounds: int) -> dict[str, float]:
        """Return median seconds of each side's step."""
        models = {"ours": self.clip, "peer": self.peer}
        return medians(
            in_turns(
                {"ours": self.our_step, "peer": self.peer_step},
                rounds,
                lambda: seconds(self._device),
                after=lambda side: models[side].zero_grad(),
            )
        )


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Return gradients of our model or of a peer's, by the names in cn_clip's files."""
    if isinstance(model, CLIP):
        trained = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
        holder = build_clip(model.config)
        holder.load_state_dict(
            {
                name: tensor.grad.cpu() if name in trained else torch.zeros_like(tensor, device="cpu")
                for name, tensor in model.state_dict(keep_vars=True).items()
            }
        )
        found = state_for_file(holder)
    else:
        found = named_as_chinese_clip(
            {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
        )
    return {name: tensor.detach().float().cpu() for name, tensor in found.items() if tensor.any()}
