"""Text tower: transformers' BERT without its pooler, computed on the tokens of a batch and on nothing else.

A batch of captions is one row of tokens, caption after caption, shorter ones first. All that works token by
token (embeddings, projections, feed-forward layers, norms) sees this row; attention sees each caption by
itself. So no operation is spent on padding, and none needs a mask. The feature is the hidden state at [CLS],
so that the last layer asks only for that of [CLS].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from training.model.config import TextConfig


def build_text_tower(config: TextConfig) -> BertModel:
    """Build BERT as released for Chinese: erf GELU, layer-norm eps 1e-12, random until weights are loaded.

    `encode_packed` computes with it. Called as a module it is transformers' own computation on padded token
    ids, by PyTorch's fused attention: what ONNX is exported from.
    """
    return BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            hidden_act="gelu",
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            max_position_embeddings=config.max_positions,
            type_vocab_size=2,
            initializer_range=config.init_std,
            layer_norm_eps=1e-12,
            pad_token_id=0,
            use_cache=False,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        ),
        add_pooling_layer=False,
    )


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the captions of a batch lie in the row of their tokens: shorter before longer ones."""

    tokens_T: torch.Tensor  # int64, all captions' ids one after the other
    position_T: torch.Tensor  # int64, each token's place in its caption
    first_B: torch.Tensor  # int64, where each caption's [CLS] is, shortest caption first
    place_B: torch.Tensor  # int64, which of these is the caption of each row that was given
    runs: tuple[tuple[int, int], ...]  # (how many captions, of how many tokens each), shortest first
    offset_B1: torch.Tensor  # int32, where each caption begins, and the end
    offset_of_first_B1: torch.Tensor  # int32, the same where only the captions' [CLS] are in the row


def pack(tokens_BL: torch.Tensor, device: torch.device) -> Packing:
    """Return the row of non-zero tokens on `device`; `tokens_BL` may be any integers on any device.

    On an accelerator it makes the host wait, once; on the CPU it does not.

    Raises:
        ValueError: if a caption does not begin with a token.
    """
    tokens_BL = tokens_BL.cpu()
    is_token_BL = tokens_BL.ne(0)
    if not is_token_BL.size(1) or not bool(is_token_BL[:, 0].all()):
        raise ValueError("every caption has to begin with a token that is not 0, the id of padding")
    length_B, order_B = is_token_BL.sum(1).sort(stable=True)
    row_T, position_T = is_token_BL[order_B].nonzero(as_tuple=True)
    lengths, counts = torch.unique_consecutive(length_B, return_counts=True)
    offset_B1 = F.pad(length_B.cumsum(0), (1, 0))

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    return Packing(
        tokens_T=there(tokens_BL[order_B[row_T], position_T].long()),
        position_T=there(position_T),
        first_B=there(offset_B1[:-1]),
        place_B=there(order_B.argsort()),
        # An empty batch computes too: a rank without samples has to take part in every collective.
        runs=tuple(zip(counts.tolist(), lengths.tolist(), strict=True)) or ((0, 1),),
        offset_B1=there(offset_B1.int()),
        offset_of_first_B1=there(torch.arange(len(offset_B1), dtype=torch.int32)),
    )


def encode_packed(bert: BertModel, tokens_BL: torch.Tensor, *, recompute: bool = False) -> torch.Tensor:
    """Return hidden_BH at [CLS] of token ids padded with 0, equal to the padded computation but for rounding.

    `recompute` gives up each layer's activations and computes them again in the backward pass, with the same
    dropout.
    """
    packing = pack(tokens_BL, bert.embeddings.word_embeddings.weight.device)
    hidden_TH = bert.embeddings(packing.tokens_T[None], position_ids=packing.position_T[None])[0]
    *layers, last = bert.encoder.layer
    for layer in layers:
        hidden_TH = _layer(layer, hidden_TH, packing, recompute, only_first=False)
    return _layer(last, hidden_TH, packing, recompute, only_first=True)[packing.place_B]


def _layer(
    layer: Any, hidden_TH: torch.Tensor, packing: Packing, recompute: bool, *, only_first: bool
) -> torch.Tensor:
    """Compute one layer of BERT on the row of tokens; `only_first` returns only the [CLS], hidden_BH."""
    compute: Callable[..., torch.Tensor] = _compute_layer
    if recompute and torch.is_grad_enabled():
        found: torch.Tensor = checkpoint(compute, layer, hidden_TH, packing, only_first, use_reentrant=False)
        return found
    return compute(layer, hidden_TH, packing, only_first)


def _compute_layer(layer: Any, hidden_TH: torch.Tensor, packing: Packing, only_first: bool) -> torch.Tensor:
    """Compute the parts of transformers' `BertLayer`, whose names the weights fix, around own attention."""
    part = layer.attention.self
    asking_TH = hidden_TH[packing.first_B] if only_first else hidden_TH
    attend = _attend_by_run if hidden_TH.device.type == "cpu" else _attend_jagged
    heads = part.num_attention_heads
    found_TH = attend(
        part.query(asking_TH).unflatten(-1, (heads, -1)),
        part.key(hidden_TH).unflatten(-1, (heads, -1)),
        part.value(hidden_TH).unflatten(-1, (heads, -1)),
        packing,
        part.dropout.p if part.training else 0.0,
    ).flatten(1)
    attended_TH = layer.attention.output(found_TH, asking_TH)
    output_TH: torch.Tensor = layer.output(layer.intermediate(attended_TH), attended_TH)
    return output_TH


def _attend_by_run(
    query_TND: torch.Tensor, key_TND: torch.Tensor, value_TND: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    """Attend within each caption, one call for all captions of one length."""
    asked = 1 if len(query_TND) < len(key_TND) else 0

    def by_run(row_TND: torch.Tensor, tokens: int) -> Iterator[torch.Tensor]:
        """Yield [captions, heads, tokens, width] of each run: `tokens` of each caption, or all if it is 0."""
        shapes = [(count, tokens or length) for count, length in packing.runs]
        # Split, not sliced: one concatenation going back, instead of a row of zeros for each part.
        parts = torch.split(row_TND, [count * size for count, size in shapes])
        return (
            part.view(*shape, *part.shape[1:]).transpose(1, 2)
            for part, shape in zip(parts, shapes, strict=True)
        )

    found = [
        F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).flatten(0, 1)
        for query, key, value in zip(
            by_run(query_TND, asked), by_run(key_TND, 0), by_run(value_TND, 0), strict=True
        )
    ]
    return torch.cat(found)


def _attend_jagged(
    query_TND: torch.Tensor, key_TND: torch.Tensor, value_TND: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    """Attend in one call for all captions: an accelerator's kernels take rows of different lengths."""
    shortest, longest = packing.runs[0][1], packing.runs[-1][1]

    def jagged(row_TND: torch.Tensor) -> torch.Tensor:
        if len(row_TND) < len(key_TND):
            offset_B1, least, most = packing.offset_of_first_B1, 1, 1
        else:
            offset_B1, least, most = packing.offset_B1, shortest, longest
        nested = torch.nested.nested_tensor_from_jagged(row_TND, offset_B1, min_seqlen=least, max_seqlen=most)
        return nested.transpose(1, 2)

    found = F.scaled_dot_product_attention(
        jagged(query_TND), jagged(key_TND), jagged(value_TND), dropout_p=dropout
    )
    return found.transpose(1, 2).values()
