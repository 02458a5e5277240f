-- Read sessions.
--
-- KEYS     session:{owner}:<id> of one subject, any number
-- ARGV     none
-- Returns  for each key {fields as a flat list of names and values, expiry in ms since the epoch}, nil where there is no
--          live session, or an error where it could not be read

local function read(session)
  -- No-op write, so that a replica answers READONLY: it cannot know what has been opened or revoked.
  redis.call("HDEL", session, "")
  local fields = redis.call("HGETALL", session)
  return #fields > 0 and { fields, redis.call("PEXPIRETIME", session) }
end

local replies = {}
for place, session in ipairs(KEYS) do
  local ok, reply = pcall(read, session)
  if not ok and type(reply) ~= "table" then -- as in stand-ins for Redis
    reply = redis.error_reply(tostring(reply))
  end
  replies[place] = reply
end
return replies
