"""What the store raises, besides what is about one session."""


class StoreUnavailable(Exception):
    """Redis is down, slow, failing over, full or read-only: whether the session lives is not known."""


class ConnectionsBusy(StoreUnavailable):
    """More calls at once than a server has connections for; single heartbeats and probes never meet this.

    Redis itself may be well, and nothing was sent to it.
    """


class Unreadable(StoreUnavailable):
    """A session's record, or a subject's index, is not what this service has written.

    Such a session can still be revoked by its id. With such an index list, open and revoke-all fail and change nothing.
    """


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
