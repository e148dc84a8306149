"""The adapters, and the wheel: called directly, and by the real libraries."""

import importlib.util
import json
import os
import shutil
import site
import subprocess
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRL_RUN = """
import json
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
import boxed_verifiers
from boxed_verifiers.adapters.trl import make_math_reward

words = ["<pad>", "<eos>", "<unk>", "\\\\boxed{1}", "\\\\boxed{2}", "\\\\boxed{\\\\frac{", "one"]
raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    eos_token_id=1, bos_token_id=None))
seen = []
inner = make_math_reward(workers=1)
def math_reward(completions, **columns):
    rewards = inner(completions, **columns)
    seen.extend(zip(completions, rewards))
    return rewards
data = Dataset.from_list([{"prompt": "one", "solution": "1"}] * 4)
args = GRPOConfig(
    output_dir="out", max_steps=2, per_device_train_batch_size=8, num_generations=8,
    max_completion_length=6, report_to=[], use_cpu=True, save_strategy="no", logging_steps=1,
    bf16=False, seed=1)
trainer = GRPOTrainer(
    model=model, reward_funcs=[math_reward], args=args, train_dataset=data,
    processing_class=tokenizer)
trainer.train()
logged = [h["reward"] for h in trainer.state.log_history if "reward" in h]
print(json.dumps({"file": boxed_verifiers.__file__, "rows": seen, "logged": logged}))
"""
VERL_RUN = """
import json
from pathlib import Path
import numpy as np
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.workers.reward_manager import NaiveRewardManager
import boxed_verifiers

path = str(Path(boxed_verifiers.__file__).parent / "adapters" / "verl.py")
config = OmegaConf.create({"reward": {"custom_reward_function": {
    "path": path, "name": "compute_score", "reward_kwargs": {"correct": 2.0}}}})
texts = {1: "so \\\\boxed{0.5}", 2: "so \\\\boxed{3}", 3: "so \\\\boxed{}"}
class Words:
    def decode(self, ids, skip_special_tokens=True):
        return " ".join(texts.get(int(i), "q") for i in ids)
data = DataProto.from_single_dict({
    "prompts": torch.zeros(3, 1, dtype=torch.long), "responses": torch.tensor([[1], [2], [3]]),
    "attention_mask": torch.ones(3, 2, dtype=torch.long),
    "reward_model": np.array([{"ground_truth": "1/2"}] * 3, dtype=object),
    "data_source": np.array(["math"] * 3, dtype=object),
    "extra_info": np.array([{}] * 3, dtype=object)})
manager = NaiveRewardManager(Words(), 0, compute_score=get_custom_reward_fn(config))
out = manager(data, return_dict=True)
print(json.dumps({"file": boxed_verifiers.__file__, "reward": out["reward_tensor"].tolist(),
                  "outcome": out["reward_extra_info"]["outcome"]}))
"""


def test_trl_reward_is_one_float_or_none_a_completion() -> None:
    from verifiers.adapters.trl import make_math_reward

    reward = make_math_reward(column="gold", correct=2.0, wrong=-1.0, workers=1)
    chat = [{"role": "assistant", "content": r"so \boxed{0.5}"}]
    completions = [chat, r"\boxed{3}", r"\boxed{}", r"\boxed{1}"]
    golds = ["1/2", "1/2", "1/2", ""]
    assert reward(completions=completions, gold=golds, prompts=["p"] * 4) == [2.0, -1.0, -1.0, None]
    with pytest.raises(ValueError, match=r"no column 'gold'; found \['solution'\]"):
        reward(completions=completions, solution=golds)


