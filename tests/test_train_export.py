"""`train export`: what is written, that it loads as a model with the numbers that are served, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trio
import typer
from msgspec import structs
from typer.testing import CliRunner, Result

from crypto.digest import Digest
from gossip.round_store import RECORDS, read_records
from model.adapters import AdapterConfig, add_adapters, merged, trainable
from model.codecs import codec_named
from model.errors import BadModel, BadState
from model.export import trained, write_adapters, write_model
from model.layout import layout_of
from model.load import Loaded, load, resolve
from model.packing import packed, trial
from model.participant import Course, state_of
from model.requests import GenerationRequest, SamplingParameters
from model.rules import Rule
from model.runtime import Runtime
from node.commands.train import train
from node.training_kept import FILE, states_in
from node.training_plan import plan_of
from tests.tiny_models import CONTEXT, byte_tokenizer, causal_config, save_causal
from tests.training_world import Trainee, until, world

app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(train, name="train")
RUN = Digest(b"r" * 32)


def cli(*words: object) -> Result:
    return CliRunner().invoke(app, ["train", "export", *map(str, words)])


def moved(loaded: Loaded, adapters: AdapterConfig | None = None, *, momentum: float = 0.0) -> tuple[bytes, Digest]:
    """The state of a run that has learnt something, and its layout."""
    model = load(loaded.found, device="cpu", dtype="float32").model
    if adapters is not None:
        add_adapters(model, adapters, RUN)
    named = dict(model.named_parameters()) if adapters is None else dict(trainable(model))
    layout = layout_of(named)
    theta_N = layout.flatten(named) + 0.01 * torch.randn(layout.size, generator=torch.Generator().manual_seed(3))
    course = Course(run=RUN, codec=codec_named("fp32"), rule=Rule.MEAN, momentum=momentum)
    return bytes(state_of(theta_N, None, course)), layout.digest


def tied(path: Path) -> Any:
    config = causal_config("llama", 320)
    config.tie_word_embeddings = True
    tokenizer = byte_tokenizer()
    config.vocab_size = len(tokenizer)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2", "mamba", "tied"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_is_written_has_the_same_numbers_when_it_is_loaded(tmp_path: Path, kind: str, momentum: float) -> None:
    base = tmp_path / "base"
    tied(base) if kind == "tied" else save_causal(base, kind)
    loaded = load(resolve(str(base)), device="cpu", dtype="float32")
    state, layout = moved(loaded, momentum=momentum)
    what = trained(loaded, state, layout, None)
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out", what)
    again = load(resolve(str(tmp_path / "out")), device="cpu")
    assert again.facts.dtype == "float32"
    named = dict(again.model.named_parameters())
    assert set(what.named) == set(named)
    assert all(torch.equal(named[name], value) for name, value in what.named.items())
    before = dict(load(loaded.found).model.named_parameters())
    assert not any(torch.equal(named[name], value) for name, value in before.items())
    assert again.facts.context_tokens == CONTEXT
    assert again.tokens.render([("user", "hello")]) == loaded.tokens.render([("user", "hello")])
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, named[name]) for name, value in other.named_parameters())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_adapters_are_merged_or_written_for_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    save_causal(tmp_path / "base")
    config = AdapterConfig(rank=2, alpha=4)
    loaded = load(resolve(str(tmp_path / "base")), device="cpu", dtype="float32")
    state, layout = moved(loaded, config)
    what = trained(loaded, state, layout, (config, RUN))
    for name in ("whole", "alone"):
        (tmp_path / name).mkdir()
    write_adapters(tmp_path / "alone", what, "tiny")
    write_model(tmp_path / "whole", what)
    whole = load(resolve(str(tmp_path / "whole")), device="cpu").model
    wanted = merged(what.model, what.named)
    assert len(wanted) == 14
    assert all(torch.equal(dict(whole.named_parameters())[name], value) for name, value in wanted.items())
    over = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "alone"
    )
    held = {name.replace(".default.", ".run."): value for name, value in over.named_parameters() if "lora" in name}
    assert len(held) == len(what.named) == 28
    assert all(torch.equal(held[f"base_model.model.{name}"], value) for name, value in what.named.items())
    ids = torch.arange(12).view(1, 12)
    assert torch.allclose(over(ids).logits, whole(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("harm", "error", "why"),
    [
        (lambda state: state[:-4], BadState, "bytes, wanted"),
        (lambda state: state[:-4] + b"\xff\xff\xff\x7f", BadState, "not finite"),
    ],
    ids=["short", "nan"],
)
def test_a_damaged_state_is_no_model(
    tmp_path: Path, harm: Callable[[bytes], bytes], error: type[Exception], why: str
) -> None:
    save_causal(tmp_path / "base")
    loaded = load(resolve(str(tmp_path / "base")))
    state, layout = moved(loaded)
    with pytest.raises(error, match=why):
        trained(loaded, harm(state), layout, None)
    with pytest.raises(BadModel, match="trains other tensors"):
        trained(loaded, state, Digest(bytes(32)), None)


# --- of a node that trains ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_causal(path)
    return path


async def stopped(one: Trainee) -> dict[str, Any]:
    """As it stands when no round can be under way."""
    await one.training.pause(is_paused=True)
    await until(lambda: one.status["state"] == "paused" and one.revision == one.status["revision"])
    return one.status


def complete(runtime: Runtime, prompt: str) -> tuple[int, ...]:
    runtime.add(
        GenerationRequest(
            request_id="1", prompt=runtime.encode(prompt), sampling=SamplingParameters(max_tokens=8, temperature=0.0)
        )
    )
    tokens: list[int] = []
    while runtime.has_work:
        for output in runtime.step():
            assert output.error is None
            tokens += output.tokens
    return tuple(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 2])
async def test_the_folder_answers_as_the_node_does(tmp_path: Path, model: Path, lora_rank: int | None) -> None:
    """While the node runs, after it has left the run, and while it does not run: the same bits."""
    if lora_rank:
        pytest.importorskip("peft", reason="pip install -e '.[adapters]'")
    async with world(tmp_path, model) as all_of_them:
        one = await all_of_them.start(0)
        told = await one.begin(rate=0.02, lora_rank=lora_rank)
        await all_of_them.rounds(2)
        status = await stopped(one)

        async def exported(to: str) -> Loaded:
            words = ("tales", "--to", tmp_path / to, "--data-dir", one.folder.parent)
            result = await trio.to_thread.run_sync(lambda: cli(*words))
            assert result.exit_code == 0, result.output
            is_left = f"after {status['round'] + 1} rounds" in result.stdout  # the round that says so may count
            assert f"after {status['round']} rounds ({status['revision']})" in result.stdout or (
                is_left and to == "left"
            )
            assert f"python -m node run --model {tmp_path / to}" in result.stdout
            assert "newer" not in result.stdout
            return load(resolve(str(tmp_path / to)))

        served = one.hosting.runtime.loaded
        for to in ("new", "parents/are/made"):
            written = await exported(to)
            assert dict(written.model.named_parameters()).keys() == served.packed.shapes.keys()
            assert torch.equal(trial(packed(written, "none")), trial(served))
        facts = json.loads((tmp_path / "new" / "training.json").read_text())
        assert (facts["run_id"], facts["rounds"], facts["root"]) == (told["id"], status["round"], status["root"])
        assert (facts["base_model"], facts["base_revision"]) == ("tiny", status["run"]["started_from"])
        assert status["revision"] in (tmp_path / "new" / "README.md").read_text()
        assert complete(Runtime.load(str(tmp_path / "new")), "Once upon a time") == complete(
            one.hosting.runtime, "Once upon a time"
        )
        await one.training.leave()
        await until(lambda: one.status["run"] is None)
        await exported("left")
        await one.stop()
    (tmp_path / "empty").mkdir()
    last = cli(told["id"][:8], "--to", tmp_path / "empty", "--data-dir", one.folder.parent)
    assert last.exit_code == 0, last.output
    names = ["new", "left", "empty"]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1
    if lora_rank:
        alone = cli("tales", "--to", tmp_path / "alone", "--adapters", "--data-dir", one.folder.parent)
        assert alone.exit_code == 0, alone.output
        assert json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["r"] == lora_rank
        assert json.loads((tmp_path / "alone" / "training.json").read_text())["holds"] == "adapters"
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The data folder of a node that has trained for some rounds, and ended."""
    path = tmp_path_factory.mktemp("node")

    async def train_there() -> None:
        async with world(path, model) as all_of_them:
            one = await all_of_them.start(0)
            await one.begin()
            await all_of_them.rounds(2)
            await one.stop()

    trio.run(train_there)
    return path / "node-0"


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home, tmp_path / "home"))


