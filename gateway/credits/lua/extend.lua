#!lua
--[[ extend: grow a live reservation while its answer streams, renew its lease, and record what it has cost so far.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 hold wanted in all at list price (nano)   4 the same at the plan's rate (nano)
      5 cost seen so far at list price (nano)   6 the same at the plan's rate (nano)   7 note for the ledger, were the
      seen cost to be charged; it holds no '|'   8 lease from now (ms)   9 the gateway's clock (ms)
      10 plan   11 the plan's terms
Returns {'extended', from allowance, from balance, list-price cost covered, funds…}: all that is held now, which is less
          than was wanted where credits ran short
        {'ended', state, funds…}: the reservation is over   {'unknown_account'} | {'unknown_reservation'}

One whose lease has run out is opened again: what its expiry charged is taken back, and held again.

A repeat changes nothing: what is wanted is a total, and nothing is ever given back here. The hold grows at the rate
that was pinned by the reservation, from the windows of now. Where a refresh is due that this call may not make (the
account has left the plan, or the clocks of gateway and store differ), it grows from the balance alone. ]]
--#include number window ledger account terms rolling plan reservation charge

assert(#KEYS == 4 and #ARGV == 11, 'extend takes 4 keys and 11 arguments')
local name, id = ARGV[1], ARGV[2]
local wanted = whole(ARGV[3], 'hold wanted')
local wanted_at_rate = whole(ARGV[4], 'hold wanted at rate')
local seen_payg = whole(ARGV[5], 'cost seen')
local seen_at_rate = whole(ARGV[6], 'cost seen at rate')
local lease = whole(ARGV[8], 'lease')
local gateway_ms = whole(ARGV[9], 'gateway clock')
local plan = ARGV[10]
local terms = ARGV[11]

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local record = stored_record(KEYS[2], id)
if not record or record.account ~= name then return {'unknown_reservation'} end
local now = store_ms(account.seen)

-- Check
if record.state ~= 'open' and record.state ~= 'expired' then
  return {'ended', record.state, funds(account, now)}
end
if record.state == 'expired' then
  local postings = {}
  uncharge(account, record, postings)
  -- A refresh may follow.
  add_entry(account, 'reopen', id, postings, {'model', record.model, 'key', record.key}, used_text(account))
  record.state, record.written_off, record.expires = 'open', 0, now
  record.payg = covered_by(parts_sum(record.parts), record.rate, record.payg) + record.from_balance
end
local more_allowance, more_balance = 0, 0
if wanted > record.payg then
  if account.plan == plan and not skewed(account, now, gateway_ms) then roll(account, terms, now) end
  local free = now < first_finish(account) and allowance_free(account) or 0
  local held = parts_sum(record.parts)
  local rest = wanted - covered_by(held, record.rate, wanted) - record.from_balance
  -- Without any balance in it, the whole hold is rounded once.
  local most = record.from_balance == 0 and wanted_at_rate - held or at_rate(rest, record.rate)
  more_allowance = math.max(0, math.min(free, most))
  local by_allowance = covered_by(held + more_allowance, record.rate, wanted)
  if record.from_balance == 0 and held + more_allowance >= wanted_at_rate then by_allowance = wanted end
  rest = wanted - by_allowance - record.from_balance
  if record.payg_allowed then more_balance = math.max(0, math.min(balance_free(account), rest)) end
  record.payg = math.max(record.payg, math.min(wanted, by_allowance + record.from_balance + more_balance))
end

-- Write
add_hold(account, record, more_allowance, more_balance)
record.expires = math.max(record.expires, now + lease)
if seen_payg >= record.seen_payg then
  record.seen_payg, record.seen_at_rate, record.seen_note = seen_payg, seen_at_rate, ARGV[7]
end
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_record(KEYS[2], KEYS[3], id, record)
return {'extended', parts_sum(record.parts), record.from_balance, record.payg, funds(account, now)}
