"""`python -m bench.learning`: what each way of training together reaches at equal tokens, and what it uploads.

Rules: 8 workers in one process, each with books of its own (non-identical data), a byte model of 1M parameters, one
start, inner optimiser, rows and number of tokens for every scheme. Workers are the node's own Trainer; deltas go
through the node's own codecs, error feedback, merging rules and outer step; bytes are those of whole updates as they
are sent (model/update.py). The loss is on text that no worker has: the last book and every 20th 8 KiB of the others.
`alone` is the mean over the workers. Differences under 0.02 nats are noise.
`--quick`: a tenth of the tokens and four schemes.
Source: TRAINING.md 1; SparseLoCo (arXiv 2508.15706); DiLoCo (arXiv 2311.08105).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from bench.harness import Options, Row, report
from crypto.digest import digest
from model.batches import Batches
from model.codecs import codec_named, decode, encode
from model.config import TrainConfig
from model.corpus import BOOK_BREAK, read_text, split_corpus
from model.data import finish, text_of
from model.delta import Codec, Delta
from model.evaluate import held_out_loss
from model.feedback import Feedback
from model.merge import Contribution, OuterStep, merge
from model.rules import Rule
from model.train import Trainer
from model.update import Expected, write_update

ROOT = Path(__file__).parent.parent
TEXT = ROOT.parent / "shared" / "data" / "fairy_tales.txt.xz"
SEED = 1
DENSE_CODEC = "fp32"
HELD_OUT_ROWS = 256
INNER = {"rate": 3e-3, "warmup_steps": 20, "weight_decay": 0.1, "autocast": "off"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large a run is: tokens in all are workers x steps x rows x context."""

    workers: int = 8
    steps: int = 300
    rows: int = 2
    context: int = 128
    width: int = 128
    layers: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Rounds of `every` steps, whose deltas are merged by `rule` and applied at outer_rate; every 0: no rounds."""

    name: str
    every: int
    codec: str = DENSE_CODEC
    rule: Rule = Rule.MEAN
    outer_rate: float = 1.0
    momentum: float = 0.0


ALONE = Scheme(name="alone", every=0)
DILOCO = Scheme(name="diloco_h20", every=20, outer_rate=0.7, momentum=0.9)
SPARSE_256 = Scheme(name="sparse_k256_h5", every=5, codec="ef256.2b", rule=Rule.MEAN_NONZERO, outer_rate=0.5)
SCHEMES = (
    ALONE,
    Scheme(name="dense_h5", every=5),
    Scheme(name="dense_h20", every=20),
    DILOCO,
    SPARSE_256,
    Scheme(name="sparse_k64_h5", every=5, codec="ef64.2b", rule=Rule.MEAN_NONZERO),
    Scheme(name="sparse_k64_h20", every=20, codec="ef64.2b", rule=Rule.MEAN_NONZERO),
)
QUICK = (ALONE, DILOCO, SPARSE_256)
SYNCHRONOUS = "synchronous"  # one step of all is the step of one worker with the batches of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """Each worker's rows, and ids_BT that nobody trains on."""

    workers: tuple[Batches, ...]
    held_out: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """nats a token, held out; bytes that one worker uploads in the whole run; CPU seconds of the simulation."""

    loss: float
    uploaded_bytes: int
    cpu_s: float


class Together(Batches):
    """All workers' rows as those of one: its micro-batches are theirs in turn."""

    def __init__(self, workers: tuple[Batches, ...]) -> None:
        first = workers[0]
        super().__init__(first.text, context=first.context, rows=first.rows)
        self._workers = workers

    def batch(self, seed: int, step: int) -> torch.Tensor:
        """ids_BT of worker step % R; each keeps the order that it has by itself."""
        step, worker = divmod(step, len(self._workers))
        return self._workers[worker].batch(seed + worker, step)


