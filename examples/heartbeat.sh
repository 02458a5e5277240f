#!/bin/sh
# Keep a session alive with curl: SESSIONS_URL (http://localhost:8000/sessions) and TOKEN or TOKEN_COMMAND.
set -u
url=${SESSIONS_URL:?} token=${TOKEN:-} token_command=${TOKEN_COMMAND:-}
[ -n "$token$token_command" ] || { echo "TOKEN or TOKEN_COMMAND is needed" >&2; exit 1; }
shortest=200 longest=86400000 # ms between two requests, whatever the answers say
first_backoff=500 last_backoff=30000
ended='Session not found or expired' signed_out='The token was issued before the sign-out'
device=$(uname -n | tr -cd 'A-Za-z0-9._-' | cut -c 1-128)

running='' answer=$(mktemp) || exit
trap '[ -z "$running" ] || kill "${!:-}" 2>/dev/null; rm -f "$answer"' EXIT
trap 'exit 0' INT TERM

# The shell hears signals while it waits, but not while a program runs in the foreground. `running` is set before one
# starts in the background: a signal may come before the next line runs.
finish() { wait "$!"; set -- $?; running=''; return "$1"; }
ask() {
    # The token goes in by stdin: arguments are there for everybody to see.
    running=yes
    curl -si --suppress-connect-headers -m 5 -X POST -H @- -w '\n%{http_code}' "$@" >"$answer" <<END &
Authorization: Bearer $token
END
    if finish; then status=$(tail -n 1 "$answer"); else status="curl $?"; fi
}
open_session() { ask "${url%/}" -H 'Content-Type: application/json' -d "{\"deviceName\": \"${device:-device}\"}"; }
is_ours() { grep -qi '^content-type: *application/json' "$answer"; }
# A header's value; nothing where it is no number.
number() {
    tr -d '\r' <"$answer" |
        awk -F ': *' -v name="$1" 'tolower($1) == name && $2 ~ /^[0-9]+$/ && $2 < 1e9 { print $2 + 0; exit }'
}
# What the service refuses with these it will refuse again.
is_final() {
    case "$status" in
        404) [ -z "$id" ] || [ "$sentence" != "$ended" ] ;;
        400 | 405 | 413 | 415 | 422 | 431) ;;
        *) false ;;
    esac
}
between() { echo $(($1 + $(od -An -N4 -tu4 /dev/urandom) % ($2 - $1 + 1))); }

id='' backoff=$first_backoff at_once=yes
while :; do
    status='no token' new='' pause=0
    if [ -z "$token" ]; then
        running=yes
        sh -c "$token_command" >"$answer" &
        if finish; then token=$(cat "$answer"); fi
        [ -z "$token" ] || echo "new token"
    fi
    if [ -z "$token" ]; then :; elif [ -n "$id" ]; then ask "${url%/}/$id/heartbeat"; else open_session; fi
    expires_in=$(number session-expires-in) retry_after=$(number retry-after) sentence=''
    # Only one sentence ends a session: no other 404, and nothing that something on the way says.
    if is_ours; then sentence=$(sed -n 's/^{"success": *false, *"error": *"\([^"]*\)".*/\1/p' "$answer"); fi
    if [ -n "$expires_in" ]; then
        # Two more beats fit in should one be lost, and a fleet does not beat in step.
        third=$((expires_in * 1000 / 3))
        pause=$(between $((third * 4 / 5)) "$third")
    fi
    if [ "$status" = 201 ] && [ -z "$id" ] && is_ours; then
        id=$(sed -n 's/.*"id": *"\([^"]*\)".*/\1/p' "$answer")
        echo "opened $id"
    elif [ "$status" = 200 ] && [ -n "$id" ] && [ -n "$expires_in" ]; then
        echo "renewed for $expires_in s"
        backoff=$first_backoff at_once=yes
    elif [ "$status" = 401 ] && grep -qi "^www-authenticate:.*$signed_out" "$answer"; then
        echo "stopped after 401: $signed_out" >&2 # the user has to sign in again
        exit 1
    elif [ -n "$sentence" ] && is_final; then
        echo "stopped after $status: $sentence" >&2
        exit 1
    else
        if [ "$status" = 404 ] && [ -n "$id" ] && [ "$sentence" = "$ended" ]; then
            id='' new=session
            echo "session over, opening a new one"
        elif [ "$status" = 401 ] && [ -n "$token_command" ]; then
            token='' new=token
        fi
        if [ -n "$at_once" ] && [ -n "$new" ]; then
            at_once='' # until the next renewal: should it not help, wait
        else
            pause=$(between "$shortest" "$backoff")
            [ -z "$retry_after" ] || pause=$((retry_after > 0 ? retry_after * 1000 : shortest))
            backoff=$((backoff * 2 < last_backoff ? backoff * 2 : last_backoff))
            echo "waiting $((pause / 1000)).$((pause % 1000 / 100)) s after $status"
        fi
    fi
    pause=$((pause < shortest ? shortest : pause > longest ? longest : pause))
    running=yes
    sleep "$((pause / 1000)).$(printf %03d $((pause % 1000)))" &
    finish
done
