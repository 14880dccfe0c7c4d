"""The recursion of a Tiny Recursive Model: one small net, applied again and again, that refines an answer.

"Less is More: Recursive Reasoning with Tiny Networks" (Jolicoeur-Martineau 2025, https://arxiv.org/abs/2510.04871).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

EPSILON = 1e-5  # of every RMSNorm


@dataclass
class Thought:
    """What the recursion carries from step to step.

    Attributes:
        answer: `y` of the paper, `[batch, tokens, width]`: what the output is read from.
        latent: `z` of the paper, `[batch, tokens, width]`: what the net keeps to itself.
    """

    answer: Tensor
    latent: Tensor

    def detach(self) -> "Thought":
        """The same thought, without its history."""
        return Thought(self.answer.detach(), self.latent.detach())


class KeyValueCache:
    """Keys and values of the tokens so far, one pair for every time that attention is applied in the recursion.

    Each application sees other hidden states of the same token, so each has keys and values of its own. A new token
    passes through all applications in the same order and reads what earlier tokens left at each.

    Args:
        length: the most tokens.
    """

    def __init__(self, length: int):
        self.length = length
        self.tokens = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._place = 0

    def begin(self, new: int) -> None:
        """Go back to the first application, with `new` further tokens.

        Raises:
            ValueError: more tokens than the cache has room for.
        """
        if self.tokens + new > self.length:
            raise ValueError(f"{self.tokens + new} tokens do not fit into a cache of {self.length}")
        self._place = 0
        self._new = new

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new tokens' `[batch, heads, new, head_dim]`; all tokens' come back."""
        if self._place == len(self._buffers):
            shape = [*keys.shape[:2], self.length, keys.shape[3]]
            self._buffers.append((keys.new_zeros(shape), values.new_zeros(shape)))
        kept_keys, kept_values = self._buffers[self._place]
        self._place += 1
        stop = self.tokens + self._new
        kept_keys[:, :, self.tokens : stop] = keys
        kept_values[:, :, self.tokens : stop] = values
        return kept_keys[:, :, :stop], kept_values[:, :, :stop]

    def end(self) -> None:
        """The new tokens have passed through all applications."""
        self.tokens += self._new


@dataclass
class Sight:
    """Where tokens are and what each may look at.

    Attributes:
        cosines: `[batch (or 1, for all alike), 1, tokens, head_dim]`, the turns of RoPE.
        sines: likewise.
        visible: `[batch (or 1), 1, tokens, keys]` bool, True where a token (row) may look; None: everywhere.
        cache: keys and values of earlier tokens; None without any.
    """

    cosines: Tensor
    sines: Tensor
    visible: Tensor | None = None
    cache: KeyValueCache | None = None

    def take(self, rows: Tensor) -> "Sight":
        """That of some samples (int64 indices), without a cache."""

        def of(part: Tensor) -> Tensor:
            return part if len(part) == 1 else part[rows]

        return Sight(of(self.cosines), of(self.sines), None if self.visible is None else of(self.visible))


