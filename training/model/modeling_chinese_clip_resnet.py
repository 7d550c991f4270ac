# License: apache-2.0 (of this file; the license of the weights stands in README.md next to it)
"""Chinese CLIP with a ResNet image tower, for transformers' `AutoModel`.

transformers has Chinese CLIP with ViT towers only. A folder with this file, which its config.json names,
loads with `AutoModel.from_pretrained(folder, trust_remote_code=True)`, and the model has the methods and
outputs of transformers' `ChineseCLIPModel`. cnclip copies the file into folders that it writes: it needs
torch and transformers only.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ChineseCLIPModel, ChineseCLIPTextConfig, ChineseCLIPTextModel, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

_HEAD_WIDTH = 64  # of the attention pooling
_CELL_PX = 32  # what the strides reduce to one cell of the map


class ChineseCLIPResNetVisionConfig(PretrainedConfig):
    """The sizes of the image tower; the defaults are RN50's."""

    model_type = "chinese_clip_resnet_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 224,  # side of the square input, pixels
        depths: tuple[int, ...] = (3, 4, 6, 3),  # bottleneck blocks of the four stages
        hidden_size: int = 2048,  # channels of the last stage
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.depths = list(depths)
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class ChineseCLIPResNetConfig(PretrainedConfig):
    """The sizes of both towers and of the space that they share."""

    model_type = "chinese_clip_resnet"
    sub_configs = {  # noqa: RUF012 - transformers' own name and form
        "text_config": ChineseCLIPTextConfig,
        "vision_config": ChineseCLIPResNetVisionConfig,
    }

    def __init__(
        self,
        text_config: dict[str, Any] | ChineseCLIPTextConfig | None = None,
        vision_config: dict[str, Any] | ChineseCLIPResNetVisionConfig | None = None,
        projection_dim: int = 1024,
        logit_scale_init_value: float = 2.6592,  # ln(1 / 0.07)
        initializer_factor: float = 1.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, ChineseCLIPTextConfig):
            text_config = ChineseCLIPTextConfig(**(text_config or {}))
        if not isinstance(vision_config, ChineseCLIPResNetVisionConfig):
            vision_config = ChineseCLIPResNetVisionConfig(**(vision_config or {}))
        self.text_config = text_config
        self.vision_config = vision_config
        self.projection_dim = projection_dim
        self.logit_scale_init_value = logit_scale_init_value
        self.initializer_factor = initializer_factor
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class ChineseCLIPResNetBlock(nn.Module):
    """A bottleneck that pools instead of striding: 1 × 1, 3 × 3, pool, 1 × 1."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.downsample: nn.Sequential | None = None
        if stride > 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        inner_BCHW = F.relu(self.bn1(self.conv1(map_BCHW)))
        inner_BCHW = F.relu(self.bn2(self.conv2(inner_BCHW)))
        shortcut_BCHW = map_BCHW
        if self.stride > 1:
            inner_BCHW = F.avg_pool2d(inner_BCHW, self.stride)
            # An odd side keeps its last row and column here, so that 3 cells become 2 next to the other's 1,
            # which is then added to both: the arithmetic that these weights were trained with.
            shortcut_BCHW = F.avg_pool2d(shortcut_BCHW, self.stride, ceil_mode=True, count_include_pad=False)
        inner_BCHW = self.bn3(self.conv3(inner_BCHW))
        if self.downsample is not None:
            shortcut_BCHW = self.downsample(shortcut_BCHW)
        return F.relu(inner_BCHW + shortcut_BCHW)


class ChineseCLIPResNetAttentionPool(nn.Module):
    """Multi-head attention of the mean of the map over the mean and all cells, with learned positions."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.heads = width // _HEAD_WIDTH
        self.grid = grid
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid * grid, width) * width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)

    def forward(self, map_BCHW: torch.Tensor) -> torch.Tensor:
        """Return pooled_BC."""
        height, width = map_BCHW.shape[2:]
        cells_BNC = map_BCHW.flatten(2).transpose(1, 2)
        tokens_BTC = torch.cat([cells_BNC.mean(1, keepdim=True), cells_BNC], dim=1)
        tokens_BTC = tokens_BTC + self._positions(height, width)
        query_BH1W, key_BHTW, value_BHTW = (
            projection(tokens).unflatten(-1, (self.heads, _HEAD_WIDTH)).transpose(1, 2)
            for projection, tokens in (
                (self.q_proj, tokens_BTC[:, :1]),
                (self.k_proj, tokens_BTC),
                (self.v_proj, tokens_BTC),
            )
        )
        return F.scaled_dot_product_attention(query_BH1W, key_BHTW, value_BHTW).flatten(1)

    def _positions(self, height: int, width: int) -> torch.Tensor:
        """Return position_TC, the cells' interpolated if the map is not of the grid that was trained."""
        position_TC = self.positional_embedding
        if (height, width) == (self.grid, self.grid):
            return position_TC
        cells_1CHW = position_TC[1:].float().T.reshape(1, -1, self.grid, self.grid)
        cells_1CHW = F.interpolate(cells_1CHW, size=(height, width), mode="bicubic", antialias=True)
        return torch.cat([position_TC[:1], cells_1CHW.flatten(2)[0].T.to(position_TC.dtype)])


