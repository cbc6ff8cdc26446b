"""`python -m tests.codec_bits`: SHA-256 of all that the codecs make, for one setting of the processor's instructions.

Rules: run in a process of its own, since torch and numpy choose their instructions when they are imported. Prints one
JSON object; what test_delta.py compares between settings is under "digests".
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from model.codecs import CODECS, decode, encode
from model.delta import CHUNK, SLICE, Codec
from model.feedback import Feedback
from tests.vectors import vector

N = SLICE + CHUNK + 65


def main() -> None:
    """Print the digests, with one thread and with two."""
    digests = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for codec in CODECS.values():
            digests[f"{codec.name}, {threads} threads"] = digest_of(codec)
    level = np.lib.introspect.opt_func_info(func_name="^add$", signature="float32")
    numpy_uses = sorted({each["current"] for each in level["add"].values()})
    print(json.dumps({"torch": torch.backends.cpu.get_cpu_capability(), "numpy": numpy_uses, "digests": digests}))


def digest_of(codec: Codec) -> str:
    """Of sections, values, places, and what is left unsent after two rounds and a rejection."""
    content = hashlib.sha256()
    for kind in ("heavy", "ties", "wide"):
        feedback = Feedback(N)
        for turn in range(2):
            feedback.add(vector(kind, N, turn))
            sections = encode(feedback.unsent_N, codec)
            for part in (sections.idx, sections.val, sections.scale):
                content.update(part)
            delta = decode(sections, codec, N)
            for made in (delta.dense(0, N), delta.sent(0, N)):
                content.update(made.numpy().tobytes())
            feedback.take(delta)
        feedback.give_back(delta)
        content.update(feedback.unsent_N.numpy().tobytes())
    return content.hexdigest()


if __name__ == "__main__":
    main()
