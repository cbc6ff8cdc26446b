"""A small OpenAI-compatible server over real HTTP, that can be told to fail in every way; its model is a rule.

Rules: the next token is a function of the whole text before it, so that an answer gone on with from its text is right
exactly when it equals the undisturbed one. `kind` says whose manners it has. Faults are counted down: each hits once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio import serve

OWNERS = {"vllm": "vllm", "llama.cpp": "llamacpp", "llama-cpp-python": "me", "ollama": "library", "openai": "someone"}
DIGEST = "ab" * 32
STOP_EVERY = 997  # one token in so many ends the answer by itself
WORDS = 900


def next_token(text: str) -> str:
    """What follows a text; '' for its end. One in seven is white space alone, as models write it."""
    drawn = zlib.crc32(text.encode())
    if drawn % STOP_EVERY == 0:
        return ""
    if text.endswith(">"):
        return f"w{drawn % WORDS}"  # behind a template's mark
    return "\n\n" if drawn % 7 == 0 and not text.endswith("\n") else f" w{drawn % WORDS}"


def rendered(messages: list[dict[str, str]]) -> str:
    """The chat template."""
    return "".join(f"<{each['role']}>{each['content']}</>" for each in messages) + "<assistant>"


def expected(prompt: str, tokens: int) -> str:
    """The undisturbed answer to a prompt as the model sees it."""
    text = prompt
    for _ in range(tokens):
        text += next_token(text)
    return text[len(prompt) :]


def chat_prompt(*contents: str) -> str:
    """What the model sees of users' messages."""
    return rendered([{"role": "user", "content": each} for each in contents])


