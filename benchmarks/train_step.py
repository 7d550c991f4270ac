"""One training step against cn_clip's: its towers and `get_loss`, forward and backward; optimizer apart.

    python benchmarks/train_step.py           # ViT-B/16 with RoBERTa-base, batch 8, one thread
    python benchmarks/train_step.py --full    # more rounds

Both sides have the same weights, no dropout, and the same pictures and captions. Captions have lengths like
Flickr30K-CN's (19.7 characters in the mean); cn_clip computes on 52 tokens of each. The optimizer's step, the
same in both, is timed apart. Times are CPU seconds of one thread, so that other work on the machine does not
count.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from cn_clip_peer import cn_clip_of
from torch import Tensor
from torch.nn import functional as F

from training.config import TrainConfig
from training.engine import Towers
from training.model.clip import CLIP, build_clip
from training.model.config import VIT_B_16
from training.model.weights import state_for_file
from training.optim import build_optimizer

BATCH, CONTEXT_LENGTH = 8, 52
TOLERANCE = 1e-4  # of losses, and of gradients relative to the longest
CACHE_TOLERANCE = 2e-3  # of the loss on float16 features


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--full", action="store_true", help="more rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 5 if options.full else 2
    results = [
        compare("train_step/live", rounds, lock_image=True, cached=False),
        compare("train_step/cached", rounds, lock_image=True, cached=True),
        compare("train_step/stage2", rounds, lock_image=False, cached=False),
    ]
    for result in results:
        print(
            f"{result['name']:<18} ours {result['ours']:.3f} peer {result['peer']:.3f} {result['unit']},"
            f" ratio {result['ratio']:.2f}, equal {result['equal']},"
            f" optimizer {result['optimizer_seconds']:.2f} s"
        )
    print(json.dumps(results))
    return 0 if all(result["equal"] for result in results) else 1


def compare(name: str, rounds: int, *, lock_image: bool, cached: bool) -> dict[str, Any]:
    """Samples a CPU second of both sides on one batch."""
    torch.manual_seed(0)
    clip = build_clip(replace(VIT_B_16, text=replace(VIT_B_16.text, dropout=0.0)))
    peer = peer_of(clip)
    if lock_image:
        clip.lock_image_tower()
        for parameter_name, parameter in peer.named_parameters():
            if parameter_name.startswith("visual."):
                parameter.requires_grad = False  # as its `--freeze-vision`
    clip.train()
    peer.train()
    image_BCHW, tokens_BL = make_batch()
    config = TrainConfig(epochs=1, global_batch=BATCH, lanes=1, lock_image=lock_image)
    towers = Towers(clip, num_samples_of_ranks=(BATCH,), config=config)
    pixel_BCHW = towers.normalise(image_BCHW)
    image = image_BCHW
    if cached:
        with torch.no_grad():
            image = clip.encode_image(pixel_BCHW).half()
    batch = SimpleNamespace(image_id_B=None, caption_id_B=None)

    def our_step() -> Tensor:
        loss = towers.loss(*towers(image, tokens_BL), batch)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def peer_step() -> Tensor:
        return peer_forward_backward(peer, pixel_BCHW, tokens_BL)

    losses, gradients = [], []
    for model, step in ((clip, our_step), (peer, peer_step)):
        losses.append(step())  # also the warm-up
        gradients.append(model.text_projection.grad.clone())
        model.zero_grad()
    tolerance = CACHE_TOLERANCE if cached else TOLERANCE
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    equal = abs(losses[0] - losses[1]).item() < tolerance and apart.item() < 10 * tolerance
    ours, theirs = seconds(rounds, (our_step, clip), (peer_step, peer))
    our_step()
    adam = build_optimizer(clip, config)
    start = time.process_time()
    adam.step()
    return {
        "name": name,
        "ours": round(BATCH / ours, 3),
        "peer": round(BATCH / theirs, 3),
        "unit": "samples/CPU s",
        "ratio": round(theirs / ours, 3),
        "equal": bool(equal),
        "optimizer_seconds": round(time.process_time() - start, 3),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}",
    }


def seconds(rounds: int, *sides: tuple[Callable[[], Tensor], torch.nn.Module]) -> list[float]:
    """Median CPU seconds of each side's step, in turn, so that noise hits all alike."""
    found: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for times, (step, model) in zip(found, sides, strict=True):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
            model.zero_grad()
    return [statistics.median(times) for times in found]


def make_batch() -> tuple[Tensor, Tensor]:
    """uint8 pictures of noise, and token ids of captions padded to 52."""
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.randint(0, 256, (BATCH, 3, 224, 224), generator=generator, dtype=torch.uint8)
    tokens_BL = torch.zeros(BATCH, CONTEXT_LENGTH, dtype=torch.int64)
    for row, length in enumerate((11, 14, 16, 18, 20, 22, 25, 32)):  # characters, 19.75 in the mean
        tokens_BL[row, : length + 2] = torch.randint(700, 8000, (length + 2,), generator=generator)
    return image_BCHW, tokens_BL


def peer_of(clip: CLIP) -> Any:
    """cn_clip's model with the same weights."""
    peer = cn_clip_of(clip.config)
    found = peer.load_state_dict(state_for_file(clip), strict=False)
    lacking = [key for key in found.missing_keys if "pooler" not in key and "position_ids" not in key]
    assert not lacking, lacking
    assert not found.unexpected_keys, found.unexpected_keys
    return peer


def peer_forward_backward(peer: Any, pixel_BCHW: Tensor, tokens_BL: Tensor) -> Tensor:
    """What cn_clip's `train` does between loading a batch and stepping, at one rank."""
    from cn_clip.training import train

    options = SimpleNamespace(
        accum_freq=1,
        aggregate=False,
        distillation=False,
        mask_ratio=0,
        local_device_rank=0,
        report_training_batch_acc=False,
    )
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor):
        cross_entropy = F.cross_entropy
        loss, _ = train.get_loss(peer, pixel_BCHW, tokens_BL, cross_entropy, cross_entropy, options)
    loss.backward()
    found: Tensor = loss.detach()
    return found


if __name__ == "__main__":
    sys.exit(main())
