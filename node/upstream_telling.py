"""One answer of a server behind this node: its chunks become the items that a client gets.

Rules: core. The items keep to node/work.py: Started, pieces, one Finished that counts what the pieces had. Tokens are
counted as the server counts them while it streams, else one for each chunk with text, and put right at the end by its
usage where that is more; never beyond max_tokens. An answer is whole when the server says why it ended; a stream that
ends without is broken off. A rest that does not begin with the white space that is to come first does not fit what the
client has, and is refused. A call of a function is told when it is whole, as text: who takes an answer over, and who
keeps it, knows text only.
"""

from __future__ import annotations

from node.errors import BadRequest, PeerFailed
from node.judge import TOKEN_CHARS_MAX
from node.tool_calls import written
from node.tools import ARGUMENTS_CHARS_MAX, CALLS_MAX
from node.upstream_stream import CallPart, Chunk
from node.work import (
    PIECE_TOKENS_MAX,
    PROMPT_CHARS_MAX,
    UNKNOWN_TOKEN,
    AnswerItem,
    Finished,
    GenerateWork,
    Piece,
    Progress,
    Started,
)

NOT_AN_END = frozenset({"content_filter", "error", "abort"})  # reasons that leave half an answer
LOGPROBS_OF_PIECE_MAX = 4_096


