-- Open a session unless its subject has as many live ones as it may, or the token was issued before the sign-out.
--
-- KEYS[1]  sessions:{owner}
-- KEYS[2]  session:{owner}:<id>
-- KEYS[3]  sessions-signed-out:{owner}
-- ARGV[1]  id
-- ARGV[2]  prefix of the subject's session keys, session:{owner}:
-- ARGV[3]  limit, sessions
-- ARGV[4]  idle timeout, ms
-- ARGV[5]  absolute timeout, ms
-- ARGV[6]  when the token was issued, whole seconds since the epoch; nothing where it is not one of the subject's
-- ARGV[7]  at the limit: refuse, or replace a silent session
-- ARGV[8…] further fields of the hash: name, value, name, value …
-- Returns  {fields as a flat list of names and values, expiry in ms since the epoch, id of the session that made room if
--          any did}; at the limit the ms until the first of the subject's sessions can expire; SIGNED_OUT where the token
--          is from before the sign-out
--
-- The subject's other sessions are looked at by names made here, not in KEYS: they share the slot through {owner}.

local index, session, signed_out = KEYS[1], KEYS[2], KEYS[3]
local id, prefix, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local idle_timeout, absolute_timeout, issued_at = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local policy = ARGV[7]

-- The same id comes twice only when the answer to the first call was lost on the way.
local fields = redis.call("HGETALL", session)
if #fields > 0 then
  return { fields, redis.call("PEXPIRETIME", session) }
end

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local absolute_end = now + absolute_timeout

-- EXISTS first: a Redis user of before this key was thought of may have no right to GET.
if issued_at and redis.call("EXISTS", signed_out) == 1 then
  local instant = tonumber(redis.call("GET", signed_out))
  if not instant then
    return redis.error_reply("UNREADABLE instant of the sign-out")
  end
  -- Tokens say whole seconds: one of the same second may be from before.
  if issued_at <= math.floor(instant / 1000) then
    return "SIGNED_OUT"
  end
end

-- A device beats at a third of its idle timeout: one that is silent for more than half has missed a beat. Where none has,
-- devices must not push each other out. Sessions that cannot be read are passed over.
local function most_silent(members)
  local found, longest = nil, 0.5
  for _, member in ipairs(members) do
    local beat = redis.pcall("HMGET", prefix .. member, "active", "idle")
    local active, idle = tonumber(beat[1]), tonumber(beat[2])
    if active and idle and (now - active) / idle > longest then
      found, longest = member, (now - active) / idle
    end
  end
  return found
end

-- The index is a hint. Only at the limit is it worth asking which of its sessions still live.
local dead, replaced = {}, nil
if redis.call("ZCARD", index) >= limit then
  local members = redis.call("ZRANGE", index, 0, -1)
  local first = absolute_end
  for _, member in ipairs(members) do
    local expiry = redis.call("PEXPIRETIME", prefix .. member)
    if expiry == -2 then
      dead[#dead + 1] = member
    elseif expiry >= 0 then
      first = math.min(first, expiry)
    end
  end
  local excess = #members - #dead - limit
  if excess == 0 and policy == "replace" then
    replaced = most_silent(members)
  end
  if excess >= 0 and not replaced then
    return first - now
  end
end

local expiry = math.min(now + idle_timeout, absolute_end)
-- No-op writes: what would be refused below, half-way, is refused here, before anything has changed. ZADD comes first,
-- since a full Redis looks only at a script's first write.
redis.call("ZADD", index, "XX", absolute_end, id)
redis.call("PEXPIREAT", session, expiry)
if replaced then
  redis.call("DEL", session)
  redis.call("ZREM", index, id)
end

for _, member in ipairs(dead) do
  redis.call("ZREM", index, member)
end
local latest = tonumber(redis.call("ZRANGE", index, -1, -1, "WITHSCORES")[2] or 0)
redis.call("HSET", session, "started", now, "active", now, "idle", idle_timeout, "end", absolute_end, unpack(ARGV, 8))
redis.call("PEXPIREAT", session, expiry)
redis.call("ZADD", index, absolute_end, id)
redis.call("PEXPIREAT", index, math.max(latest, absolute_end))
if replaced then
  redis.call("DEL", prefix .. replaced)
  redis.call("ZREM", index, replaced)
end
return { redis.call("HGETALL", session), expiry, replaced }
