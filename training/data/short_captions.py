"""Captions that are longer than a training's context: which of their words stay.

For the short texts of CLIPA (Li et al. 2023), which chooses English words by part of speech. Chinese has no
spaces, so jieba's dictionary and tags (in Rust: rjieba) say what a word is.
"""

from collections.abc import Sequence
from hashlib import blake2b
from importlib.metadata import version
from typing import Literal

import numpy as np

from training.config.train import CaptionCut
from training.data.text_encoder import TextEncoder

# The first letter of jieba's tags (ICTCLAS): what a caption shows comes first, then what it is like or does,
# then numbers and places; particles and punctuation last.
_RANK = {"n": 0, **dict.fromkeys("vabzil", 1), **dict.fromkeys("mqtsfjgr", 2)}
_LAST = 3


def identity(cut: CaptionCut) -> str:
    """Return what token ids depend on besides vocabulary and length: empty for captions cut at their end."""
    return "" if cut == "end" else f"{cut} {version('rjieba')} "


def shorten(
    captions: Sequence[str], cut: Literal["words", "random"], tokenizer: TextEncoder, context_length: int
) -> list[str]:
    """Return captions of at most `context_length` tokens with [CLS] and [SEP], their words in order.

    A caption none of whose words fits is returned whole.

    "words" keeps nouns first, then verbs and adjectives, then the rest; "random" draws by the caption only.
    Among equals the earlier word is kept. A word that no longer fits is passed over for a shorter one.
    """
    import rjieba

    tagged = [rjieba.tag(caption) for caption in captions]
    words = sorted({word for caption in tagged for word, _ in caption})
    is_token = tokenizer.encode(words, context_length + 1) != 0
    num_tokens = dict(zip(words, (is_token.sum(axis=1) - 2).tolist(), strict=True))
    shortened = []
    for caption, pairs in zip(captions, tagged, strict=True):
        if cut == "words":
            ranks = [_RANK.get(tag[:1], _LAST) for _, tag in pairs]
        else:
            seed = int.from_bytes(blake2b(caption.encode(), digest_size=8).digest())
            ranks = np.random.Generator(np.random.Philox(key=seed)).permutation(len(pairs)).tolist()
        left, kept = context_length - 2, list[int]()
        for place in sorted(range(len(pairs)), key=lambda place: (ranks[place], place)):
            if 0 < num_tokens[pairs[place][0]] <= left:
                left -= num_tokens[pairs[place][0]]
                kept.append(place)
        # Spaces part Latin words; around Chinese ones they change no token. If no word fits, the caption
        # stays as it is and is cut at its end: its first tokens are more than none.
        shortened.append(" ".join(pairs[place][0] for place in sorted(kept)) or caption)
    return shortened
