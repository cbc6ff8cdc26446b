"""What we send to a server behind this node: each kind of server's words for a request of ours, and what none has.

Rules: core. A field of Sampling is sent in words that the server knows, or the request is refused with the field's
name; a neutral value is said where the server's defaults are not neutral, and it has a word for it. An answer that
another peer began is gone on with as text, where that gives the same context; elsewhere it is refused, so that no text
is wrong or comes twice.
Source: vLLM vllm/entrypoints/openai/completion/protocol.py; llama.cpp tools/server/README.md and server-common.cpp;
llama-cpp-python llama_cpp/server/types.py; Ollama docs/api/openai-compatibility.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from node.errors import BadRequest, PeerFailed
from node.tools import Tooling, functions_of
from node.work import GenerateWork, Message

SEED_BITS = 31  # llama.cpp takes 32, and keeps the last of them for "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One kind of server. Where it is not known, it is OpenAI's own API and nothing more."""

    name: str
    sampling: tuple[str, ...] = ()  # of top_k, min_p, repetition_penalty: those that it has
    repetition: tuple[str, ...] = ("repetition_penalty",)  # its name for that one
    top_k_off: int | None = None  # what stands for no top_k; None: say nothing
    says_neutral: bool = False  # its defaults are not neutral, so neutral values are said
    takes_tokens: bool = False  # token ids as the prompt of a completion
    mixes_tokens: bool = False  # token ids and then text, as one prompt
    continues_chat: dict[str, object] | None = None  # fields by which an assistant's last message is gone on with; it
    # counts only when the server was seen to do it (node/upstream_look.py)
    extra: dict[str, object] | None = None  # fields by which it tells more of its work
    usage: dict[str, object] | None = None  # stream_options
    is_alone: bool = False  # one request at a time, and any other call under /v1 ends that with half an answer
    choices: tuple[str, ...] = ()  # of a tool_choice: "required", "function", those that it keeps to
    takes_tools: bool = True
    refuses_long: bool = False  # what to embed, when it is longer than the model reads; others may cut it


