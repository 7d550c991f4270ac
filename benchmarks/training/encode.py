"""Measure encoding and tokenising against cn_clip: samples a second, with the same weights and answers.

    python benchmarks/training/encode.py                 # under 5 minutes on 2 cores; ViT-B/16, RoBERTa-base
    python benchmarks/training/encode.py --full          # more captions and images
    python benchmarks/training/encode.py --device cuda   # bf16; B/16, L/14, H/14; transformers too; MFU

cn_clip pads every caption to 52 tokens; this project computes on no padding. Captions are those of `--emoji
FOLDER` (the emoji_zh corpus: name and keywords) if it is given, and made ones with lengths as in
Flickr30K-CN (19.7 characters in the mean). Times are medians of alternating rounds, by the clock and in CPU
seconds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import contextlib
import io
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.harness import parse, parser, record, report
from training.config.train import CONTEXT_LENGTH
from training.encoder import Encoder
from training.flops import PEAK_FLOPS, find_device, image_forward, text_forward
from training.model.clip import CLIP
from training.model.config import MODELS
from training.model.tokenizer import Tokenizer
from training.weights.weights import fill, tensor_slots

PEER_BATCH = 64
TOLERANCE = 1e-5  # of unit-norm float32 features
TOLERANCE_BF16 = 2e-2
FLICKR_MEAN_CHARACTERS = 19.7
STRUCTURES = {
    "ViT-B-16": "ViT-B-16@RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14": "ViT-L-14@RoBERTa-wwm-ext-base-chinese",
    "ViT-H-14": "ViT-H-14@RoBERTa-wwm-ext-large-chinese",
}


def main() -> int:
    options = _options()
    try:
        import cn_clip.clip as cn_clip
    except ImportError:
        print("cn_clip is not installed: pip install --no-deps cn_clip==1.6.0 and lmdb, six", file=sys.stderr)
        return 2
    tokenizer = Tokenizer.load(str(Path(cn_clip.__file__).parent / "vocab.txt"))
    captions = {"": made_captions(4000)}
    if options.emoji is not None:
        captions["@emoji_zh"] = emoji_captions(options.emoji)
    results = [
        compare_tokenising(f"encode/tokenise{suffix}", tokenizer, cn_clip, texts)
        for suffix, texts in captions.items()
    ]
    if options.device == "cpu":
        results += _on_cpu(tokenizer, cn_clip, captions, options.full)
    else:
        for name in STRUCTURES:
            results += on_gpu(name, tokenizer, cn_clip, captions[""][:2048], options.device)
    for result in results:
        print(
            f"{result['name']:<28} {result['ours']:>9.1f} {result['peer']:>9.1f} {result['unit']},"
            f" ratio {result['ratio']:.2f} (CPU time {result['cpu_ratio']:.2f}), equal {result['equal']}"
        )
    return report(results)


def _options() -> argparse.Namespace:
    made = parser(__doc__, full="more captions and images", device=True)
    made.add_argument("--emoji", metavar="FOLDER", help="the emoji_zh corpus, for its captions")
    return parse(made)


def made_captions(count: int) -> list[str]:
    """Return captions of common characters, their lengths spread as Flickr30K-CN's: 19.7 in the mean."""
    generator = random.Random(0)
    characters = (
        "一个穿着红色衣服的小女孩在公园里和狗玩耍男人女人坐站走跑看街道上树下水边白黑蓝色车大两群们，着正前面"
    )
    lengths = [max(5, round(generator.gammavariate(8, FLICKR_MEAN_CHARACTERS / 8))) for _ in range(count)]
    return ["".join(generator.choices(characters, k=length)) for length in lengths]


def emoji_captions(folder: str) -> list[str]:
    """Return name and keywords of every image of the corpus, as its runs train on them."""
    import polars as pl

    frame = pl.scan_parquet(f"{folder}/*.parquet").select("name_zh", "keywords_zh").collect()
    keywords = frame["keywords_zh"].to_list()
    joined = ["、".join(words) if isinstance(words, list) else str(words) for words in keywords]
    return [f"{name}，{words}" for name, words in zip(frame["name_zh"].to_list(), joined, strict=True)]


