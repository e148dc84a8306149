"""What a whole run refuses before its first stage: what would otherwise end it hours later.

Nothing is loaded, sampled or written. The evaluation stands above this package, so what it has to
refuse is asked of its module by name, as the run starts it by name.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from data_prep import build, mixture
from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.engines import require_tokens
from pipeline.methods import create_method
from pipeline.plan import check_model_name, check_models, refuse_nonsense
from pipeline.verify import check_checker


def preflight(run: RunConfig) -> None:
    """Refuse a run that cannot end well.

    Raises:
        UserError: The first thing that is wrong, with the key that says so.
    """
    check_out(Path(run.out))
    if run.mixture is not None:
        mixture.check_inputs(run.mixture)
    if run.data is not None:
        build.check_inputs(run.data)
    if run.model.path:
        check_model_name(run.model.path, "model.path")
    for config in run.train:
        method = create_method(config.method)
        refuse_nonsense(run, config, method)
        check_models(run, config, method)
    if run.generate is not None:
        require_tokens(run.engine, "[generate]")
        check_model_name(run.generate.model, "generate.model", run)
    check_checker(run.verify.checker, "verify.checker")
    if run.evaluate is not None:
        importlib.import_module("eval.run").refuse(run)


def check_out(out: Path) -> None:
    """Refuse a run folder that cannot be made or written to.

    Raises:
        UserError: It is a file, or stands where nothing may be written.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(
            f"out = {str(out)!r}", f"{there} is a file", "a folder", "give another --out"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"out = {str(out)!r}",
            f"{there} may not be written to",
            "a folder of one's own",
            "give another --out, or mend the permissions",
        )