_CONTINUES: Final[dict[str, object]] = {"continue_final_message": True, "add_generation_prompt": False}
_USAGE: Final[dict[str, object]] = {"include_usage": True}
VLLM = Dialect(
    name="vllm",
    sampling=("top_k", "min_p", "repetition_penalty"),
    top_k_off=-1,
    says_neutral=True,  # a model's generation_config.json has others
    takes_tokens=True,
    continues_chat=_CONTINUES,
    usage={"include_usage": True, "continuous_usage_stats": True},
    choices=("required", "function"),
    refuses_long=True,
)
LLAMA_CPP = Dialect(
    name="llama.cpp",
    sampling=("top_k", "min_p", "repetition_penalty"),
    repetition=("repeat_penalty",),
    top_k_off=0,
    says_neutral=True,
    takes_tokens=True,
    mixes_tokens=True,
    continues_chat=_CONTINUES,
    extra={"timings_per_token": True, "return_progress": True},
    usage=_USAGE,
    choices=("required",),  # it has no words for one function
    refuses_long=True,
)
LLAMA_CPP_PYTHON = Dialect(
    name="llama-cpp-python",
    sampling=("top_k", "min_p", "repetition_penalty"),
    repetition=("repeat_penalty",),
    top_k_off=0,
    says_neutral=True,
    is_alone=True,
    takes_tools=False,  # most of its templates drop them, and it does not say which
)
OLLAMA = Dialect(name="ollama", usage=_USAGE)
OPENAI = Dialect(
    name="openai",
    sampling=("top_k", "min_p", "repetition_penalty"),
    repetition=("repetition_penalty", "repeat_penalty"),  # LM Studio has the second
    takes_tokens=True,
    usage=_USAGE,
    choices=("required", "function"),
)
DIALECTS: Final = {each.name: each for each in (VLLM, LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, OPENAI)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request for a stream. seam: white space at the end of what the client has, that the server is to make again:
    templates cut it off, and it is no part of the answer's rest."""

    path: str
    body: dict[str, Any]
    seam: str = ""


def ask_of(work: GenerateWork, dialect: Dialect, model: str) -> Ask:
    """The request to a server whose model is called `model` there.

    Raises BadRequest that names what this server does not have, PeerFailed when it cannot go on with the answer.
    """
    _check_delivered(work)
    body: dict[str, Any] = {"model": model, "stream": True, **_sampling(work, dialect)}
    if dialect.usage is not None:
        body["stream_options"] = dialect.usage
    body |= dialect.extra or {}
    if work.messages is not None:
        return _chat(work, dialect, body)
    body["prompt"] = _prompt(work, dialect)
    if work.sampling.logprobs is not None:
        body["logprobs"] = max(1, work.sampling.logprobs)  # 0 is "none" to llama.cpp
    return Ask(path="/v1/completions", body=body)


def _check_delivered(work: GenerateWork) -> None:
    if len(work.delivered_text) != work.delivered_chars:
        raise PeerFailed(
            f"the server behind this node goes on with text: the answer's {work.delivered_chars} characters so far are "
            f"needed, {len(work.delivered_text)} came"
        )


def _chat(work: GenerateWork, dialect: Dialect, body: dict[str, Any]) -> Ask:
    assert work.messages is not None
    body["messages"] = [_message(each) for each in work.messages]
    if work.tools is not None:
        body |= _tools(work.tools, dialect)
    if work.sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": work.sampling.logprobs}
    kept = work.delivered_text.rstrip()
    if kept:
        if dialect.continues_chat is None:
            raise PeerFailed(f"the server behind this node ({dialect.name}) cannot go on in the middle of a message")
        if work.messages[-1].role == "assistant":
            raise PeerFailed("the chat ends with an assistant's message: where the answer begins is not clear")
        body["messages"].append({"role": "assistant", "content": kept})
        body |= dialect.continues_chat
    return Ask(path="/v1/chat/completions", body=body, seam=work.delivered_text[len(kept) :])


def _message(message: Message) -> dict[str, Any]:
    told: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        told["content"] = message.content or None
        told["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments or "{}"}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    return told


def _tools(tooling: Tooling, dialect: Dialect) -> dict[str, Any]:
    """Raises BadRequest for a server that would pass over what is asked."""
    if not dialect.takes_tools:
        raise BadRequest(f"the server of this model ({dialect.name}) is not known to take tools", param="tools")
    choice = "function" if tooling.function is not None else tooling.choice
    if choice != "auto" and choice not in dialect.choices:
        raise BadRequest(
            f"the server of this model ({dialect.name}) does not keep to this tool_choice: leave it out, or send "
            '"auto" or "none"',
            param="tool_choice",
        )
    told: dict[str, Any] = {"tools": functions_of(tooling)}
    if choice == "function":
        told["tool_choice"] = {"type": "function", "function": {"name": tooling.function}}
    elif choice != "auto":
        told["tool_choice"] = choice
    if not tooling.parallel:
        told["parallel_tool_calls"] = False
    return told


def _prompt(work: GenerateWork, dialect: Dialect) -> object:
    if work.tokens is None:
        return (work.text or "") + work.delivered_text
    if not dialect.takes_tokens:
        raise BadRequest(f"the server of this model ({dialect.name}) takes text, no token ids", param="prompt")
    if not work.delivered_text:
        return list(work.tokens)
    if not dialect.mixes_tokens:
        raise PeerFailed(f"the server behind this node ({dialect.name}) cannot go on after a prompt of token ids")
    return [*work.tokens, work.delivered_text]


def _sampling(work: GenerateWork, dialect: Dialect) -> dict[str, Any]:
    sampling = work.sampling
    told: dict[str, Any] = {
        "max_tokens": sampling.max_tokens - len(work.delivered),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        # the rest of an answer must not draw the same chances as its beginning
        "seed": (sampling.seed + len(work.delivered)) % ((1 << SEED_BITS) - 1),
    }
    if sampling.stop:
        told["stop"] = list(sampling.stop)
    for name, neutral in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        value = getattr(sampling, name)
        if value != neutral and name not in dialect.sampling:
            raise BadRequest(f"the server of this model ({dialect.name}) has no {name}: leave it out", param=name)
        if value != neutral or (dialect.says_neutral and name in dialect.sampling):
            is_off = name == "top_k" and value == neutral
            for word in dialect.repetition if name == "repetition_penalty" else (name,):
                told[word] = dialect.top_k_off if is_off else value
    return told
