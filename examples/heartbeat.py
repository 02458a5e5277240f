"""Keep a session alive with requests: SESSIONS_URL (http://localhost:8000/sessions) and TOKEN or TOKEN_COMMAND."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import requests

SHORTEST, LONGEST = 0.2, 86400.0  # seconds between two requests, whatever the answers say
FIRST_BACKOFF, LAST_BACKOFF = 0.5, 30.0
ENDED, SIGNED_OUT = "Session not found or expired", "The token was issued before the sign-out"
FINAL = {400, 404, 405, 413, 415, 422, 431}  # what the service refuses with these it will refuse again


def keep_alive(url, token=None, new_token=None, device_name="device"):
    """Returns why the service refuses for good. new_token() gives a fresh token: after a 401, and where there is none.

    device_name has 1 to 128 characters.
    """
    id, backoff, at_once = None, FIRST_BACKOFF, True
    while True:
        try:
            if not token:
                token = new_token()
                print("new token", flush=True)
            target, bearer = f"{url}/{id}/heartbeat" if id else url, {"Authorization": f"Bearer {token}"}
            body = None if id else {"deviceName": device_name}
            answer = requests.post(target, json=body, headers=bearer, timeout=5, allow_redirects=False)
            status, headers = answer.status_code, answer.headers
        except Exception as error:  # no network, no answer in time, no token: all of it passes
            status, headers = type(error).__name__, {}
        body = read(answer) if "application/json" in headers.get("Content-Type", "") else {}
        # Only this sentence ends a session: no other 404, and nothing that something on the way says.
        sentence = body.get("error") if body.get("success") is False else None
        over, refused = id and status == 404 and sentence == ENDED, status == 401 and new_token
        expires_in, retry_after = headers.get("Session-Expires-In", ""), headers.get("Retry-After", "")
        # Two more beats fit in should one be lost, and a fleet does not beat in step.
        pause = int(expires_in) / 3 * random.uniform(0.8, 1) if expires_in.isdecimal() else 0.0
        if status == 201 and not id and "session" in body:
            id = body["session"]["id"]
            print(f"opened {id}", flush=True)
        elif status == 200 and id and expires_in.isdecimal():
            print(f"renewed for {expires_in} s", flush=True)
            backoff, at_once = FIRST_BACKOFF, True
        elif status == 401 and SIGNED_OUT in headers.get("WWW-Authenticate", ""):
            return f"stopped after 401: {SIGNED_OUT}"  # the user has to sign in again
        elif sentence and status in FINAL and not over:
            return f"stopped after {status}: {sentence}"
        else:
            if over:
                id = None
                print("session over, opening a new one", flush=True)
            elif refused:
                token = None
            if at_once and (over or refused):
                at_once = False  # until the next renewal: should it not help, wait
            else:
                pause, backoff = random.uniform(SHORTEST, backoff), min(2 * backoff, LAST_BACKOFF)
                if retry_after.isdecimal():
                    pause = max(int(retry_after), SHORTEST)
                print(f"waiting {pause:.1f} s after {status}", flush=True)
        time.sleep(min(max(pause, SHORTEST), LONGEST))


def read(answer):
    """The JSON object in an answer; an empty one where there is none."""
    try:
        body = answer.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def ask_command():
    """Whatever TOKEN_COMMAND prints is the token."""
    command = os.environ["TOKEN_COMMAND"]
    return subprocess.run(command, shell=True, check=True, stdout=subprocess.PIPE, text=True, timeout=30).stdout.strip()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    url, token, command = (os.environ.get(name) for name in ("SESSIONS_URL", "TOKEN", "TOKEN_COMMAND"))
    if not url or not (token or command):
        sys.exit("SESSIONS_URL is needed, and TOKEN or TOKEN_COMMAND")
    sys.exit(
        keep_alive(url.rstrip("/"), token, ask_command if command else None, socket.gethostname()[:128] or "device")
    )
