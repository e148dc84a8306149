"""Raw rows to problems, chat-formatted and tokenised rows."""

import sys as _sys
from importlib.util import find_spec as _find_spec

import verifiers as _verifiers

# PyPI has another project of the same name; ours is found because commands run from the root.
if getattr(_verifiers, "BOXED_VERIFIERS", None) is None:
    raise ImportError(
        f"`import verifiers` found {_verifiers.__file__}, which is not Boxed's: run from the "
        "repository's root, in the environment that `make setup` makes"
    )
if _find_spec("pydantic") is None:
    raise ImportError(
        f"{_sys.executable} has not the libraries that Boxed needs: run `make setup` in the "
        "repository's root, then `source .venv/bin/activate`"
    )
