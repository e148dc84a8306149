"""The model card of a checkpoint: what a reader of the folder, or of the hub, has to know.

Everything in it is taken from the run: configuration, data manifest, step records, warnings,
versions. Nothing is claimed that was not measured. The licence and the base model are handed on
from the card of what the stage began with; where that says nothing, the card says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
import yaml

from data_prep.files import writing
from data_prep.jsonl import read_rows
from data_prep.manifest import read_manifest
from data_prep.versions import versions
from pipeline.config import RunConfig, TrainConfig

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HANDED_ON = {
    "base_model": re.compile(r"[\w.-]+(/[\w.-]+)?"),
    "license": re.compile(r"[\w.+-]{1,80}"),
    "license_name": re.compile(r"[\w.+ -]{1,80}"),
    "license_link": re.compile(r"https?://[\w./%?#=&+~:@-]{1,300}|[\w.-]{1,80}"),
}
# Of the last step with rollouts or rows, in this order, where the stage has them.
FIGURES = (
    "objective",
    "reward_mean",
    "accuracy",
    "entropy",
    "completion_length",
    "truncated_share",
    "zero_signal_share",
    "kl_k3",
    "margin",
    "grad_norm",
)
TASKS = {"policy": "text-generation", "scores": "text-classification"}


def write_card(
    folder: Path,
    run: RunConfig,
    config: TrainConfig,
    trains: str,
    init: str | Path | None,
    records: Path,
    adapter: bool,
) -> None:
    """Write `README.md` into a checkpoint.

    Args:
        folder: The checkpoint.
        run: The whole run's configuration.
        config: The stage's.
        trains: "policy" or "scores".
        init: What the stage began with; None for random weights.
        records: Folder with `steps.jsonl` and `warnings.jsonl`.
        adapter: Whether an adapter lies beside the merged weights.
    """
    base = base_facts(init)
    method = config.method.kind
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": TASKS[trains],
        "tags": ["math", "reasoning", method, "boxed"],
        **base,
    }
    rows = _rows(records / "steps.jsonl")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(run.name)}: {_text(config.name)}",
        _opening(config, trains, base, init, len(rows), adapter),
        _use(trains),
        "## Data",
        _data(run),
        "## Figures",
        _figures(rows),
        _warnings(records / "warnings.jsonl"),
        "## Configuration",
        _config(folder, run, config),
        "## Made with",
        _table({"seed": run.seed, **versions()}),
        "Licence: "
        + (
            f"`{base['license']}`, as the model that it began with."
            if "license" in base
            else "not stated by the model that it began with; ask its authors before you share it."
            if init is not None
            else "not stated; the weights were made by this run alone."
        ),
    ]
    with writing(folder / "README.md") as temporary:
        temporary.write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")


def base_facts(init: str | Path | None) -> dict[str, Any]:
    """Return `base_model` and licence for a card's head, as far as they are known.

    A folder's own card is asked; a hub id, where its card lies in the local cache.
    """
    if init is None:
        return {}
    found: dict[str, Any] = {}
    name = str(init)
    card = Path(name) / "README.md"
    if not Path(name).is_dir() and HUB_ID.fullmatch(name):
        found["base_model"] = name
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    head = card_head(card)
    for key, form in HANDED_ON.items():
        values = head.get(key)
        values = values if isinstance(values, list) and key == "base_model" else [values]
        # A card may say anything; what is no name, licence or address is not handed on.
        if values and all(isinstance(value, str) and form.fullmatch(value) for value in values):
            found.setdefault(key, values if len(values) > 1 else values[0])
    return found


def card_head(card: Path) -> Mapping[str, Any]:
    """Return the YAML at the head of a card; empty where there is none."""
    if not card.is_file():
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match.group(1)) if match else None
    except (yaml.YAMLError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _opening(
    config: TrainConfig,
    trains: str,
    base: Mapping[str, Any],
    init: str | Path | None,
    steps: int,
    adapter: bool,
) -> str:
    what = {"policy": "A language model", "scores": "A model with one scalar a state"}[trains]
    began = "random weights"
    if init is not None:
        began = _code(base.get("base_model") or config.init)
    words = (
        f"{what}, trained by {_code(config.method.kind)} from {began} in {steps} optimizer steps."
    )
    if config.lora.rank:
        words += f" Low-rank adapters of rank {config.lora.rank} were trained and merged in"
        words += "; they lie in `adapter/` too, as peft writes them." if adapter else "."
    return words


def _use(trains: str) -> str:
    kind = {"policy": "CausalLM", "scores": "SequenceClassification"}[trains]
    words = (
        "The folder is complete: `transformers` and vLLM load it as it is, with tokenizer, chat "
        "template and every end token.\n\n```python\n"
        f"from transformers import AutoModelFor{kind}, AutoTokenizer\n\n"
        f'model = AutoModelFor{kind}.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
    )
    if trains == "scores":
        words += "\n\nThe score stands at the last token of the answer."
    return words


def _data(run: RunConfig) -> str:
    """Return what the data stage counted, and what it read."""
    counts: dict[str, Any] = {}
    stage = Path(run.out) / "data"
    if (stage / "manifest.json").is_file():
        counts = read_manifest(stage).get("counts", {})
    data: Any = run.data
    sources = getattr(data, "sources", ())
    facts = {"sources": ", ".join(sorted({s.kind for s in sources})) or "none"}
    plain = {k: v for k, v in counts.items() if isinstance(v, int | float | str)}
    return _table(facts | plain)


def _figures(rows: list[dict[str, Any]]) -> str:
    last = next((row for row in reversed(rows) if "objective" in row), None)
    if last is None:
        return "No step was taken."
    found = {f"{key}, step {last['step']}": last[key] for key in FIGURES if key in last}
    validated = [row for row in rows if any(k.startswith("validation_") for k in row)]
    for key, value in validated[-1].items() if validated else ():
        if key.startswith("validation_"):
            found[f"{key}, after step {validated[-1]['step']}"] = value
    return (
        _table(found) + "\n\nFigures of the last training step"
        f"{' and of the last look at held-out data' if validated else ''}; no benchmark is meant."
    )


def _warnings(path: Path) -> str:
    rows = _rows(path)
    if not rows:
        return ""
    items = [f"* step {row['step']}, {row['sign']}: {_text(row['found'])}" for row in rows]
    return "\n".join(["Warnings while training:", "", *items])


def _config(folder: Path, run: RunConfig, config: TrainConfig) -> str:
    table = {
        "train": [config.model_dump(mode="json", exclude_none=True)],
        "sampling": run.sampling.model_dump(mode="json"),
        "engine": run.engine.deciding(folder),
        "verify": run.verify.model_dump(mode="json"),
    }
    return f"```toml\n{tomli_w.dumps(table)}```"


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file() or not path.stat().st_size:
        return []
    return [row for _, row in read_rows(path)]


def _table(facts: Mapping[str, Any]) -> str:
    lines = ["| | |", "|---|---|"]
    lines += [f"| {_text(key)} | {_text(_number(value))} |" for key, value in facts.items()]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _code(value: Any) -> str:
    """Return a value as a code span that ends where it should."""
    inside = " ".join(str(value).replace("`", "'").split())
    return f"`{inside}`"


def _text(value: Any) -> str:
    """Return text that Markdown and HTML leave as it is."""
    return re.sub(r"[\\`*_{}\[\]<>|#]", lambda m: f"\\{m.group()}", " ".join(str(value).split()))
