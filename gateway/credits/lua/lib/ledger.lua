-- The ledger: one stream per shard, appended by the very script that moves the credits.
--
-- An entry: account, sequence (without gaps per account), kind, id, time (ms), postings, used_after, balance_after, and
-- what the kind has beyond that (plan, model, key, note). Of entries about windows, used_after is that of the last.
-- postings: 'book nano book nano …', signed and summing to 0. Books: balance against bought, refunded, deducted, spent;
-- unpaid against written_off; and per length of window granted:, window: (granted less used), used:, before: (held by
-- reservations of ended windows) and lapsed:.

local function post(postings, book, nano)
  postings[#postings + 1] = {book, nano}
end

-- One figure per book, in the order of their first mention; what comes to 0 is left out.
local function postings_text(postings)
  local order, sums = {}, {}
  for _, posting in ipairs(postings) do
    local book = posting[1]
    if not sums[book] then order[#order + 1] = book end
    sums[book] = (sums[book] or 0) + posting[2]
  end
  local parts = {}
  for _, book in ipairs(order) do
    if sums[book] ~= 0 then parts[#parts + 1] = book .. ' ' .. digits(sums[book]) end
  end
  return table.concat(parts, ' ')
end

local function used_text(account)
  local used = {}
  for i, window in ipairs(account.windows) do used[i] = digits(window.refresh) .. ':' .. digits(window.used) end
  return table.concat(used, ' ')
end

-- Keep an entry in memory until the account is saved. used: what the windows have used by then, if they may change once
-- more before.
local function add_entry(account, kind, id, postings, more, used)
  account.entries[#account.entries + 1] =
    {kind = kind, id = id, postings = postings_text(postings), more = more, used = used}
end

local function append_entries(account, ledger, name, now)
  local used = used_text(account)
  for _, entry in ipairs(account.entries) do
    account.sequence = account.sequence + 1
    redis.call('XADD', ledger, '*', 'account', name, 'sequence', digits(account.sequence), 'kind', entry.kind,
      'id', entry.id, 'time', digits(now), 'postings', entry.postings, 'used_after', entry.used or used,
      'balance_after', digits(account.balance), unpack(entry.more))
  end
end
