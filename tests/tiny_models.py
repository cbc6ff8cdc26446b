"""Tiny random models and tokenizers, saved as real checkpoints: what the tests of model/ load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
CONTEXT = 512
LINES = (
    "Once upon a time there was a king who had a daughter, and she lived by the deep forest.",
    "Es war einmal ein König, der hatte eine schöne Tochter. Größe, Übermut, Straße.",
    "从前有一个国王，他有一个美丽的女儿。", "むかしむかし、あるところに王様がいました。", "🙂🚀👩‍👩‍👧 naïve café",
)  # fmt: skip
torch.set_num_threads(1)  # these models are far too small to share
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Any:
    """Byte-level BPE, so that most characters beyond ASCII take several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    return _wrap(core)


def sentencepiece_tokenizer() -> Any:
    """Like Llama 2's: a space is part of the word behind it, and unknown characters fall back to single bytes."""
    words = sorted({"▁" + word for line in LINES[:1] for word in line.split()})
    vocabulary = {END: 0, "<unk>": 1}
    for piece in (*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz,.", *words):
        vocabulary.setdefault(piece, len(vocabulary))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([END])
    return _wrap(core)


def _wrap(core: Tokenizer) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def causal_config(kind: str, vocabulary: int) -> Any:
    """A configuration with two small layers."""
    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    match kind:
        case "llama":
            return transformers.LlamaConfig(**common)
        case "qwen3":
            return transformers.Qwen3Config(**common, head_dim=8)
        case "mistral":
            return transformers.MistralConfig(**common, sliding_window=24)
        case "gemma":
            return transformers.GemmaConfig(**common, head_dim=8)
        case "gemma2":
            return transformers.Gemma2Config(**common, head_dim=8, sliding_window=24)
        case "phi":
            return transformers.PhiConfig(**common)
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=vocabulary, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
                eos_token_id=0, initializer_range=0.4, tie_word_embeddings=False,
            )  # fmt: skip
        case "mamba":  # keeps state that is no KV cache
            return transformers.MambaConfig(
                vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=8, bos_token_id=0,
                eos_token_id=0, pad_token_id=0, initializer_range=0.4,
            )  # fmt: skip
    raise ValueError(kind)


def save_causal(path: Path, kind: str = "llama", tokenizer: Any = None, seed: int = 0) -> Any:
    """Writes a random model with its tokenizer; gives the model, in fp32."""
    tokenizer = tokenizer or byte_tokenizer()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind, len(tokenizer))).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def save_encoder(path: Path, seed: int = 0) -> Any:
    """Writes a random BERT with a byte-level tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model
