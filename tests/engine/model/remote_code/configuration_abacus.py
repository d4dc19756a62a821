"""The configuration of a model that transformers does not know."""

from typing import ClassVar

from transformers import PretrainedConfig


class AbacusConfig(PretrainedConfig):
    """Few fields, under names of its own."""

    model_type = "abacus"
    attribute_map: ClassVar = {"hidden_size": "width", "num_hidden_layers": "depth", "num_attention_heads": "beads"}

    def __init__(self, vocab_size=261, width=48, depth=3, beads=4, reach=256, **kwargs):
        self.vocab_size = vocab_size
        self.width = width
        self.depth = depth
        self.beads = beads
        self.max_position_embeddings = reach
        super().__init__(**kwargs)
