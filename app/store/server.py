"""One server: the first commands on a connection to it, its address, and what it is to have all keys on it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.connection import AbstractConnection
from redis.exceptions import AskError, NoPermissionError, ReadOnlyError


def set_up(connection: AbstractConnection) -> None:
    """Log in and choose the database, as redis-py does by itself, and read a reply."""
    connection.on_connect()
    read_reply(connection)


def read_reply(connection: AbstractConnection) -> None:
    """Read the reply to a first command, for which no right is needed, unless that to AUTH has been read.

    A server that takes no more clients, or none from here, says so instead. Unread it would become redis-py's
    "Connection not ready", and so would TLS session tickets.
    """
    if not connection.password:
        connection.send_command("PING")
        with suppress(NoPermissionError):
            connection.read_response()


def address_of(client: redis.Redis) -> str:
    """A server's address for logs: host and port, or a socket's path."""
    options = client.get_connection_kwargs()
    return options.get("path") or f"{options['host']}:{options.get('port', 6379)}"


class OnePrimary:
    """One server at a fixed address: all keys are there."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def client_for(self, key: str) -> redis.Redis:
        """The client of the server that holds a key."""
        return self.clients()[0]

    def clients(self) -> Sequence[redis.Redis]:
        """The clients of all servers that take writes."""
        return [self._client]

    def follow(self, redirection: AskError, command: Sequence[Any]) -> Any:
        """Only a cluster redirects."""
        raise redirection

    def failed(self, error: Exception) -> None:
        """Take notice of trouble with a server."""
        if isinstance(error, ReadOnlyError):
            # The primary has moved to another host under the same name; only a new connection finds it. Connections
            # in use are left alone: their users meet the same error and close them.
            for client in self.clients():
                client.connection_pool.disconnect(inuse_connections=False)
