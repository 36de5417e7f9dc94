#!lua
--[[ release: end a reservation without its maker's word on the cost: void (by whoever made it, or an operator), expire
(only if its lease has run out) or abandon (whoever made it is known to be gone; otherwise like expire).

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 'void', 'expire' or 'abandon'
Returns {'settled' | 'voided' | 'refunded' | 'expired', id, from allowance, from balance, written off, repeated (0/1)}
        {'open', lease's end (ms)}: expire came too early
        {'unknown_account'} | {'unknown_reservation'}

A voided one costs nothing and is over; if it had expired, what that charged is given back. An expired one is charged as
its plan says (on_lost): what it was seen to cost, its whole hold, or nothing; it keeps its record, so that a late
settlement still lands once. What an earlier window's hold leaves lapses. The window is not rolled: nothing here needs
it. ]]
--#include number window ledger account terms rolling plan reservation idempotency charge

assert(#KEYS == 4 and #ARGV == 3, 'release takes 4 keys and 3 arguments')
local name, id, verb = ARGV[1], ARGV[2], ARGV[3]

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local record = stored_record(KEYS[2], id)
if not record or record.account ~= name then return {'unknown_reservation'} end
local now = store_ms(account.seen)

-- Check
local late = verb == 'void' and record.state == 'expired'
if record.state ~= 'open' and not late then return ended_reply(id, record.state, record, true) end
if verb == 'expire' and now < record.expires then return {'open', record.expires} end
local cost, cost_at_rate = 0, 0
if verb ~= 'void' and record.on_lost == 'charge_seen' then
  cost, cost_at_rate = record.seen_payg, record.seen_at_rate
elseif verb ~= 'void' and record.on_lost == 'charge_hold' then
  cost, cost_at_rate = record.payg, at_rate(record.payg, record.rate)
end

-- Write
local postings = {}
if late then uncharge(account, record, postings) end
local charged = charge(account, record, cost, cost_at_rate, postings)
if postings_text(postings) ~= '' then
  add_entry(account, late and 'void' or cost > 0 and 'expire' or 'lapse', id, postings,
    {'model', record.model, 'key', record.key, 'note', record.seen_note})
end
remember_time(account, now)
save_account(account, KEYS[4], name, now)
if verb == 'void' then
  write_ended(KEYS[2], KEYS[3], id, 'voided', name, charged, now)
  forget_request(KEYS[2], KEYS[3], name, record.asked, id)
  return ended_reply(id, 'voided', charged, false)
end
record.state, record.expires = 'expired', now + RETENTION_MS
record.parts, record.from_balance, record.written_off = charged.parts, charged.from_balance, charged.written_off
write_record(KEYS[2], KEYS[3], id, record)
return ended_reply(id, 'expired', charged, false)
