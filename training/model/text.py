"""Text tower: transformers' BERT without its pooler."""

from transformers import BertConfig, BertModel

from training.model.config import TextConfig


def build_text_tower(config: TextConfig) -> BertModel:
    """BERT as released for Chinese: erf GELU, layer-norm eps 1e-12; random until weights are loaded into it.

    Attention is PyTorch's fused one. Called with `input_ids` and `attention_mask`, both [B, L]; the feature
    is the hidden state at [CLS].
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
