"""Stage folders: whose manifest it is, those that were moved elsewhere, who may change one."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import data_prep.versions
from data_prep import run_folder
from data_prep.errors import UserError
from data_prep.jsonl import write_json
from data_prep.manifest import read_manifest, sealed, stage_of
from data_prep.run_folder import Stage
from data_prep.versions import processor


@pytest.mark.parametrize("value", [[{"a": 1}], {"result": "ok"}, {"plan": 1}, {}, 3])
def test_a_manifest_of_another_program_is_nobodys_stage(tmp_path, value):
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    assert stage_of(data) is None


def test_a_stage_that_was_moved_and_linked_is_made_again(tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    elsewhere.mkdir()
    for number in range(4):
        stage = Stage(run, "sft", {"number": number}, {})
        work = stage.begin()
        (work / "out.txt").write_text(str(number))
        final = stage.complete()
        assert stage_of(final / "out.txt") == final
        if number == 0:
            final.rename(elsewhere / "sft")
            final.symlink_to(elsewhere / "sft")
    assert (run / "sft" / "out.txt").read_text() == "3"
    assert not (run / "sft.old").is_symlink()
    assert (elsewhere / "sft" / "out.txt").read_text() == "0"


# Another process that makes the stage "sft" of the run folder argv[1], and stops in the midst of
# its rename until it is told to go on.
SLOW = """
import sys
from pathlib import Path

from data_prep.run_folder import Stage

plain = Path.rename

def slow(self, target):
    if self.name == "sft.partial":
        print("renames", flush=True)
        sys.stdin.readline()
    return plain(self, target)

Path.rename = slow
stage = Stage(sys.argv[1], "sft", {}, {})
with stage:
    (stage.begin() / "out.txt").write_text("made")
    stage.complete()
print("done", flush=True)
"""


def test_a_stage_that_is_being_renamed_is_waited_for_a_moment(root, tmp_path):
    """Of two processes that find it so, the second finds it complete."""
    run = tmp_path / "run"
    words = [sys.executable, "-c", SLOW, str(run)]
    with subprocess.Popen(
        words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "renames\n"
        goes_on = threading.Timer(0.2, other.stdin.write, ["go on\n"])
        goes_on.start()
        try:
            assert Stage(run, "sft", {}, {}).is_complete
        finally:
            goes_on.join()


def test_a_stage_that_is_being_renamed_is_left_to_the_process_that_does_it(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr("data_prep.run_folder.RENAME_S", 0.0)
    run = tmp_path / "run"
    other = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(run)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "renames\n"
        # Its manifest is there and its plan is gone: what a kill at this moment would leave.
        partial = run / "sft.partial"
        before = sorted(path.name for path in partial.iterdir())
        assert before == ["manifest.json", "out.txt"]
        stage = Stage(run, "sft", {}, {})
        with pytest.raises(UserError, match=f"running in process {other.pid}"):
            stage.is_complete  # noqa: B018 - it asks the disk
        assert sorted(path.name for path in partial.iterdir()) == before
        assert not stage.final.exists()
        other.communicate("go on\n")
    assert other.returncode == 0
    assert stage.is_complete
    assert (stage.final / "out.txt").read_text() == "made"


def test_a_rename_that_a_kill_prevented_is_made_up_for_and_locks_nothing(root, tmp_path):
    run = tmp_path / "run"
    words = [sys.executable, "-c", SLOW, str(run)]
    with subprocess.Popen(
        words, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "renames\n"
        other.kill()
    assert Stage(run, "sft", {}, {}).is_complete
    # Nor does this process hold on to it: another one can make the stage anew.
    shutil.rmtree(run / "sft")
    done = subprocess.run(words, cwd=root, input="\n", capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["renames", "done"], done.stderr


def test_a_stage_that_another_process_completed_meanwhile_is_not_made_again(root, tmp_path):
    run = tmp_path / "run"
    stage = Stage(run, "sft", {}, {})
    assert not stage.is_complete
    # While this process loads its models, say.
    subprocess.run(
        [sys.executable, "-c", SLOW, str(run)],
        cwd=root,
        input="\n",
        capture_output=True,
        text=True,
        check=True,
    )
    with stage, pytest.raises(UserError, match="has just completed this stage"):
        stage.begin()
    assert not stage.work.exists()
    assert stage.is_complete
    # One that it does not want is made anew.
    other = Stage(run, "sft", {"another": "plan"}, {})
    with other:
        assert not other.is_complete
        other.begin()
        other.complete()
    assert not (run / "sft" / "out.txt").exists()


def test_a_stage_that_raises_gives_its_lock_back(root, tmp_path):
    run = tmp_path / "run"

    class Lost(Exception):
        pass

    def make() -> None:
        stage = Stage(run, "sft", {}, {})
        with stage:
            (stage.begin() / "part.txt").write_text("half")
            raise Lost

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(Lost):
            make()
        gc.collect()
    assert [str(warning.message) for warning in found] == []
    held = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert not [path for path in held if path.suffix == ".lock"]
    # What was made is kept, and any process may go on with it.
    assert (run / "sft.partial" / "part.txt").read_text() == "half"
    done = subprocess.run(
        [sys.executable, "-c", SLOW, str(run)],
        cwd=root,
        input="\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["renames", "done"], done.stderr
    assert sorted(p.name for p in (run / "sft").iterdir()) == [
        "manifest.json",
        "out.txt",
        "part.txt",
    ]


# A disk without room, as far as this process is concerned.
FULL = """
import resource
import sys

