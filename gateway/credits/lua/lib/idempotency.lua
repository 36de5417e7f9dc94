-- A client's idempotency key leads from its hash to the reservation of the request that first came with it.
-- Record: body hash|reservation id, kept in the shard's record hash under 'idem:account:key hash' for 24 h.

local function idempotency_member(name, key_hash)
  return 'idem:' .. name .. ':' .. key_hash
end

-- The reply for a request that came before with this key, or nil: it is new, or the first one was not charged.
local function earlier_request(records, name, key_hash, body_hash) --#on-demand
  local text = redis.call('HGET', records, idempotency_member(name, key_hash))
  if not text then return nil end
  local body, id = string.match(text, '^(.*)|(.*)$')
  if body ~= body_hash then return {'other_body'} end
  local record = stored_record(records, id)
  if not record then return nil end
  if record.state == 'open' then return {'in_progress', id, 0} end
  local cost = parts_sum(record.parts) + record.from_balance + record.written_off
  if record.state == 'expired' and cost == 0 then return nil end
  return {'answered', id, cost}
end

local function remember_request(records, due, name, key_hash, body_hash, id, now) --#on-demand
  local member = idempotency_member(name, key_hash)
  redis.call('HSET', records, member, body_hash .. '|' .. id)
  redis.call('ZADD', due, now + RETENTION_MS, member)
end

-- A request that cost nothing may come again. asked: its record's, which ends with the key's hash.
local function forget_request(records, due, name, asked, id)
  local member = idempotency_member(name, string.match(asked, '[^,]*$'))
  local text = redis.call('HGET', records, member)
  if not text or string.match(text, '[^|]*$') ~= id then return end
  redis.call('HDEL', records, member)
  redis.call('ZREM', due, member)
end
