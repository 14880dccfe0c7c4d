"""A plain convolutional net in transformers' form, for small pictures and small machines."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention


class ConvNetConfig(PreTrainedConfig):
    """Of a `ConvNet`.

    Args:
        hidden_sizes: channels of each stage; every stage halves height and width.
        num_channels: of the images.
        kernel_size: of the convolutions, in pixels.
    """

    model_type = "plain_convnet"

    def __init__(self, hidden_sizes: list[int] | None = None, num_channels: int = 3, kernel_size: int = 3, **options):
        self.hidden_sizes = [32, 64, 128] if hidden_sizes is None else list(hidden_sizes)
        self.num_channels = num_channels
        self.kernel_size = kernel_size
        super().__init__(**options)


class ConvNet(PreTrainedModel):
    """Stages of convolution, batch normalisation, ReLU and 2 x 2 maximum (the plain half of VGG: Simonyan & Zisserman
    2015).

    On a few thousand small drawings and minutes of two cores it learns more than residual nets and transformers of
    the same cost.
    """

    config_class = ConvNetConfig
    config: ConvNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = "convnet"

    def __init__(self, config: ConvNetConfig):
        super().__init__(config)
        stages: list[nn.Module] = []
        width = config.num_channels
        for size in config.hidden_sizes:
            convolution = nn.Conv2d(width, size, config.kernel_size, padding=config.kernel_size // 2, bias=False)
            stages += [convolution, nn.BatchNorm2d(size), nn.ReLU(), nn.MaxPool2d(2)]
            width = size
        self.stages = nn.Sequential(*stages)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As torch starts its layers."""
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()

    def forward(self, pixel_values: Tensor, **_) -> BaseModelOutputWithNoAttention:
        """`[batch, channels, height, width]` to `last_hidden_state` `[batch, dim, height / 2^stages, width / ...]`."""
        return BaseModelOutputWithNoAttention(last_hidden_state=self.stages(pixel_values))


AutoConfig.register(ConvNetConfig.model_type, ConvNetConfig)
AutoModel.register(ConvNetConfig, ConvNet)
