"""An empty Flask route: what the heartbeat is measured against."""

from flask import Flask

app = Flask(__name__)


@app.post("/sessions/<id>/heartbeat")
def empty(id):
    return ""