class ChineseCLIPResNetVisionModel(nn.Module):
    """A stem of three convolutions, four stages of bottlenecks, and attention pooling."""

    def __init__(self, config: ChineseCLIPResNetVisionConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        channels = config.hidden_size // 32
        self.conv1 = nn.Conv2d(3, channels // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels // 2)
        self.conv3 = nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        one, two, three, four = config.depths
        self.layer1 = _stage(channels, channels, one, stride=1)
        self.layer2 = _stage(4 * channels, 2 * channels, two, stride=2)
        self.layer3 = _stage(8 * channels, 4 * channels, three, stride=2)
        self.layer4 = _stage(16 * channels, 8 * channels, four, stride=2)
        self.attnpool = ChineseCLIPResNetAttentionPool(config.hidden_size, config.image_size // _CELL_PX)

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the map's cells as `last_hidden_state` [batch, cells, width], and the pooled [batch, width].

        Further arguments are those of transformers' ViT and change nothing here: there are no attentions to
        return.

        Raises:
            ValueError: if the images are of another size than the model's, unless their positions are to be
                interpolated.
        """
        height, width = pixel_values.shape[2:]
        if (height, width) != (self.image_size, self.image_size) and not interpolate_pos_encoding:
            raise ValueError(
                f"images of {height} × {width} pixels, but the model takes {self.image_size} × "
                f"{self.image_size}: resize them, or set interpolate_pos_encoding"
            )
        # channels last: a fifth less time on a CPU, and what tensor cores want
        map_BCHW = pixel_values.contiguous(memory_format=torch.channels_last)
        map_BCHW = F.relu(self.bn1(self.conv1(map_BCHW)))
        map_BCHW = F.relu(self.bn2(self.conv2(map_BCHW)))
        map_BCHW = F.avg_pool2d(F.relu(self.bn3(self.conv3(map_BCHW))), 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            map_BCHW = stage(map_BCHW)
        return BaseModelOutputWithPooling(
            last_hidden_state=map_BCHW.flatten(2).transpose(1, 2), pooler_output=self.attnpool(map_BCHW)
        )


def _stage(in_channels: int, channels: int, depth: int, *, stride: int) -> nn.Sequential:
    first = ChineseCLIPResNetBlock(in_channels, channels, stride)
    rest = (ChineseCLIPResNetBlock(4 * channels, channels, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


class ChineseCLIPResNetModel(ChineseCLIPModel):
    """transformers' `ChineseCLIPModel` with this image tower in the place of its ViT.

    `get_image_features`, `get_text_features` and `forward` are transformers' own.
    """

    config_class = ChineseCLIPResNetConfig
    # of both towers: what is computed as a whole on one device
    _no_split_modules = [  # noqa: RUF012 - transformers' own name and form
        "ChineseCLIPTextEmbeddings",
        "ChineseCLIPTextLayer",
        "ChineseCLIPResNetBlock",
        "ChineseCLIPResNetAttentionPool",
    ]

    def __init__(self, config: ChineseCLIPResNetConfig) -> None:
        super(ChineseCLIPModel, self).__init__(config)  # its own __init__ would build a ViT
        self.projection_dim = config.projection_dim
        self.text_embed_dim = config.text_config.hidden_size
        self.vision_embed_dim = config.vision_config.hidden_size
        self.text_model = ChineseCLIPTextModel(config.text_config, add_pooling_layer=False)
        self.vision_model = ChineseCLIPResNetVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(self.vision_embed_dim, self.projection_dim)  # with a bias
        self.text_projection = nn.Linear(self.text_embed_dim, self.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ChineseCLIPResNetAttentionPool):
            width = module.positional_embedding.shape[1]
            nn.init.normal_(module.positional_embedding, std=width**-0.5)
