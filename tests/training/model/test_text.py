"""The packed text tower against transformers' own computation on captions padded to 52."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from training.model import text
from training.model.config import TextConfig
from training.model.text import build_text_tower, encode_packed, pack

CONFIG = TextConfig(layers=3, width=64, heads=2, vocab_size=100, max_positions=128, init_std=0.05)
LENGTHS = (9, 5, 52, 9, 2, 30, 5, 9, 1)


def _tower(*, dropout: float = 0.0) -> BertModel:
    torch.manual_seed(0)
    tower = build_text_tower(TextConfig(**{name: getattr(CONFIG, name) for name in CONFIG.__slots__}))
    with torch.no_grad():
        for parameter in tower.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    for module in tower.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return tower


def _tokens(lengths: tuple[int, ...] = LENGTHS, context_length: int = 52) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.zeros(len(lengths), context_length, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens_BL[row, :length] = torch.randint(1, 100, (length,), generator=generator)
    return tokens_BL


def _padded(tower: BertModel, tokens_BL: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = tower(input_ids=tokens_BL, attention_mask=tokens_BL.ne(0).long()).last_hidden_state[
        :, 0
    ]
    return found


def _by_formula(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of_query: list[int], of_key: list[int]
) -> torch.Tensor:
    rows = []
    for place in range(len(of_query) - 1):
        asked, read = slice(*of_query[place : place + 2]), slice(*of_key[place : place + 2])
        logit = torch.einsum("qhd,khd->hqk", query[asked], key[read]) * query.shape[2] ** -0.5
        rows.append(torch.einsum("hqk,khd->qhd", logit.softmax(2), value[read]))
    return torch.cat(rows)


@pytest.fixture
def flash_operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Give the CPU the operator that GPUs have a kernel for, by its formula; the probabilities of dropout.

    PyTorch's own checks and derivative stay around it, so that calls are what a GPU's kernel would get.
    """
    called: list[float] = []

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        of_query: torch.Tensor,
        of_key: torch.Tensor,
        longest_query: int,
        longest_key: int,
        dropout: float,
        is_causal: bool,
        gives_mask: bool,
        **more: Any,
    ) -> tuple[torch.Tensor, ...]:
        assert of_query.dtype == of_key.dtype == torch.int32
        assert (int(of_query[-1]), int(of_key[-1])) == (len(query), len(key))
        assert (int(of_query.diff().max()), int(of_key.diff().max())) == (longest_query, longest_key)
        assert not is_causal
        assert not gives_mask
        assert all(value is None for value in more.values())
        assert query.stride(2) == key.stride(2) == value.stride(2) == 1
        called.append(dropout)
        found = _by_formula(query, key, value, of_query.tolist(), of_key.tolist())
        nothing = torch.empty(0)
        return found, torch.empty(query.shape[1], len(query)), nothing, nothing, nothing

    def backward(
        gradient: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        found: torch.Tensor,
        lse: torch.Tensor,
        of_query: torch.Tensor,
        of_key: torch.Tensor,
        *rest: Any,
        **more: Any,
    ) -> tuple[torch.Tensor, ...]:
        _, pull = torch.func.vjp(
            lambda *rows: _by_formula(*rows, of_query.tolist(), of_key.tolist()), query, key, value
        )
        gradients: tuple[torch.Tensor, ...] = pull(gradient)
        return gradients

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(text, "has_flash_kernel", lambda query: True)
    monkeypatch.setattr(text, "_joins_products", lambda weight: True)
    yield called
    library._destroy()


def test_features_and_gradients_equal_padding_to_52() -> None:
    _check_features_and_gradients()


@pytest.mark.parametrize("multiple", [1, 64])
def test_the_operator_for_rows_with_offsets_gives_the_same(
    flash_operator: list[float], monkeypatch: pytest.MonkeyPatch, multiple: int
) -> None:
    """It is what GPUs run, with filling where torch compiles."""
    monkeypatch.setattr(text, "pack", functools.partial(pack, multiple=multiple))
    _check_features_and_gradients()
    assert flash_operator
    flash_operator.clear()
    tower, tokens_BL = _tower(dropout=0.1), _tokens()
    encode_packed(tower.train(), tokens_BL)
    encode_packed(tower.eval(), tokens_BL)
    assert flash_operator == [0.1] * CONFIG.layers + [0.0] * CONFIG.layers


