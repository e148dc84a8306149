"""Model folders, data files and run folders that want more than to be read."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, dynamic_module_utils

from data_prep.config import fingerprint, validate
from data_prep.errors import UserError
from data_prep.formatting import Formatter, load_formatter
from data_prep.inspect import coloured
from data_prep.jsonl import LONGEST_ROW, parse_row, read_json, read_rows, write_json
from data_prep.manifest import sealed
from data_prep.preflight import preflight
from data_prep.reading import LARGEST_ARRAY, _table
from data_prep.run_folder import Stage
from data_prep.tokenizer import load_tokenizer as load_fast_tokenizer
from data_prep.tokenizer import train_tokenizer
from eval.collect import collect
from eval.export import spreadsheet_cell
from eval.models import check_model
from eval.regrade import main as regrade
from eval.run import main as evaluate
from eval.suites import choose_suites
from pipeline.adapters import merge
from pipeline.card import _code, base_facts
from pipeline.card import _table as card_table
from pipeline.config import RunConfig
from pipeline.critic import load_scalar_model
from pipeline.engines.embedded import Config as EmbeddedConfig
from pipeline.engines.embedded import create as create_embedded
from pipeline.engines.openai import Config as OpenAiConfig
from pipeline.engines.vllm import Config as VllmConfig
from pipeline.engines.vllm import create as create_vllm
from pipeline.engines.vllm_server import Config as ServersConfig
from pipeline.model import ModelConfig, build_model, load_model, load_tokenizer, save_checkpoint
from prompts import load_layout, load_profile
from verifiers.__main__ import main as verifier_command
from verifiers.jsonl import RowError
from verifiers.jsonl import rows as verifier_rows
from verifiers.plain import plain

ROOT = Path(__file__).resolve().parents[2]
ESCAPES = "\x1b]0;taken\x07\x1b[2J\x9b31m\u202egnp\r"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small sound model folder."""
    folder = tmp_path_factory.mktemp("model") / "sound"
    profile = load_profile("embedded")
    tokenizer = train_tokenizer(
        ["What is 1+2?", "1+2=3"] * 20, 300, load_layout(profile.layout), profile.system
    )
    shape = ModelConfig(width=16, layers=1, heads=2, kv_heads=2, feed_forward=16, context=64)
    built = build_model(shape, tokenizer, seed=0)
    save_checkpoint(folder, built, tokenizer, [tokenizer.eos_token_id], "embedded")
    return folder


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


