-- End one session.
--
-- KEYS[1]  session:{owner}:<id>
-- KEYS[2]  sessions:{owner}
-- ARGV[1]  id
-- Returns  1 where the session was alive, 0 where there was none

local session, index = KEYS[1], KEYS[2]
local id = ARGV[1]
redis.call("ZREM", index, id)
local latest = redis.call("ZRANGE", index, -1, -1, "WITHSCORES")
if latest[2] then
  redis.call("PEXPIREAT", index, latest[2])
end
return redis.call("DEL", session)
