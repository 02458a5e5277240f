-- End one session.
--
-- KEYS[1]  session:{owner}:<id>
-- KEYS[2]  sessions:{owner}
-- ARGV[1]  id
-- Returns  1 where the session was alive, 0 where there was none

local session, index = KEYS[1], KEYS[2]
local id = ARGV[1]
local ended = redis.call("DEL", session)
-- The index is only a hint: what is wrong with it must not keep a session alive.
redis.pcall("ZREM", index, id)
local latest = redis.pcall("ZRANGE", index, -1, -1, "WITHSCORES")
if latest[2] then
  redis.pcall("PEXPIREAT", index, latest[2])
end
return ended
