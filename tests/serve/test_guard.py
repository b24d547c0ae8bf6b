"""What the server refuses before it reads a request, and what it never lets a page do."""

from __future__ import annotations

import gzip

import httpx
import pytest

from lamda.cli import main
from lamda.config.errors import UserError
from lamda.dialog.server.main import check_exposure, read_key
from tests.serve.conftest import KEY

AUTHORISED = {"authorization": f"Bearer {KEY}"}


def test_health_needs_no_key_and_figures_do(address):
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/metrics").status_code == 401
    httpx.post(
        f"{address}/v1/completions", json={"model": "random", "prompt": "a", "max_tokens": 3}, headers=AUTHORISED
    )
    message = httpx.get(f"{address}/metrics", headers=AUTHORISED).text
    assert 'lamda_requests_total{key="tests",status="200"}' in message
    assert 'lamda_tokens_total{kind="completion"}' in message
    assert "lamda_request_seconds_count" in message


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "", "[::1", "localhost:80,evil.example", "localhost:x", "x@localhost"],
)
def test_a_name_that_is_not_the_servers_is_refused(address, host):
    assert httpx.get(f"{address}/health", headers={"host": host}).status_code in (400, 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine_are_taken(address, host):
    assert httpx.get(f"{address}/health", headers={"host": host}).status_code == 200


def test_pages_of_others_are_refused_and_its_own_is_not(address):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert httpx.get(f"{address}/health", headers={"origin": origin}).status_code == 403
    own = httpx.get(f"{address}/health", headers={"origin": address})
    assert own.status_code == 200
    assert not [name for name in own.headers if name.startswith("access-control")]


def test_every_answer_confines_a_page(address):
    for path in ("/", "/health", "/no/such/path"):
        headers = httpx.get(f"{address}{path}", headers=AUTHORISED).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"


def test_other_content_and_broken_json_are_refused(address):
    url = f"{address}/v1/completions"
    plain = httpx.post(url, content='{"model": "random"}', headers={**AUTHORISED, "content-type": "text/plain"})
    assert plain.status_code == 415
    packed = {**AUTHORISED, "content-type": "application/json", "content-encoding": "gzip"}
    refused = httpx.post(url, content=gzip.compress(b"{}"), headers=packed)
    assert refused.status_code == 415
    assert "'gzip'" in refused.json()["error"]["message"]
    broken = httpx.post(url, content="{", headers={**AUTHORISED, "content-type": "application/json"})
    assert broken.status_code == 400
    assert "the body" in broken.json()["error"]["message"]


def test_unknown_paths_are_reported_in_the_same_form(address):
    found = httpx.get(f"{address}/v1/embeddings", headers=AUTHORISED)
    assert found.status_code == 404
    assert "/v1/embeddings" in found.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/random", "/metrics", "/"])
def test_head_is_get_without_a_body(address, path):
    found = httpx.head(f"{address}{path}", headers=AUTHORISED)
    assert (found.status_code, found.content) == (200, b"")


def test_a_wrong_method_gets_the_right_ones(address):
    found = httpx.delete(f"{address}/v1/completions", headers=AUTHORISED)
    assert (found.status_code, found.headers["allow"]) == (405, "POST")


def test_half_a_character_is_refused(address):
    body = b'{"model": "random", "prompt": "\\ud800"}'
    found = httpx.post(
        f"{address}/v1/completions", content=body, headers={**AUTHORISED, "content-type": "application/json"}
    )
    assert found.status_code == 400


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_are_not_let_in_without_a_key(host):
    with pytest.raises(UserError, match="--without-key"):
        check_exposure(host, key=None, is_meant=False)
    check_exposure(host, key="k", is_meant=False)
    check_exposure(host, key=None, is_meant=True)


def test_a_port_that_is_taken_is_reported(run, address, capsys):
    port = address.rpartition(":")[2]
    assert main(["serve", str(run), "--port", port]) == 2
    assert "cannot listen on" in capsys.readouterr().err


def test_a_host_that_cannot_be_a_name_is_reported(run, capsys):
    assert main(["serve", str(run), "--host", "a" * 64 + ".b", "--without-key"]) == 2
    assert "cannot listen on" in capsys.readouterr().err


def test_this_machine_needs_no_key():
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.2"):
        check_exposure(host, key=None, is_meant=False)


def test_a_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("LAMDA_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("LAMDA_API_KEY", "from the environment")
    assert read_key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert read_key(tmp_path / "key") == "from a file"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="the key is empty"):
        read_key(tmp_path / "key")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "none")
