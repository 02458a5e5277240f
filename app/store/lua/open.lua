-- Open a session unless its subject has as many live ones as it may.
--
-- KEYS[1]  sessions:{owner}
-- KEYS[2]  session:{owner}:<id>
-- ARGV[1]  id
-- ARGV[2]  prefix of the subject's session keys, session:{owner}:
-- ARGV[3]  limit, sessions
-- ARGV[4]  idle timeout, ms
-- ARGV[5]  absolute timeout, ms
-- ARGV[6…] further fields of the hash: name, value, name, value …
-- Returns  {fields as a flat list of names and values, expiry in ms since the epoch}; at the limit the ms until the
--          first of the subject's sessions can expire
--
-- The subject's other sessions are looked at by names made here, not in KEYS: they share the slot through {owner}.

local index, session = KEYS[1], KEYS[2]
local id, prefix, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local idle_timeout, absolute_timeout = tonumber(ARGV[4]), tonumber(ARGV[5])

-- The same id comes twice only when the answer to the first call was lost on the way.
local fields = redis.call("HGETALL", session)
if #fields > 0 then
  return { fields, redis.call("PEXPIRETIME", session) }
end

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local absolute_end = now + absolute_timeout

-- The index is a hint. Only at the limit is it worth asking which of its sessions still live.
local dead = {}
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
  if #members - #dead >= limit then
    return first - now
  end
end

local expiry = math.min(now + idle_timeout, absolute_end)
-- No-op writes: what would be refused below, half-way, is refused here, before anything has changed. ZADD comes first,
-- since a full Redis looks only at a script's first write.
redis.call("ZADD", index, "XX", absolute_end, id)
redis.call("PEXPIREAT", session, expiry)

for _, member in ipairs(dead) do
  redis.call("ZREM", index, member)
end
local latest = tonumber(redis.call("ZRANGE", index, -1, -1, "WITHSCORES")[2] or 0)
redis.call("HSET", session, "started", now, "active", now, "idle", idle_timeout, "end", absolute_end, unpack(ARGV, 6))
redis.call("PEXPIREAT", session, expiry)
redis.call("ZADD", index, absolute_end, id)
redis.call("PEXPIREAT", index, math.max(latest, absolute_end))
return { redis.call("HGETALL", session), expiry }
