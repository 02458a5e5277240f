-- Extend sessions and stamp their activity, each if it is there. Never creates a key, never shortens a session.
--
-- KEYS     session:{owner}:<id> of one subject, any number
-- ARGV     none
-- Returns  {Redis's time, then for each key its expiry}, all in ms since the epoch. In the place of an expiry stands nil
--          where there is no live session, or an error where it could not be extended: UNREADABLE where the record has no
--          usable idle timeout or absolute end. What is wrong with one key changes nothing for the others.

local call = redis.call
local time = call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)
-- Redis writes each number that it is given with 17 digits, which takes a tenth of a key's time. As text it is written
-- once for the sessions that share it.
local now_text = string.format("%.0f", now)
local expiry, expiry_text

-- A whole number that PEXPIREAT takes, 1 at least; nothing else.
local function whole(text)
  local number = tonumber(text)
  return number and number >= 1 and number < 1e15 and number % 1 == 0 and number
end

local function extend(session)
  local timeouts = call("HMGET", session, "idle", "end")
  if not timeouts[1] then
    -- No-op write, so that a replica answers READONLY: it cannot know that a session is over.
    call("HDEL", session, "")
    if call("EXISTS", session) == 0 then
      return false
    end
  end
  local idle, absolute_end = whole(timeouts[1]), whole(timeouts[2])
  if not (idle and absolute_end) then
    return redis.error_reply("UNREADABLE idle timeout or absolute end")
  end
  local extended = math.min(now + idle, absolute_end)
  if extended ~= expiry then
    expiry, expiry_text = extended, string.format("%.0f", extended)
  end
  -- PEXPIREAT is the first write: a full Redis refuses scripts that begin with one that takes memory. GT, since a clock
  -- that was set back must not shorten a session.
  call("PEXPIREAT", session, expiry_text, "GT")
  call("HSET", session, "active", now_text)
  local held = call("PEXPIRETIME", session)
  if held < 0 then
    -- A key without a TTL, which GT takes for an endless one. It must get one, and ends here if its time is over.
    call("PEXPIREAT", session, expiry_text)
    held = call("PEXPIRETIME", session)
  end
  return held >= 0 and held
end

local replies = { now }
for place, session in ipairs(KEYS) do
  local ok, reply = pcall(extend, session)
  if not ok and type(reply) ~= "table" then -- as in stand-ins for Redis
    reply = redis.error_reply(tostring(reply))
  end
  replies[place + 1] = reply
end
return replies
