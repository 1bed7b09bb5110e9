"""Dictionary: a sparse autoencoder or transcoder, as features that read an activation and write to one or several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.dictionaries.activation import FeatureActivation, Gated
from lens_relevance.errors import RelevanceError

Normalization = Literal["none", "constant_norm", "layer_norm"]
_LAYER_NORM_EPS = 1e-5


class Scales(NamedTuple):
    """How tokens are normalised: (x - mean) / into goes to the encoder, and the decoder's y becomes y * out + mean. Each [token, 1]."""

    mean: Float[Tensor, "*token 1"]
    into: Float[Tensor, "*token 1"]
    out: Float[Tensor, "*token 1"]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features that read an activation at one HookPoint and write to one (SAE, transcoder) or several (cross-layer transcoder).

    The value of feature i is f_i = activation(encoder_i . (x - input_bias) + encoder_bias_i), and what all write is
    sum_i f_i decoder_i + decoder_bias + skip x.

    Attributes:
        encoder: [feature, d_in].
        encoder_bias: [feature].
        decoder: For each HookPoint that is written to, [feature, d_out].
        decoder_bias: [d_out], written to the first of them.
        activation: ReLU, JumpReLU (BatchTopK too), TopK or Gated.
        point_in: HookPoint that is read, by any name that TransformerLens accepts.
        point_out: HookPoints that are written to; one name for an SAE (the same as point_in) or a transcoder.
        input_bias: [d_in], taken off what is read, or None.
        skip: [d_out, d_in], the affine skip connection of some transcoders, or None.
        normalization: Of each token before the encoder, undone after the decoder: "constant_norm" (to the norm sqrt(d_in)), "layer_norm".
        set_name: Dictionaries of one cross-layer transcoder share this name, and may write to the same HookPoint.
        source: Where it was read from, in words.
    """

    encoder: Float[Tensor, "feature d_in"]
    encoder_bias: Float[Tensor, " feature"]
    decoder: tuple[Float[Tensor, "feature d_out"], ...]
    decoder_bias: Float[Tensor, " d_out"]
    activation: FeatureActivation
    point_in: str
    point_out: tuple[str, ...]
    input_bias: Float[Tensor, " d_in"] | None = None
    skip: Float[Tensor, "d_out d_in"] | None = None
    normalization: Normalization = "none"
    set_name: str = ""
    source: str = "a dictionary"

    def __post_init__(self) -> None:
        for name in ("decoder", "point_out"):
            if isinstance(getattr(self, name), Tensor | str):
                object.__setattr__(self, name, (getattr(self, name),))
        self._check_shapes()

    def _check_shapes(self) -> None:
        n, d_in = self.encoder.shape
        d_out = len(self.decoder_bias)
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "encoder_bias": (self.encoder_bias, (n,)),
            "input_bias": (self.input_bias, (d_in,)),
            "skip": (self.skip, (d_out, d_in)),
        }
        expected |= {f"decoder[{i}]": (weight, (n, d_out)) for i, weight in enumerate(self.decoder)}
        for name, (tensor, shape) in expected.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise RelevanceError(
                    f"{self.source}: {name} is {list(tensor.shape)} where encoder {[n, d_in]} and decoder_bias {[d_out]} ask for "
                    f"{list(shape)}; the encoder is [feature, d_in] and each decoder [feature, d_out]"
                )
        for name, size in self.activation.sizes().items():
            if size != n:
                raise RelevanceError(f"{self.source}: the activation's {name} is for {size} features, and the encoder has {n}")
        if len(self.decoder) != len(self.point_out):
            raise RelevanceError(f"{self.source}: {len(self.decoder)} decoder(s) for {len(self.point_out)} HookPoint(s) in point_out")
        if self.normalization not in ("none", "constant_norm", "layer_norm"):
            raise RelevanceError(f"{self.source}: unknown normalization {self.normalization!r}; there are none, constant_norm, layer_norm")
        if self.normalization != "none" and not self.is_autoencoder:
            raise RelevanceError(
                f"{self.source}: normalization={self.normalization!r} is for autoencoders, whose output has its input's size"
            )
        if isinstance(self.activation, Gated) and bool(self.encoder_bias.any()):
            raise RelevanceError(f"{self.source}: a gated dictionary has biases of its gate and its magnitude, and no encoder_bias")

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return len(self.encoder)

    @property
    def d_in(self) -> int:
        """Size of the activation that is read."""
        return int(self.encoder.shape[1])

    @property
    def d_out(self) -> int:
        """Size of the activations that are written."""
        return len(self.decoder_bias)

    @property
    def is_autoencoder(self) -> bool:
        """Whether it writes to where it reads."""
        return self.point_out == (self.point_in,)

    def scales(self, x: Float[Tensor, "*token d_in"]) -> Scales | None:
        """What each token is normalised with; None without normalization."""
        if self.normalization == "none":
            return None
        if self.normalization == "constant_norm":
            size = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return Scales(torch.zeros_like(size), size, size)
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        return Scales(mean, std + _LAYER_NORM_EPS, std)

    def before_activation(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token feature"]:
        """Pre-activations of all features."""
        scales = self.scales(x)
        x = x if scales is None else (x - scales.mean) / scales.into
        x = x if self.input_bias is None else x - self.input_bias
        return torch.nn.functional.linear(x, self.encoder, self.encoder_bias)

    def encode(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token feature"]:
        """Values of all features for an activation at point_in."""
        return self.activation(self.before_activation(x))

    def written(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token feature"]:
        """What each feature writes, times its decoder row: its value, by the scale of the normalization where there is one."""
        values, scales = self.encode(x), self.scales(x)
        return values if scales is None else values * scales.out

    def decode(
        self, values: Float[Tensor, "*token feature"], x: Float[Tensor, "*token d_in"] | None = None, *, index: int = 0
    ) -> Float[Tensor, "*token d_out"]:
        """What features of these values write to the index-th HookPoint of point_out.

        x: what they were read from, which a skip connection and a normalization need.

        Raises:
            RelevanceError: no x, where a skip connection or a normalization needs it.
        """
        if x is None and index == 0 and (self.skip is not None or self.normalization != "none"):
            raise RelevanceError(f"{self.source}: with a skip connection or normalization, decode(values, x) needs what was read as well")
        y = values @ self.decoder[index]
        if index:
            return y
        y = y + self.decoder_bias
        if x is not None:
            scales = self.scales(x)
            y = y if scales is None else y * scales.out + scales.mean
            y = y if self.skip is None else y + x @ self.skip.T
        return y

    def to(self, like: Float[Tensor, "*_shape"]) -> Dictionary:
        """The same in the dtype and on the device of a tensor; itself where it is so already."""
        if self.encoder.dtype == like.dtype and self.encoder.device == like.device:
            return self
        return replace(
            self,
            encoder=self.encoder.to(like),
            encoder_bias=self.encoder_bias.to(like),
            decoder=tuple(weight.to(like) for weight in self.decoder),
            decoder_bias=self.decoder_bias.to(like),
            activation=self.activation.to(like),
            input_bias=None if self.input_bias is None else self.input_bias.to(like),
            skip=None if self.skip is None else self.skip.to(like),
        )

    def __repr__(self) -> str:
        kind = type(self.activation).__name__
        return f"Dictionary({self.n_features} {kind} features, {self.point_in} -> {', '.join(self.point_out)})"
