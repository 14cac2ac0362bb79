"""The shape of the encoder.

Five properties, in the table `ARCHITECTURES`, define a preset. Code asks for these, not for the name of the
preset, except where it means one class of transformers or the recipe of one paper.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from bertscale.config.section import Section

# Positions whose logits exist at a time: enough for matrix products to run at their full speed.
POSITIONS = 1024  # on a CPU
GPU_POSITIONS = 4096
VOCAB_MULTIPLE = 128  # rows of the word embedding: divisible for tensor parallel, and fast on tensor cores


def padded_vocab_size(vocab_size: int) -> int:
    """Returns the rows of the word embedding; those past `vocab_size` are never predicted nor exported."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Architecture(NamedTuple):
    """Holds what distinguishes a preset; the properties of `ModelConfig` say what each field means."""

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

    A key that the preset does not use is refused unless it has its default; defaults that differ by
    preset are in `PRESET_DEFAULTS`.
    """

    preset: Literal["bert", "megatron-bert", "modern"] = Field(
        "bert", description="Architecture: BertForPreTraining, MegatronBertForPreTraining or ModernBert."
    )
    num_hidden_layers: int = Field(12, ge=1, lt=2**12, description="Number of layers.")
    hidden_size: int = Field(768, ge=1, lt=2**24, description="Width of the hidden states.")
    num_attention_heads: int = Field(12, ge=1, lt=2**24, description="Number of attention heads.")
    intermediate_size: int = Field(
        3072,
        ge=1,
        lt=2**24,
        description="Width inside the feed-forward part; for modern, of each of its two halves.",
    )
    max_position_embeddings: int = Field(512, ge=1, lt=2**24, description="Longest sequence, in tokens.")
    type_vocab_size: int = Field(2, ge=1, lt=2**24, description="Number of segment types; not for modern.")
    hidden_dropout_prob: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Dropout of hidden states; for modern of embeddings and feed-forward alone, and "
        "0 by default.",
    )
    attention_probs_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="Dropout of attention; for modern of its output as well, 0 by default."
    )
    layer_norm_eps: float = Field(
        1e-12, gt=0, description="Added to the variance by LayerNorm; for modern 1e-5 by default."
    )
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    matrix_initializer_range: float | None = Field(
        None, gt=0, description="Standard deviation of non-embedding matrices; default initializer_range."
    )
    initializer_cutoff_factor: float = Field(
        2.0, gt=0, description="Initial weights are cut off at this many deviations; only for modern."
    )
    global_attn_every_n_layers: int = Field(
        3, ge=1, description="Every n-th layer, and the first, sees the whole sample; only for modern."
    )
    local_attention: int = Field(
        128, ge=2, description="Window of the other layers in tokens, half to each side; only for modern."
    )
    global_rope_theta: float = Field(
        160_000.0, gt=1, description="Rotary base of layers that see the whole sample; only for modern."
    )
    local_rope_theta: float = Field(
        10_000.0, gt=1, description="Rotary base of the other layers; only for modern."
    )
    sentence_head: bool = Field(
        True, description="Add a pooler and a head for sentence pairs; for modern false by default."
    )
    generator_size: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Width of the generator for replaced-token detection, as a share of the encoder's; by "
        "default there is no generator.",
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
                    f"{key}={value} is a key of preset {home}; preset {self.preset} does not use it"
                )
        if self.rotary and (size := self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size={self.hidden_size} / num_attention_heads={self.num_attention_heads} gives "
                f"heads of odd size {size}; rotary positions need an even size"
            )
        if self.rotary and self.local_attention % 2:
            raise ValueError(f"local_attention={self.local_attention} is odd; take an even number")
        if self.generator_size is not None:
            heads, inside = self.num_attention_heads, self.intermediate_size
            fit = [n for n in range(1, heads + 1) if inside * n % heads == 0]
            rounding = abs(self.generator_size * heads - self.generator_heads)
            if self.generator_heads not in fit or rounding > 0.01:
                raise ValueError(
                    f"generator_size={self.generator_size} of num_attention_heads={heads} and "
                    f"intermediate_size={inside} is not a whole number; shares that are: "
                    f"{', '.join(f'{n / heads:.4g}' for n in fit)}"
                )
        return self

    @property
    def pre_norm(self) -> bool:
        """Tells whether norms precede each part of a layer and follow the last, or follow each part."""
        return ARCHITECTURES[self.preset].pre_norm

    @property
    def embedding_norm(self) -> bool:
        """Tells whether the embeddings have a norm of their own."""
        return ARCHITECTURES[self.preset].embedding_norm

    @property
    def biases(self) -> bool:
        """Tells whether matrices and norms have biases; the decoder and the poolers always have one."""
        return ARCHITECTURES[self.preset].biases

    @property
    def rotary(self) -> bool:
        """Tells whether attention rotates queries and keys by position, in some layers within a window; else
        positions and token types are learned embeddings."""
        return ARCHITECTURES[self.preset].rotary

    @property
    def gated(self) -> bool:
        """Tells whether the feed-forward part is gated (GeGLU), with dropout inside it and not after it."""
        return ARCHITECTURES[self.preset].gated

    @property
    def generator_heads(self) -> int:
        """Counts the attention heads of the generator, 0 without one. They are as wide as the encoder's."""
        return round((self.generator_size or 0) * self.num_attention_heads)

    @property
    def generator(self) -> ModelConfig | None:
        """Gives the shape of the generator, which reads the encoder's embeddings."""
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
        """Counts the tokens to each side that a local layer attends to; None without local layers."""
        local = self.rotary and self.num_hidden_layers > 1 and self.global_attn_every_n_layers > 1
        return self.local_attention // 2 if local else None

    def is_local(self, layer: int) -> bool:
        """Tells whether layer number `layer`, from 0, attends to a window only."""
        return self.half_window is not None and layer % self.global_attn_every_n_layers > 0


MODERN_KEYS = (
    "initializer_cutoff_factor",
    "global_attn_every_n_layers",
    "local_attention",
    "global_rope_theta",
    "local_rope_theta",
)
# Defaults of a preset that differ from the defaults of the fields.
PRESET_DEFAULTS: dict[str, dict[str, Any]] = {
    "modern": {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-5,
        "sentence_head": False,
    }
}
