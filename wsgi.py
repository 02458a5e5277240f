"""The entry point: reads the environment and makes the application."""

import os
import sys

from app import create_app
from app.config import Config, ConfigError

try:
    app = create_app(Config.from_env(os.environ))
except ConfigError as error:
    sys.exit(str(error))
