-- Read one session.
--
-- KEYS[1]  session:{owner}:<id>
-- ARGV     none
-- Returns  {fields as a flat list of names and values, expiry in ms since the epoch}; nil where there is no live session

local session = KEYS[1]
-- No-op write, so that a replica answers READONLY: it cannot know what has been opened or revoked.
redis.call("HDEL", session, "")
local fields = redis.call("HGETALL", session)
if #fields == 0 then
  return nil
end
return { fields, redis.call("PEXPIRETIME", session) }
