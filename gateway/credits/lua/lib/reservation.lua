-- Reservation records: one text per id in the shard's record hash; the shard's due set says when the reaper
-- must look at it next (an open one: when its lease ends; an ended one: when it may be forgotten).
--
-- open, expired:   state|account|epoch|from_allowance|from_balance|payg|rate|payg allowed|created|expires|asked|key|model
-- settled, voided: state|account|from_allowance|from_balance|written_off

local RETENTION_MS = 86400000 -- ended records answer repeats for 24 h

local function read_record(records, id)
  local text = redis.call('HGET', records, id)
  if not text then return nil end
  local parts = {}
  for part in string.gmatch(text .. '|', '([^|]*)|') do parts[#parts + 1] = part end
  local record = {state = parts[1], account = parts[2]}
  if record.state == 'open' or record.state == 'expired' then
    record.epoch = tonumber(parts[3])
    record.from_allowance = tonumber(parts[4])
    record.from_balance = tonumber(parts[5])
    record.payg = tonumber(parts[6])
    record.rate = tonumber(parts[7])
    record.payg_allowed = parts[8] == '1'
    record.created = tonumber(parts[9])
    record.expires = tonumber(parts[10])
    record.asked = parts[11]
    record.key = parts[12]
    record.model = parts[13]
  else
    record.from_allowance = tonumber(parts[3])
    record.from_balance = tonumber(parts[4])
    record.written_off = tonumber(parts[5])
  end
  return record
end

local function write_open(records, due, id, record)
  redis.call('HSET', records, id, table.concat({
    record.state, record.account, digits(record.epoch), digits(record.from_allowance), digits(record.from_balance),
    digits(record.payg), digits(record.rate), record.payg_allowed and '1' or '0', digits(record.created),
    digits(record.expires), record.asked, record.key, record.model
  }, '|'))
  redis.call('ZADD', due, digits(record.expires), id)
end

local function write_ended(records, due, id, state, account, outcome, now)
  redis.call('HSET', records, id, table.concat({
    state, account, digits(outcome.from_allowance), digits(outcome.from_balance), digits(outcome.written_off)
  }, '|'))
  redis.call('ZADD', due, digits(now + RETENTION_MS), id)
end

-- Take an open reservation's hold off the account. What was held in an earlier window lapses with it.
-- Returns the allowance that its cost may use up: in its own window the hold and whatever is free by now. The hold is
-- good even if the plan was lowered below it in the meantime.
local function release_hold(account, record)
  account.balance_held = account.balance_held - record.from_balance
  if record.epoch == account.epoch then
    account.held = account.held - record.from_allowance
    return math.max(record.from_allowance, allowance_free(account))
  end
  account.held_before = account.held_before - record.from_allowance
  return record.from_allowance
end

local function ended_reply(id, state, outcome, repeated)
  return {state, id, digits(outcome.from_allowance), digits(outcome.from_balance), digits(outcome.written_off),
    repeated and '1' or '0'}
end