@dataclass(frozen=True, slots=True)
class Time:
    """Median of a few runs."""

    wall_s: float
    cpu_s: float  # of all threads: what other work on the machine does not stretch


def times_in_turn(*functions: Callable[[], Any], rounds: int) -> tuple[list[Time], list[Any]]:
    """Return each one's time over rounds in turn (noise hits all alike), and its last result."""
    wall_s: list[list[float]] = [[] for _ in functions]
    cpu_s: list[list[float]] = [[] for _ in functions]
    results: list[Any] = [function() for function in functions]  # warm-up
    for _ in range(rounds):
        for index, function in enumerate(functions):
            start, start_cpu = time.perf_counter(), time.process_time()
            results[index] = function()
            wall_s[index].append(time.perf_counter() - start)
            cpu_s[index].append(time.process_time() - start_cpu)
    return [Time(*map(statistics.median, both)) for both in zip(wall_s, cpu_s, strict=True)], results


def rates(name: str, count: int, ours: Time, peer: Time, equal: bool, device: str = "cpu") -> dict[str, Any]:
    """Return one result: samples a second by the clock; `cpu_ratio` is the ratio in CPU seconds."""
    return record(
        name,
        ours=count / ours.wall_s,
        peer=count / peer.wall_s,
        unit="samples/s",
        equal=equal,
        device=device,
        cpu_ratio=round(peer.cpu_s / ours.cpu_s, 3),
    )


