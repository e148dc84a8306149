"""Model cards, complete folders, and a hub that is a stand-in server on this machine."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.build import build
from data_prep.config import validate
from data_prep.errors import UserError
from pipeline.card import base_facts, card_head
from pipeline.config import TrainConfig
from pipeline.model import load_model, load_tokenizer
from pipeline.publish import publish
from pipeline.train import train

from .conftest import make_checkpoint
from .small_run import small_run

TOKEN = "hf_stand_in"  # noqa: S105 - of a hub that is not there


class Hub(BaseHTTPRequestHandler):
    """Takes what `huggingface_hub` sends and keeps it."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(404, {"error": "Entry not found"})

    def do_HEAD(self):
        self.answer(404, {})

    def do_POST(self):
        length = int(self.headers.get("Content-Length") or 0)
        if length:
            body = self.rfile.read(length)
        else:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        hub = self.server
        hub.tokens.add(self.headers.get("Authorization"))
        url = f"http://127.0.0.1:{hub.server_port}"
        path = self.path.split("?")[0]
        if hub.refuses:
            self.answer(403, {"error": "You have no right to write here."})
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{url}/someone/model", "name": "someone/model"})
        elif path == "/api/validate-yaml":
            hub.cards.append(yaml.safe_load(json.loads(body)["content"].split("---")[1]))
            self.answer(200, {})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif path.endswith("/commit/main"):
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    value = row["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            done = {"commitUrl": f"{url}/someone/model/commit/1", "commitOid": "1" * 40}
            self.answer(200, done)
        else:
            self.answer(404, {"error": self.path})

    def answer(self, status, body):
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.tokens, server.created, server.cards, server.files = set(), [], [], {}
    server.refuses = False
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    run = small_run(folder)
    build(run.data, Path(run.out), run.seed)
    train(run, next(s for s in run.train if s.name == "sft"))
    lora = {"rank": 2}
    train(run, stage(run, lora=lora, steps=6, reward={"format": 0.1}, validate_every=3))
    return folder


def stage(run, **changes) -> TrainConfig:
    grpo = next(s for s in run.train if s.name == "grpo")
    return validate(TrainConfig, {**grpo.model_dump(), **changes}, "grpo")


def environment(tmp_path, **changes) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {**kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **changes}


def command(root, tmp_path, run, **changes):
    words = [sys.executable, "-m", "pipeline.publish", "--run", str(run)]
    words += ["--stage", "grpo", "--repo", "someone/model"]
    return subprocess.run(
        words,
        cwd=root,
        env=environment(tmp_path, **changes),
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_puts_the_whole_folder_on_the_hub(root, base, hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    done = command(root, tmp_path, base / "run", HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert "someone/model" in done.stderr
    folder = base / "run" / "grpo" / "checkpoint"
    expected = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    assert hub.files == expected
    assert {"model.safetensors", "README.md", "adapter/adapter_model.safetensors"} <= set(expected)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.created[0]["visibility"] == "private"
    assert hub.cards[0]["library_name"] == "transformers"
    assert TOKEN not in done.stdout + done.stderr


def test_without_a_token_it_says_so_and_sends_nothing(root, base, hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    done = command(root, tmp_path, base / "run", HF_ENDPOINT=address)
    assert done.returncode == 2
    assert "no token for the Hugging Face hub" in done.stderr
    assert "hf auth login" in done.stderr
    assert not hub.files and not hub.created


def test_a_hub_that_refuses_is_told_apart(root, base, hub, tmp_path):
    hub.refuses = True
    address = f"http://127.0.0.1:{hub.server_port}"
    done = command(root, tmp_path, base / "run", HF_ENDPOINT=address, HF_TOKEN=TOKEN)
    assert done.returncode == 2
    assert "the hub refused" in done.stderr and "403" in done.stderr


def test_a_stage_pushes_when_it_is_complete(base, hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    shutil.copytree(base / "run", tmp_path / "run")
    run = small_run(tmp_path)
    config = stage(run, name="pushed", steps=1, push_to_hub="someone/model")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match="no token"):
        train(run, config)
    assert not (tmp_path / "run" / "pushed.partial").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    folder = train(run, config)
    weights = (folder / "checkpoint" / "model.safetensors").read_bytes()
    assert hub.files["model.safetensors"] == weights


def test_wrong_names_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no complete model folder"):
        publish(tmp_path, "a/b", "--repo")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="owner/name"):
        publish(tmp_path, "just-a-name", "--repo")


def test_the_card_tells_the_run(base):
    folder = base / "run" / "grpo" / "checkpoint"
    text = (folder / "README.md").read_text("utf-8")
    head = card_head(folder / "README.md")
    assert head["pipeline_tag"] == "text-generation"
    assert head["tags"] == ["math", "reasoning", "grpo", "boxed"]
    assert "license" not in head and "base_model" not in head
    rows = [json.loads(line) for line in (base / "run/grpo/steps.jsonl").read_text().splitlines()]
    last = [row for row in rows if "objective" in row][-1]
    assert f"| grad\\_norm, step {last['step']} | {last['grad_norm']:.4g} |" in text
    validated = [row for row in rows if "validation_accuracy" in row][-1]
    assert f"after step {validated['step']} | {validated['validation_accuracy']:.4g} |" in text
    for part in ("trained by `grpo` from `sft` in 6 optimizer steps", "rank 2", "[[train]]"):
        assert part in text
    assert "| seed | 1 |" in text and f"| torch | {torch.__version__}".split("+")[0] in text
    assert "embedded" in text
    assert str(base) not in text.replace(str(base / "even_length.py"), "")


def test_licence_and_base_are_handed_on(base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "run")
    given = make_checkpoint(tmp_path / "given")
    (given / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n# A model\n")
    run = small_run(tmp_path)
    run = run.model_copy(update={"model": run.model.model_copy(update={"path": str(given)})})
    folder = train(run, stage(run, name="next", init=str(given), steps=1))
    head = card_head(folder / "checkpoint" / "README.md")
    assert (head["license"], head["base_model"]) == ("apache-2.0", "a/b")
    assert base_facts(folder / "checkpoint") == {"base_model": "a/b", "license": "apache-2.0"}
    assert base_facts("someone/that-is-not-here") == {"base_model": "someone/that-is-not-here"}


def test_a_card_that_is_no_yaml_is_no_card(tmp_path):
    for text in ("", "# No head", "---\n: : :\n---\n", "---\n- a list\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert card_head(tmp_path / "README.md") == {}


def test_transformers_generates_from_the_folder_as_it_is(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base / "run" / "grpo" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Compute 1+1."}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.shape[1] > prompt["input_ids"].shape[1]
    ends = model.generation_config.eos_token_id
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {"<|end|>", "<|eos|>"}
    again = load_model(folder).state_dict()
    assert all(torch.equal(v, again[n]) for n, v in model.state_dict().items())
    assert load_tokenizer(folder).chat_template == tokenizer.chat_template


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_vllm_loads_the_folder_as_it_is(tmp_path):
    """A trained folder with merged adapters; heads of 32, the smallest of vLLM's CPU attention."""
    from pipeline.adapters import Adapters, LoraConfig, plain_weights
    from pipeline.engines import Prompt, Sampling
    from pipeline.engines import embedded as ours
    from pipeline.engines import vllm as theirs
    from pipeline.model import save_checkpoint

    start = make_checkpoint(tmp_path / "start", width=64, heads=2, kv_heads=1)
    model = load_model(start)
    adapters = Adapters(model, LoraConfig(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    ends = model.generation_config.eos_token_id
    save_checkpoint(tmp_path / "made", model, load_tokenizer(start), ends, "embedded")
    adapters.save(tmp_path / "made" / "adapter")
    prompts = [Prompt(f"p{i}", tuple(range(30 + i, 40 + i))) for i in range(6)]
    sampling = Sampling(n=1, temperature=0.0, max_tokens=12)
    engines = [
        ours.create(ours.Config(), tmp_path / "made"),
        theirs.create(theirs.Config(), tmp_path / "made"),
    ]
    one, two = ([g.completions[0] for g in e.generate(prompts, sampling)] for e in engines)
    # And merged weights that are pushed are those of the folder.
    again = []
    for weights in (load_model(start).state_dict().items(), plain_weights(model)):
        engines[1].load_weights(weights, len(again))
        groups = engines[1].generate(prompts, sampling)
        again.append([g.completions[0].token_ids for g in groups])
    engines[1].close()
    assert again[0] != again[1] == [c.token_ids for c in two]
    assert [c.token_ids for c in one] == [c.token_ids for c in two]
    for a, b in zip(one, two, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)