class Telling:
    """The account of one answer."""

    def __init__(self, work: GenerateWork, started: Started) -> None:
        """started: what is told first; its prompt_tokens are filled in when the first chunk knows them."""
        self._work = work
        self._started = started
        self._seam = ""
        self._is_told = False
        self._delivered = len(work.delivered)
        self._chars = work.delivered_chars
        self._prompt_tokens = 0
        self.counted = 0  # tokens of this server
        self.finish: str | None = None
        self.has_text = False
        self._call: CallPart | None = None  # one that may go on
        self._calls = 0

    @property
    def revision(self) -> str:
        """Of the weights that the answer is stated to come from."""
        return self._started.revision

    def joins_after(self, seam: str) -> None:
        """The answer's rest must begin with this white space, which the client has."""
        self._seam = seam

    def whole(self) -> list[AnswerItem]:
        """An answer that was whole when it came here."""
        self.finish = "length"
        return self.end()

    def start(self) -> list[AnswerItem]:
        """That the server has taken the request; nothing when that was told."""
        if self._is_told:
            return []
        self._is_told = True
        return [self._started]

    def take(self, chunk: Chunk, steps: int) -> list[AnswerItem]:
        """What a chunk gives; steps: of the server so far. Raises PeerFailed, BadRequest."""
        items = self._open(chunk)
        if chunk.prefilled_tokens is not None and not self.counted:
            whole = self._started.prompt_tokens + self._delivered
            prefilled = min(chunk.prefilled_tokens, whole)
            items.append(Progress(engine_steps=steps, prefilled_tokens=prefilled, queue_position=0))
        text = self._joined(chunk.text) + self._called(chunk)
        tokens = self._new_tokens(chunk, text)
        if text or tokens:
            items += self._pieces(text, tokens, chunk)
        self.finish = chunk.finish or self.finish
        return items

    def end(self) -> list[AnswerItem]:
        """The server's stream has ended. Raises PeerFailed when the answer has not."""
        if self.finish is None:
            raise PeerFailed(f"the server behind this node broke off after {self.counted} tokens")
        if self.finish in NOT_AN_END:
            raise PeerFailed(f"the server behind this node ended the answer by {self.finish!r}")
        if self._seam and self.finish != "length":
            raise self._unfitting("")
        prompt_tokens = self._started.prompt_tokens or self._prompt_tokens
        finished = Finished(
            reason="length" if self.finish == "length" else "stop",
            prompt_tokens=prompt_tokens,
            completion_tokens=self._delivered + self.counted,
        )
        return [*self.start(), finished]

    def _open(self, chunk: Chunk) -> list[AnswerItem]:
        if chunk.prompt_tokens is not None:
            # it counts what the client has as prompt; cut anew, so this is near and not exact
            self._prompt_tokens = max(0, chunk.prompt_tokens - self._delivered)
        if not self._is_told:
            self._started = Started(
                served_by=self._started.served_by,
                model=self._started.model,
                revision=self._started.revision,
                prompt_tokens=self._prompt_tokens,
                calls=self._started.calls,
            )
        return self.start()

    def _called(self, chunk: Chunk) -> str:
        """The calls that are whole with this chunk, as text in the format that Started tells. Raises PeerFailed."""
        if self._work.tools is None:
            return ""
        whole = ""
        for part in chunk.calls:
            before = self._call
            if before is None or part.index != before.index:
                whole += self._written()
                self._call = part
            else:
                self._call = CallPart(
                    index=part.index, name=before.name or part.name, arguments=before.arguments + part.arguments
                )
            if len(self._call.arguments) > ARGUMENTS_CHARS_MAX:
                raise PeerFailed(f"the server behind this node sent a call of over {ARGUMENTS_CHARS_MAX} characters")
        return whole + self._written() if chunk.finish else whole

    def _written(self) -> str:
        call, self._call = self._call, None
        if call is None:
            return ""
        self._calls += 1
        if self._calls > CALLS_MAX:
            raise PeerFailed(f"the server behind this node sent over {CALLS_MAX} calls")
        return written(call.name, call.arguments)

    def _joined(self, text: str) -> str:
        """The chunk's text without what of it the client has."""
        if not self._seam or not text:
            return text
        shared = min(len(self._seam), len(text))
        if self._seam[:shared] != text[:shared]:
            raise self._unfitting(text)
        self._seam = self._seam[shared:]
        return text[shared:]

    def _unfitting(self, text: str) -> PeerFailed:
        return PeerFailed(
            f"the rest of the answer does not join what was delivered: {self._seam[:20]!r} was to come, not "
            f"{text[:20]!r}"
        )

    def _new_tokens(self, chunk: Chunk, text: str) -> int:
        room = self._work.sampling.max_tokens - self._delivered - self.counted
        if chunk.completion_tokens is not None:
            new = max(chunk.completion_tokens - self.counted, 0)
        else:
            new = len(chunk.logprobs) or int(bool(chunk.text or chunk.calls or chunk.has_reasoning))
        if text:
            short = -(-(self._chars + len(text)) // TOKEN_CHARS_MAX) - self._delivered - self.counted
            new = max(new, short)
        return max(0, min(new, room))

    def _pieces(self, text: str, tokens: int, chunk: Chunk) -> list[AnswerItem]:
        """The new text with its tokens, and those tokens that are too many for one piece."""
        self.counted += tokens
        self._chars += len(text)
        if self._chars > TOKEN_CHARS_MAX * (self._delivered + self.counted) or len(text) > PROMPT_CHARS_MAX:
            raise PeerFailed(f"the server behind this node sent {self._chars} characters for {self.counted} tokens")
        if chunk.text and not self.has_text and self._work.sampling.logprobs is not None and not chunk.logprobs:
            raise BadRequest("the server of this model gives no logprobs: leave them out", param="logprobs")
        self.has_text = self.has_text or bool(text)
        if len(chunk.logprobs) > LOGPROBS_OF_PIECE_MAX:
            raise PeerFailed(f"the server behind this node sent {len(chunk.logprobs)} logprobs at once")
        first = Piece(
            tokens=(UNKNOWN_TOKEN,) * min(tokens, PIECE_TOKENS_MAX),
            text=text,
            logprobs=chunk.logprobs if self._work.sampling.logprobs is not None else (),
        )
        more = range(tokens - PIECE_TOKENS_MAX, 0, -PIECE_TOKENS_MAX)
        return [first, *(Piece(tokens=(UNKNOWN_TOKEN,) * min(left, PIECE_TOKENS_MAX), text="") for left in more)]
