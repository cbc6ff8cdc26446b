"""`python -m model.pretrain`: trains the embedded default model and its tokenizer from a text, and writes its card.

Rules: the learning rate follows the share of the time budget used, so that a busy machine trains less but always
finishes annealed; a checkpoint is written atomically and `--resume` goes on from it; `--after` starts a new schedule
from the weights of a finished run.
Source: Llama architecture (arXiv 2302.13971); Muon (Jordan 2024) for hidden matrices, AdamW for the embedding and
norms; trapezoidal schedule (arXiv 2405.18392). torch.optim.Muon is not used: it computes in bf16, which took 10 s a
step on a CPU without bf16 instructions, against 0.3 s in fp32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its OpenMP spins at barriers otherwise

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model.corpus import Split, ngram_bits_per_byte, read_text, split_corpus, split_tales, unigram_bits_per_byte

END = "<|end|>"
VOCABULARY = 4096
CONTEXT = 1024
MUON_RATE, ADAM_RATE = 0.02, 0.003  # at the peak
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"
SAMPLE_PROMPTS = ("Once upon a time", "The King said to his youngest daughter,", "In the middle of the dark forest")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Knobs of one training run. Times in minutes, rates per step."""

    minutes: float
    batch_tokens: int
    threads: int
    seed: int
    muon_rate: float
    adam_rate: float
    warmup: float = 0.02
    cooldown: float = 0.45
    long_from: float = 0.8  # share of the budget after which sequences have the full context
    short_context: int = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a training run is, over all its resumptions; `earlier_s` is the time of finished runs before it."""

    elapsed_s: float = 0.0
    seen_tokens: int = 0
    earlier_s: float = 0.0


def train_tokenizer(passages: tuple[str, ...]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text encodes, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((tale for p in passages for tale in split_tales(p)), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(vocabulary: int) -> transformers.LlamaForCausalLM:
    """The default model with random weights: 5.5 M parameters, 11 MB in bf16."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)  # each block starts as the identity
    return model


def encode(tokenizer: transformers.PreTrainedTokenizerFast, passages: tuple[str, ...]) -> torch.Tensor:
    """Tokens of all passages, tale by tale, each tale opened by the end token."""
    tales = [tale for passage in passages for tale in split_tales(passage)]
    tokens: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(tales):
        tokens.append(0)
        tokens.extend(encoding.ids)
    return torch.tensor(tokens, dtype=torch.long)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix update is orthogonalised by five Newton-Schulz steps, matrices of one shape together."""

    def __init__(self, matrices: list[torch.nn.Parameter], *, rate: float, momentum: float, decay: float) -> None:
        super().__init__(matrices, {"lr": rate})
        self._momentum, self._decay = momentum, decay
        self._by_shape: dict[tuple[int, ...], list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self._by_shape.setdefault(tuple(matrix.shape), []).append(matrix)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: we never line-search
        """One update of every matrix from its gradient."""
        rate = self.param_groups[0]["lr"]
        for (rows, columns), matrices in self._by_shape.items():
            update_NRC = torch.stack([self._nesterov(m) for m in matrices])
            update_NRC = _orthogonal(update_NRC) * max(1.0, rows / columns) ** 0.5
            for matrix, update_RC in zip(matrices, update_NRC, strict=True):
                matrix.mul_(1 - rate * self._decay).sub_(update_RC * rate)

    def _nesterov(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        assert matrix.grad is not None
        velocity: torch.Tensor = self.state[matrix].setdefault("velocity", torch.zeros_like(matrix))
        velocity.lerp_(matrix.grad, 1 - self._momentum)
        nesterov: torch.Tensor = matrix.grad.lerp(velocity, self._momentum)
        return nesterov


def _orthogonal(update_NRC: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: quintic Newton-Schulz with Jordan's coefficients."""
    tall = update_NRC.shape[1] > update_NRC.shape[2]
    x = update_NRC.mT if tall else update_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


def rate_at(progress: float, config: TrainConfig) -> float:
    """Share of the peak learning rate at a share of the budget."""
    if progress < config.warmup:
        return (progress + 0.001) / config.warmup
    left = (1 - progress) / config.cooldown
    return max(0.0, min(1.0, left))


@torch.no_grad()
def bits_per_byte(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    passages: tuple[str, ...],
    *,
    chars_max: int | None = None,
) -> float:
    """Held-out bits per byte, in windows of the full context, each predicted from its own start."""
    nats, size, budget = 0.0, 0, chars_max
    was_training = model.training
    model.eval()
    for whole in passages:
        passage = whole if budget is None else whole[:budget]
        budget = None if budget is None else budget - len(passage)
        if not passage:
            break
        ids = [0, *tokenizer.backend_tokenizer.encode(passage).ids]
        size += len(passage.encode())
        for start in range(0, len(ids) - 1, CONTEXT - 1):
            window = torch.tensor([ids[start : start + CONTEXT]])
            logits_TV = model(window[:, :-1], use_cache=False).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits_TV.float(), window[0, 1:], reduction="sum"))
    model.train(was_training)
    return nats / math.log(2) / size


