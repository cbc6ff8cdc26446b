"""The house itself: floors, doors, circles, cores without waiting or chance, sizes (docs/STYLE.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS: dict[str, set[str]] = {
    "crypto": set(),
    "p2p": {"crypto"},
    "model": {"crypto"},
    "gossip": {"crypto", "p2p"},
    "node": {"crypto", "p2p", "model", "gossip"},
    "bench": {"crypto", "p2p", "model", "gossip", "node"},
}
PACKAGES = ("crypto", "p2p", "model", "gossip", "node")
# foreign module -> where alone it may be imported
DOORS: dict[str, tuple[str, ...]] = {
    "libp2p": ("p2p/host.py", "p2p/guard", "bench/pipe_end.py", "bench/flood_end.py"),  # a rival, an attacker
    "torch": ("model/", "bench/"),
    "transformers": ("model/", "bench/"),
    "tokenizers": ("model/",),
    "starlette": ("node/web/",),
    "hypercorn": ("node/web/",),
    "peft": ("model/adapters.py",),
    "llvmlite": ("model/native",),  # native.py, and the files that write kernels
    "opacus": ("model/budget.py",),
    "sqlite3": ("node/store",),  # store.py and the files beside it that work on its connection
    "msgpack": ("crypto/canonical.py",),
    "zeroconf": ("p2p/mdns.py",),
    "prometheus_client": ("node/metrics.py",),
    "httpx": ("node/upstream_http.py", "node/commands/", "bench/"),
    "pydantic": ("node/web/schema", "node/config.py"),
    "coincurve": ("crypto/wallet.py",),
    "Crypto": ("crypto/wallet.py",),
    "typer": ("node/__main__.py", "node/commands/"),
}
NOWHERE = {"asyncio", "multiprocessing", "pickle", "yaml", "msgpack_numpy", "cloudpickle", "dill", "marshal", "shelve"}
CORES = (
    "crypto/canonical.py",
    "crypto/envelope.py",
    "crypto/digest.py",
    "crypto/sealing.py",
    "crypto/sealing_keys.py",
    "p2p/frame.py",
    "p2p/rpc.py",
    "p2p/book.py",
    "p2p/book_saved.py",
    "p2p/transport.py",
    "gossip/messages.py",
    "gossip/directory.py",
    "gossip/offer.py",
    "gossip/view.py",
    "gossip/flow.py",
    "gossip/finding.py",
    "gossip/standing.py",
    "gossip/routing.py",
    "gossip/observations.py",
    "gossip/breaker.py",
    "gossip/pace.py",
    "gossip/hearing.py",
    "gossip/summaries.py",
    "gossip/claims.py",
    "gossip/claims_hearing.py",
    "gossip/transfer.py",
    "gossip/rounds.py",
    "gossip/electors.py",
    "gossip/ballots.py",
    "gossip/agreement.py",
    "gossip/gathering.py",
    "gossip/round_effects.py",
    "gossip/round_state.py",
    "gossip/averaging.py",
    "gossip/blob_wire.py",
    "gossip/donors.py",
    "p2p/allowance.py",
    "p2p/admission.py",
    "p2p/roster.py",
    "p2p/neighbours.py",
    "p2p/hello.py",
    "p2p/address.py",
    "p2p/direct_frames.py",
    "model/blocks.py",
    "model/scheduler.py",
    "model/fair_share.py",
    "model/chunk_pace.py",
    "model/step.py",
    "model/lengths.py",
    "model/padding.py",
    "model/requests.py",
    "model/config.py",
    "model/settings.py",
    "model/jobs.py",
    "model/text.py",
    "model/histogram.py",
    "model/timings.py",
    "model/call_format.py",
    "model/batches.py",
    "model/layout.py",
    "model/delta.py",
    "model/bfloat16.py",
    "model/elias_fano.py",
    "model/sparse.py",
    "model/blockwise.py",
    "model/plain.py",
    "model/codecs.py",
    "model/update.py",
    "model/feedback.py",
    "model/held.py",
    "model/gate.py",
    "model/scores.py",
    "model/evidence.py",
    "model/rules.py",
    "model/merge.py",
    "p2p/peering_status.py",
    "p2p/reach.py",
    "p2p/relay.py",
    "p2p/relay_places.py",
    "node/events.py",
    "node/chain.py",
    "node/retention.py",
    "node/averages.py",
    "node/consciousness.py",
    "node/consciousness_fields.py",
    "node/facts.py",
    "node/self_probes.py",
    "node/memory.py",
    "node/memory_events.py",
    "node/prediction.py",
    "node/self_summary.py",
    "node/self_report.py",
    "node/self_period.py",
    "node/request_ended.py",
    "node/training_merges.py",
    "node/training_round.py",
    "node/work.py",
    "node/loading.py",
    "node/tools.py",
    "node/tool_calls.py",
    "node/requester.py",
    "node/api_keys.py",
    "node/web/caller.py",
    "node/web/meter.py",
    "node/web/signed.py",
    "node/web/wallets.py",
    "crypto/wallet.py",
    "node/recent.py",
    "node/room.py",
    "node/sealed.py",
    "node/cache.py",
    "node/kept_answers.py",
    "node/embed_queue.py",
    "node/embedding.py",
    "node/engine_words.py",
    "node/pursuit.py",
    "node/judge.py",
    "node/upstream_stream.py",
    "node/upstream_dialect.py",
    "node/upstream_telling.py",
    "node/upstream_facts.py",
    "node/upstream_health.py",
    "node/log_pace.py",
    "node/app_config.py",
    "node/metrics.py",
    "node/metric.py",
    "node/metrics_serving.py",
    "node/metrics_network.py",
    "node/tallies.py",
    "node/lineage.py",
    "node/peer_tallies.py",
    "node/front.py",
    "node/training_plan.py",
    "node/training_choice.py",
    "node/training_pause.py",
    "node/training_away.py",
    "node/foresight.py",
    "node/expectations.py",
    "node/remembered.py",
    "node/web/writer.py",
    "node/web/messages_writer.py",
    "node/web/responses_writer.py",
    "node/web/schema_parts.py",
    "node/web/schema_called.py",
    "node/web/schema_anthropic.py",
    "node/web/schema_responses.py",
    "node/web/schema_sealed.py",
    "node/web/schema_itself.py",
    "node/web/schema_shown.py",
    "node/web/schema_ollama.py",
)
WAITING = {"trio", "socket", "time", "threading", "select", "subprocess", "os", "queue", "sched", "datetime"}
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
PARAMETERS_MAX = 6
ATTRIBUTES_MAX = 15
# a command's signature is the declaration of its flags
FLAGS_ARE_PARAMETERS = ("node/__main__.py", "node/commands/")


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module a file imports, in full, anywhere in it, TYPE_CHECKING included."""
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"relative import at line {item.lineno}"
            yield item.module or ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for item in ast.walk(tree):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            yield item