class Recursion(nn.Module):
    """Cycles of thinking about a question: latent steps `z <- net(x + y + z)`, then an answer `y <- net(y + z)`.

    The net, the same in every step, has `layers` blocks of attention (RoPE) and SwiGLU; after each residual comes an
    RMSNorm without weights. Only the last of the cycles is trained through; those before it run without gradient.

    Args:
        width: of the tokens.
        heads: attention heads, which divide an even width a head.
        layers: blocks of the net.
        latent_steps: `n` of the paper, latent steps a cycle.
        cycles: `T` of the paper.
        mlp_ratio: hidden width of an MLP of two matrices over `width`; SwiGLU's three get two thirds of it.
        causal: whether a token looks at itself and those before it only.
        recursive: False: the net is applied to the question, once: a plain transformer, to compare with.

    Raises:
        ValueError: heads that do not fit, or a number of layers, steps or cycles below one.
    """

    first_answer: Tensor  # [width]
    first_latent: Tensor  # [width]

    def __init__(
        self,
        width: int,
        heads: int,
        layers: int = 2,
        latent_steps: int = 6,
        cycles: int = 3,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        recursive: bool = True,
    ):
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"{heads} heads do not fit width {width}: RoPE turns pairs, so width / heads must be even")
        for name, value in (("layers", layers), ("latent_steps", latent_steps), ("cycles", cycles)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        self.width = width
        self.head_dim = width // heads
        self.latent_steps = latent_steps
        self.cycles = cycles
        self.causal = causal
        self.recursive = recursive
        self.net = nn.ModuleList(Block(width, heads, mlp_ratio) for _ in range(layers))
        self.register_buffer("first_answer", truncated_normal(torch.empty(width), 1.0))
        self.register_buffer("first_latent", truncated_normal(torch.empty(width), 1.0))

    def begin(self, question: Tensor) -> Thought:
        """The thought before any thinking, equal for every token of `question` `[batch, tokens, width]`."""
        shape = question.shape
        return Thought(
            self.first_answer.to(question.dtype).expand(shape), self.first_latent.to(question.dtype).expand(shape)
        )

    def sight(self, real: Tensor, cache: KeyValueCache | None = None) -> Sight:
        """Positions and masks of tokens.

        A token's position is its place among its sample's real tokens, so padding on either side changes nothing.

        Args:
            real: `[batch, keys]` bool, True for real tokens; with a cache of all tokens so far, the new ones last.
            cache: of the tokens before the new ones.
        """
        old = 0 if cache is None else cache.tokens
        place = (real.cumsum(1) - 1).clamp(min=0)[:, old:]
        exponents = torch.arange(0, self.head_dim, 2, device=real.device, dtype=torch.float64) / self.head_dim
        rates = 10_000.0**-exponents
        angles = (place[..., None] * rates).repeat(1, 1, 2)[:, None]  # [batch, 1, tokens, head_dim]
        dtype = self.first_answer.dtype
        keys, new = real.shape[1], real.shape[1] - old
        visible = real[:, None, None, :].expand(-1, 1, new, -1)
        if self.causal:
            visible = visible & torch.ones(new, keys, dtype=torch.bool, device=real.device).tril(old)
        # A padding token looks at itself, for a softmax over nothing is no number.
        visible = visible | torch.eye(keys, dtype=torch.bool, device=real.device)[old:]
        return Sight(angles.cos().to(dtype), angles.sin().to(dtype), visible, cache)

    def forward(self, question: Tensor, thought: Thought, sight: Sight) -> Thought:
        """One supervision step: all cycles.

        Args:
            question: `x` of the paper, `[batch, tokens, width]`.
            thought: from `begin` or the step before, detached.
            sight: from `sight`.
        """
        answer, latent = thought.answer, thought.latent
        if not self.recursive:
            return Thought(self.think(question, sight), latent)
        for cycle in range(self.cycles):
            with torch.set_grad_enabled(torch.is_grad_enabled() and cycle == self.cycles - 1):
                for _ in range(self.latent_steps):
                    latent = self.think(question + answer + latent, sight)
                answer = self.think(answer + latent, sight)
        return Thought(answer, latent)

    def think(self, hidden: Tensor, sight: Sight) -> Tensor:
        """The net, applied once to `[batch, tokens, width]`."""
        for block in self.net:
            hidden = block(hidden, sight)
        return hidden


class Block(nn.Module):
    """Attention and SwiGLU, an RMSNorm without weights after each residual.

    Args:
        width: of the tokens.
        heads: attention heads.
        mlp_ratio: see `Recursion`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        hidden = -(-round(mlp_ratio * width * 2 / 3) // 16) * 16  # a multiple of 16, for the hardware
        self.attend = linear(width, 3 * width)
        self.attended = linear(width, width)
        self.widen = linear(width, 2 * hidden)
        self.narrow = linear(hidden, width)

    def forward(self, hidden: Tensor, sight: Sight) -> Tensor:
        """`[batch, tokens, width]` to the same."""
        hidden = _norm(hidden + self._attention(hidden, sight))
        gate, value = self.widen(hidden).chunk(2, dim=-1)
        return _norm(hidden + self.narrow(silu(gate) * value))

    def _attention(self, hidden: Tensor, sight: Sight) -> Tensor:
        split = self.attend(hidden).unflatten(2, (3, self.heads, -1)).transpose(1, 3)  # [batch, heads, 3, tokens, dim]
        queries, keys, values = split.unbind(2)
        queries, keys = _turn(queries, sight), _turn(keys, sight)
        if sight.cache is not None:
            keys, values = sight.cache.extend(keys, values)
        attended = scaled_dot_product_attention(queries, keys, values, attn_mask=sight.visible)
        return self.attended(attended.transpose(1, 2).flatten(2))


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, its weights drawn from a truncated normal of variance one over `inputs`."""
    layer = nn.Linear(inputs, outputs, bias=False)
    truncated_normal(layer.weight, inputs**-0.5)
    return layer


@torch.no_grad()
def truncated_normal(tensor: Tensor, std: float) -> Tensor:
    """Fill with a normal distribution cut at two deviations, which has the given deviation after the cut."""
    # Variance of a standard normal cut at +-2: 1 - 2 * 2 * density(2) / (2 * Phi(2) - 1).
    left = 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    uncut = std / math.sqrt(left)
    return nn.init.trunc_normal_(tensor, std=uncut, a=-2 * uncut, b=2 * uncut)


def _norm(hidden: Tensor) -> Tensor:
    return rms_norm(hidden, (hidden.shape[-1],), eps=EPSILON)


def _turn(heads: Tensor, sight: Sight) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves of a head paired as in GPT-NeoX."""
    first, second = heads.chunk(2, dim=-1)
    return heads * sight.cosines + torch.cat([-second, first], dim=-1) * sight.sines
