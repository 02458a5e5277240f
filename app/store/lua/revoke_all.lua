-- End a subject's sessions, and if so asked refuse new ones to tokens issued before: open.lua looks at the instant.
--
-- KEYS[1]  sessions:{owner}
-- KEYS[2]  sessions-signed-out:{owner}
-- KEYS[3]  prefix of the subject's session keys, session:{owner}:
-- ARGV[1]  id of a session to spare, or nothing
-- ARGV[2]  how long the instant is kept, ms; 0 where no tokens are refused
-- Returns  the number of sessions that were alive
--
-- The sessions are named here, not in KEYS, so that no open slips between: they share the slot through {owner}. The
-- prefix is a key that is never there. A cluster that is moving the slot therefore answers TRYAGAIN, instead of running
-- this on a node to which some of the sessions have not come yet.

local index, signed_out, prefix = KEYS[1], KEYS[2], KEYS[3]
local spared, kept = ARGV[1], tonumber(ARGV[2])

-- No-op write: a full Redis refuses scripts that begin with a write which takes memory.
redis.call("ZREM", index, "")

if kept > 0 then
  local time = redis.call("TIME")
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  -- A clock that was set back lets no one in again.
  local instant = math.max(now, tonumber(redis.call("GET", signed_out)) or 0)
  redis.call("SET", signed_out, instant, "PXAT", math.max(instant + kept, redis.call("PEXPIRETIME", signed_out)))
end

local ended = 0
for _, member in ipairs(redis.call("ZRANGE", index, 0, -1)) do
  if member ~= spared then
    ended = ended + redis.call("DEL", prefix .. member)
    redis.call("ZREM", index, member)
  end
end
local latest = redis.call("ZRANGE", index, -1, -1, "WITHSCORES")
if latest[2] then
  redis.call("PEXPIREAT", index, latest[2])
end
return ended
