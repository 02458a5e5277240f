"""From a URL to a Redis client, with its timeouts and retries said out loud."""

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from app.config import Config

# Per worker. A heartbeat holds one for well under a millisecond; small Redis plans allow 20 clients in all.
POOL_SIZE = 10


def connect(config: Config) -> redis.Redis:
    """The client for `config.redis_url`. It connects when it is first used.

    A call waits half the configured timeout for a connection out of the pool and the whole of it for an answer. One
    that times out is not repeated, since a server that hangs would only hang again.
    """
    if config.redis_url.startswith("memory://"):
        return _in_process()
    pool = redis.BlockingConnectionPool.from_url(
        config.redis_url,
        max_connections=POOL_SIZE,
        timeout=config.redis_timeout_seconds / 2,
        socket_timeout=config.redis_timeout_seconds,
        socket_connect_timeout=config.redis_timeout_seconds,
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
        # RESP3 would come with maintenance notifications, which switch off the check for stale connections.
        protocol=2,
        decode_responses=True,
    )
    return redis.Redis(connection_pool=pool)


def _in_process() -> redis.Redis:
    # Imported here: nobody else needs it, and it brings a Lua interpreter along.
    import fakeredis

    return fakeredis.FakeRedis(server=fakeredis.FakeServer(server_type="redis"), decode_responses=True)