every_source = pytest.mark.parametrize("path", sources(*FLOORS), ids=name_of)


def floor_faults(package: str, modules: Iterator[str]) -> list[str]:
    return [
        module
        for module in modules
        if (top := module.split(".")[0]) in FLOORS and top != package and top not in FLOORS[package]
    ]


def door_faults(name: str, modules: Iterator[str]) -> list[str]:
    faults = []
    for module in modules:
        top = module.split(".")[0]
        if top in NOWHERE or (top in DOORS and not name.startswith(DOORS[top])):
            faults.append(module)
    return faults


@every_source
def test_arrows_point_down(path: Path) -> None:
    assert floor_faults(name_of(path).split("/")[0], imports(tree_of(path))) == []


@every_source
def test_doors_are_kept(path: Path) -> None:
    assert door_faults(name_of(path), imports(tree_of(path))) == []


def test_the_checks_can_fail() -> None:
    bad = ast.parse("import torch\nfrom node.work import Piece\nimport pickle\nimport libp2p.host")
    assert floor_faults("gossip", imports(bad)) == ["node.work"]
    assert door_faults("gossip/messages.py", imports(bad)) == ["torch", "pickle", "libp2p.host"]
    assert door_faults("p2p/guard_mux.py", imports(ast.parse("import libp2p"))) == []