# Weights


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_every_loader_and_never_read(model, tmp_path, name):
    folder = copy(model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    torch.save({"x": Trap(marker)}, folder / name)
    loaders = {
        "causal": lambda: load_model(folder),
        "scalar": lambda: load_scalar_model(folder),
        "evaluation": lambda: check_model(folder),
        "embedded engine": lambda: create_embedded(EmbeddedConfig(), folder),
        "vLLM": lambda: create_vllm(VllmConfig(), folder),
    }
    for who, load in loaders.items():
        with pytest.raises(UserError, match="pickled weights") as caught:
            load()
        assert name in str(caught.value) and "safetensors" in caught.value.expected, who
        assert not marker.exists()
    torch.load(folder / name, weights_only=False)["x"].close()
    assert marker.exists(), "the trap must be able to spring"


def test_a_pickled_adapter_is_refused(model, tmp_path):
    pytest.importorskip("peft")
    adapter, marker = tmp_path / "adapter", tmp_path / "ran"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "task_type": "CAUSAL_LM"})
    torch.save({"x": Trap(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        merge(str(model), adapter, tmp_path / "merged")
    assert not marker.exists() and not (tmp_path / "merged").exists()


def test_pickles_beside_safetensors_are_left_alone(model, tmp_path):
    """Many folders hold both, and an optimizer's state; only the safetensors are read."""
    folder, marker = copy(model, tmp_path / "both"), tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"x": Trap(marker)}, folder / name)
    check_model(folder)
    load_model(folder)
    assert not marker.exists()


CODE = """
from pathlib import Path

from transformers import Qwen2Config, Qwen2ForCausalLM

Path({marker!r}).write_text("ran")


class OwnConfig(Qwen2Config):
    model_type = "own_thing"


class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A folder whose architecture is a Python file of its own, and what that file writes."""
    folder, marker = copy(model, tmp_path / "own"), tmp_path / "ran"
    (folder / "modeling_own.py").write_text(CODE.format(marker=str(marker)))
    config = read_json(folder / "config.json")
    config |= {
        "model_type": "own_thing",
        "architectures": ["OwnModel"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnModel",
        },
    }
    write_json(folder / "config.json", config)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return folder, marker


def test_the_code_of_a_model_does_not_run_unless_the_configuration_asks(own_code, monkeypatch):
    folder, marker = own_code
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for load in (
        lambda: load_model(folder),
        lambda: load_scalar_model(folder),
        lambda: create_embedded(EmbeddedConfig(), folder),
    ):
        with pytest.raises(UserError, match="trust_remote_code"):
            load()
        assert not marker.exists()
    loaded = load_model(folder, trust_remote_code=True)
    assert marker.exists() and type(loaded).__name__ == "OwnModel"


def test_one_key_of_a_run_allows_it_for_trainer_and_engine(model):
    table = {
        "name": "x",
        "out": "y",
        "data": {"sources": [{"kind": "embedded"}]},
        "model": {"path": "someone/model"},
    }
    for kind in ("embedded", "vllm", "vllm_server"):
        assert (
            validate(RunConfig, {**table, "engine": {"kind": kind}}, "x").engine
            == validate(
                RunConfig, {**table, "engine": {"kind": kind, "trust_remote_code": False}}, "x"
            ).engine
        )
        asked = {**table, "model": {"path": "someone/model", "trust_remote_code": True}}
        run = validate(RunConfig, {**asked, "engine": {"kind": kind}}, "x")
        assert run.engine.trust_remote_code
        assert "trust_remote_code" not in run.engine.deciding(model)
        again = validate(RunConfig, json.loads(run.model_dump_json()), "x")
        assert again.engine.trust_remote_code


def test_the_code_of_a_tokenizer_never_runs(model, tmp_path, monkeypatch):
    folder, marker = copy(model, tmp_path / "own"), tmp_path / "ran"
    (folder / "tokenization_own.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    config = read_json(folder / "tokenizer_config.json")
    config |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    write_json(folder / "tokenizer_config.json", config)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for load in (load_tokenizer, lambda path: load_fast_tokenizer(str(path))):
        with suppress(UserError):
            load(folder)  # as a plain fast tokenizer, where transformers can
        assert not marker.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists(), "the trap must be able to spring"


# Templates


@pytest.mark.parametrize(
    "body",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch taken') }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1 // 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set _ = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_chat_template_is_an_error_and_reaches_nothing(
    model, tmp_path, monkeypatch, body
):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    formatter: Formatter = load_formatter(tokenizer, "embedded")
    tokenizer.chat_template = body + tokenizer.chat_template
    with pytest.raises(UserError, match="conversation"):
        formatter.conversation([{"role": "assistant", "content": "2"}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(60)
def test_a_chat_template_that_never_ends_is_named(model, tmp_path):
    folder = copy(model, tmp_path / "model")
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    # Only for some conversations, so that trying it out shows nothing.
    trap = "{% if messages[0].content == 'bad luck' %}" + loops + "{% endif %}"
    (folder / "chat_template.jinja").write_text(
        trap + "{{ bos_token }}{% for m in messages %}{{ m.role }}: "
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endfor %}"
    )
    formatter = load_formatter(load_tokenizer(folder), "embedded")
    assert formatter.layout == "own"
    assert formatter.training_row("good luck", "2")
    with pytest.raises(UserError, match=f"chat template of {folder}.*more operations"):
        formatter.training_row("bad luck", "2")
    # Checks of the first rows render with the same bounds.
    row = formatter.training_row("good luck", "2")
    turns = [{"role": "user", "content": "bad luck"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(UserError, match=f"chat template of {folder}"):
        preflight(formatter, [turns], [row])


# Bombs


def test_a_line_that_never_ends_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": 1}\n{"a": "')
        file.truncate(LONGEST_ROW + 100)  # sparse: zeros that take no disk
    rows = read_rows(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(UserError, match="line 2: a line of more than 64 MiB"):
        next(rows)
    with pytest.raises(RowError, match="line 2: more than"):
        list(verifier_rows(path))


def test_documents_beyond_their_bound_are_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(UserError, match="300 MiB"):
        read_json(path)
    with path.open("wb") as file:
        file.truncate(LARGEST_ARRAY + 1)
    with pytest.raises(UserError, match="JSON lines belong"):
        _table(str(path))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, f'{{"a": {"9" * 5000}}}'])
def test_json_that_breaks_parsers_is_a_message(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UserError):
        list(read_rows(path))
    with pytest.raises(UserError):
        read_json(path)
    with pytest.raises(RowError):
        list(verifier_rows(path))


def test_a_safetensors_header_that_claims_the_file_is_not_read(model, tmp_path):
    folder = copy(model, tmp_path / "model")
    with (folder / "model.safetensors").open("wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate(300 << 20)
    with pytest.raises(UserError, match="cut short or damaged"):
        check_model(folder)


# Paths


def test_a_manifest_cannot_name_what_is_removed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("x")
    stage = Stage(tmp_path / "run", "data", {}, {})
    work = stage.begin()
    # A seal shows damage; whoever writes a manifest can seal it.
    named = {"plan": stage.plan, "outputs": {}, "result": fingerprint({})}
    write_json(work / "manifest.json", sealed({**named, "scratch": ["../../victim"]}))
    (work / "plan.json").unlink()
    with pytest.raises(UserError, match=r"'\.\./\.\./victim' as the name of a folder"):
        Stage(tmp_path / "run", "data", {}, {}).is_complete  # noqa: B018 - it asks the disk
    assert (victim / "kept").read_text() == "x"


def test_a_linked_stage_folder_is_not_emptied(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.partial").symlink_to(victim)
    with pytest.raises((OSError, UserError)):
        Stage(tmp_path / "run", "data", {}, {}).begin()
    assert (victim / "kept").read_text() == "x"


@pytest.mark.parametrize("name", ["../up", "/etc", "a/b", "..", "", "x\0y", "-x", "a\nb"])
def test_names_that_are_paths_are_refused_where_folders_are_made(tmp_path, name):
    table = {
        "name": "x",
        "out": str(tmp_path),
        "data": {"sources": [{"kind": "embedded"}]},
        "model": {},
        "train": [{"name": name, "method": {"kind": "sft"}}],
    }
    with pytest.raises(UserError, match="name of a folder"):
        validate(RunConfig, table, "x")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1?", "answer": "2"}\n')
    if name:
        with pytest.raises(UserError):
            choose_suites([f"{name}={rows}"], {})


def test_a_run_folder_cannot_name_stages_elsewhere(tmp_path):
    (tmp_path / "eval-x" / "own").mkdir(parents=True)
    write_json(tmp_path / "eval-x" / "manifest.json", {})
    (tmp_path / "config.toml").write_text('name = "x"\n[[train]]\nname = "../../secret"\n')
    with pytest.raises(UserError, match="name of a folder"):
        collect(tmp_path)


def test_an_archive_is_no_data_file(tmp_path):
    path = tmp_path / "rows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../up.jsonl", "{}")
    with pytest.raises(UserError, match=r"ends in '\.zip'"):
        _table(str(path))


# Terminals


def test_control_characters_are_spelt_out():
    text = plain(f"a{ESCAPES}b\ud800\n\tc")
    assert text == ("a\\u001b]0;taken\\u0007\\u001b[2J\\u009b31m\\u202egnp\\u000db\\ud800\n\tc")
    assert plain("Ω ≤ 3, 数学 👩‍🏫 é") == "Ω ≤ 3, 数学 👩‍🏫 é"
    value = {"a": ESCAPES}
    assert json.loads(plain(json.dumps(value, ensure_ascii=False))) == value


def no_escape(text: str) -> bool:
    return not any(char in text for char in ("\x1b", "\x9b", "\x07", "\r", "\u202e"))


@pytest.mark.parametrize("flag", [[], ["--debug"]])
def test_an_error_that_quotes_data_cannot_steer_the_terminal(tmp_path, flag):
    folder = tmp_path / f"model{ESCAPES}"
    words = [sys.executable, "-m", "eval.score", "--samples", str(folder / "rows.jsonl"), *flag]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if flag else 2)
    assert "no such file" in done.stderr and "\\u001b]0;taken" in done.stderr
    assert no_escape(done.stderr) and no_escape(done.stdout)
    assert ("Traceback" in done.stderr) == bool(flag)


def test_the_verifier_command_shows_texts_plainly(capsys):
    assert verifier_command(["1", f"{ESCAPES} \\boxed{{{ESCAPES}}}"]) == 1
    shown = capsys.readouterr()
    assert "verdict" in shown.out and "\\x1b]0;taken" in shown.out
    assert no_escape(shown.out) and no_escape(shown.err)


def test_inspected_rows_bring_no_colours_of_their_own():
    shown = coloured([f"a{ESCAPES}"], [1], [False])
    assert shown == f"\x1b[42;30ma{plain(ESCAPES)}\x1b[0m"


# Tables and cards


@pytest.mark.parametrize("text", ["=1+1", "+1", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", " =1"])
def test_no_cell_is_a_formula(tmp_path, text):
    assert spreadsheet_cell(text) == f"'{text}"
    assert spreadsheet_cell("algebra = fun") == "algebra = fun"
    assert spreadsheet_cell(-0.5) == -0.5
    path = tmp_path / "x.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerow([spreadsheet_cell(text), spreadsheet_cell(-0.5)])
    assert path.read_text().lstrip('"').startswith("'")


def test_a_card_hands_on_names_alone(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\nbase_model: [a/b, c/d]\n---\n")
    assert base_facts(tmp_path) == {"license": "apache-2.0", "base_model": ["a/b", "c/d"]}
    bomb = "\n".join(
        ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    )
    for head in (
        "license: '`](javascript:alert(1)) <script>'",
        "license: {a: b}",
        "base_model: '<img src=x onerror=alert(1)>'",
        "base_model: []",
        "license_link: 'javascript:alert(1)'",
        f"{bomb}\nbase_model: *a39",
        "license: !!python/object/apply:os.system ['true']",
    ):
        card.write_text(f"---\n{head}\n---\n")
        assert base_facts(tmp_path) == {}, head


def test_a_card_keeps_markup_as_text():
    table = card_table({"a|b": "<script>alert(1)</script>\n| x | [y](javascript:z) `c` **d**"})
    row = table.splitlines()[-1]
    assert len(table.splitlines()) == 3
    for raw in ("<script>", "[y](", "`c`", "**d**"):
        assert raw not in row
    assert _code("a`b\nc") == "`a'b c`"


# Keys

KEY = "sk-secret-0123456789"


class Gossip(BaseHTTPRequestHandler):
    """Repeats the key that it was sent, or sends the client elsewhere."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization")))
        sent = self.headers.get("Authorization", "")
        status = self.server.status
        self.send_response(status)
        if status in (301, 302, 303, 307, 308):
            self.send_header("Location", self.server.elsewhere)
        data = f"no: {sent} is wrong".encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *_):
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that went away is none of ours."""


@pytest.fixture
def gossip():
    made = []

    def start(status, elsewhere=""):
        server = QuietServer(("127.0.0.1", 0), Gossip)
        server.status, server.elsewhere, server.seen = status, elsewhere, []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        made.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in made:
        server.shutdown()
        server.server_close()


EVIL = ["../../up", "/etc/x", "a\0b", "~root", "C:\\x", "%2e%2e", "x" * 5000, "..", "\x1b[2J"]


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_neither_a_repeated_key_nor_ids_that_are_paths_come_through(
    gossip, tmp_path, monkeypatch, capsys, status
):
    """An evaluation over an endpoint that repeats the key, of rows whose ids want out."""
    _, url = gossip(status)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"id": name, "question": f"{name} 1+{i}?", "answer": str(i + 1)}) + "\n"
            for i, name in enumerate(EVIL)
        )
    )
    out = tmp_path / "out"
    words = ["--model", "some-model", "--suites", f"own={rows}", "--n", "1", "--out", str(out)]
    words += ["--engine.kind", "openai", "--engine.base-url", url, "--engine.retries", "0"]
    with pytest.raises(UserError) as caught:
        evaluate(words)
    said = "".join(capsys.readouterr()) + str(caught.value)
    assert KEY not in said and str(status) in said
    assert "[key] is wrong" in said or status == 401
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != rows]
    assert written and all(path.is_relative_to(out) for path in written)
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in written)
    assert all(KEY.encode() not in path.read_bytes() for path in written)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 400, 500])
