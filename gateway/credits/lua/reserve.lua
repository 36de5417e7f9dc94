#!lua
--[[ reserve: hold credits for a request before it is forwarded.

KEYS  1 account hash   2 shard's records   3 shard's due set   4 shard's ledger
ARGV  1 account   2 reservation id   3 amount at list price (nano)   4 amount at the plan's rate (nano)
      5 minimum at list price (nano) while other requests hold credits   6 minimum while none does
      7 lease (ms)   8 the gateway's clock (ms)   9 key id, or empty   10 model
      11 hash of the client's idempotency key, or empty   12 hash of the request's body
      13 whether the hold will grow (0/1)
      14 plan   15… the plan's terms: rate (ppm), payg (0/1), on_lost, then kind, amount (nano), refresh (ms) per window
Returns {'reserved', from allowance, from balance, list-price cost covered, funds…}
        {'denied', funds…}: nothing was written
        {'unknown_account'} | {'unknown_key'} | {'other_plan', plan} | {'skewed', store's clock (ms)}
        {'conflict'}: the id was used with other parameters   {'ended', state}: the id's reservation is over
        {'in_progress' | 'answered', reservation id, cost (nano)} | {'other_body'}: the idempotency key was used before

The allowance pays first, at the plan's rate; prepaid credits pay the rest at list price. Between the minimum and
the amount, whatever is free is granted; one that will grow must leave room for those in flight, too. Example: rate 1,
amount 10, minimum 4, allowance free 3, balance free 2: granted 5, from allowance 3, from balance 2. ]]
--#include number window ledger account plan reservation idempotency

assert(#KEYS == 4 and #ARGV >= 17, 'reserve takes 4 keys and at least 17 arguments')
local name, id = ARGV[1], ARGV[2]
local amount = whole(ARGV[3], 'amount')
local amount_at_rate = whole(ARGV[4], 'amount at rate')
local minimum = whole(ARGV[5], 'minimum')
local minimum_alone = whole(ARGV[6], 'minimum alone')
local lease = whole(ARGV[7], 'lease')
local gateway_ms = whole(ARGV[8], 'gateway clock')
local key, model, grows, plan = ARGV[9], ARGV[10], ARGV[13] == '1', ARGV[14]
local terms = read_terms(15)
local asked = table.concat({ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[13], ARGV[11]}, ',')

-- Streams beside each other outgrow what they first hold. So much of what is held stays free for them, and no more than
-- so many times what the new one holds: without it, a new one would take what the others are cut for.
local ROOM_SHARE, ROOM_AMOUNTS = 8, 8

-- Read
local account = load_account(KEYS[1])
if not account then return {'unknown_account'} end
local now = account_ms(account)
local record = read_record(KEYS[2], id)
if record then
  if record.account ~= name or (record.state == 'open' and record.asked ~= asked) then return {'conflict'} end
  if record.state ~= 'open' then return {'ended', record.state} end
  return funds(account, terms, now,
    {'reserved', digits(parts_sum(record.parts)), digits(record.from_balance), digits(record.payg)})
end

-- Check
if key ~= '' and redis.call('HEXISTS', KEYS[1], 'k:' .. key) == 0 then return {'unknown_key'} end
local earlier = earlier_request(KEYS[2], name, ARGV[11], ARGV[12])
if earlier then return earlier end
if account.plan ~= plan then return {'other_plan', account.plan} end
if skewed(account, now, gateway_ms) then return {'skewed', digits(store_ms())} end
roll(account, terms, now)
local allowance = allowance_free(account)
local balance = terms.payg and balance_free(account) or 0
local from_allowance, from_balance, covered = amount_at_rate, 0, amount
if allowance < amount_at_rate then
  local by_allowance = covered_by(allowance, terms.rate, amount)
  from_allowance = allowance
  from_balance = math.min(balance, amount - by_allowance)
  covered = by_allowance + from_balance
end
local in_flight = held_in_flight(account, terms)
local least = math.min(in_flight > 0 and minimum or minimum_alone, amount)
local room = grows and math.min(math.floor(in_flight / ROOM_SHARE), ROOM_AMOUNTS * amount) or 0
if covered < least or allowance - from_allowance + balance - from_balance < room then
  return funds(account, terms, now, {'denied'})
end

-- Write
record = {
  state = 'open', account = name, parts = {}, from_balance = 0, payg = covered, rate = terms.rate,
  payg_allowed = terms.payg, on_lost = terms.on_lost, created = now, expires = now + lease, asked = asked, key = key,
  model = model, seen_payg = 0, seen_at_rate = 0, written_off = 0, seen_note = ''
}
add_hold(account, record, from_allowance, from_balance)
remember_time(account, now)
save_account(account, KEYS[4], name, now)
write_record(KEYS[2], KEYS[3], id, record)
remember_request(KEYS[2], KEYS[3], name, ARGV[11], ARGV[12], id, now)
return funds(account, terms, now, {'reserved', digits(from_allowance), digits(from_balance), digits(covered)})