def run_of(home: Path) -> Path:
    [folder] = [each for each in (home / "training").iterdir() if each.is_dir()]
    return folder


def refused(result: Result, code: int, *words: str) -> None:
    """One sentence, and no traceback."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.count("\n") == 1
    for word in ("node: ", *words):
        assert word in result.stderr


@pytest.mark.slow
def test_a_folder_with_something_in_it_is_left_alone(home: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("of value")
    (tmp_path / "file").write_text("of value")
    refused(cli("tales", "--to", tmp_path / "full", "--data-dir", home), 2, "is not empty", "name a new folder")
    refused(cli("tales", "--to", tmp_path / "file", "--data-dir", home), 2, "is there and no folder")
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "of value"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.slow
def test_what_comes_into_the_folder_meanwhile_is_left_alone_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()

    def written(folder: Path, what: Any) -> None:
        write_model(folder, what)
        (tmp_path / "out" / "mine").write_text("of value")

    monkeypatch.setattr("node.training_export.write_model", written)
    refused(cli("tales", "--to", tmp_path / "out", "--data-dir", home), 1, "Directory not empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.slow
def test_a_folder_of_the_nodes_own_is_refused(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    for to in (copied, copied / "training", copied / "new", tmp_path / "link" / "new", copied.parent):
        refused(cli("tales", "--to", to, "--data-dir", copied), 2, "lie in each other", str(copied))


@pytest.mark.slow
def test_a_run_that_is_not_there_is_told_which_are(home: Path, tmp_path: Path) -> None:
    run = run_of(home).name
    for name in ("tale", run[:7], "f" * 64):
        refused(cli(name, "--to", tmp_path / "out", "--data-dir", home), 2, f"no run '{name}'", f"tales ({run})")
    refused(cli("tales", "--to", tmp_path / "out", "--data-dir", tmp_path / "nowhere"), 2, "no run is kept in")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_one_name_of_two_runs_wants_an_id(copied: Path, tmp_path: Path) -> None:
    """The other is the same but for when it began."""
    folder = run_of(copied)
    kept = json.loads((folder / FILE).read_bytes())
    plan = plan_of(base64.b64decode(kept["plan"]))
    other = structs.replace(plan, created_ms=plan.created_ms + 1)
    shutil.copytree(folder, folder.with_name(other.id.hex()[:16]))
    kept["plan"] = base64.b64encode(other.raw).decode()
    (folder.with_name(other.id.hex()[:16]) / FILE).write_text(json.dumps(kept))
    refused(
        cli("tales", "--to", tmp_path / "out", "--data-dir", copied), 2, "there are 2 runs", "say which by its id",
        folder.name, other.id.hex()[:16],
    )  # fmt: skip
    assert cli(folder.name, "--to", tmp_path / "out", "--data-dir", copied).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{}", "rust", "", "another's"])
def test_a_folder_that_no_plan_names_is_no_run(copied: Path, tmp_path: Path, content: str) -> None:
    folder = run_of(copied)
    if content == "another's":
        folder.rename(folder.with_name("0" * 16))
    else:
        (folder / FILE).write_text(content)
    refused(cli("tales", "--to", tmp_path / "out", "--data-dir", copied), 2, "no run is kept in")


@pytest.mark.slow
def test_a_run_without_a_committed_round_is_for_later(copied: Path, tmp_path: Path) -> None:
    """state-3 is there, and no record says that it was committed; then records are there, and no state."""
    records = run_of(copied) / RECORDS
    kept, count = records.read_bytes(), len(list(read_records(records.parent)))
    words = ("tales", "--to", tmp_path / "out", "--data-dir", copied)
    records.write_bytes(b"")
    assert list(run_of(copied).glob("state-*"))
    refused(cli(*words), 75, "has no committed round at", "train status")
    records.write_bytes(kept)
    for path in run_of(copied).glob("state-*"):
        path.unlink()
    refused(cli(*words), 75, f"has {count} committed rounds at", "on the disk after round 1")


@pytest.mark.slow
def test_weights_of_a_round_whose_record_was_cut_do_not_count(copied: Path, tmp_path: Path) -> None:
    """As after a kill while the record was written."""
    log = run_of(copied) / RECORDS
    newest = max(states_in(run_of(copied)))
    log.write_bytes(log.read_bytes()[:-1])
    result = cli("tales", "--to", tmp_path / "out", "--data-dir", copied)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "training.json").read_text())["rounds"] == newest - 1


@pytest.mark.slow
def test_a_round_whose_weights_are_not_there_yet_or_no_more_gives_way_to_another(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while a node that runs writes one, and takes one away."""
    newest = max(states_in(run_of(copied)))
    (run_of(copied) / f"state-{newest}").unlink()
    told = [[newest, newest - 1]]  # what was there a moment ago
    monkeypatch.setattr("node.training_kept.states_in", lambda folder: told.pop() if told else states_in(folder))
    for to in ("out", "again"):
        result = cli("tales", "--to", tmp_path / to, "--data-dir", copied)
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / to / "training.json").read_text())["rounds"] == newest - 1
        assert "1 newer round: their weights are not on the disk yet" in result.stdout
    monkeypatch.setattr("node.training_kept.states_in", lambda folder: [newest])
    refused(cli("tales", "--to", tmp_path / "last", "--data-dir", copied), 75, "try again")