def test_a_grader_sends_its_key_to_one_address_alone(gossip, monkeypatch, status):
    from verifiers.checkers._endpoint import Endpoint
    from verifiers.checkers._grader import GraderError

    other, elsewhere = gossip(200)
    server, url = gossip(status, elsewhere)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(GraderError) as caught:
        Endpoint(url, "m", retries=1, backoff_s=0.0).ask([], {}, {}, str)
    assert server.seen and server.seen[0][1] == f"Bearer {KEY}"
    assert other.seen == []
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["sk-one\nsk-two", "sk-\x07bell", "schlüssel"])
def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch, key):
    from pipeline.engines.openai import create
    from verifiers.checkers._endpoint import Endpoint
    from verifiers.checkers._grader import GraderError

    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError) as caught:
        create(OpenAiConfig(base_url="http://127.0.0.1:9/v1"), "m")
    assert "sk-" not in str(caught.value) and "schl" not in str(caught.value)
    with pytest.raises(GraderError) as caught:
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0).ask([], {}, {}, str)
    assert "sk-" not in str(caught.value) and "schl" not in str(caught.value)


@pytest.mark.parametrize(
    "url", [f"https://me:{KEY}@host/v1", f"https://{KEY}@host/v1", f"https://host/v1?key={KEY}"]
)
def test_an_address_holds_no_key(url):
    from verifiers.checkers._endpoint import Endpoint

    for config, table in (
        (OpenAiConfig, {"kind": "openai", "base_url": url}),
        (ServersConfig, {"kind": "vllm_server", "urls": [url]}),
    ):
        with pytest.raises(UserError) as caught:
            validate(config, table, "x.toml")
        assert KEY not in str(caught.value) and "environment" in str(caught.value)
    with pytest.raises(ValueError, match="environment") as error:
        Endpoint(url, "m")
    assert KEY not in str(error.value)


