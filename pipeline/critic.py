"""A scalar at every state: the critic V of PPO, and the score of reward models.

The folder of a trained one is a transformers sequence-classification model with one label
(`…ForSequenceClassification`), whose `score` is a linear map of the last hidden states; so
transformers and vLLM load it as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from data_prep.errors import UserError
from pipeline.policy import States, hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipeline.batch import Layout


class Critic(nn.Module):
    """V_φ: a linear head on a backbone of its own, or on the policy's states.

    Args:
        head: [H] → [1].
        backbone: Computes the states; None takes the policy's.
    """

    def __init__(self, head: nn.Linear, backbone: nn.Module | None = None) -> None:
        """Keep the parts."""
        super().__init__()
        self.head, self.backbone = head, backbone

    def forward(
        self, layout: Layout, policy_states: States | None = None, autocast: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the values of the states before and after each token, [T] each, in float32.

        Args:
            layout: What to run, where the critic has its own backbone.
            policy_states: What to read, where it has none.
            autocast: Whether the backbone's products run in bfloat16.
        """
        if self.backbone is not None:
            policy_states = hidden_states(self.backbone, layout, autocast)
        if policy_states is None:
            raise ValueError("a critic without a backbone reads the policy's states")
        dtype = self.head.weight.dtype
        before, after = policy_states.before.to(dtype), policy_states.after.to(dtype)
        return self.head(before).squeeze(-1), self.head(after).squeeze(-1)


def value_head(policy: PreTrainedModel) -> Critic:
    """Return a critic that reads the policy's states; it says 0 until it has learnt."""
    parameter = next(policy.parameters())
    width = policy.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, bias=False, device=parameter.device, dtype=parameter.dtype)
    nn.init.zeros_(head.weight)
    return Critic(head)


def load_scalar_model(
    path: str | Path, dtype: str = "float32", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a model with one scalar a state: a reward model, or a causal LM with a new head.

    A new head is all zeros: rewards start equal, and a Bradley–Terry loss at log 2.

    Args:
        path: Folder or hub id; its weights are safetensors.
        dtype: Precision of its parameters.
        trust_remote_code: Whether Python files that come with it may run.

    Raises:
        UserError: There is no such model, its files are damaged, its weights are pickled, it
            needs code of its own, or it has several labels.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    from pipeline.model import in_own_precision, refuse_pickles, torch_dtype

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    refuse_pickles(path)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        trained = any("SequenceClassification" in a for a in config.architectures or ())
        if trained and config.num_labels != 1:
            raise UserError(
                str(path),
                f"a classifier of {config.num_labels} labels",
                "one label",
                "give a reward model, or a causal LM",
            )
        logging.set_verbosity_error()  # that the head is new is meant
        model = AutoModelForSequenceClassification.from_pretrained(
            str(path),
            num_labels=1,
            dtype=torch_dtype(dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except UserError:
        raise
    except Exception as error:  # the loaders raise everything from OSError to SafetensorError
        raise UserError(
            str(path),
            f"this model cannot be loaded: {error}",
            "a folder with config.json and safetensors, or a hub id that can be reached",
            "check the path, or fetch the model first",
        ) from error
    finally:
        logging.set_verbosity(level)
    if not trained:
        nn.init.zeros_(model.score.weight)
    return in_own_precision(model)


def critic_of(model: PreTrainedModel) -> Critic:
    """Return a scalar model's parts as a critic; they share their parameters with it."""
    scalar: Any = model
    # Beside adapters the head is trained as a copy that peft keeps.
    copies = getattr(scalar.score, "modules_to_save", None)
    head = scalar.score if copies is None else copies["default"]
    return Critic(head, scalar.base_model)
