"""A decoder that comes with its checkpoint: its own attention, its own mask, learned positions, distances as a bias."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_abacus import AbacusConfig


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.beads, self.size = index, config.beads, config.width // config.beads
        self.norm = nn.LayerNorm(config.width)
        self.mixed = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.wide = nn.Linear(config.width, 2 * config.width)
        self.narrow = nn.Linear(2 * config.width, config.width)
        self.slope = nn.Parameter(torch.ones(config.beads))

    def forward(self, hidden, positions, mask, cache):
        rows, new, _ = hidden.shape
        normed = self.norm(hidden)
        mixed = self.mixed(normed).view(rows, new, self.beads, 3, self.size).transpose(1, 2)
        query, key, value = mixed.unbind(3)
        # The key's position travels in the cache as a channel of the value.
        value = torch.cat([value, positions[:, None, :, None].expand(-1, self.beads, -1, 1).to(value.dtype)], dim=-1)
        if cache is not None:
            key, value = cache.update(key, value, self.index)
        distance = positions[:, None, :, None] - value[..., -1][:, :, None, :]
        scores = query @ key.transpose(-1, -2) / self.size**0.5 - 0.05 * self.slope[:, None, None] * distance
        attended = (scores + mask).softmax(-1) @ value[..., :-1]
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(rows, new, -1))
        return hidden + self.narrow(torch.nn.functional.gelu(self.wide(normed)))


class AbacusForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AbacusConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.max_position_embeddings, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def get_output_embeddings(self):
        return self.head

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True, return_dict=True
    ):
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        new = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = torch.ones(input_ids.shape[0], past + new, dtype=torch.long, device=input_ids.device)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]
        columns = torch.arange(past + new, device=input_ids.device)
        seen = (columns <= columns[past:, None]) & attention_mask[:, None, None].bool()
        hidden = self.tokens(input_ids) + self.places(position_ids)
        mask = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        for block in self.blocks:
            hidden = block(hidden, position_ids, mask, past_key_values)
        return CausalLMOutputWithPast(logits=self.head(self.norm(hidden)), past_key_values=past_key_values)
