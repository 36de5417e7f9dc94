-- Reservation records: one text per id in the shard's record hash; the shard's due set says when the reaper
-- must look at it next (an open one: when its lease ends; an ended one: when it may be forgotten).
--
-- open, expired:              state|account|parts|from_balance|payg|rate|payg allowed|on_lost|created|expires|asked|key|
--                             model|seen_payg|seen_at_rate|written_off|seen_note; of an open one the last four are
--                             there only once something was seen
-- settled, voided, refunded:  state|account|parts|from_balance|written_off
--
-- parts: the allowance held (of an ended one: charged), and in which windows: 'amount@refresh:epoch,…;amount@…'. There
-- is more than one where a stream went on from one window into the next. payg: the list-price cost that the hold covers.
-- rate: nothing for 1000000, so that a record of an ordinary length fits in 16 bytes less of the allocator's.
-- seen_*: what the request was last seen to cost. Of an expired one, parts, from_balance and written_off are its charge.

local RETENTION_MS = 86400000 -- ended records answer repeats for 24 h
local VOIDED_RETENTION_MS = 3600000 -- those of requests that cost nothing, which anyone can make many of, for 1 h

-- at: a part's spans as the record has them. To keep that costs a tenth of making it anew from the spans, and what is
-- held now needs no more: it is written, and read by whoever ends it.
local function read_parts(text)
  -- Nearly all hold in one window only: one match costs a third of the loops.
  local amount, at, refresh, epoch = string.match(text, '^(%d+)@((%d+):(%d+))$')
  if amount then return {{amount = amount + 0, at = at, spans = {{refresh = refresh + 0, epoch = epoch + 0}}}} end
  local parts = {}
  for amount, at in string.gmatch(text, '(%d+)@([^;]*)') do
    local part = {amount = amount + 0, at = at, spans = {}}
    for refresh, epoch in string.gmatch(at, '(%d+):(%d+)') do
      part.spans[#part.spans + 1] = {refresh = refresh + 0, epoch = epoch + 0}
    end
    parts[#parts + 1] = part
  end
  return parts
end

-- The spans of a part in all the current windows, as a record has them.
local function current_spans(account)
  local text, windows = '', account.windows
  for i = 1, #windows do
    text = text .. (i == 1 and '' or ',') .. windows[i].book .. ':' .. string.format('%d', windows[i].epoch)
  end
  return text
end

local function parts_text(parts)
  local text = ''
  for i = 1, #parts do
    local part = parts[i]
    if part.amount > 0 then
      text = text .. (text == '' and '' or ';') .. string.format('%d', part.amount) .. '@' .. part.at
    end
  end
  return text
end

local function parts_sum(parts)
  local sum = 0
  for i = 1, #parts do sum = sum + parts[i].amount end
  return sum
end

local ENDED = '^(%a+)|([^|]*)|([^|]*)|(%d+)|(%d+)$'
local OPEN = '^(%a+)|([^|]*)|([^|]*)|(%d+)|(%d+)|(%d*)|([01])|([^|]*)|(%d+)|(%d+)|([^|]*)|([^|]*)|([^|]*)(.*)$'
local SEEN = '^|(%d+)|(%d+)|(%d+)|(.*)$'

local function read_record(text)
  local state, account, parts, from_balance, payg, rate, payg_allowed, on_lost, created, expires, asked, key, model,
    seen = string.match(text, OPEN)
  if not state then
    local written_off
    state, account, parts, from_balance, written_off = string.match(text, ENDED)
    if not state then return {} end
    return {
      state = state, account = account, parts = read_parts(parts), from_balance = from_balance + 0,
      written_off = written_off + 0
    }
  end
  local record = {
    state = state, account = account, parts = read_parts(parts), from_balance = from_balance + 0, payg = payg + 0,
    rate = rate == '' and PPM or rate + 0, payg_allowed = payg_allowed == '1', on_lost = on_lost, created = created + 0,
    expires = expires + 0, asked = asked, key = key, model = model, seen_payg = 0, seen_at_rate = 0, written_off = 0,
    seen_note = ''
  }
  if seen ~= '' then
    local seen_payg, seen_at_rate, written_off, seen_note = string.match(seen, SEEN)
    record.seen_payg, record.seen_at_rate = seen_payg + 0, seen_at_rate + 0
    record.written_off, record.seen_note = written_off + 0, seen_note
  end
  return record
end

local function stored_record(records, id)
  local text = redis.call('HGET', records, id)
  return text and read_record(text)
end

-- Texts are joined, and only numbers formatted: that costs half of formatting all.
local function write_record(records, due, id, record)
  local seen = ''
  if record.state == 'expired' or record.seen_payg > 0 or record.seen_note ~= '' then
    seen = string.format('|%d|%d|%d|%s', record.seen_payg, record.seen_at_rate, record.written_off, record.seen_note)
  end
  redis.call('HSET', records, id, record.state .. '|' .. record.account .. '|' .. parts_text(record.parts)
    .. string.format('|%d|%d|', record.from_balance, record.payg) .. (record.rate == PPM and '|' or record.rate .. '|')
    .. (record.payg_allowed and '1|' or '0|') .. record.on_lost
    .. string.format('|%d|%d|', record.created, record.expires) .. record.asked .. '|' .. record.key .. '|'
    .. record.model .. seen)
  redis.call('ZADD', due, record.expires, id)
end

local function write_ended(records, due, id, state, account, charge, now)
  redis.call('HSET', records, id, state .. '|' .. account .. '|' .. parts_text(charge.parts)
    .. string.format('|%d|%d', charge.from_balance, charge.written_off))
  redis.call('ZADD', due, now + (state == 'voided' and VOIDED_RETENTION_MS or RETENTION_MS), id)
end

-- Note with each part in which figure of each window its hold is: 'held', 'adopted', 'before', or false for a later
-- window of another plan that never knew of it. Whether the windows are all still those that the hold was made in.
local function find_holders(account, record)
  local own, parts, windows = true, record.parts, account.windows
  for i = 1, #parts do
    local spans, holders = parts[i].spans, {}
    for n = 1, #windows do
      local window, holder = windows[n], false
      for s = 1, #spans do
        local epoch = spans[s].epoch
        if epoch == window.epoch then holder = 'held' break end
        if spans[s].refresh == window.refresh and epoch >= window.first then holder = holder or 'before' end
        if window.adopted_epochs ~= '' then
          for adopted in string.gmatch(window.adopted_epochs, '%d+') do
            if epoch == adopted + 0 then holder = 'adopted' end
          end
        end
      end
      holders[n] = holder
      own = own and (holder == 'held' or holder == 'adopted')
    end
    parts[i].holders = holders
  end
  return own
end

-- Put a record's hold into the account, or with sign -1 take it out.
local function move_hold(account, record, sign)
  local parts, windows = record.parts, account.windows
  account.balance_held = account.balance_held + sign * record.from_balance
  for i = 1, #parts do
    for n = 1, #windows do
      local window, holder = windows[n], parts[i].holders[n]
      if holder then
        window[holder] = window[holder] + sign * parts[i].amount
        if holder ~= 'held' then window.tail = nil end
      end
    end
  end
end

-- Hold so much more: allowance in all the current windows, and balance.
local function add_hold(account, record, allowance, balance)
  local at, parts, windows = current_spans(account), record.parts, account.windows
  for i = 1, #windows do windows[i].held = windows[i].held + allowance end
  local last = parts[#parts]
  if last and last.at == at then
    last.amount = last.amount + allowance
  elseif allowance > 0 then
    parts[#parts + 1] = {amount = allowance, at = at}
  end
  record.from_balance = record.from_balance + balance
  account.balance_held = account.balance_held + balance
end

-- The reply that a reservation is over.
local function ended_reply(id, state, charge, repeated)
  return {state, id, parts_sum(charge.parts), charge.from_balance, charge.written_off, repeated and 1 or 0}
end
