-- Extend a session and stamp its activity, if it is there. Never creates a key, never shortens a session.
--
-- KEYS[1]  session:{owner}:<id>
-- ARGV     none
-- Returns  {expiry, Redis's time}, both in ms since the epoch; nil where there is no live session; an error UNREADABLE
--          where the record has no usable idle timeout or absolute end

local session = KEYS[1]
local idle, absolute_end = unpack(redis.call("HMGET", session, "idle", "end"))
if not idle then
  -- No-op write, so that a replica answers READONLY: it cannot know that a session is over.
  redis.call("HDEL", session, "")
  if redis.call("EXISTS", session) == 0 then
    return nil
  end
end
idle, absolute_end = tonumber(idle), tonumber(absolute_end)
if not (idle and idle >= 1 and absolute_end and absolute_end >= 1) then
  return redis.error_reply("UNREADABLE idle timeout or absolute end")
end

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local expiry = math.min(now + idle, absolute_end)
-- PEXPIREAT is the first write: a full Redis refuses scripts that begin with one that takes memory. GT, since a clock
-- that was set back must not shorten a session.
redis.call("PEXPIREAT", session, expiry, "GT")
redis.call("HSET", session, "active", now)
local held = redis.call("PEXPIRETIME", session)
if held < 0 then
  -- A key without a TTL, which GT takes for an endless one. It must get one, and ends here if its time is over.
  redis.call("PEXPIREAT", session, expiry)
  held = redis.call("PEXPIRETIME", session)
  if held < 0 then
    return nil
  end
end
return { held, now }
