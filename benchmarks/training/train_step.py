"""Measure one training step against cn_clip's: its towers and `get_loss`, forward and backward.

    python benchmarks/training/train_step.py                 # ViT-B/16 with RoBERTa-base, batch 8, one thread
    python benchmarks/training/train_step.py --full          # more rounds
    python benchmarks/training/train_step.py --device cuda   # bf16: ViT-B/16, L/14 and H/14, with utilisation
    python benchmarks/training/train_step.py --device cuda --models ViT-L-14 --batch 192

Both sides have the same weights, no dropout, and the same images and captions. Captions have lengths like
Flickr30K-CN's (19.7 characters in the mean); cn_clip computes on 52 tokens of each. `equal` says that the
loss and the gradient of every parameter agree in float32.

On the CPU the optimizer's step, the same in both, is timed apart. Times are CPU seconds of one thread, so
that other work on the machine does not count.

On a GPU, which its figures need, steps are whole ones, optimizer included, in samples a second by the clock:
ours in the engine that trains (DeepSpeed, `zero1_bf16`), cn_clip's in its automatic mixed precision, in
bfloat16, with AdamW. Each side has its fastest setting that runs there: activations are recomputed only if
memory asks for it. cn_clip's image tower attends by PyTorch's fused kernels; `--use-flash-attention` of its
own wants the interface of flash-attn 1, which later ones no longer have, and is left out. Utilisation counts
the operations that the model needs for captions as long as they are, by the data sheet's peak. `equal` asks
for float32 on the GPU too, and for losses of the bfloat16 steps that agree to 0.05.

A GPU's second peer is open_clip with both towers on the same weights: its own image tower, and transformers'
BERT by its `HFTextEncoder`. It trains as its `--precision amp_bf16 --torchcompile --local-loss
--gather-with-grad` does, with fused AdamW; a record says whether torch compiled it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
from typing import Any

import torch

from benchmarks.harness import line, parse, parser, record, report, seconds
from benchmarks.training.step_models import KINDS, Kind
from benchmarks.training.step_pair import BATCH, Pair
from benchmarks.training.whole_steps import compare_on_accelerator
from training.engine.optim import build_optimizer
from training.model.config import MODELS

# Samples a step on a GPU: as many as leave room for the activations of a step in 80 GB.
GPU_BATCHES = {"ViT-B-16": 512, "ViT-L-14": 192, "ViT-H-14": 96}


def main() -> int:
    options = _options()
    if options.device == "cpu":
        torch.set_num_threads(1)
        results = [compare(kind, options.rounds or (5 if options.full else 2)) for kind in KINDS]
    else:
        results = []
        rounds = options.rounds or (30 if options.full else 10)
        for model in options.models:
            batch_size = options.batch or GPU_BATCHES.get(model, 256)
            results += compare_on_accelerator(model, options.device, batch_size, rounds)
    for result in results:
        print(
            f"{line(result)}, optimizer {result['optimizer_seconds']:.3f} s, utilisation"
            f" {result.get('utilisation')} and {result.get('peer_utilisation')}"
        )
    return report(results)


def _options() -> argparse.Namespace:
    made = parser(__doc__, device=True)
    made.add_argument("--rounds", type=int, help="default: 2 (CPU) or 10 (GPU), with --full 5 or 30")
    made.add_argument(
        "--models", nargs="+", choices=sorted(MODELS), help=f"on a GPU; default: {', '.join(GPU_BATCHES)}"
    )
    made.add_argument("--batch", type=int, help="samples a step on a GPU; default: by model")
    options = parse(made)
    if options.device == "cpu" and (options.models or options.batch):
        made.error("--models and --batch need --device cuda: on the CPU it is ViT-B/16 with 8 samples")
    options.models = options.models or list(GPU_BATCHES)
    return options


def compare(kind: Kind, rounds: int) -> dict[str, Any]:
    """Return samples a CPU second of both sides on one batch, forward and backward."""
    pair = Pair("ViT-B-16", kind, "cpu")
    equal = pair.agree()
    taken = pair.seconds(rounds)
    pair.our_step()
    adam = build_optimizer(pair.clip, pair.config)
    start = seconds()
    adam.step()
    return record(
        f"train_step/{kind}",
        ours=BATCH / taken["ours"],
        peer=BATCH / taken["peer"],
        unit="samples/CPU s",
        equal=equal,
        gradients_apart=float(f"{pair.gradients_apart:.1e}"),
        optimizer_seconds=round(seconds() - start, 3),
    )


if __name__ == "__main__":
    sys.exit(main())