def train(
    model: transformers.LlamaForCausalLM, tokens: torch.Tensor, config: TrainConfig, checkpoint: Path, before: Progress
) -> Progress:
    """Train until the budget is used; `before` is what earlier runs did. Prints one line every 20 steps."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices, rate=config.muon_rate, momentum=0.95, decay=0.05)
    adam = torch.optim.AdamW(rest, lr=config.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(config.seed)
    started, seen, step, smooth = time.monotonic() - before.elapsed_s, before.seen_tokens, 0, 0.0
    saved = time.monotonic()
    order: list[int] = []
    while (progress := (time.monotonic() - started) / 60 / config.minutes) < 1:
        context = CONTEXT if progress > config.long_from else config.short_context
        rows = []
        for _ in range(config.batch_tokens // context):
            if not order:  # a new epoch, cut at a new phase, in a new order
                order = list(range(rng.randrange(context), len(tokens) - CONTEXT - 1, context))
                rng.shuffle(order)
            start = order.pop()
            rows.append(tokens[start : start + context + 1])
        batch = torch.stack(rows)
        logits_BTV = model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, peak in ((muon, config.muon_rate), (adam, config.adam_rate)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate_at(progress, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.shape[0] * context
        step += 1
        smooth = loss.item() if step == 1 else 0.95 * smooth + 0.05 * loss.item()
        if step % 20 == 0:
            used = time.monotonic() - started
            speed = (seen - before.seen_tokens) / max(used - before.elapsed_s, 1e-9)
            print(f"{used:7.0f} s step {step:5d} seen {seen:9d} loss {smooth:.4f} {speed:.0f} tok/s", flush=True)
        if time.monotonic() - saved > 300:
            now = replace(before, elapsed_s=time.monotonic() - started, seen_tokens=seen)
            save_checkpoint(model, checkpoint, now)
            saved = time.monotonic()
    return replace(before, elapsed_s=time.monotonic() - started, seen_tokens=seen)


def save_checkpoint(model: transformers.LlamaForCausalLM, path: Path, progress: Progress) -> None:
    """Write weights in fp32 and the progress, atomically."""
    fresh = path.with_suffix(".tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / "progress.json").write_text(json.dumps(asdict(progress)))
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def load_checkpoint(path: Path) -> tuple[transformers.LlamaForCausalLM, Progress]:
    """What `save_checkpoint` wrote."""
    model = transformers.LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, Progress(**json.loads((path / "progress.json").read_text()))


@torch.no_grad()
def sample(model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, prompt: str) -> str:
    """One seeded sample, as a reader would see it."""
    torch.manual_seed(7)
    ids = torch.tensor([[0, *tokenizer.backend_tokenizer.encode(prompt).ids]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=160, do_sample=True, temperature=0.7, top_p=0.9
    )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def write_card(out: Path, facts: dict[str, object], samples: list[str]) -> None:
    """README.md (for people) and card.json (for programs) beside the weights."""
    (out / "card.json").write_text(json.dumps(facts, indent=2) + "\n")
    about = (
        "A small Llama-architecture language model that ships with the node, so that it answers with no download. "
        "Trained from random weights by `python -m model.pretrain` on twenty-four books of fairy tales in the public "
        "domain. It continues a tale; it follows no instructions and knows no facts."
    )
    lines = ["# The embedded default model", "", about, ""]
    lines += ["| | |", "| --- | --- |"] + [f"| {key} | {value} |" for key, value in facts.items()]
    lines += ["", "Bits per byte are on held-out text: the last book and every 20th 8 KiB block of the others.", ""]
    lines += ["## Samples (temperature 0.7, top-p 0.9, seed 7; not chosen)", ""]
    for text in samples:
        lines += ["> " + text.replace("\n", "\n> "), ""]
    (out / "README.md").write_text("\n".join(lines))


def export(model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, out: Path) -> None:
    """Weights in bf16 safetensors, configuration and tokenizer, as transformers reads them."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Command line: `python -m model.pretrain --text FILE --out DIR --minutes N`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "default")
    parser.add_argument("--work", type=Path, default=Path("/tmp/pretrain"))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--after", type=Path, help="a finished run's directory (its --work/final) to train further")
    parser.add_argument("--peak", type=float, default=1.0, help="share of the usual peak learning rates")
    args = parser.parse_args()
    config = TrainConfig(
        minutes=args.minutes,
        batch_tokens=args.batch_tokens,
        threads=args.threads,
        seed=args.seed,
        muon_rate=MUON_RATE * args.peak,
        adam_rate=ADAM_RATE * args.peak,
    )
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    split: Split = split_corpus(read_text(args.text))
    tokenizer = train_tokenizer(split.train)
    tokens = encode(tokenizer, split.train)
    chars = sum(map(len, split.train))
    print(f"{len(tokens)} training tokens, {chars / len(tokens):.2f} characters a token", flush=True)
    model, before, checkpoint = make_model(len(tokenizer)), Progress(), args.work / "checkpoint"
    if args.resume and checkpoint.exists():
        model, before = load_checkpoint(checkpoint)
    elif args.after is not None:
        model, done = load_checkpoint(args.after)
        before = Progress(seen_tokens=done.seen_tokens, earlier_s=done.earlier_s + done.elapsed_s)
    done = train(model.train(), tokens, config, checkpoint, before)
    save_checkpoint(model, args.work / "final", done)
    model.eval()
    export(model, tokenizer, args.out)
    model.to(torch.float32)  # as it will be served: bf16 weights computed in fp32
    train_bytes, held_bytes = ("\n\n".join(part).encode() for part in (split.train, split.held_out))
    facts: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "training_tokens_seen": done.seen_tokens,
        "epochs": round(done.seen_tokens / len(tokens), 2),
        "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, split.held_out), 4),
        "unigram_bits_per_byte": round(unigram_bits_per_byte(train_bytes, held_bytes), 4),
        "five_gram_bits_per_byte": round(ngram_bits_per_byte(train_bytes, held_bytes, order=5), 4),
        "data": "fairy_tales.txt (25 books, public domain), 24 books less every 20th 8 KiB block",
        "date": time.strftime("%Y-%m-%d"),
        "minutes": round((done.earlier_s + done.elapsed_s) / 60, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores shared with other work",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    write_card(args.out, facts, [sample(model, tokenizer, prompt) for prompt in SAMPLE_PROMPTS])
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
