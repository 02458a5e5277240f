# make run       the service on localhost:8000; in-process without REDIS_URL, with a secret of its own without JWT_*
# make token     a token for that service, as in: make token SUBJECT=bob
# make test      style, types and the whole suite
# make quick     the tests on the in-process store and those of the service under gunicorn, in half a minute
# make coverage  the tests once more, and which lines of app/ they do not reach; 93 % is the least
# make faults    the long tests: failovers, slow clients, full disks, the examples' loops, with their figures
# make check     style and types alone
# make bench     the heartbeat against an empty route and a plain one, in about three minutes; needs wrk and redis-server
# make pins      compile requirements*.txt from setup.cfg anew, from releases that are at least 7 days old
# make outdated  which pins have newer releases

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
OLD := session-heartbeat needs Python 3.11 or later; name one as in: make PYTHON=python3.13
NEW_VENV := $(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("$(OLD)")'; $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r
PIN := $(BIN)/pip-compile --quiet --upgrade --generate-hashes --allow-unsafe --no-strip-extras \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --pip-args '--uploaded-prior-to P7D' setup.cfg

.PHONY: help run token test quick coverage faults check bench pins outdated
.ONESHELL:
.SHELLFLAGS := -ec

help:
	@sed -n 's/^# make/make/p' Makefile

# What the environment does not say is taken from .env, line by line as docker does; without REDIS_URL sessions are kept
# in the process, and without a key of an issuer tokens are signed with a secret that is kept in $(VENV).
define DEVELOPMENT
if [ -f .env ]; then
    while IFS= read -r line || [ -n "$$line" ]; do
        name="$${line%%=*}"
        case "$$name" in '' | *[!A-Z0-9_]*) continue ;; esac
        [ -n "$$(printenv "$$name")" ] || export "$$line"
    done < .env
fi
export FLASK_SKIP_DOTENV=1 REDIS_URL="$${REDIS_URL:-memory://}"
store="$${REDIS_TLS_URL:-$$REDIS_URL}"
case "$$store" in memory:*) export WEB_CONCURRENCY=1 ;; esac
if [ -z "$$JWT_SECRET$$JWT_PUBLIC_KEY$$JWT_JWKS_URL" ]; then
    [ -s $(VENV)/secret ] || (umask 077; $(BIN)/python -c 'import secrets; print(secrets.token_hex(32))' > $(VENV)/secret)
    export JWT_SECRET="$$(cat $(VENV)/secret)"
fi
endef
FREE_PORT := import socket, sys; \
	print(next(p for p in range(int(sys.argv[1]), 65536) if socket.socket().connect_ex(("127.0.0.1", p))))

run: $(VENV)/run
	@$(DEVELOPMENT)
	$(BIN)/python wsgi.py
	port="$${PORT:-8000}"
	free="$$($(BIN)/python -c '$(FREE_PORT)' "$$port")"
	if [ "$$port" != "$$free" ]; then echo "Port $$port is in use. Try: make run PORT=$$free"; exit 1; fi
	case "$$store" in
	    memory:*) echo "Sessions are kept in the process and end with it: REDIS_URL is not set" ;;
	    *) echo "Sessions are kept in $${store%%://*}://$${store##*@}" ;;
	esac
	token="<a token of your issuer>"
	if [ -n "$$JWT_SECRET" ]; then token="$$($(BIN)/flask --app wsgi token alice)"; fi
	sessions="http://localhost:$$port/sessions"
	post='curl -s -X POST -H "$$AUTH"'
	printf '%s\n' '' 'Paste this into another terminal:' '' \
	    "AUTH=\"Authorization: Bearer $$token\"" \
	    "OPENED=\$$($$post $$sessions); echo \"\$$OPENED\"" \
	    "ID=\$$(echo \"\$$OPENED\" | cut -d '\"' -f 12)" \
	    "$$post $$sessions/\$$ID/heartbeat; echo" \
	    "curl -s -H \"\$$AUTH\" $$sessions; echo" \
	    "$$post $$sessions/\$$ID/revoke; echo" \
	    "$$post $$sessions/\$$ID/heartbeat; echo" ''
	exec $(BIN)/gunicorn --bind "127.0.0.1:$$port" wsgi:app

token: $(VENV)/run
	@$(DEVELOPMENT)
	$(BIN)/flask --app wsgi token -- "$${SUBJECT:?must be named, as in: make token SUBJECT=bob}"

# The tests start the service a hundred times: compiling it anew each time would take half a minute in all.
test quick coverage faults: export PYTHONDONTWRITEBYTECODE :=

# More workers than cores, because the tests often wait; then what measures time, apart from what takes all of the
# processor.
test: check
	$(BIN)/pytest -n 6 --dist worksteal -m "not timed"
	$(BIN)/pytest -n 3 --dist worksteal -m timed

quick: $(VENV)/dev
	$(BIN)/pytest -n 3 --dist worksteal -m "not timed" -k "fakeredis or test_server"

coverage: $(VENV)/dev
	$(BIN)/pytest -n 3 --dist worksteal --cov

faults: $(VENV)/dev
	$(BIN)/pytest faults -n 4 --dist worksteal -m "not timed" --no-header
	$(BIN)/pytest faults -n 2 --dist worksteal -m timed --no-header

check: $(VENV)/dev
	$(BIN)/ruff format --quiet --check .
	$(BIN)/ruff check --quiet
	$(BIN)/mypy

bench: $(VENV)/dev
	$(BIN)/python bench/run.py $(ARGS)

pins: $(VENV)/dev
	$(PIN) --output-file requirements.txt
	$(PIN) --extra dev --output-file requirements-dev.txt

outdated: $(VENV)/dev
	$(BIN)/pip list --outdated --disable-pip-version-check

# The pins for running stand among those for developing, in the same versions.
$(VENV)/run: requirements.txt
	@$(NEW_VENV)
	echo "Installing into $(VENV), this once. It takes about a minute."
	$(INSTALL) $<
	touch $@

$(VENV)/dev: requirements-dev.txt
	@$(NEW_VENV)
	$(INSTALL) $<
	touch $@ $(VENV)/run