from data_prep.run_folder import Stage

resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    Stage(sys.argv[1], "sft", {}, {}).begin()
except OSError as error:
    print(error.filename)
"""


def test_a_lock_that_cannot_be_written_is_named(root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", FULL, str(tmp_path / "run")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path / "run" / ".sft.lock"), done.stderr
    assert "Warning" not in done.stderr


def test_another_kind_of_processor_goes_on_and_that_is_said(tmp_path, monkeypatch, capsys):
    """Its sums round otherwise; what was made so far is kept, and the manifest names both."""

    def begin_on(kind: str) -> Stage:
        monkeypatch.setattr(run_folder, "processor", lambda: kind)
        with Stage(tmp_path, "sft", {"steps": 3}, {}) as stage:
            (stage.begin() / f"{kind}.txt").write_text("made")
        return stage

    begin_on("A AVX-512")
    begin_on("A AVX-512")
    assert capsys.readouterr().err == ""
    begin_on("A AVX2")
    said = capsys.readouterr().err
    assert "begun on A AVX-512, and goes on on A AVX2: what is sampled or trained" in said
    begin_on("A AVX-512")
    stage = begin_on("A AVX2")
    assert capsys.readouterr().err == ""
    stage.begin()
    manifest = read_manifest(stage.complete())
    assert manifest["versions"]["processor"] == "A AVX-512, A AVX2"
    assert set(manifest["outputs"]) == {"A AVX-512.txt", "A AVX2.txt"}
    # What is complete stays so, wherever it goes.
    monkeypatch.setattr(run_folder, "processor", lambda: "B AVX")
    assert Stage(tmp_path, "sft", {"steps": 3}, {}).is_complete


def test_a_partial_folder_that_names_no_processor_is_gone_on_with(tmp_path, capsys):
    with Stage(tmp_path, "sft", {"steps": 3}, {}) as stage:
        work = stage.begin()
        (work / "part.txt").write_text("made")
        write_json(work / "plan.json", sealed({"format": 2, "plan": stage.plan}))
    with stage:
        stage.begin()
        assert (work / "part.txt").is_file()
        manifest = read_manifest(stage.complete())
    assert manifest["versions"]["processor"] == processor()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: X\nflags\t\t: fpu avx avx2 fma avx512f\n", "X AVX-512"),
        ("processor: 0\nvendor_id : X\nflags : fpu avx avx2 fma\n\nprocessor: 1\n", "X AVX2"),
        ("vendor_id : X\nflags : fpu avx\n", "X AVX"),
        ("vendor_id : X\nflags : fpu sse2\n", "X here"),
        ("Features : fp asimd\n", "here"),
        (None, "here"),
    ],
)
def test_a_processor_is_named_by_its_maker_and_vectors(tmp_path, monkeypatch, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(data_prep.versions, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(data_prep.versions.platform, "machine", lambda: "here")
    assert processor() == expected


def test_a_partial_folder_of_another_plan_says_what_differs_and_begins_again(tmp_path, capsys):
    settings = {"steps": 3, "method": {"kind": "grpo", "clip_high": 0.2}, "a": 1, "b": [1]}
    with Stage(tmp_path, "sft", settings, {}) as stage:
        (stage.begin() / "part.txt").write_text("made")
    changed = {"steps": 3, "method": {"kind": "grpo", "clip_high": 0.28}, "b": [1]}
    with Stage(tmp_path, "sft", changed, {}) as stage:
        assert [path.name for path in stage.begin().iterdir()] == ["plan.json"]
    said = capsys.readouterr().err
    assert "sft.partial: begun with " in said and said.endswith("; the stage begins again\n")
    assert "method.clip_high = 0.2, now 0.28; " in said and "a = 1, now nothing" in said
    assert "steps" not in said
    with Stage(tmp_path, "sft", {str(key): key for key in range(9)}, {}) as stage:
        stage.begin()
    # Five keys are gone and nine have come; the first three are enough.
    assert "more; the stage begins again" in capsys.readouterr().err


def test_a_complete_stage_of_another_plan_says_what_differs_and_is_made_again(tmp_path, capsys):
    long = "x" * 100
    for sources in ([long, "a"], [long, "b"], [f"{long}y", "b"], []):
        with Stage(tmp_path, "sft", {"data": {"sources": sources}}, {}) as stage:
            assert not stage.is_complete
            stage.begin()
            stage.complete()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "sources.1 = 'a', now 'b'; it is made again" in lines[0]
    assert "made with another " in lines[1] and lines[1].endswith("sources.0; it is made again")
    assert "sources.1 = 'b', now nothing" in lines[2]
    with Stage(tmp_path, "sft", {"data": {"sources": []}}, {}) as stage:
        assert stage.is_complete
    assert capsys.readouterr().err == ""