def test_verl_compute_score_by_path(tmp_path: Path) -> None:
    path = ROOT / "verifiers" / "adapters" / "verl.py"
    spec = importlib.util.spec_from_file_location("custom_module", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.compute_score("gsm8k", r"\boxed{7}", "7", {}, wrong=-1.0)
    assert (result["score"], result["acc"], result["judged"]) == (1.0, 1.0, True)
    assert module.compute_score("gsm8k", r"\boxed{8}", "7", None, wrong=-1.0)["score"] == -1.0
    assert module.compute_score("gsm8k", r"\boxed{8}", "", None)["judged"] is False
    by_policy = module.compute_score("gsm8k", "#### 7 #### 8", "7", {"policy": "gsm8k_strict"})
    assert by_policy["acc"] == 1.0
    with pytest.raises(ValueError, match="unknown options"):
        module.compute_score("gsm8k", "7", "7", None, typo=1)


class _Clean:
    """A virtual environment of its own with the wheel in it."""

    def __init__(self, home: Path) -> None:
        venv.create(home, with_pip=True)
        self.python = home / "bin" / "python"
        source = home / "source"
        # Built from a copy, so that the tree stays as it is.
        shutil.copytree(ROOT / "verifiers", source, ignore=shutil.ignore_patterns("__pycache__"))
        self.source = source

    def pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "install", "-q", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip could not install {arguments}: {done.stderr.strip()[-200:]}")

    def share(self) -> None:
        """Lend the environment our own torch and transformers, which take long to install."""
        target = next((self.python.parent.parent / "lib").glob("python*/site-packages"))
        (target / "lent.pth").write_text("\n".join(site.getsitepackages()))

    def run(self, code: str, folder: Path) -> dict:
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [self.python, "-W", "ignore", "-c", code],
            cwd=folder, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_the_wheel_stands_alone(tmp_path: Path) -> None:
    clean = _Clean(tmp_path / "env")
    clean.pip(str(clean.source))
    code = (
        "import json, sys, boxed_verifiers as b\n"
        "with b.VerifierPool(workers=1) as pool:\n"
        "    verdicts = pool.verify_many([('1/2', r'\\boxed{\\int_0^1 x dx}'), ('7', '7')])\n"
        "names = sorted({m.split('.')[0] for m in sys.modules} & {'verifiers', 'torch', 'sympy'})\n"
        "print(json.dumps([[v.outcome for v in verdicts], names, b.load_checker('steps').split]))\n"
    )
    assert clean.run(code, tmp_path) == [["correct", "correct"], [], "line"]
    command = [clean.python, "-m", "boxed_verifiers", "7", r"\boxed{7}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_trl_trains_with_the_wheel(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    clean = _Clean(tmp_path / "env")
    clean.share()
    clean.pip("--no-deps", str(clean.source), "trl==1.16.*")
    seen = clean.run(TRL_RUN, tmp_path)
    assert str(tmp_path) in seen["file"]
    for text, reward in seen["rows"]:
        last = text.split()[-1] if text.split() else ""
        if "frac" not in text and last in ("\\boxed{1}", "\\boxed{2}"):
            assert reward == float(last == "\\boxed{1}"), text
    assert len(seen["rows"]) == 16
    assert len(seen["logged"]) == 2
    assert {reward for _, reward in seen["rows"]} == {0.0, 1.0}


@pytest.mark.slow
def test_verl_scores_with_the_wheel(tmp_path: Path) -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    clean = _Clean(tmp_path / "env")
    clean.share()
    clean.pip("msgpack", "jsonschema", "click", "protobuf", "aiosignal", "frozenlist", "requests")
    clean.pip(
        "--no-deps", str(clean.source), "verl==0.9.*", "tensordict==0.10.*", "hydra-core", "ray",
        "omegaconf", "antlr4-python3-runtime==4.9.3", "codetiming", "pylatexenc", "pyvers",
        "cloudpickle", "orjson", "importlib_metadata", "torchdata", "zipp",
    )  # fmt: skip
    seen = clean.run(VERL_RUN, tmp_path)
    assert str(tmp_path) in seen["file"]
    assert seen["reward"] == [[2.0], [0.0], [0.0]]
    assert seen["outcome"] == ["correct", "incorrect", "no_answer"]
