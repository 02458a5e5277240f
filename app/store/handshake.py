"""The first commands on a new connection."""

from contextlib import suppress

from redis.connection import AbstractConnection
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError


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


def set_up_sentinel(connection: AbstractConnection, credentials: tuple[str, ...]) -> None:
    """Log in to a sentinel, or go on without where it refuses the credentials but needs none."""
    connection.on_connect()
    refusal = None
    if credentials:
        connection.send_command("AUTH", *credentials)
        try:
            connection.read_response(disconnect_on_error=False)
            return
        except (AuthenticationError, ResponseError) as error:
            refusal = error
    try:
        read_reply(connection)
    except AuthenticationError as error:
        raise refusal or error from None
