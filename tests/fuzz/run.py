"""Fuzz one decoder for a while with atheris: `python -m tests.fuzz.run TARGET --seconds N`; without a target, name all.

atheris is not among the node's packages. In a virtual environment that sees the others:

    python -m venv /tmp/atheris-venv
    echo "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > \\
        /tmp/atheris-venv/lib/python3.*/site-packages/node.pth
    /tmp/atheris-venv/bin/pip install --no-deps atheris==3.0.0
    /tmp/atheris-venv/bin/python -m tests.fuzz.run canonical --seconds 300

Exit code 0: nothing found. A finding is printed with its traceback and its input is kept as `crash-DIGEST`,
`timeout-DIGEST` or `oom-DIGEST` in the folder named by --keep.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

INPUT_BYTES_MAX = 8_192  # what is larger meets the decoders in tests/test_fuzz_decoders.py
INPUT_S_MAX = 10  # a busy machine's hang guard
MEMORY_MIB_MAX = 1_500  # of the whole process, which starts with 200
OURS = ["crypto", "p2p", "gossip", "model", "node", "msgpack", "jinja2"]


def main() -> None:
    """Parse the command line and fuzz; atheris ends the process."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed here: the docstring of tests/fuzz/run.py says how")
    with atheris.instrument_imports(include=OURS):
        from tests.fuzz.decoders import TARGETS
    if arguments.target not in TARGETS:
        sys.exit("name one of: " + " ".join(TARGETS))
    target = TARGETS[arguments.target]()

    def mutated(raw: bytes, bytes_max: int, seed: int) -> bytes:
        """Now and then a damaged right value, which byte damage alone seldom makes."""
        if seed % 4 == 0:
            return target.input(random.Random(seed))[:bytes_max]
        return bytes(atheris.Mutate(raw, bytes_max))

    arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="corpus-") as corpus:
        for number, raw in enumerate(target.corpus):
            (Path(corpus) / str(number)).write_bytes(raw)
        options = [
            f"-max_total_time={arguments.seconds}",
            f"-timeout={INPUT_S_MAX}",
            f"-rss_limit_mb={MEMORY_MIB_MAX}",
            f"-max_len={INPUT_BYTES_MAX}",
            f"-artifact_prefix={arguments.keep}/{arguments.target}-",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, corpus], target.meet, custom_mutator=mutated)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
