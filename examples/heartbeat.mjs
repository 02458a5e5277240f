// Keep a session alive with fetch: SESSIONS_URL (http://localhost:8000/sessions) and TOKEN or TOKEN_COMMAND.

const SHORTEST = 0.2, LONGEST = 86400; // seconds between two requests, whatever the answers say
const FIRST_BACKOFF = 0.5, LAST_BACKOFF = 30;
const ENDED = "Session not found or expired", SIGNED_OUT = "The token was issued before the sign-out";
const FINAL = [400, 404, 405, 413, 415, 422, 431]; // what the service refuses with these it will refuse again
const between = (low, high) => low + Math.random() * (high - low);
const isNumber = (text) => /^\d+$/.test(text);

// Promises why the service refuses for good. newToken() promises a fresh token; it is called after a 401, and at the
// start without a token. deviceName has 1 to 128 characters.
export async function keepAlive(url, token, newToken, deviceName = "device") {
  let id = null, backoff = FIRST_BACKOFF, atOnce = true;
  for (;;) {
    let status, body = {}, headers = new Headers();
    try {
      if (!token) {
        token = await newToken();
        console.log("new token");
      }
      const target = id ? `${url}/${id}/heartbeat` : url;
      const options = { method: "POST", redirect: "manual", signal: AbortSignal.timeout(5000) };
      options.headers = { Authorization: `Bearer ${token}` };
      if (!id) {
        options.headers["Content-Type"] = "application/json";
        options.body = JSON.stringify({ deviceName });
      }
      const answer = await fetch(target, options);
      const text = await answer.text();
      ({ status, headers } = answer);
      if ((headers.get("Content-Type") ?? "").includes("application/json")) body = JSON.parse(text) ?? {};
    } catch (error) { // no network, no answer in time, no token: all of it passes
      status ??= error.cause?.code ?? error.name;
    }
    // Only this sentence ends a session: no other 404, and nothing that something on the way says.
    const sentence = body.success === false && body.error;
    const over = id && status === 404 && sentence === ENDED, refused = status === 401 && newToken;
    const expiresIn = headers.get("Session-Expires-In"), retryAfter = headers.get("Retry-After");
    // Two more beats fit in should one be lost, and a fleet does not beat in step.
    let pause = isNumber(expiresIn) ? Number(expiresIn) / 3 * between(0.8, 1) : 0;
    if (status === 201 && !id && body.session) {
      id = body.session.id;
      console.log(`opened ${id}`);
    } else if (status === 200 && id && isNumber(expiresIn)) {
      console.log(`renewed for ${expiresIn} s`);
      backoff = FIRST_BACKOFF, atOnce = true;
    } else if (status === 401 && headers.get("WWW-Authenticate")?.includes(SIGNED_OUT)) {
      return `stopped after 401: ${SIGNED_OUT}`; // the user has to sign in again
    } else if (sentence && FINAL.includes(status) && !over) {
      return `stopped after ${status}: ${sentence}`;
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

// The rest is for Node. A page leaves it out and calls keepAlive("https://…/sessions", token, newToken, "Browser").
const { exec } = await import("node:child_process");
const { hostname } = await import("node:os");
const { promisify } = await import("node:util");
for (const name of ["SIGINT", "SIGTERM"]) process.once(name, () => process.exit(0));
const { SESSIONS_URL: url, TOKEN: token, TOKEN_COMMAND: command } = process.env;
if (!url || !(token || command)) throw new Error("SESSIONS_URL is needed, and TOKEN or TOKEN_COMMAND");
const askCommand = async () => (await promisify(exec)(command, { timeout: 30000 })).stdout.trim();
const why = await keepAlive(url.replace(/\/$/, ""), token, command ? askCommand : null, hostname().slice(0, 128) || "device");
console.error(why);
process.exit(1);