def test_no_import_circles() -> None:
    graph = {
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): {
            module for module in imports(tree_of(path)) if module.split(".")[0] in PACKAGES
        }
        for path in sources(*PACKAGES)
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join((*trail, module))}"
        if module in done:
            return
        for below in graph.get(module, ()):
            visit(below, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("name", CORES)
def test_cores_neither_wait_nor_guess(name: str) -> None:
    path = ROOT / name
    assert path.exists(), f"{name} is listed as a core and is not there"
    tree = tree_of(path)
    modules = {module.split(".")[0] for module in imports(tree)}
    assert modules & WAITING == set()
    for item in ast.walk(tree):
        assert not isinstance(item, ast.Await | ast.AsyncFor | ast.AsyncWith) or name in (
            "p2p/transport.py",
            "node/front.py",
        ), f"{name}:{item.lineno} waits"
        # chance comes in as an argument: random.Random as a type is fine, calls of the module are not
        if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute):
            owner = item.func.value
            assert not (isinstance(owner, ast.Name) and owner.id in ("random", "secrets", "uuid")), (
                f"{name}:{item.lineno} draws its own chance"
            )


@every_source
def test_sizes(path: Path) -> None:
    name, tree = name_of(path), tree_of(path)
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX, f"{name} is over {FILE_LINES_MAX} lines"
    for function in functions(tree):
        assert function.end_lineno is not None
        length = function.end_lineno - function.lineno + 1
        if not name.startswith(FLAGS_ARE_PARAMETERS):
            assert length <= FUNCTION_LINES_MAX, f"{name}: {function.name} has {length} lines"
            arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
            counted = [a for a in arguments if a not in ("self", "cls", "task_status")]
            assert len(counted) <= PARAMETERS_MAX, f"{name}: {function.name} takes {len(counted)} parameters"
    for item in ast.walk(tree):
        if isinstance(item, ast.ClassDef):
            attributes = {
                target.attr
                for inner in ast.walk(item)
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
                for target in (inner,)
                if isinstance(inner.value, ast.Name) and inner.value.id == "self"
            }
            assert len(attributes) <= ATTRIBUTES_MAX, f"{name}: {item.name} has {len(attributes)} attributes"


@every_source
def test_files_open_with_what_they_own(path: Path) -> None:
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_only_the_guards_catch_everything(path: Path) -> None:
    """`except Exception` stands in the guards around peers' handlers only; Cancelled is never caught."""
    allowed = ("p2p/guard", "p2p/calls.py", "p2p/loopback.py")
    for item in ast.walk(tree_of(path)):
        if isinstance(item, ast.ExceptHandler):
            kinds = ast.unparse(item.type) if item.type else "everything"
            assert "BaseException" not in kinds, f"{name_of(path)}:{item.lineno}"
            assert "Cancelled" not in kinds, f"{name_of(path)}:{item.lineno}"
            if kinds in ("Exception", "everything"):
                assert name_of(path).startswith(allowed), f"{name_of(path)}:{item.lineno} catches {kinds}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_the_environment_is_read_in_one_file(path: Path) -> None:
    if name_of(path) == "node/config.py" or name_of(path).startswith("model/"):
        return  # model/ sets OMP_WAIT_POLICY before torch is imported
    assert "os.environ" not in path.read_text()
    assert "getenv" not in path.read_text()


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_what_must_last_is_written_in_one_file(path: Path) -> None:
    """Flushes, renames and whole files: pretraining and the demo's clusters keep nothing of a node's own."""
    if name_of(path) in ("crypto/disk.py", "model/pretrain.py", "node/commands/processes.py"):
        return
    text = path.read_text()
    for word in ("os.replace(", "os.rename(", "os.link(", "fsync(", ".write_text(", ".write_bytes(", '.open("w', "'w'"):
        assert word not in text, f"{name_of(path)} writes a file by itself: {word}"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=name_of)
def test_nothing_unpickles(path: Path) -> None:
    text = path.read_text()
    assert "torch.load(" not in text
    assert "trust_remote_code=True" not in text
    assert "ext_hook" not in text or name_of(path) == "crypto/canonical.py"


def test_no_catch_all_rooms() -> None:
    stems = {path.stem for path in sources(*PACKAGES)}
    assert stems & {"utils", "util", "common", "types", "base", "abc", "helpers", "misc"} == set()


def test_init_files_hold_a_docstring_only() -> None:
    for path in sources(*PACKAGES):
        if path.name == "__init__.py":
            assert len(tree_of(path).body) == 1, name_of(path)
