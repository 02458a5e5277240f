"""Word of sessions that expire, as Redis sends it: https://redis.io/docs/latest/develop/pubsub/keyspace-notifications/."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple
from urllib.parse import unquote

import redis
from redis.client import PubSub
from redis.exceptions import RedisError, ResponseError

from app.store import session_key
from app.store.connect import Servers
from app.store.errors import StoreUnavailable, described

POLL_SECONDS = 0.05
CHECK_SECONDS = 5.0  # between two questions whether a server is there
CHANNEL = re.compile(r":session:\{(.*)\}:([A-Za-z0-9_-]+)\Z")


class NotEnabled(Exception):
    """Redis is not set to tell of keys that expire."""


class Expiry(NamedTuple):
    """A session that has expired."""

    subject: str
    id: str


def expiries(servers: Servers, subject: str | None = None) -> Iterator[Expiry | str]:
    """Each session that expires from now on, without end; a text in between says that some may be missing.

    Raises NotEnabled, and StoreUnavailable where Redis cannot be reached at the start or refuses to tell.
    """
    keys = "session:{*}:*" if subject is None else session_key(subject, "*")
    watching, missed = False, False
    while True:
        try:
            with ExitStack() as stack:
                clients = servers.clients()
                subscriptions = [stack.enter_context(_subscribe(each, keys)) for each in clients]
                if missed:
                    yield "Watching again. Sessions may have expired unseen."
                watching, missed = True, False
                while set(servers.clients()) == set(clients):
                    yield from _notifications(subscriptions)
                    servers.look_again()  # a cluster's slots can move without trouble here
                raise redis.ConnectionError("other servers are primaries now")
        except (RedisError, OSError) as error:
            if isinstance(error, ResponseError) or not watching:
                raise StoreUnavailable(described(error)) from error
            if not missed:
                yield f"The connection to Redis broke: {described(error)}"
            missed = True
            servers.failed(error)
        time.sleep(1)


def _subscribe(client: redis.Redis, keys: str) -> PubSub:
    try:
        flags = client.config_get("notify-keyspace-events").get("notify-keyspace-events") or ""
    except ResponseError:  # a host that hides its configuration may still tell
        flags = "Kx"
    if "K" not in flags or not set("xA") & set(flags):
        raise NotEnabled
    subscription: PubSub = client.pubsub()
    subscription.psubscribe(f"__keyspace@{client.get_connection_kwargs().get('db') or 0}__:{keys}")
    return subscription


def _notifications(subscriptions: Sequence[PubSub]) -> Iterator[Expiry]:
    """What expires in the next CHECK_SECONDS. Raises redis.ConnectionError where a server is silent for so long."""
    for each in subscriptions:
        each.ping()
    silent, end = set(subscriptions), time.monotonic() + CHECK_SECONDS
    while time.monotonic() < end:
        heard = {each: message for each in subscriptions if (message := each.get_message(timeout=0))}
        silent -= heard.keys()
        for message in heard.values():
            if message["data"] == "expired" and (found := CHANNEL.search(message["channel"])):
                yield Expiry(unquote(found[1]), found[2])
        if not heard:
            time.sleep(POLL_SECONDS)
    if silent:
        raise redis.ConnectionError("no answer")