@pytest.mark.slow
def test_the_base_model_is_found_again_or_asked_for(copied: Path, tmp_path: Path, model: Path) -> None:
    kept = json.loads((run_of(copied) / FILE).read_bytes())
    assert kept["path"] == str(model)
    (run_of(copied) / FILE).write_text(json.dumps({**kept, "path": str(tmp_path / "gone")}))
    words = ("tales", "--to", tmp_path / "out", "--data-dir", copied)
    refused(cli(*words), 2, f"is not at {tmp_path / 'gone'}", "--model")
    save_causal(tmp_path / "other", seed=5)
    refused(cli(*words, "--model", tmp_path / "other"), 2, "starts from tiny at revision sha256-", "--model")
    refused(cli(*words, "--model", tmp_path / "nowhere"), 2, "nowhere")
    assert cli(*words, "--model", model).exit_code == 0


@pytest.mark.slow
def test_adapters_of_a_run_that_has_none(home: Path, tmp_path: Path) -> None:
    refused(
        cli("tales", "--to", tmp_path / "out", "--adapters", "--data-dir", home), 2, "has no adapters",
        "leave out --adapters",
    )  # fmt: skip


@pytest.mark.slow
def test_a_disk_that_takes_no_more_leaves_nothing(home: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            result = cli("tales", "--to", tmp_path / "out", "--data-dir", home)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        refused(result, 1, "make room", "out")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_damaged_weights_are_the_disks_fault_and_say_so(copied: Path, tmp_path: Path) -> None:
    for path in run_of(copied).glob("state-*"):
        path.write_bytes(path.read_bytes()[:-4])
    refused(cli("tales", "--to", tmp_path / "out", "--data-dir", copied), 1, "bytes, wanted", "start the node")


def test_a_setting_that_is_wrong_is_named(tmp_path: Path) -> None:
    (tmp_path / "app_config.json").write_text('{"data_dirr": "/x"}')
    refused(cli("tales", "--to", tmp_path / "out", "--config", tmp_path / "app_config.json"), 2, "data_dirr")
    assert cli("tales").exit_code == 2  # no folder is named
