"""Towers, and the model that puts their modalities into one space."""

from torch import Tensor, nn

from edge_glass.data.batch import MODALITIES, AudioClips, Batch, Features
from edge_glass.encoders.tokens import Encoder, Tokens
from edge_glass.models.perceiver import PerceiverResampler
from edge_glass.models.pooling import SegmentPool
from edge_glass.models.projection import ProjectionHead, WhitenedProjection
from edge_glass.models.recall import CaptionRecall

Inputs = Tensor | AudioClips | Features | list[str]


class Tower(nn.Module):
    """The embedding of one modality: encoder, resampler (or none), pooling, projection.

    Args:
        encoder: inputs to tokens.
        resampler: tokens to a fixed number of tokens; None pools the encoder's own.
        pool: tokens to one vector.
        projection: that vector to the embedding.

    Raises:
        ValueError: widths that do not fit each other.
    """

    def __init__(
        self,
        encoder: Encoder,
        resampler: PerceiverResampler | None,
        pool: SegmentPool,
        projection: ProjectionHead | WhitenedProjection,
    ):
        super().__init__()
        if resampler is not None and resampler.dim != encoder.dim:
            raise ValueError(f"the resampler reads tokens of width {resampler.dim}; the encoder gives {encoder.dim}")
        if projection.in_dim != pool.segments * encoder.dim:
            raise ValueError(
                f"the projection reads {projection.in_dim} features; pooling gives "
                f"{pool.segments} segments x {encoder.dim} = {pool.segments * encoder.dim}"
            )
        self.encoder = encoder
        self.resampler = resampler
        self.pool = pool
        self.projection = projection

    @property
    def out_dim(self) -> int:
        """Width of the embedding."""
        return self.projection.out_dim

    def tokens(self, inputs: Inputs) -> Tokens:
        """What is pooled, and what a decoder reads: `[batch, tokens, encoder.dim]`."""
        # Features were computed by this very encoder, earlier.
        known = Tokens(inputs.values.float(), inputs.mask) if isinstance(inputs, Features) else None
        tokens = self.encoder(inputs) if known is None else known
        return tokens if self.resampler is None else self.resampler(tokens)

    def features(self, inputs: Inputs) -> Tensor:
        """What the projection reads, `[batch, projection.in_dim]`."""
        return self.pool(self.tokens(inputs))

    def embed(self, tokens: Tokens) -> Tensor:
        """Embeddings `[batch, out_dim]` of tokens, not normalised."""
        return self.projection(self.pool(tokens))

    def forward(self, inputs: Inputs) -> Tensor:
        """Embeddings `[batch, out_dim]`, not normalised."""
        return self.embed(self.tokens(inputs))


class MultimodalAlignmentModel(nn.Module):
    """Embeddings of any of the modalities image, audio and text, in one space.

    Args:
        towers: by modality, all with one width of embedding.

    Raises:
        ValueError: no tower, an unknown modality, or embeddings of different widths.
    """

    def __init__(self, towers: dict[str, Tower]):
        super().__init__()
        if not towers or any(name not in MODALITIES for name in towers):
            raise ValueError(f"towers for {list(towers)}: give one or more of {list(MODALITIES)}")
        widths = {name: tower.out_dim for name, tower in towers.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"the towers' embeddings differ in width: {widths}; give all projections one out_dim")
        self.towers = nn.ModuleDict(towers)
        self.out_dim = next(iter(widths.values()))
        self.recall: CaptionRecall | None = None

    def parts(self) -> dict[str, nn.Module]:
        """The parts of each tower, such as `image.encoder`."""
        return {
            f"{modality}.{name}": part
            for modality, tower in self.towers.items()
            for name, part in tower.named_children()
        }

    def encode(self, modality: str, inputs: Inputs) -> Tensor:
        """Embeddings `[batch, out_dim]` of one modality, not normalised.

        With `recall` those of images and audio are drawn to the known captions, except in training, where the loss
        compares them with the captions itself.

        Raises:
            ValueError: the model has no tower for it.
        """
        if modality not in self.towers:
            raise ValueError(f"no tower for {modality!r}; this model has {list(self.towers)}")
        return self.embed(modality, self.tower(modality).tokens(inputs))

    def embed(self, modality: str, tokens: Tokens) -> Tensor:
        """Embeddings `[batch, out_dim]` of a tower's tokens; see `encode`."""
        embeddings = self.tower(modality).embed(tokens)
        return embeddings if self.training else self.recalled(modality, embeddings)

    def recalled(self, modality: str, embeddings: Tensor) -> Tensor:
        """Embeddings `[..., out_dim]` of images and audio drawn to the known captions, if there is `recall`."""
        return embeddings if self.recall is None or modality == "text" else self.recall(embeddings)

    def tower(self, modality: str) -> Tower:
        """The tower of a modality that has one."""
        tower = self.towers.get_submodule(modality)
        assert isinstance(tower, Tower)
        return tower

    def shared(self, batch: Batch) -> list[str]:
        """The modalities that both the batch and the model have.

        Raises:
            ValueError: there are none.
        """
        shared = [name for name in batch.modalities() if name in self.towers]
        if not shared:
            raise ValueError(f"the batch holds {batch.modalities()}, the model has towers for {list(self.towers)}")
        return shared

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings `[inputs, out_dim]` of each modality that both the batch and the model have.

        Raises:
            ValueError: they have none in common.
        """
        return {name: self.encode(name, batch.inputs(name)) for name in self.shared(batch)}
