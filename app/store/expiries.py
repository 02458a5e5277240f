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
from app.store.outages import described
from app.store.runner import StoreUnavailable

POLL_SECONDS = 0.05
CHECK_SECONDS = 5.0  # a connection that is silent for longer is asked whether it is there
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
                subscriptions = [stack.enter_context(_subscribe(each, keys)) for each in servers.clients()]
                if missed:
                    yield "Watching again. Sessions may have expired unseen."
                watching, missed = True, False
                yield from _notifications(servers, subscriptions)
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


def _notifications(servers: Servers, subscriptions: Sequence[PubSub]) -> Iterator[Expiry]:
    """Raises redis.ConnectionError where a server is silent, or a cluster has other primaries now."""
    addresses, silent, checked = set(servers.addresses()), set[PubSub](), time.monotonic()
    while True:
        heard = False
        for each in subscriptions:
            if message := each.get_message(timeout=0):
                heard = True
                silent.discard(each)
                if message["data"] == "expired" and (found := CHANNEL.search(message["channel"])):
                    yield Expiry(unquote(found[1]), found[2])
        if time.monotonic() - checked >= CHECK_SECONDS:
            if silent or addresses != set(servers.addresses()):
                raise redis.ConnectionError("no answer" if silent else "other servers are primaries now")
            for each in subscriptions:
                each.ping()
            silent, checked = set(subscriptions), time.monotonic()
            # A cluster's slots can move without trouble here: this has it look where they are.
            servers.failed(redis.ConnectionError())
        if not heard:
            time.sleep(POLL_SECONDS)
