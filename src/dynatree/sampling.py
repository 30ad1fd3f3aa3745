"""Lossless sampling: drafts and verification on noise that is a function, not a state.

All randomness is a hash of (seed, position, purpose), computed on the device: a phase of a round
can be captured and replayed, and whatever is drawn does not depend on how rows were batched.
Rounds verify by one walk (`accept_greedy`) along one token per row of the tree; the two modes
differ in how the token after a row is chosen from the target's distribution p there.

*Coupled*: the Gumbel-max trick with noise g keyed by the token's position,

    token at position i = argmax over v of log p(v) + g(seed, i, v).

That is a sample of p, and a function of the text before it: so a speculative run equals the
autoregressive run of the same seed, token for token, whatever was drafted. The draft orders its
candidates by log q + g, with q its own distribution and the same g. Both models then mostly agree.

*Rejection*: recursive rejection sampling (SpecInfer, Miao et al., 2024, Algorithm 2; with siblings
drawn without replacement as in Sequoia, Chen et al., 2024, arXiv:2402.12374, Algorithm 2; for one
child that of Leviathan et al., 2023, Algorithm 1). After a node whose children x_1, x_2, ... were
drawn from q without replacement (by Gumbel-top-k: Kool et al., 2019, arXiv:1903.06059),

    take x_i with probability min(1, p(x_i) / q(x_i)); otherwise p becomes max(p - q, 0), q loses
    x_i, both are normalised, and the next child is tried; after the last, sample from p.

The result has distribution p. For that *all* children that were drawn must be tried, in the order
of drawing, also those that pruning, breadth or budget took out of the tree: to try only those that
stayed would be to condition on their values. So the draws are kept aside, and a child that is taken
but is not in the tree ends the round, as the bonus token does.

That the whole output has the target's distribution, by induction over its tokens: let the round
have arrived at node u. The next token has distribution p(. | u) if the draws and coins at u are
still as fresh as when they were made, given all that led there. The coins of a position are used at
no other. The draws at u have noise of their own, keyed by the root's position, which no other
round shares, and by u. The path to u was chosen by draws and coins above u. And whether u is in the
tree does not depend on draws at or below u: a node is dropped for what is more probable than
itself, and a descendant never is. A strategy may therefore prune as it likes, by values drawn too,
as long as it decides on a node without looking below it; nodes that it adds from elsewhere are only
places where the walk may go on.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from dynatree.errors import DecodeError

SamplingMode = Literal["coupled", "rejection"]
"""How drafts are verified against a sampled target."""


class Sampling(BaseModel):
    """How to choose tokens; the default is greedy. Fields are named as in Transformers.

    Attributes:
        temperature: the logits are divided by it; 0 is greedy decoding.
        top_p: keep the most probable tokens that together reach this; 1 keeps all.
        top_k: keep that many of the most probable tokens; 0 keeps all.
        seed: of the noise. The same seed and models give the same text.
        mode: `coupled` equals the autoregressive run of the same seed, token for token;
            `rejection` has its distribution.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    mode: SamplingMode = "coupled"

    @classmethod
    def checked(cls, **values: Any) -> "Sampling":
        """The sampling of `values`.

        Raises:
            DecodeError: naming each field that cannot be used, and its value.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r}"
                for item in error.errors(include_url=False)
            ]
        raise DecodeError("cannot sample so: " + "; ".join(problems))


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is sampled from, as Transformers makes it of `logits`.

    Temperature, top-k and top-p in this order: `TemperatureLogitsWarper`, `TopKLogitsWarper` and
    `TopPLogitsWarper`, in float32.

    Args:
        logits: [n, vocabulary].
        sampling: with a temperature above 0.

    Returns:
        [n, vocabulary] float32 log-probabilities; minus infinity for what is left out, and all NaN
        in a row whose logits hold a NaN.
    """
    scores = logits.float() / sampling.temperature
    if sampling.top_k > 0:
        least = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1.0:
        ordered, order = scores.sort(dim=-1, stable=True)
        unlikely = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - sampling.top_p
        unlikely[:, -1:] = False
        scores = scores.masked_fill(unlikely.scatter(-1, order, unlikely), -math.inf)
    return scores.log_softmax(dim=-1)