def test_filling_brings_every_row_to_one_of_few_lengths() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = set()
    for _ in range(20):
        drawn = torch.randint(8, 36, (256,), generator=generator).tolist()
        packing = pack(_tokens(tuple(drawn)), torch.device("cpu"), multiple=text.filled_to(256))
        assert sum(count * length for count, length in packing.runs) == len(packing.tokens_T)
        assert int(packing.offset_B1[-1]) == len(packing.tokens_T) < 1.1 * sum(drawn)
        assert packing.longest == max(drawn)
        lengths.add(len(packing.tokens_T))
    assert len(lengths) <= 3
    assert text.filled_to(0) == text.filled_to(32) == 64
    assert len(pack(_tokens(()), torch.device("cpu"), multiple=64).tokens_T) == 0


def _check_features_and_gradients() -> None:
    tower, tokens_BL = _tower(), _tokens()
    normalise: Callable[..., torch.Tensor] = torch.nn.functional.normalize
    with torch.inference_mode():
        apart = normalise(encode_packed(tower, tokens_BL)) - normalise(_padded(tower, tokens_BL))
    assert apart.abs().max() < 1e-6
    double = tower.double()
    gradients = []
    for encode in (encode_packed, _padded):
        double.zero_grad()
        found = encode(double, tokens_BL)
        found.pow(3).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in double.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-9, atol=1e-10)


def test_operations_are_those_of_the_tokens_and_of_the_last_layers_first_tokens() -> None:
    def linear(tokens: int) -> int:
        """Projections and feed-forward of one layer: a multiplication and an addition a weight."""
        return 2 * 12 * CONFIG.width**2 * tokens

    def attention(queries: int, keys: int) -> int:
        return 2 * 2 * CONFIG.width * queries * keys

    tower = _tower().eval()
    whole_layers, tokens, rows = CONFIG.layers - 1, sum(LENGTHS), len(LENGTHS)
    expected = whole_layers * (linear(tokens) + sum(attention(length, length) for length in LENGTHS))
    expected += linear(rows) + 2 * 2 * CONFIG.width**2 * (tokens - rows)  # keys and values of all tokens
    expected += sum(attention(1, length) for length in LENGTHS)

    def counted(encode: Callable[[BertModel, torch.Tensor], torch.Tensor], tokens_BL: torch.Tensor) -> int:
        # The counter does not know the fused attention of CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            encode(tower, tokens_BL)
        return counter.get_total_flops()

    assert counted(encode_packed, _tokens()) == expected
    assert counted(encode_packed, _tokens(context_length=128)) == expected
    padded = CONFIG.layers * rows * (linear(52) + attention(52, 52))
    assert counted(_padded, _tokens()) == padded > 3 * expected


def test_a_caption_alone_and_in_company_is_the_same() -> None:
    tower, tokens_BL = _tower().eval(), _tokens()
    with torch.inference_mode():
        together = encode_packed(tower, tokens_BL)
        alone = torch.cat([encode_packed(tower, row_L[None]) for row_L in tokens_BL])
        assert torch.equal(encode_packed(tower, tokens_BL.int()), together)
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_drawn_from_the_generator_in_attention_too(recompute: bool) -> None:
    """The re-forward of micro-batches and of checkpointing relies on it."""
    tokens_BL = _tokens()

    def gradients(tower: BertModel, seed: int, *, recompute: bool) -> list[Any]:
        torch.manual_seed(seed)
        tower.zero_grad()
        encode_packed(tower, tokens_BL, recompute=recompute).pow(3).sum().backward()
        return [parameter.grad for parameter in tower.parameters()]

    tower = _tower(dropout=0.1).train()
    first = gradients(tower, 3, recompute=False)
    again = gradients(copy.deepcopy(tower), 3, recompute=recompute)
    other = gradients(copy.deepcopy(tower), 4, recompute=recompute)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True) if one is not None)
    assert not torch.equal(first[0], other[0])
    for layer in tower.encoder.layer:  # in the attention alone
        layer.attention.output.dropout.p = layer.output.dropout.p = 0.0
    tower.embeddings.dropout.p = 0.0
    assert not torch.equal(
        gradients(tower, 3, recompute=False)[0], gradients(_tower(), 3, recompute=False)[0]
    )


def test_a_caption_that_begins_with_padding_is_refused() -> None:
    for tokens_BL in (torch.tensor([[2, 3], [0, 3]]), torch.zeros(2, 4), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="every caption has to begin with a token"):
            pack(tokens_BL, torch.device("cpu"))


def test_an_empty_batch_and_one_of_single_tokens() -> None:
    tower = _tower().eval()
    with torch.inference_mode():
        assert torch.allclose(
            encode_packed(tower, _tokens((1, 1))), _padded(tower, _tokens((1, 1))), atol=2e-6
        )
        assert encode_packed(tower, _tokens(())).shape == (0, 64)
