"""A heartbeat written the obvious way: redis-py's defaults, a transaction, a token decoded each time."""

import os
from datetime import datetime, timezone

import jwt
import redis
from flask import Flask, jsonify, request

app = Flask(__name__)
client = redis.Redis.from_url(os.environ["REDIS_URL"], max_connections=100)


@app.post("/sessions/<id>/heartbeat")
def heartbeat(id):
    token = request.headers["Authorization"].removeprefix("Bearer ")
    subject = jwt.decode(token, os.environ["JWT_SECRET"], algorithms=["HS256"])["sub"]
    key = f"session:{{{subject}}}:{id}"
    with client.pipeline() as pipe:
        pipe.pexpire(key, 1800_000)
        pipe.pexpiretime(key)
        found, expiry = pipe.execute()
    if not found:
        return jsonify(success=False, error="Session not found or expired"), 404
    at = datetime.fromtimestamp(expiry / 1000, timezone.utc).isoformat(timespec="milliseconds")
    return jsonify(success=True, message="Session updated successfully", newExpiry=at.replace("+00:00", "Z"))
