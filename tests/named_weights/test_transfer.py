"""One file over HTTP: whole or not there, whatever the server and the network do."""

import numpy as np
import pytest
from safetensors.numpy import save

from flowdcn_jax import faults
from flowdcn_jax.errors import UserError
from flowdcn_jax.named_weights import transfer
from tests.named_weights import server as serve

CONTENT = save({"a": np.random.default_rng(0).normal(size=4000).astype(np.float32)})
LIMIT = 10**6


@pytest.fixture
def fetch(server, tmp_path, monkeypatch):
    """fetch(*faults of the transfers to come) -> SHA-256 of what is then at `fetch.path`."""
    monkeypatch.setattr(transfer, "PIECE_BYTES", 2**12)
    server.files["/files/a.safetensors"] = CONTENT

    def fetch_with(*faults_to_come, url=f"{server.url}/files/a.safetensors", **options):
        server.faults = list(faults_to_come)
        options = dict(limit_bytes=LIMIT, progress=False) | options
        return transfer.download(url, fetch_with.path, **options)

    fetch_with.path = tmp_path / "new" / "a.safetensors"
    fetch_with.left = lambda: sorted(path.name for path in fetch_with.path.parent.iterdir())
    return fetch_with


PASSING = {
    "nothing": [],
    "cut": [serve.cut(9000)],
    "cut at once": [serve.cut(0)],
    "cut several times": [serve.cut(5000), serve.cut(4100), serve.cut(4200)],
    "busy": [serve.status(503), serve.status(429)],
    "another range than asked": [serve.cut(9000), serve.range_from(10)],
    "another range than it says": [serve.cut(9000), serve.range_from(10, honest=False)],
    "longer than it is": [serve.declared(50)],
}


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_ends_in_the_whole_file(fetch, server, what):
    fetch(*PASSING[what])
    ranges = [wanted for _, _, wanted in server.requests if wanted]
    assert bool(ranges) == (what not in ("nothing", "cut at once", "busy"))
    assert fetch.path.read_bytes() == CONTENT
    assert fetch.left() == ["a.safetensors"]


def test_a_cut_transfer_goes_on_where_it_stopped(fetch, server):
    with pytest.raises(faults.MachineError, match="closed .* bytes before the end"):
        fetch(*[serve.cut(8192 if i == 0 else 0) for i in range(4)])
    assert fetch.left() == ["a.safetensors.part", "a.safetensors.part.tag"]
    server.requests.clear()
    fetch()  # another call
    assert server.requests == [("GET", "/files/a.safetensors", "bytes=8192-")]
    assert fetch.path.read_bytes() == CONTENT


def test_content_that_changed_between_two_transfers_is_fetched_from_its_beginning(fetch, server):
    with pytest.raises(faults.MachineError):
        fetch(*[serve.cut(8192 if i == 0 else 0) for i in range(4)])
    server.files["/files/a.safetensors"] = save({"a": np.ones(4000, np.float32)})
    fetch()
    assert fetch.path.read_bytes() == server.files["/files/a.safetensors"]


def test_a_server_that_stops_sending_is_given_up(fetch, server):
    stalls = [serve.stalled(9000 * (i == 0), server.ended) for i in range(4)]
    with pytest.raises(faults.MachineError, match="does not answer, or stopped sending") as error:
        fetch(*stalls, silence_s=0.05)
    assert faults.status_of(error.value) == faults.TRY_AGAIN
    assert not fetch.path.exists()


REFUSED = {
    "sends a web page in the place of a file": serve.page,
    "sends a web page in the place of a.safetensors": serve.quiet_page,
    "answers HTTP 404 Not Found; expected a file": serve.status(404),
    "redirects to what is no http address": serve.redirect("file:///etc/hostname"),
    "does not tell how long the file is": serve.without_length,
    "no whole such file": serve.declared(-5),
    "has SHA-256 .*; expected": serve.flipped(3000),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_pass_is_one_line_and_leaves_nothing(fetch, message):
    digest = transfer.hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(UserError, match=message) as error:
        fetch(REFUSED[message], sha256=digest)
    assert "\n" not in str(error.value) and faults.status_of(error.value) == faults.BAD_INPUT
    assert fetch.left() == []


def test_redirects_are_followed_but_not_in_circles(fetch, server):
    fetch(serve.redirect(f"{server.url}/files/a.safetensors"))
    assert fetch.path.read_bytes() == CONTENT
    circle = [serve.redirect(f"{server.url}/files/a.safetensors")] * 9
    with pytest.raises(UserError, match="redirects more than 5 times"):
        fetch(*circle)


def test_more_than_the_limit_is_not_fetched(fetch, server):
    with pytest.raises(UserError, match=f"is {len(CONTENT):,} bytes long; expected 1,000 at most"):
        fetch(limit_bytes=1000)
    assert fetch.left() == []


def test_a_full_disk_is_one_line_before_and_while_it_fills(fetch, monkeypatch):
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: type("", (), {"free": 100}))
    with pytest.raises(faults.MachineError, match="has 0 MB free; expected") as error:
        fetch()
    assert faults.status_of(error.value) == faults.MAKE_ROOM
    monkeypatch.undo()

    def full(url, response):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_pieces", full)
    with pytest.raises(OSError, match="No space left") as error:
        fetch()
    assert faults.status_of(error.value) == faults.MAKE_ROOM
    assert str(fetch.path) in faults.as_line(error.value) and not fetch.path.exists()


def test_without_a_network_the_cause_is_told(fetch):
    with pytest.raises(faults.MachineError, match="cannot be fetched: Connection refused") as error:
        fetch(url="http://127.0.0.1:9/a.safetensors")
    assert faults.status_of(error.value) == faults.TRY_AGAIN and "\n" not in str(error.value)
