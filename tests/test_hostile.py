"""Parsers of files that someone made to do harm raise our errors alone, at once and within little memory."""

import json
import resource
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hostile import READERS, npy, read_shard, read_tokens
from hypothesis import HealthCheck, given, settings

from flap_stream.errors import CorruptCheckpoint, FlapStreamError, InvalidText
from flap_stream.progress import printable

EXAMPLES = 150


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Half a GiB more than the process has by now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 29), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", READERS)
def test_only_our_errors_come_out(name: str) -> None:
    read, bodies, _ = READERS[name]

    @settings(max_examples=EXAMPLES, deadline=2000, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def check(body: bytes) -> None:
        with suppress(FlapStreamError):
            read(body)

    check()


def test_a_tensor_name_cannot_command_the_terminal() -> None:
    assert printable("tensor \x1b[2J\n\u202e of é") == "tensor \\x1b[2J\\n\\u202e of é"
    assert len(printable("x" * 100_000)) < 1100


@pytest.mark.parametrize("shape", ["(1000000000, 1000)", "(1000000000000, 1)"])
def test_tokens_that_claim_a_terabyte_allocate_nothing(shape: str) -> None:
    with pytest.raises(InvalidText, match="cannot be read"):
        read_tokens(npy(shape, "<i8", bytes(64)))


def test_a_header_that_claims_a_terabyte_allocates_nothing() -> None:
    for claim in (1 << 40, (1 << 64) - 1):
        with pytest.raises(CorruptCheckpoint, match="claims a header"):
            read_shard(struct.pack("<Q", claim) + b"{}")
    tensor = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}
    header = json.dumps({"a": tensor}).encode()
    with pytest.raises(CorruptCheckpoint, match="its header describes"):
        read_shard(struct.pack("<Q", len(header)) + header)


def test_a_tensor_named_twice_is_refused() -> None:
    entry = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = b"{" + entry + b", " + entry + b"}"
    with pytest.raises(CorruptCheckpoint, match="a key occurs twice"):
        read_shard(struct.pack("<Q", len(header)) + header + b"1")