def shards_of(text: str, scale: Scale) -> Shards:
    """Books dealt out to workers in turn; a text of too few books is cut into equal ones."""
    books = [book for book in text.split(BOOK_BREAK) if book.strip()]
    if len(books) <= scale.workers:
        size = len(text) // (scale.workers + 1)
        books = [text[begin : begin + size] for begin in range(0, size * (scale.workers + 1), size)]
    *given, last = books
    shares = [
        "".join(split_corpus(BOOK_BREAK.join((*given[worker :: scale.workers], last))).train)
        for worker in range(scale.workers)
    ]
    held_out = "".join(split_corpus(BOOK_BREAK.join(books)).held_out)
    ids_N = _bytes(held_out)
    length = scale.context + 1
    count = min(HELD_OUT_ROWS, len(ids_N) // length)
    starts = [place * (len(ids_N) // length) // count * length for place in range(count)]
    rows = torch.stack([ids_N[begin : begin + length].to(torch.int64) for begin in starts])
    return Shards(workers=tuple(_batches(share, scale) for share in shares), held_out=rows)


def run(scheme: Scheme, shards: Shards, scale: Scale) -> Outcome:
    """One scheme from the common start to its last round."""
    began = time.process_time()
    trainers = [
        Trainer(byte_model(scale), batches, TrainConfig(seed=SEED + worker, **INNER))  # type: ignore[arg-type]  # fits
        for worker, batches in enumerate(shards.workers)
    ]
    uploaded = 0
    if scheme.every:
        for sent_bytes in rounds(scheme, trainers, scale.steps // scheme.every):
            uploaded += sent_bytes
        losses = [loss_of(trainers[0], shards)]  # all hold the same weights after a round
    else:
        for trainer in trainers:
            steps(trainer, scale.steps)
        losses = [loss_of(trainer, shards) for trainer in trainers]
    return Outcome(loss=sum(losses) / len(losses), uploaded_bytes=uploaded, cpu_s=time.process_time() - began)


def rounds(scheme: Scheme, trainers: list[Trainer], count: int) -> Iterator[int]:
    """Bytes of one worker's update, round by round."""
    codec, layout = codec_named(scheme.codec), trainers[0].layout
    feedbacks = [Feedback(layout.size) if codec.name.startswith("ef") else None for _ in trainers]
    outer = OuterStep(scheme.outer_rate, scheme.momentum)
    theta_N = trainers[0].start_vector_N.clone()
    for number in range(count):
        deltas = list[Delta]()
        sent_bytes = 0
        for trainer, feedback in zip(trainers, feedbacks, strict=True):
            tokens = steps(trainer, scheme.every)
            delta, sent_bytes = _sent(trainer, feedback, _expected(trainer, codec, number), tokens)
            deltas.append(delta)
        outer.step_(theta_N, merge([Contribution(delta=delta) for delta in deltas], scheme.rule).update)
        for trainer in trainers:
            trainer.rebase(theta_N)
        yield sent_bytes


def synchronous(shards: Shards, scale: Scale) -> Outcome:
    """Every worker sends its gradient each step, fp32: no way of training together learns more from as many tokens."""
    began = time.process_time()
    config = TrainConfig(seed=SEED, accumulation=scale.workers, **INNER)  # type: ignore[arg-type]  # fits
    trainer = Trainer(byte_model(scale), Together(shards.workers), config)
    tokens = steps(trainer, scale.steps * scale.workers)
    codec = codec_named(DENSE_CODEC)
    sections = encode(trainer.delta(), codec)  # a gradient is as large
    update = write_update(_expected(trainer, codec, 0), sections, steps=1, tokens=tokens)
    return Outcome(
        loss=loss_of(trainer, shards),
        uploaded_bytes=len(update) * scale.steps,
        cpu_s=time.process_time() - began,
    )


def byte_model(scale: Scale) -> transformers.LlamaForCausalLM:
    """The common start: equal weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=256,
                hidden_size=scale.width,
                intermediate_size=scale.width * 11 // 4,
                num_hidden_layers=scale.layers,
                num_attention_heads=4,
                max_position_embeddings=scale.context,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=None,
            )
        )


def rows_of(outcomes: dict[str, Outcome]) -> list[Row]:
    """Loss and bytes of each scheme, DiLoCo's beside them."""
    rival = outcomes[DILOCO.name]
    rows = list[Row]()
    for name, outcome in outcomes.items():
        beside = None if name == DILOCO.name else "DiLoCo"
        rows.append(
            Row(
                figure=f"loss_{name}",
                value=outcome.loss,
                unit="nats a byte, held out",
                better="lower",
                rival=beside,
                rival_value=rival.loss if beside else None,
            )
        )
        rows.append(
            Row(
                figure=f"bytes_{name}",
                value=outcome.uploaded_bytes,
                unit="B uploaded a worker",
                better="lower",
                rival=beside,
                rival_value=rival.uploaded_bytes if beside else None,
            )
        )
    return rows


def main() -> int:
    """Run every scheme, report."""
    chosen = _arguments()
    if not chosen.text.is_file():
        print(f"there is no text at {chosen.text}; give one: python -m bench.learning --text FILE", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    scale = Scale(steps=40) if chosen.quick else Scale()
    shards = shards_of(read_text(chosen.text), scale)
    outcomes = dict[str, Outcome]()
    for scheme in (None, *(QUICK if chosen.quick else SCHEMES)):
        name = SYNCHRONOUS if scheme is None else scheme.name
        outcome = synchronous(shards, scale) if scheme is None else run(scheme, shards, scale)
        outcomes[name] = outcome
        sent_mb = outcome.uploaded_bytes / 1e6
        print(f"{name}: {outcome.loss:.3f} nats, {sent_mb:.3f} MB, {outcome.cpu_s:.0f} s CPU", flush=True)
    report("learning", rows_of(outcomes), Options(quick=chosen.quick, json_path=chosen.json))
    return 0


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _batches(share: str, scale: Scale) -> Batches:
    ids_N = _bytes(share).to(torch.int32)
    return Batches(text_of(ids_N, text_bytes=len(ids_N), documents=1), context=scale.context, rows=scale.rows)


def steps(trainer: Trainer, micro_steps: int) -> int:
    """Tokens that were trained on."""
    return sum(trainer.micro_step().tokens for _ in range(micro_steps))


def loss_of(trainer: Trainer, shards: Shards) -> float:
    """nats a byte of the trainer's weights on what nobody trains on."""
    return finish(held_out_loss(trainer.model, shards.held_out)).nats_per_token


def _sent(trainer: Trainer, feedback: Feedback | None, expected: Expected, tokens: int) -> tuple[Delta, int]:
    """What the others decode of a worker's round, and the bytes of its update."""
    if feedback is None:
        sections = encode(trainer.delta(), expected.codec)
    else:
        feedback.add(trainer.delta())
        sections = feedback.encode(expected.codec)
    sent = decode(sections, expected.codec, expected.n)
    if feedback is not None:
        feedback.take(sent)
    return sent, len(write_update(expected, sections, steps=1, tokens=tokens))


def _expected(trainer: Trainer, codec: Codec, number: int) -> Expected:
    layout, run_id = trainer.layout, digest(b"bench.learning")
    return Expected(
        run=run_id, round=number, base=run_id, peer="worker", layout=layout.digest, n=layout.size, codec=codec
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, four schemes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--text", type=Path, metavar="FILE", default=TEXT, help="UTF-8, plain or .xz, books by two "
                        "blank lines")  # fmt: skip
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
