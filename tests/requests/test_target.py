"""Addresses of targets: what ssh would read as anything but a host is refused before anything runs."""

from __future__ import annotations

import pytest

from omgoptim.errors import RequestError
from omgoptim.requests import VERBS, parse
from omgoptim.requests.base import TargetAddress


@pytest.mark.parametrize(
    ("text", "login", "port"),
    [
        ("ssh://edge-box", "edge-box", None),
        ("ssh://pi@192.0.2.7", "pi@192.0.2.7", None),
        ("ssh://pi@board.example:2222", "pi@board.example", 2222),
        ("ssh://[2001:db8::7]:22", "2001:db8::7", 22),
    ],
)
def test_an_address_is_read_and_written_back(text, login, port):
    address = TargetAddress.parse(text)
    assert (address.login, address.port) == (login, port)
    assert str(address) == text


HOSTILE = [
    "ssh://-oProxyCommand=touch /tmp/x",
    "ssh://-oProxyCommand=id",
    "ssh://user@-oProxyCommand=id",
    "ssh://-l@host",
    "ssh://host;id",
    "ssh://host id",
    "ssh://$(id)",
    "ssh://`id`",
    "ssh://host|id",
    "ssh://host&",
    "ssh://'host'",
    "ssh://host/../../etc",
    "ssh://host/path",
    "ssh://host?x",
    "ssh://host#x",
    "ssh://user:secret@host",
    "ssh://a@b@host",
    "ssh://host:0",
    "ssh://host:99999",
    "ssh://host:22x",
    "ssh://host:",
    "ssh://",
    "ssh://[::1",
    "ssh://%n",
    "ssh://höst",
    "SSH://host",
    "http://host",
    "host",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(RequestError, match="is not a target"):
        TargetAddress.parse(text)


@pytest.mark.parametrize("verb", [*VERBS, "doctor"])
def test_every_verb_that_measures_takes_a_target_and_refuses_an_option_as_one(verb):
    needs = {"compare": {"a": "x", "b": "y"}, "doctor": {}, "search": {"model": "net.py:build", "target_size_mb": 1}}
    given = needs.get(verb, {"model": "net.py:build"})
    assert parse(verb, given | {"target": "ssh://edge-box"}).target == "ssh://edge-box"
    with pytest.raises(RequestError, match="is not a target"):
        parse(verb, given | {"target": "ssh://-oProxyCommand=id"})


@pytest.mark.parametrize("beside", [{"runtime": "torch_eager"}, {"runtime": "torch_compile"}, {"device": "cuda"}])
def test_what_a_target_cannot_measure_is_refused(beside):
    with pytest.raises(RequestError, match="cannot be measured on a target"):
        parse("quantize", {"model": "net.py:build", "target": "ssh://edge-box"} | beside)


def test_only_a_target_can_be_cleaned():
    assert parse("doctor", {"target": "ssh://edge-box", "clean": True}).clean
    with pytest.raises(RequestError, match="clean needs a target"):
        parse("doctor", {"clean": True})
