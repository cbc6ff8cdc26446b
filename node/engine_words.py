"""How the node's words become the engine's, and the engine's the node's.

Rules: core.
"""

from __future__ import annotations

from typing import Literal

from model.errors import BadInput, EngineFull, ModelError
from model.requests import GenerationRequest, Output, SamplingParameters
from model.runtime_face import Runtime
from node.errors import NO_ROOM_RETRY_S, BadRequest, InternalError, NoRoom, RequestError
from node.requester import Requester
from node.work import GenerateWork, TokenLogprob

LOGPROB_MIN = -9999.0  # stands for minus infinity, which no wire form carries


def parameters(work: GenerateWork) -> SamplingParameters:
    """How the engine is to choose tokens."""
    s = work.sampling
    return SamplingParameters(
        max_tokens=s.max_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        stop=s.stop,
        logprobs=s.logprobs,
    )


def generation_request(runtime: Runtime, key: str, work: GenerateWork, requester: Requester) -> GenerationRequest:
    """What the engine is asked; the prompt is turned into tokens here. Raises ModelError."""
    if work.tokens is not None:
        prompt = tuple(work.tokens)
    elif work.messages is not None:
        prompt = runtime.render([(m.role, m.content) for m in work.messages])
    else:
        prompt = runtime.encode(work.text or "")
    return GenerationRequest(
        request_id=key,
        prompt=prompt,
        delivered=tuple(work.delivered),
        delivered_chars=work.delivered_chars,
        sampling=parameters(work),
        requester=requester.name,
        priority=requester.priority,
        private=work.private,
    )


def logprobs(output: Output) -> tuple[TokenLogprob, ...]:
    """Of an output's tokens, finite as every wire form wants them."""
    return tuple(
        TokenLogprob(
            text=item.text,
            logprob=max(LOGPROB_MIN, item.logprob),
            top=tuple((text, max(LOGPROB_MIN, logprob)) for text, logprob in item.top),
        )
        for item in output.logprobs
    )


def finish_reason(output: Output) -> Literal["stop", "length"]:
    """Why an answer ended."""
    return "length" if output.finish == "length" else "stop"


def request_error(error: ModelError) -> RequestError:
    """What a client is told of an error of model/."""
    if isinstance(error, EngineFull):
        return NoRoom(str(error), retry_after_s=NO_ROOM_RETRY_S)
    if isinstance(error, BadInput):
        return BadRequest(str(error), param=error.param)
    return InternalError(str(error))
