"""Text tower: transformers' BERT without its pooler, computed on the tokens of a batch and on nothing else.

A batch of captions is one row of tokens, caption after caption, shorter ones first. All that works token by
token (embeddings, projections, feed-forward layers, norms) sees this row; attention sees each caption by
itself. So no operation is spent on padding, and none needs a mask. The feature is the hidden state at [CLS],
so that the last layer asks only for that of [CLS].

Attention runs either as the FlashAttention operator for rows of captions, called with the offsets of the row,
or, where that kernel does not exist (CPUs, float32, old GPUs), as one call for all captions of one length.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel

from training.model.compiled import compiled as get_compiled
from training.model.config import TextConfig
from training.model.transfer import send


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
    """Where the captions of a batch lie in the row of their tokens: shorter before longer ones.

    After them may come filling, captions that nobody asked for, which make the row as long as another
    batch's: what is compiled for a length then serves both.
    """

    tokens_T: torch.Tensor  # int64, all captions' ids one after the other
    position_T: torch.Tensor  # int64, each token's place in its caption
    first_B: torch.Tensor  # int64, where each caption's [CLS] is, shortest caption first, filling last
    place_B: torch.Tensor  # int64, which of these is the caption of each row that was given
    runs: tuple[tuple[int, int], ...]  # (how many captions, of how many tokens each), as they lie there
    longest: int  # tokens of the longest caption
    offset_B1: torch.Tensor  # int32, where each caption begins, and the end
    offset_of_first_B1: torch.Tensor  # int32, the same where only the captions' [CLS] are in the row


def pack(tokens_BL: torch.Tensor, device: torch.device, *, multiple: int = 1) -> Packing:
    """Return the row of non-zero tokens on `device`; `tokens_BL` may be any integers on any device.

    Filling brings the row to a multiple of so many tokens. Ids that are on an accelerator make the host wait.

    Raises:
        ValueError: if a caption does not begin with a token.
    """
    tokens_BL = tokens_BL.cpu()
    is_token_BL = tokens_BL.ne(0)
    if not is_token_BL.size(1) or not is_token_BL[:, 0].numpy().all():
        raise ValueError("every caption has to begin with a token that is not 0, the id of padding")
    length_B, order_B = is_token_BL.sum(1).sort(stable=True)
    row_T, position_T = is_token_BL[order_B].nonzero(as_tuple=True)
    tokens_T = tokens_BL[order_B[row_T], position_T].long()
    if lacking := -len(tokens_T) % multiple:
        longest = int(length_B.numpy()[-1]) if len(length_B) else 1
        filling = torch.tensor(
            [longest] * (lacking // longest) + [lacking % longest] * (lacking % longest > 0)
        )
        length_B = torch.cat([length_B, filling])
        # The id of padding at the first position: embeddings of padding learn nothing.
        tokens_T, position_T = F.pad(tokens_T, (0, lacking)), F.pad(position_T, (0, lacking))
    lengths, counts = torch.unique_consecutive(length_B, return_counts=True)
    offset_B1 = F.pad(length_B.cumsum(0), (1, 0))
    # An empty batch computes too: a rank without samples has to take part in every collective.
    runs = tuple(zip(counts.tolist(), lengths.tolist(), strict=True)) or ((0, 1),)
    return Packing(
        tokens_T=send(tokens_T, device),
        position_T=send(position_T, device),
        first_B=send(offset_B1[:-1], device),
        place_B=send(order_B.argsort(), device),
        runs=runs,
        longest=max(length for _, length in runs),
        offset_B1=send(offset_B1.int(), device),
        offset_of_first_B1=send(torch.arange(len(offset_B1), dtype=torch.int32), device),
    )


def filled_to(num_captions: int) -> int:
    """Return the multiple that a row is filled to for a compiled layer: two tokens a caption, in 64s.

    That is one token of filling a caption in the mean, of the 21.75 that captions have, and by the spread of
    their lengths (8 tokens) two or three lengths of the row for 256 captions.
    """
    return 64 * max(1, math.ceil(2 * num_captions / 64))


@dataclass(frozen=True, slots=True)
class _Pass:
    """How a row of tokens passes through the layers."""

    packing: Packing
    recompute: bool
    project: Callable[..., tuple[torch.Tensor, ...]]
    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def encode_packed(
    bert: BertModel, tokens_BL: torch.Tensor, *, recompute: bool = False, compiled: bool = False
) -> torch.Tensor:
    """Return hidden_BH at [CLS] of token ids padded with 0, equal to the padded computation but for rounding.

    `recompute` gives up each layer's activations and computes them again in the backward pass, with the same
    dropout. `compiled` has torch compile what follows attention in each layer, once for each length of the
    row, and fills the row so that few lengths occur.
    """
    device = bert.embeddings.word_embeddings.weight.device
    packing = pack(tokens_BL, device, multiple=filled_to(len(tokens_BL)) if compiled else 1)
    # A plain product is one kernel already; one in float8 is several, which torch joins.
    first: Any = bert.encoder.layer[0]
    fuses_projection = compiled and type(first.attention.self.query) is not nn.Linear
    through = _Pass(
        packing,
        recompute,
        get_compiled(_project) if fuses_projection else _project,
        get_compiled(_finish_layer) if compiled else _finish_layer,
    )
    hidden_TH = bert.embeddings(packing.tokens_T[None], position_ids=packing.position_T[None])[0]
    *layers, last = bert.encoder.layer
    for layer in layers:
        hidden_TH = _layer(layer, hidden_TH, through, only_first=False)
    return _layer(last, hidden_TH, through, only_first=True)[packing.place_B]


def _layer(layer: Any, hidden_TH: torch.Tensor, through: _Pass, *, only_first: bool) -> torch.Tensor:
    """Compute one layer of BERT on the row of tokens; `only_first` returns only the [CLS], hidden_BH."""
    compute: Callable[..., torch.Tensor] = _compute_layer
    if through.recompute and torch.is_grad_enabled():
        found: torch.Tensor = checkpoint(compute, layer, hidden_TH, through, only_first, use_reentrant=False)
        return found
    return compute(layer, hidden_TH, through, only_first)


def _compute_layer(layer: Any, hidden_TH: torch.Tensor, through: _Pass, only_first: bool) -> torch.Tensor:
    """Compute the parts of transformers' `BertLayer`, whose names the weights fix, around own attention."""
    part, packing = layer.attention.self, through.packing
    asking_TH = hidden_TH[packing.first_B] if only_first else hidden_TH
    project = _project if only_first else through.project  # few queries: too few to be worth a graph
    query_TND, key_TND, value_TND = project(part, asking_TH, hidden_TH)
    attend = attend_by_offsets if has_flash_kernel(query_TND) else _attend_by_run
    dropout = part.dropout.p if part.training else 0.0
    found_TH = attend(query_TND, key_TND, value_TND, packing, dropout).flatten(1)
    if only_first:  # a row a caption: no filling, and too few to be worth a graph
        num_asked = len(packing.place_B)
        return _finish_layer(layer, found_TH[:num_asked], asking_TH[:num_asked])
    return through.finish(layer, found_TH, asking_TH)


