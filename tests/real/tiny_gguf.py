"""Writes a random llama with a vocabulary of letters as GGUF: `tiny_gguf.py FILE SEED [WIDTH LAYERS HEADS INNER]`.

Rules: run by the Python of an environment that has `gguf` and `numpy`; it imports nothing of ours. Rows of the output
for tokens that are no letters are zero, so that greedy answers are text and do not end.
Source: ggml-org/llama.cpp docs "GGUF"; gguf-py's GGUFWriter.
"""

from __future__ import annotations

import string
import sys

import gguf  # type: ignore[import-not-found]  # of the other environment
import numpy as np

TINY, CONTEXT = (64, 2, 4, 128), 8_192
LETTERS = ["\u2581", *string.ascii_letters, *string.digits, ".", ",", "<", ">", "|", "\n"]


def main(path: str, seed: int, shape: tuple[int, ...]) -> None:
    width, layers, heads, inner = shape
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(LETTERS)]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(width)
    out.add_block_count(layers)
    out.add_feed_forward_length(inner)
    out.add_head_count(heads)
    out.add_head_count_kv(heads)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_dimension_count(width // heads)
    out.add_vocab_size(len(tokens))
    out.add_file_type(0)
    out.add_tokenizer_model("llama")
    out.add_token_list(tokens)
    out.add_token_scores([0.0] * 259 + [-float(place) for place in range(len(LETTERS))])
    out.add_token_types(kinds)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    rng = np.random.default_rng(seed)

    def weight(name: str, rows: int, columns: int, scale: float) -> None:
        values = (rng.standard_normal((rows, columns)) * scale).astype(np.float32)
        if name == "output.weight":
            values[:259] = 0.0
        out.add_tensor(name, values)

    weight("token_embd.weight", len(tokens), width, 1.0)
    weight("output.weight", len(tokens), width, 1.0)
    out.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        at = f"blk.{layer}."
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weight(f"{at}{name}.weight", width, width, 0.5)
        weight(f"{at}ffn_gate.weight", inner, width, 0.3)
        weight(f"{at}ffn_up.weight", inner, width, 0.3)
        weight(f"{at}ffn_down.weight", width, inner, 0.3)
        out.add_tensor(f"{at}attn_norm.weight", np.ones(width, np.float32))
        out.add_tensor(f"{at}ffn_norm.weight", np.ones(width, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), tuple(map(int, sys.argv[3:])) or TINY)
