"""What the tests of the encoders share."""

import socket

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loading from a folder or a cache must work on a plane; and a test must not wait for a hub."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
