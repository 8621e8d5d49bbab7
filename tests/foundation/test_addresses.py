"""What is an address, and what a server may do while one is read."""

import errno
from pathlib import Path

import fsspec
import pytest
from refusals import sentence_of_error
from servers import serving

from cdm_lightning.data.preparation.staging import expand
from cdm_lightning.foundation import addresses
from cdm_lightning.foundation.addresses import NoAnswer, NoSuchFile, address_of, is_address, open_address, read_address


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr(addresses, "PAUSES", (0.01, 0.01))
    with serving(tmp_path) as server:
        yield server


def test_addresses_and_paths_are_told_apart():
    for text in ("https://host/a", "s3://bucket/a b", "memory://x", "hf://datasets/a/b", "HTTP://host"):
        assert is_address(text)
    for text in ("a/b", "/a//b", "C:/x", "pipe:/bin/cat x", "a://x", "", "pipe:cat http://x", "1://x"):
        assert not is_address(text), text
    assert address_of(Path("https://host/a")) == "https://host/a"  # Path has swallowed a slash
    assert address_of(Path("/a/b")) is None and address_of("HTTPS://Host/A") == "https://Host/A"


@pytest.mark.parametrize(
    "read", [read_address, lambda a: open_address(a).read(), lambda a: open_address(a, True).read()]
)
def test_a_file_is_read_from_a_server_and_from_memory(server, read):
    data = (server.folder / "file").read_bytes()
    fsspec.filesystem("memory").pipe_file("/addresses/file", data)
    assert read(f"{server.address}/file") == read("memory://addresses/file") == data


def test_what_fails_is_tried_again(server):
    server.trouble["/file"] = [500, "cut"]
    assert len(read_address(f"{server.address}/file")) == 25600 and server.asked["/file"] == 3


@pytest.mark.parametrize(
    ("trouble", "kind", "asked", "reason"),
    [
        (500, NoAnswer, 3, "could not be read in 3 tries, the server answers 500 Internal Server Error: once it can"),
        (429, NoAnswer, 3, "could not be read in 3 tries, the server answers 429 Too Many Requests: once it can"),
        ("cut", NoAnswer, 3, "could not be read in 3 tries, ClientPayloadError: "),
        (403, NoSuchFile, 1, "cannot be read: the server answers 403 Forbidden"),
        (404, NoSuchFile, 1, "cannot be read: there is no such file"),
    ],
)
def test_what_does_not_come_is_one_sentence(server, trouble, kind, asked, reason):
    server.trouble["/file"] = [trouble] * 9
    address = f"{server.address}/file"
    sentence = sentence_of_error(lambda: read_address(address), f"{address} {reason}")
    assert server.asked["/file"] == asked and sentence.startswith(address)
    with pytest.raises(kind):
        read_address(address)


def test_pauses_grow(server, monkeypatch):
    waited = []
    monkeypatch.undo()
    monkeypatch.setattr(addresses.time, "sleep", waited.append)
    with pytest.raises(NoAnswer, match="in 5 tries"):
        addresses.several_tries("memory://x", lambda files, path: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    assert len(waited) == 4 and waited == sorted(set(waited)) and 5 < sum(waited) < 30


def test_no_answer_at_all_is_one_sentence(server):
    server.shutdown()
    server.server_close()
    address = f"{server.address}/file"
    for read in (read_address, open_address):  # fsspec calls the second one a missing file
        with pytest.raises(NoAnswer, match="in 3 tries, ClientConnectorError: Cannot connect to host"):
            read(address)


def test_a_protocol_that_cannot_be_opened_is_one_sentence(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install x to access y")

    sentence_of_error(lambda: read_address("nothing://x"), "nothing://x is no address that can be opened", "nothing")
    sentence_of_error(
        lambda: read_address("memory://nothing"), "memory://nothing cannot be read: there is no such file"
    )
    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    for protocol, cure in {"s3": '[s3]"', "gs": '[gs]"', "gcs": '[gs]"', "oss": "Install x to access y"}.items():
        what = cure if protocol == "oss" else f'pip install "cdm_lightning{cure}'
        sentence_of_error(lambda p=protocol: read_address(f"{p}://x"), f"{protocol}://x needs a package", what)


def test_a_chain_of_addresses_is_refused():
    for text in ("simplecache::s3://b/k", "zip://a.tar::https://h/b.zip", "/a.tar::filecache::https://h/{0..1}.tar"):
        for read in (is_address, lambda text: is_address(Path(text)), lambda text: expand(text, [".tar"])):
            sentence_of_error(lambda r=read, t=text: r(t), "is a chain of addresses", "give the plain address")
    assert is_address("http://[::1]:80/zip") and not is_address("tar::zip") and not is_address("a.tar::https://b/zip")