@dataclass
class FakeServer:
    """Adjust its fields at any time. step_s: a token; before_s: the first one."""

    kind: str = "openai"
    models: tuple[str, ...] = ("tale",)
    context: int = 2_000
    slots: int = 3
    key: str | None = None
    step_s: float = 0.001
    before_s: float = 0.0
    embeds: bool = True
    has_text: bool = True
    has_chat: bool = True
    trims: bool = True  # its template cuts white space off messages
    continues: bool = True  # in the middle of a message, if it is of a kind that does
    echoes: bool = False  # what was said of a message that it goes on with, as llama.cpp may
    status: int = 200  # of every answer
    retry_after: str | None = None
    error: Any = "no"
    cut_after: int | None = None  # events, then the connection breaks
    done_after: int | None = None  # events, then [DONE] with no reason
    raw: bytes | None = None  # sent in the place of a stream
    freeze_after: int | None = None  # events, then nothing more
    no_usage: bool = False
    tokens_an_event: int = 1
    running: int = 0
    most_running: int = 0
    waiting: int = 0  # as it says
    kv_used: float = 0.25
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    seen_keys: list[str | None] = field(default_factory=list)
    left: int = 0  # streams whose client went away
    disturbed: int = 0  # calls that came while an answer was made
    url: str = ""

    def bodies(self, path: str) -> list[dict[str, Any]]:
        """What was posted to a path, without the trials."""
        asked = [
            body for where, body in self.asked if where == path and body.get("stream", path.endswith("embeddings"))
        ]
        return [body for body in asked if not is_trial(body)]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        body = b""
        while True:
            part = await receive()
            body += part.get("body", b"")
            if not part.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.disturbed += self.running > 0 and scope["path"].startswith("/v1")
        self.seen_keys.append(headers.get("authorization"))
        path, asked = scope["path"], json.loads(body) if body else {}
        if scope["method"] == "POST":
            self.asked.append((path, asked))
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            await _json(
                send, 401, {"error": {"message": f"Incorrect API key provided: {headers.get('authorization')}"}}
            )
        elif self.status != 200:
            more = [] if self.retry_after is None else [(b"retry-after", self.retry_after.encode())]
            location = [(b"location", b"http://127.0.0.1:1/")] if 300 <= self.status < 400 else []
            await _json(send, self.status, {"error": {"message": self.error}}, more + location)
        elif asked.get("stream"):
            await self._stream(path, asked, receive, send)
        else:
            status, answer = self._answer(path, asked)
            if isinstance(answer, str):
                await _send(send, status, b"text/plain", answer.encode())
            else:
                await _json(send, status, answer)

    def _answer(self, path: str, asked: dict[str, Any]) -> tuple[int, Any]:
        match path:
            case "/v1/models":
                return 200, {"object": "list", "data": [self._row(each) for each in self.models]}
            case "/api/version" if self.kind == "ollama":
                return 200, {"version": "0.9"}
            case "/api/show" if self.kind == "ollama":
                info = {"llama.context_length": self.context}
                return 200, {"model_info": info, "details": {"quantization_level": "Q4_K_M"}, "parameters": ""}
            case "/api/tags" if self.kind == "ollama":
                return 200, {"models": [{"name": each, "digest": DIGEST} for each in self.models]}
            case "/api/ps" if self.kind == "ollama":
                return 200, {"models": [{"name": self.models[0], "context_length": self.context}]}
            case "/props" if self.kind == "llama.cpp":
                settings = {"n_ctx": self.context}
                path = "/secret/place/tale.gguf"
                return 200, {
                    "total_slots": self.slots,
                    "default_generation_settings": settings,
                    "chat_template": "{{ x }}",
                    "model_path": path,
                }
            case "/slots" if self.kind == "llama.cpp":
                rows = [{"n_ctx": self.context, "is_processing": place < self.running} for place in range(self.slots)]
                return 200, rows
            case "/apply-template" if self.kind == "llama.cpp":
                return 200, {"prompt": self._prompt("/v1/chat/completions", asked)}
            case "/tokenize" if self.kind == "vllm":
                return 200, {"tokens": [ord(letter) for letter in self._prompt("/v1/chat/completions", asked)]}
            case "/detokenize" if self.kind == "vllm":
                return 200, {"prompt": "".join(map(chr, asked["tokens"]))}
            case "/metrics" if self.kind == "vllm":
                return 200, self._metrics()
            case "/v1/embeddings" if self.embeds:
                rows = [{"index": i, "embedding": vector_of(text)} for i, text in enumerate(asked["input"])]
                return 200, {"data": rows[::-1], "usage": {"prompt_tokens": 2 * len(rows)}}
            case "/v1/completions" if self.has_text:
                return 200, {"choices": [{"text": "x"}]}
            case "/v1/chat/completions" if self.has_chat:
                return 200, {"choices": [{"message": {"content": "x"}}]}
            case _:
                return 404, {"detail": "Not Found"}

    def _row(self, model: str) -> dict[str, Any]:
        row: dict[str, Any] = {"id": model, "object": "model", "owned_by": OWNERS[self.kind]}
        if self.kind == "vllm":
            row |= {"max_model_len": self.context, "root": f"org/{model}"}
        if self.kind == "llama.cpp":
            row["meta"] = {"n_params": 7, "size": 70, "n_vocab": 5, "n_embd": 4, "n_ctx_train": 9, "ftype": "Q8_0"}
        return row

    def _metrics(self) -> str:
        labels = f'engine="0",model_name="{self.models[0]}"'
        return (
            "# HELP vllm:num_requests_running x\n"
            f"vllm:num_requests_running{{{labels}}} {self.running}.0\n"
            f"vllm:num_requests_waiting{{{labels}}} {self.waiting}.0\n"
            f"vllm:kv_cache_usage_perc{{{labels}}} {self.kv_used}\n"
            f"vllm:iteration_tokens_total_count{{{labels}}} {len(self.asked)}.0\n"
            'vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000"} 1.0\n'
        )

    def _prompt(self, path: str, asked: dict[str, Any]) -> str:
        if path == "/v1/completions":
            prompt = asked["prompt"]
            if isinstance(prompt, str):
                return prompt
            return "".join(each if isinstance(each, str) else chr(each) for each in prompt)
        messages = [dict(each) for each in asked["messages"]]
        for each in messages:
            each["content"] = each["content"].strip() if self.trims else each["content"]
        begun = messages.pop()["content"] if self._goes_on(asked) else ""
        return rendered(messages) + begun

    def _goes_on(self, asked: dict[str, Any]) -> bool:
        is_asked = asked.get("continue_final_message") is True and asked.get("add_generation_prompt") is False
        return self.kind in ("vllm", "llama.cpp") and self.continues and is_asked

    async def _stream(self, path: str, asked: dict[str, Any], receive: Any, send: Any) -> None:
        if self.raw is not None:
            await _start(send, b"text/event-stream")
            await send({"type": "http.response.body", "body": self.raw, "more_body": False})
            return
        if is_trial(asked):
            await self._events(path, asked, send)
            return
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_gone, receive, nursery.cancel_scope)
                await self._events(path, asked, send)
                nursery.cancel_scope.cancel()
        finally:
            self.running -= 1

    async def _until_gone(self, receive: Any, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left += 1
        scope.cancel()

    async def _events(self, path: str, asked: dict[str, Any], send: Any) -> None:
        await _start(send, b"text/event-stream; charset=utf-8")
        await trio.sleep(self.before_s)
        prompt, sent, made = self._prompt(path, asked), 0, 0
        text, most = prompt, asked["max_tokens"]
        if asked.get("return_progress"):
            await self._event(send, {"choices": [], "prompt_progress": {"total": len(prompt), "processed": 1}})
        if self.echoes and path == "/v1/chat/completions" and self._goes_on(asked):
            await self._event(send, {"choices": [{"index": 0, "delta": {"content": asked["messages"][-1]["content"]}}]})
        reason = "length"
        while made < most:
            words = [word for word in self._words(text, min(self.tokens_an_event, most - made)) if word]
            if not words:
                reason = "stop"
                break
            if self.cut_after == sent:
                self.cut_after = None
                raise ConnectionError("cut, as the test wants")
            if self.freeze_after == sent:
                await trio.sleep_forever()
            if self.done_after == sent:
                break
            text, made, sent = text + "".join(words), made + len(words), sent + 1
            await self._event(send, self._chunk(path, asked, words, made, len(prompt)))
            await trio.sleep(self.step_s)
        if self.done_after is None:
            await self._event(send, {"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": reason}]})
            if not self.no_usage:
                usage = {"prompt_tokens": len(prompt), "completion_tokens": made}
                await self._event(send, {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _words(self, text: str, count: int) -> list[str]:
        words = list[str]()
        for _ in range(count):
            words.append(next_token(text + "".join(words)))
        return words

    def _chunk(self, path: str, asked: dict[str, Any], words: list[str], made: int, prompt: int) -> dict[str, Any]:
        is_chat = path == "/v1/chat/completions"
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        choice |= {"delta": {"content": "".join(words)}} if is_chat else {"text": "".join(words)}
        if asked.get("logprobs") and is_chat:
            top = [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": None}]
            choice["logprobs"] = {"content": [{"token": w, "logprob": -0.5, "top_logprobs": top} for w in words]}
        elif asked.get("logprobs"):
            choice["logprobs"] = {
                "tokens": words,
                "token_logprobs": [-0.5] * len(words),
                "top_logprobs": [{"a": -1.0, "b": -2.0}] * len(words),
            }
        chunk: dict[str, Any] = {"choices": [choice]}
        if asked.get("timings_per_token"):
            chunk["timings"] = {"cache_n": 0, "prompt_n": prompt, "predicted_n": made, "prompt_per_second": 500.0}
        if (asked.get("stream_options") or {}).get("continuous_usage_stats"):
            chunk["usage"] = {"prompt_tokens": prompt, "completion_tokens": made}
        return chunk

    async def _event(self, send: Any, content: dict[str, Any]) -> None:
        body = b"data: " + json.dumps(content).encode() + b"\n\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})


def is_trial(asked: dict[str, Any]) -> bool:
    """Whether a chat is one of node/upstream_look.py's."""
    return bool(asked.get("messages", [{}])[0].get("content") == "Go on.")


def vector_of(text: object) -> list[float]:
    """Not of length 1."""
    return [float(len(str(text))), 1.0, -2.0]


async def _start(send: Any, kind: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})


async def _send(
    send: Any, status: int, kind: bytes, body: bytes, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _json(send: Any, status: int, content: Any, more: list[tuple[bytes, bytes]] | None = None) -> None:
    await _send(send, status, b"application/json", json.dumps(content).encode(), more)


async def _lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


@asynccontextmanager
async def served(server: FakeServer, port: int = 0) -> AsyncIterator[Callable[[], None]]:
    """The server, over HTTP on loopback; call what comes to end it at once, connections too."""
    config = Config()
    config.bind, config.graceful_timeout, config.errorlog = [f"127.0.0.1:{port}"], 0.0, None
    config.keep_alive_timeout = 60.0
    scope = trio.CancelScope()  # of the server's task alone: whoever ends it goes on

    async def run(*, task_status: trio.TaskStatus[list[str]]) -> None:
        app: Any = server
        with scope:
            await serve(app, config, mode="asgi", task_status=task_status)

    async with trio.open_nursery() as nursery:
        (server.url,) = await nursery.start(run)
        yield scope.cancel
        nursery.cancel_scope.cancel()