def compare_tokenising(name: str, tokenizer: Tokenizer, cn_clip: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Compare tokenising to padded ids; for cn_clip, case and quotes are folded as its data loader does."""

    def theirs() -> Any:
        return cn_clip.tokenize([_as_its_loader(text) for text in texts], context_length=CONTEXT_LENGTH)

    (ours_s, peer_s), (ours, peer) = times_in_turn(
        lambda: tokenizer.encode(texts, CONTEXT_LENGTH), theirs, rounds=15
    )
    return rates(name, len(texts), ours_s, peer_s, bool((ours == peer.numpy()).all()))


def _as_its_loader(text: str) -> str:
    return text.lower().replace("“", '"').replace("”", '"')


def models_of(name: str, cn_clip: Any) -> tuple[CLIP, Any]:
    """Return our model and cn_clip's, in float32, with the same random weights."""
    from cn_clip.clip.utils import create_model

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its configuration
        peer = create_model(STRUCTURES[name]).float().eval()
    model = CLIP(MODELS[name]).eval()
    fill(tensor_slots(model), peer.state_dict(), "cn_clip", "")
    return model, peer


def _on_cpu(
    tokenizer: Tokenizer, cn_clip: Any, captions: dict[str, list[str]], full: bool
) -> list[dict[str, Any]]:
    num_texts, num_images, rounds = (1024, 32, 5) if full else (96, 4, 3)
    model, peer = models_of("ViT-B-16", cn_clip)
    encoder = Encoder(model, tokenizer, device="cpu")
    results = []
    for suffix, texts in captions.items():
        chosen = random.Random(1).sample(texts, num_texts)
        tokens_NL = tokenizer.encode(chosen, CONTEXT_LENGTH)
        padded_NL = torch.from_numpy(tokens_NL).long()

        def ours_text(tokens_NL: Any = tokens_NL) -> Any:
            return encoder.embed_tokens(tokens_NL)

        def peer_text(padded_NL: torch.Tensor = padded_NL) -> Any:
            with torch.inference_mode():
                parts = [F.normalize(peer.encode_text(part), dim=-1) for part in padded_NL.split(PEER_BATCH)]
            return torch.cat(parts).numpy()

        (ours_s, peer_s), (ours, theirs) = times_in_turn(ours_text, peer_text, rounds=rounds)
        equal = bool(np.abs(ours - theirs).max() <= TOLERANCE)
        results.append(rates(f"encode/text{suffix}", num_texts, ours_s, peer_s, equal))
    image_BCHW = torch.randn(num_images, 3, 224, 224, generator=torch.Generator().manual_seed(2))

    def peer_image() -> Any:
        with torch.inference_mode():
            return F.normalize(peer.encode_image(image_BCHW), dim=-1).numpy()

    (ours_s, peer_s), (ours, theirs) = times_in_turn(
        lambda: encoder.embed_pixels(image_BCHW), peer_image, rounds=max(5, rounds)
    )
    equal = bool(np.abs(ours - theirs).max() <= TOLERANCE)
    results.append(rates("encode/image", num_images, ours_s, peer_s, equal))
    return results


def on_gpu(
    name: str,
    tokenizer: Tokenizer,
    cn_clip: Any,
    texts: Sequence[str],
    device: str,
    num_images: int = 256,
) -> list[dict[str, Any]]:
    """Measure bf16 throughput of ours, cn_clip and transformers, and its share of the peak."""
    model, peer = models_of(name, cn_clip)
    third, peer = _transformers_model(model).to(device), peer.to(device)
    encoder = Encoder(model, tokenizer, device=device)
    image_BCHW = torch.randn(num_images, 3, 224, 224, device=device)
    tokens_NL = tokenizer.encode(texts, CONTEXT_LENGTH)
    padded_NL = torch.from_numpy(tokens_NL).long().to(device)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16)

    def run(function: Callable[[], torch.Tensor]) -> Any:
        with torch.inference_mode(), autocast:
            found = F.normalize(function().float(), dim=-1)
        return found.cpu().numpy()  # waits for the device

    def in_batches(encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.cat([encode(part) for part in padded_NL.split(512)])

    def ours_text() -> Any:
        with autocast:
            return encoder.embed_tokens(tokens_NL)

    def third_text(part_BL: torch.Tensor) -> torch.Tensor:
        hidden = third.text_model(input_ids=part_BL, attention_mask=part_BL.ne(0).long()).last_hidden_state
        projected: torch.Tensor = third.text_projection(hidden[:, 0])
        return projected

    known = find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    peak = PEAK_FLOPS[known] if known is not None else None
    results = []
    for side, count, flops, functions in (
        (
            "text",
            len(texts),
            text_forward(MODELS[name].text, float((tokens_NL != 0).sum(axis=1).mean())),
            (
                ours_text,
                lambda: run(lambda: in_batches(peer.encode_text)),
                lambda: run(lambda: in_batches(third_text)),
            ),
        ),
        (
            "image",
            num_images,
            image_forward(MODELS[name]),
            (
                lambda: run(lambda: encoder.model.encode_image(image_BCHW)),
                lambda: run(lambda: peer.encode_image(image_BCHW)),
                lambda: run(lambda: third.visual_projection(third.vision_model(image_BCHW).pooler_output)),
            ),
        ),
    ):
        seconds, found = times_in_turn(*functions, rounds=5)
        for label, other_s, other in zip(("", "/transformers"), seconds[1:], found[1:], strict=True):
            equal = bool(np.abs(found[0] - other).max() <= TOLERANCE_BF16)
            result = rates(f"encode/{side}/{name}{label}", count, seconds[0], other_s, equal, device)
            result["peak_share"] = peak_share(flops * result["ours"], peak)
            result["peer_peak_share"] = peak_share(flops * result["peer"], peak)
            results.append(result)
            print(
                f"{result['name']}: {result['ours']:.0f} and {result['peer']:.0f} samples/s,"
                f" {result['peak_share']} and {result['peer_peak_share']} of the peak"
            )
    return results


def peak_share(flops: float, peak: float | None) -> float | None:
    """Return model FLOPs utilisation: what the model needs for the captions' true lengths, over the peak.

    What is computed on padding is no use and does not count. None if the peak is not known.
    """
    return None if peak is None else round(flops / peak, 3)


def _transformers_model(model: CLIP) -> Any:
    """Return transformers' ChineseCLIPModel with our weights."""
    import tempfile

    from transformers import ChineseCLIPModel

    from training.model.tokenizer import SPECIAL_TOKENS
    from training.weights.export import save_hugging_face

    with tempfile.TemporaryDirectory() as folder:
        save_hugging_face(folder, model, Tokenizer(SPECIAL_TOKENS), {})
        return ChineseCLIPModel.from_pretrained(folder).eval()


if __name__ == "__main__":
    sys.exit(main())
