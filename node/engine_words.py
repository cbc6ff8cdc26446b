"""How the node's words become the engine's, and the engine's the node's.

Rules: core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from model.errors import BadInput, EngineFull, ModelError
from model.errors import TooLong as ModelTooLong
from model.requests import GenerationRequest, Output, SamplingParameters
from model.runtime_face import Runtime
from node.errors import NO_ROOM_RETRY_S, BadRequest, InternalError, NoRoom, RequestError, TooLong
from node.requester import Requester
from node.tools import functions_of, json_object
from node.work import GENERATE, GenerateWork, Message, TokenLogprob

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
        prompt = _rendered(runtime, work, work.messages)
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


def _rendered(runtime: Runtime, work: GenerateWork, messages: Sequence[Message]) -> tuple[int, ...]:
    """The prompt of a chat. Raises ModelError."""
    if work.method == GENERATE:
        return runtime.render([(m.role, m.content) for m in messages])
    if work.tools is not None and not work.tools.is_free:
        raise BadInput(
            f"nothing makes {runtime.facts.name} call a function when it does not choose to: leave tool_choice out, "
            'or send "auto" or "none"',
            param="tool_choice",
        )
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    try:
        rows = [_row(message, names) for message in messages]
        tools = None if work.tools is None else functions_of(work.tools)
    except BadRequest as exc:
        raise BadInput(exc.message, param=exc.param) from exc
    return runtime.render(rows, tools)


def _row(message: Message, names: dict[str, str]) -> dict[str, Any]:
    """A message as templates take it: arguments as objects, a result with its function's name. names: by call id.

    Raises BadRequest for arguments that are no JSON object.
    """
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json_object(call.arguments, f"the arguments of {call.id}", "messages"),
                },
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
        if message.tool_call_id in names:
            row["name"] = names[message.tool_call_id]
    return row


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
    if isinstance(error, ModelTooLong):
        return TooLong(str(error), param=error.param)
    if isinstance(error, BadInput):
        return BadRequest(str(error), param=error.param)
    return InternalError(str(error))