_CHOICE, _DRAW, _COIN = range(3)
"""What noise is for: no two purposes share any."""


class Noise:
    """Uniform and Gumbel variables as a function of (seed, position, purpose, lane, index).

    SplitMix64 (Steele et al., 2014) makes a 64-bit key of all but the index; its halves are start
    and odd step of a sequence over the index, and a 32-bit finaliser (lowbias32) makes its members
    uniform. Integer operations wrap and are exact, so the bits are the same on every device.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """For indices 0 .. width - 1, with seed 0."""
        self._indices = torch.arange(width, dtype=torch.int32, device=device)
        self._state = torch.zeros(1, dtype=torch.long, device=device)
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Begins another noise, of `seed` in 0 .. 2**64 - 1."""
        state = (seed + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        self._state.fill_(_signed(state ^ (state >> 31), 64))

    def uniform(
        self, positions: Tensor, purpose: int, count: int, lanes: Tensor | int = 0
    ) -> Tensor:
        """Uniform in (0, 1), in steps of 2**-31.

        Args:
            positions: [n] int64, below 2**39.
            purpose: 0 .. 3.
            count: indices to have variables for.
            lanes: [n] int64 or a number, below 2**22.

        Returns:
            [n, count] float32.
        """
        key = ((positions * 2**22 + lanes) * 4 + purpose) * _signed(0x9E3779B97F4A7C15, 64)
        key = key + self._state
        key = (key ^ ((key >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9, 64)
        key = (key ^ ((key >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB, 64)
        key = key ^ ((key >> 31) & (2**33 - 1))
        start, step = key.to(torch.int32), (key >> 32).to(torch.int32) | 1
        bits = self._indices[:count] * step[:, None]
        bits += start[:, None]
        bits ^= (bits >> 16).bitwise_and_(2**16 - 1)
        bits *= 0x7FEB352D
        bits ^= (bits >> 15).bitwise_and_(2**17 - 1)
        bits *= _signed(0x846CA68B, 32)
        bits ^= (bits >> 16).bitwise_and_(2**16 - 1)
        uniform = bits.bitwise_and_(2**31 - 1).float().add_(0.5).mul_(2.0**-31)
        # The largest would round to 1.
        return uniform.clamp_(max=1.0 - 2.0**-24)

    def gumbel(
        self, positions: Tensor, purpose: int, count: int, lanes: Tensor | int = 0
    ) -> Tensor:
        """Gumbel variables, [n, count] float32; what is maximal is what is finely resolved."""
        uniform = self.uniform(positions, purpose, count, lanes)
        return uniform.neg_().log1p_().neg_().log_().neg_()


class Sampler:
    """Draws candidates for the draft and chooses tokens for the target, on the device.

    One per decoder. All it keeps is in tensors of fixed shapes.
    """

    def __init__(
        self,
        sampling: Sampling,
        vocab_size: int,
        longest: int,
        rows: int,
        children: int,
        device: torch.device,
    ) -> None:
        """Prepares to sample.

        Args:
            sampling: with a temperature above 0.
            longest: nodes of the longest possible path of a tree, the root included.
            rows: of the tree that the draft grows.
            children: most children of a node.
        """
        self.sampling = sampling
        self._vocab_size = vocab_size
        self._noise = Noise(max(vocab_size, children), device)
        self._depths = torch.arange(longest, device=device)
        self._position: Tensor
        self._drawn: Tensor | None = None
        if sampling.mode == "rejection":
            # Of each node of the grown tree: the children that were drawn, in their order, then
            # -1; and what they were drawn from.
            shape = rows, min(children, vocab_size)
            self._drawn = torch.full(shape, -1, dtype=torch.long, device=device)
            self._draft = torch.zeros(rows, vocab_size, dtype=torch.float32, device=device)

    def begin(self, seed: int | None) -> None:
        """Begins a sequence with `seed`; None is the sampling's own."""
        self._noise.seed(self.sampling.seed if seed is None else seed)

    def plant(self, position: Tensor) -> None:
        """Begins another tree, whose root is at `position` [1], with nothing drawn yet."""
        self._position = position
        if self._drawn is not None:
            self._drawn.fill_(-1)

    def draw(self, logits: Tensor, children: int, nodes: Tensor, depth: int) -> Tensor:
        """Candidates for the children of `nodes`.

        Args:
            logits: [w, vocabulary], the draft's after each of the nodes.
            children: to draw from each.
            nodes: [w] int64, indices in the tree that the draft grows.
            depth: of the children.

        Returns:
            [w, children] int64: different tokens, in the order of drawing.
        """
        log_probs = warp(logits, self.sampling)
        if self._drawn is None:
            noise = self._noise.gumbel(self._position + depth, _CHOICE, self._vocab_size)
            return (log_probs + noise).topk(children, dim=-1).indices
        noise = self._noise.gumbel(self._position, _DRAW, self._vocab_size, nodes)
        values, tokens = (log_probs + noise).topk(children, dim=-1)
        # What the draft leaves out, it can only have been filled up with.
        drawn = tokens.masked_fill(values == -math.inf, -1)
        self._drawn[:, :children].index_copy_(0, nodes, drawn)
        self._draft.index_copy_(0, nodes, log_probs.exp())
        return tokens

    def choose(
        self, logits: Tensor, position: Tensor, depths: Tensor, origins: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The token after each row of a tree, sampled from the target's distribution there.

        Args:
            logits: [n, vocabulary], the target's.
            position: [1] int64, the root's.
            depths: [n] int64; the token after row j has position root + depth + 1.
            origins: [n] int64, each row's index in the tree that the draft grew; None where it
                grew none.

        Returns:
            [n] float32, NaN where the row's logits hold one, and [n] int64 tokens.
        """
        log_probs = warp(logits, self.sampling)
        # Rows of one depth share their noise.
        few = len(depths) <= len(self._depths)
        noise = self._noise.gumbel(
            (depths if few else self._depths) + position + 1, _CHOICE, self._vocab_size
        )
        if not few:
            noise = noise.index_select(0, depths)
        if self._drawn is None or origins is None:
            best, choices = (log_probs + noise).max(dim=-1)
            return best, choices
        drawn = self._drawn.index_select(0, origins)
        draft = self._draft.index_select(0, origins)
        coins = self._noise.uniform(depths + position + 1, _COIN, drawn.shape[1])
        return log_probs[:, 0], accept_drawn(log_probs.exp(), draft, drawn, coins, noise)


def accept_drawn(
    probs: Tensor, draft: Tensor, drawn: Tensor, coins: Tensor, noise: Tensor
) -> Tensor:
    """Samples from `probs` with candidates from `draft`: recursive rejection; see above.

    Args:
        probs: [n, vocabulary] float32, the target's probabilities.
        draft: [n, vocabulary] float32, the draft's.
        drawn: [n, k] int64, drawn from `draft` without replacement, in this order, then -1.
        coins: [n, k] float32, uniform in (0, 1).
        noise: [n, vocabulary] float32, Gumbel variables for when every candidate is rejected.

    Returns:
        [n] int64.
    """
    choices = torch.full_like(drawn[:, 0], -1)
    for token, coin in zip(drawn.unbind(1), coins.unbind(1), strict=True):
        tried = (token >= 0) & (choices < 0)
        place = token.clamp(min=0)[:, None]
        taken = coin * draft.gather(1, place)[:, 0] < probs.gather(1, place)[:, 0]
        choices = torch.where(tried & taken, token, choices)
        residual = (probs - draft).clamp_(min=0.0)
        mass = residual.sum(dim=-1, keepdim=True)
        # No mass is left where the two are equal but for rounding.
        rejected = (tried & ~taken)[:, None] & (mass > 0.0)
        probs = torch.where(rejected, residual / mass, probs)
        draft = draft.scatter(1, place, 0.0)
        draft = draft / draft.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(draft.dtype).tiny)
    rest = (probs.log() + noise).argmax(dim=-1)
    return torch.where(choices < 0, rest, choices)


def _signed(value: int, bits: int) -> int:
    """The number that has the `bits` lowest bits of `value` in two's complement."""
    return value - 2**bits if value >= 2 ** (bits - 1) else value
