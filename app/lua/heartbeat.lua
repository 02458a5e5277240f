-- Extend a session and stamp its activity, if it is there. Never creates a key.
--
-- KEYS[1]  session:{owner}:<id>
-- ARGV     none
-- Returns  {new expiry, Redis's time}, both in ms since the epoch; nil where there is no live session

local session = KEYS[1]
local idle, absolute_end = unpack(redis.call("HMGET", session, "idle", "end"))
if not idle then
  -- A write that changes nothing: a replica refuses it, since it cannot know that a session is over.
  redis.call("DEL", session)
  return nil
end

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
absolute_end = tonumber(absolute_end)
-- An instant that has come deletes the key at once, and the HSET below would bring it back without a TTL.
if absolute_end <= now then
  return nil
end

-- PEXPIREAT is the first write: a full Redis refuses scripts that begin with one that takes memory.
redis.call("PEXPIREAT", session, math.min(now + idle, absolute_end))
redis.call("HSET", session, "active", now)
return { redis.call("PEXPIRETIME", session), now }
