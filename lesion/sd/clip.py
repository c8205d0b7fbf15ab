"""CLIP ViT-L/14's text encoder as Stable Diffusion 1.5 uses it (arXiv:2103.00020): causal, quick-GELU, pre-norm, final norm applied.

The context of the U-Net is the last hidden state after `final_layer_norm`, of all 77 positions, padding included.
Module names are those of the files on disk (`text_model.encoder.layers.0...`). Proven by tests/parity/test_networks.py.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lesion.sd.blocks import attention
from lesion.sd.vocabulary import BEGIN, END, one_line, tokenizer_files

TOKENS = 77  # positions: begin, 75 text tokens, end


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text encoder; the defaults are CLIP ViT-L/14's."""
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = TOKENS


class Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.token_embedding(token_ids) + self.position_embedding.weight[:token_ids.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))  # quick GELU


class EncoderLayer(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder(self.embeddings(token_ids)))


class CLIPTextEncoder(nn.Module):
    """context [B,77,C] = CLIPTextEncoder(token_ids [B,77] int64)."""

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.text_model(token_ids)


class Tokenizer:
    """CLIP's byte-pair tokenizer (transformers does the merging): prompt -> begin, at most 75 tokens, end, padded with end.

    folder: holds vocab.json and merges.txt, or tokenizer.json. Raises ValueError where it does not, or where they are damaged.
    """

    def __init__(self, folder):
        from transformers import CLIPTokenizer, CLIPTokenizerFast
        self.folder = Path(folder)
        kind = CLIPTokenizer if "vocab.json" in tokenizer_files(self.folder) else CLIPTokenizerFast  # one class since transformers 5
        try:
            self.clip = kind.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # what transformers raises of a damaged file depends on its version
            raise ValueError(f"tokenizer folder {folder} cannot be read ({one_line(error)}); give --tokenizer DIR") from None
        self.begin = self.clip.convert_tokens_to_ids(BEGIN)
        self.end = self.clip.convert_tokens_to_ids(END)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, list[str]]:
        """-> token_ids int64 [B,77], and for each prompt the text beyond 75 tokens, which the model does not see ("" mostly)."""
        rows, cut = [], []
        for prompt in prompts:
            ids = self.clip(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids  # we say what is cut
            rows.append([self.begin, *ids[:TOKENS - 2]] + [self.end] * (TOKENS - 1 - len(ids[:TOKENS - 2])))
            cut.append(self.clip.decode(ids[TOKENS - 2:]).strip())
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, TOKENS), cut
