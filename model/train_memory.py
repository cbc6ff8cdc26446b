"""Whether a model can be trained here: a copy of its own in fp32, or one sentence that says why not.

Rules: the model that serves is read and never touched. What training needs is estimated and compared with what is free
before memory is taken. The estimate goes by what is kept for the backward pass: for each token the input and output of
each matrix. It is meant for dense models: the experts of a sparse one are counted as weights only.
Legend: N trainable elements, B rows, T tokens of a row.
Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), 4.
"""

from __future__ import annotations

import copy
from typing import Any

from model.batches import Batches
from model.config import TrainConfig
from model.errors import BadInput, OutOfMemory
from model.load import MEMORY_SHARE_MAX, Loaded, device_free_bytes

FP32_BYTES = 4
VECTORS = 4  # weights, the start of the round, two moments
PASSING_VECTORS = 2  # of which one is filled while a delta or a score is made
PRIVATE_VECTORS = 1  # the sum of the clipped gradients, beside the gradient of one row
LOGIT_COPIES = 3  # logits, their log-softmax, the gradient
MATRIX_COPIES = 2  # norms, activations and dropout keep copies: 1.1 (Llama) to 1.9 (GPT-2)
ATTENTION_COPIES = 4  # 2 (Gemma 2) to 3 (GPT-2), and the gradient of one layer's


def training_copy(loaded: Loaded, batches: Batches, config: TrainConfig, *, private: bool = False) -> Any:
    """An fp32 copy of the model, every parameter of it trainable, on the same device. private: for a PrivateTrainer.

    Raises BadInput (an encoder, a context or ids beyond the model's), OutOfMemory.
    """
    facts = loaded.facts
    if facts.kind != "causal":
        raise BadInput(f"{facts.name} is an encoder: it predicts no next token; train a causal model")
    if batches.context > facts.context_tokens:
        raise BadInput(
            f"rows of {batches.context:,} tokens are longer than the {facts.context_tokens:,} of {facts.name}"
        )
    if (id_max := int(batches.text.ids_N.numpy().max())) >= facts.vocabulary:
        raise BadInput(
            f"the text has token id {id_max:,}, and {facts.name} knows {facts.vocabulary:,}: tokenise it with that "
            "model's own tokenizer"
        )
    needed = needed_bytes(loaded.model, batches, config, private=private)
    free = device_free_bytes(loaded.device)
    if needed > free * MEMORY_SHARE_MAX:
        raise OutOfMemory(
            f"training {facts.name} needs {needed / 1e9:.1f} GB beside what serves it, and {loaded.device.type} has "
            f"{free / 1e9:.1f} GB free; choose fewer rows, a shorter context, checkpointing or a smaller model"
        )
    return copy.deepcopy(loaded.model).float().requires_grad_(True)


def needed_bytes(model: Any, batches: Batches, config: TrainConfig, *, private: bool = False) -> int:
    """An estimate of the memory that training takes beside the model itself; takes none.

    Private training goes row by row, so that it keeps the activations of one.
    """
    rows, vectors = (1, VECTORS + PRIVATE_VECTORS) if private else (batches.rows, VECTORS)
    vector_bytes: int = FP32_BYTES * sum(p.numel() for p in model.parameters())  # a shared parameter comes once
    activation_bytes = (
        FP32_BYTES * rows * batches.context * _floats_per_token(model, batches.context, config.checkpointing)
    )
    return vectors * vector_bytes + max(vector_bytes + activation_bytes, PASSING_VECTORS * vector_bytes)


def _floats_per_token(model: Any, context: int, checkpointing: bool) -> int:
    """What one token of a row leaves behind for the backward pass."""
    text = model.config.get_text_config()
    vocabulary, width = model.get_output_embeddings().weight.shape
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    kept = sum(MATRIX_COPIES * sum(m.weight.shape) for m in model.modules() if _is_matrix(m)) - width - vocabulary
    if _keeps_attention(text):
        kept += ATTENTION_COPIES * layers * int(getattr(text, "num_attention_heads", 1)) * context
    if checkpointing:
        kept = min(kept, 2 * kept / layers + layers * width)  # of one layer at a time, and its gradients
    return int(kept + LOGIT_COPIES * vocabulary)


def _is_matrix(module: Any) -> bool:
    """A linear layer, of torch or of GPT-2; an embedding keeps ids only."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not hasattr(module, "num_embeddings")


def _keeps_attention(text: Any) -> bool:
    """Whether each row's T x T weights are kept: torch's fused attention does without, but not under dropout."""
    dropout = any(getattr(text, name, 0.0) for name in ("attention_dropout", "attn_pdrop"))
    return dropout or getattr(text, "_attn_implementation", "eager") == "eager"
