"""One answer in the making: its tokens and their text, what is replayed of it, and why it ends.

Rules: sync, no device. Delivered tokens, made elsewhere, are turned into text again, a bounded number at a time; the
client has that text, so only what it lacks is carried over to the next output.
"""

from __future__ import annotations

from collections import Counter

from model.requests import GenerationRequest, Output, TokenLogprob
from model.text import TextStream
from model.tokens import Tokens

REPLAY_TOKENS_MAX = 4_096  # delivered tokens turned into text in one step: 10 us each


class Answer:
    """tokens: prompt and answer so far, delivered ones included from the start."""

    def __init__(self, request: GenerationRequest, tokens: Tokens, end_tokens: frozenset[int]) -> None:
        """Raises what a tokenizer raises."""
        self.request = request
        self.tokens: list[int] = [*request.prompt, *request.delivered]
        self.prompt_set = frozenset(request.prompt)
        self.generated: Counter[int] = Counter()
        self.length = 0  # of the answer, as far as it is text
        self._text: TextStream = tokens.stream(request.prompt, request.sampling.stop, request.delivered_chars)
        self._end_tokens = end_tokens
        self._carry = ""  # text of delivered tokens that the client does not have yet

    @property
    def is_behind(self) -> bool:
        """Whether delivered tokens are left to be replayed."""
        return self.length < len(self.request.delivered)

    def replay(self, count: int = REPLAY_TOKENS_MAX) -> Output | None:
        """Turns so many delivered tokens into text again; an output only if they end the answer."""
        delivered = self.request.delivered
        for token in delivered[self.length : self.length + count]:
            text, finish = self._take(token)
            self._carry += text
            if finish is not None:
                return Output(request_id=self.request.request_id, text=self._carry, finish=finish)
        return None

    def push(self, token: int, logprobs: tuple[TokenLogprob, ...]) -> Output:
        """The next token was chosen. Raises what a tokenizer raises."""
        self.tokens.append(token)
        text, finish = self._take(token)
        text, self._carry = self._carry + text, ""
        return Output(request_id=self.request.request_id, tokens=(token,), text=text, logprobs=logprobs, finish=finish)

    def _take(self, token: int) -> tuple[str, str | None]:
        """The text that became certain with this token, and why the answer ends here if it does."""
        self.generated[token] += 1
        self.length += 1
        if token in self._end_tokens:
            return self._text.finish(), "stop"
        text = self._text.push(token)
        if self._text.stopped:
            return text, "stop"
        if self.length >= self.request.sampling.max_tokens:
            text += self._text.finish()
            return text, "stop" if self._text.stopped else "length"
        return text, None
