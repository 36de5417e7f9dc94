-- Reservation records: one text per id in the shard's record hash; the shard's due set says when the reaper
-- must look at it next (an open one: when its lease ends; an ended one: when it may be forgotten).
--
-- open, expired:              state|account|parts|from_balance|payg|rate|payg allowed|on_lost|created|expires|asked|key|
--                             model|seen_payg|seen_at_rate|written_off|seen_note
-- settled, voided, refunded:  state|account|parts|from_balance|written_off
--
-- parts: the allowance held (of an ended one: charged), and in which windows: 'amount@refresh:epoch,…;amount@…'. There
-- is more than one where a stream went on from one window into the next. payg: the list-price cost that the hold covers.
-- seen_*: what the request was last seen to cost. Of an expired one, parts, from_balance and written_off are its charge.

local RETENTION_MS = 86400000 -- ended records answer repeats for 24 h
local VOIDED_RETENTION_MS = 3600000 -- those of requests that cost nothing, which anyone can make many of, for 1 h

local function read_parts(text)
  local parts = {}
  for amount, spans in string.gmatch(text, '(%d+)@([^;]*)') do
    local part = {amount = tonumber(amount), spans = {}}
    for refresh, epoch in string.gmatch(spans, '(%d+):(%d+)') do
      part.spans[#part.spans + 1] = {refresh = tonumber(refresh), epoch = tonumber(epoch)}
    end
    parts[#parts + 1] = part
  end
  return parts
end

local function spans_text(spans)
  local texts = {}
  for i, span in ipairs(spans) do texts[i] = digits(span.refresh) .. ':' .. digits(span.epoch) end
  return table.concat(texts, ',')
end

local function parts_text(parts)
  local texts = {}
  for _, part in ipairs(parts) do
    if part.amount > 0 then texts[#texts + 1] = digits(part.amount) .. '@' .. spans_text(part.spans) end
  end
  return table.concat(texts, ';')
end

local function parts_sum(parts)
  local sum = 0
  for _, part in ipairs(parts) do sum = sum + part.amount end
  return sum
end

local function read_record(records, id)
  local text = redis.call('HGET', records, id)
  if not text then return nil end
  local fields = {}
  for field in string.gmatch(text .. '|', '([^|]*)|') do fields[#fields + 1] = field end
  local record = {
    state = fields[1], account = fields[2], parts = read_parts(fields[3] or ''), from_balance = tonumber(fields[4]),
    written_off = tonumber(fields[5])
  }
  if record.state == 'open' or record.state == 'expired' then
    record.payg = tonumber(fields[5])
    record.rate = tonumber(fields[6])
    record.payg_allowed = fields[7] == '1'
    record.on_lost = fields[8]
    record.created = tonumber(fields[9])
    record.expires = tonumber(fields[10])
    record.asked = fields[11]
    record.key = fields[12]
    record.model = fields[13]
    record.seen_payg = tonumber(fields[14])
    record.seen_at_rate = tonumber(fields[15])
    record.written_off = tonumber(fields[16])
    record.seen_note = fields[17]
  end
  return record
end

local function write_record(records, due, id, record)
  redis.call('HSET', records, id, table.concat({
    record.state, record.account, parts_text(record.parts), digits(record.from_balance), digits(record.payg),
    digits(record.rate), record.payg_allowed and '1' or '0', record.on_lost, digits(record.created),
    digits(record.expires), record.asked, record.key, record.model, digits(record.seen_payg),
    digits(record.seen_at_rate), digits(record.written_off), record.seen_note
  }, '|'))
  redis.call('ZADD', due, digits(record.expires), id)
end

local function write_ended(records, due, id, state, account, charge, now)
  redis.call('HSET', records, id, table.concat({
    state, account, parts_text(charge.parts), digits(charge.from_balance), digits(charge.written_off)
  }, '|'))
  redis.call('ZADD', due, digits(now + (state == 'voided' and VOIDED_RETENTION_MS or RETENTION_MS)), id)
end

-- Which of a window's figures a part's hold is in: 'held', 'adopted', 'before', or nil for a later window of another
-- plan that never knew of it.
local function holder_of(window, part)
  local holder
  for _, span in ipairs(part.spans) do
    if span.epoch == window.epoch then return 'held' end
    if span.refresh == window.refresh and span.epoch >= window.first then holder = holder or 'before' end
    for _, epoch in ipairs(window.adopted_epochs) do
      if span.epoch == epoch then holder = 'adopted' end
    end
  end
  return holder
end

local function move_hold(account, record, sign)
  account.balance_held = account.balance_held + sign * record.from_balance
  for _, part in ipairs(record.parts) do
    for _, window in ipairs(account.windows) do
      local holder = holder_of(window, part)
      if holder then window[holder] = window[holder] + sign * part.amount end
    end
  end
end

-- Hold so much more: allowance in all the current windows, and balance.
local function add_hold(account, record, allowance, balance)
  local spans = {}
  for i, window in ipairs(account.windows) do
    spans[i] = {refresh = window.refresh, epoch = window.epoch}
    window.held = window.held + allowance
  end
  local last = record.parts[#record.parts]
  if last and spans_text(last.spans) == spans_text(spans) then
    last.amount = last.amount + allowance
  elseif allowance > 0 then
    record.parts[#record.parts + 1] = {amount = allowance, spans = spans}
  end
  record.from_balance = record.from_balance + balance
  account.balance_held = account.balance_held + balance
end

local function ended_reply(id, state, charge, repeated)
  return {state, id, digits(parts_sum(charge.parts)), digits(charge.from_balance), digits(charge.written_off),
    repeated and '1' or '0'}
end
