"""What models call the two ends over their vocabulary, by the last part of the module's path."""

from __future__ import annotations

__all__ = ["HEADS", "INPUTS"]

# The names that causal language models of transformers give to both ends.
INPUTS = (
    *("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"),
    "shared",
)
HEADS = ("lm_head", "embed_out", "output_projection")
