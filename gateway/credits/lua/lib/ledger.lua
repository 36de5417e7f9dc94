-- The ledger: one stream per shard, appended by the very script that moves the credits.
-- Fields of an entry: account, sequence (without gaps per account), kind, id, time (ms), then the movement:
-- granted, lapsed, allowance (charged), balance (signed change), written_off, all nano, zero ones left out;
-- used_after, balance_after; and what the caller wants remembered (plan, note).

local MOVEMENTS = {'granted', 'lapsed', 'allowance', 'balance', 'written_off'}

local function append_entry(ledger, name, account, kind, id, now, movement, remember)
  account.sequence = account.sequence + 1
  local entry = {'account', name, 'sequence', digits(account.sequence), 'kind', kind, 'id', id, 'time', digits(now)}
  for _, field in ipairs(MOVEMENTS) do
    if movement[field] and movement[field] ~= 0 then
      entry[#entry + 1] = field
      entry[#entry + 1] = digits(movement[field])
    end
  end
  for _, value in ipairs({'used_after', digits(account.used), 'balance_after', digits(account.balance)}) do
    entry[#entry + 1] = value
  end
  for _, value in ipairs(remember) do entry[#entry + 1] = value end
  redis.call('XADD', ledger, '*', unpack(entry))
end

-- The refresh that roll() made in memory goes on record before whatever caused it.
local function append_refresh(ledger, name, account, now)
  if not account.refreshed then return end
  append_entry(ledger, name, account, 'refresh', digits(account.window_end), now, account.refreshed,
    {'epoch', digits(account.epoch)})
end
