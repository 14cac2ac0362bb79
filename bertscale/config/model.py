"""The shape of the encoder.

What a preset is, its five properties tell, in one table, `ARCHITECTURES`: code asks for these, not for the
preset's name, except where one class of transformers or one paper's recipe is meant.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from bertscale.config.section import Section

POSITIONS = 1024  # whose logits exist at a time: enough for the matrix products to be at their fastest
GPU_POSITIONS = 4096  # likewise on a GPU
VOCAB_MULTIPLE = 128  # rows of the word embedding: a multiple that tensor parallel and tensor cores like


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the word embedding; the rows past `vocab_size` are never predicted nor exported."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Architecture(NamedTuple):
    """What tells one preset from another; the properties of `ModelConfig` say what each means."""

    pre_norm: bool
    embedding_norm: bool
    biases: bool
    rotary: bool
    gated: bool


ARCHITECTURES = {
    "bert": Architecture(pre_norm=False, embedding_norm=True, biases=True, rotary=False, gated=False),
    "megatron-bert": Architecture(
        pre_norm=True, embedding_norm=False, biases=True, rotary=False, gated=False
    ),
    "modern": Architecture(pre_norm=True, embedding_norm=True, biases=False, rotary=True, gated=True),
}


class ModelConfig(Section):
    """Shape of the encoder; the names are those of Hugging Face's configs.

    A key that the preset has no use for is refused unless it has its default; defaults that differ by
    preset are in `PRESET_DEFAULTS`.
    """

    preset: Literal["bert", "megatron-bert", "modern"] = Field(
        "bert", description="Architecture: BertForPreTraining, MegatronBertForPreTraining or ModernBert."
    )
    num_hidden_layers: int = Field(12, ge=1, description="Layers.")
    hidden_size: int = Field(768, ge=1, description="Width of the residual stream.")
    num_attention_heads: int = Field(12, ge=1, description="Attention heads.")
    intermediate_size: int = Field(
        3072, ge=1, description="Width inside the feed-forward part; of each half where it is gated (modern)."
    )
    max_position_embeddings: int = Field(512, ge=1, description="Longest sequence, in tokens.")
    type_vocab_size: int = Field(2, ge=1, description="Segment types; not for modern.")
    hidden_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of hidden states; modern: of embeddings and feed-forward, 0."
    )
    attention_probs_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of attention; modern: of its output as well, 0."
    )
    layer_norm_eps: float = Field(
        1e-12, gt=0, description="Added to the variance by LayerNorm (norm_eps of modern: 1e-5)."
    )
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    matrix_initializer_range: float | None = Field(
        None, gt=0, description="Likewise, of matrices that are no embeddings; without it the same."
    )
    initializer_cutoff_factor: float = Field(
        2.0, gt=0, description="Initial weights are cut off at so many deviations; modern alone."
    )
    global_attn_every_n_layers: int = Field(
        3, ge=1, description="Every so-manieth layer attends to the whole sample, the first one too; modern."
    )
    local_attention: int = Field(
        128, ge=2, description="Window of the other layers in tokens, half to each side; modern alone."
    )
    global_rope_theta: float = Field(
        160_000.0, gt=1, description="Base of the rotary positions of global layers; modern alone."
    )
    local_rope_theta: float = Field(10_000.0, gt=1, description="Likewise, of local layers.")
    sentence_head: bool = Field(
        True, description="A pooler and a head for an objective on sentence pairs; modern: false."
    )
    generator_size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Width of the generator of replaced-token detection as a share of the encoder's; without "
        "it there is none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(preset := values.get("preset"), str):
            return {**PRESET_DEFAULTS.get(preset, {}), **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for key in ("type_vocab_size",) if self.rotary else MODERN_KEYS:
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                home = "bert and megatron-bert" if self.rotary else "modern"
                raise ValueError(
                    f"{key}={value} is a key of preset {home}; preset {self.preset} has no use for it"
                )
        if self.rotary and (size := self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} over num_attention_heads={self.num_attention_heads} is a "
                f"head of odd size, {size}; rotary positions take features in pairs"
            )
        if self.rotary and self.local_attention % 2:
            raise ValueError(f"local_attention={self.local_attention} is odd: half of it lies to each side")
        if self.generator_size is not None:
            heads, inside = self.num_attention_heads, self.intermediate_size
            fit = [n for n in range(1, heads + 1) if inside * n % heads == 0]
            rounding = abs(self.generator_size * heads - self.generator_heads)
            if self.generator_heads not in fit or rounding > 0.01:
                raise ValueError(
                    f"generator_size={self.generator_size} of num_attention_heads={heads} and "
                    f"intermediate_size={inside} is no whole number; shares that are: "
                    f"{', '.join(f'{n / heads:.4g}' for n in fit)}"
                )
        return self

    @property
    def pre_norm(self) -> bool:
        """Whether norms come before each part of a layer and after the last layer; else after each part."""
        return ARCHITECTURES[self.preset].pre_norm

    @property
    def embedding_norm(self) -> bool:
        """Whether the embeddings have a norm of their own."""
        return ARCHITECTURES[self.preset].embedding_norm

    @property
    def biases(self) -> bool:
        """Whether matrices and norms have biases; the decoder and the poolers always have one."""
        return ARCHITECTURES[self.preset].biases

    @property
    def rotary(self) -> bool:
        """Whether attention turns queries and keys by their positions, in some layers within a window; else
        positions and token types are learnt embeddings."""
        return ARCHITECTURES[self.preset].rotary

    @property
    def gated(self) -> bool:
        """Whether the feed-forward part is gated (GeGLU), with dropout inside of it and not behind it."""
        return ARCHITECTURES[self.preset].gated

    @property
    def generator_heads(self) -> int:
        """Attention heads of the generator; 0 without one. They are as wide as the encoder's."""
        return round((self.generator_size or 0) * self.num_attention_heads)

    @property
    def generator(self) -> ModelConfig | None:
        """The shape of the generator of replaced-token detection, which reads the encoder's embeddings."""
        if self.generator_size is None:
            return None
        heads = self.generator_heads
        sizes = {
            "num_attention_heads": heads,
            "hidden_size": self.hidden_size * heads // self.num_attention_heads,
            "intermediate_size": self.intermediate_size * heads // self.num_attention_heads,
        }
        return self.model_copy(update={**sizes, "sentence_head": False, "generator_size": None})

    @property
    def half_window(self) -> int | None:
        """Tokens to each side that a local layer attends to; None: there is no local layer."""
        local = self.rotary and self.num_hidden_layers > 1 and self.global_attn_every_n_layers > 1
        return self.local_attention // 2 if local else None

    def is_local(self, layer: int) -> bool:
        """Whether layer number `layer`, from 0, attends to a window only."""
        return self.half_window is not None and layer % self.global_attn_every_n_layers > 0


MODERN_KEYS = (
    "initializer_cutoff_factor",
    "global_attn_every_n_layers",
    "local_attention",
    "global_rope_theta",
    "local_rope_theta",
)
# What a preset has where a config is silent and the field's own default is another preset's.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "modern": {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5,
        "sentence_head": False,
    }
}
