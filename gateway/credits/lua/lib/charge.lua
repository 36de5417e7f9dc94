-- Who pays a cost, and what that moves.

-- Of a part of the hold that was released, take so much as used; what an ended window held beyond that lapses.
-- sign -1 takes such a charge back.
local function use_part(account, record, part, used, sign, postings)
  local today = record.created and record.created >= account.day
  local windows, spans, holders = account.windows, part.spans, part.holders
  for n = 1, #windows do
    local window, holder = windows[n], holders[n]
    local book = window.book
    if holder == 'held' or holder == 'adopted' then
      -- A window that took another's place has not seen all that was used in that one.
      local moved = sign * used
      if moved < -window.used then moved = -window.used end
      window.used = window.used + moved
      post(postings, 'window:' .. book, -moved)
      post(postings, 'used:' .. book, moved)
      today = true
    elseif holder == 'before' then
      post(postings, 'before:' .. book, -sign * part.amount)
      post(postings, 'used:' .. book, sign * used)
      post(postings, 'lapsed:' .. book, sign * (part.amount - used))
    end
  end
  for s = 1, #spans do
    local known = false
    for n = 1, #windows do known = known or (holders[n] and windows[n].refresh == spans[s].refresh) end
    -- Its window was closed, and what it held lapsed, when the plan no longer had one of that length.
    if not known then
      local book = string.format('%d', spans[s].refresh)
      post(postings, 'lapsed:' .. book, -sign * used)
      post(postings, 'used:' .. book, sign * used)
    end
  end
  if today then account.day_used = math.max(0, account.day_used + sign * used) end
end

local function use_now(account, nano, charged, postings) --#on-demand
  for _, window in ipairs(account.windows) do
    window.used = window.used + nano
    post(postings, 'window:' .. window.book, -nano)
    post(postings, 'used:' .. window.book, nano)
  end
  account.day_used = account.day_used + nano
  charged.parts[#charged.parts + 1] = {amount = nano, at = current_spans(account)}
end

local function move_outcome(account, charged, sign, postings)
  local used, balance, written_off = parts_sum(charged.parts), charged.from_balance, charged.written_off
  if used > 0 then add_total(account, 'used', sign * used) end
  if balance > 0 then
    account.balance = account.balance - sign * balance
    post(postings, 'balance', -sign * balance)
    post(postings, 'spent', sign * balance)
    add_total(account, 'spent', sign * balance)
  end
  if written_off > 0 then
    post(postings, 'unpaid', -sign * written_off)
    post(postings, 'written_off', sign * written_off)
    add_total(account, 'written_off', sign * written_off)
  end
end

-- End a record's hold with a cost (list price, and at the plan's rate); returns what was charged.
--
-- The hold pays first: its allowance (in its own windows with what was freed there since), then its balance. Beyond it:
-- the allowance of the windows of now, the free balance, and at last a recorded write-off: never a negative balance.
local function charge(account, record, cost, cost_at_rate, postings)
  local own_windows = find_holders(account, record)
  move_hold(account, record, -1)
  local available = parts_sum(record.parts)
  if own_windows then available = math.max(available, allowance_free(account)) end
  local own, rest = math.min(cost_at_rate, available), 0
  if cost_at_rate > available then rest = cost - covered_by(available, record.rate, cost) end
  local charged = {parts = {}, from_balance = math.min(rest, record.from_balance)}
  rest = rest - charged.from_balance

  for i, part in ipairs(record.parts) do
    local used = math.min(own, part.amount)
    use_part(account, record, part, used, 1, postings)
    charged.parts[i] = {amount = used, at = part.at}
    own = own - used
  end
  if not own_windows then
    local free = allowance_free(account)
    local covered = covered_by(free, record.rate, rest)
    own = covered == rest and math.min(free, at_rate(rest, record.rate)) or free
    rest = rest - covered
  end
  if own > 0 then use_now(account, own, charged, postings) end
  if record.payg_allowed then
    -- The released part of the hold is free again, but it has paid above already.
    local more = math.min(rest, balance_free(account) - charged.from_balance)
    charged.from_balance = charged.from_balance + more
    rest = rest - more
  end
  charged.written_off = rest
  move_outcome(account, charged, 1, postings)
  return charged
end

-- Take back what a record says was charged, so that it is held again and can be charged anew.
local function uncharge(account, record, postings)
  find_holders(account, record)
  for _, part in ipairs(record.parts) do use_part(account, record, part, part.amount, -1, postings) end
  move_outcome(account, record, -1, postings)
  move_hold(account, record, 1)
end
