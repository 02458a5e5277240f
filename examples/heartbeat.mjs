// Keep a session alive with fetch: SESSIONS_URL (http://localhost:8000/sessions) and TOKEN or TOKEN_COMMAND.

const SHORTEST = 0.2, LONGEST = 86400; // seconds between two requests, whatever the answers say
const FIRST_BACKOFF = 0.5, LAST_BACKOFF = 30;
const between = (low, high) => low + Math.random() * (high - low);
const isNumber = (text) => /^\d+$/.test(text);

// Never returns. newToken() promises a fresh token; it is called after a 401, and at the start without a token.
export async function keepAlive(url, token, newToken) {
  let id = null, backoff = FIRST_BACKOFF, atOnce = true;
  for (;;) {
    let status, body, headers = new Headers();
    try {
      if (!token) {
        token = await newToken();
        console.log("new token");
      }
      const target = id ? `${url}/${id}/heartbeat` : url, bearer = { Authorization: `Bearer ${token}` };
      const options = { redirect: "manual", signal: AbortSignal.timeout(5000) };
      const answer = await fetch(target, { method: "POST", headers: bearer, ...options });
      body = await answer.text();
      ({ status, headers } = answer);
    } catch (error) { // no network, no answer in time, no token: all of it passes
      status = error.cause?.code ?? error.name;
    }
    // A 404 of something on the way, such as a proxy with nobody behind it, does not end the session.
    const ours = (headers.get("Content-Type") ?? "").includes("application/json");
    const over = ours && status === 404 && id, refused = status === 401 && newToken;
    const expiresIn = headers.get("Session-Expires-In"), retryAfter = headers.get("Retry-After");
    let pause = 0;
    if (ours && status === 201 && !id) {
      id = JSON.parse(body).session.id;
      console.log(`opened ${id}`);
    } else if (status === 200 && id && isNumber(expiresIn)) {
      console.log(`renewed for ${expiresIn} s`);
      // Two more beats fit in should this one be lost, and a fleet does not beat in step.
      pause = Number(expiresIn) / 3 * between(0.8, 1), backoff = FIRST_BACKOFF, atOnce = true;
    } else {
      if (over) {
        id = null;
        console.log("session over, opening a new one");
      } else if (refused) {
        token = null;
      }
      if (atOnce && (over || refused)) {
        atOnce = false; // until the next renewal: should it not help, wait
      } else {
        pause = isNumber(retryAfter) ? Math.max(Number(retryAfter), SHORTEST) : between(SHORTEST, backoff);
        backoff = Math.min(2 * backoff, LAST_BACKOFF);
        console.log(`waiting ${pause.toFixed(1)} s after ${status}`);
      }
    }
    await new Promise((resolve) => setTimeout(resolve, Math.min(Math.max(pause, SHORTEST), LONGEST) * 1000));
  }
}

// The rest is for Node. A page leaves it out and calls keepAlive("https://…/sessions", token, newToken).
const { exec } = await import("node:child_process");
const { promisify } = await import("node:util");
for (const name of ["SIGINT", "SIGTERM"]) process.once(name, () => process.exit(0));
const { SESSIONS_URL: url, TOKEN: token, TOKEN_COMMAND: command } = process.env;
if (!url || !(token || command)) throw new Error("SESSIONS_URL is needed, and TOKEN or TOKEN_COMMAND");
const askCommand = async () => (await promisify(exec)(command, { timeout: 30000 })).stdout.trim();
await keepAlive(url.replace(/\/$/, ""), token, command ? askCommand : null);
