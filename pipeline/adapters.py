"""Low-rank adapters by peft: a few trained matrices on a frozen model.

    y = W x + (α/r) B A x          A [r, in], B [out, r] are trained, W is not

    python -m pipeline.adapters --base MODEL --adapter FOLDER --out FOLDER

peft puts its layers into the model that it is given, so the model stays what it was to everybody
else (backbone, output embedding, configuration). Without the adapters it is the reference π_ref:
no second model is loaded. Who needs plain weights, an engine or a checkpoint, is given W + (α/r) BA
under the plain names, made tensor by tensor while the trained model stays as it is.

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from data_prep.arguments import Arguments
from data_prep.config import Config
from data_prep.errors import UserError, command
from pipeline.split import whole

NAME = "default"


class LoraConfig(Config):
    """Which adapters are trained.

    Attributes:
        rank: r; 0 trains the whole model.
        alpha: α.
        dropout: Of the adapters' input; refused where the method samples, since the log-probs of
            the trainer would no longer be the sampler's.
        targets: Names of the layers, such as "q_proj"; empty takes every linear layer but the
            output embedding.
    """

    # All layers and α = 32 are what "LoRA without regret" (Schulman et al. 2025) found to serve.
    rank: int = Field(default=0, ge=0)
    alpha: float = Field(default=32.0, gt=0.0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = ()


class Adapters:
    """The adapters of one model, which is changed in place.

    Args:
        model: A causal LM, or a model of scores, whose head is then trained too.
        config: Rank and the like.
        task: What the model is.
        seed: Of the random A; B is 0, so that training begins at the model as it was.
        resets: Whether the reference will be moved to the policy now and then.
        where: Names the stage in errors.

    Raises:
        UserError: peft is missing, or the targets are not in the model.
    """

    def __init__(
        self,
        model: Any,
        config: LoraConfig,
        task: Literal["policy", "scores"] = "policy",
        seed: int = 0,
        resets: bool = False,
        where: str = "lora",
    ) -> None:
        """Freeze the model and put adapters into it."""
        peft = import_peft(where)
        self.model, self.config = model, config
        ends = [model.get_input_embeddings()]
        if task == "policy":
            ends.append(model.get_output_embeddings())
        names = {n.split(".")[-1] for n, m in model.named_modules() if any(m is e for e in ends)}
        if names & set(config.targets):
            raise UserError(
                f"{where}, key 'lora.targets'",
                f"an embedding among them: {', '.join(sorted(names & set(config.targets)))}",
                "layers between the embeddings: log-probs are made from the plain output embedding",
                "leave it out",
            )
        plan = peft.LoraConfig(
            task_type="CAUSAL_LM" if task == "policy" else "SEQ_CLS",
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets) or "all-linear",
        )
        try:
            # On a CPU, where peft makes A; by default torch would set up every GPU, and warn.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.wrapped = peft.get_peft_model(model, plan)
        except ValueError as error:
            linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if _is_linear(m)})
            raise UserError(
                f"{where}, key 'lora.targets'",
                f"{', '.join(config.targets)}: {error}",
                f"names of linear layers: {', '.join(linear)}",
                "mend the names, or leave them out for all",
            ) from None
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self.frozen: nn.ParameterList | None = None
        if resets:
            self.frozen = nn.ParameterList(
                nn.Parameter(p.detach().clone(), requires_grad=False) for p in self._trained
            )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Let the model be the reference: without adapters, or with those of the last reset."""
        if self.frozen is None:
            with self.wrapped.disable_adapter():
                yield
            return
        self._swap(self.frozen)
        try:
            yield
        finally:
            self._swap(self.frozen)

    def reset_reference(self) -> None:
        """Make the reference what the policy is now."""
        if self.frozen is None:
            raise ValueError("these adapters were not made to be reset")
        with torch.no_grad():
            for kept, trained in zip(self.frozen, self._trained, strict=True):
                kept.copy_(trained)

    def _swap(self, others: nn.ParameterList) -> None:
        for one, two in zip(self._trained, others, strict=True):
            one.data, two.data = two.data, one.data

    def save(self, folder: Path, base: str = "") -> None:
        """Write the adapters as peft does.

        Args:
            folder: Where.
            base: Hub id or name of the model that they belong to.
        """
        self.wrapped.peft_config[NAME].base_model_name_or_path = base or None
        self.wrapped.save_pretrained(str(folder), save_embedding_layers=False)


def plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights by their plain names, adapters merged in.

    The model is not changed. Without adapters this is its `state_dict`.

    Args:
        model: A transformers model, with or without adapters in it.
    """
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if any(p.startswith("lora_") for p in parts) or "original_module" in parts:
            continue
        name = key.replace(f".modules_to_save.{NAME}.", ".").replace(".base_layer.", ".")
        owner = key.removesuffix(".base_layer.weight")
        if owner in layers and owner != key:
            with torch.no_grad():
                value = (value + layers[owner].get_delta_weight(NAME)).to(value.dtype)
        yield name, whole(value)


def import_peft(where: str) -> Any:
    """Return peft.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(
            f"{where}, key 'lora.rank'",
            f"peft cannot be imported: {error}",
            "the package peft",
            "pip install -e '.[lora]', or set lora.rank = 0",
        ) from None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def merge(base: str, adapter: Path, out: Path) -> None:
    """Write the complete model folder of a base model with an adapter merged in.

    Args:
        base: Model folder or hub id that the adapter was trained on.
        adapter: As `Adapters.save` or peft wrote it.
        out: A folder that is not there yet.

    Raises:
        UserError: A folder is missing or in the way, or the adapter is of another model.
    """
    from data_prep.jsonl import read_json
    from pipeline.critic import load_scalar_model
    from pipeline.model import load_model, load_tokenizer, refuse_pickles

    if out.exists():
        raise UserError(str(out), "is there already", "a new folder", "give another --out")
    plan = read_json(adapter / "adapter_config.json")
    refuse_pickles(adapter)
    peft = import_peft("--adapter")
    scores = plan.get("task_type") == "SEQ_CLS"
    model: Any = load_scalar_model(base) if scores else load_model(base)
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            str(adapter), f"does not fit {base}: {error}", "an adapter of this model", "check both"
        ) from None
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(partial)
    load_tokenizer(base).save_pretrained(partial)
    for folder in (Path(base), adapter.parent):
        if (folder / "boxed.json").is_file():
            shutil.copy(folder / "boxed.json", partial / "boxed.json")
    partial.rename(out)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments(
        "python -m pipeline.adapters",
        "Merge an adapter into its base model.\n\n    python -m pipeline.adapters --base MODEL "
        "--adapter runs/x/grpo/checkpoint/adapter --out FOLDER",
    )
    parser.add_argument("--base", required=True, help="model folder or hub id")
    parser.add_argument("--adapter", required=True, type=Path, help="the adapter's folder")
    parser.add_argument("--out", required=True, type=Path, help="where the merged model goes")
    known = parser.parse_args(arguments)
    merge(known.base, known.adapter, known.out)
    print(f"merged: {known.out}", file=sys.stderr)


if __name__ == "__main__":
    command(main)
