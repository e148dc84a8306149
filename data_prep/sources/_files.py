"""What the sources that read published files share: paths by split, and a boxed ending."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import model_validator

from data_prep.reading import Drop
from data_prep.schema import Split
from data_prep.sources import SourceConfig
from verifiers import verify
from verifiers.boxes import last_boxes

# What may follow a box that already ends its text: closing of a formula, a full stop.
_CLOSING = re.compile(r"(?:\s|[$.。!]|\\\]|\\\)|\\end\{(?:align|equation|gather|cases)\*?\}|\})*")


class FilesConfig(SourceConfig):
    """Where each split comes from; at least one.

    A local file (JSON lines, a JSON array, Parquet, Arrow or CSV), or a data set through
    `datasets`: "hub" for the source's own hub id and split, or
    "hub:<id>[/<configuration>]:<split>", where the id may also be a local folder in the hub's
    layout ("hub:./folder:train").

    Attributes:
        train: Of the train split; empty for none.
        validation: Of the validation split.
        test: Of the test split.
    """

    train: str = ""
    validation: str = ""
    test: str = ""

    @model_validator(mode="after")
    def _some_file(self) -> FilesConfig:
        if not self.paths():
            raise ValueError("a path for at least one of train, validation, test is expected")
        return self

    def paths(self) -> dict[Split, str]:
        """Return the file (or "hub…") of each split that has one."""
        given: dict[Split, str] = {
            "train": self.train,
            "validation": self.validation,
            "test": self.test,
        }
        return {split: path for split, path in given.items() if path}

    def files(self) -> dict[str, Path]:
        """Return the local files by split."""
        return {
            str(split): Path(path)
            for split, path in self.paths().items()
            if path != "hub" and not path.startswith("hub:")
        }


def boxed(answer: str) -> str:
    r"""Return an answer in a box."""
    return f"\\boxed{{{answer}}}"


def last_box(text: str) -> tuple[str, int] | None:
    r"""Return (content, end) of the last `\boxed{…}` of a text; None where it is not complete."""
    boxes = last_boxes(text)
    if not boxes or boxes[-1].content is None:
        return None
    return boxes[-1].content, boxes[-1].closes


def settle(solution: str, gold: str) -> str:
    r"""Return a solution that ends in a box which a verifier finds equal to the gold.

    Raises:
        Drop: The solution's own box contradicts the gold, or the gold cannot be verified.
    """
    own = final_answer(solution)
    outcome = verify(gold, boxed(gold if own is None else own)).outcome
    if outcome == "incorrect":
        raise Drop("answer_contradicts_box")
    if outcome != "correct":
        raise Drop("answer_not_verifiable")
    return end_in_box(solution, gold)


def final_answer(solution: str) -> str | None:
    r"""Return the answer in the last box of a solution; None where there is none.

    Boxes side by side are one answer (`\boxed{1}$ and $\boxed{2}` is "1, 2"), unless they are
    two spellings of one value (`\boxed{x+1}$ or $\boxed{1+x}`): then it is the last of them.
    """
    contents = [box.content.strip() for box in last_boxes(solution) if box.content is not None]
    if not contents or not all(contents):
        return None
    if all(verify(contents[-1], f"\\boxed{{{other}}}").is_correct for other in contents[:-1]):
        return contents[-1]
    return ", ".join(contents)


def end_in_box(solution: str, answer: str) -> str:
    r"""Return a solution that ends in `\boxed{answer}`.

    A solution whose last box closes the text stays as it is (closing marks of the formula may
    follow), also where that box spells the answer in another way; any other has the box added as
    a last line. So has one that ends in two boxes for one value, which would read as two answers.
    """
    solution = solution.rstrip()
    boxes = last_boxes(solution)
    if boxes and boxes[-1].content and _CLOSING.fullmatch(solution, boxes[-1].closes):
        contents = [(box.content or "").strip() for box in boxes]
        if len(boxes) == 1 or ", ".join(contents) == answer:
            return solution
    return f"{solution}\nThe answer is {boxed(answer)}" if solution else boxed(answer)
