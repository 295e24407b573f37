"""Downloads from a local server that disconnects, sends wrong data, ignores ranges or is down."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model_repo.checkpoints.download import (
    DownloadRetries,
    WeightsError,
    WeightsUnavailable,
    WrongHash,
    fetch,
)

CONTENT = bytes(range(256)) * 10_000  # more than two chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NO_PAUSE = DownloadRetries(timeout_s=20, pause_s=0)

Response = Callable[["Handler", int], None]  # takes the first byte of the requested range


class Handler(BaseHTTPRequestHandler):
    server: "FileServer"

    def do_GET(self) -> None:
        requested = self.headers.get("Range", "bytes=0-")
        self.server.ranges.append(requested)
        first = int(requested.removeprefix("bytes=").removesuffix("-"))
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
    def __init__(self, *script: Response) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = list(script)  # the last one repeats
        self.ranges: list[str] = []  # of all requests

    def url(self, fragment: str = f"#sha256={SHA256}", path: str = "net.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}{fragment}"


@contextmanager
def serving(*script: Response) -> Iterator[FileServer]:
    with FileServer(*script) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def part(content: bytes = CONTENT, until: int | None = None) -> Response:
    """Supports ranges; disconnects before byte `until`."""

    def respond(handler: Handler, first: int) -> None:
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

    return respond


def whole(content: bytes = CONTENT, until: int | None = None) -> Response:
    """Ignores ranges; disconnects before byte `until`."""

    def respond(handler: Handler, first: int) -> None:
        handler.begin(200, len(content))
        handler.wfile.write(content[:until])

    return respond


def status(code: int) -> Response:
    return lambda handler, _: handler.begin(code, 0)


def redirect(url: str) -> Response:
    return lambda handler, _: handler.begin(302, 0, Location=url)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_file_is_downloaded_once(tmp_path: Path) -> None:
    with serving(part()) as server:
        first = fetch(server.url(), tmp_path, NO_PAUSE)
        assert first.read_bytes() == CONTENT
        assert fetch(server.url(), tmp_path, NO_PAUSE) == first
        assert server.ranges == ["bytes=0-"]
        assert leftovers(tmp_path) == [first.name]


def test_a_download_resumes_after_a_broken_connection(tmp_path: Path) -> None:
    with serving(part(until=1_500_000), part()) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert server.ranges == ["bytes=0-", "bytes=1500000-"]


def test_a_later_call_resumes_a_failed_download(tmp_path: Path) -> None:
    with serving(part(until=1_000_000), status(503)) as server:
        with pytest.raises(WeightsUnavailable):
            fetch(server.url(), tmp_path, NO_PAUSE)
        assert len(server.ranges) == NO_PAUSE.attempts
        assert [name.endswith(".partial") for name in leftovers(tmp_path)] == [True]
        server.script = [part()]
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert server.ranges[-1] == "bytes=1000000-"


def test_a_server_without_ranges_sends_the_whole_file(tmp_path: Path) -> None:
    with serving(whole(until=1_000_000), whole()) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert len(server.ranges) == 2


def test_a_wrong_range_is_discarded(tmp_path: Path) -> None:
    def other_range(handler: Handler, first: int) -> None:
        handler.begin(206, 10, Content_Range=f"bytes 0-9/{len(CONTENT)}")
        handler.wfile.write(CONTENT[:10])

    with serving(part(until=1_000_000), other_range, part()) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert server.ranges == ["bytes=0-", "bytes=1000000-", "bytes=0-"]


def test_parts_of_two_files_are_discarded_and_the_whole_is_downloaded(tmp_path: Path) -> None:
    old = bytes(len(CONTENT))
    with serving(part(old, until=1_000_000), part()) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert server.ranges == ["bytes=0-", "bytes=1000000-", "bytes=0-"]


def test_a_complete_partial_file_is_not_downloaded_again(tmp_path: Path) -> None:
    with serving(part(until=0), part()) as server:
        name = f"{SHA256[:16]}-net.pth"
        (tmp_path / f"{name}.partial").write_bytes(CONTENT)
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_replaced(tmp_path: Path) -> None:
    with serving(part()) as server:
        (tmp_path / f"{SHA256[:16]}-net.pth.partial").write_bytes(CONTENT + b"more")
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT


def test_a_file_with_a_wrong_hash_is_removed(tmp_path: Path) -> None:
    with serving(part(b"something else")) as server:
        with pytest.raises(WrongHash, match=f"has the wrong content.*not {SHA256}.*removed"):
            fetch(server.url(), tmp_path, NO_PAUSE)
        assert leftovers(tmp_path) == []
        assert len(server.ranges) == 1


def test_the_message_about_a_wrong_hash_says_what_was_downloaded(tmp_path: Path) -> None:
    page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
    with serving(part(page)) as server:
        message = "removed; the downloaded file is an HTML page, not a checkpoint; its address may"
        with pytest.raises(WrongHash, match=message):
            fetch(server.url(), tmp_path, NO_PAUSE)


def test_parts_that_never_match_the_hash_are_an_error(tmp_path: Path) -> None:
    with serving(part(bytes(3_000_000), until=1_000_000), part(bytes(3_000_000))) as server:
        with pytest.raises(WrongHash):
            fetch(server.url(), tmp_path, NO_PAUSE)
        assert leftovers(tmp_path) == []


def test_a_damaged_file_in_the_cache_is_downloaded_again(tmp_path: Path) -> None:
    with serving(part()) as server:
        path = fetch(server.url(), tmp_path, NO_PAUSE)
        path.write_bytes(CONTENT[:-1] + b"?")
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT
        assert len(server.ranges) == 2


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_client_error_is_not_retried_and_the_message_says_what_to_do(
    tmp_path: Path, code: int
) -> None:
    with serving(status(code)) as server:
        with pytest.raises(WeightsUnavailable, match=rf"HTTP {code}.*file:PATH.*--or-random"):
            fetch(server.url(), tmp_path, NO_PAUSE)
        assert len(server.ranges) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_temporary_error_is_retried(tmp_path: Path, code: int) -> None:
    with serving(status(code), status(code), part()) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT


def test_a_server_that_is_down_is_an_error(tmp_path: Path) -> None:
    with serving(part()) as server:
        url = server.url()
    with pytest.raises(WeightsUnavailable, match=r"cannot be downloaded: .*refused"):
        fetch(url, tmp_path, NO_PAUSE)


def test_a_server_that_sends_nothing_times_out(tmp_path: Path) -> None:
    release = threading.Event()

    def send_nothing(handler: Handler, first: int) -> None:
        handler.begin(200, len(CONTENT))
        release.wait()

    with serving(send_nothing) as server:
        try:
            with pytest.raises(WeightsUnavailable, match="timed out"):
                fetch(server.url(), tmp_path, DownloadRetries(timeout_s=0.2, attempts=2, pause_s=0))
        finally:
            release.set()


def test_two_concurrent_calls_download_a_file_once(tmp_path: Path) -> None:
    started, release = threading.Event(), threading.Event()

    def held(handler: Handler, first: int) -> None:
        started.set()
        release.wait()
        part()(handler, first)

    paths: list[Path] = []
    with serving(held) as server:
        threads = [
            threading.Thread(target=lambda: paths.append(fetch(server.url(), tmp_path, NO_PAUSE)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        started.wait()
        release.set()
        for thread in threads:
            thread.join()
        assert [path.read_bytes() == CONTENT for path in paths] == [True, True]
        assert len(server.ranges) == 1


def test_a_redirect_is_followed_if_the_full_hash_is_given(tmp_path: Path) -> None:
    with serving(part()) as target, serving(redirect(target.url(""))) as server:
        assert fetch(server.url(), tmp_path, NO_PAUSE).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "fragment", "message"),
    [
        ("net.pth", "", "has no hash: add #sha256="),
        (f"net-{SHA256[:8]}.pth", "", "plain http: add #sha256="),
        ("net.pth", "#sha256=1234", "must end in #sha256= and 64 hexadecimal digits"),
        ("net.pth", f"#md5={SHA256}", "must end in #sha256= and 64 hexadecimal digits"),
        ("", f"#sha256={SHA256}", "must end in a file name"),
        ("..", f"#sha256={SHA256}", "must end in a file name"),
        ("%2e%2e%2f.hidden", f"#sha256={SHA256}", "must end in a file name"),
    ],
)
def test_an_unsafe_url_is_rejected_before_any_request(
    tmp_path: Path, path: str, fragment: str, message: str
) -> None:
    with serving(part()) as server:
        with pytest.raises(WeightsError, match=message):
            fetch(server.url(fragment, path), tmp_path, NO_PAUSE)
        assert server.ranges == []


@pytest.mark.parametrize("url", ["https://[/net.pth", "https://me:secret@host/net.pth"])
def test_an_invalid_url_is_rejected(tmp_path: Path, url: str) -> None:
    with pytest.raises(WeightsError):
        fetch(f"{url}#sha256={SHA256}", tmp_path, NO_PAUSE)


def test_secrets_in_a_url_stay_out_of_the_message(tmp_path: Path) -> None:
    with serving(status(403)) as server:
        url = server.url(f"?token=secret#sha256={SHA256}")
        with pytest.raises(WeightsUnavailable) as caught:
            fetch(url, tmp_path, NO_PAUSE)
        assert "secret" not in str(caught.value)


def test_a_local_file_is_checked_by_the_hash_in_its_name(tmp_path: Path) -> None:
    source = tmp_path / f"net-{SHA256[:8]}.pth"
    source.write_bytes(CONTENT)
    cache = tmp_path / "cache"
    cached = fetch(source.as_uri(), cache, NO_PAUSE)
    assert cached == cache / source.name
    source.unlink()
    assert fetch(source.as_uri(), cache, NO_PAUSE).read_bytes() == CONTENT


def test_a_missing_local_file_is_not_retried(tmp_path: Path) -> None:
    retries = DownloadRetries(pause_s=3600)
    with pytest.raises(WeightsUnavailable, match="No such file"):
        fetch((tmp_path / f"net-{SHA256[:8]}.pth").as_uri(), tmp_path / "cache", retries)


def test_the_message_about_an_unwritable_cache_names_it(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        WeightsUnavailable, match=r"cannot be stored in .*cache: .*; set CONVSERVE_CACHE to"
    ):
        fetch(f"https://host/net.pth#sha256={SHA256}", tmp_path / "cache", NO_PAUSE)


def test_progress_counts_bytes_up_to_the_total(tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    with serving(part(until=1_500_000), part()) as server:
        fetch(server.url(), tmp_path, NO_PAUSE, lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert {total for _, total in calls} == {len(CONTENT)}
    assert calls[-1][0] == len(CONTENT)


@pytest.mark.parametrize("wrong", [{"timeout_s": 0}, {"attempts": 0}, {"pause_s": -1}])
def test_retries_out_of_range_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        DownloadRetries(**wrong)  # type: ignore[arg-type]
