"""One server: the first commands on a connection to it, its address, and servers that hold all keys."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import redis
from redis.connection import AbstractConnection
from redis.exceptions import AskError, NoPermissionError, ReadOnlyError


def set_up(connection: AbstractConnection) -> None:
    """Log in and choose the database, as redis-py does by itself, and `ping`."""
    connection.on_connect()
    ping(connection)


def ping(connection: AbstractConnection) -> None:
    """Send PING and read what comes, so that a refusal of the connection is raised in the server's own words.

    Such are too many clients, or none from here. Unread it would become redis-py's "Connection not ready", and so would
    TLS session tickets. With a password the reply to AUTH has been read. A user may lack the right to PING.
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
    """One server that has all keys; here always at the same address."""

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
        """Note trouble with a server."""
        if isinstance(error, ReadOnlyError):
            # The primary has moved to another host under the same name; only a new connection finds it. Connections
            # in use are left alone: their users meet the same error and close them.
            for client in self.clients():
                client.connection_pool.disconnect(inuse_connections=False)

    def look_again(self) -> None:
        """Only a cluster's keys move without trouble."""
