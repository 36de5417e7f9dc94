#!lua
--[[ settle: end a reservation with the actual cost.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 cost at list price (nano)   4 cost at the plan's rate (nano)
      5 note for the ledger   6 plan   7 allowance kind   8 allowance amount (nano)   9 refresh (ms)   10 rate (ppm)
      11 payg (0/1)
Returns {'settled' | 'voided', id, from allowance, from balance, written off, repeated (0/1), funds…}
        {'unknown_account'} | {'unknown_reservation'}

Rate and payg that decide here are those of the reservation, pinned when it was made; 6…11 only serve to show funds as
of now. The hold pays first: its own window's allowance (with what was freed there since), then the held balance. Cost
above the hold: the current window's allowance, then the free balance, then a recorded write-off: never a negative
balance. A reservation of an earlier window draws its hold from that window; what it leaves lapses. An expired one has
no hold left and may still settle once. A repeat answers what was stored.

The window is not rolled: until the next reservation rolls it, the window of this one is still open, and what this one
leaves lapses with the rest of it. ]]
--#include number window account ledger reservation

assert(#KEYS == 4 and #ARGV == 11, 'settle takes 4 keys and 11 arguments')
local name, id = ARGV[1], ARGV[2]
local cost = whole(ARGV[3], 'cost')
local cost_at_rate = whole(ARGV[4], 'cost at rate')
local terms = read_terms(7)

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local record = read_record(KEYS[2], id)
if not record or record.account ~= name then return {'unknown_reservation'} end
local now = account_ms(account)
if record.state == 'settled' or record.state == 'voided' then
  if account.plan == ARGV[6] then roll(account, terms, now) end
  return funds(account, terms, now, ended_reply(id, record.state, record, true))
end

-- Check: who pays
if record.state == 'expired' then
  record.from_allowance, record.from_balance = 0, 0
end
local allowance = release_hold(account, record)
local from_own_window = math.min(cost_at_rate, allowance)
local rest = 0
if cost_at_rate > allowance then rest = cost - covered_by(allowance, record.rate, cost) end
local from_balance = math.min(rest, record.from_balance)
rest = rest - from_balance
local from_new_window = 0
if record.epoch ~= account.epoch then
  local free = allowance_free(account)
  local covered = covered_by(free, record.rate, rest)
  from_new_window = covered == rest and math.min(free, at_rate(rest, record.rate)) or free
  rest = rest - covered
end
if record.payg_allowed then
  -- The released part of the hold is free again, but it has paid above already.
  local more = math.min(rest, balance_free(account) - from_balance)
  from_balance = from_balance + more
  rest = rest - more
end

-- Write
local outcome = {from_allowance = from_own_window + from_new_window, from_balance = from_balance, written_off = rest}
if record.epoch == account.epoch then
  account.used = account.used + from_own_window
else
  account.used = account.used + from_new_window
  local lapsed = record.from_allowance - from_own_window
  add_total(account, 'lapsed', lapsed)
  outcome.lapsed = lapsed
end
account.balance = account.balance - from_balance
remember_time(account, now)
add_total(account, 'used', outcome.from_allowance)
add_total(account, 'spent', from_balance)
add_total(account, 'written_off', rest)
append_entry(KEYS[4], name, account, 'settle', id, now, {
  allowance = outcome.from_allowance, balance = -from_balance, written_off = rest, lapsed = outcome.lapsed
}, {'note', ARGV[5]})
save_account(account)
write_ended(KEYS[2], KEYS[3], id, 'settled', name, outcome, now)
if account.plan == ARGV[6] then roll(account, terms, now) end -- in the answer only: saved above
return funds(account, terms, now, ended_reply(id, 'settled', outcome, false))
