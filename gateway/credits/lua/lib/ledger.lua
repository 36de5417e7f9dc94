-- The ledger: one stream per shard, appended by the very script that moves the credits.
--
-- An entry: account, sequence (without gaps per account), kind, id, time (ms), postings, used_after, balance_after, and
-- what the kind has beyond that (plan, model, key, note). Of entries about windows, used_after is that of the last.
-- postings: 'book nano book nano …', signed and summing to 0. Books: balance against bought, refunded, deducted, spent;
-- unpaid against written_off; and per length of window granted:, window: (granted less used), used:, before: (held by
-- reservations of ended windows) and lapsed:.

-- Postings: the books in the order of their first mention, and each book's sum.
local function post(postings, book, nano)
  local sum = postings[book]
  if not sum then postings[#postings + 1] = book end
  postings[book] = (sum or 0) + nano
end

local function postings_text(postings)
  local text = ''
  for i = 1, #postings do
    local book = postings[i]
    local sum = postings[book]
    if sum ~= 0 then text = text .. (text == '' and '' or ' ') .. book .. ' ' .. string.format('%d', sum) end
  end
  return text
end

local function used_text(account)
  local text, windows = '', account.windows
  for i = 1, #windows do
    text = text .. (i == 1 and '' or ' ') .. windows[i].book .. ':' .. string.format('%d', windows[i].used)
  end
  return text
end

-- Keep an entry in memory until the account is saved. used: what the windows have used by then, if they may change once
-- more before.
local function add_entry(account, kind, id, postings, more, used)
  local entry = {kind = kind, id = id, postings = postings_text(postings), more = more, used = used}
  if not account.entries then account.entries = {} end
  table.insert(account.entries, entry)
end

local function append_entries(account, ledger, name, now) --#on-demand
  for _, entry in ipairs(account.entries) do
    account.sequence = account.sequence + 1
    redis.call('XADD', ledger, '*', 'account', name, 'sequence', account.sequence, 'kind', entry.kind,
      'id', entry.id, 'time', now, 'postings', entry.postings, 'used_after', entry.used or used_text(account),
      'balance_after', account.balance, unpack(entry.more))
  end
end
