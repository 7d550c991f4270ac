"""A tiny Multilingual-CLIP folder with random weights, made as its owners make theirs."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

WORDS = "一只黑色的猫在桌子上 两只白色的狗在草地上 蓝色的天空下有一座山 红色汽车 a cat on the table dogs run"


def write_pieces(folder: Path) -> int:
    """Train a SentencePiece model as XLM-R has it; returns its number of pieces."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(WORDS.split() * 20 + [WORDS]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=50,
        hard_vocab_limit=False,
        model_type="unigram", character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return len(sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model")))


def write_mclip(folder: Path, embed_dim: int = 32) -> Any:
    """Write base and tower below `folder`; returns the package's own module (its text tower in `folder`)."""
    import transformers
    from multilingual_clip.Config_MCLIP import MCLIPConfig
    from multilingual_clip.pt_multilingual_clip import MultilingualCLIP

    folder.mkdir(parents=True, exist_ok=True)
    num_pieces = write_pieces(folder)
    torch.manual_seed(0)
    base = transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(
            vocab_size=num_pieces + 2,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=96,
            max_position_embeddings=66,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            initializer_range=0.2,
        )
    )
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = MCLIPConfig(modelBase=str(folder / "base"), transformerDimSize=48, imageDimSize=embed_dim)
        tower = MultilingualCLIP(config).eval()
    torch.save(tower.state_dict(), folder / "pytorch_model.bin")
    settings = {"modelBase": str(folder / "base"), "transformerDimensions": 48, "numDims": embed_dim}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tower
