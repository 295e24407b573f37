"""Fetching a checkpoint from a real server that breaks off, lies, knows no ranges or is away."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model_repo.download import Patience, WeightsError, WeightsUnavailable, WrongHash, fetch

CONTENT = bytes(range(256)) * 10_000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = Patience(timeout_s=20, pause_s=0)

Answer = Callable[["Handler", int], None]  # what to do, and from which byte on


class Handler(BaseHTTPRequestHandler):
    server: "FileServer"

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "bytes=0-")
        self.server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self, first)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def begin(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()


class FileServer(ThreadingHTTPServer):
    def __init__(self, *script: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)  # the last one again and again
        self.asked: list[str] = []  # the ranges

    def url(self, fragment: str = f"#sha256={SHA256}", path: str = "net.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}{fragment}"


@contextmanager
def serving(*script: Answer) -> Iterator[FileServer]:
    with FileServer(*script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def part(content: bytes = CONTENT, until: int | None = None) -> Answer:
    """Answers ranges; breaks off before byte `until`."""

    def answer(handler: Handler, first: int) -> None:
        if first >= len(content):
            handler.begin(416, 0)
            return
        last = len(content) - 1
        if first:
            span = f"bytes {first}-{last}/{len(content)}"
            handler.begin(206, len(content) - first, Content_Range=span)
        else:
            handler.begin(200, len(content))
        handler.wfile.write(content[first:until])

    return answer


def whole(content: bytes = CONTENT, until: int | None = None) -> Answer:
    """Knows no ranges."""

    def answer(handler: Handler, first: int) -> None:
        handler.begin(200, len(content))
        handler.wfile.write(content[:until])

    return answer


def status(code: int) -> Answer:
    return lambda handler, _: handler.begin(code, 0)


def leading_to(url: str) -> Answer:
    return lambda handler, _: handler.begin(302, 0, Location=url)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once(tmp_path: Path) -> None:
    with serving(part()) as server:
        first = fetch(server.url(), tmp_path, QUICK)
        assert first.read_bytes() == CONTENT
        assert fetch(server.url(), tmp_path, QUICK) == first
        assert server.asked == ["bytes=0-"]
        assert leftovers(tmp_path) == [first.name]


def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    with serving(part(until=1_500_000), part()) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert server.asked == ["bytes=0-", "bytes=1500000-"]


def test_another_run_goes_on_where_the_last_one_gave_up(tmp_path: Path) -> None:
    with serving(part(until=1_000_000), status(503)) as server:
        with pytest.raises(WeightsUnavailable):
            fetch(server.url(), tmp_path, QUICK)
        assert len(server.asked) == QUICK.attempts
        assert [name.endswith(".partial") for name in leftovers(tmp_path)] == [True]
        server.script = [part()]
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert server.asked[-1] == "bytes=1000000-"


def test_a_server_that_knows_no_ranges_is_asked_for_the_whole(tmp_path: Path) -> None:
    with serving(whole(until=1_000_000), whole()) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert len(server.asked) == 2


def test_another_range_than_asked_for_is_not_glued_on(tmp_path: Path) -> None:
    def other_range(handler: Handler, first: int) -> None:
        handler.begin(206, 10, Content_Range=f"bytes 0-9/{len(CONTENT)}")
        handler.wfile.write(CONTENT[:10])

    with serving(part(until=1_000_000), other_range, part()) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert server.asked == ["bytes=0-", "bytes=1000000-", "bytes=0-"]


def test_pieces_of_two_files_are_thrown_away_and_the_whole_fetched(tmp_path: Path) -> None:
    old = bytes(len(CONTENT))
    with serving(part(old, until=1_000_000), part()) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert server.asked == ["bytes=0-", "bytes=1000000-", "bytes=0-"]


def test_a_run_that_died_before_the_last_step_needs_no_byte_more(tmp_path: Path) -> None:
    with serving(part(until=0), part()) as server:
        name = f"{SHA256[:16]}-net.pth"
        (tmp_path / f"{name}.partial").write_bytes(CONTENT)
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT


def test_a_leftover_longer_than_the_file_does_no_harm(tmp_path: Path) -> None:
    with serving(part()) as server:
        (tmp_path / f"{SHA256[:16]}-net.pth.partial").write_bytes(CONTENT + b"more")
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT


def test_a_file_with_another_hash_is_removed_and_never_used(tmp_path: Path) -> None:
    with serving(part(b"something else")) as server:
        with pytest.raises(WrongHash, match=f"not the file asked for.*not {SHA256}.*removed"):
            fetch(server.url(), tmp_path, QUICK)
        assert leftovers(tmp_path) == []
        assert len(server.asked) == 1


def test_pieces_that_never_fit_are_given_up(tmp_path: Path) -> None:
    with serving(part(bytes(3_000_000), until=1_000_000), part(bytes(3_000_000))) as server:
        with pytest.raises(WrongHash):
            fetch(server.url(), tmp_path, QUICK)
        assert leftovers(tmp_path) == []


def test_a_kept_file_that_was_spoilt_is_fetched_again(tmp_path: Path) -> None:
    with serving(part()) as server:
        path = fetch(server.url(), tmp_path, QUICK)
        path.write_bytes(CONTENT[:-1] + b"?")
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT
        assert len(server.asked) == 2


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_final_and_says_what_to_do(tmp_path: Path, code: int) -> None:
    with serving(status(code)) as server:
        with pytest.raises(WeightsUnavailable, match=rf"HTTP {code}.*file:PATH.*--or-random"):
            fetch(server.url(), tmp_path, QUICK)
        assert len(server.asked) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_server_in_trouble_is_asked_again(tmp_path: Path, code: int) -> None:
    with serving(status(code), status(code), part()) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    with serving(part()) as server:
        url = server.url()
    with pytest.raises(WeightsUnavailable, match=r"can't be fetched: .*refused"):
        fetch(url, tmp_path, QUICK)


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    silent = threading.Event()

    def say_nothing(handler: Handler, first: int) -> None:
        handler.begin(200, len(CONTENT))
        silent.wait()

    with serving(say_nothing) as server:
        try:
            with pytest.raises(WeightsUnavailable, match="timed out"):
                fetch(server.url(), tmp_path, Patience(timeout_s=0.2, attempts=2, pause_s=0))
        finally:
            silent.set()


def test_two_who_want_the_same_file_fetch_it_once(tmp_path: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def held(handler: Handler, first: int) -> None:
        started.set()
        release.wait()
        part()(handler, first)

    paths: list[Path] = []
    with serving(held) as server:
        threads = [
            threading.Thread(target=lambda: paths.append(fetch(server.url(), tmp_path, QUICK)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        started.wait()
        release.set()
        for thread in threads:
            thread.join()
        assert [path.read_bytes() == CONTENT for path in paths] == [True, True]
        assert len(server.asked) == 1


def test_a_redirection_is_followed_when_the_whole_hash_is_known(tmp_path: Path) -> None:
    with serving(part()) as target, serving(leading_to(target.url(""))) as server:
        assert fetch(server.url(), tmp_path, QUICK).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "fragment", "complaint"),
    [
        ("net.pth", "", "comes without a hash: add #sha256="),
        (f"net-{SHA256[:8]}.pth", "", "plain http: add #sha256="),
        ("net.pth", "#sha256=1234", "must end in #sha256= and 64 hexadecimal digits"),
        ("net.pth", f"#md5={SHA256}", "must end in #sha256= and 64 hexadecimal digits"),
        ("", f"#sha256={SHA256}", "does not end in the name of a file"),
        ("..", f"#sha256={SHA256}", "does not end in the name of a file"),
        ("%2e%2e%2f.hidden", f"#sha256={SHA256}", "does not end in the name of a file"),
    ],
)
def test_an_address_that_can_not_be_trusted_is_not_even_asked(
    tmp_path: Path, path: str, fragment: str, complaint: str
) -> None:
    with serving(part()) as server:
        with pytest.raises(WeightsError, match=complaint):
            fetch(server.url(fragment, path), tmp_path, QUICK)
        assert server.asked == []


@pytest.mark.parametrize("url", ["https://[/net.pth", "https://me:secret@host/net.pth"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(WeightsError):
        fetch(f"{url}#sha256={SHA256}", tmp_path, QUICK)


def test_what_may_be_secret_in_an_address_stays_out_of_the_message(tmp_path: Path) -> None:
    with serving(status(403)) as server:
        url = server.url(f"?token=secret#sha256={SHA256}")
        with pytest.raises(WeightsUnavailable) as caught:
            fetch(url, tmp_path, QUICK)
        assert "secret" not in str(caught.value)


def test_a_file_on_disk_is_known_by_the_hash_in_its_name(tmp_path: Path) -> None:
    source = tmp_path / f"net-{SHA256[:8]}.pth"
    source.write_bytes(CONTENT)
    cache = tmp_path / "cache"
    kept = fetch(source.as_uri(), cache, QUICK)
    assert kept == cache / source.name
    source.unlink()
    assert fetch(source.as_uri(), cache, QUICK).read_bytes() == CONTENT


def test_a_file_on_disk_that_is_not_there_is_asked_for_once(tmp_path: Path) -> None:
    impatient = Patience(pause_s=3600)
    with pytest.raises(WeightsUnavailable, match="No such file"):
        fetch((tmp_path / f"net-{SHA256[:8]}.pth").as_uri(), tmp_path / "cache", impatient)


def test_a_cache_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(WeightsUnavailable, match="cache can't keep weights"):
        fetch(f"https://host/net.pth#sha256={SHA256}", tmp_path / "cache", QUICK)


def test_progress_counts_bytes_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    with serving(part(until=1_500_000), part()) as server:
        fetch(server.url(), tmp_path, QUICK, lambda done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {of for _, of in seen} == {len(CONTENT)}
    assert seen[-1][0] == len(CONTENT)


@pytest.mark.parametrize("wrong", [{"timeout_s": 0}, {"attempts": 0}, {"pause_s": -1}])
def test_patience_has_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        Patience(**wrong)  # type: ignore[arg-type]
