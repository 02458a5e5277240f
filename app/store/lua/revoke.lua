-- End sessions.
--
-- KEYS[1]  sessions:{owner}
-- KEYS[2…] session:{owner}:<id>, any number
-- ARGV     their ids, in the same order
-- Returns  the number of sessions that were alive

local index = KEYS[1]
local ended = 0
for place, id in ipairs(ARGV) do
  ended = ended + redis.call("DEL", KEYS[place + 1])
  -- The index is only a hint: what is wrong with it must not keep a session alive.
  redis.pcall("ZREM", index, id)
end
local latest = redis.pcall("ZRANGE", index, -1, -1, "WITHSCORES")
if latest[2] then
  redis.pcall("PEXPIREAT", index, latest[2])
end
return ended