def _finish_layer(layer: Any, found_TH: torch.Tensor, asking_TH: torch.Tensor) -> torch.Tensor:
    """Compute what follows attention in a layer, token by token."""
    attended_TH = layer.attention.output(found_TH, asking_TH)
    output_TH: torch.Tensor = layer.output(layer.intermediate(attended_TH), attended_TH)
    return output_TH


def _project(part: Any, asking_TH: torch.Tensor, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return query_TND, key_TND and value_TND of a layer; queries are those of the tokens that ask.

    On an accelerator all tokens' three products are one, of weights joined for the occasion: they stay three
    parameters, as files and optimizers know them. A CPU gains nothing by that, ZeRO 3 lends the weights of a
    module only while the module itself computes, and one in float8 scales its own weights.
    """
    sides, heads = (part.query, part.key, part.value), part.num_attention_heads
    rows: tuple[torch.Tensor, ...]
    if asking_TH is hidden_TH and _joins_products(part.query):
        weight, bias = (torch.cat([getattr(side, name) for side in sides]) for name in ("weight", "bias"))
        rows = F.linear(hidden_TH, weight, bias).chunk(3, dim=-1)
    else:
        rows = (part.query(asking_TH), part.key(hidden_TH), part.value(hidden_TH))
    return tuple(row.unflatten(-1, (heads, -1)) for row in rows)  # type: ignore[no-untyped-call]


def _joins_products(product: nn.Linear) -> bool:
    weight = product.weight
    return type(product) is nn.Linear and weight.device.type != "cpu" and not hasattr(weight, "ds_id")


def has_flash_kernel(query_TND: torch.Tensor) -> bool:
    """Return true if FlashAttention computes on such rows: 16 bits, widths of up to 256, on a newer GPU."""
    return (
        query_TND.device.type == "cuda"
        and query_TND.dtype in (torch.bfloat16, torch.float16)
        and query_TND.shape[2] % 8 == 0
        and query_TND.shape[2] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query_TND.device) >= (8, 0)
    )


def attend_by_offsets(
    query_TND: torch.Tensor, key_TND: torch.Tensor, value_TND: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    """Attend within each caption in one call of the operator that takes rows with offsets.

    PyTorch's public function for it (`torch.nn.attention.varlen`) has no dropout.
    """
    offset_of_query_B1, longest_query = packing.offset_B1, packing.longest
    if len(query_TND) < len(key_TND):
        offset_of_query_B1, longest_query = packing.offset_of_first_B1, 1
    found: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query_TND,
        key_TND,
        value_TND,
        offset_of_query_B1,
        packing.offset_B1,
        longest_query,
        packing.longest,
        dropout,
        is_causal=False,
        return_debug_mask=False,
    )[0]
    return found


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
