#!lua
--[[ settle: end a reservation with the actual cost.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 cost at list price (nano)   4 cost at the plan's rate (nano)
      5 note for the ledger   6 when the reservation was made (ms, store's clock)   7 key id   8 model
      9 plan   10 the plan's terms
Returns {'settled' | 'voided' | 'refunded', id, from allowance, from balance, written off, repeated (0/1), funds…}
        {'unknown_account'} | {'unknown_reservation'}

Rate and payg that decide here are those of the reservation, pinned when it was made; the terms serve to show funds as
of now, and for a reservation that the store has lost: one made less than an hour ago must have a record, so if there is
none a failover has lost it, and the cost is charged without a hold. An expired one was charged for what was seen of it:
that is taken back, and the actual cost charged instead. A repeat answers what was stored.

The window is not rolled: until the next reservation rolls it, the window of this one is still open, and what this one
leaves lapses with the rest of it. ]]
--#include number window ledger account terms rolling plan reservation charge

assert(#KEYS == 4 and #ARGV == 10, 'settle takes 4 keys and 10 arguments')
local name, id, plan = ARGV[1], ARGV[2], ARGV[9]
local cost = whole(ARGV[3], 'cost')
local cost_at_rate = whole(ARGV[4], 'cost at rate')
local created = whole(ARGV[6], 'creation')
local terms = ARGV[10]

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local stored = redis.call('HGET', KEYS[2], id)
local record = stored and read_record(stored)
local now = store_ms(account.seen)

-- Check
if record and record.account ~= name then return {'unknown_reservation'} end
if not record then
  if now >= created + VOIDED_RETENTION_MS then return {'unknown_reservation'} end
  local pinned = read_terms(terms)
  record = {
    state = 'lost', parts = {}, from_balance = 0, rate = pinned.rate, payg_allowed = pinned.payg, created = created,
    key = ARGV[7], model = ARGV[8]
  }
end
local charged, repeated, state = record, 1, record.state
if state == 'open' or state == 'expired' or state == 'lost' then
  -- Write
  local postings = {}
  if state == 'expired' then uncharge(account, record, postings) end
  charged, repeated, state = charge(account, record, cost, cost_at_rate, postings), 0, 'settled'
  remember_time(account, now)
  add_entry(account, 'settle', id, postings, {'model', record.model, 'key', record.key, 'note', ARGV[5]})
  save_account(account, KEYS[4], name, now)
  write_ended(KEYS[2], KEYS[3], id, 'settled', name, charged, now)
end
if account.plan == plan then roll(account, terms, now) end -- in the answer only: saved above
return {
  state, id, parts_sum(charged.parts), charged.from_balance, charged.written_off, repeated, funds(account, now)
}
