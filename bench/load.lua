-- Drives heartbeats with wrk and prints one line of JSON.
--
-- Arguments: a file with a token and a path on each line, used in turn; and, for calls of many, a file with their body.

local requests = {}
local next_request = 0

function init(args)
  local body
  if args[2] then
    body = io.open(args[2]):read("a")
  end
  for line in io.lines(args[1]) do
    local token, path = line:match("(%S+) (%S+)")
    local headers = { Authorization = "Bearer " .. token }
    if body then
      headers["Content-Type"] = "application/json"
    end
    requests[#requests + 1] = wrk.format("POST", path, headers, body)
  end
end

function request()
  next_request = next_request % #requests + 1
  return requests[next_request]
end

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    '{"per_second": %f, "mean_ms": %f, "p50_ms": %f, "p99_ms": %f, "requests": %d, "errors": %d}',
    summary.requests / summary.duration * 1e6,
    latency.mean / 1000,
    latency:percentile(50) / 1000,
    latency:percentile(99) / 1000,
    summary.requests,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
