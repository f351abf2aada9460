"""The cache of weights by name: what it gives is what was recorded, or it gives nothing."""

import fcntl
import json
import shutil
import sys
import threading

import pytest

from flowdcn_jax import faults, named_weights
from flowdcn_jax.named_weights import NamedWeightsError
from flowdcn_jax.named_weights import cache as cache_module
from flowdcn_jax.named_weights.transfer import SourceChangedError
from tests.named_weights import server as serve

# The tiny model over HTTP, where nothing tells its hash before; where the table does; at a hub.
SOURCES = {"tiny-url": "/files/tiny.safetensors", "tiny": "/owner/tiny/tiny.safetensors"}


def fetched(name):
    """The bytes of a name's one file."""
    (path,) = named_weights.fetch(name).values()
    return path.read_bytes()


def gets(server):
    return [path for method, path, _ in server.requests if method == "GET"]


def changed(content):
    """Another whole file of the same length."""
    return content[:-4] + b"\0\0\x80?"


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_is_fetched_once_and_its_hash_recorded(cache, server, files, name):
    for _ in range(2):
        assert fetched(name) == files[SOURCES[name]]
    assert len(gets(server)) == 1
    record = json.loads((cache / name / "record.json").read_text())
    (entry,) = record["files"].values()
    assert entry["sha256"] == cache_module.hashlib.sha256(files[SOURCES[name]]).hexdigest()
    assert entry["bytes"] == len(files[SOURCES[name]])
    assert entry.get("commit", serve.COMMIT) == serve.COMMIT and ("url" in entry or "repo" in entry)
    assert named_weights.summary(name) == "fetched"


@pytest.mark.parametrize("name", SOURCES)
def test_a_damaged_file_is_noticed_at_the_next_use_and_fetched_anew(
    cache, server, files, name, caplog
):
    (path,) = named_weights.fetch(name).values()
    path.write_bytes(changed(files[SOURCES[name]]))
    assert fetched(name) == files[SOURCES[name]]
    assert "is damaged and is fetched anew" in caplog.text
    path.unlink()
    assert fetched(name) == files[SOURCES[name]]


@pytest.mark.parametrize("name", SOURCES)
def test_offline_nothing_is_fetched_and_nothing_damaged_is_given(
    cache, server, files, name, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NamedWeightsError, match="nothing is fetched offline"):
        fetched(name)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (path,) = named_weights.fetch(name).values()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.requests.clear()
    assert fetched(name) == files[SOURCES[name]]
    path.write_bytes(changed(files[SOURCES[name]]))
    with pytest.raises(
        NamedWeightsError, match="damaged there, and nothing is fetched offline"
    ) as e:
        fetched(name)
    assert "\n" not in str(e.value) and server.requests == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_changed_is_refused_until_it_is_accepted(cache, server, files, name):
    (path,) = named_weights.fetch(name).values()
    other = server.files[SOURCES[name]] = changed(files[SOURCES[name]])
    assert fetched(name) == files[SOURCES[name]]  # what was fetched first stays
    path.unlink()
    for _ in range(2):
        with pytest.raises(SourceChangedError, match="has SHA-256 .* --accept_change") as error:
            fetched(name)
        assert faults.status_of(error.value) == faults.BAD_INPUT and "\n" not in str(error.value)
    named_weights.fetch(name, accept_change=True)
    assert fetched(name) == other


def test_a_hash_of_the_table_holds_whatever_is_accepted(cache, server, files):
    server.files[SOURCES["tiny-url"]] = changed(files[SOURCES["tiny-url"]])
    for accept in (False, True):
        with pytest.raises(SourceChangedError, match="expected"):
            named_weights.fetch("tiny-told", accept_change=accept)
    assert not (cache / "tiny-told" / "files" / "tiny.safetensors").exists()


def test_what_the_hub_calls_a_file_is_compared_with_what_came(cache, server, files):
    """The client compares lengths alone."""
    server.faults = [serve.flipped(9999)]
    assert fetched("tiny") == files[SOURCES["tiny"]]  # fetched again at once
    assert len(gets(server)) == 2
    shutil.rmtree(cache.parent / "hub")
    server.faults = [serve.flipped(9999)] * 2
    with pytest.raises(SourceChangedError):
        fetched("tiny")
    assert fetched("tiny") == files[SOURCES["tiny"]]


