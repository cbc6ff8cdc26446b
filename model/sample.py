"""logits -> token: greedy or by Gumbel-max, a pure function of (logits, parameters, history, seed, position).

Rules: the noise of a token is a keyed hash of (seed, position, token), the same on every machine and in every batch,
so a second peer draws what the first one would have drawn, and an auditor can check it.
Legend: V vocabulary, K kept tokens.
Source: Gumbel-max trick (Gumbel 1954; Maddison et al., arXiv 1411.0030); splitmix64 (Steele, Lea and Flood 2014);
min-p arXiv 2407.01082; penalties as in OpenAI's API reference and CTRL (arXiv 1909.05858).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import torch

from model.errors import ComputeFailed
from model.requests import SamplingParameters

TEMPERATURE_MIN = 1e-5  # below it is greedy: logits divided by less would leave fp32's range
TOP_P_PREFIX = 1_024  # tokens sorted at first: the nucleus is nearly always within them


def choose(
    logits_V: torch.Tensor,
    params: SamplingParameters,
    position: int,
    generated: Counter[int],
    prompt: Collection[int] = (),
) -> int:
    """The token at `position` of the answer. `generated` counts the answer's tokens so far, `prompt` is its set.

    Raises ComputeFailed when no token has a finite logit.
    """
    logits_V = penalize(logits_V, params, generated, prompt)
    if params.temperature < TEMPERATURE_MIN:
        token = int(logits_V.argmax())
        if not bool(torch.isfinite(logits_V[token])):
            raise ComputeFailed("the model made numbers that are not finite for this request")
        return token
    ids_K, logits_K = keep(logits_V / params.temperature, params)
    scores_K = logits_K.double().cpu().numpy() + gumbel(params.seed, position, ids_K)
    best = int(scores_K.argmax())
    if not np.isfinite(scores_K[best]):
        raise ComputeFailed("the model made numbers that are not finite for this request")
    return int(ids_K[best])


def is_plain(params: SamplingParameters) -> bool:
    """Whether the best token is wanted, and nothing else of the logits."""
    penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    return params.temperature < TEMPERATURE_MIN and not penalties and params.logprobs is None


def greedy(rows: Sequence[torch.Tensor]) -> list[int | None]:
    """What `choose` gives for each of these logits_V if `is_plain`, at once; None where it would raise."""
    if not rows:
        return []
    logits_SV = torch.stack(tuple(rows))
    best_S = logits_SV.argmax(1)
    finite_S = torch.isfinite(logits_SV.gather(1, best_S[:, None]))[:, 0]
    return [token if finite else None for token, finite in zip(best_S.tolist(), finite_S.tolist(), strict=True)]


def penalize(
    logits_V: torch.Tensor, params: SamplingParameters, generated: Counter[int], prompt: Collection[int]
) -> torch.Tensor:
    """Logits after the penalties; the input is left as it is. Repetition looks at prompt and answer, the others at
    the answer alone."""
    if params.repetition_penalty != 1.0:
        seen_K = torch.tensor(sorted({*prompt, *generated}), dtype=torch.long, device=logits_V.device)
        at_K = logits_V[seen_K]
        factor = params.repetition_penalty
        logits_V = logits_V.index_copy(0, seen_K, torch.where(at_K > 0, at_K / factor, at_K * factor))
    if generated and (params.frequency_penalty or params.presence_penalty):
        ids = sorted(generated)
        ids_K = torch.tensor(ids, dtype=torch.long, device=logits_V.device)
        cost = [params.frequency_penalty * generated[i] + params.presence_penalty for i in ids]
        cost_K = torch.tensor(cost, dtype=logits_V.dtype, device=logits_V.device)
        logits_V = logits_V.index_add(0, ids_K, -cost_K)
    return logits_V


def keep(logits_V: torch.Tensor, params: SamplingParameters) -> tuple[np.ndarray, torch.Tensor]:
    """The token ids that top-k, then top-p, then min-p leave, and their logits. At least one is left."""
    size = logits_V.shape[0]
    top_k = min(params.top_k or size, size)
    if params.top_p < 1.0:
        logits_K, ids_K = _nucleus(logits_V, top_k, params.top_p)
    elif top_k < size:
        logits_K, ids_K = torch.topk(logits_V, top_k)
    else:
        logits_K, ids_K = logits_V, torch.arange(size, device=logits_V.device)
    if params.min_p > 0.0:
        kept_K = logits_K >= logits_K.max() + float(np.log(params.min_p))
        logits_K, ids_K = logits_K[kept_K], ids_K[kept_K]
    return ids_K.cpu().numpy(), logits_K


def _nucleus(logits_V: torch.Tensor, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest best tokens of the best `top_k` whose probabilities, among these, sum to at least `top_p`."""
    size = logits_V.shape[0]
    if top_k < size:
        logits_K, ids_K = torch.topk(logits_V, top_k)
        total = torch.logsumexp(logits_K.double(), 0)
    else:
        total = torch.logsumexp(logits_V.double(), 0)
        logits_K, ids_K = torch.topk(logits_V, min(size, TOP_P_PREFIX))
        if float((logits_K.double() - total).exp().sum()) < top_p:
            logits_K, ids_K = torch.topk(logits_V, size)
    before_K = (logits_K.double() - total).exp().cumsum(0).roll(1)
    before_K[0] = 0.0
    kept = max(1, int((before_K < top_p).sum()))
    return logits_K[:kept], ids_K[:kept]


def gumbel(seed: int, position: int, ids_K: np.ndarray) -> np.ndarray:
    """Gumbel noise in float64 for each token id: -log(-log(u)), u from 53 bits of splitmix64(key + id)."""
    key = hashlib.sha256(b"openagi:sample:1" + seed.to_bytes(8, "little") + position.to_bytes(8, "little")).digest()
    x_K = ids_K.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(key[:8], "little"))
    x_K = (x_K ^ (x_K >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_K = (x_K ^ (x_K >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x_K = x_K ^ (x_K >> np.uint64(31))
    u_K = ((x_K >> np.uint64(11)).astype(np.float64) + 0.5) / float(1 << 53)
    return -np.log(-np.log(u_K))
