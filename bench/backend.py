"""`python -m bench.backend PYTHON`: one user's answer from a llama.cpp server, asked directly and through a node.

Rules: PYTHON is that of an environment with 'llama-cpp-python[server]' and gguf (bench/serving_rivals.py says how to
make one). The model has the layers of the 60M Llama and a vocabulary of letters; the server has one thread. The same
streamed completion is asked of the server and of the node before it, turn by turn; a figure is the median of the turns.
Source: MEASURE.md (serving); the issue's "1x at batch 1 through a llama.cpp back end".
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import httpx

from bench.harness import ANEW, Options, Row, report
from node.commands.processes import Cluster

SHAPE: Final = ("512", "8", "8", "1376")
MODEL: Final = Path(__file__).parent.parent / "tests" / "real" / "tiny_gguf.py"
PROMPT: Final = "once upon a time in a land far away " * 2
TOKENS: Final = 128
START_S: Final = 120.0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    turns = 5 if chosen.quick else 20
    with tempfile.TemporaryDirectory() as place, Cluster(Path(place)) as cluster:
        with server(chosen.python, Path(place)) as url:
            node = cluster.start("node", "--backend", f"openai:{url}").wait_ready(START_S)
            with httpx.Client(timeout=START_S, trust_env=False) as client:
                taken: dict[str, list[tuple[float, float]]] = {url: [], node.url: []}
                for turn in range(turns + 1):
                    for each, times in taken.items():
                        found = asked(client, each)
                        if turn:  # the first warms up
                            times.append(found)
    direct, through = (
        (statistics.median(first for first, _ in times), statistics.median(whole for _, whole in times))
        for times in (taken[url], taken[node.url])
    )
    rows = [
        Row(figure="backend_b1_tok_per_s", value=TOKENS / through[1], unit="tok/s", better="higher",
            rival="llama-cpp-python itself", rival_value=TOKENS / direct[1]),
        Row(figure="backend_b1_ratio", value=direct[1] / through[1], unit="times", better="higher"),
        Row(figure="backend_first_token_added_ms", value=1000 * (through[0] - direct[0]), unit="ms", better="lower"),
    ]  # fmt: skip
    report("backend", rows, Options(quick=chosen.quick, json_path=chosen.json))


@contextmanager
def server(python: str, place: Path) -> Iterator[str]:
    """A llama.cpp server; its address."""
    model = place / "llama.gguf"
    subprocess.run([python, str(MODEL), str(model), "1", *SHAPE], check=True)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    more = ["--n_ctx", "2048", "--n_threads", "1", "--model_alias", "letters"]
    with (place / "llama.log").open("wb") as log:
        command = [python, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1", "--port", port]
        process = subprocess.Popen([*command, *more], stdout=log, stderr=log)
    try:
        wait_there(url, process)
        yield url
    finally:
        process.kill()
        process.wait()


def wait_there(url: str, process: subprocess.Popen[bytes]) -> None:
    """Until it answers. Raises RuntimeError."""
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            if httpx.get(f"{url}/v1/models", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"the llama.cpp server does not answer at {url}; its exit status is {process.poll()}")


def asked(client: httpx.Client, url: str) -> tuple[float, float]:
    """Seconds to the first piece of text and to the last. Raises RuntimeError for an answer that is cut short."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    began, first, pieces = time.perf_counter(), 0.0, 0
    with client.stream("POST", f"{url}/v1/completions", json=body, headers=ANEW) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url} answered {response.status_code}: {response.read()[:300]!r}")
        for line in response.iter_lines():
            if line.startswith("data: {") and '"text"' in line and '"text":""' not in line.replace(": ", ":"):
                first = first or time.perf_counter() - began
                pieces += 1
    if pieces < TOKENS // 2:
        raise RuntimeError(f"{url} gave {pieces} pieces of text, {TOKENS} tokens were asked for")
    return first, time.perf_counter() - began


if __name__ == "__main__":
    main()
