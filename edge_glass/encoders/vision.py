"""The image tower's backbone: any vision model of transformers."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

import edge_glass.encoders.convnet  # noqa: F401  (makes its model type known to transformers)
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.encoders.weights import checked_options, load_checkpoint, load_model


class VisionEncoder(Encoder):
    """Tokens of images: the patches of a transformer, or the places of a convolutional net's last map.

    A transformer's class token stays where it is, first: it is where CLIP keeps its summary of the image.
    The map `[batch, dim, height, width]` of a convolutional net is read row by row.

    Args:
        backbone: a transformers vision model.
        image_size: height and width of the images, in pixels.
        mean: per channel, subtracted from images in 0..1 (by the data side; kept here as the backbone's own).
        std: per channel, dividing images after that.
        frozen: whether the backbone stays as it is.

    Attributes:
        token_count: how many tokens an image gives.
    """

    backbone: PreTrainedModel

    def __init__(self, backbone: PreTrainedModel, image_size: int, mean: list[float], std: list[float], frozen: bool):
        backbone.eval()
        tokens = _read(backbone, torch.zeros(1, 3, image_size, image_size))
        super().__init__(backbone, dim=tokens.shape[2], frozen=frozen)
        if not frozen:
            self._freeze_unread(tokens)
        # A quarter faster in convolutional nets on the CPU, and what tensor cores want.
        self.to(memory_format=torch.channels_last)
        self.image_size = image_size
        self.mean = list(mean)
        self.std = list(std)
        self.token_count = tokens.shape[1]

    @classmethod
    def from_config(
        cls, model_type: str, image_size: int, mean: list[float], std: list[float], **options
    ) -> "VisionEncoder":
        """A backbone with random weights, to be trained.

        Args:
            model_type: transformers' name of the architecture, such as `resnet` or `clip_vision_model`.
            image_size: height and width of the images, in pixels.
            mean: per channel, for images in 0..1.
            std: per channel.
            **options: of the architecture's config class, such as `hidden_sizes`.

        Raises:
            ValueError: unknown model type or option.
        """
        config = AutoConfig.for_model(model_type, **checked_options(model_type, options))
        if hasattr(config, "image_size"):
            config.image_size = image_size
        return cls(AutoModel.from_config(config), image_size, mean, std, frozen=False)

    @classmethod
    def from_pretrained(cls, name: str, frozen: bool = True) -> "VisionEncoder":
        """The vision model of a checkpoint, with the image size and normalisation it was trained with.

        Args:
            name: a folder, `package:<package>/<folder>`, or a hub name; CLIP checkpoints with or without
                their text half, or any vision model.
            frozen: whether the weights stay as they are.

        Raises:
            WeightsNotFound: no such checkpoint, or one without image processor config.
        """

        def load(source: str) -> VisionEncoder:
            config = AutoConfig.from_pretrained(source)
            config = getattr(config, "vision_config", config)  # the image half of CLIP and its kin
            processor = AutoImageProcessor.from_pretrained(source)
            crop = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
            backbone = load_model(AutoModel, source, config=config)
            size = crop["height"] if "height" in crop else crop["shortest_edge"]
            return cls(backbone, size, processor.image_mean, processor.image_std, frozen)

        return load_checkpoint(name, load)

    def _encode(self, inputs: Tensor) -> Tokens:
        """Args: inputs: `[batch, 3, image_size, image_size]`, normalised with `mean` and `std`."""
        size = [self.image_size, self.image_size]
        if list(inputs.shape[2:]) != size:
            raise ValueError(f"the vision tower reads images of {size} pixels; these are {list(inputs.shape[2:])}")
        tokens = _read(self.backbone, inputs)
        return Tokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))


def _read(backbone: PreTrainedModel, image: Tensor) -> Tensor:
    hidden = backbone(image.contiguous(memory_format=torch.channels_last)).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden  # [batch, tokens, dim]