def test_a_configuration_takes_no_key():
    for name in ("api_key", "Authorization", "password", "client_secret", "token"):
        with pytest.raises(UserError, match="environment") as caught:
            validate(OpenAiConfig, {"kind": "openai", "extra": {name: KEY}}, "x.toml")
        assert KEY not in str(caught.value)
    fine = {"max_completion_tokens": 5, "reasoning_effort": "low"}
    assert OpenAiConfig(extra=fine).extra == fine
    assert KEY not in OpenAiConfig(key_env="MY_KEY").model_dump_json()


def test_a_folder_cannot_name_the_checker_that_runs(tmp_path):
    """`eval.regrade` takes the checker of the log unless one is named; not a file that it names."""
    marker, checker = tmp_path / "ran", tmp_path / "evil.py"
    checker.write_text(f"open({str(marker)!r}, 'w')\n")
    suite = tmp_path / "eval-x" / "own"
    suite.mkdir(parents=True)
    write_json(suite / "figures.json", {})
    write_json(suite / "grading.json", {"checker": {"kind": str(checker)}, "language": "en"})
    scorer = tmp_path / "scorer.py"
    scorer.write_text("def load_scorer(): ...\n")
    made = {"counts": {"model": str(tmp_path)}, "outputs": {}, "result": fingerprint({})}
    write_json(tmp_path / "eval-x" / "manifest.json", sealed(made))
    with pytest.raises(UserError, match="what a folder says is not run"):
        regrade([str(tmp_path / "eval-x"), "--reward-model", str(scorer)])
    assert not marker.exists()


def test_a_row_with_half_a_pair_of_surrogates_is_named():
    with pytest.raises(UserError, match="surrogate"):
        parse_row(rb'{"a": "\ud800"}', "x, line 1")
