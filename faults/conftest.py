"""What these tests share with those in tests/."""

from tests.conftest import folder, redis_server

__all__ = ["folder", "redis_server"]
