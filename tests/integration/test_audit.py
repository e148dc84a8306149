"""The audit of dependencies, by the real pip-audit against a stand-in for the advisory data."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("pip_audit")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["good==1.0", "bad==2.0", "worse==3.0", "pip==1.0"]
HOLES = {"bad": [("PYSEC-1", "2.1")], "worse": [("PYSEC-2", "3.1"), ("PYSEC-3", "")]}


@pytest.fixture
def audit(monkeypatch):
    """The script as a module, on four packages."""
    spec = importlib.util.spec_from_file_location("audit_script", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "installed", lambda: PACKAGES)
    # A stand-in answers at once; a busy machine may take long to start the program.
    for name, limit in (
        ("CONNECTION_S", 30),
        ("FIRST_S", 120.0),
        ("REST_S", 120.0),
        ("SIDE_BY_SIDE", 1),
    ):
        monkeypatch.setattr(module, name, limit)
    return module


class Advisories(BaseHTTPRequestHandler):
    """Answers as OSV does."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = asked["package"]["name"]
        if self.server.hangs:
            time.sleep(20)
        holes = [
            {
                "id": number,
                "summary": "a hole",
                "affected": [
                    {
                        "package": {"name": name, "ecosystem": "PyPI"},
                        "ranges": [
                            {
                                "type": "ECOSYSTEM",
                                "events": [{"introduced": "0"}, *([{"fixed": to}] if to else [])],
                            }
                        ],
                    }
                ],
            }
            for number, to in self.server.holes.get(name, ())
        ]
        data = json.dumps({"vulns": holes} if holes else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that gave up is none of ours."""


@pytest.fixture
def advisories():
    server = QuietServer(("127.0.0.1", 0), Advisories)
    server.holes, server.hangs, server.block_on_close = {}, False, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.options = ["-s", "osv", "--osv-url", f"http://127.0.0.1:{server.server_port}/"]
    yield server
    server.shutdown()
    server.server_close()


def test_sound_packages_pass(audit, advisories, capsys):
    assert audit.main(advisories.options) == 0
    assert capsys.readouterr().out == "audit: 4 packages, 0 known vulnerabilities\n"


def test_known_vulnerabilities_fail_unless_they_are_accepted(
    audit, advisories, capsys, tmp_path, monkeypatch
):
    advisories.holes = HOLES
    assert audit.main(advisories.options) == 1
    said = capsys.readouterr().out
    assert "bad 2.0: PYSEC-1, mended in 2.1" in said
    assert "worse 3.0: PYSEC-3, mended in no version yet" in said
    assert "4 packages, 3 known vulnerabilities" in said
    # The same answers again, without the program.
    rows = audit.audit(PACKAGES, advisories.options)
    monkeypatch.setattr(audit, "audit", lambda packages, options: rows)
    accepted = tmp_path / "audit.toml"
    monkeypatch.setattr(audit, "ACCEPTED", accepted)
    accepted.write_text('PYSEC-1 = "not used"\nPYSEC-2 = "not reached"\nPYSEC-3 = "no mend"\n')
    assert audit.main(advisories.options) == 0
    assert "accepted: no mend" in capsys.readouterr().out
    accepted.write_text('PYSEC-1 = "not used"\n')
    assert audit.main(advisories.options) == 1


def test_without_a_network_it_says_so_and_passes(audit, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    assert audit.main(["-s", "osv", "--osv-url", url]) == 0
    said = capsys.readouterr().out
    assert said.startswith("audit: skipped, the advisory data cannot be reached (")


def test_data_that_never_answers_does_not_hold_the_checks_up(
    audit, advisories, capsys, monkeypatch
):
    advisories.hangs = True
    monkeypatch.setattr(audit, "CONNECTION_S", 1)
    assert audit.main(advisories.options) == 0
    assert "skipped, the advisory data cannot be reached" in capsys.readouterr().out


def test_a_program_that_hangs_is_ended(audit, advisories, capsys, monkeypatch):
    advisories.hangs = True
    monkeypatch.setattr(audit, "CONNECTION_S", 60)
    monkeypatch.setattr(audit, "FIRST_S", 2.0)
    assert audit.main(advisories.options) == 0
    assert "no answer within 2 s" in capsys.readouterr().out


def test_packages_that_nobody_knows_are_named_and_not_called_sound(audit, capsys, monkeypatch):
    """An index of one's own answers for some packages only; for none of them is "skipped"."""

    def ask(packages, limit_s, options):
        rows = []
        for pin in packages:
            name, _, version = pin.partition("==")
            known = name in known_names
            rows.append(
                {"name": name, "version": version, "vulns": []}
                if known
                else {"name": name, "skip_reason": "not found"}
            )
        return rows

    monkeypatch.setattr(audit, "ask", ask)
    known_names = {"pip", "good"}
    assert audit.main([]) == 0
    said = capsys.readouterr().out
    assert said == (
        "audit: 2 packages, 0 known vulnerabilities; not known to the advisory data: bad, worse\n"
    )
    known_names = set()
    assert audit.main([]) == 0
    assert "skipped, the advisory data cannot be reached (not found)" in capsys.readouterr().out


def test_all_that_is_installed_is_asked_about_without_builds_marks(audit, monkeypatch):
    spec = importlib.util.spec_from_file_location("fresh", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    pins = fresh.installed()
    assert len(pins) == len(set(pins)) > 50
    assert any(pin.startswith("torch==") for pin in pins)
    assert not any("+" in pin or pin.startswith("boxed==") for pin in pins)