def test_hub_errors_are_one_line_each(cache, server, files, monkeypatch):
    for path, kind in (("/owner/tiny/tiny.safetensors", "no such file"), (None, "repository")):
        server.files = {"/owner/tiny/other": b"x"} if path else {}
        with pytest.raises(NamedWeightsError, match=f"the hub has no.*{kind}|{kind}") as error:
            fetched("tiny")
        assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(faults.MachineError, match="cannot be fetched from http://127.0.0.1:9") as e:
        fetched("tiny")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(NamedWeightsError, match="client is not installed: pip install") as missing:
        fetched("tiny")
    assert not any("\n" in str(each.value) for each in (e, missing))


def test_a_damaged_record_is_named_and_can_be_removed(cache, server, files):
    fetched("tiny-url")
    record = cache / "tiny-url" / "record.json"
    for text in ("{", "[]", '{"files": {"a": {}}, "made": {}}', '{"files": {}, "made": 1}'):
        record.write_text(text)
        with pytest.raises(NamedWeightsError, match="record.json is damaged .* remove tiny-url"):
            fetched("tiny-url")
    assert named_weights.remove("tiny-url") and not named_weights.remove("tiny-url")
    assert fetched("tiny-url") == files[SOURCES["tiny-url"]]


def test_a_file_without_a_record_is_not_used(cache, server, files):
    """Of a process that was killed before it had written the record, say."""
    (path,) = named_weights.fetch("tiny-url").values()
    (cache / "tiny-url" / "record.json").unlink()
    path.write_bytes(b"half")
    assert fetched("tiny-url") == files[SOURCES["tiny-url"]]


def test_a_second_process_waits_and_shares(cache, server, files, capfd):
    """flock counts open files, so a thread stands for a process here."""
    folder = cache / "tiny-url"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = []
        waiting = threading.Thread(target=lambda: found.append(fetched("tiny-url")))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and server.requests == []
    waiting.join(10)
    assert found == [files[SOURCES["tiny-url"]]]
    assert "waiting for another process" in capfd.readouterr().err


@pytest.fixture
def made(cache):
    """made(**options) -> what a file was made into; `made.count`, how often."""

    def make(files, folder):
        made_with.count += 1
        (folder / "inner").mkdir()
        (folder / "inner" / "copy").write_bytes(files["tiny.safetensors"].read_bytes())

    def made_with(**options):
        return named_weights.prepared("tiny-url", make, **options) / "inner" / "copy"

    made_with.count = 0
    return made_with


def test_what_is_made_is_made_once_and_anew_when_damaged(made, server, files, caplog, monkeypatch):
    content = files[SOURCES["tiny-url"]]
    assert made().read_bytes() == content and made().read_bytes() == content
    assert made.count == 1 and named_weights.summary("tiny-url") == "converted"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(made().parent.parent.parent / "files")  # it is enough by itself
    assert made().read_bytes() == content and made.count == 1
    monkeypatch.delenv("HF_HUB_OFFLINE")
    made().write_bytes(content[:-1])
    assert made().read_bytes() == content and made.count == 2
    assert "is damaged and is made anew" in caplog.text
    server.files[SOURCES["tiny-url"]] = changed(content)
    assert made(accept_change=True).read_bytes() == changed(content)


def test_files_of_others_in_what_was_made_are_left_alone(made, files):
    mine = made().with_name("mine")
    mine.write_text("precious")
    assert made().read_bytes() == files[SOURCES["tiny-url"]]
    made().write_bytes(b"")
    with pytest.raises(NamedWeightsError, match="is not made anew, since inner/mine lies there"):
        made()
    assert mine.read_text() == "precious"


def test_making_that_fails_leaves_nothing(cache, server):
    def fail(files, folder):
        (folder / "half").write_bytes(b"half")
        raise KeyError("oh")

    with pytest.raises(KeyError):
        named_weights.prepared("tiny-url", fail)
    assert sorted(path.name for path in (cache / "tiny-url").iterdir()) == [
        ".lock",
        "files",
        "record.json",
    ]


def test_a_cache_that_cannot_be_written_is_named(cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWDCN_CACHE", str(tmp_path / "file"))
    with pytest.raises(NamedWeightsError, match="cannot be made a folder: .*FLOWDCN_CACHE"):
        fetched("tiny-url")


def test_unknown_names_are_answered_with_the_nearest(cache):
    with pytest.raises(NamedWeightsError, match="'tiny_vae' is no name .* nearest are tiny-vae"):
        fetched("tiny_vae")
    with pytest.raises(NamedWeightsError, match="'q' is no name of weights; there are tiny, "):
        fetched("q")
