-- Make sessions as open.lua does, many in one call, so that a million of them take seconds.
--
-- KEYS     none: a benchmark's own Redis has but one slot's worth of rules
-- ARGV[1]  prefix of the session keys
-- ARGV[2]  number of the first, ARGV[3] number of the last; an id is a number padded to 32 digits
-- Returns  nothing

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for i = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  local key = ARGV[1] .. string.format("%032d", i)
  redis.call("HSET", key, "started", now, "active", now, "idle", 1800000, "end", now + 2592000000, "login", "token")
  redis.call("PEXPIREAT", key, now + 1800000)
end
