-- Operations of an operator (grant, refund, plan change) carry an id of the caller's and happen once.
-- Record: kind|account|parameters, kept in the shard's record hash under 'op:account:id'.

local OPERATION_RETENTION_MS = 90 * 86400000 -- payment providers repeat their calls for days, never for months

-- 'new', 'repeated' or 'conflict' (the id was used for something else)
local function operation_state(records, name, id, kind, parameters)
  local text = redis.call('HGET', records, 'op:' .. name .. ':' .. id)
  if not text then return 'new' end
  return text == table.concat({kind, name, parameters}, '|') and 'repeated' or 'conflict'
end

-- What prepaid credits were charged and not given back yet, nano. Lifetime sums may pass 2^53; their difference is then
-- off by a few nano, in nobody's favour for long.
local function refundable_balance(account_key)
  local sums = redis.call('HMGET', account_key, 'total_spent', 'total_refunded')
  return tonumber(sums[1] or '0') - tonumber(sums[2] or '0')
end

local function write_operation(records, due, name, id, kind, parameters, now)
  local member = 'op:' .. name .. ':' .. id
  redis.call('HSET', records, member, table.concat({kind, name, parameters}, '|'))
  redis.call('ZADD', due, now + OPERATION_RETENTION_MS, member)
end
