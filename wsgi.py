"""The entry point: reads the environment and makes the application.

Run as a program it says what is wrong with the environment and with Redis, a line each; the exit code is 1 where that
keeps the service from starting.
"""

import os
import sys

import click

from app import cli, create_app
from app.config import Config, ConfigError
from app.doctor import examine_redis

try:
    app = create_app(Config.from_env(os.environ))
except ConfigError as error:
    if click.get_current_context(silent=True) is None:
        sys.exit(str(error))
    app = cli.commands_only(error)  # `flask --app wsgi`, whose commands say themselves what they lack

if __name__ == "__main__":
    troubles = [finding for finding in examine_redis(app) if finding.level != "ok"]
    for trouble in troubles:
        print(trouble.text)
    sys.exit(any(trouble.fatal for trouble in troubles))
