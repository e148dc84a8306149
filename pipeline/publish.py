"""Put a stage's checkpoint on the Hugging Face hub.

    python -m pipeline.publish --run runs/cpu --stage grpo --repo owner/name [--public]

The folder goes up as it lies there: weights, tokenizer, template, card, and the adapter where there
is one. The token is the hub's own (`hf auth login`, or HF_TOKEN); none is ever written anywhere.
A stage with `push_to_hub = "owner/name"` does the same when it is complete, and asks for the token
before it trains.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from data_prep.arguments import Arguments
from data_prep.errors import UserError, command

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_token(repo: str, where: str) -> str:
    """Return the hub's token.

    Raises:
        UserError: The repository's name is no name, or there is no token.
    """
    from huggingface_hub import get_token

    if not REPO.fullmatch(repo):
        raise UserError(where, repr(repo), "a repository such as owner/name", "mend the name")
    token = get_token()
    if not token:
        raise UserError(
            where,
            f"no token for the Hugging Face hub, where {repo} should go",
            "a token with write access",
            "run `hf auth login`, or set HF_TOKEN; the checkpoint stays where it is",
        )
    return token


def publish(folder: Path, repo: str, where: str, private: bool = True) -> str:
    """Upload a model folder; return its address.

    Args:
        folder: A complete model folder.
        repo: "owner/name"; made where it is not there yet.
        where: Names the key or option in errors.
        private: Whether a new repository is private.

    Raises:
        UserError: No folder, no token, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (folder / "config.json").is_file():
        raise UserError(
            str(folder), "no complete model folder", "a checkpoint", "finish the stage first"
        )
    api = HfApi(token=check_token(repo, where), library_name="boxed")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Checkpoint of {folder.parent.name}"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{where}: {repo}",
            f"the hub refused: {str(error).strip().splitlines()[0]}",
            "a token that may write there, and a connection",
            f"mend it, and run python -m pipeline.publish; the checkpoint stays in {folder}",
        ) from None
    return str(done.repo_url)


def main(arguments: list[str]) -> None:
    """Command line."""
    parser = Arguments("python -m pipeline.publish", __doc__)
    parser.add_argument("--run", required=True, type=Path, help="run folder")
    parser.add_argument("--stage", required=True, help="name of a training stage")
    parser.add_argument("--repo", required=True, help="owner/name on the hub")
    parser.add_argument("--public", action="store_true", help="a new repository is public")
    known = parser.parse_args(arguments)
    folder = known.run / known.stage / "checkpoint"
    print(publish(folder, known.repo, "--repo", not known.public), file=sys.stderr)


if __name__ == "__main__":
    command(main)
