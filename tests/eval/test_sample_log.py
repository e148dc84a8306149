"""Sample logs: their folders say what decided the samples, and are written once."""

from __future__ import annotations

from eval.sample_log import log_folder
from eval.sandbox import SandboxConfig


def test_a_logs_settings_are_written_once_and_again_where_they_are_damaged(tmp_path, capsys):
    # With tools: the sandbox's packages are a tuple, which comes back from JSON as a list.
    generation = {"n": 4, "temperature": 0.7, "sandbox": SandboxConfig().model_dump()}
    folder = log_folder(tmp_path, "model", "suite", generation)
    path = folder / "generation.json"
    written = path.read_bytes()
    assert log_folder(tmp_path, "model", "suite", generation) == folder
    assert capsys.readouterr().err == ""
    for damaged in (b"", b'{"n": 5}', written[:-9]):
        path.write_bytes(damaged)
        assert log_folder(tmp_path, "model", "suite", generation) == folder
        assert "missing or damaged" in capsys.readouterr().err
        assert path.read_bytes() == written
