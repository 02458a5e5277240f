-- Read the ids in a subject's index, dead ones among them.
--
-- KEYS[1]  sessions:{owner}
-- ARGV     none
-- Returns  a list of ids

local index = KEYS[1]
-- No-op write, so that a replica answers READONLY: it cannot know what has been opened or revoked.
redis.call("ZREM", index, "")
return redis.call("ZRANGE", index, 0, -1)
