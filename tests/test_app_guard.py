"""What the app's server refuses, who may search, and who may enter."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from visearch import cli
from visearch.app.guard import Guard
from visearch.app.sessions import Sessions


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


@pytest.fixture
def client() -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])])
    return TestClient(Guard(app, limit=100))


def chunks(length: int):
    yield from (b"x" for _ in range(length))  # sent without saying how long it will be


@pytest.mark.parametrize("streamed", [False, True])
def test_bodies_are_limited_and_small_ones_arrive_whole(client: TestClient, streamed: bool) -> None:
    for length in (0, 1, 100):
        answer = client.post("/gradio_api/queue/join", content=chunks(length) if streamed else b"x" * length)
        assert (answer.status_code, answer.content) == (200, b"x" * length)
    answer = client.post("/gradio_api/queue/join", content=chunks(101) if streamed else b"x" * 101)
    assert (answer.status_code, answer.text) == (413, "a request may have 100 bytes")


@pytest.mark.parametrize("path", ["upload", "upload?upload_id=1", "file=/etc/passwd", "file/x", "proxy=x", "stream/a"])
def test_no_file_comes_in_or_goes_out(client: TestClient, path: str) -> None:
    assert client.get(f"/gradio_api/{path}").status_code == client.post(f"/gradio_api/{path}").status_code == 403


def test_pages_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/gradio_api/upload")):
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["connect-src"] == "'self'"
        assert not any("http" in sources or "*" in sources for sources in policy.values())
        assert answer.headers["referrer-policy"] == "no-referrer"  # the address holds the prompt


def test_a_user_has_one_search_in_all_pages_together() -> None:
    sessions = Sessions()
    sessions.claim("ann", "page 1")
    sessions.claim("bob", "page 3")
    for page in ("page 1", "page 2"):
        with pytest.raises(ValueError, match="still running"):
            sessions.claim("ann", page)
    assert not sessions.claimed("page 1").is_set()
    sessions.release("page 1")
    sessions.claim("ann", "page 2")


def test_so_many_may_search_or_wait_and_no_more() -> None:
    sessions = Sessions(limit=2)
    sessions.claim("ann", "page 1")
    sessions.claim("bob", "page 2")
    with pytest.raises(ValueError, match="2 searches run or wait already"):
        sessions.claim("cid", "page 3")
    sessions.release("page 1")
    sessions.claim("cid", "page 3")


def test_cancel_and_a_closed_page_end_their_own_search_alone() -> None:
    sessions = Sessions()
    sessions.claim("ann", "page 1")
    sessions.claim("bob", "page 2")
    ann, bob = sessions.claimed("page 1"), sessions.claimed("page 2")
    sessions.cancel("page 3")
    assert not ann.is_set() and not bob.is_set()
    sessions.cancel("page 1")
    assert ann.is_set() and not bob.is_set()
    with pytest.raises(ValueError, match="still running"):
        sessions.claim("ann", "page 1")  # until it has ended
    sessions.release("page 2")
    assert bob.is_set() and sessions.claimed("page 2") is None


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What the command would serve."""
    from visearch.app import page

    calls: list[dict] = []
    monkeypatch.setattr(page, "launch", lambda studio, folders, **how: calls.append({"studio": studio, **how}))
    return calls


@pytest.mark.parametrize("words", [["--share"], ["--host", "0.0.0.0"], ["--host", "::"], ["--host", "example.org"]])
def test_others_are_let_in_only_where_that_is_said(words: list[str], launched: list[dict], capsys) -> None:
    assert cli.main(["app", *words]) == 2
    assert "--auth USER:PASSWORD" in capsys.readouterr().err
    assert cli.main(["app", *words, "--no-auth"]) == 0
    assert cli.main(["app", *words, "--auth", "ann:a:b"]) == 0
    assert [call["auth"] for call in launched] == [[], [("ann", "a:b")]]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_needs_no_password(host: str, launched: list[dict]) -> None:
    assert cli.main(["app", "--host", host]) == 0


@pytest.mark.parametrize("text", ["ann", ":b", "ann:", ":"])
def test_users_are_read_from_a_file_and_broken_ones_are_refused(text: str, tmp_path, launched, capsys) -> None:
    file = tmp_path / "users.txt"
    file.write_text("ann:1\n\nbob:2\n")
    assert cli.main(["app", "--auth", str(file)]) == 0
    assert launched[0]["auth"] == [("ann", "1"), ("bob", "2")]
    file.write_text(f"ann:1\n{text}\n")
    assert cli.main(["app", "--auth", str(file)]) == 2
    assert "one such line a user" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--max-images", "0"], ["--max-seconds", "0.5"], ["--port", "70000"]])
def test_limits_out_of_range_are_refused_before_anything_loads(words: list[str], launched: list[dict], capsys) -> None:
    assert cli.main(["app", *words]) == 2
    assert " ".join(words) in capsys.readouterr().err
    assert not launched


def test_what_the_command_names_comes_first_on_the_page(launched: list[dict]) -> None:
    assert cli.main(["app", "--model", "some/model", "--reward", "jpeg-size", "--max-images", "5"]) == 0
    studio = launched[0]["studio"]
    assert list(studio.models)[:2] == ["some/model", "emoji-64"]
    assert list(studio.rewards)[:2] == ["jpeg-size", "emoji-clip"]
    assert studio.limits.images == 5
